"""VideoAlign's VideoReward: visual quality (VQ), motion quality (MQ) and text alignment (TA) of a video.

By a Qwen2-VL of two billion weights whose query ends each question with a token of its own:

    raw_i  = (head state_i)_i           at the i-th of the tokens <|VQ_reward|>, <|MQ_reward|>, <|TA_reward|>
    score  = sum_i (raw_i - mean_i) / std_i,   or one term alone

By name: "VideoAlign" is the sum (the release's "Overall"), "VideoAlign:MQ" one term. Means and deviations come from the
release's model_config.json; they were measured on the authors' data, so 0 is an average video of theirs.

Source: Liu et al. 2025, arXiv:2501.13918; KwaiVGI/VideoAlign (head, tokens, sampling, sizes). The network is
transformers' `Qwen2VLModel` with a linear head; the query is read from the authors' own prompt_template.py.

Deviation: frames are resized in floating point, without rounding to 8 bits, so that the score is differentiable.
Deviation: the release samples 2 frames a second of a file; a video here has no clock, and `ASSUMED_FPS` is taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vdm_env.errors import CorruptWeightsError
from vdm_env.rewards.base import FramePolicy, check_inputs
from vdm_env.rewards.loading import (
    RewardContext,
    find_files,
    load_strictly,
    published,
    read_tensors,
    seeded,
    warn_random,
)
from vdm_env.rewards.preprocess import CLIP_MEAN, CLIP_STD, normalise, resize
from vdm_env.rewards.tensors import at_least_float32, in_chunks
from vdm_env.rewards.videoalign_weights import merged
from vdm_env.rewards.vlm_files import (
    SLOT,
    default_dtype,
    empty,
    encode,
    fill,
    frozen_vlm,
    letter_tokenizer,
    read_json,
    read_query,
    read_tokenizer,
    token_id,
)

NAME = "VideoAlign"
DIMENSIONS = ("VQ", "MQ", "TA")
REWARD_TOKENS = tuple(f"<|{name}_reward|>" for name in DIMENSIONS)
NORMALISATION: Mapping[str, tuple[float, float]] = {
    "VQ": (3.6757, 2.2476),
    "MQ": (1.1646, 1.3811),
    "TA": (2.8105, 2.5121),
}
"""mean and standard deviation of the raw scores in the release; raw = score * std + mean"""
ASSUMED_FPS, SAMPLED_FPS, MIN_FRAMES = 8.0, 2.0, 4
REPOSITORY, BASE = "KwaiVGI/VideoReward", "Qwen/Qwen2-VL-2B-Instruct"
CODE = "KwaiVGI/VideoAlign"
WEIGHTS, CONFIG, TEMPLATE = "checkpoint-11352/model.pth", "model_config.json", "prompt_template.py"
_QUERY = "DETAILED_PROMPT_WITH_SPECIAL_TOKEN"
_START, _END, _VISION_START, _VISION_END = "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"
_VIDEO = "<|video_pad|>"
_SPECIAL = (_START, _END, _VISION_START, _VISION_END, _VIDEO, *REWARD_TOKENS)
PIXELS = (128 * 28 * 28, 448 * 448)
"""fewest and most pixels of a frame as the network sees it"""
PLAIN_QUERY = f"Rate this video. Quality: {REWARD_TOKENS[0]} motion: {REWARD_TOKENS[1]} {SLOT}: {REWARD_TOKENS[2]}\n"
"""what a network with random weights is asked"""

VISION: dict[str, Any] = {"hidden_size": 1536, "embed_dim": 1280, "depth": 32, "num_heads": 16}
TEXT: dict[str, Any] = {
    "vocab_size": 151660,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}
FULL: dict[str, Any] = {"vision_config": VISION, "text_config": TEXT}
_WIDE = {"initializer_range": 0.1}
_NARROW = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, **_WIDE}
TINY: dict[str, Any] = {
    "vision_config": {"hidden_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 4, **_WIDE},
    "text_config": {
        **TEXT,
        **_NARROW,
        "vocab_size": 128,
        "num_key_value_heads": 1,
        "rope_parameters": {**TEXT["rope_parameters"], "mrope_section": [2, 3, 3]},
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
}
TINY_PIXELS = (64, 32 * 32)


class VideoAlignNetwork(nn.Module):
    """Frames [B,F,3,H,W] (H and W multiples of `cell`) and tokens [B,L] with their mask to raw scores [B,3].

    Args:
        config: of transformers' `Qwen2VLConfig`.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        from transformers import Qwen2VLConfig, Qwen2VLModel

        super().__init__()
        self.model: Any = Qwen2VLModel(Qwen2VLConfig(**config))
        self.rm_head = nn.Linear(self.model.config.text_config.hidden_size, len(DIMENSIONS), bias=False)
        vision = self.model.config.vision_config
        self.patch, self.merge, self.tubelet = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        self.cell = self.patch * self.merge
        self.video_token = int(self.model.config.video_token_id)
        self.reward_tokens: tuple[int, ...] = ()

    def grid(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Tubelets and patches, (time, rows, columns), of a video of that many frames and pixels."""
        return -(-num_frames // self.tubelet), height // self.patch, width // self.patch

    def patches(self, video: Tensor) -> Tensor:
        """[B,F,3,H,W] to [B*t*h*w, 3*tubelet*patch*patch]; patches that are merged later lie side by side."""
        batch, frames, channels, height, width = video.shape
        time, rows, columns = self.grid(frames, height, width)
        if frames < time * self.tubelet:
            video = torch.cat([video, video[:, -1:].expand(-1, time * self.tubelet - frames, -1, -1, -1)], dim=1)
        m, p = self.merge, self.patch
        cut = video.reshape(batch, time, self.tubelet, channels, rows // m, m, p, columns // m, m, p)
        return cut.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9).reshape(batch * time * rows * columns, -1)

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        grid = torch.tensor([self.grid(pixels.shape[1], *pixels.shape[-2:])] * len(pixels), device=pixels.device)
        seen = self.model.visual(self.patches(pixels).to(self.rm_head.weight.dtype), grid_thw=grid).pooler_output
        shown = tokens == self.video_token
        embedded = self.model.get_input_embeddings()(tokens)
        embedded = embedded.masked_scatter(shown[..., None], seen.to(embedded.dtype))
        # 2 is a video's token, 0 a text's.
        positions = self.model.get_rope_index(tokens, 2 * shown.int(), video_grid_thw=grid, attention_mask=mask)[0]
        states = self.model.language_model(
            inputs_embeds=embedded, position_ids=positions, attention_mask=mask, use_cache=False
        ).last_hidden_state
        wanted = torch.tensor(self.reward_tokens, device=tokens.device)
        # Each is there once: the query has it once, and prompts cannot bring their own.
        place = (tokens[:, None] == wanted[:, None]).int().argmax(-1)
        logits = self.rm_head(states.gather(1, place[..., None].expand(-1, -1, states.shape[-1])))
        return at_least_float32(logits).diagonal(dim1=1, dim2=2)


class VideoAlignReward:
    """Sum of the normalised scores VQ, MQ and TA, or one of them.

    Args:
        network: the network.
        tokenizer: the network's, with the three tokens.
        query: the text the network is asked, with `{text_prompt}` where the prompt goes and the three tokens.
        dimension: one of DIMENSIONS; None: the sum.
        normalisation: {dimension: (mean, deviation)} of the raw scores.
        num_frames: more frames than these are thinned out evenly.
        pixels: fewest and most pixels of a frame as the network sees it.
        frames: frame policy.
        chunk_size: videos the network sees at a time; None: all.

    Raises:
        ValueError: an unknown dimension, a normalisation that does not fit, or a query without the three tokens.
    """

    differentiable = True
    range = (-math.inf, math.inf)

    def __init__(
        self,
        network: VideoAlignNetwork,
        tokenizer: Any,
        *,
        query: str,
        dimension: str | None = None,
        normalisation: Mapping[str, tuple[float, float]] = NORMALISATION,
        num_frames: int = MIN_FRAMES,
        pixels: tuple[int, int] = PIXELS,
        frames: FramePolicy = "all",
        chunk_size: int | None = None,
    ) -> None:
        if dimension is not None and dimension not in DIMENSIONS:
            raise ValueError(f"dimension={dimension!r}: expected one of {list(DIMENSIONS)}, or None for their sum")
        if set(normalisation) != set(DIMENSIONS) or not all(std > 0 for _, std in normalisation.values()):
            raise ValueError(
                f"normalisation={dict(normalisation)}: expected (mean, deviation > 0) of each {DIMENSIONS}"
            )
        if not all(query.count(token) == 1 for token in REWARD_TOKENS):
            raise ValueError(f"the query must have each of {REWARD_TOKENS} once; without them there is nothing to read")
        self.network, self.tokenizer, self.query, self.pixels = network, tokenizer, query, pixels
        self.dimension, self.num_frames, self.frames, self.chunk_size = dimension, num_frames, frames, chunk_size
        self.normalisation = dict(normalisation)
        self.name = NAME if dimension is None else f"{NAME}:{dimension}"
        network.video_token = token_id(tokenizer, _VIDEO, "the tokenizer")
        network.reward_tokens = tuple(token_id(tokenizer, token, "the tokenizer") for token in REWARD_TOKENS)

    def _text(self, prompt: str, num_tokens: int) -> str:
        for token in _SPECIAL:
            prompt = prompt.replace(token, "")
        video = f"{_VISION_START}{_VIDEO * num_tokens}{_VISION_END}"
        system = f"{_START}system\nYou are a helpful assistant.{_END}\n"
        return f"{system}{_START}user\n{video}{fill(self.query, prompt)}{_END}\n{_START}assistant\n"

    def raw(self, video: Tensor, prompts: list[str]) -> Tensor:
        """Scores of VQ, MQ and TA before normalisation, [B,3]."""
        check_inputs(video, prompts, self.name)
        if video.shape[1] > self.num_frames:
            video = video[:, spread(video.shape[1], self.num_frames)]
        height, width = fit(video.shape[-2], video.shape[-1], self.network.cell, self.pixels)
        time, rows, columns = self.network.grid(video.shape[1], height, width)
        length = time * rows * columns // self.network.merge**2
        tokens, mask = encode(self.tokenizer, [self._text(p, length) for p in prompts], video.device)

        def score(part: Tensor, part_tokens: Tensor, part_mask: Tensor) -> Tensor:
            frames = normalise(resize(part.flatten(0, 1), height, width, "bicubic"), CLIP_MEAN, CLIP_STD)
            return self.network(frames.unflatten(0, part.shape[:2]), part_tokens, part_mask)

        return in_chunks(score, video, tokens, mask, size=self.chunk_size)

    def score_parts(self, video: Tensor, prompts: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """The score [B], and every dimension's normalised one, {"VideoAlign:VQ": [B], ...}."""
        raw = self.raw(video, prompts)
        terms = {
            name: (raw[:, i] - mean) / std
            for i, name in enumerate(DIMENSIONS)
            for mean, std in [self.normalisation[name]]
        }
        score = torch.stack(list(terms.values())).sum(0) if self.dimension is None else terms[self.dimension]
        return score, {f"{NAME}:{name}": term for name, term in terms.items()}

    def __call__(self, video: Tensor, prompts: list[str]) -> Tensor:
        return self.score_parts(video, prompts)[0]


def spread(num_frames: int, count: int) -> list[int]:
    """`count` frames spread evenly from the first to the last, of num_frames >= count."""
    return [round(i * (num_frames - 1) / max(1, count - 1)) for i in range(count)]


def sampled(num_frames: int | None) -> int:
    """How many frames are looked at of a video: 2 a second at ASSUMED_FPS, even, at least 4."""
    if num_frames is None:
        return MIN_FRAMES
    return max(MIN_FRAMES, int(num_frames * SAMPLED_FPS / ASSUMED_FPS) // 2 * 2)


def fit(height: int, width: int, cell: int, pixels: tuple[int, int]) -> tuple[int, int]:
    """Size of a frame for Qwen2-VL: multiples of `cell`, about the same aspect, pixels within bounds."""
    fewest, most = pixels
    rows, columns = round(height / cell) * cell, round(width / cell) * cell
    if rows * columns > most:
        scale = math.sqrt(height * width / most)
        return max(cell, math.floor(height / scale / cell) * cell), max(cell, math.floor(width / scale / cell) * cell)
    if rows * columns < fewest:
        scale = math.sqrt(fewest / (height * width))
        return math.ceil(height * scale / cell) * cell, math.ceil(width * scale / cell) * cell
    return rows, columns


def build_videoalign(context: RewardContext) -> VideoAlignReward:
    """VideoReward (hub KwaiVGI/VideoReward) on Qwen2-VL-2B, or one of its dimensions, `context.dimension`.

    Reads model_config.json and checkpoint-11352/model.pth of the release, config.json and tokenizer.json of
    Qwen/Qwen2-VL-2B-Instruct, and prompt_template.py of the authors' git repository (as text).
    """
    context = published(context)
    count = sampled(context.num_frames)
    frames: FramePolicy = "all"
    if context.num_frames is not None and context.num_frames > count:
        frames = spread(context.num_frames, count)
    options: dict[str, Any] = {"dimension": context.dimension, "num_frames": count, "frames": frames}
    if context.weights == "random":
        warn_random(NAME)
        tiny = context.scale == "tiny"
        with seeded(context.seed), default_dtype(context.dtype):
            network = VideoAlignNetwork(TINY if tiny else FULL)
        options |= {"pixels": TINY_PIXELS} if tiny else {}
        options["normalisation"] = dict.fromkeys(DIMENSIONS, (0.0, 1.0))
        return VideoAlignReward(frozen_vlm(network, context), letter_tokenizer(_SPECIAL), query=PLAIN_QUERY, **options)
    settings_file, weights = find_files(context, NAME, REPOSITORY, [CONFIG, WEIGHTS])
    config_file, tokenizer_file = find_files(context, NAME, BASE, ["config.json", "tokenizer.json"])
    address = f"https://github.com/{CODE}/raw/main/{TEMPLATE}"
    (template,) = find_files(context, NAME, CODE, [TEMPLATE], f"`curl -L -O {address}` (read as text, never executed)")
    settings = read_json(settings_file)
    tokenizer = read_tokenizer(tokenizer_file, _SPECIAL)
    tensors = merged(read_tensors(weights), settings.get("peft_lora_config", {}), weights)
    config = read_json(config_file)
    config = {k: v for k, v in config.items() if k not in ("architectures", "dtype", "torch_dtype", "model_type")}
    vocabulary = tensors.get("model.language_model.embed_tokens.weight")
    if vocabulary is not None:  # the three tokens made the release's table another size than the base's
        place = config["text_config"] if isinstance(config.get("text_config"), dict) else config
        place["vocab_size"] = len(vocabulary)
    try:
        with seeded(context.seed), default_dtype(context.dtype):
            network = empty(lambda: VideoAlignNetwork(config))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise CorruptWeightsError(f"{config_file} does not describe a Qwen2-VL ({error}); fetch it again") from error
    load_strictly(network, tensors, weights)
    options["normalisation"] = read_normalisation(settings, settings_file)
    query = read_query(template, _QUERY)
    return VideoAlignReward(frozen_vlm(network, context), tokenizer, query=query, **options)


def read_normalisation(settings: Mapping[str, Any], path: Any) -> dict[str, tuple[float, float]]:
    """Means and deviations of a release's `inference_config`.

    Raises:
        CorruptWeightsError: one is missing, or no number.
    """
    measured = settings.get("inference_config")
    try:
        return {name: (float(measured[f"{name}_mean"]), float(measured[f"{name}_std"])) for name in DIMENSIONS}  # type: ignore[index]
    except (TypeError, KeyError, ValueError) as error:
        raise CorruptWeightsError(
            f"{path} lacks the mean and deviation of {', '.join(DIMENSIONS)} in inference_config ({error}); fetch it "
            "again"
        ) from error
