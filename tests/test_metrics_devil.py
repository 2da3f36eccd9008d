"""DEVIL's parts from videos: formulas against independent ones, and what moves more has more of everything."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.fft
import scipy.ndimage
import torch
from PIL import Image
from torch import Tensor

from vdm_env.metrics import devil
from vdm_env.metrics.devil_frames import frame_similarity, hash_distance, perceptual_hash, ssim, temporal_entropy
from vdm_env.metrics.devil_measure import DevilNetworks, dynamics_parts, load_devil, load_patches
from vdm_env.metrics.vbench_networks import load_dino
from vdm_env.rewards.loading import RewardContext
from vdm_env.rewards.preprocess import IMAGENET_MEAN, IMAGENET_STD


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def moving(pixels: int, frames: int = 8) -> Tensor:
    """A soft pattern that moves that many pixels a frame, [1,F,3,48,48]."""
    wide = torch.nn.functional.interpolate(noise(1, 3, 12, 12), size=(96, 96), mode="bicubic")[0].clamp(0, 1)
    return torch.stack([wide[:, 8:56, i * pixels : i * pixels + 48] for i in range(frames)])[None]


def test_ssim_against_scipy() -> None:
    """scipy's Gaussian filter has the same window; only places where it fits into the picture count."""
    first, second = noise(2, 3, 20, 26), noise(2, 3, 20, 26, seed=1) * 0.5

    def local(image: np.ndarray) -> np.ndarray:
        return scipy.ndimage.gaussian_filter(image, 1.5, truncate=5 / 1.5)[5:-5, 5:-5]

    for n in range(2):
        expected = []
        for c in range(3):
            x, y = first[n, c].double().numpy(), second[n, c].double().numpy()
            mx, my = local(x), local(y)
            vx, vy, cov = local(x * x) - mx**2, local(y * y) - my**2, local(x * y) - mx * my
            c1, c2 = 0.01**2, 0.03**2
            value = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
            expected.append(value.mean())
        assert ssim(first, second)[n].item() == pytest.approx(np.mean(expected), abs=1e-5)
    torch.testing.assert_close(ssim(first, first), torch.ones(2))
    with pytest.raises(ValueError, match="at least 11 pixels"):
        ssim(first[..., :8], second[..., :8])


def test_frame_similarity_and_its_published_form() -> None:
    video = noise(2, 3, 3, 16, 16)
    pairs = [ssim(video[:, i], video[:, i + 1]) for i in range(2)]
    torch.testing.assert_close(frame_similarity(video), (pairs[0] + pairs[1]) / 2)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    cut = ((video - mean) / std).clamp(0, 1)
    torch.testing.assert_close(frame_similarity(video, mode="devil"), frame_similarity(cut), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="mode='published'"):
        frame_similarity(video, mode="published")  # type: ignore[arg-type]


def test_hash_against_the_plain_steps() -> None:
    frames = noise(3, 3, 40, 56)
    for frame, bits in zip(frames, perceptual_hash(frames), strict=True):
        array = (frame * 255).round().byte().permute(1, 2, 0).numpy()
        grey = np.asarray(Image.fromarray(array).convert("L").resize((32, 32), Image.Resampling.LANCZOS))
        low = scipy.fft.dct(scipy.fft.dct(grey.astype(float), axis=0), axis=1)[:8, :8]
        assert np.array_equal(bits.numpy(), low > np.median(low))
    video = torch.stack([frames[0], frames[0], frames[1]])[None]
    differing = int((perceptual_hash(frames[:1]) != perceptual_hash(frames[1:2])).sum())
    assert hash_distance(video).item() == differing / 2 > 0


def test_what_moves_more_costs_more() -> None:
    """Of the same picture standing still, moving, and moving fast; the same bytes every time."""
    videos = [moving(pixels) for pixels in (0, 1, 4)]
    entropy = [temporal_entropy(video).item() for video in videos]
    assert entropy[0] < entropy[1] < entropy[2]
    together = torch.cat(videos)
    assert temporal_entropy(together).tolist() == entropy == temporal_entropy(together).tolist()
    assert temporal_entropy(noise(1, 8, 3, 30, 42)).item() > entropy[2]
    likeness = frame_similarity(together).tolist()
    assert 1 == pytest.approx(likeness[0]) and likeness[0] > likeness[1] > likeness[2]
    hashes = hash_distance(together).tolist()
    assert 0 == hashes[0] < hashes[1] < hashes[2]
    with pytest.raises(ValueError, match="fps is 0"):
        temporal_entropy(together, fps=0)


