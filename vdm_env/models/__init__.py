"""Base video models and the table of those that come with the package.

A loader is `load(*, weights, scale, device, dtype, seed) -> VideoModel`; heavy imports happen when one is called.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

from vdm_env.models.base import ModelSpec, VideoModel


class ModelEntry(NamedTuple):
    """A model by name: its loader and one line about it."""

    load: Callable[..., VideoModel]
    summary: str
    world: str | None = None
    """the embedded world it belongs to"""


def _moving_shapes(flow: bool) -> Callable[..., VideoModel]:
    def load(*, weights: str, scale: str, device: Any, dtype: Any, seed: int = 0) -> VideoModel:
        from vdm_env.models import moving_shapes

        spec = moving_shapes.FLOW_SPEC if flow else moving_shapes.UNET_SPEC
        return moving_shapes.load(spec, weights=weights, device=device, dtype=dtype, seed=seed)

    return load


def _unet3d(name: str) -> Callable[..., VideoModel]:
    def load(*, weights: str, scale: str, device: Any, dtype: Any, seed: int = 0) -> VideoModel:
        from vdm_env.models import unet3d

        spec = {s.name: s for s in (unet3d.MODELSCOPE, unet3d.ZEROSCOPE, unet3d.VIDEOCRAFTER2)}[name]
        return unet3d.load(spec, weights=weights, scale=scale, device=device, dtype=dtype, seed=seed)

    return load


def _turbo(name: str) -> Callable[..., VideoModel]:
    def load(*, weights: str, scale: str, device: Any, dtype: Any, seed: int = 0) -> VideoModel:
        from vdm_env.models import t2v_turbo

        spec = {"T2VTurbo": t2v_turbo.T2V_TURBO, "T2VTurboV2": t2v_turbo.T2V_TURBO_V2}[name]
        return t2v_turbo.load(spec, weights=weights, scale=scale, device=device, dtype=dtype, seed=seed)

    return load


def _opensora(*, weights: str, scale: str, device: Any, dtype: Any, seed: int = 0) -> VideoModel:
    from vdm_env.models import opensora

    return opensora.load(opensora.OPENSORA12, weights=weights, scale=scale, device=device, dtype=dtype, seed=seed)


def _svd(name: str) -> Callable[..., VideoModel]:
    def load(*, weights: str, scale: str, device: Any, dtype: Any, seed: int = 0) -> VideoModel:
        from vdm_env.models import svd

        spec = {"SVD": svd.SVD, "SVDXT": svd.SVD_XT}[name]
        return svd.load(spec, weights=weights, scale=scale, device=device, dtype=dtype, seed=seed)

    return load


def _family(module: str, spec: str) -> Callable[..., VideoModel]:
    """The loader of a module of this folder, for one of its specs."""

    def load(*, weights: str, scale: str, device: Any, dtype: Any, seed: int = 0) -> VideoModel:
        family = import_module(f"vdm_env.models.{module}")
        chosen = getattr(family, spec)
        return family.load(chosen, weights=weights, scale=scale, device=device, dtype=dtype, seed=seed)

    return load


MODELS: dict[str, ModelEntry] = {
    "MovingShapes": ModelEntry(
        _moving_shapes(flow=True), "embedded flow-matching WanTransformer3DModel, weights included", "moving_shapes"
    ),
    "MovingShapesUNet": ModelEntry(
        _moving_shapes(flow=False), "embedded epsilon UNet3D with DDIM, weights included", "moving_shapes"
    ),
    "VideoCrafter2": ModelEntry(_unet3d("VideoCrafter2"), "UNet3D, 320x512, 16 frames, scaled DDIM"),
    "T2VTurbo": ModelEntry(_turbo("T2VTurbo"), "VideoCrafter2 distilled to 4 consistency steps, guidance as an input"),
    "T2VTurboV2": ModelEntry(_turbo("T2VTurboV2"), "the same with motion guidance, 16 consistency steps"),
    "OpenSora1.2": ModelEntry(_opensora, "STDiT3, 240x426, 51 frames, rectified flow"),
    "ModelScope": ModelEntry(_unet3d("ModelScope"), "UNet3D, 256x256, 16 frames, DDIM"),
    "Zeroscope": ModelEntry(_unet3d("Zeroscope"), "ModelScope trained on: 320x576, 24 frames, DDIM"),
    "AnimateDiff": ModelEntry(
        _family("animatediff", "ANIMATEDIFF"), "Stable Diffusion 1.5 with motion modules, 512x512, 16 frames, DDIM"
    ),
    "CogVideoX2B": ModelEntry(
        _family("cogvideox", "COGVIDEOX_2B"), "transformer, 480x720, 49 frames, v-prediction, zero terminal SNR, DDIM"
    ),
    "CogVideoX5B": ModelEntry(_family("cogvideox", "COGVIDEOX_5B"), "the same, larger and with rotary positions"),
    "HunyuanVideo": ModelEntry(
        _family("hunyuan_video", "HUNYUAN_VIDEO"), "13B transformer, 720x1280, 129 frames, flow, guidance as an input"
    ),
    "LTXVideo": ModelEntry(_family("ltx", "LTX_VIDEO"), "2B transformer, 512x704, 161 frames, flow"),
    "Mochi": ModelEntry(_family("mochi", "MOCHI"), "10B transformer, 480x848, 19 frames, flow"),
    "Wan2.1_1.3B": ModelEntry(_family("wan", "WAN21_1B"), "transformer, 480x832, 81 frames, flow"),
    "Wan2.1_14B": ModelEntry(_family("wan", "WAN21_14B"), "the same, larger"),
    "Wan2.2_A14B": ModelEntry(
        _family("wan", "WAN22_A14B"), "two 14B transformers, one for each end of the process, 720x1280, 81 frames, flow"
    ),
    "Wan2.2_5B": ModelEntry(_family("wan", "WAN22_5B"), "5B transformer, 704x1280, 121 frames, flow"),
    "SVD": ModelEntry(_svd("SVD"), "Stable Video Diffusion, animates an image: 576x1024, 14 frames, EDM"),
    "SVDXT": ModelEntry(_svd("SVDXT"), "Stable Video Diffusion XT, the same with 25 frames"),
}

__all__ = ["MODELS", "ModelEntry", "ModelSpec", "VideoModel"]
