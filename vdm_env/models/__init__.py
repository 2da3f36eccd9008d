"""Base video models and the table of those that come with the package.

A loader is `load(*, weights, scale, device, dtype, seed) -> VideoModel`; heavy imports happen when one is called.
"""

from __future__ import annotations

from collections.abc import Callable
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

        spec = {"ModelScope": unet3d.MODELSCOPE, "VideoCrafter2": unet3d.VIDEOCRAFTER2}[name]
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
}

__all__ = ["MODELS", "ModelEntry", "ModelSpec", "VideoModel"]
