"""The families that are diffusers pipelines, as models: rollouts, sizes, noise grids, parameters."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.families import NAMES, PROMPTS, latents, new_tiny, tiny
from vdm_env import check_model, make
from vdm_env.grids import flow_sigmas, linear_quadratic_sigmas, stretch_to_terminal
from vdm_env.models import animatediff, cogvideox, hunyuan_video, ltx, mochi, wan
from vdm_env.models.base import VideoModel
from vdm_env.models.parts import T5_XXL, random_t5
from vdm_env.schedule import FlowSchedule

# ---------------------------------------------------------------------------------------------------- as environments


@pytest.mark.parametrize("name", [*NAMES, "Wan2.1_14B"])
def test_rollout_reward_and_backward(name: str) -> None:
    steps = 4 if name == "Wan2.2_A14B" else 2  # its second network begins late
    with pytest.warns(UserWarning, match=f"{name} has random weights"):
        env = make(f"{name}-HPS", weights="random", scale="tiny", num_envs=2, num_steps=steps, decode_frames="first")
    policy = env.make_policy(lora_rank=2)
    obs, _ = env.reset(seed=0)
    assert obs["stochastic"].any()
    for _ in range(env.num_steps):
        obs, reward, terminated, _, info = env.step(policy(obs))
    assert terminated.all() and torch.isfinite(reward).all()
    assert info["video"].shape[2:] == (3, env.model.spec.height, env.model.spec.width)
    reward.sum().backward()
    gradients = [p.grad for n, p in env.model.denoiser.named_parameters() if ".lora_B" in n]
    assert gradients and all(g is not None and torch.isfinite(g).all() for g in gradients)
    assert sum(float(g.abs().sum()) > 0 for g in gradients if g is not None) >= len(gradients) // 2


@pytest.mark.parametrize("name", NAMES)
def test_the_contract_of_models(name: str) -> None:
    model = new_tiny(name)
    assert isinstance(model, VideoModel) and not model.denoiser.training
    check_model(model)


@pytest.mark.parametrize("name", NAMES)
def test_every_video_has_its_own_time(name: str) -> None:
    model = tiny(name)
    x, t, condition = latents(model), torch.tensor([900.0, 100.0]), model.encode_prompts(PROMPTS)
    with torch.no_grad():
        both = model.predict(x, t, condition)
        for i in range(2):
            alone = model.predict(x[i : i + 1], t[i : i + 1], {k: v[i : i + 1] for k, v in condition.items()})
            torch.testing.assert_close(both[i : i + 1], alone, atol=2e-5, rtol=1e-4)
        assert (model.predict(x, t.flip(0), condition) - both).abs().max() > 1e-4


# --------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        (cogvideox.COGVIDEOX_2B, (16, 13, 60, 90)),
        (cogvideox.COGVIDEOX_5B, (16, 13, 60, 90)),
        (wan.WAN21_1B, (16, 21, 60, 104)),
        (wan.WAN21_14B, (16, 21, 60, 104)),
        (wan.WAN22_A14B, (16, 21, 90, 160)),
        (wan.WAN22_5B, (48, 31, 44, 80)),
        (hunyuan_video.HUNYUAN_VIDEO, (16, 33, 90, 160)),
        (ltx.LTX_VIDEO, (128, 21, 16, 22)),
        (mochi.MOCHI, (12, 4, 60, 106)),
        (animatediff.ANIMATEDIFF, (4, 16, 64, 64)),
    ],
)
def test_latents_at_the_published_sizes(spec: Any, shape: tuple[int, ...]) -> None:
    name = "Wan2.1_1.3B" if spec.name == "Wan2.1_14B" else spec.name
    model = dataclasses.replace(tiny(name), spec=spec)
    assert model.latent_shape(spec.num_frames, spec.height, spec.width) == shape
    assert spec.sampler in model.schedule.samplers


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("CogVideoX2B", (9, 40, 32), "height=40 is not a positive multiple of 16"),
        ("CogVideoX5B", (10, 32, 32), "num_frames=10 is not 1 plus a multiple of 4; try num_frames=9"),
        ("Wan2.1_1.3B", (9, 32, 24), "width=24 is not a positive multiple of 16"),
        ("Wan2.2_5B", (9, 48, 32), "height=48 is not a positive multiple of 32"),
        ("HunyuanVideo", (8, 32, 32), "num_frames=8 is not 1 plus a multiple of 4"),
        ("LTXVideo", (9, 48, 32), "height=48 is not a positive multiple of 32"),
        ("Mochi", (9, 32, 32), "num_frames=9 is not 1 plus a multiple of 6; try num_frames=7"),
        (
            "AnimateDiff",
            (33, 32, 32),
            "num_frames=33 is more than the 32 frames that it is made for; try num_frames=32",
        ),
        ("AnimateDiff", (0, 32, 32), "at least one frame is needed"),
    ],
)
def test_wrong_sizes(name: str, size: tuple[int, int, int], message: str) -> None:
    frames, height, width = size
    with pytest.raises(ValueError, match=message):
        tiny(name).with_size(*size)
    with pytest.raises(ValueError, match=message):
        make(model=tiny(name), reward="HPS", prompts=PROMPTS, num_frames=frames, height=height, width=width)


def test_other_sizes_have_other_grids() -> None:
    wide = tiny("LTXVideo").with_size(161, 512, 704)
    assert math.log(wide.schedule.shift) == pytest.approx(0.95 + (7392 - 1024) * 1.1 / 3072)  # 3.23
    assert wide.schedule.terminal == 0.1 and wide.spec.width == 704
    model = tiny("Wan2.1_1.3B")
    assert model.schedule.shift == 3.0 and model.with_size(81, 480, 832).schedule.shift == 3.0
    assert model.with_size(81, 720, 1280).schedule.shift == 5.0
    assert tiny("Wan2.2_A14B").with_size(81, 480, 832).schedule.shift == 12.0
    same = tiny("Mochi").with_size(13, 48, 64)
    assert same.schedule is tiny("Mochi").schedule


def test_a_smaller_picture_moves_rotary_positions() -> None:
    """5B: two pictures of the same number of cells, but other proportions, are not the same to the network."""
    config = tiny("CogVideoX5B").denoiser.config
    tall, wide = (cogvideox.rotary(config, 3, h, w, torch.device("cpu"))[0] for h, w in ((8, 4), (4, 8)))
    assert tall.shape == wide.shape == (3 * 8, 16) and (tall - wide).abs().max() > 0.1


# --------------------------------------------------------------------------------------------------------------- grids


def test_linear_quadratic_grid() -> None:
    # 8 steps, threshold 0.1: 0.025 a step four times, then 0.1 + 0.025 j + 0.05 j^2 for j = 0 .. 4
    clean = [0.0, 0.025, 0.05, 0.075, 0.1, 0.175, 0.35, 0.625, 1.0]
    assert (1 - linear_quadratic_sigmas(8, 0.1)).tolist() == pytest.approx(clean)
    grid = linear_quadratic_sigmas(64)
    assert grid[0] == 1 and grid[-1] == 0 and bool((grid.diff() < 0).all())
    assert linear_quadratic_sigmas(5)[2] == pytest.approx(1 - 0.025)
    for steps in (1, 0):
        with pytest.raises(ValueError, match="at least"):
            linear_quadratic_sigmas(steps)
    with pytest.raises(ValueError, match="threshold"):
        linear_quadratic_sigmas(8, 0.6)


def test_stretched_grid() -> None:
    grid = stretch_to_terminal(flow_sigmas(4, 1.0), 0.1)  # 1, .75, .5, .25 -> 1 - .9 / .75 (1 - s)
    assert grid.tolist() == pytest.approx([1.0, 0.7, 0.4, 0.1, 0.0])
    for terminal in (0.0, 1.0, -0.1):
        with pytest.raises(ValueError, match="terminal"):
            stretch_to_terminal(flow_sigmas(4), terminal)
        with pytest.raises(ValueError, match="terminal"):
            FlowSchedule(terminal=terminal)
    with pytest.raises(ValueError, match="at least 2 steps"):
        FlowSchedule(terminal=0.1).table(1, "flow_ode")
    with pytest.raises(ValueError, match="spacing"):
        FlowSchedule(spacing="cosine")


def test_the_first_step_of_cogvideox_starts_from_pure_noise() -> None:
    for name in ("CogVideoX2B", "CogVideoX5B"):
        schedule = tiny(name).schedule
        table = schedule.table(50, "ddim", 1.0)
        assert schedule.alphas_cumprod[-1] == 0 and table.timesteps[0] == 999 and table.timesteps[-1] == 19
        assert torch.isfinite(table.A).all() and torch.isfinite(table.sigma).all()
        assert table.x0_A[0] == 0 and table.x0_B[0] == -1  # x0 = -v: nothing of x_t is kept
        assert table.sigma[-1] == 0


# ---------------------------------------------------------------------------------------------------- full-size counts


@pytest.mark.parametrize(
    ("make_parts", "part", "count"),
    [
        (lambda: cogvideox.untrained(cogvideox.COGVIDEOX_2B, False), "transformer", 1.694),
        (lambda: cogvideox.untrained(cogvideox.COGVIDEOX_5B, False), "transformer", 5.570),
        (lambda: cogvideox.untrained(cogvideox.COGVIDEOX_5B, False), "vae", 0.2156),
        (lambda: wan.untrained(wan.WAN21_1B, False), "transformer", 1.419),
        (lambda: wan.untrained(wan.WAN21_14B, False), "transformer", 14.288),
        (lambda: wan.untrained(wan.WAN22_A14B, False), "transformer_2", 14.288),
        (lambda: wan.untrained(wan.WAN22_5B, False), "transformer", 5.000),
        (lambda: wan.untrained(wan.WAN21_1B, False), "vae", 0.1269),
        (lambda: wan.untrained(wan.WAN21_1B, False), "text_encoder", 5.681),
        (lambda: hunyuan_video.untrained(False), "transformer", 12.821),
        (lambda: hunyuan_video.untrained(False), "vae", 0.2465),
        (lambda: ltx.untrained(False), "transformer", 1.923),
        (lambda: ltx.untrained(False), "vae", 0.419),
        (lambda: mochi.untrained(False), "transformer", 10.028),
        (lambda: mochi.untrained(False), "vae", 0.4597),
        (lambda: mochi.untrained(False), "text_encoder", 4.762),
        (lambda: animatediff.untrained(False), "unet", 1.313),
    ],
)
def test_parameters_of_the_full_networks(
    make_parts: Callable[[], dict[str, Callable[[], torch.nn.Module]]], part: str, count: float
) -> None:
    """In billions; built without memory on the meta device."""
    with torch.device("meta"):
        network = make_parts()[part]()
    digits = len(str(count).split(".")[1])
    assert sum(p.numel() for p in network.parameters()) / 1e9 == pytest.approx(count, abs=0.6 * 10**-digits)


def test_full_size_text_encoders_are_those_of_the_releases() -> None:
    assert T5_XXL["d_model"] == 4096 and T5_XXL["num_layers"] == 24
    with torch.device("meta"):
        assert random_t5(False).shared.weight.shape == (32128, 4096)
