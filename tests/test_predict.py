"""Counting on shapes: memory against what torch's allocator says and against sums by hand, traffic, command line."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from algos.vader import VADER, VADERConfig
from benchmarks.options import PolicyOptions, ProcessOptions, make_env, make_policy
from benchmarks.predict import PredictConfig, add_row, main, row
from benchmarks.predict_run import Rates, add_up
from benchmarks.shapes import NUMBERS, Operation, Shapes
from benchmarks.shapes_rules import kind_of
from vdm_env.models.fast_path import plain

MIB = 2**20
TINY = ProcessOptions(
    device="meta",
    weights="random",
    dtype="float32",
    scale="tiny",
    num_frames=2,
    height=64,
    width=64,
    guidance_scale=3.0,
)


def allocated(call: Callable[[], Any]) -> int:
    """The most that torch's CPU allocator had handed out in a call, beside what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    events: Any = [one for one in found.profiler.kineto_results.events() if one.name() == "[memory]"]  # type: ignore[union-attr]
    now = peak = 0
    for one in sorted(events, key=lambda event: event.start_ns()):
        now += one.nbytes()
        peak = max(peak, now)
    return peak


def counted(shapes: Shapes, call: Callable[[], Any]) -> int:
    """The same, counted."""
    before = shapes.memory.now
    shapes.memory.forget_peaks()
    call()
    return max(shapes.memory.peaks.values()) - before


def test_a_linear_layer_by_hand() -> None:
    sizes = []
    with Shapes() as shapes:
        memory = shapes.memory
        weight = torch.zeros(512, 1024, device="meta").requires_grad_()
        x = torch.zeros(256, 1024, device="meta")
        sizes.append(memory.now)
        shapes.operations = []
        y = functional.linear(x, weight)
        sizes.append(memory.now)
        loss = y.square().sum()
        sizes.append(memory.now)
        loss.backward()
        sizes.append(memory.now)
        del y, loss
        sizes.append(memory.now)
    # Weights of 2 MiB and inputs of 1; then the output; a number takes a block of 512 bytes; the weights' gradient.
    assert sizes == [3 * MIB, 3.5 * MIB, 3.5 * MIB + 512, 5.5 * MIB + 512, 5 * MIB]
    assert memory.peaks["other"] == 4 * MIB + 512, "the square lies there until its sum is made"
    forward = next(one for one in shapes.operations if one.kind == "products")
    assert (forward.flops, forward.bytes) == (2 * 256 * 512 * 1024, int(3.5 * MIB))
    backward = [one for one in shapes.operations if one.phase == "backward" and one.kind == "products"]
    assert [one.flops for one in backward] == [forward.flops], "the input needs no gradient"


