"""VideoAlign: the network against transformers' own forward pass, the diagonal, and the released layout."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen2VLVideoProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from vdm_env.errors import CorruptWeightsError, MissingWeightsError
from vdm_env.rewards import REWARDS, RewardContext, score_parts, videoalign
from vdm_env.rewards.preprocess import CLIP_MEAN, CLIP_STD, normalise, resize
from vdm_env.rewards.videoalign import (
    DIMENSIONS,
    NORMALISATION,
    REWARD_TOKENS,
    VideoAlignReward,
    fit,
    sampled,
    spread,
)
from vdm_env.rewards.vlm_files import encode, letter_tokenizer

PROMPTS = ["a dog", "a cat playing chess"]
QUERY = f"Q {REWARD_TOKENS[0]} M {REWARD_TOKENS[1]} of {{text_prompt}} {REWARD_TOKENS[2]}\n"


def build(**changes: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        context = RewardContext(**({"weights": "random", "scale": "tiny", "seed": 5} | changes))
        return REWARDS["VideoAlign"].build(context)


@pytest.fixture(scope="module")
def reward() -> VideoAlignReward:
    return build()


def videos(count: int = 2, frames: int = 4) -> Tensor:
    return torch.rand(count, frames, 3, 20, 28, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("frames", [4, 3])
def test_raw_scores_equal_transformers_forward_pass(reward: VideoAlignReward, frames: int) -> None:
    """Patches by transformers' video processor, the model by its own forward, the three tokens picked by hand."""
    network = reward.network
    processor = Qwen2VLVideoProcessor(patch_size=network.patch, merge_size=network.merge)
    height, width = fit(20, 28, network.cell, reward.pixels)
    for video, prompt, scored in zip(videos(2, frames), PROMPTS, reward.raw(videos(2, frames), PROMPTS), strict=True):
        small = resize(video, height, width, "bicubic")
        inputs = processor([small], do_resize=False, do_rescale=False, return_tensors="pt")
        time, rows, columns = inputs["video_grid_thw"][0].tolist()
        tokens, mask = encode(reward.tokenizer, [reward._text(prompt, time * rows * columns // 4)], torch.device("cpu"))
        mine = network.patches(normalise(small, CLIP_MEAN, CLIP_STD)[None])
        torch.testing.assert_close(mine, inputs["pixel_values_videos"], rtol=1e-5, atol=1e-5)
        model: Any = network.model
        model.config.video_token_id = network.video_token
        states = model(
            input_ids=tokens,
            attention_mask=mask,
            mm_token_type_ids=2 * (tokens == network.video_token).int(),
            **inputs,
        ).last_hidden_state[0]
        model.rope_deltas = None
        places = [tokens[0].tolist().index(number) for number in network.reward_tokens]
        expected = torch.stack([network.rm_head.weight[i] @ states[place] for i, place in enumerate(places)])
        torch.testing.assert_close(scored, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(320, 512), (256, 256), (720, 1280), (40, 60), (512, 100)])
def test_sizes_equal_transformers(size: tuple[int, int]) -> None:
    low, high = videoalign.PIXELS
    assert fit(*size, 28, (low, high)) == smart_resize(*size, factor=28, min_pixels=low, max_pixels=high)


def test_normalisation_and_dimensions(reward: VideoAlignReward) -> None:
    assert NORMALISATION["VQ"] == (3.6757, 2.2476) and NORMALISATION["MQ"] == (1.1646, 1.3811)
    scaled = VideoAlignReward(reward.network, reward.tokenizer, query=reward.query, pixels=reward.pixels)
    raw = reward.raw(videos(), PROMPTS)
    total, parts = score_parts(scaled, videos(), PROMPTS)
    torch.testing.assert_close(parts["VideoAlign:VQ"] * 2.2476 + 3.6757, raw[:, 0])
    torch.testing.assert_close(parts["VideoAlign:MQ"] * 1.3811 + 1.1646, raw[:, 1])
    torch.testing.assert_close(total, sum(parts.values()))
    for i, dimension in enumerate(DIMENSIONS):
        one = build(dimension=dimension)
        assert one.name == f"VideoAlign:{dimension}"
        torch.testing.assert_close(one(videos(), PROMPTS), raw[:, i])
    with pytest.raises(ValueError, match="dimension='XX'.*VQ"):
        build(dimension="XX")
    with pytest.raises(ValueError, match="deviation > 0"):
        VideoAlignReward(reward.network, reward.tokenizer, query=reward.query, normalisation={"VQ": (0.0, 1.0)})
    with pytest.raises(ValueError, match="each of .*once"):
        VideoAlignReward(reward.network, reward.tokenizer, query="{text_prompt}")


def test_prompts_cannot_bring_tokens_of_their_own(reward: VideoAlignReward) -> None:
    plain = reward(videos(1), ["a dog"])
    for token in ("<|VQ_reward|>", "<|video_pad|>", "<|im_end|>"):
        assert torch.equal(reward(videos(1), [f"a dog{token}"]), plain)


def test_only_ta_sees_a_prompt_that_comes_after_the_other_two(reward: VideoAlignReward) -> None:
    """Attention is causal: in the query VQ and MQ come before the prompt."""
    raw = reward.raw(videos(1).expand(2, -1, -1, -1, -1), PROMPTS)
    torch.testing.assert_close(raw[0, :2], raw[1, :2], rtol=1e-4, atol=1e-5)
    assert abs(float(raw[0, 2] - raw[1, 2])) > 1e-3


def test_frames(reward: VideoAlignReward) -> None:
    assert [sampled(n) for n in (None, 8, 16, 25, 49, 81)] == [4, 4, 4, 6, 12, 20]
    assert spread(16, 4) == [0, 5, 10, 15] and spread(4, 4) == [0, 1, 2, 3]
    assert build(num_frames=16).frames == [0, 5, 10, 15] and build(num_frames=4).frames == "all"
    torch.testing.assert_close(
        reward(videos(1, 16), ["a"]), reward(videos(1, 16)[:, [0, 5, 10, 15]], ["a"]), rtol=1e-5, atol=1e-6
    )
    chunked = build()
    chunked.chunk_size = 1
    torch.testing.assert_close(chunked(videos(), PROMPTS), reward(videos(), PROMPTS), rtol=1e-4, atol=1e-5)


# ---- the released layout -----------------------------------------------------------------------------------------

RANK, ALPHA = 2, 4


def released(network: Any) -> dict[str, Tensor]:
    """As the release saved it: wrapped, attention of the language model adapted, names of transformers 4.45."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}
    for name, tensor in network.state_dict().items():
        old = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        wrapped = f"base_model.model.{old}"
        if "layers." in name and name.endswith("_proj.weight"):
            layer = wrapped.removesuffix(".weight")
            down = torch.randn(RANK, tensor.shape[1], generator=generator)
            up = torch.randn(len(tensor), RANK, generator=generator)
            state |= {f"{layer}.lora_A.default.weight": down, f"{layer}.lora_B.default.weight": up}
            state[f"{layer}.base_layer.weight"] = tensor - ALPHA / RANK * up @ down
        elif "layers." in name and name.endswith("_proj.bias"):
            state[f"{wrapped.removesuffix('.bias')}.base_layer.bias"] = tensor
        else:
            state[wrapped] = tensor
    return state | {"base_model.model.lm_head.weight": state["base_model.model.model.embed_tokens.weight"]}


@pytest.fixture
def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "no_cache"))
    folder, base, code = (tmp_path / r for r in (videoalign.REPOSITORY, videoalign.BASE, videoalign.CODE))
    (folder / "checkpoint-11352").mkdir(parents=True)
    base.mkdir(parents=True)
    code.mkdir(parents=True)
    network = build().network
    measured = {f"{d}_{k}": v for d in DIMENSIONS for k, v in zip(("mean", "std"), NORMALISATION[d], strict=True)}
    lora = {"lora_enable": True, "lora_r": RANK, "lora_alpha": ALPHA, "use_rslora": False}
    settings = {"model_config": {}, "peft_lora_config": lora, "inference_config": measured}
    (folder / "model_config.json").write_text(json.dumps(settings))
    torch.save(released(network), folder / "checkpoint-11352" / "model.pth")
    config = network.model.config.to_dict()
    config["text_config"]["vocab_size"] = 999  # the base's own table is of another size
    (base / "config.json").write_text(json.dumps(config))
    special = list(videoalign._SPECIAL)
    letter_tokenizer(special).backend_tokenizer.save(str(base / "tokenizer.json"))
    (code / "prompt_template.py").write_text(
        f'raise SystemExit("executed")\nDETAILED_PROMPT_WITH_SPECIAL_TOKEN = """{QUERY}"""\n'
    )
    return tmp_path


def load(release: Path, **changes: Any) -> Any:
    return REWARDS["VideoAlign"].build(RewardContext(folder=release, **changes))


def rewrite(release: Path, change: Any) -> None:
    path = release / videoalign.REPOSITORY / videoalign.WEIGHTS
    tensors = torch.load(path, weights_only=True)
    change(tensors)
    torch.save(tensors, path)


def test_released_layout_loads(release: Path) -> None:
    loaded = load(release)
    assert loaded.query == QUERY and loaded.normalisation == dict(NORMALISATION)
    loaded.pixels = videoalign.TINY_PIXELS
    random = build()
    random.query = QUERY
    torch.testing.assert_close(loaded.raw(videos(), PROMPTS), random.raw(videos(), PROMPTS), rtol=1e-3, atol=1e-4)


def test_merged_weights_with_new_names_load_as_well(release: Path) -> None:
    path = release / videoalign.REPOSITORY / videoalign.WEIGHTS
    network = build().network
    torch.save(network.state_dict(), path)
    loaded = load(release)
    assert all(torch.equal(a, b) for a, b in zip(loaded.network.parameters(), network.parameters(), strict=True))


HEAD = "base_model.model.rm_head.weight"
LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(extra=torch.zeros(1)), "unexpected: extra"),
        (lambda t: t.pop(HEAD), "missing: rm_head.weight"),
        (lambda t: t.update({HEAD: torch.zeros(1, 32)}), r"rm_head.weight \[1, 32\] instead of \[3, 32\]"),
        (lambda t: t.pop(f"{LAYER}.lora_B.default.weight"), "update of model.layers.0.self_attn.q_proj is incomplete"),
        (lambda t: t.update({f"{LAYER}.lora_A.default.weight": torch.zeros(5, 32)}), "expected rank 2"),
    ],
)
def test_wrong_tensors_are_refused(release: Path, change: Any, message: str) -> None:
    rewrite(release, change)
    with pytest.raises(CorruptWeightsError, match=message):
        load(release)


def test_missing_numbers_and_files_are_named(release: Path) -> None:
    settings = release / videoalign.REPOSITORY / "model_config.json"
    whole = json.loads(settings.read_text())
    settings.write_text(json.dumps(whole | {"peft_lora_config": {}}))
    with pytest.raises(CorruptWeightsError, match="lora_r and lora_alpha"):
        load(release)
    del whole["inference_config"]["TA_std"]
    settings.write_text(json.dumps(whole))
    with pytest.raises(CorruptWeightsError, match="TA_std"):
        load(release)
    (release / videoalign.CODE / "prompt_template.py").unlink()
    with pytest.raises(MissingWeightsError, match=r"prompt_template\.py.*curl"):
        load(release)
    (release / videoalign.REPOSITORY / videoalign.WEIGHTS).unlink()
    with pytest.raises(
        MissingWeightsError, match=r"checkpoint-11352/model\.pth of the repository .KwaiVGI/VideoReward"
    ):
        load(release)
