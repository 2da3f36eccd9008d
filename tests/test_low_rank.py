"""LoRA in bfloat16: the numbers of PEFT's layers but for rounding, and fewer copies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from benchmarks.shapes import Shapes
from vdm_env.models.low_rank import LeanLora, lean


def adapted(dtype: torch.dtype, device: str = "cpu", **options: Any) -> Any:
    """Two layers with an adapter that is not zero; its weights are float32."""
    torch.manual_seed(0)
    network = nn.ModuleDict({"q": nn.Linear(64, 96), "k": nn.Linear(64, 32)}).to(device, dtype).requires_grad_(False)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q", "k"], **options)
    inject_adapter_in_model(config, network, adapter_name="one")
    for name, parameter in network.named_parameters():
        if "lora" in name:
            parameter.data = (0.1 * torch.randn(parameter.shape)).to(device)
    return network


def results(network: Any, x: Tensor) -> list[Tensor]:
    """Outputs, and gradients of input and adapters."""
    x = x.clone().requires_grad_()
    outputs = [network["q"](x), network["k"](x)]
    trained = [p for p in network.parameters() if p.requires_grad]
    return [*outputs, *torch.autograd.grad(sum(y.float().square().sum() for y in outputs), [x, *trained])]


def test_numbers_are_those_of_peft_but_for_rounding() -> None:
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))
    exact = results(adapted(torch.float32), x)
    network = adapted(torch.bfloat16)
    names = [name for name, _ in network.named_parameters()]
    theirs = results(network, x.bfloat16())
    ours = results(lean(network), x.bfloat16())
    assert type(network["q"]) is LeanLora and [name for name, _ in network.named_parameters()] == names
    for mine, other, true in zip(ours, theirs, exact, strict=True):
        assert mine.dtype == other.dtype and mine.shape == other.shape
        size = float(true.detach().abs().max())
        error, allowed = (float((one - true).detach().abs().max()) for one in (mine, other))
        assert error < max(2e-2 * size, 2 * allowed)
        assert not torch.equal(mine, true)


def test_other_precisions_and_adapters_are_peft_s() -> None:
    x = torch.randn(3, 64)
    for network, given in (
        (adapted(torch.float32), x),
        (adapted(torch.float16), x.half()),  # its small gradients would be zeros
        (adapted(torch.bfloat16, use_dora=True), x.bfloat16()),
        (adapted(torch.bfloat16, lora_bias=True), x.bfloat16()),
    ):
        wanted = results(network, given)
        assert all(torch.equal(a, b) for a, b in zip(results(lean(network), given), wanted, strict=True))
    network = lean(adapted(torch.bfloat16))
    network["q"].enable_adapters(False)
    assert torch.equal(network["q"](x.bfloat16()), network["q"].base_layer(x.bfloat16()))


@pytest.mark.parametrize("grad", [False, True])
def test_less_is_kept_and_moved(grad: bool) -> None:
    found = []
    for switch in (lambda network: network, lean):
        with Shapes() as shapes:
            network = switch(adapted(torch.bfloat16, "meta"))
            x = torch.zeros(4096, 64, device="meta", dtype=torch.bfloat16)
            before, shapes.operations = shapes.memory.now, []
            with torch.set_grad_enabled(grad):
                outputs = [network[name](x) for name in ("q", "k")]
            found.append((shapes.memory.now - before, sum(one.bytes for one in shapes.operations)))
            del outputs
    (kept, moved), (kept_lean, moved_lean) = found
    assert moved_lean < 0.4 * moved
    assert kept_lean < 0.6 * kept if grad else kept_lean == kept
