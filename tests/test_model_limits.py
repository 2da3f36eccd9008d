"""What each model is made for: its release's defaults, and clear refusals of other sizes, lengths and prompts."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from tests.every_model import NAMES, load, small_env
from vdm_env import make
from vdm_env.models import (
    MODELS,
    ModelSpec,
    animatediff,
    cogvideox,
    conditioning,
    hunyuan_video,
    ltx,
    mochi,
    opensora,
    svd,
    t2v_turbo,
    unet3d,
    wan,
)

SPECS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        unet3d.VIDEOCRAFTER2,
        unet3d.MODELSCOPE,
        unet3d.ZEROSCOPE,
        t2v_turbo.T2V_TURBO,
        t2v_turbo.T2V_TURBO_V2,
        svd.SVD,
        svd.SVD_XT,
        cogvideox.COGVIDEOX_2B,
        cogvideox.COGVIDEOX_5B,
        opensora.OPENSORA12,
        wan.WAN21_1B,
        wan.WAN21_14B,
        wan.WAN22_A14B,
        wan.WAN22_5B,
        hunyuan_video.HUNYUAN_VIDEO,
        ltx.LTX_VIDEO,
        mochi.MOCHI,
        animatediff.ANIMATEDIFF,
    )
}
RELEASED = [name for name in NAMES if MODELS[name].world is None]
DEFAULTS: dict[str, tuple[tuple[int, int, int], tuple[int, ...], int, float, str]] = {
    # (frames, height, width), latents (C, F, H, W), steps, guidance, sampler; as in papers and releases
    "VideoCrafter2": ((16, 320, 512), (4, 16, 40, 64), 50, 12.0, "ddim"),
    "T2VTurbo": ((16, 320, 512), (4, 16, 40, 64), 4, 1.0, "lcm"),
    "T2VTurboV2": ((16, 320, 512), (4, 16, 40, 64), 16, 1.0, "lcm"),
    "ModelScope": ((16, 256, 256), (4, 16, 32, 32), 50, 9.0, "ddim"),
    "Zeroscope": ((24, 320, 576), (4, 24, 40, 72), 50, 9.0, "ddim"),
    "SVD": ((14, 576, 1024), (4, 14, 72, 128), 25, 3.0, "euler_ancestral"),
    "SVDXT": ((25, 576, 1024), (4, 25, 72, 128), 25, 3.0, "euler_ancestral"),
    "CogVideoX2B": ((49, 480, 720), (16, 13, 60, 90), 50, 6.0, "ddim"),
    "CogVideoX5B": ((49, 480, 720), (16, 13, 60, 90), 50, 6.0, "ddim"),
    "OpenSora1.2": ((51, 240, 426), (4, 15, 30, 53), 30, 7.0, "flow_grpo"),
    "Wan2.1_1.3B": ((81, 480, 832), (16, 21, 60, 104), 50, 5.0, "flow_grpo"),
    "Wan2.1_14B": ((81, 480, 832), (16, 21, 60, 104), 50, 5.0, "flow_grpo"),
    "Wan2.2_A14B": ((81, 720, 1280), (16, 21, 90, 160), 40, 4.0, "flow_grpo"),
    "Wan2.2_5B": ((121, 704, 1280), (48, 31, 44, 80), 50, 5.0, "flow_grpo"),
    "HunyuanVideo": ((129, 720, 1280), (16, 33, 90, 160), 50, 1.0, "dance"),
    "LTXVideo": ((161, 512, 704), (128, 21, 16, 22), 50, 3.0, "flow_grpo"),
    "Mochi": ((19, 480, 848), (12, 4, 60, 106), 64, 4.5, "flow_grpo"),
    "AnimateDiff": ((16, 512, 512), (4, 16, 64, 64), 50, 7.5, "ddim"),
}
MOST_FRAMES = {
    "VideoCrafter2": 16,
    "T2VTurbo": 16,
    "T2VTurboV2": 16,
    "ModelScope": 200,
    "Zeroscope": 200,
    "SVD": 14,
    "SVDXT": 25,
    "CogVideoX2B": 49,
    "CogVideoX5B": 49,
    "OpenSora1.2": 408,
    "Wan2.1_1.3B": 81,
    "Wan2.1_14B": 81,
    "Wan2.2_A14B": 81,
    "Wan2.2_5B": 121,
    "HunyuanVideo": 129,
    "LTXVideo": 257,
    "Mochi": 163,
    "AnimateDiff": 32,
    "MovingShapes": 16,
    "MovingShapesUNet": 16,
}


@cache
def model_of(name: str) -> Any:
    return load(name)


def test_every_released_model_is_in_the_table() -> None:
    assert set(SPECS) == set(DEFAULTS) == set(RELEASED) and set(MOST_FRAMES) == set(NAMES)


@pytest.mark.parametrize("name", RELEASED)
def test_defaults_are_the_releases(name: str) -> None:
    size, latents, steps, guidance, sampler = DEFAULTS[name]
    spec = SPECS[name]
    assert (spec.num_frames, spec.height, spec.width) == size
    assert (spec.num_steps, spec.guidance_scale, spec.sampler) == (steps, guidance, sampler)
    model = replace(model_of(name), spec=spec)
    assert model.latent_shape(*size) == latents and sampler in model.schedule.samplers
    tiny = model_of(name).spec  # shrunk in size and steps alone
    same = ("guidance_scale", "sampler", "noise_level", "max_frames", "size_multiple", "latent_channels", "fps")
    assert all(getattr(tiny, field) == getattr(spec, field) for field in same)
    assert tiny.num_steps < steps or steps == tiny.num_steps == 4


def test_numbers_that_condition_the_networks() -> None:
    assert model_of("VideoCrafter2").encode_prompts(["a"])["fps"].tolist() == [[28.0]]
    for name, w in (("T2VTurbo", {"guidance": 7.5}), ("T2VTurboV2", {"guidance": 7.5, "motion": pytest.approx(0.05)})):
        condition = model_of(name).encode_prompts(["a"])
        assert {key: condition[key].item() for key in condition if key != "text"} == {"fps": 16.0, **w}
    assert (conditioning.CONDITIONING_FPS, conditioning.TURBO_FPS) == (28.0, 16.0)
    assert (svd.MOTION_BUCKET, svd.NOISE_STRENGTH, SPECS["SVD"].fps) == (127, 0.02, 7.0)
    assert (hunyuan_video.EMBEDDED_GUIDANCE, hunyuan_video.SHIFT) == (6.0, 7.0)
    assert (wan.BOUNDARY, 4.0 * wan.LOW_NOISE_GUIDANCE) == (875.0, 3.0)
    schedule = unet3d.LVDM_SCHEDULE
    assert schedule.latent_scale is not None and unet3d.SD_SCHEDULE.latent_scale is None


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", NAMES)
def test_more_frames_than_a_model_is_made_for(name: str) -> None:
    model = model_of(name)
    spec, most = model.spec, MOST_FRAMES[name]
    assert spec.max_frames == most
    step = spec.temporal_stride
    fitting = (most - 1) // step * step + 1
    model.latent_shape(fitting, spec.height, spec.width)
    message = f"{name}: num_frames={most + step} is more than the {most} frames .* try num_frames={most}"
    with pytest.raises(ValueError, match=message):
        model.latent_shape(most + step, spec.height, spec.width)
    with pytest.raises(ValueError, match=message):
        small_env(f"{name}-Brightness", num_frames=most + step)
    env = make(model=model, reward="Brightness", **prompts_of(name))
    with pytest.raises(ValueError, match=message):
        env.derive(size=(most + step, spec.height, spec.width))
    free = replace(model, spec=replace(spec, max_frames=None))  # the way out that the message names
    assert free.latent_shape(fitting + step, spec.height, spec.width)[1] > 0


def prompts_of(name: str) -> dict[str, Any]:
    return {"images": [torch.zeros(3, 8, 8)]} if name.startswith("SVD") else {"prompts": ["a dog"]}


@pytest.mark.parametrize("name", NAMES)
def test_a_size_that_does_not_fit(name: str) -> None:
    spec = model_of(name).spec
    for side in ("height", "width"):
        odd = getattr(spec, side) + 1
        with pytest.raises(ValueError, match=rf"{side}={odd} is n(ot|either) a.* multiple of \d+.* try {side}=\d+"):
            small_env(f"{name}-Brightness", **{side: odd})
        with pytest.raises(ValueError, match=f"{side}=0 "):
            small_env(f"{name}-Brightness", **{side: 0})
    with pytest.raises(ValueError, match="num_frames=0"):
        small_env(f"{name}-Brightness", num_frames=0)
    if spec.temporal_stride > 1 and name != "OpenSora1.2":
        odd = spec.num_frames + 1
        with pytest.raises(ValueError, match=f"num_frames={odd} is not 1 plus a multiple of .*; try num_frames="):
            small_env(f"{name}-Brightness", num_frames=odd)


def test_a_picture_beyond_the_positions() -> None:
    with pytest.raises(ValueError, match="MovingShapes: width=136, but its positions reach 128 pixels; try width=128"):
        small_env("MovingShapes-Brightness", width=136)


@pytest.mark.parametrize("name", NAMES)
def test_prompts_of_the_other_kind(name: str) -> None:
    texts, pictures = {"prompts": ["a dog"]}, {"images": [torch.zeros(3, 8, 8)]}
    if name.startswith("SVD"):
        with pytest.raises(ValueError, match=f"{name} animates images, but was given text prompts; give images="):
            make(model=model_of(name), reward="Brightness", **texts)
        env = make(model=model_of(name), reward="Brightness", **pictures)
        with pytest.raises(ValueError, match="this model animates images"):
            env.reset(options={"prompts": ["a dog"]})
        return
    with pytest.raises(ValueError, match=f"{name} is conditioned on text alone, but was given images; give prompts="):
        make(model=model_of(name), reward="Brightness", **pictures)
    env = make(model=model_of(name), reward="Brightness", **texts)
    with pytest.raises(ValueError, match="option 'images' was given, but this model is conditioned on text alone"):
        env.reset(options={"images": [torch.zeros(3, 8, 8)]})
