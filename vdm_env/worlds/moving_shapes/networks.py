"""The small networks of MovingShapes: ordinary diffusers and transformers classes at toy widths, untrained.

`pretrain.py` trains them and stores them as ordinary folders; the adapters that load VideoCrafter2 or Wan load these.
"""

from __future__ import annotations

from diffusers import AutoencoderKL, UNet3DConditionModel, WanTransformer3DModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from vdm_env.worlds.moving_shapes.render import COLOURS, DIRECTIONS, NUM_FRAMES, SHAPES, SIZE_PX

MAX_TOKENS = 8
TEXT_WIDTH = 64


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; the caption's five words between a start and an end token."""
    words = ["a", "moving", *COLOURS, *SHAPES, *DIRECTIONS]
    special = ["<pad>", "<unk>", "<start>", "<end>"]
    vocabulary = {word: i for i, word in enumerate([*special, *words])}
    core = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = Whitespace()
    ends = [("<start>", vocabulary["<start>"]), ("<end>", vocabulary["<end>"])]
    core.post_processor = TemplateProcessing(single="<start> $A <end>", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<start>",
        eos_token="<end>",
        model_max_length=MAX_TOKENS,
    )


def build_text_encoder(tokenizer: PreTrainedTokenizerFast) -> CLIPTextModel:
    """Two layers of 64 over the tokenizer's words."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=TEXT_WIDTH,
            hidden_act="gelu",
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def build_vae() -> AutoencoderKL:
    """Per-frame autoencoder, 32x32x3 to 8x8x4."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIZE_PX,
        mid_block_add_attention=False,
    )


def build_flow_transformer() -> WanTransformer3DModel:
    """Wan's architecture with 5 layers of 4 heads, 2x2 patches: 128 tokens a video."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        text_dim=TEXT_WIDTH,
        freq_dim=64,
        ffn_dim=256,
        num_layers=5,
        cross_attn_norm=True,
        rope_max_seq_len=2 * NUM_FRAMES,
    )


def build_unet() -> UNet3DConditionModel:
    """Attention at the coarse level only: it keeps a guided step at about 10 ms a video on two CPU cores."""
    unet = UNet3DConditionModel(
        sample_size=SIZE_PX // 4,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock3D", "CrossAttnDownBlock3D"),
        up_block_types=("CrossAttnUpBlock3D", "UpBlock3D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    for module in unet.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # the hard-wired dropout of the temporal layers slows learning at this size
    return unet
