"""ViCLIP against the outputs and pixel gradients of InternVid's own classes."""

from __future__ import annotations

import pytest
import torch
from golden import golden, golden_tensors
from golden_numbers import divisors
from torch import Tensor

from vdm_env.rewards.preprocess import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from vdm_env.rewards.viclip import ViClip, ViClipConfig, ViClipReward, unit, viclip_from

pytestmark = pytest.mark.golden
NAME = "rewards_viclip"


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return golden_tensors(NAME, "fixture.safetensors")


@pytest.fixture(scope="module")
def model(tensors: dict[str, Tensor]) -> ViClip:
    """Sizes are those of the tensors; numbers of heads leave no trace there, and are those that give the features."""
    vision = tensors["vision_encoder.conv1.weight"]
    vocabulary = tensors["text_encoder.token_embedding.weight"]
    weights = {k: v for k, v in tensors.items() if k.startswith(("vision_encoder.", "text_encoder."))}

    def layers(tower: str) -> int:
        return sum(k.startswith(tower) and k.endswith(".ln_1.weight") for k in weights)

    sizes: dict[str, int] = dict(
        image_size=tensors["frames"].shape[-1],
        patch_size=vision.shape[-1],
        num_frames=tensors["vision_encoder.temporal_positional_embedding"].shape[1],
        vision_width=vision.shape[0],
        vision_layers=layers("vision_encoder."),
        embed_dim=tensors["vision_encoder.proj"].shape[1],
        context_length=tensors["text_encoder.positional_embedding"].shape[0],
        vocab_size=vocabulary.shape[0],
        text_width=vocabulary.shape[1],
        text_layers=layers("text_encoder."),
    )
    temperature = {"temp": torch.tensor(0.01)}

    def built(vision_heads: int, text_heads: int) -> ViClip:
        config = ViClipConfig(**sizes, vision_heads=vision_heads, text_heads=text_heads)
        return viclip_from(weights | temperature, config, golden(NAME)).eval().requires_grad_(False)

    def error(heads: tuple[int, int], tower: str) -> float:
        model = built(*heads)
        with torch.no_grad():
            found = (
                model.text_features(tensors["tokens"].long())
                if tower == "text"
                else model.video_features(tensors["frames"].float())
            )
        return float((found - tensors[f"{tower}_features"]).abs().max())

    video = min(divisors(sizes["vision_width"]), key=lambda n: error((n, 1), "video"))
    text = min(divisors(sizes["text_width"]), key=lambda n: error((1, n), "text"))
    return built(video, text)


def test_features_and_gradient(tensors: dict[str, Tensor], model: ViClip) -> None:
    frames = tensors["frames"].float().requires_grad_(True)
    video, text = model.video_features(frames), model.text_features(tensors["tokens"].long())
    torch.testing.assert_close(video, tensors["video_features"], rtol=1e-5, atol=5e-6)
    torch.testing.assert_close(text, tensors["text_features"], rtol=1e-5, atol=5e-6)
    similarity = unit(video) @ unit(text).T
    torch.testing.assert_close(similarity, tensors["similarity"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close((100 * similarity).softmax(-1), tensors["probs_100x"], rtol=1e-3, atol=1e-5)
    loss = 1 - similarity.diagonal().mean()
    torch.testing.assert_close(loss, tensors["loss_one_minus_diag"], rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.autograd.grad(loss, frames)[0], tensors["grad"], rtol=1e-3, atol=1e-7)


def test_a_single_frame_gets_the_mean_of_the_time_table(tensors: dict[str, Tensor], model: ViClip) -> None:
    features = model.video_features(tensors["frames"].float()[:, :1])
    torch.testing.assert_close(features, tensors["video_features_single_frame"], rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize(
    ("preset", "mean", "std"), [("vbench", CLIP_MEAN, CLIP_STD), ("internvid", IMAGENET_MEAN, IMAGENET_STD)]
)
def test_the_reward_pairs_each_video_with_its_prompt(
    tensors: dict[str, Tensor], model: ViClip, preset: str, mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    """Frames of the network's own size, so that resizing changes nothing."""
    video = tensors["frames"].float() * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    reward = ViClipReward(model, lambda texts: tensors["tokens"].long()[[int(t) for t in texts]], preset=preset)  # type: ignore[arg-type]
    own = list(range(len(video)))
    for order in (own, own[::-1], own[-1:] * len(own)):
        expected = tensors["similarity"][own, order]
        torch.testing.assert_close(reward(video, [str(i) for i in order]), expected, rtol=1e-4, atol=1e-5)
