"""Counts of full-size networks that are made of shapes alone."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from benchmarks.model_sizes import COLUMNS, SizesConfig, main, measure, operations, parameters
from vdm_env.models import MODELS
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


def _counts(name: str, device: str) -> tuple[int, int]:
    with pytest.warns(UserWarning, match="random weights"):
        model: Any = load_model(name, weights="random", scale="tiny", device=device)
    spec = model.spec
    prompt = "" if spec.conditioned_on == "image" else "a long prompt that fills all tokens there are"
    count = operations(model, (spec.num_frames, spec.height, spec.width), prompt)
    return parameters([model.denoiser]), count


@pytest.mark.parametrize("name", ["ModelScope", "SVD", "Mochi", "Wan2.2_A14B", "CogVideoX5B", "HunyuanVideo"])
def test_shapes_without_numbers_count_as_numbers_do(name: str) -> None:
    counts = [_counts(name, device) for device in ("cpu", "meta")]
    assert counts[0] == counts[1] and counts[0][1] > 0


def test_one_of_two_experts_is_counted(tmp_path: Path) -> None:
    path, size = tmp_path / "new" / "sizes.csv", ["--num-frames", "5", "--height", "64", "--width", "64"]
    assert main(["--models", "Wan2.2_A14B", "Wan2.1_14B", *size, "--out", str(path)]) == 0
    with path.open(encoding="utf-8", newline="") as file:
        experts, one = csv.DictReader(file)
    assert tuple(one) == COLUMNS
    assert experts["tflop_per_step"] == one["tflop_per_step"] and float(one["tflop_per_step"]) > 0
    assert int(experts["denoiser_parameters"]) == 2 * int(one["denoiser_parameters"])


def test_a_network_that_looks_at_numbers_has_its_parameters_and_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = MODELS["ModelScope"]

    def load(**options: Any) -> Any:
        model: Any = entry.load(**options | {"scale": "tiny"})
        return replace(model, call=lambda denoiser, x, t, condition: x * float(t[0]))

    monkeypatch.setitem(MODELS, "Looking", entry._replace(load=load))
    row = measure("Looking", SizesConfig())
    assert str(row["note"]).startswith("operations not counted") and "tflop_per_step" not in row
    assert cast(int, row["denoiser_parameters"]) > 0


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
