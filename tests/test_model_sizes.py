"""Counts of full-size networks that are made of shapes alone."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from algos.flops import count_flops
from benchmarks.model_sizes import COLUMNS, SizesConfig, main, measure
from vdm_env.registry import load_model


def test_videocrafter2_has_the_parameters_and_operations_that_were_measured_on_a_card() -> None:
    row = measure("VideoCrafter2", SizesConfig(num_frames=12, rate=790.0))
    assert row["latent_shape"] == "4x12x40x64" and row["passes_per_step"] == 2 and "note" not in row
    assert row["denoiser_parameters"] == 1_413_284_420 and row["denoiser_gib"] == pytest.approx(
        1.413284420e9 * 2 / 2**30, abs=0.01
    )
    assert row["tflop_per_step"] == pytest.approx(19.0, rel=0.015)  # one guided forward, counted on a GPU
    assert row["tflop_per_video"] == pytest.approx(50 * row["tflop_per_step"], rel=1e-3)
    assert row["shortest_s_per_step"] == pytest.approx(row["tflop_per_step"] / 790, abs=1e-4)


def _counts(device: str) -> tuple[int, int]:
    with pytest.warns(UserWarning, match="random weights"):
        model = load_model("ModelScope", weights="random", scale="tiny", device=device)
    x = torch.zeros(1, *model.latent_shape(4, 64, 64), device=device)
    condition, t = model.encode_prompts(["a cat"]), torch.full((1,), 500.0, device=device)
    assert {value.device.type for value in condition.values()} == {device}
    size = sum(parameter.numel() for parameter in model.denoiser.parameters())
    return size, count_flops(lambda: model.predict(x, t, condition))


def test_shapes_without_numbers_count_as_numbers_do() -> None:
    counts = [_counts(device) for device in ("cpu", "meta")]
    assert counts[0] == counts[1] and counts[0][1] > 0


def test_a_network_that_looks_at_numbers_has_its_parameters_and_a_note(tmp_path: Path) -> None:
    path = tmp_path / "new" / "sizes.csv"
    assert main(["--models", "Wan2.2_A14B", "Wan2.1_1.3B", "--num-frames", "5", "--out", str(path)]) == 0
    with path.open(encoding="utf-8", newline="") as file:
        experts, one = csv.DictReader(file)
    assert tuple(one) == COLUMNS
    assert experts["note"].startswith("operations not counted") and not experts["tflop_per_step"]
    assert int(experts["denoiser_parameters"]) > 28e9 and float(one["tflop_per_step"]) > 0 and not one["note"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--models VideoCrafter3", "did you mean VideoCrafter2"),
        ("--models VideoCrafter2 --num-frames 17", "num_frames=16"),
        ("--models VideoCrafter2 --rate -1", "--rate must be a positive number"),
        ("--modles", "--modles"),
    ],
)
def test_wrong_arguments_are_one_line(
    given: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "sizes.csv"
    try:
        code = main([*given.split(), "--out", str(path)])
    except SystemExit as stop:
        code = int(stop.code or 0)
    said = capsys.readouterr()
    assert code == 2 and said.err.count("\n") == 1 and message in said.err and not path.exists()
