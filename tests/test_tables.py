"""Tables of runs against numbers worked out by hand."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from scipy import stats

from benchmarks.records import read_runs
from benchmarks.tables import algorithm_rows, markdown, write_tables
from tests.synthetic_runs import write_run


def test_a_row_is_the_mean_over_seeds_with_a_t_interval(tmp_path: Path) -> None:
    for seed, gain in enumerate((0.2, 0.3, 0.4)):
        write_run(tmp_path, "up", seed=seed, gain=gain)
    for seed, gain in enumerate((-0.3, 0.0, 0.3)):
        write_run(tmp_path, "unclear", seed=seed, gain=gain)
    for seed in range(2):
        write_run(tmp_path, "few", seed=seed, gain=0.1)
    rows = {row["algo"]: row for row in algorithm_rows(read_runs(tmp_path))}
    assert [rows[name]["verdict"] for name in ("up", "unclear", "few")] == ["up", "not decided", "no interval"]
    changes = [rows["up"][f"proxy_{key}"] for key in ("change", "low", "high")]
    spread = (changes[2] - changes[1]) / 2
    seeds = [run for run in read_runs(tmp_path) if run.algo == "up"]
    single = [run.curve("proxy")[1][-1] - run.curve("proxy")[1][0] for run in seeds]
    centre = sum(single) / 3
    deviation = (sum((value - centre) ** 2 for value in single) / 2) ** 0.5
    assert changes[0] == pytest.approx(centre, abs=1e-5)
    assert spread == pytest.approx(stats.t.ppf(0.975, 2) * deviation / 3**0.5, abs=2e-5)
    assert rows["up"]["gold_relative"] == pytest.approx(rows["up"]["gold_change"] / rows["up"]["gold_before"], abs=1e-4)


def test_a_run_that_did_not_end_is_counted_and_flagged(tmp_path: Path) -> None:
    for seed in range(3):
        write_run(tmp_path, "vader", seed=seed, gain=0.2, status="FAILED" if seed == 1 else "DONE")
    write_tables(tmp_path)
    with (tmp_path / "table.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["seeds"], row["unfinished"]) == ("3", "1")
    text = (tmp_path / "table.md").read_text()
    assert "3 (1 unfinished)" in text and text == markdown(algorithm_rows(read_runs(tmp_path)))
    with (tmp_path / "changes.csv").open() as file:
        assert [line["status"] for line in csv.DictReader(file)] == ["DONE", "FAILED", "DONE"]
