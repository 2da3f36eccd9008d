"""V-JEPA 2 for the consistency reward of `jepa.py`, on transformers' `VJEPA2Model`.

Called plainly, that model leaks: its encoder attends over all tokens of the video, and only afterwards drops those to
be predicted, so that what is seen already knows what is hidden. Here the encoder's layers run on the visible tokens
alone. Context and target share one encoder; the release has no other.

Source: Assran et al. 2025, arXiv:2506.09985.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vdm_env.rewards.jepa import JepaReward, gather_tokens
from vdm_env.rewards.loading import (
    RewardContext,
    find_files,
    frozen,
    load_transformers,
    published,
    seeded,
    warn_random,
)

NAME = "VJEPA2"
_REPOSITORY = "facebook/vjepa2-vitl-fpc64-256"
_DEFAULT_FRAMES = 16


class VJepa2(nn.Module):
    """A transformers `VJEPA2Model` as a `JepaNetwork`.

    Args:
        model: the network.
        num_frames: frames of a clip, a multiple of the tubelet; its rotary positions fit any number. None: the model's.
        leak: the published behaviour: what is seen comes from an encoder that saw everything.

    Raises:
        ValueError: num_frames does not fit.
    """

    def __init__(self, model: Any, *, num_frames: int | None = None, leak: bool = False) -> None:
        super().__init__()
        config = model.config
        frames = int(config.frames_per_clip) if num_frames is None else num_frames
        if frames < config.tubelet_size or frames % config.tubelet_size:
            raise ValueError(f"num_frames={frames}: expected a positive multiple of {config.tubelet_size}")
        rows = int(config.crop_size) // int(config.patch_size)
        self.model: Any = model
        self.side, self.num_frames, self.leak = int(config.crop_size), frames, leak
        self.grid = (frames // int(config.tubelet_size), rows, rows)

    def features(self, pixels: Tensor) -> Tensor:
        return self.model.encoder(pixels).last_hidden_state

    def context(self, pixels: Tensor, seen: Tensor) -> Tensor:
        """Features [B,K,D] of the tokens `seen`."""
        if self.leak:
            return gather_tokens(self.features(pixels), seen)
        encoder = self.model.encoder
        x = gather_tokens(encoder.embeddings(pixels), seen)
        for layer in encoder.layer:
            x = layer(x, position_mask=seen)[0]
        return encoder.layernorm(x)

    def predict(self, pixels: Tensor, seen: Tensor, predicted: Tensor, index: int) -> Tensor:
        context = self.context(pixels, seen)
        # The predictor picks the context out of a full set of tokens; what it does not pick is left empty.
        full = context.new_zeros(len(context), self.grid[0] * self.grid[1] * self.grid[2], context.shape[-1])
        full = full.scatter(1, seen[..., None].expand_as(context), context)
        return self.model.predictor(full, [seen], [predicted]).last_hidden_state


def build_vjepa2(context: RewardContext) -> JepaReward:
    """V-JEPA 2 ViT-L (hub facebook/vjepa2-vitl-fpc64-256), 256 pixels.

    As many frames as the videos have, at most 64; 16 if that is not known.
    """
    from transformers import VJEPA2Config, VJEPA2Model

    context = published(context)
    if context.weights == "pretrained":
        path = find_files(context, NAME, _REPOSITORY, ["config.json", "model.safetensors"])[0]
        model = load_transformers(VJEPA2Model, path.parent)
    else:
        warn_random(NAME)
        tiny: dict[str, Any] = {"crop_size": 32, "patch_size": 8, "frames_per_clip": 8, "hidden_size": 32}
        tiny |= {"num_attention_heads": 2, "num_hidden_layers": 2, "pred_hidden_size": 32}
        tiny |= {"pred_num_attention_heads": 2, "pred_num_hidden_layers": 2, "pred_num_mask_tokens": 2}
        with seeded(context.seed):
            model = VJEPA2Model(VJEPA2Config(**(tiny if context.scale == "tiny" else {})))
            nn.init.normal_(model.predictor.embeddings.mask_tokens, std=0.02)
    tubelet, most = int(model.config.tubelet_size), int(model.config.frames_per_clip)
    wanted = min(most, _DEFAULT_FRAMES if context.num_frames is None else context.num_frames)
    frames = max(tubelet, wanted // tubelet * tubelet)
    return JepaReward(VJepa2(frozen(model, context), num_frames=frames), name=NAME)
