"""The reward contract, held against every built-in reward, and what the shared parts promise."""

from __future__ import annotations

import json
import math
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vdm_env.errors import CorruptWeightsError, MissingWeightsError
from vdm_env.registry import build_reward
from vdm_env.rewards import (
    REWARDS,
    Chunked,
    Part,
    Reward,
    RewardContext,
    WeightedSum,
    as_reward,
    calibrate,
    score_parts,
    select_frames,
    validate_scores,
)
from vdm_env.rewards.base import FunctionReward
from vdm_env.rewards.clip import ClipReward
from vdm_env.rewards.preprocess import PRESETS, clip_hf, hpsv2_pad, preset, vader_squash

PROMPTS = ["a red circle moving left", "a green cross moving up", "a white square moving right"]
FOLLOWS_PROMPT = {"HPS", "HPSv2", "HPSv2.1", "PickScore", "CLIP", "Action", "OmniScore"}


# Steps of finite differences: JPEGSurrogate's coefficients are steep in units of a pixel; OmniScore's motion is a mean
# of |change|, and a step must cross none of its thousands of kinks (at 1e-5 it does, from 1e-6 on the error is 4e-9).
STEPS = {"JPEGSurrogate": 1e-8, "OmniScore": 1e-7}


def build(name: str, **changes: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        context = {"world": "moving_shapes", "weights": "random", "scale": "tiny", "seed": 3}
        return REWARDS[name].build(RewardContext(**(context | changes)))


def videos(n: int = 3, side: int = 24, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    return (0.1 + 0.8 * torch.rand(n, 8, 3, side, side, generator=generator, dtype=torch.float64)).to(dtype)


# Those of embedded worlds; test_rewards_learned.py holds all of them, published ones too, against the same contract.
OWN = sorted(n for n, e in REWARDS.items() if not e.published)
every_reward = pytest.mark.parametrize("name", OWN)
differentiable_rewards = pytest.mark.parametrize("name", [n for n in OWN if REWARDS[n].differentiable])


# ---- every reward ------------------------------------------------------------------------------------------------


@every_reward
def test_scores_are_one_float_a_video_inside_the_range(name: str) -> None:
    reward = build(name)
    assert isinstance(reward, Reward) and reward.name == name
    assert reward.differentiable == REWARDS[name].differentiable
    select_frames(reward.frames, 8)
    scores, parts = score_parts(reward, videos(), PROMPTS)
    assert scores.shape == (3,) and scores.dtype == torch.float32
    low, high = reward.range
    assert low < high and bool(((scores >= low) & (scores <= high)).all())
    if name == "OmniScore":  # a sum; tests/test_omniscore.py holds it against its parts
        assert list(parts) == list(reward.config)
    else:
        assert list(parts) == [name] and torch.equal(parts[name], scores)
    assert scores.std() > 0, "different videos, different scores"


@every_reward
def test_a_score_depends_on_its_own_video_and_prompt_only(name: str) -> None:
    reward, video = build(name), videos()
    together = reward(video, PROMPTS)
    for i in range(3):
        torch.testing.assert_close(
            reward(video[i : i + 1], PROMPTS[i : i + 1]), together[i : i + 1], rtol=1e-5, atol=1e-5
        )
    order = [2, 0, 1]
    torch.testing.assert_close(reward(video[order], [PROMPTS[i] for i in order]), together[order], rtol=1e-5, atol=1e-5)
    shifted = reward(video, [PROMPTS[i] for i in order])
    changed = not torch.allclose(shifted, together, atol=1e-6)
    assert changed == (name in FOLLOWS_PROMPT)


@every_reward
def test_same_seed_same_scores_and_the_global_generator_is_left_alone(name: str) -> None:
    state = torch.random.get_rng_state()
    first, again = build(name)(videos(), PROMPTS), build(name)(videos(), PROMPTS)
    assert torch.equal(first, again)
    assert torch.equal(state, torch.random.get_rng_state())
    if name not in ("Brightness", "JPEGCompressibility", "JPEGSurrogate"):
        assert not torch.allclose(first, build(name, seed=4)(videos(), PROMPTS))


@differentiable_rewards
def test_gradient_equals_finite_differences(name: str) -> None:
    reward = build(name, dtype=torch.float64)
    video = videos(2, dtype=torch.float64).requires_grad_(True)
    prompts = PROMPTS[:2]
    weights = torch.tensor([1.0, -2.0], dtype=torch.float64)
    (gradient,) = torch.autograd.grad((weights * reward(video, prompts)).sum(), video)
    direction = torch.randn(video.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    h = STEPS.get(name, 1e-5)

    def along(t: float) -> Tensor:
        return (weights * reward(video.detach() + t * direction, prompts)).sum()

    numeric = (along(h) - along(-h)) / (2 * h)
    assert abs(float(numeric)) > 1e-9
    torch.testing.assert_close((gradient * direction).sum(), numeric, rtol=1e-4, atol=1e-9)


@differentiable_rewards
def test_gradient_reaches_the_own_video_only_and_no_weights(name: str) -> None:
    video = videos().requires_grad_(True)
    (gradient,) = torch.autograd.grad(build(name)(video, PROMPTS)[1], video)
    assert bool(gradient[1].abs().sum() > 0) and not gradient[[0, 2]].any()


@differentiable_rewards
def test_half_precision_networks_agree(name: str) -> None:
    exact, rough = build(name)(videos(), PROMPTS), build(name, dtype=torch.bfloat16)(videos(), PROMPTS)
    assert rough.dtype == torch.float32
    scale = 100.0 if name in ("CLIP", "PickScore") else 1.0
    torch.testing.assert_close(rough, exact, rtol=0.05, atol=0.05 * scale)


@every_reward
def test_bad_input_is_named(name: str) -> None:
    reward = build(name)
    with pytest.raises(ValueError, match=r"\[B,F,3,H,W\].*\(3, 8, 24, 24\)"):
        reward(videos()[:, :, 0], PROMPTS)
    with pytest.raises(ValueError, match="3 prompts.*got 2 prompts"):
        reward(videos(), PROMPTS[:2])
    with pytest.raises(ValueError, match="got one string"):
        reward(videos(), PROMPTS[0])
    with pytest.raises(TypeError, match=r"float tensor.*torch\.uint8"):
        reward((videos() * 255).byte(), PROMPTS)


@pytest.mark.parametrize("name", sorted(set(REWARDS) - {"Brightness", "JPEGCompressibility", "JPEGSurrogate"}))
def test_random_weights_warn(name: str) -> None:
    with pytest.warns(UserWarning, match="random weights"):
        REWARDS[name].build(RewardContext(weights="random", scale="tiny"))


def test_chunks_do_not_change_scores() -> None:
    whole = build("HPS")
    parts = ClipReward(whole.backbone, name="HPS", chunk_size=5)
    torch.testing.assert_close(parts(videos(), PROMPTS), whole(videos(), PROMPTS), rtol=1e-5, atol=1e-6)


# ---- single rewards ----------------------------------------------------------------------------------------------


def test_brightness_gradient_is_known() -> None:
    video = videos().requires_grad_(True)
    build("Brightness")(video, PROMPTS).sum().backward()
    assert video.grad is not None
    torch.testing.assert_close(video.grad, torch.full_like(video, 1 / video[0].numel()))


def test_jpeg_prefers_plain_pictures() -> None:
    video = torch.stack([torch.full((2, 3, 32, 32), 0.5), videos(1, 32)[0, :2]])
    plain, busy = build("JPEGCompressibility")(video, PROMPTS[:2]).tolist()
    assert busy < plain < 0


def test_jpeg_surrogate_follows_the_files() -> None:
    """Over pictures from smooth to noisy: within a fifth of the size of Pillow's files, and in the same order."""
    generator = torch.Generator().manual_seed(3)
    pictures = []
    for cells in (4, 8, 16, 48, 96):
        for contrast, noise in ((0.05, 0.0), (0.2, 0.0), (0.1, 0.02)):
            rough = torch.rand(1, 3, cells, cells, generator=generator)
            smooth = torch.nn.functional.interpolate(rough, size=(96, 96), mode="bicubic")
            grain = noise * torch.randn(1, 3, 96, 96, generator=generator)
            pictures.append((0.5 + contrast * (smooth - 0.5) + grain).clamp(0, 1))
    video = torch.stack(pictures)
    real, guess = (build(n)(video, ["a"] * len(video)) for n in ("JPEGCompressibility", "JPEGSurrogate"))
    assert float((guess / real - 1).abs().max()) < 0.2
    ranks = torch.stack([real.argsort().argsort(), guess.argsort().argsort()]).double()
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.98


def test_jpeg_surrogate_of_a_plain_picture_is_the_header_and_the_means() -> None:
    """Grey of 128: every coefficient is 0. A brighter plain: the mean of the first block."""
    from vdm_env.rewards.jpeg_surrogate import BITS, HEADER, KNEE, cosine_basis, kilobytes, quantisation

    plain = torch.full((1, 3, 16, 16), 128 / 255, dtype=torch.float64)
    assert float(kilobytes(plain, 95)) == pytest.approx(HEADER, abs=1e-6)
    # Luma rises by 10 steps of 1/255: a mean coefficient of 8 * 10, over a table of 2, coded once.
    brighter = float(kilobytes(plain + 10 / 255, 95))
    table = float(quantisation(95)[0][0, 0])
    expected = BITS / 2 * math.log2(1 + (80 / table / KNEE) ** 2) / 8000
    assert table == 2.0 and brighter - HEADER == pytest.approx(expected, rel=1e-4)
    basis = cosine_basis()
    torch.testing.assert_close(basis @ basis.T, torch.eye(8, dtype=torch.float64))
    assert int(quantisation(50)[0][0, 0]) == 16 and int(quantisation(100)[1].max()) == 1


def test_action_explains_what_it_does_not_know() -> None:
    reward = build("Action")
    with pytest.raises(ValueError, match="'a dog'.*moving down"):
        reward(videos(1), ["a dog"])
    with pytest.raises(ValueError, match="looks at 8 frames, got 1"):
        reward(videos(1)[:, :1], PROMPTS[:1])
    kinetics = build("Action", world=None)
    assert kinetics.class_of("A man chopping WOOD") == kinetics.class_of("chopping wood")
    assert build("Action", world=None, num_frames=5).num_frames == 4


def test_action_probabilities_sum_to_one() -> None:
    reward = build("Action")
    each = [reward(videos(1), [f"a red circle moving {d}"]) for d in ("left", "right", "up", "down")]
    torch.testing.assert_close(torch.stack(each).sum(), torch.tensor(1.0))


def test_aesthetic_head_is_affine() -> None:
    reward = build("Aesthetic")
    weight, bias = reward.head.affine()
    features = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(reward.head(features), (features.double() @ weight + bias).float(), rtol=1e-4, atol=1e-5)


# ---- frames ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "num_frames", "expected"),
    [
        ("all", 3, [0, 1, 2]),
        ("alternate", 5, [0, 2, 4]),
        ("first", 4, [0]),
        ("last", 4, [3]),
        ("middle4", 16, [2, 6, 10, 14]),
        (4, 16, [2, 6, 10, 14]),
        ("middle4", 2, [0, 0, 1, 1]),
        ((0, -1), 6, [0, 5]),
    ],
)
def test_frame_policies(policy: Any, num_frames: int, expected: list[int]) -> None:
    assert select_frames(policy, num_frames).tolist() == expected


def test_random_frame_policies_follow_their_generator() -> None:
    for policy, n in (("random1", 1), ("random5", 5), ("tsn4", 4)):
        draws = [select_frames(policy, 16, seed).tolist() for seed in range(40)]
        assert draws == [select_frames(policy, 16, torch.Generator().manual_seed(s)).tolist() for s in range(40)]
        assert all(len(set(d)) == n and d == sorted(d) for d in draws)
        assert len({tuple(d) for d in draws}) > 5
    assert {select_frames("random1", 8, seed).item() for seed in range(200)} == set(range(8))
    assert all(i // 4 == k for seed in range(20) for k, i in enumerate(select_frames("tsn4", 16, seed).tolist()))


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("alt", "unknown frame policy 'alt'.*'alternate'"),
        ("random1", "pass a torch.Generator or a seed"),
        (0, "unknown frame policy 0"),
        ((9,), r"do not fit a video of 8 frames \(0..7\)"),
    ],
)
def test_bad_frame_policies(policy: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_frames(policy, 8)
    with pytest.raises(ValueError, match="9 frames of a video of 8"):
        select_frames("random9", 8, 0)


# ---- plain functions, checks, sums -------------------------------------------------------------------------------


def mean_red(video: Tensor, prompts: list[str]) -> Tensor:
    return video[:, :, 0].mean((1, 2, 3))


def test_a_plain_function_is_a_reward() -> None:
    reward = as_reward(mean_red)
    assert isinstance(reward, Reward)
    assert (reward.name, reward.frames, reward.differentiable) == ("mean_red", "all", True)
    assert torch.equal(reward(videos(), PROMPTS), mean_red(videos(), PROMPTS))
    other = as_reward(reward, name="red", frames="random1", range=(0.0, 1.0))
    assert (other.name, other.frames, other.range) == ("red", "random1", (0.0, 1.0))
    built = build("HPS")
    assert as_reward(built) is built
    with pytest.raises(TypeError, match="callable.*got float"):
        as_reward(3.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unknown reward attributes"):
        as_reward(mean_red, scale=2)


@pytest.mark.parametrize(
    ("scores", "error", "message"),
    [
        ([0.1, 0.2], TypeError, "returned list"),
        (torch.tensor([1, 2]), TypeError, "torch.int64"),
        (torch.zeros(()), ValueError, r"returned shape \(\); expected \(2,\): return one score a video"),
        (torch.zeros(2, 1), ValueError, r"\(2, 1\)"),
        (torch.tensor([1.0, float("nan")]), ValueError, r"videos \[1\] of 2"),
        (torch.tensor([-float("inf"), 1.0]), ValueError, r"videos \[0\] of 2.*inf"),
    ],
)
def test_scores_are_checked(scores: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        validate_scores(scores, 2, "mine")
    with pytest.raises(error, match=message):
        score_parts(as_reward(lambda video, prompts: scores), videos(2), PROMPTS[:2])


def test_weighted_sum() -> None:
    bright = as_reward(lambda v, p: v.mean((1, 2, 3, 4)), name="bright", range=(0.0, 1.0))
    red = as_reward(mean_red, range=(0.0, 1.0), frames="first")
    total = WeightedSum([Part(reward=bright, weight=2.0, mean=0.5, std=0.1), Part(reward=red, weight=-1.0)])
    assert total.name == "2*bright+-1*mean_red" and total.frames == "all" and total.differentiable
    assert total.range == pytest.approx((-11.0, 10.0))
    video = videos()
    scores, parts = score_parts(total, video, PROMPTS)
    first = mean_red(video[:, :1], PROMPTS)
    torch.testing.assert_close(parts["mean_red"], first)
    torch.testing.assert_close(scores, 2 * (video.mean((1, 2, 3, 4)) - 0.5) / 0.1 - first)
    jpeg = WeightedSum([Part(reward=build("JPEGCompressibility"), weight=0.0), Part(reward=bright)])
    assert not jpeg.differentiable and jpeg.range == (0.0, 1.0)
    same = WeightedSum([Part(reward=FunctionReward(function=mean_red, name=n, frames="random1")) for n in "ab"])
    assert same.frames == "random1"
    for bad in ([], [Part(reward=red), Part(reward=red)]):
        with pytest.raises(ValueError, match="different names"):
            WeightedSum(bad)
    with pytest.raises(ValueError, match="std > 0"):
        Part(reward=red, std=0.0)
    with pytest.raises(ValueError, match="'a' returned values that are not finite"):
        broken = as_reward(lambda v, p: v.mean((1, 2, 3, 4)) / 0, name="a")
        WeightedSum([Part(reward=broken)])(video, PROMPTS)


def test_calibration_measures_every_part_once() -> None:
    bright = as_reward(lambda v, p: 3 * v.mean((1, 2, 3, 4)) + 7, name="bright")
    red = as_reward(mean_red)
    batches = [(videos(3), PROMPTS), (videos(2) * 0.5, PROMPTS[:2])]
    total = calibrate([Part(reward=bright, weight=2.0, mean=9.0), Part(reward=red, weight=-1.0)], batches)
    scores = torch.cat([score_parts(total, *batch)[0] for batch in batches])
    for name, function in (("bright", bright), ("mean_red", red)):
        each = torch.cat([function(*batch) for batch in batches]).double()
        assert total.config[name]["mean"] == pytest.approx(float(each.mean()), rel=1e-6)
        assert total.config[name]["std"] == pytest.approx(float(each.std()), rel=1e-6)
    assert [total.config[n]["weight"] for n in ("bright", "mean_red")] == [2.0, -1.0]
    assert abs(float(scores.mean())) < 1e-4
    torch.testing.assert_close(calibrate(total, batches).config, total.config)
    with pytest.raises(ValueError, match="at least two videos, got 1"):
        calibrate(red, [(videos(1), PROMPTS[:1])])
    with pytest.raises(ValueError, match="'flat' gave all 3 videos.*score 2"):
        calibrate(as_reward(lambda v, p: torch.full((len(v),), 2.0), name="flat"), [(videos(3), PROMPTS)])


def test_a_saved_calibration_makes_the_same_sum() -> None:
    """Through JSON and `make_reward`'s builder."""
    context = RewardContext(world="moving_shapes", weights="random", scale="tiny", seed=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        total = calibrate(build_reward({"HPS": 2.0, "Brightness": 0.5}, context), [(videos(3), PROMPTS)])
        again = build_reward(json.loads(json.dumps(total.config)), context)
    assert torch.equal(again(videos(), PROMPTS), total(videos(), PROMPTS))
    assert isinstance(again, WeightedSum) and again.config == total.config
    with pytest.raises(ValueError, match=r"'HPS': unknown \['scale'\]"):
        build_reward({"HPS": {"scale": 2.0}}, context)


@pytest.mark.parametrize("recompute", [False, True])
def test_chunked_rewards_score_alike_and_differentiate_alike(recompute: bool) -> None:
    sizes: list[int] = []

    def seen(video: Tensor, prompts: list[str]) -> Tensor:
        sizes.append(len(video))
        return video.square().mean((1, 2, 3, 4)) + torch.tensor([float(len(p)) for p in prompts])

    whole, chunked = as_reward(seen, name="seen", frames="first", range=(0.0, 99.0)), Chunked(seen, 2)
    other = Chunked(whole, 2, recompute=recompute)
    assert isinstance(other, Reward) and (other.name, other.frames, other.range) == ("seen", "first", (0.0, 99.0))
    video = videos().requires_grad_(True)
    expected = torch.autograd.grad(whole(video, PROMPTS)[1], video)[0]
    sizes.clear()
    scores = other(video, PROMPTS)
    assert sizes == [2, 1]
    torch.testing.assert_close(scores, chunked(video, PROMPTS))
    sizes.clear()
    torch.testing.assert_close(torch.autograd.grad(scores[1], video)[0], expected)
    assert bool(sizes) == recompute, "scored again on the way back, or not"
    total = WeightedSum([Part(reward=as_reward(seen, name=n)) for n in "ab"])
    assert list(score_parts(Chunked(total, 1), videos(), PROMPTS)[1]) == ["a", "b"]
    with pytest.raises(ValueError, match="chunk=0"):
        Chunked(whole, 0)
    with pytest.raises(ValueError, match="no gradients"):
        Chunked(build("JPEGCompressibility"), 1, recompute=True)


# ---- pre-processing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(PRESETS))
@pytest.mark.parametrize("size", [(20, 30), (30, 20), (16, 16), (40, 41)])
def test_presets_give_squares_and_keep_constant_pictures(name: str, size: tuple[int, int]) -> None:
    out = preset(name)(torch.full((2, 3, *size), 0.4), 16)
    assert out.shape == (2, 3, 16, 16)
    assert bool(((out - 0.4).abs().amin((1, 2, 3)) < 1e-5).all())


def test_presets_differ_as_their_sources_do() -> None:
    wide = torch.zeros(1, 3, 16, 32)
    wide[..., :8] = 1.0  # a bright quarter at the left
    assert vader_squash(wide, 16)[0, 0, :, :3].min() > 0.9  # squeezed: still a quarter
    assert clip_hf(wide, 16).max() < 0.5  # cropped away
    padded = hpsv2_pad(wide, 16)
    plain = preset("hpsv2_pad_plain")
    stripes = (torch.arange(48) % 3 == 1).float().expand(1, 3, 48, 48)  # a third is white, and every third is looked at
    assert plain(stripes, 16).min() > 0.9 and hpsv2_pad(stripes, 16).mean().sub(1 / 3).abs() < 0.05
    assert not padded[..., :4, :].any() and not padded[..., 12:, :].any() and padded[0, 0, 4:12, :3].min() > 0.9
    with pytest.raises(ValueError, match="unknown pre-processing 'squash'.*clip_hf"):
        preset("squash")


# ---- weights -----------------------------------------------------------------------------------------------------


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "no_cache"))


@pytest.mark.usefixtures("empty_cache")
@pytest.mark.parametrize(
    ("name", "mentions"),
    [
        ("HPS", ["xswu/HPSv2", "HPS_v2.1_compressed.pt"]),
        ("HPSv2", ["xswu/HPSv2", "HPS_v2_compressed.pt"]),
        ("PickScore", ["yuvalkirstain/PickScore_v1", "model.safetensors"]),
        ("CLIP", ["openai/clip-vit-large-patch14", "config.json"]),
        ("Action", ["MCG-NJU/videomae-base-finetuned-kinetics"]),
        ("Aesthetic", ["openai/clip-vit-large-patch14"]),
    ],
)
def test_missing_weights_say_what_to_fetch(name: str, mentions: list[str], tmp_path: Path) -> None:
    with pytest.raises(MissingWeightsError) as caught:
        REWARDS[name].build(RewardContext(folder=tmp_path))
    for text in [*mentions, str(tmp_path), "vdm-env download", "MovingShapes-HPS"]:
        assert text in str(caught.value)


@pytest.mark.usefixtures("empty_cache")
def test_missing_aesthetic_head_says_where_it_is(tmp_path: Path) -> None:
    build("Aesthetic", world=None).backbone.model.save_pretrained(tmp_path)
    with pytest.raises(MissingWeightsError, match=r"linearMSE\.pth.*curl.*sha256 [0-9a-f]{64}\).*MovingShapes-HPS"):
        REWARDS["Aesthetic"].build(RewardContext(folder=tmp_path))


def test_context_is_checked() -> None:
    for bad, message in (
        ({"weights": "pretty"}, "weights='pretty'.*pretrained"),
        ({"scale": "tiny"}, "scale='tiny'.*weights='random'"),
        ({"world": "mars"}, "world='mars'"),
        ({"dtype": torch.int32}, "torch.int32"),
    ):
        with pytest.raises(ValueError, match=message):
            RewardContext(**bad)  # type: ignore[arg-type]


def _tiny_hps_release(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint as HPSv2 publishes it, of the tiny network that now passes for ViT-H-14."""
    from vdm_env.rewards import clip_loading

    monkeypatch.setattr("open_clip.get_model_config", lambda name: clip_loading._TINY_OPEN_CLIP)
    path = folder / "HPS_v2.1_compressed.pt"
    torch.save({"state_dict": build("HPS", world=None).backbone.model.state_dict(), "epoch": 1}, path)
    return path


@pytest.mark.usefixtures("empty_cache")
def test_released_layouts_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _tiny_hps_release(tmp_path, monkeypatch)
    for name, sub in (("PickScore", "PickScore_v1"), ("CLIP", "openai/clip-vit-large-patch14"), ("Action", "")):
        model = build(name, world=None)
        net = model.model if name == "Action" else model.backbone.model
        net.save_pretrained(tmp_path / (sub or "videomae-base-finetuned-kinetics"))
    torch.save(build("Aesthetic", world=None).head.state_dict(), tmp_path / "sac+logos+ava1-l14-linearMSE.pth")
    prompts = ["a beer", "a wood", "a cello"]
    for name in ("HPS", "PickScore", "CLIP", "Action", "Aesthetic"):
        if name == "Aesthetic":
            build("Aesthetic", world=None).backbone.model.save_pretrained(
                tmp_path / "openai" / "clip-vit-large-patch14"
            )
        loaded = REWARDS[name].build(RewardContext(folder=tmp_path))
        torch.testing.assert_close(loaded(videos(), prompts), build(name, world=None)(videos(), prompts))


class _Runs:
    """Unpickling this would create a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.usefixtures("empty_cache")
def test_damaged_and_dangerous_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _tiny_hps_release(tmp_path, monkeypatch)
    context = RewardContext(folder=tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptWeightsError, match=r"HPS_v2.1_compressed.pt.*truncated.*delete it"):
        REWARDS["HPS"].build(context)
    torch.save({"state_dict": {"visual.proj": torch.zeros(2, 2)}}, path)
    with pytest.raises(CorruptWeightsError, match=r"does not fit CLIP.*fetch it again"):
        REWARDS["HPS"].build(context)
    torch.save({"state_dict": _Runs(tmp_path / "ran")}, path)
    with pytest.raises(CorruptWeightsError, match="without running code"):
        REWARDS["HPS"].build(context)
    assert not (tmp_path / "ran").exists()

    folder = tmp_path / "PickScore_v1"
    build("PickScore", world=None).backbone.model.save_pretrained(folder)
    tensors = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(tensors[:-100])
    with pytest.raises(CorruptWeightsError, match="model.safetensors"):
        REWARDS["PickScore"].build(context)
    (folder / "config.json").write_text("{")
    with pytest.raises(CorruptWeightsError, match="config.json"):
        REWARDS["PickScore"].build(context)


# ---- the embedded world's own networks ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world() -> tuple[Tensor, list[str], Tensor]:
    from vdm_env.worlds.moving_shapes.render import captions_of, random_labels, render, sample_scenes

    generator = torch.Generator().manual_seed(77)
    labels = random_labels(24, generator)
    return render(sample_scenes(labels, generator)), captions_of(labels), labels


@pytest.mark.parametrize("name", ["HPS", "PickScore", "CLIP"])
def test_embedded_networks_know_colour_and_shape(name: str, world: tuple[Tensor, list[str], Tensor]) -> None:
    video, captions, labels = world
    reward = REWARDS[name].build(RewardContext(world="moving_shapes"))
    with torch.no_grad():
        right = reward(video, captions)
        for word in (1, 2):
            other = [
                " ".join(a if i != word else b for i, (a, b) in enumerate(zip(c.split(), d.split(), strict=True)))
                for c, d in zip(captions, captions[1:] + captions[:1], strict=True)
            ]
            differs = torch.tensor([a != b for a, b in zip(captions, other, strict=True)])
            assert (right > reward(video, other))[differs].float().mean() > 0.9


@pytest.mark.parametrize("name", ["HPS", "Aesthetic"])
def test_embedded_networks_prefer_clean_pictures(name: str, world: tuple[Tensor, list[str], Tensor]) -> None:
    video, captions, _ = world
    reward = REWARDS[name].build(RewardContext(world="moving_shapes"))
    noise = torch.randn(video.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        scores = [reward((video + s * noise).clamp(0, 1), captions) for s in (0.0, 0.05, 0.2)]
    assert (scores[0] > scores[1]).float().mean() > 0.9 and (scores[1] > scores[2]).float().mean() > 0.9


def test_embedded_action_classifier_knows_directions(world: tuple[Tensor, list[str], Tensor]) -> None:
    video, captions, labels = world
    reward = REWARDS["Action"].build(RewardContext(world="moving_shapes"))
    with torch.no_grad():
        assert (reward.logits(video).argmax(1) == labels[:, 2]).float().mean() > 0.9
        assert reward(video, captions).mean() > 0.8
        assert reward(video.flip(1), captions).mean() < 0.1, "played backwards, every direction is wrong"
    assert math.isclose(reward.range[1], 1.0)


def test_missing_embedded_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(MissingWeightsError, match=r"clip.*part of the package.*pretrain_rewards"):
        REWARDS["HPS"].build(RewardContext(world="moving_shapes", folder=tmp_path))
