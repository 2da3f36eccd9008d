"""The table of a graphics card: cases are processes, those that are there stay, and one that fails stops no other."""

from __future__ import annotations

import csv
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import card
from benchmarks.arguments import parse
from benchmarks.card import CASES, CardConfig, command, main, table
from benchmarks.throughput import PROGRAM, ThroughputConfig, _arms
from benchmarks.throughput_rows import COLUMNS
from vdm_env.registry import parse_id

TINY = ["--device", "cpu", "--dtype", "float32", "--scale", "tiny", "--repeats", "1"]


@pytest.mark.parametrize("name", CASES)
def test_every_case_is_a_call_that_the_benchmark_of_speed_understands(name: str, tmp_path: Path) -> None:
    arguments = command(CASES[name], CardConfig(), tmp_path / "x.csv")
    config = parse(ThroughputConfig, arguments[3:], PROGRAM)
    assert parse_id(config.env_id) and [arm.algo for arm in _arms(config)] == list(CASES[name].algos)
    assert (config.process.num_frames, config.process.height, config.process.width) == CASES[name].size
    assert config.process.scale == "full" and config.process.weights == "random" and config.process.device == "cuda"


def test_a_case_is_measured_once(tmp_path: Path, capsys: Any) -> None:
    arguments = [*TINY, "--out", str(tmp_path), "--cases", "Wan2.1_1.3B"]
    assert main(arguments) == 0
    assert "Wan2.1_1.3B: measured" in capsys.readouterr().out
    file = tmp_path / "Wan2.1_1.3B.csv"
    rows = list(csv.DictReader(file.open(encoding="utf-8")))
    assert [row["what"] for row in rows] == ["matmul", "sampling"] and not any(row["error"] for row in rows)
    written = (tmp_path / "card.md").read_text(encoding="utf-8")
    assert rows[0]["device_name"] in written and "| Wan2.1_1.3B, " in written
    before = file.read_bytes()
    assert main(arguments) == 0
    assert "there already" in capsys.readouterr().out and file.read_bytes() == before


def test_a_case_that_fails_keeps_its_rows_and_stops_no_other(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(call: list[str], *, stdout: Any, timeout: float, **_: Any) -> subprocess.CompletedProcess[str]:
        out, model = Path(call[call.index("--out") + 1]), call[call.index("--env-id") + 1].partition("-")[0]
        figures = {"batch": 2, "videos": 2, "seconds": 3, "rollout_s": 2.5, "num_steps": 5, "tflop_per_s": 400.0}
        figures |= {"share": 0.5, "peak_allocated_gib": 7.25, "size": "1x2x3", "what": "sampling", "dtype": "bfloat16"}
        with out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerow(figures | {"device_name": "A card", "torch": "2.11"})
        if model == "ModelScope":
            raise subprocess.TimeoutExpired(call, timeout)
        stdout.write("what went wrong\n")
        return subprocess.CompletedProcess(call, int(model == "CogVideoX2B"))

    monkeypatch.setattr(card.subprocess, "run", run)
    arguments = [*TINY, "--out", str(tmp_path), "--cases", "ModelScope", "CogVideoX2B", "OpenSora1.2"]
    assert main(arguments) == 1
    said = capsys.readouterr().out
    assert "ModelScope: stopped after 10 minutes" in said and "CogVideoX2B: exit code 1: what went wrong" in said
    assert "OpenSora1.2: measured" in said
    names = sorted(path.name for path in tmp_path.glob("*.csv"))
    assert names == ["CogVideoX2B.part.csv", "ModelScope.part.csv", "OpenSora1.2.csv"]
    lines = table(tmp_path).splitlines()
    assert lines[0] == "Measured on: A card, bfloat16, torch 2.11. Random weights."
    assert "| ModelScope, 1x2x3, 5 steps | sampling | 2 | 1.5 | 0.5 | 400 | 50% | 7.2 | the case did not end |" in lines
    assert "| OpenSora1.2, 1x2x3, 5 steps | sampling | 2 | 1.5 | 0.5 | 400 | 50% | 7.2 |  |" in lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "ModelScop"], "unknown cases \\['ModelScop'\\]; known: VideoCrafter2"),
        (["--minutes", "0"], "--minutes and --repeats: above 0"),
    ],
)
def test_wrong_usage_is_refused(arguments: list[str], message: str, tmp_path: Path, capsys: Any) -> None:
    assert main([*TINY, "--out", str(tmp_path / "new"), *arguments]) == 2
    assert not (tmp_path / "new").exists()

    assert re.search(message, capsys.readouterr().err)


def test_a_machine_without_a_card_is_told_so(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["--out", str(tmp_path / "new")]) == 2
    assert "no CUDA device here" in capsys.readouterr().err and not (tmp_path / "new").exists()
