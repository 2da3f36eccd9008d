"""Fused element-wise work is the plain expressions but for rounding, with and without gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.shapes import Shapes
from vdm_env.models.fused import plus_product, turned
from vdm_env.models.stdit3 import Block, HeadNorm, STDiT3Config, modulated, rotate

ROUNDING = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_a_sum_of_products_is_rounded_once(dtype: torch.dtype) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    base, x = numbers(2, 5, 8, seed=0, dtype=dtype), numbers(2, 5, 8, seed=1, dtype=dtype)
    factor = numbers(2, 1, 8, seed=2, dtype=wide)
    got = plus_product(base, x, factor, dtype)
    want = base.double() + x.double() * factor.double()
    assert got.dtype == dtype
    size = want.abs() if dtype.itemsize == 2 else base.double().abs() + (want - base.double()).abs()
    assert ((got.double() - want).abs() <= ROUNDING[dtype] * size + 1e-9 * (dtype.itemsize == 2)).all()
    free = [one.clone().requires_grad_() for one in (base, x, factor)]
    tracked = plus_product(*free, dtype)
    assert tracked.dtype == dtype and torch.equal(tracked, got), "the same bits with and without gradients"
    gradients = torch.autograd.grad(tracked.double().sum(), free)
    ones = torch.ones(2, 5, 8).double()
    for gradient, one, wanted in zip(
        gradients, free, (ones, ones * factor.double(), x.double().sum(1, keepdim=True)), strict=True
    ):
        assert gradient.dtype == one.dtype
        torch.testing.assert_close(
            gradient.double(), wanted, rtol=2 * ROUNDING[dtype], atol=1e-5 if wide != torch.float64 else 1e-13
        )


def test_the_widest_type_is_the_result_without_another_and_transforms_pass() -> None:
    x, factor = numbers(4, 3, 8, seed=0, dtype=torch.bfloat16), numbers(1, 8, seed=1)
    assert plus_product(x, x, factor).dtype == torch.float32
    want = plus_product(x, x, factor, torch.bfloat16)
    mapped = torch.func.vmap(lambda one: plus_product(one, one, factor, torch.bfloat16))(x)
    out, tangent = torch.func.jvp(lambda one: plus_product(one, one, factor, torch.bfloat16), (x,), (x,))
    assert torch.equal(mapped, want) and torch.equal(out, want)
    torch.testing.assert_close(tangent, want)  # it is linear in x


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_pairs_turn_by_their_angles(dtype: torch.dtype) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    x, angles = numbers(3, 2, 5, 8, seed=0, dtype=dtype), numbers(5, 4, seed=1, dtype=wide)
    got = turned(x.transpose(1, 2).contiguous().transpose(1, 2), torch.polar(torch.ones_like(angles), angles))
    even, odd = x.double().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.double().cos(), angles.double().sin()
    want = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])


def rotated_plainly(x: Tensor, angles: Tensor) -> Tensor:
    even, odd = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).to(x.dtype)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_the_parts_of_stdit3_are_their_formulas(dtype: torch.dtype) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    norm = HeadNorm(8).to(dtype)
    norm.weight.data = 1 + 0.2 * numbers(8, seed=3, dtype=dtype)
    x, angles = numbers(2, 5, 3, 8, seed=0, dtype=dtype).transpose(1, 2), numbers(5, 4, seed=1, dtype=wide)
    shift, scale = numbers(2, 1, 1, 8, seed=4, dtype=dtype), numbers(2, 1, 1, 8, seed=5, dtype=dtype)
    exact = x.double()
    pairs = [
        (rotate(x, angles), rotated_plainly(exact, angles.double())),
        (norm(x), norm.weight.double() * exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-6)),
        (modulated(x, shift, scale), functional.layer_norm(exact, (8,), eps=1e-6) * (1 + scale).double() + shift),
    ]
    for got, want in pairs:
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=4 * ROUNDING[dtype], atol=8 * ROUNDING[dtype])


def test_a_block_of_stdit3_moves_fewer_bytes_than_its_formulas() -> None:
    """Counted on shapes, in half precision: bytes for a number of the tokens."""
    config = STDiT3Config(hidden_size=64, num_heads=2, depth=1)

    def moved(call: Callable[[], Tensor], shapes: Shapes) -> float:
        shapes.operations = []
        with torch.no_grad():
            call()
        return sum(one.bytes for one in shapes.operations) / (8 * 256 * 64)

    with Shapes() as shapes:
        x = torch.zeros(1, 8, 256, 64, device="meta", dtype=torch.bfloat16)
        heads = x.view(256, 8, 2, 32).transpose(1, 2)
        norm, angles = HeadNorm(32).to("meta", torch.bfloat16), torch.zeros(8, 16, device="meta")
        block = Block(config, temporal=True).to("meta", torch.bfloat16)
        time = torch.zeros(1, 1, 6, 64, device="meta", dtype=torch.bfloat16)
        ours = [moved(lambda: rotate(heads, angles), shapes), moved(lambda: norm(heads), shapes)]
        of_norm = moved(lambda: norm.weight * (heads.float() * heads.float().square().rsqrt()).to(x.dtype), shapes)
        plainly = [moved(lambda: rotated_plainly(heads, angles), shapes), of_norm]
        block(x, x[:, 0, :4], None, time, angles)
        names = [one.name for one in shapes.operations or [] if one.bytes >= 2 * x.numel()]
    assert ours[0] < 0.5 * plainly[0] and ours[1] < 0.3 * plainly[1]
    assert names.count("aten.addcmul.out") + names.count("aten.addcmul.default") == 4, "two modulations, two gates"
