"""Rewards against the outputs and pixel gradients of the programs they come from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from algos.losses import negative_mean, target_l1
from tests.golden import comparable
from tests.golden_numbers import stride
from vdm_env.rewards.action import KINETICS_PHRASES, ActionReward
from vdm_env.rewards.aesthetic import AestheticHead, AestheticReward, head_from
from vdm_env.rewards.analytic import JPEGCompressibilityReward
from vdm_env.rewards.clip import OpenClipBackbone, TransformersClipBackbone, hps, pick_score
from vdm_env.rewards.combine import Part, WeightedSum
from vdm_env.rewards.preprocess import CLIP_MEAN, CLIP_STD, hpsv2_pad, normalise, vader_squash

pytestmark = pytest.mark.golden
Golden = Callable[[str], Path]


def _close_gradient(loss: Tensor, frames: Tensor, expected: Tensor) -> None:
    where = comparable(frames)
    (actual,) = torch.autograd.grad(loss, frames)
    torch.testing.assert_close(actual[where], expected[where], atol=1e-7, rtol=1e-3)


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v.float() for k, v in tensors.items() if k.startswith(prefix)}


def _cases(tensors: dict[str, Tensor]) -> list[str]:
    return sorted(k.removesuffix(".frames") for k in tensors if k.endswith(".frames"))


def _decoder_frames(frames: Tensor) -> Tensor:
    """Frames [-1,1] of a decoder as a leaf that takes gradients."""
    return frames.float().requires_grad_(True)


def _as_videos(frames: Tensor) -> Tensor:
    """Each frame of [N,3,H,W] in about [-1,1] as a video of one frame in [0,1]."""
    return (frames / 2 + 0.5).clamp(0, 1)[:, None]


def _transformers_clip(folder: Path, tensors: dict[str, Tensor]) -> TransformersClipBackbone:
    """Prompt "i" stands for row i of the stored tokens."""
    from transformers import CLIPConfig, CLIPModel

    model = CLIPModel(CLIPConfig(**json.loads((folder / "config.json").read_text())))
    model.load_state_dict(_under(tensors, "clip."), strict=True)

    def tokens(texts: list[str]) -> dict[str, Tensor]:
        rows = [int(t) for t in texts]
        return {key: tensors[key][rows] for key in ("input_ids", "attention_mask")}

    return TransformersClipBackbone(model.eval().requires_grad_(False), tokens)


def _open_clip(folder: Path, tensors: dict[str, Tensor]) -> OpenClipBackbone:
    from open_clip.model import CLIP

    model = CLIP(**json.loads((folder / "config.json").read_text()))
    model.load_state_dict(_under(tensors, "openclip."), strict=True)
    return OpenClipBackbone(
        model.eval().requires_grad_(False), lambda texts: tensors["tokens"][[int(t) for t in texts]]
    )


def _prompts(n: int) -> list[str]:
    return [str(i) for i in range(n)]


def test_hpsv2(golden_folder: Golden) -> None:
    folder = golden_folder("rewards_hpsv2")
    tensors = load_file(folder / "fixture.safetensors")
    reward = hps(_open_clip(folder, tensors))
    for case in _cases(tensors):
        frames = _decoder_frames(tensors[f"{case}.frames"])
        scores = reward(_as_videos(frames), _prompts(len(frames)))
        loss = (1 - scores).mean()
        suffix = "" if f"{case}.score" in tensors else "_modelscope"
        torch.testing.assert_close(scores.mean(), tensors[f"{case}.score{suffix}"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(loss, tensors[f"{case}.loss{suffix}"], rtol=1e-5, atol=0)
        if f"{case}.grad" in tensors:
            _close_gradient(loss, frames, tensors[f"{case}.grad"])


def test_hpsv2_official_scorer(golden_folder: Golden) -> None:
    folder = golden_folder("rewards_hpsv2")
    tensors = load_file(folder / "fixture.safetensors")
    backbone = _open_clip(folder, tensors)
    image = tensors["official.image_uint8_chw"][None].float() / 255
    pixels = normalise(hpsv2_pad(image, backbone.side), CLIP_MEAN, CLIP_STD)
    (sampled,) = (name for name in tensors if name.startswith("official.preprocessed_"))
    step = stride(sampled, backbone.side, tensors[sampled].shape[-1])
    torch.testing.assert_close(pixels[..., ::step, ::step], tensors[sampled], rtol=1e-5, atol=1e-5)
    score = hps(backbone, preprocess=hpsv2_pad)(image[:, None], ["0"])
    torch.testing.assert_close(score, tensors["official.score"], rtol=1e-5, atol=1e-6)
    assert backbone.logit_scale == pytest.approx(float(tensors["official.logit_scale_exp"]), rel=1e-5)


def test_pick_score(golden_folder: Golden) -> None:
    folder = golden_folder("rewards_vader_pickscore")
    tensors = load_file(folder / "fixture.safetensors")
    backbone = _transformers_clip(folder, tensors)
    reward, published = pick_score(backbone), pick_score(backbone, prompt="first")
    for case in _cases(tensors):
        frames = _decoder_frames(tensors[f"{case}.frames"])
        scores = published(_as_videos(frames), _prompts(len(frames)))
        loss = (1 - scores / 100).abs().mean()
        torch.testing.assert_close(scores.mean(), tensors[f"{case}.score"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(loss, tensors[f"{case}.loss"], rtol=1e-5, atol=0)
        _close_gradient(loss, frames, tensors[f"{case}.grad"])
        if f"{case}.full_logits_text_by_image" in tensors:
            own = reward(_as_videos(frames), _prompts(len(frames)))
            expected = tensors[f"{case}.full_logits_text_by_image"].diagonal()
            torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5, check_stride=False)
            assert not torch.allclose(own, scores), "by default every image has its own prompt"
    with pytest.raises(ValueError, match="prompt='last'"):
        pick_score(backbone, prompt="last")


def test_laion_head(golden_folder: Golden) -> None:
    folder = golden_folder("rewards_laion_mlp")
    tensors = load_file(folder / "fixture.safetensors")
    head = head_from(_under(tensors, "mlp."), folder).eval()
    raw = tensors["raw_embedding"].clone().requires_grad_(True)
    unit = torch.nn.functional.normalize(raw, dim=-1)
    torch.testing.assert_close(unit, tensors["normalized_embedding"], rtol=1e-5, atol=1e-6)
    score = head(unit)
    torch.testing.assert_close(score, tensors["score"][:, 0], atol=2e-6, rtol=1e-5)
    (gradient,) = torch.autograd.grad(score.sum(), raw)
    torch.testing.assert_close(gradient, tensors["grad_sum_wrt_raw_embedding"], atol=1e-6, rtol=1e-5)
    weight, bias = head.affine()
    torch.testing.assert_close((unit.double() @ weight + bias).float(), tensors["score"][:, 0], atol=2e-6, rtol=1e-5)


def _aesthetic(folder: Path, tensors: dict[str, Tensor]) -> AestheticReward:
    head: AestheticHead = head_from(_under(tensors, "mlp."), folder)
    return AestheticReward(_transformers_clip(folder, tensors), head.requires_grad_(False))


def test_vader_aesthetic(golden_folder: Golden) -> None:
    folder = golden_folder("rewards_vader_aesthetic")
    tensors = load_file(folder / "fixture.safetensors")
    reward = _aesthetic(folder, tensors)
    for case in _cases(tensors):
        frames = _decoder_frames(tensors[f"{case}.frames"])
        scores = reward(_as_videos(frames), _prompts(len(frames)))
        loss = target_l1(scores, 10.0, 0.1)
        torch.testing.assert_close(scores.mean(), tensors[f"{case}.reward"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(loss, tensors[f"{case}.loss"], rtol=1e-5, atol=0)
        _close_gradient(loss, frames, tensors[f"{case}.grad"])
        if f"{case}.score_per_frame" in tensors:
            torch.testing.assert_close(scores, tensors[f"{case}.score_per_frame"], rtol=1e-5, atol=1e-6)
        if f"{case}.loss_target_none_scale1" in tensors:
            plain = negative_mean(scores)
            torch.testing.assert_close(plain, tensors[f"{case}.loss_target_none_scale1"], rtol=1e-5, atol=1e-6)
        for name in (n for n in tensors if n.startswith(f"{case}.preprocessed_sample")):
            side, sample = reward.backbone.side, tensors[name]
            pixels = normalise(vader_squash(_as_videos(frames)[:, 0], side), CLIP_MEAN, CLIP_STD)
            step = stride("", side, sample.shape[-1])
            torch.testing.assert_close(pixels[..., ::step, ::step].detach(), sample, rtol=1e-5, atol=1e-5)


def test_vader_action(golden_folder: Golden) -> None:
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    folder = golden_folder("rewards_vader_actpred")
    tensors = load_file(folder / "fixture.safetensors")
    model = VideoMAEForVideoClassification(VideoMAEConfig(**json.loads((folder / "config.json").read_text())))
    state = _under(tensors, "videomae.")
    # A bias of keys that older releases of transformers have: it changes nothing.
    state |= {k: torch.zeros_like(v) for k, v in model.state_dict().items() if k.endswith("attention.key.bias")}
    model.load_state_dict(state, strict=True)
    classes = {int(k): v for k, v in model.config.id2label.items()}
    phrases = {k: v for k, v in KINETICS_PHRASES.items() if v in classes.values()}
    reward = ActionReward(model.eval().requires_grad_(False), phrases=phrases, score="log_probability")
    short = {label: phrase for phrase, label in phrases.items()}
    surprise = -tensors["logits"].log_softmax(-1)[0]
    for key in sorted(k.removesuffix(".loss") for k in tensors if k.endswith(".loss")):
        label = classes[int((surprise - tensors[f"{key}.loss"]).abs().argmin())]  # the class that has this loss
        for prompt in (label, f"Someone busy with {short.get(label, label)} on a rainy day"):
            frames = _decoder_frames(tensors["frames"])
            video = (frames / 2 + 0.5).clamp(0, 1)[None]
            torch.testing.assert_close(reward.logits(video), tensors["logits"], rtol=1e-5, atol=1e-6)
            score = reward(video, [prompt])
            torch.testing.assert_close(-score[0], tensors[f"{key}.loss"].reshape(()), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(score.exp()[0], tensors[f"{key}.score"].reshape(()), rtol=1e-5, atol=1e-6)
            _close_gradient(-score[0], frames, tensors[f"{key}.grad"])


def test_jpeg(golden_folder: Golden) -> None:
    tensors = load_file(golden_folder("rewards_jpeg") / "fixture.safetensors")
    images = tensors["images"].float()[:, None]
    prompts = _prompts(len(images))
    for sign, key in ((-1, "compressibility"), (1, "incompressibility")):
        scores = JPEGCompressibilityReward(sign=sign)(images, prompts)
        torch.testing.assert_close(scores.double(), tensors[key], rtol=0.01, atol=0)


def test_vader_aesthetic_and_hps(golden_folder: Golden) -> None:
    tensors = load_file(golden_folder("rewards_vader_aesthetic_hps") / "fixture.safetensors")
    parts = [golden_folder(name) for name in ("rewards_vader_aesthetic", "rewards_hpsv2")]
    first, second = (load_file(f / "fixture.safetensors") for f in parts)
    reward = WeightedSum(
        [
            Part(reward=_aesthetic(parts[0], first), weight=1 / 2),
            Part(reward=hps(_open_clip(parts[1], second)), weight=15 / 2),
        ]
    )
    frames = _decoder_frames(tensors["frames"])
    scores, each = reward.score_parts(_as_videos(frames), _prompts(len(frames)))
    loss = (1.5 * target_l1(each["Aesthetic"], 10.0, 0.1) + (1 - each["HPS"]).abs().mean()) / 2
    torch.testing.assert_close(scores.mean(), tensors["reward"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss, tensors["loss"], rtol=1e-5, atol=0)
    _close_gradient(loss, frames, tensors["grad"])
