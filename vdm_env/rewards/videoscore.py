"""VideoScore: five scores of a video and its prompt, each about 1 (bad) to 4 (as real), or their mean.

By an Idefics2 of eight billion weights with a linear head of five outputs on the last token:

    score_i = mean of the five, or one of them: visual, temporal, dynamic, alignment, factual

By name: "VideoScore" is the mean, "VideoScore:temporal" one dimension (the one OnlineVPO ranks videos by).

Source: He et al. 2024, arXiv:2406.15252; TIGER-AI-Lab/VideoScore and TIGER-AI-Lab/Mantis (order of the outputs, frames,
layout of the text). The network is transformers' `Idefics2Model` with a head; the query comes from the release.

Deviation: frames are resized in floating point, without rounding to 8 bits, so that the score is differentiable.
Deviation: frames are never taken for padding; transformers' own forward drops pictures that are grey all over.
Deviation: "VideoScore" alone is the mean of the five; the release has no single number.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from vdm_env.errors import CorruptWeightsError
from vdm_env.rewards.base import FramePolicy, check_inputs
from vdm_env.rewards.loading import RewardContext, find_files, load_strictly, published, seeded, warn_random
from vdm_env.rewards.preprocess import normalise, resize
from vdm_env.rewards.tensors import at_least_float32, in_chunks
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
    read_shards,
    read_tokenizer,
    shard_files,
    token_id,
)

NAME = "VideoScore"
DIMENSIONS = ("visual", "temporal", "dynamic", "alignment", "factual")
"""in the order of the network's outputs: visual quality, temporal consistency, dynamic degree, text-to-video alignment,
factual consistency"""
MAX_FRAMES = 16
_REPOSITORY = "TIGER-Lab/VideoScore"
_INDEX = "model.safetensors.index.json"
_QUERY = "regression_query_prompt"
_IMAGE, _EDGE = "<image>", "<fake_token_around_image>"
_EDGES = (378, 980)
_HALF = (0.5, 0.5, 0.5)
PLAIN_QUERY = f'Rate this video made for the prompt "{SLOT}".\n'
"""what a network with random weights is asked"""

VISION: dict[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 980,
    "patch_size": 14,
}
PERCEIVER: dict[str, Any] = {"hidden_size": 4096, "rms_norm_eps": 1e-5}
TEXT: dict[str, Any] = {
    "model_type": "mistral",
    "vocab_size": 32003,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "sliding_window": 4096,
    "pad_token_id": 0,
}
FULL: dict[str, Any] = {"vision_config": VISION, "perceiver_config": PERCEIVER, "text_config": TEXT}
_WIDE = {"initializer_range": 0.1}
TINY: dict[str, Any] = {
    "vision_config": {
        **VISION,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        **_WIDE,
    },
    "perceiver_config": {
        "hidden_size": 32,
        "rms_norm_eps": 1e-5,
        "resampler_n_latents": 2,
        "resampler_depth": 1,
        "resampler_n_heads": 2,
        "resampler_head_dim": 16,
        "num_key_value_heads": 1,
        **_WIDE,
    },
    "text_config": {
        **TEXT,
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        **_WIDE,
    },
    "image_token_id": 101,
}
TINY_EDGES = (16, 32)


class VideoScoreNetwork(nn.Module):
    """Frames [B,F,3,H,W] and tokens [B,L] with their mask to the five scores [B,5].

    Args:
        config: of transformers' `Idefics2Config`.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        from transformers import Idefics2Config, Idefics2Model

        super().__init__()
        self.model: Any = Idefics2Model(Idefics2Config(**config))
        self.score = nn.Linear(self.model.config.text_config.hidden_size, len(DIMENSIONS))
        self.image_token = int(self.model.config.image_token_id)
        self.image_length = int(self.model.config.perceiver_config.resampler_n_latents)

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        dtype, patch = self.score.weight.dtype, int(self.model.config.vision_config.patch_size)
        images = pixels.flatten(0, 1).to(dtype)
        whole = torch.ones(
            len(images), images.shape[-2] // patch, images.shape[-1] // patch, dtype=torch.bool, device=images.device
        )
        seen = self.model.vision_model(pixel_values=images, patch_attention_mask=whole).last_hidden_state
        seen = self.model.connector(seen, attention_mask=whole.flatten(1))
        embedded = self.model.text_model.get_input_embeddings()(tokens)
        embedded = embedded.masked_scatter((tokens == self.image_token)[..., None], seen.to(embedded.dtype))
        states = self.model.text_model(inputs_embeds=embedded, attention_mask=mask, use_cache=False).last_hidden_state
        last = states[torch.arange(len(states), device=states.device), mask.sum(1) - 1]
        return at_least_float32(self.score(last))


