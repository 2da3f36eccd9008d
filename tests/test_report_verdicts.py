"""What a report says about a hypothesis, a threshold, several environments and runs that went wrong."""

from __future__ import annotations

import csv
import html
import json
import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks import page
from benchmarks.answer import answer
from benchmarks.experiments import EXPERIMENTS
from benchmarks.overview import matrix, table
from benchmarks.pooled import pool
from benchmarks.records import by_task, check_comparable, read_plan, read_run, read_runs
from benchmarks.report import make_view, write_report
from benchmarks.summary import common_cost, mean_height, summarise, update_at
from benchmarks.tables import change_rows, curve_rows, pair_rows
from benchmarks.thresholds import default_threshold, given_threshold, show_times, times
from benchmarks.verdicts import judge
from tests.synthetic_runs import write_benchmark, write_run

HYPOTHESIS = "Gradients tell more than scores: vader ends above ddpo."


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five algorithms with everything a log can hold; one seed failed, one diverged, one is not finished."""
    root = tmp_path_factory.mktemp("runs") / "bench"
    for index, name in enumerate(("vader", "ddpo", "rwr", "my own algorithm K=2", "refl")):
        for seed in range(3):
            write_run(
                root, name, seed=seed, gain=0.4 - 0.1 * index + 0.01 * seed, gold=-0.2, full=True,
                queries=40 * (1 + index), alarms=("kl",) if index == 1 else (),
                nan_from=15 if (index, seed) == (2, 2) else None,
                status="UNFINISHED" if (index, seed) == (3, 1) else "DONE",
            ) if (index, seed) != (4, 1) else write_run(
                root, name, seed=1, end=15.0, evaluations=2, full=True, status="FAILED"
            )  # fmt: skip
    write_benchmark(
        root, ["vader", "ddpo"], question="Which?", hypothesis=HYPOTHESIS, tuning="Eight learning rates each.",
        expected_ahead=[["vader", "ddpo"], ["rwr", "vader"], ["vader", "absent"]], limits=["A limit of the plan."],
    )  # fmt: skip
    section = page.Section("More", [page.Text("A section of one's own.")])
    write_report(root, [section])
    return root


def test_a_report_says_what_was_planned_and_what_came_of_it(full: Path) -> None:
    for name in ("report.html", "report.md"):
        text = (full / name).read_text()
        for said in (
            "Which?", HYPOTHESIS, "1 confirmed, 1 refuted, 1 not decided", "no run of absent",
            "Eight learning rates each.", "A limit of the plan.", "A section of one",
            "refl, seed 1 is failed", "it stays in at its last value",
            "rwr, seed 2 diverged", "kl x3", "Held-out rewards", "Reward against KL", "Reward against diversity",
            "Gap between train and test prompts", "Motion", "Reward against computation", "Time to a threshold",
        ):  # fmt: skip
            assert said in text, (name, said)
    text = (full / "report.md").read_text()
    order = ("Which?", "Measured by", "## Hypothesis", "## Reward against CPU-hours", "## Results", "## Pairs",
             "## Reward against reward queries", "## More", "## Set-up", "## Limits", "## Commands")  # fmt: skip
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    names = {path.stem for path in (full / "figures").glob("*.svg")}
    assert {path.stem for path in (full / "figures").glob("*.csv")} == names == {
        path.stem for path in (full / "figures").glob("*.png")
    }  # fmt: skip
    assert {path.name for path in full.glob("*.csv")} == {"curves.csv", "changes.csv", "pairs.csv", "table.csv"}


def test_no_number_is_of_another_split(full: Path) -> None:
    runs = read_runs(full)
    assert all(row["split"] == "test" for run in runs for row in run.evals)
    assert {split for run in runs for split in run.further} == {"train"}
    # Scores on train prompts are 100 higher in these runs.
    for rows in (curve_rows(runs), change_rows(runs), pair_rows(runs)):
        numbers = [v for row in rows for k, v in row.items() if k.startswith(("proxy", "difference")) and v is not None]
        assert numbers and all(math.isnan(v) or abs(v) < 2 for v in numbers)
    with (full / "figures" / "gap_train_test.csv").open() as file:
        last = [row for row in csv.DictReader(file) if row["algorithm"] == "vader" and row["update"] == "20"]
    assert float(last[0]["proxy_train"]) > 100 > 2 > float(last[0]["proxy_test"])
    assert float(last[0]["gap"]) == pytest.approx(0.5 * 0.4, abs=0.01)


def test_many_algorithms_make_a_short_answer_and_a_row_each(full: Path) -> None:
    view = make_view(read_runs(full))
    said = answer(view.summaries, "HPS")
    assert "the ranking at equal cost (60 device-seconds) is vader > ddpo" in said and len(said) < 700
    assert "over-optimisation (reward up, gold score down): " in said
    head, rows = table(view)
    assert head[0] == "algorithm" and len(rows) == 5 and rows[0][0] == "vader"
    failed = dict(zip(head, next(row for row in rows if row[0] == "refl"), strict=True))
    assert failed["ended"] == "done, failed" and failed["compared after update"] == "5 to 20"
    assert failed["reward, mean over the cost"] == "-"  # of a run that ended before, it is not known
    pairs = matrix(view)
    assert pairs is not None and [len(row) for row in pairs[1]] == [5] * 4
    assert pairs[1][0][1].startswith("**+0.0975 [") and pairs[1][1][1] == ""


def test_prompts_of_one_seed_rank_nobody(tmp_path: Path) -> None:
    for index, name in enumerate(("a", "b", "c", "d")):
        write_run(tmp_path, name, gain=0.5 - 0.1 * index, spread=1e-4)
    said = answer(make_view(read_runs(tmp_path)).summaries, "HPS")
    assert "too few seeds to decide" in said and "is a ~ b ~ c ~ d," in said
    pairs = matrix(make_view(read_runs(tmp_path)))
    assert pairs is not None and not any("**" in cell for row in pairs[1] for cell in row)


def test_verdicts_are_paired_over_seeds_at_equal_cost_on_both_axes(tmp_path: Path) -> None:
    for seed, noise in enumerate((-0.05, 0.0, 0.05)):
        # Seeds differ more than algorithms do: only pairing tells them apart.
        write_run(tmp_path, "vader", seed=seed, gain=0.4 + noise, queries=10, spread=1e-4)
        write_run(tmp_path, "ddpo", seed=seed, gain=0.38 + noise, queries=40, spread=1e-4)
    time, queries = judge(read_runs(tmp_path), [("vader", "ddpo")])
    assert (time.verdict, time.cost) == ("confirmed", 60.0)
    assert time.interval.centre == pytest.approx(0.02, abs=2e-3) and time.interval.n == 3
    # At the 40 queries that vader spent in all, ddpo has had one of its four evaluations.
    assert (queries.verdict, queries.cost) == ("confirmed", 40.0)
    assert queries.interval.centre == pytest.approx(0.4 - 0.38 / 4, abs=2e-3 + 0.05)
    assert {v.verdict for v in judge(read_runs(tmp_path), [("ddpo", "vader")])} == {"refuted"}


def test_one_seed_or_two_decide_nothing(tmp_path: Path) -> None:
    for seed in range(2):
        write_run(tmp_path, "vader", seed=seed, gain=0.9)
        write_run(tmp_path, "ddpo", seed=seed, gain=0.1)
        (verdict, _) = judge(read_runs(tmp_path), [("vader", "ddpo")])
        assert verdict.verdict == "not decided"
    assert "n = 2, no interval" in verdict.shown
    write_run(tmp_path, "refl", seed=7)
    (verdict, _) = judge(read_runs(tmp_path), [("vader", "refl")])
    assert (verdict.verdict, "share no seed" in verdict.shown) == ("not decided", True)


def test_a_failed_run_holds_nobody_back_and_stays_at_its_last_value(tmp_path: Path) -> None:
    write_run(tmp_path, "vader", seed=0, gain=0.4)
    failed = write_run(tmp_path, "vader", seed=1, gain=0.1, end=15.0, evaluations=2, status="FAILED")
    diverged = read_run(write_run(tmp_path, "vader", seed=2, gain=0.4, nan_from=10))
    runs = read_runs(tmp_path)
    assert common_cost(runs) == 60.0
    assert update_at(read_run(failed), 60.0) == 5
    assert update_at(diverged, 60.0) == 5 and diverged.diverged()
    (summary,) = summarise(runs)
    assert summary.at == [20, 5, 5] and summary.status == "diverged, done, failed"
    assert summary.changes["proxy"].difference.centre == pytest.approx((0.4 + 0.1 + 0.1) / 3, abs=0.02)
    assert math.isnan(mean_height(summary).centre)


def test_the_threshold_is_half_of_the_best_gain_and_late_runs_are_censored(tmp_path: Path) -> None:
    for seed in range(3):
        write_run(tmp_path, "vader", seed=seed, gain=0.4, spread=1e-4)
        write_run(tmp_path, "ddpo", seed=seed, gain=0.1 if seed else 0.3, spread=1e-4)
    ddpo, vader = summarise(read_runs(tmp_path))
    threshold = default_threshold([ddpo, vader])
    assert threshold is not None
    change = vader.changes["proxy"]
    assert threshold.value == pytest.approx(change.before + change.difference.centre / 2)
    assert f"{threshold.value:.3g}" in threshold.rule
    reached = times(ddpo.runs, threshold)
    assert [one.censored for one in reached] == [False, True, True]
    assert show_times(reached) == "1 of 3 seeds, others > 60"
    assert show_times(times(vader.runs, given_threshold(change.before + 0.05))) == "15 [15, 15]"
    assert show_times(times(vader.runs, given_threshold(9.0))) == "> 60"
    write_run(tmp_path / "worse", "ddpo", gain=-0.1)
    assert default_threshold(summarise(read_runs(tmp_path / "worse"))) is None


def test_two_environments_get_sections_of_their_own_and_are_pooled(tmp_path: Path) -> None:
    for env_id in ("Flow-HPS", "UNet-HPS"):
        for seed in range(3):
            task = {"env_id": env_id, "model_id": env_id}
            write_run(tmp_path, "vader", seed=seed, gain=0.4, task=task, spread=1e-3)
            write_run(tmp_path, "ddpo", seed=seed, gain=0.2, task=task, spread=1e-3)
    runs = read_runs(tmp_path)
    check_comparable(runs)
    found = pool({env_id: summarise(group) for env_id, group in by_task(runs).items()})
    assert found is not None
    assert found.iqm["vader"].centre == pytest.approx(1, abs=0.01) and found.iqm["vader"].n == 6
    assert found.iqm["ddpo"].centre == pytest.approx(0.5, abs=0.01)
    assert (found.improvement["vader", "ddpo"].centre, found.improvement["ddpo", "vader"].centre) == (1, 0)
    assert pool({"Flow-HPS": summarise(by_task(runs)["Flow-HPS"])}) is None
    text = write_report(tmp_path).with_suffix(".md").read_text()
    for said in ("## All environments", "## Flow-HPS: Results", "## UNet-HPS: Results",
                 "figures/UNet-HPS_reward_vs_hours",
                 f"0 is the untrained model's {found.scales[0].base:.3g}"):  # fmt: skip
        assert said in text, said


def test_runs_of_two_devices_or_ways_of_counting_are_refused(tmp_path: Path) -> None:
    task = {"env_id": "Other-HPS"}
    write_run(tmp_path / "a", "vader")
    write_run(tmp_path / "a", "ddpo", task=task, about={"device": "cuda", "gpu_name": "NVIDIA H200"})
    with pytest.raises(ValueError, match="'device' differs"):
        check_comparable(read_runs(tmp_path / "a"))
    write_run(tmp_path / "b", "vader")
    write_run(tmp_path / "b", "ddpo", full=True, task={"eval_split": None})
    with pytest.raises(ValueError, match="CPU-seconds, older ones in wall seconds"):
        check_comparable(read_runs(tmp_path / "b"))
    write_run(tmp_path / "c" / "x", "vader")
    write_run(tmp_path / "c" / "y", "vader")
    with pytest.raises(ValueError, match="a seed counts once"):
        check_comparable(read_runs(tmp_path / "c"))


def test_arms_evaluated_as_they_were_trained_stand_apart(tmp_path: Path) -> None:
    for seed in range(3):
        write_run(tmp_path, "vader", seed=seed)
        write_run(tmp_path, "vader small", seed=seed, task={"height_px": 16})
    with pytest.raises(ValueError, match="'height_px' differs"):
        write_report(tmp_path)
    arms = [{"label": "vader"}, {"label": "vader small", "evaluate_as_trained": True}]
    write_benchmark(tmp_path, [], arms=arms)
    text = write_report(tmp_path).with_suffix(".md").read_text()
    assert "vader small (evaluated as it was trained): Results" in text and "All environments" not in text


def test_plans_of_two_benchmarks_are_not_mixed(tmp_path: Path) -> None:
    assert read_plan(tmp_path) == {}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_benchmark(tmp_path / name, ["vader"], hypothesis=name)
    assert read_plan(tmp_path / "a")["hypothesis"] == "a"
    with pytest.raises(ValueError, match="several benchmarks"):
        read_plan(tmp_path)
    (tmp_path / "a" / "benchmark.json").write_text("{")
    with pytest.raises(ValueError, match="broken"):
        read_plan(tmp_path / "a")


def test_paired_differences_on_disk_are_those_of_the_scores(tmp_path: Path) -> None:
    for seed in range(3):
        write_run(tmp_path, "vader", seed=seed)
        write_run(tmp_path, "ddpo", seed=seed, gain=0.1)
    runs = read_runs(tmp_path)
    (row, _) = pair_rows(runs)
    ends = {(run.algo, run.seed): run.mean("proxy", 20) for run in runs}
    expected = np.mean([ends["ddpo", seed] - ends["vader", seed] for seed in range(3)])
    assert (row["a"], row["b"], row["n"], row["axis"]) == ("ddpo", "vader", 3, "device_s")
    assert row["difference"] == pytest.approx(expected, abs=1e-5)
    assert json.dumps(row["low"]) != "NaN" and row["low"] < row["difference"] < row["high"]


def test_the_report_of_a_papers_experiment_sets_its_finding_beside_the_runs(tmp_path: Path) -> None:
    experiment = EXPERIMENTS["vader-efficiency"]
    root = tmp_path / "under-another-name"
    labels = [arm.label for arm in experiment.benchmark.arms]
    for label in labels:
        for seed in range(3):
            write_run(root, label, seed=seed, gain=(0.4 if label == "vader" else 0.1) + 0.01 * seed)
    write_benchmark(root, labels, experiment=experiment.name)
    write_report(root)
    for name in ("report.html", "report.md"):
        text = html.unescape((root / name).read_text())
        assert experiment.finding in text and "agrees" in text
    write_benchmark(root, labels)
    write_report(root)
    assert experiment.finding not in (root / "report.md").read_text()
