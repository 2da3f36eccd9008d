"""Names and shapes of the tensors in an LVDM checkpoint (VideoCrafter2, T2V-Turbo), and where each of them goes.

LVDM's 3-D UNet is diffusers' `UNet3DConditionModel` in another order and under other names, plus a few small layers
around the time embedding ("conditioning" below); its autoencoder is `AutoencoderKL`, its text encoder transformers'
`CLIPTextModel` without the last layer. The tables here are generated from the architecture's sizes, so that small
networks convert by the same code as the release.

Order matters for the UNet: T2V-Turbo stores its LoRA as a list without names, in the order of LVDM's modules, which
is the order `unet_entries` returns. Source of names and order: state dicts of github.com/AILab-CVC/VideoCrafter,
commit 11bcd76.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL, UNet3DConditionModel
from transformers import CLIPTextModel

from vdm_env.models.lvdm_sizes import AutoencoderSizes, TextSizes, UNetSizes

Shape = tuple[int, ...]


class Entry(NamedTuple):
    """One tensor of the checkpoint and where it goes."""

    source: str
    """LVDM name, without the checkpoint's prefix of the part"""
    part: str
    """"unet", "conditioning", "vae" or "text_encoder"; "" for a tensor that has no use"""
    names: tuple[str, ...]
    """names there; with several, the tensor is cut along dimension 0 (attention's joint projection)"""
    shape: Shape
    """of the tensor in the checkpoint"""
    squeeze: int = 0
    """trailing dimensions of size 1 that fall away (a convolution of width 1 that is a linear layer there)"""


