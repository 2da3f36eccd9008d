"""What holds for DRaFT-LV, ReFL and InstructVideo alike: they repeat, resume, and learn on MovingShapes; video sets."""

from __future__ import annotations

import math

import pytest
import torch
from conduct import goes_on_bit_for_bit, refuses_a_gradient_that_is_not_finite, repeats
from gaussian import full_policy, gaussian_env, vader_on
from reward_gradient import ALGORITHMS, draft_lv_on, refl_on

import vdm_env
from algos.instructvideo import InstructVideo, InstructVideoConfig
from algos.video_set import VideoSet, from_folder, order, rendered_shapes
from vdm_env.video import save_mp4
from vdm_env.worlds.moving_shapes import gold_score


def gaussian_cut_on(env, policy, **options):
    return vader_on(env, policy, truncation="gaussian", **options)


BUILDERS = {**ALGORITHMS, "vader, gaussian cut": gaussian_cut_on}
each_algorithm = pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)


@each_algorithm
def test_the_same_seed_gives_the_same_run_and_another_one_another(build):
    def run(seed):
        env = gaussian_env()
        algorithm = build(env, full_policy(env), seed=seed)
        return [algorithm.update() for _ in range(3)]

    first = repeats(run)
    assert all(type(value) is float and math.isfinite(value) for row in first for value in row.values())


@each_algorithm
def test_a_run_continues_bit_for_bit_from_a_checkpoint(build, tmp_path):
    env = gaussian_env()
    policy = env.make_policy(lora_rank=2)
    algorithm = build(env, policy)
    for _ in range(2):
        algorithm.update()

    def another():
        env = gaussian_env()
        policy = env.make_policy(lora_rank=2, seed=5)
        other = build(env, policy)
        other.update()  # a place in the streams that must not matter
        return other, policy

    goes_on_bit_for_bit(algorithm, policy, another, tmp_path, 3)


@each_algorithm
def test_a_gradient_that_is_not_finite_changes_nothing(build):
    env = gaussian_env()
    policy = full_policy(env)
    algorithm = build(env, policy)
    refuses_a_gradient_that_is_not_finite(algorithm, policy)


# ------------------------------------------------------------------------------------------------------ MovingShapes


@pytest.fixture(scope="module")
def shapes_env():
    return vdm_env.make("MovingShapes-HPS", num_envs=4, num_steps=5, guidance_scale=1.0)


def edit_true_videos(env, policy, **options):
    videos = rendered_shapes([env.prompts[i] for i in env.prompt_ids()][:6])
    return InstructVideo(env, policy, InstructVideoConfig(**options), videos)


@pytest.mark.parametrize("build", [draft_lv_on, refl_on, edit_true_videos])
def test_one_update_on_moving_shapes(build, shapes_env):
    policy = shapes_env.make_policy(lora_rank=4)
    before = [p.detach().clone() for p in policy.trainable_parameters()]
    frozen = {
        name: p.detach().clone() for name, p in shapes_env.model.denoiser.named_parameters() if "lora" not in name
    }
    metrics = build(shapes_env, policy, videos_per_update=4, learning_rate=1e-3).update()
    assert 0 < metrics["grad_norm"] < 100 and all(math.isfinite(value) for value in metrics.values())
    assert 0.2 < metrics["reward_mean"] < 1
    assert any(not torch.equal(a, b) for a, b in zip(before, policy.trainable_parameters(), strict=True))
    for name, parameter in shapes_env.model.denoiser.named_parameters():
        assert "lora" in name or torch.equal(parameter, frozen[name]), name


def test_rendered_shapes_are_what_their_captions_say():
    captions = ["a red circle moving left", "a blue cross moving up"]
    videos = rendered_shapes(captions, copies=3, seed=1)
    assert len(videos) == 6 and videos.prompts == tuple(c for c in captions for _ in range(3))
    video, texts = videos.take(range(6))
    assert gold_score(video, texts).total.min() > 0.9
    assert gold_score(video, texts[::-1]).total.max() < 0.8
    assert torch.equal(video, rendered_shapes(captions, copies=3, seed=1).take(range(6))[0])
    with pytest.raises(ValueError, match="not a MovingShapes caption"):
        rendered_shapes(["a dog on a beach"])
    with pytest.raises(ValueError, match="copies is 0"):
        rendered_shapes(captions, copies=0)


# -------------------------------------------------------------------------------------------------------- video sets


def test_a_folder_of_films(tmp_path):
    videos, texts = rendered_shapes(["a red circle moving left", "a white square moving up"]).take([0, 1])
    for name, video, text in zip(("b", "a"), videos, texts, strict=True):
        save_mp4(tmp_path / f"{name}.mp4", video)
        (tmp_path / f"{name}.txt").write_text(f"{text}\n")
    found = from_folder(tmp_path, num_frames=8, height=32, width=32)
    assert found.prompts == (texts[1], texts[0]) and found.videos.dtype == torch.uint8
    assert (found.take([0, 1])[0] - videos.flip(0)).abs().mean() < 0.03  # H.264 loses a little
    half = from_folder(tmp_path, num_frames=4, height=32, width=16)
    assert half.videos.shape == (2, 4, 3, 32, 16)
    cut = videos.flip(0)[:, [1, 3, 5, 7], :, :, 8:24]  # the middle frames of four segments, the centred half
    assert (half.take([0, 1])[0] - cut).abs().mean() < 0.03
    with pytest.raises(ValueError, match=r"a\.mp4 has 8 frames, expected at least 9"):
        from_folder(tmp_path, num_frames=9, height=32, width=32)
    (tmp_path / "c.mp4").write_bytes(b"no film")
    with pytest.raises(FileNotFoundError, match=r"lacks c\.txt \(1 in all\)"):
        from_folder(tmp_path, num_frames=8, height=32, width=32)
    (tmp_path / "c.txt").write_text("a red circle")
    with pytest.raises(ValueError, match=r"c\.mp4 cannot be read as a film"):
        from_folder(tmp_path, num_frames=8, height=32, width=32)
    with pytest.raises(FileNotFoundError, match="no films in"):
        from_folder(tmp_path / "nowhere", num_frames=8, height=32, width=32)


def test_video_sets_are_checked():
    video = torch.zeros(2, 1, 3, 4, 4)
    for videos, prompts, error, message in (
        (video.long(), ("a", "b"), TypeError, "torch.int64, expected floats"),
        (video[0], ("a",), ValueError, r"shape \(1, 3, 4, 4\), expected \[N,F,3,H,W\]"),
        (video - 1, ("a", "b"), ValueError, r"values -1\.\.-1, expected \[0, 1\]"),
        (video, ("a",), ValueError, "1 texts for 2 videos"),
        (video, "ab", ValueError, "one text for 2 videos"),
        (video, ("a", " "), ValueError, "not empty"),
    ):
        with pytest.raises(error, match=message):
            VideoSet(videos=videos, prompts=prompts)


def test_the_walk_through_a_set_can_be_taken_up_anywhere():
    whole = order(7, 3, 0, 30)
    assert whole == order(7, 3, 0, 11) + order(7, 3, 11, 19)
    assert all(sorted(whole[i : i + 7]) == list(range(7)) for i in range(0, 28, 7))
    assert whole != order(7, 4, 0, 30)