class VideoScoreReward:
    """Mean of VideoScore's dimensions, or one of them.

    Args:
        network: the network.
        tokenizer: the network's.
        query: the text the network is asked, with `{text_prompt}` where the prompt goes.
        dimension: one of DIMENSIONS; None: their mean.
        edges: shortest and longest side of a frame as the network sees it, pixels.
        max_frames: more frames than these are thinned out evenly: 16, or 48 for the release v1.1.
        frames: frame policy.
        chunk_size: videos the network sees at a time; None: all.

    Raises:
        ValueError: an unknown dimension.
    """

    differentiable = True
    range = (-math.inf, math.inf)

    def __init__(
        self,
        network: VideoScoreNetwork,
        tokenizer: Any,
        *,
        query: str,
        dimension: str | None = None,
        edges: tuple[int, int] = _EDGES,
        max_frames: int = MAX_FRAMES,
        frames: FramePolicy = "all",
        chunk_size: int | None = None,
    ) -> None:
        if dimension is not None and dimension not in DIMENSIONS:
            raise ValueError(f"dimension={dimension!r}: expected one of {list(DIMENSIONS)}, or None for their mean")
        self.network, self.tokenizer, self.query, self.edges = network, tokenizer, query, edges
        self.dimension, self.max_frames, self.frames, self.chunk_size = dimension, max_frames, frames, chunk_size
        self.name = NAME if dimension is None else f"{NAME}:{dimension}"

    def _text(self, prompt: str, num_frames: int) -> str:
        picture = f"{_EDGE}{_IMAGE * self.network.image_length}{_EDGE}"
        # Neighbours keep both edge tokens: there is a space between pictures.
        return fill(self.query, prompt.replace(_IMAGE, "").replace(_EDGE, "")) + f"{picture} " * num_frames

    def scores(self, video: Tensor, prompts: list[str]) -> Tensor:
        """All dimensions, [B,5], in the order of DIMENSIONS."""
        check_inputs(video, prompts, self.name)
        if video.shape[1] > self.max_frames:
            video = video[:, thinned(video.shape[1], self.max_frames)]
        tokens, mask = encode(self.tokenizer, [self._text(p, video.shape[1]) for p in prompts], video.device)
        return in_chunks(self._network, video, tokens, mask, size=self.chunk_size)

    def _network(self, video: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        frames = resize(video.flatten(0, 1), *fit(video.shape[-2], video.shape[-1], self.edges), "bilinear")
        return self.network(normalise(frames, _HALF, _HALF).unflatten(0, video.shape[:2]), tokens, mask)

    def score_parts(self, video: Tensor, prompts: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """The score [B], and every dimension's, {"VideoScore:visual": [B], ...}."""
        every = self.scores(video, prompts)
        score = every.mean(1) if self.dimension is None else every[:, DIMENSIONS.index(self.dimension)]
        return score, {f"{NAME}:{name}": every[:, i] for i, name in enumerate(DIMENSIONS)}

    def __call__(self, video: Tensor, prompts: list[str]) -> Tensor:
        return self.score_parts(video, prompts)[0]


def thinned(num_frames: int, most: int) -> list[int]:
    """Frames 0, N/M, 2N/M, ... rounded down, of N frames for M places, as the release takes them."""
    return [i * num_frames // most for i in range(most)]


def fit(height: int, width: int, edges: tuple[int, int]) -> tuple[int, int]:
    """Size of a frame for Idefics2: the long side at most `edges[1]`, then every side at least `edges[0]`.

    The second step bends small frames, as transformers' image processor does.
    """
    shortest, longest = edges
    if max(height, width) > longest:
        if width >= height:
            height, width = int(height * longest / width), longest
        else:
            height, width = longest, int(width * longest / height)
    return max(height, shortest), max(width, shortest)


def build_videoscore(context: RewardContext) -> VideoScoreReward:
    """VideoScore (hub TIGER-Lab/VideoScore), or one of its dimensions, `context.dimension`.

    Reads config.json, tokenizer.json, README.md (for the query) and the weights with their index.
    """
    context = published(context)
    frames: FramePolicy = "all"
    if context.num_frames is not None and context.num_frames > MAX_FRAMES:
        frames = thinned(context.num_frames, MAX_FRAMES)
    options: dict[str, Any] = {"dimension": context.dimension, "frames": frames}
    if context.weights == "random":
        warn_random(NAME)
        tiny = context.scale == "tiny"
        with seeded(context.seed), default_dtype(context.dtype):
            network = VideoScoreNetwork(TINY if tiny else FULL)
        tokenizer = letter_tokenizer([_EDGE, _IMAGE])
        network.image_token = token_id(tokenizer, _IMAGE, "the tokenizer of letters")
        options |= {"edges": TINY_EDGES} if tiny else {}
        return VideoScoreReward(frozen_vlm(network, context), tokenizer, query=PLAIN_QUERY, **options)
    found = find_files(context, NAME, _REPOSITORY, ["config.json", "tokenizer.json", "README.md", _INDEX])
    config_file, tokenizer_file, readme, index = found
    find_files(context, NAME, _REPOSITORY, shard_files(index))
    tokenizer = read_tokenizer(tokenizer_file, [_EDGE, _IMAGE])
    config = {k: v for k, v in read_json(config_file).items() if k in (*FULL, "image_token_id")}
    try:
        with seeded(context.seed), default_dtype(context.dtype):
            network = empty(lambda: VideoScoreNetwork(config))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise CorruptWeightsError(f"{config_file} does not describe an Idefics2 ({error}); fetch it again") from error
    if token_id(tokenizer, _IMAGE, tokenizer_file) != network.image_token:
        raise CorruptWeightsError(
            f"{tokenizer_file} numbers {_IMAGE} other than {config_file} does ({network.image_token}); fetch both again"
        )
    load_strictly(network, read_shards(index), index)
    return VideoScoreReward(frozen_vlm(network, context), tokenizer, query=read_query(readme, _QUERY), **options)
