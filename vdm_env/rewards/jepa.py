"""Masked-prediction consistency: how well a V-JEPA predicts the hidden part of a video from the rest of it.

    score_i = - mean over masks m of  mean |z_im - h_im|^p / p

h: the target tokens, layer-normalised without weights, of an encoder that sees the whole video; z: the prediction from
an encoder that sees the visible tokens only. Near 0: the video continues as videos do; the scale is that of a
unit-variance feature. Averages run over tokens and channels. The prompt does not matter.

Legend: B videos, T frames, S side in pixels, N tokens, K seen, M to predict, D channels.

Source: Bardes et al. 2024, arXiv:2404.08471, equation 1 (p = 1, the training loss). VADER (arXiv:2407.08737) reports a
V-JEPA reward; its code is not public, and minus the loss is the form chosen here.

Deviation: the gradient also runs through the target, so that it is the gradient of the score. In training the target is
a constant; `target_gradient=False` is that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from vdm_env.rewards.base import FramePolicy, check_inputs
from vdm_env.rewards.block_masks import Mask, block_masks, check_masks
from vdm_env.rewards.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess, normalise, vader_squash
from vdm_env.rewards.tensors import at_least_float32, check_enough_frames, fit_frames, in_chunks


class JepaNetwork(Protocol):
    """Encoders and predictor. `side`: input pixels; `num_frames`: frames of a clip; `grid`: (time, rows, columns)."""

    side: int
    num_frames: int
    grid: tuple[int, int, int]

    def features(self, pixels: Tensor) -> Tensor:
        """[B,T,3,S,S], ImageNet-normalised, to target features of all tokens [B,N,D]."""
        ...

    def predict(self, pixels: Tensor, seen: Tensor, predicted: Tensor, index: int) -> Tensor:
        """Prediction [B,M,D] of the tokens `predicted` [B,M] from the tokens `seen` [B,K]; `index` counts masks."""
        ...


def gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """Tokens [B,N,D] at positions [B,K], as [B,K,D]."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


def target_tokens(features: Tensor, predicted: Tensor, *, normalise_target: bool = True) -> Tensor:
    """What is to be predicted [B,M,D]: target features [B,N,D], layer-normalised, at `predicted` [B,M]."""
    features = at_least_float32(features)
    if normalise_target:
        features = F.layer_norm(features, features.shape[-1:])
    return gather_tokens(features, predicted)


def prediction_error(prediction: Tensor, target: Tensor, exponent: float = 1.0) -> Tensor:
    """Mean |z - h|^p / p over tokens and channels, [B]."""
    return (at_least_float32(prediction) - target).abs().pow(exponent).mean((1, 2)) / exponent


class JepaReward:
    """Minus the error of masked prediction; at most 0.

    Args:
        network: encoders and predictor.
        name: as it is called in logs.
        masks: which tokens are seen and predicted, the same for every video; None draws the training's blocks.
        mask_seed: of the drawn masks.
        exponent: p, at least 1.
        target_gradient: whether gradients also run through the target.
        normalise_target: whether targets are layer-normalised; only a plain call of transformers does without.
        preprocess: resizing, see `preprocess.py`. The whole picture is looked at; evaluations of the release crop it.
        chunk_size: videos the network sees at a time; None: all.

    Raises:
        ValueError: masks that do not fit the network, or an exponent below 1.
    """

    differentiable = True
    range = (-math.inf, 0.0)

    def __init__(
        self,
        network: JepaNetwork,
        *,
        name: str,
        masks: Sequence[Mask] | None = None,
        mask_seed: int = 0,
        exponent: float = 1.0,
        target_gradient: bool = True,
        normalise_target: bool = True,
        preprocess: Preprocess = vader_squash,
        chunk_size: int | None = None,
    ) -> None:
        if not exponent >= 1 or not math.isfinite(exponent):
            raise ValueError(f"exponent={exponent}: expected a number of at least 1")
        self.masks = block_masks(network.grid, seed=mask_seed) if masks is None else list(masks)
        check_masks(self.masks, math.prod(network.grid))
        self.network, self.name, self.preprocess = network, name, preprocess
        self.exponent, self.target_gradient, self.normalise_target = exponent, target_gradient, normalise_target
        self.chunk_size = chunk_size
        self.frames: FramePolicy = f"middle{network.num_frames}"

    def check_num_frames(self, count: int) -> None:
        """Raises ValueError for fewer frames than the network takes."""
        check_enough_frames(count, self.network.num_frames, self.name)

    def errors(self, pixels: Tensor, masks: Sequence[Mask]) -> Tensor:
        """Error [B] of pixels [B,T,3,S,S], ImageNet-normalised; masks with one row for all videos or one for each."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.target_gradient):
            features = self.network.features(pixels)
        losses = []
        for i, mask in enumerate(masks):
            seen, predicted = (part.to(pixels.device).expand(len(pixels), -1) for part in mask)
            target = target_tokens(features, predicted, normalise_target=self.normalise_target)
            prediction = self.network.predict(pixels, seen, predicted, i)
            losses.append(prediction_error(prediction, target, self.exponent))
        return torch.stack(losses).mean(0)

    def _score(self, video: Tensor) -> Tensor:
        frames = self.preprocess(video.flatten(0, 1), self.network.side)
        pixels = normalise(at_least_float32(frames), IMAGENET_MEAN, IMAGENET_STD)
        return -self.errors(pixels.unflatten(0, video.shape[:2]), self.masks)

    def __call__(self, video: Tensor, prompts: list[str]) -> Tensor:
        check_inputs(video, prompts, self.name)
        return in_chunks(self._score, fit_frames(video, self.network.num_frames, self.name), size=self.chunk_size)
