"""The embedded world: renderer, captions, gold score, splits, and the quality of the trained weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from vdm_env import make
from vdm_env.worlds.moving_shapes import gold_score, prompt_splits
from vdm_env.worlds.moving_shapes.gold import WEIGHTS
from vdm_env.worlds.moving_shapes.render import (
    COLOURS,
    DIRECTIONS,
    SHAPES,
    captions_of,
    parse_caption,
    random_labels,
    render,
    sample_scenes,
)


@pytest.fixture(scope="module")
def scenes():
    generator = torch.Generator().manual_seed(0)
    labels = random_labels(256, generator)
    return labels, sample_scenes(labels, generator)


def test_same_seed_same_video(scenes):
    labels, first = scenes
    generator = torch.Generator().manual_seed(0)
    again = sample_scenes(random_labels(256, generator), generator)
    assert torch.equal(render(first), render(again))


def test_shapes_stay_inside_the_picture(scenes):
    _, batch = scenes
    video = render(batch)
    background = batch.background[:, None, :, None]
    for edge in (video[..., 0, :], video[..., -1, :], video[..., :, 0], video[..., :, -1]):
        touched = ((edge - background).abs().amax(2) > 0.3).any(-1).float().mean()
        assert touched < 0.05  # tips of the largest triangles and crosses may graze an edge


def test_captions_round_trip(scenes):
    labels, _ = scenes
    assert [parse_caption(c) for c in captions_of(labels)] == [tuple(row) for row in labels.tolist()]
    for wrong in ("", "a red circle", "a pink circle moving left", "a red circle moving left now"):
        with pytest.raises(ValueError, match="is not a MovingShapes caption"):
            parse_caption(wrong)


def test_gold_of_true_videos_is_one(scenes):
    labels, batch = scenes
    score = gold_score(render(batch), captions_of(labels))
    assert score.colour.mean() == score.shape.mean() == score.direction.mean() == 1.0
    assert score.total.min() > 0.95 and score.total.max() <= 1.0
    assert sum(WEIGHTS.values()) == 1.0


@pytest.mark.parametrize(
    "attribute, count", [("colour", len(COLOURS)), ("shape", len(SHAPES)), ("direction", len(DIRECTIONS))]
)
def test_gold_sees_each_wrong_attribute_and_only_it(scenes, attribute, count):
    labels, batch = scenes
    column = ("colour", "shape", "direction").index(attribute)
    wrong = labels.clone()
    wrong[:, column] = (wrong[:, column] + 1) % count
    score = gold_score(render(batch), captions_of(wrong))
    for part in ("colour", "shape", "direction"):
        assert getattr(score, part).mean() == (0.0 if part == attribute else 1.0)


def test_gold_falls_with_noise_jitter_and_emptiness(scenes):
    labels, batch = scenes
    captions, video = captions_of(labels), render(batch)
    generator = torch.Generator().manual_seed(1)
    noisy = (video + 0.1 * torch.randn(video.shape, generator=generator)).clamp(0, 1)
    assert gold_score(noisy, captions).clean.mean() < 0.5
    order = torch.randperm(video.shape[1], generator=generator)
    assert gold_score(video[:, order], captions).smooth.mean() < 0.3
    empty = batch.background[:, None, :, None, None].expand_as(video)
    assert gold_score(empty, captions).total.max() == 0.0
    still = render(dataclasses.replace(batch, speed=torch.zeros_like(batch.speed)))
    assert gold_score(still, captions).direction.max() == 0.0


def test_gold_refuses_what_it_cannot_measure(scenes):
    labels, batch = scenes
    with pytest.raises(ValueError, match=r"expected video \[B, F, 3, H, W\]"):
        gold_score(render(batch)[0], captions_of(labels[:1]))
    with pytest.raises(ValueError, match="is not a MovingShapes caption"):
        gold_score(render(batch)[:1], ["a cat"])


def test_splits_are_disjoint_and_balanced():
    splits = prompt_splits()
    assert {name: len(texts) for name, texts in splits.items()} == {"train": 80, "validation": 16, "test": 16}
    texts = [t for split in splits.values() for t in split]
    assert len(set(texts)) == 112
    for split in splits.values():
        labels = torch.tensor([parse_caption(t) for t in split])
        for column, count in enumerate((len(COLOURS), len(SHAPES), len(DIRECTIONS))):
            assert len(labels[:, column].unique()) == count


# The qualities asked of the embedded models: good at colour and shape, headroom in the direction of motion.
@pytest.mark.parametrize("model", ["MovingShapes", "MovingShapesUNet"])
@torch.no_grad()
def test_embedded_models_know_colour_and_shape_but_not_direction(model):
    env = make(f"{model}-Brightness", num_envs=112)
    policy = env.make_policy()
    obs, _ = env.reset(seed=1, options={"prompt_ids": list(range(112))})
    for _ in range(env.num_steps):
        obs, _, terminated, _, info = env.step(policy(obs))
    assert terminated.all()
    score = gold_score(info["video"], [env.prompts[i] for i in obs["prompt_id"].tolist()])
    assert score.colour.mean() >= 0.95
    assert score.shape.mean() >= 0.85
    # From chance (a quarter, less three standard errors of 112 videos) to three quarters.
    assert 0.13 <= score.direction.mean() <= 0.75