def _shapes(module: torch.nn.Module) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _pairs(parent: str, target: str, names: Mapping[str, str] | tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for name in names:
        yield f"{parent}.{name}", f"{target}.{names[name] if isinstance(names, Mapping) else name}"


_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_TEMPORAL_CONV = ("conv1.0", "conv1.2", "conv2.0", "conv2.3", "conv3.0", "conv3.3", "conv4.0", "conv4.3")
_ATTENTION = tuple(f"attn{n}.{layer}" for n in (1, 2) for layer in ("to_q", "to_k", "to_v", "to_out.0"))
_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
_BLOCK = tuple(
    f"transformer_blocks.0.{name}"
    for name in (*_ATTENTION[:4], *_FEED_FORWARD, *_ATTENTION[4:], "norm1", "norm2", "norm3")
)
_TRANSFORMER = ("norm", "proj_in", *_BLOCK, "proj_out")


def _layer(source: str, block: str, i: int, attends: bool) -> Iterator[tuple[str, str]]:
    """One residual block with its temporal convolution and, on some levels, spatial and temporal attention."""
    yield from _pairs(f"{source}.0", f"{block}.resnets.{i}", _RESNET)
    yield from _pairs(f"{source}.0.temopral_conv", f"{block}.temp_convs.{i}", _TEMPORAL_CONV)  # the release's spelling
    if attends:
        yield from _pairs(f"{source}.1", f"{block}.attentions.{i}", _TRANSFORMER)
        yield from _pairs(f"{source}.2", f"{block}.temp_attentions.{i}", _TRANSFORMER)


def _unet_modules(sizes: UNetSizes) -> Iterator[tuple[str, str]]:
    """(LVDM module, diffusers module) of everything behind the embeddings, in LVDM's order."""
    levels, blocks = len(sizes.channel_mult), sizes.num_res_blocks
    yield "input_blocks.0.0", "conv_in"
    source = 1
    for level in range(levels):
        for i in range(blocks):
            yield from _layer(f"input_blocks.{source}", f"down_blocks.{level}", i, sizes.attends(level))
            source += 1
        if level < levels - 1:
            yield f"input_blocks.{source}.0.op", f"down_blocks.{level}.downsamplers.0.conv"
            source += 1
    yield from _pairs("init_attn.0", "transformer_in", _TRANSFORMER)
    yield from _layer("middle_block", "mid_block", 0, attends=True)
    yield from _pairs("middle_block.3", "mid_block.resnets.1", _RESNET)
    yield from _pairs("middle_block.3.temopral_conv", "mid_block.temp_convs.1", _TEMPORAL_CONV)
    source = 0
    for up, level in enumerate(reversed(range(levels))):
        for i in range(blocks + 1):
            yield from _layer(f"output_blocks.{source}", f"up_blocks.{up}", i, sizes.attends(level))
            if level and i == blocks:
                place = 3 if sizes.attends(level) else 1
                yield f"output_blocks.{source}.{place}.conv", f"up_blocks.{up}.upsamplers.0.conv"
            source += 1
    yield from (("out.0", "conv_norm_out"), ("out.2", "conv_out"))


@cache
def unet_entries(sizes: UNetSizes) -> tuple[Entry, ...]:
    """The UNet's tensors in LVDM's order; its shapes come from diffusers' class itself, built without memory."""
    with torch.device("meta"):
        shapes = _shapes(UNet3DConditionModel(**sizes.diffusers()))
    width, hidden = sizes.model_channels, 4 * sizes.model_channels

    def entries(source: str, target: str) -> Iterator[Entry]:
        for kind in ("weight", "bias"):
            if (shape := shapes.pop(f"{target}.{kind}", None)) is not None:
                # LVDM's first temporal attention is projected by convolutions of width 1.
                squeeze = int(kind == "weight" and source in ("init_attn.0.proj_in", "init_attn.0.proj_out"))
                yield Entry(f"{source}.{kind}", "unet", (f"{target}.{kind}",), shape + (1,) * squeeze, squeeze)

    found = [*entries("time_embed.0", "time_embedding.linear_1"), *entries("time_embed.2", "time_embedding.linear_2")]
    for source, target, columns in (("0", "linear_1", width), ("2", "linear_2", hidden)):
        for kind, shape in (("weight", (hidden, columns)), ("bias", (hidden,))):
            found.append(
                Entry(f"fps_embedding.{source}.{kind}", "conditioning", (f"fps_embedding.{target}.{kind}",), shape)
            )
    extra: list[tuple[str, Shape]] = []
    if sizes.time_cond_proj_dim is not None:
        extra.append(("time_cond_proj.weight", (width, sizes.time_cond_proj_dim)))
    if sizes.motion_cond_proj_dim is not None:
        extra += [
            ("motion_cond_proj.weight", (width, sizes.motion_cond_proj_dim)),
            ("combine_proj.weight", (width, 2 * width)),
        ]
    found += [Entry(name, "conditioning", (name,), shape) for name, shape in extra]
    for source, target in _unet_modules(sizes):
        found += entries(source, target)
    if shapes:  # a diffusers release that changes the class must not go unnoticed
        raise RuntimeError(f"UNet3DConditionModel has tensors that LVDM's names do not cover: {sorted(shapes)[:4]}")
    return tuple(found)


_VAE_RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"nin_shortcut": "conv_shortcut"}
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def _vae_modules(sizes: AutoencoderSizes) -> Iterator[tuple[str, str]]:
    levels = len(sizes.ch_mult)
    for side in ("encoder", "decoder"):
        for name, target in (("conv_in", "conv_in"), ("norm_out", "conv_norm_out"), ("conv_out", "conv_out")):
            yield f"{side}.{name}", f"{side}.{target}"
        for block in (0, 1):
            yield from _pairs(f"{side}.mid.block_{block + 1}", f"{side}.mid_block.resnets.{block}", _VAE_RESNET)
        yield from _pairs(f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0", _VAE_ATTENTION)
    for level in range(levels):
        up = levels - 1 - level  # LVDM counts the decoder's levels from the finest
        for i in range(sizes.num_res_blocks):
            yield from _pairs(
                f"encoder.down.{level}.block.{i}", f"encoder.down_blocks.{level}.resnets.{i}", _VAE_RESNET
            )
        for i in range(sizes.num_res_blocks + 1):
            yield from _pairs(f"decoder.up.{level}.block.{i}", f"decoder.up_blocks.{up}.resnets.{i}", _VAE_RESNET)
        if level < levels - 1:
            yield f"encoder.down.{level}.downsample.conv", f"encoder.down_blocks.{level}.downsamplers.0.conv"
        if level:
            yield f"decoder.up.{level}.upsample.conv", f"decoder.up_blocks.{up}.upsamplers.0.conv"
    yield from (("quant_conv", "quant_conv"), ("post_quant_conv", "post_quant_conv"))


@cache
def vae_entries(sizes: AutoencoderSizes) -> tuple[Entry, ...]:
    """The autoencoder's tensors."""
    with torch.device("meta"):
        shapes = _shapes(AutoencoderKL(**sizes.diffusers()))
    found: list[Entry] = []
    for source, target in _vae_modules(sizes):
        for kind in ("weight", "bias"):
            if (shape := shapes.pop(f"{target}.{kind}", None)) is not None:
                squeeze = (
                    2 if kind == "weight" and ".attn_1." in source and len(shape) == 2 else 0
                )  # 1x1 convolutions there
                found.append(Entry(f"{source}.{kind}", "vae", (f"{target}.{kind}",), shape + (1,) * squeeze, squeeze))
    if shapes:
        raise RuntimeError(f"AutoencoderKL has tensors that LVDM's names do not cover: {sorted(shapes)[:4]}")
    return tuple(found)


_TEXT_LAYER = {
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


@cache
def text_entries(sizes: TextSizes) -> tuple[Entry, ...]:
    """The text tower's tensors; those of skipped layers and of the unused projection have no target."""
    with torch.device("meta"):
        shapes = _shapes(CLIPTextModel(sizes.transformers()))
    found = [
        Entry(
            "token_embedding.weight",
            "text_encoder",
            ("embeddings.token_embedding.weight",),
            (sizes.vocab_size, sizes.width),
        ),
        Entry(
            "positional_embedding",
            "text_encoder",
            ("embeddings.position_embedding.weight",),
            (sizes.context_length, sizes.width),
        ),
        Entry("text_projection", "", (), (sizes.width, sizes.embed_dim)),
        Entry("logit_scale", "", (), ()),
    ]
    used = sizes.layers - sizes.skipped_layers
    for layer in range(sizes.layers):
        source, target = f"transformer.resblocks.{layer}", f"encoder.layers.{layer}"
        alike = f"encoder.layers.{min(layer, used - 1)}"  # skipped layers have the shapes of the others
        part = "text_encoder" if layer < used else ""
        for kind, shape in (("weight", (3 * sizes.width, sizes.width)), ("bias", (3 * sizes.width,))):
            names = tuple(f"{target}.self_attn.{p}_proj.{kind}" for p in "qkv") if part else ()
            found.append(Entry(f"{source}.attn.in_proj_{kind}", part, names, shape))
        for name, goal in _TEXT_LAYER.items():
            for kind in ("weight", "bias"):
                names = (f"{target}.{goal}.{kind}",) if part else ()
                found.append(Entry(f"{source}.{name}.{kind}", part, names, shapes[f"{alike}.{goal}.{kind}"]))
    for kind in ("weight", "bias"):
        found.append(Entry(f"ln_final.{kind}", "text_encoder", (f"final_layer_norm.{kind}",), (sizes.width,)))
    left = set(shapes) - {name for entry in found for name in entry.names}
    if left:
        raise RuntimeError(f"CLIPTextModel has tensors that OpenCLIP's names do not cover: {sorted(left)[:4]}")
    return tuple(found)