def by_hand() -> DevilNetworks:
    def flow(first: Tensor, second: Tensor) -> Tensor:
        field = torch.zeros(len(first), 2, *first.shape[2:])
        field[:, 0] = (second - first).mean((1, 2, 3)).view(-1, 1, 1)
        return field

    return DevilNetworks(
        flow=flow,
        dino=lambda images: images.mean((2, 3)),
        patches=lambda images: torch.stack([images[:, :, :112].mean((2, 3)), images[:, :, 112:].mean((2, 3))], 1),
        viclip=lambda segments: segments.mean((1, 3, 4)),
    )


@pytest.mark.parametrize("mode", ["corrected", "devil"])
def test_parts_are_the_arithmetic_on_the_networks(mode: Any) -> None:
    video = noise(2, 8, 3, 24, 32)
    parts = dynamics_parts(video, by_hand(), mode=mode)
    assert list(parts) == [name for level in devil.LEVELS.values() for name in level]
    assert all(values.shape == (2,) and bool(values.isfinite().all()) for values in parts.values())
    for chunk in (1, 3):
        for name, values in dynamics_parts(video[1:], by_hand(), mode=mode, chunk_size=chunk).items():
            torch.testing.assert_close(values[0], parts[name][1], msg=name)
    # Patches: the mean over both of the products of their unit features, at each lag.
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    seen = torch.nn.functional.interpolate(
        video[0], size=(224, 224), mode="bilinear", align_corners=False, antialias=True
    )
    networks = by_hand()
    assert networks.patches is not None and networks.viclip is not None
    patches = torch.nn.functional.normalize(networks.patches((seen - mean) / std), dim=-1)
    lags = [(1 - (patches[:-k] * patches[k:]).sum(-1).mean()).abs() for k in range(1, 8)]
    torch.testing.assert_close(parts["dino_segment"][0], torch.stack(lags).mean())
    segments = []
    for length in (4, 2):
        cut = ((seen - mean) / std).split(length)
        features = networks.viclip(torch.stack([torch.cat([c, c[-1:].expand(8 - length, -1, -1, -1)]) for c in cut]))
        segments.append(devil.segment_distance(features, mode=mode))
    torch.testing.assert_close(parts["viclip_segment"][0], torch.stack(segments).mean())
    fewer = dynamics_parts(video, DevilNetworks(), mode=mode)
    assert list(fewer) == ["ssim", "phash", "temporal_entropy"]


def test_a_dynamics_score_from_videos() -> None:
    """With regressions of one's own; moving videos score above still ones."""
    regressions = {
        "inter_frame": devil.Regression(weights=(0.0, -1.0, 0.01), intercept=1.0),
        "inter_segment": devil.Regression(weights=(1.0, 1.0)),
        "video": devil.Regression(weights=(1.0, 1e-4)),
    }
    parts = dynamics_parts(torch.cat([moving(pixels) for pixels in (0, 1, 4)]), by_hand())
    scores = devil.dynamics_score(parts, regressions).tolist()
    assert 0 <= scores[0] < scores[1] < scores[2] <= 1


def test_networks_load_with_random_weights() -> None:
    context = RewardContext(weights="random", scale="tiny")
    with pytest.warns(UserWarning, match="random weights"):
        patches, dino = load_patches(context), load_dino(context, name="DEVIL")
    images = noise(2, 3, 224, 224)
    assert patches(images).shape == (2, 256, 32) and dino(images).shape == (2, 32)
    torch.testing.assert_close(patches(images)[1:], patches(images[1:]), rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match="random weights"):
        networks = load_devil(context)
    assert networks.viclip is not None
    assert networks.viclip(noise(2, 8, 3, 224, 224)).shape == (2, 32)