class Mixed(nn.Module):
    """A convolution, norms, products and a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.group = nn.Conv2d(8, 32, 3, padding=1), nn.GroupNorm(8, 32)
        self.norm, self.qkv, self.out = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.silu(self.group(self.convolution(x)))
        q, k, v = self.qkv(self.norm(x.flatten(2).transpose(1, 2))).chunk(3, -1)
        attended = torch.softmax(q @ k.transpose(1, 2) / 6, -1) @ v
        return self.out(attended).square().mean()


@pytest.mark.parametrize("recomputed", [False, True])
def test_peaks_are_those_of_the_allocator(recomputed: bool) -> None:
    def step(device: str) -> Callable[[], Any]:
        network, x = Mixed().to(device), torch.ones(4, 8, 24, 24, device=device, requires_grad=True)

        def call() -> None:
            loss = checkpoint(network, x, use_reentrant=False) if recomputed else network(x)
            loss.backward()

        call()  # gradients are there from here on
        return call

    measured = allocated(step("cpu"))
    with Shapes() as shapes:
        found = counted(shapes, step("meta"))
    assert found == pytest.approx(measured, rel=0.01) and measured > 10 * MIB


def _tiny(recomputing: bool) -> PredictConfig:
    policy = PolicyOptions(gradient_checkpointing=recomputing)
    return PredictConfig(env_id="ModelScope-HPS", process=TINY, policy=policy, plain=True, decode_frames="first")


def test_the_update_of_a_small_model_is_that_of_the_allocator() -> None:
    """The whole path: environment, policy, VADER, autoencoder, reward. Kernels of a CPU hold a little more or less."""
    config = _tiny(False)
    figures, found = row(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        env = make_env(config.env_id, replace(TINY, device="cpu", num_steps=2), num_envs=1, decode_frames="first")
        plain(env.model.denoiser)
        algorithm = VADER(env, make_policy(env, config.policy), VADERConfig(videos_per_update=1))
    algorithm.update()
    measured = allocated(algorithm.update)
    at_rest = sum(size for part, size in found.weights.items() if part != "text encoder") + found.trained
    assert found.peak - at_rest == pytest.approx(measured, rel=0.1)
    of_weights = sum(p.numel() * p.element_size() for p in env.model.denoiser.parameters())
    trained = sum(p.numel() * p.element_size() for p in algorithm.parameters)
    assert of_weights - trained <= found.weights["denoiser"] <= 1.5 * of_weights, "blocks of 512 bytes"
    assert found.calls == {"sampling": 1, "graph steps": 1}
    assert float(str(figures["peak_gib"])) == pytest.approx(found.peak / 2**30, abs=1e-3)


def test_recomputing_keeps_less() -> None:
    found, recomputed = (row(replace(_tiny(on), env_id="ModelScope-Brightness"))[1] for on in (False, True))
    assert recomputed.kept < 0.6 * found.kept and recomputed.peak < found.peak
    assert recomputed.step.tflop == found.step.tflop > 0


def test_small_tensors_keep_their_numbers() -> None:
    with Shapes():
        steps = torch.tensor([3, 1, 2], device="meta")
        assert (steps.sort().values + 1).tolist() == [2, 3, 4] and bool((steps > 0).all())
        assert steps[steps > 1].shape == (2,)
        steps[0] = 7
        assert int(steps.max()) == 7
        unknown = torch.zeros(NUMBERS + 1, device="meta")
        assert float(unknown.sum()) == 1.0 and bool(torch.isfinite(unknown).all())
        assert unknown.cpu().device.type == "meta", "a shape too: nobody has its numbers"
        with pytest.raises(RuntimeError, match="whole number .* shapes alone"):
            int(unknown.long().sum())


def test_what_operations_move() -> None:
    with Shapes() as shapes:
        x = torch.zeros(64, 32, device="meta", dtype=torch.bfloat16)  # 4 KiB
        wide = x[:1].expand(64, 32)
        picture = torch.zeros(2, 4, 8, 8, device="meta", dtype=torch.bfloat16)
        odd = torch.zeros(2, 8, 4, 8, device="meta", dtype=torch.bfloat16).transpose(1, 2)
        weight = torch.zeros(6, 4, 1, 1, device="meta", dtype=torch.bfloat16)

        def size(call: Callable[[], Any]) -> list[tuple[str, int, int]]:
            shapes.operations = []
            call()
            return [(one.kind, one.bytes, one.inside) for one in shapes.operations]

        assert size(lambda: x.view(32, 64)) == size(lambda: x.t()) == size(lambda: torch.empty_like(x)) == []
        assert size(lambda: x + x) == [("element-wise", 3 * 4096 - 4096, 0)]  # read once, though named twice
        assert size(lambda: x + wide) == [("element-wise", 2 * 4096 + 64, 0)]
        assert size(lambda: x.add_(1)) == [("element-wise", 2 * 4096, 0)]
        assert size(lambda: torch.add(x, x.float(), out=torch.empty_like(x)))[-1:] == [("element-wise", 4 * 4096, 0)]
        assert size(lambda: x.float()) == [("copies", 3 * 4096, 0)]
        assert size(lambda: x.t().contiguous()) == [("copies", 2 * 4096, 0)]
        assert size(lambda: x[torch.tensor([0, 5], device="meta")])[-1] == ("copies", 2 * 2 * 64, 0)
        wanted = 2 * (2 * 4 * 64 + 6 * 4 + 2 * 6 * 64)
        assert size(lambda: functional.conv2d(picture, weight)) == [("convolutions", wanted, 0)]
        assert shapes.operations[0].turned == 2 * wanted - 2 * 2 * 6 * 4  # a 1 x 1 weight lies in both ways
        assert size(lambda: functional.conv2d(odd, weight)) == [("convolutions", wanted, 2 * 2 * 2 * 4 * 64)]
        rows, gain = torch.zeros(64, 128, device="meta", dtype=torch.bfloat16), torch.zeros(128, device="meta")
        (normed,) = size(lambda: functional.rms_norm(rows, (128,), gain.bfloat16(), 1e-6))[1:]
        assert normed == ("norms", 2 * 2 * 64 * 128 + 2 * 128 + 2 * 4 * 64, 0), "a card has a kernel for it"
        assert len(size(lambda: functional.rms_norm(rows, (128,), gain, 1e-6))) > 4, "not for weights of another type"
        heads = torch.zeros(1, 2, 64, 64, device="meta", dtype=torch.bfloat16)
        (attended,) = size(lambda: functional.scaled_dot_product_attention(heads, heads, heads))
        assert attended[0] == "attention" and shapes.operations[0].flops == 2 * 2 * 2 * 64 * 64 * 64


def test_a_roofline_by_hand() -> None:
    def one(kind: str, flops: int, size: int, inside: int = 0) -> Operation:
        return Operation("sampling", kind, kind, flops, size, inside, 0, "here")

    some = [one("products", 4000, 10), one("products", 10, 80), one("convolutions", 100, 10, 40), one("copies", 0, 20)]
    found = add_up(some, Rates(flops=100.0, bytes=10.0, launch_s=3.0))
    assert found.seconds["products"] == 40 + 8 and found.seconds["convolutions"] == 1
    assert found.seconds["copies"] == 4 + 2 and found.launch_bound_s == 40 + 8 + 3 + 4 + 3
    assert found.kernels == 5 and sum(found.gb.values()) == pytest.approx(160e-9)
    assert found.copies_gb == {"here": pytest.approx(60e-9)}
    assert add_up(some, None).seconds == {} and add_up(some, None).tflop == found.tflop


def test_kinds() -> None:
    kinds = {"aten.addmm.default": "products", "aten.add.Tensor": "element-wise", "aten._to_copy.default": "copies"}
    kinds |= {"aten.native_group_norm_backward.default": "norms", "aten.convolution_backward.default": "convolutions"}
    assert {name: kind_of(name) for name in kinds} == kinds


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--env-id VideoCrafter3-HPS", "did you mean VideoCrafter2"),
        ("--batch 0", "--batch: expected at least 1"),
        ("--rate 790", "both --rate (TFLOP/s) and --bandwidth"),
        ("--rate -1 --bandwidth 1", "--rate must be a positive number"),
        ("--device cpu", "leave both options out"),
    ],
)
def test_wrong_arguments_are_one_line(given: str, message: str, tmp_path: Path, capsys: Any) -> None:
    assert main([*given.split(), "--out", str(tmp_path / "rows.csv")]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and message in said.err and not (tmp_path / "rows.csv").exists()


def test_rows_with_other_columns_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.csv"
    add_row(path, {"a": 1, "b": 2})
    add_row(path, {"a": 3, "c": 4})
    with path.open(encoding="utf-8", newline="") as file:
        assert list(csv.DictReader(file)) == [{"a": "1", "b": "2", "c": ""}, {"a": "3", "b": "", "c": "4"}]
