"""The papers' experiments as presets: that they exist and can be built, and that verdicts follow from the runs."""

from __future__ import annotations

import ast
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import page, plan
from benchmarks.experiments import EXPERIMENTS, section, sections
from benchmarks.experiments.claims import (
    Ahead,
    Alarmed,
    Claim,
    Close,
    Falls,
    Generalises,
    Keeps,
    LessMemory,
    Measure,
    Rises,
    Trend,
)
from benchmarks.experiments.judge import Verdict, judge
from benchmarks.records import Run

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks" / "experiments"
PROMISED = {
    "vader-efficiency": ("vader", "ddpo", "dpo"),
    "vader-efficiency-unet": ("vader", "ddpo", "dpo"),
    "vader-longer": ("vader", "ddpo on-policy", "dpo on-policy"),
    "vader-resolution": tuple(f"{algo} {size} px" for size in (24, 32, 40) for algo in ("vader", "ddpo")),
    "vader-truncation": ("K=1", "K=10"),
    "vader-generalisation": ("vader", "ddpo", "dpo"),
    "vader-other-rewards": ("on HPS", "on Aesthetic", "on Action"),
    "vader-memory": ("all weights", "LoRA", "mixed precision", "one frame", "truncated", "checkpoints", "offload"),
    "vader-diversity": ("vader", "ddpo", "dpo"),
    "online-vpo-candidates": ("N=2", "N=4", "N=6", "N=8"),
    "online-vpo-reference": ("K=4", "K=8", "K=16", "K=24", "never"),
    "online-vpo-quality": ("online_vpo", "dpo"),
    "videodpo-reweighting": ("weighted", "unweighted"),
    "videodpo-pairs": ("best_vs_worst", "best_vs_random", "all_pairs", "random"),
    "videodpo-candidates": ("N=2", "N=4", "N=8"),
    "hackable": ("vader",),
}
ARMS = [(name, arm) for name, experiment in EXPERIMENTS.items() for arm in experiment.benchmark.arms]


# ------------------------------------------------------------------------------------------------------------ presets


def test_every_experiment_of_the_papers_is_a_preset() -> None:
    assert {name: tuple(arm.label for arm in e.benchmark.arms) for name, e in EXPERIMENTS.items()} == PROMISED


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_preset_is_complete(name: str) -> None:
    experiment = EXPERIMENTS[name]
    plan.check(experiment.benchmark)
    labels = {arm.label for arm in experiment.benchmark.arms}
    assert experiment.benchmark.name == experiment.name == name
    assert experiment.claims and all(set(claim.labels) <= labels for claim in experiment.claims)
    assert experiment.finding.endswith(".") and experiment.benchmark.hypothesis and experiment.benchmark.question
    assert experiment.command.endswith(f"--preset {name}")
    assert len(experiment.benchmark.seeds) >= 3, "with fewer seeds nothing can be decided"
    assert experiment.cpu_minutes <= 10
    if experiment.paper:
        assert experiment.arxiv and experiment.deviation, "the embedded world is never the paper's"
    else:
        assert experiment.known == "ours"
    splits = {claim.measure.split for claim in experiment.claims} - {None}
    assert splits <= set(experiment.benchmark.splits)


def test_nothing_imports_torch_at_import() -> None:
    for path in FOLDER.glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            heavy = [n for n in names if n.split(".")[0] in ("torch", "vdm_env", "diffusers", "transformers", "peft")]
            assert not heavy, f"{path.name} imports {heavy}"
    modules = ", ".join(f"benchmarks.experiments.{path.stem}" for path in FOLDER.glob("*.py"))
    code = f"import sys, {modules}\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=FOLDER.parents[1], timeout=300).returncode == 0


# --------------------------------------------------------------------------------------------------- building the arms


@pytest.mark.parametrize(("name", "arm"), ARMS, ids=[f"{name}:{arm.label}" for name, arm in ARMS])
def test_every_arm_builds(name: str, arm: plan.Arm, tmp_path: Path) -> None:
    from benchmarks.arms import arm_settings
    from benchmarks.training import Setup, build

    benchmark = EXPERIMENTS[name].benchmark
    settings = arm_settings(benchmark, arm, 0, tmp_path)
    built = build(replace(arm, settings=settings), Setup.of(benchmark), 0)
    assert [one.split for one in built.evaluators] == list(benchmark.splits)
    if not isinstance(built.config, Mapping):  # a setting that is misspelt would be refused; one that is lost is seen
        known = {field.name for field in fields(built.config)}
        assert set(arm.settings) <= known
        assert {key: getattr(built.config, key) for key in arm.settings} == dict(arm.settings)
    size = (built.env.mdp.height, built.env.mdp.width)
    shown = built.evaluators[0].env.mdp
    assert size == ((arm.env["height"], arm.env["width"]) if "height" in arm.env else (32, 32))
    assert (shown.height, shown.width) == size if arm.evaluate_as_trained else (32, 32)
    assert built.env.group_size == arm.env.get("group_size", built.env.group_size)


def test_evaluations_score_what_the_benchmark_names_whatever_an_arm_optimises() -> None:
    from benchmarks.training import Setup, build

    benchmark = EXPERIMENTS["vader-other-rewards"].benchmark
    for arm in benchmark.arms:
        built = build(arm, Setup.of(benchmark), 0)
        assert built.env.mdp.reward.name == arm.label.removeprefix("on ")
        shown = built.evaluators[0].env
        obs, _ = shown.reset(seed=0)
        parts = shown.mdp.outcome(obs["latents"], obs["prompt_id"], obs["video_seed"]).parts
        assert set(parts) == {"HPS", "Aesthetic", "Action"}


# ---------------------------------------------------------------------------------------------------- what is counted


def test_kept_bytes_are_counted_once_each_and_let_go() -> None:
    import torch

    from benchmarks.experiments.saved_bytes import counting

    weight = torch.nn.Parameter(torch.ones(8, 8))
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    with counting([weight]) as ledger:
        y = x @ weight  # keeps x: 4 * 8 * 4 bytes; the weight does not count
        assert (ledger.now, ledger.peak) == (128, 128)
        z = y.square().sum()  # keeps y, as large
        assert ledger.now == 256
        (y[:2] * y[2:].detach()).sum()  # views of y: the same storage, and its graph is let go at once
        assert ledger.now == 256
        z.backward()
        assert ledger.now == 0
    assert ledger.peak == 256
    expected = torch.nn.Parameter(torch.ones(8, 8))
    (x @ expected).square().sum().backward()
    torch.testing.assert_close(weight.grad, expected.grad, rtol=0, atol=0)


def test_each_technique_saves_memory() -> None:
    from benchmarks.training import Setup, build

    experiment = EXPERIMENTS["vader-memory"]
    small = replace(experiment.benchmark, sampling={"num_envs": 1, "num_steps": 3, "guidance_scale": 1.0})
    needed = [build(arm, Setup.of(small), 0).algorithm.update()["training_mib"] for arm in small.arms]
    assert needed == sorted(needed, reverse=True) and len(set(needed)) == len(needed)
    assert needed[-1] < needed[0] / 10
    again = build(small.arms[0], Setup.of(small), 0).algorithm.update()
    assert again["training_mib"] == needed[0] == again["saved_mib"] + again["state_mib"]


def test_an_algorithm_is_watched_without_being_changed() -> None:
    import torch

    import algos
    import vdm_env
    from benchmarks.experiments.frechet import Watched

    def env() -> Any:
        return vdm_env.make("MovingShapes-HPS", num_envs=4, num_steps=2, guidance_scale=1.0, group_size=2, seed=0)

    settings = {"videos_per_update": 4, "optimiser_steps": 1}
    first = env()
    watched = Watched(first, first.make_policy(seed=0), "online_vpo", seed=0, **settings)
    row = watched.update()
    second = env()
    algorithm, config = algos.load("online_vpo")
    plain = algorithm(second, second.make_policy(seed=0), replace(config.preset("MovingShapes"), **settings, seed=0))
    assert {**plain.update(), "frechet": row["frechet"]} == row
    assert row["frechet"] > 0
    torch.testing.assert_close(watched.state_dict()["env"], plain.state_dict()["env"])
    with pytest.raises(ValueError, match="decode_frames='all'"):
        half = vdm_env.make("MovingShapes-HPS", num_envs=4, decode_frames="first", group_size=2)
        Watched(half, half.make_policy())


def test_rendered_videos_are_nearer_to_rendered_videos() -> None:
    import torch

    import vdm_env
    from algos.measures import default_features
    from benchmarks.experiments.frechet import rendered_videos
    from vdm_env.metrics.fvd import frechet_distance

    env = vdm_env.make("MovingShapes-HPS")
    features, captions = default_features(env), [env.prompts[i] for i in env.prompt_ids()]
    assert features is not None
    videos = rendered_videos(captions, 64)
    torch.testing.assert_close(videos[:8], rendered_videos(captions, 64)[:8], rtol=0, atol=0)
    noisy = (videos + 0.2 * torch.randn(videos.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    real = features(rendered_videos(captions, 96))
    assert frechet_distance(real, features(videos)) < frechet_distance(real, features(noisy)) / 2


# ----------------------------------------------------------------------------------------------------------- verdicts


def made(
    label: str,
    seed: int,
    proxy: Sequence[float],
    *,
    device_s: Sequence[float] | None = None,
    queries: Sequence[int] | None = None,
    more: Mapping[str, Sequence[float]] | None = None,
    train_split: Sequence[float] | None = None,
    train: Mapping[str, Sequence[float]] | None = None,
    status: str = "DONE",
    alarms: int = 0,
) -> Run:
    """A run with an evaluation every ten updates."""

    def rows(split: str, values: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
        return [
            {
                "split": split,
                "update": 10 * i,
                "device_s": device_s[i] if device_s else 10.0 * i,
                "reward_queries": queries[i] if queries else 100 * i,
                "reward": name,
                "prompt_id": 0,
                "noise_seed": 0,
                "value": value,
            }
            for name, curve in values.items()
            for i, value in enumerate(curve)
        ]

    columns = train or {}
    count = max((len(values) for values in columns.values()), default=0)
    return Run(
        folder=Path(label) / f"seed_{seed}",
        about={"algo": label, "seed": seed, "task": {"eval_split": "test"}},
        train=[{"update": i + 1, **{name: values[i] for name, values in columns.items()}} for i in range(count)],
        evals=rows("test", {"proxy": proxy, **(more or {})}),
        status=status,
        reason="",
        further={"train": rows("train", {"proxy": train_split})} if train_split else {},
        alarms=[{"update": 1, "alarm": "gold"}] * alarms,
    )


def word(claim: Claim, runs: Sequence[Run]) -> str:
    return judge([claim], runs).word


def pair(differences: Sequence[float]) -> list[Run]:
    """Runs of a and b with such differences in the last evaluation."""
    b = [made("b", seed, [0.1, 0.2 + 0.3 * seed]) for seed in range(len(differences))]
    a = [made("a", seed, [0.1, 0.2 + 0.3 * seed + d]) for seed, d in enumerate(differences)]
    return [*a, *b]


def test_a_claim_agrees_differs_or_is_not_decided() -> None:
    assert word(Ahead("a", "b"), pair([0.2, 0.25, 0.3])) == "agrees"
    assert word(Ahead("b", "a"), pair([0.2, 0.25, 0.3])) == "differs"
    assert word(Ahead("a", "b"), pair([0.1, 0.2, 0.3])) == "not decided"
    (outcome,) = judge([Ahead("a", "b")], pair([0.1, 0.2, 0.3])).outcomes
    assert outcome.interval is not None
    # s = 0.1, t(0.975, 2) = 4.302653: 0.2 -+ 4.302653 * 0.1 / sqrt(3)
    assert (outcome.interval.low, outcome.interval.high) == pytest.approx((-0.048414, 0.448414), abs=1e-6)
    assert outcome.values == pytest.approx({"a": 0.7, "b": 0.5}) and outcome.note == "n = 3"


def test_too_few_seeds_decide_nothing() -> None:
    (outcome,) = judge([Ahead("a", "b")], pair([0.2, 0.2])).outcomes
    assert outcome.word == "not decided" and outcome.note.startswith("n = 2, ")
    (outcome,) = judge([Ahead("a", "b")], [run for run in pair([1.0] * 5) if run.algo == "a"]).outcomes
    assert (outcome.word, outcome.interval, outcome.note) == ("not decided", None, "no finished run of b")
    assert "share no seed" in judge([Ahead("a", "b")], [made("a", 0, [0, 1]), made("b", 1, [0, 1])]).outcomes[0].note


def test_runs_that_are_not_done_do_not_count() -> None:
    runs = pair([0.2, 0.25, 0.3, -9.0])
    assert word(Ahead("a", "b"), runs) == "not decided"
    assert word(Ahead("a", "b"), [replace(r, status="INTERRUPTED") if r.seed == 3 else r for r in runs]) == "agrees"


def test_values_that_are_missing_are_left_out_and_said() -> None:
    runs = [*pair([0.2, 0.25, 0.3, 0.2]), made("a", 4, [0.1, math.nan]), made("b", 4, [0.1, 0.2])]
    (outcome,) = judge([Ahead("a", "b")], runs).outcomes
    assert outcome.word == "agrees" and outcome.note == "n = 4; seeds 4 have no value"
    (outcome,) = judge([Rises("a", Measure(name="gold", at="end"))], runs).outcomes
    assert outcome.word == "not decided" and "'gold'" in outcome.note


def test_costs_are_equal_before_values_are_compared() -> None:
    """a costs twice the time of b and a tenth of its queries."""
    grid = range(5)
    a = [
        made("a", s, [0.1 * i for i in grid], device_s=[20 * i for i in grid], queries=[10 * i for i in grid])
        for s in grid
    ]
    b = [
        made("b", s, [0.09 * i for i in grid], device_s=[10 * i for i in grid], queries=[100 * i for i in grid])
        for s in grid
    ]
    assert word(Ahead("a", "b", Measure(at="updates")), [*a, *b]) == "agrees"
    assert word(Ahead("b", "a", Measure(at="budget")), [*a, *b]) == "agrees"
    assert word(Ahead("a", "b", Measure(at="queries")), [*a, *b]) == "agrees"
    (outcome,) = judge([Ahead("b", "a", Measure(at="budget"))], [*a, *b]).outcomes
    assert outcome.values == pytest.approx({"a": 0.2, "b": 0.36})  # within 40 * 1.1 device-seconds
    (outcome,) = judge([Ahead("a", "b", Measure(at="queries"))], [*a, *b]).outcomes
    assert outcome.values == pytest.approx({"a": 0.4, "b": 0.0})  # within 40 queries


def test_close_needs_the_whole_interval_inside_the_margin() -> None:
    runs = pair([0.01, 0.0, -0.01])
    assert word(Close("a", "b", 0.05), runs) == "agrees"
    assert word(Close("a", "b", 0.02), runs) == "not decided"
    assert word(Close("a", "b", 0.2), pair([0.2, 0.25, 0.3])) == "not decided"
    assert word(Close("a", "b", 0.1), pair([0.24, 0.25, 0.26])) == "differs"


def test_trends() -> None:
    heights = {"x": 0.1, "y": 0.3, "z": 0.4}
    runs = [made(label, seed, [0, h + 0.01 * seed]) for label, h in heights.items() for seed in range(3)]
    assert word(Trend(("x", "y", "z")), runs) == "agrees"
    assert word(Trend(("z", "y", "x")), runs) == "differs"
    assert judge([Trend(("x", "y", "z"))], runs).outcomes[0].interval.centre == pytest.approx(0.15)  # type: ignore[union-attr]
    base = [made(label, seed, [0, 0.9 * h]) for label, h in (("u", 0.1), ("v", 0.3), ("w", 0.4)) for seed in range(3)]
    assert word(Trend(("x", "y", "z"), ("u", "v", "w")), [*runs, *base]) == "agrees"
    assert word(Trend(("u", "v", "w"), ("x", "y", "z")), [*runs, *base]) == "differs"
    with pytest.raises(ValueError, match="as many in minus"):
        Trend(("x", "y"), ("z",))


def test_changes_on_the_way() -> None:
    gold = [0.5, 0.7, 0.6, 0.4]
    runs = [made("a", s, [0.1, 0.2, 0.3, 0.4 + 0.01 * s], more={"gold": gold}, alarms=s) for s in range(3)]
    end = Measure(name="gold", at="end")
    assert word(Rises("a"), runs) == "agrees"
    assert word(Rises("a", end), runs) == "differs"
    assert word(Falls("a", end), runs) == "agrees"
    assert judge([Falls("a", end, from_half=True)], runs).outcomes[0].interval.centre == pytest.approx(0.3)  # type: ignore[union-attr]
    assert word(Keeps("a", 0.75, end), runs) == "agrees"
    assert word(Keeps("a", 0.85, end), runs) == "differs"
    assert word(Alarmed("a"), runs) == "not decided"
    assert word(Alarmed("a"), [replace(run, alarms=[{"update": 3, "alarm": "gold"}]) for run in runs]) == "agrees"
    assert word(Alarmed("a"), [replace(run, alarms=[{"alarm": "motion"}]) for run in runs]) == "differs"


def test_gains_on_other_prompts() -> None:
    runs = [made("a", s, [0.2, 0.5 + 0.01 * s], train_split=[0.3, 0.65 + 0.01 * s]) for s in range(4)]
    assert word(Generalises("a", 0.8), runs) == "agrees"
    assert word(Generalises("a", 1.0), runs) == "differs"
    train = Measure(split="train", at="end")
    assert judge([Ahead("a", "a", train)], runs).outcomes[0].values["a"] == pytest.approx(0.665)


def test_columns_of_the_training_log() -> None:
    """The mean over the last quarter of the updates counts, and a change is from the first one."""
    runs = [
        made("a", s, [0, 1], train={"training_mib": [9, 4, 4, 4], "frechet": [8, 6, 6, 6, 2, 2, 4, 4][:4]})
        for s in range(3)
    ]
    more = [made("b", s, [0, 1], train={"training_mib": [1, 1, 1, 5]}) for s in range(3)]
    assert word(LessMemory("a", "b"), [*runs, *more]) == "agrees"
    assert word(LessMemory("b", "a"), [*runs, *more]) == "differs"
    (outcome,) = judge([Falls("a", Measure(name="train/frechet", at="end"))], runs).outcomes
    assert outcome.word == "agrees" and outcome.interval is not None and outcome.interval.centre == 2.0


def test_the_word_for_all_claims() -> None:
    runs = pair([0.2, 0.25, 0.3])
    agrees, differs, open_ = Ahead("a", "b"), Ahead("b", "a"), Ahead("a", "c")
    assert judge([agrees], runs).word == "agrees"
    assert judge([agrees, open_], runs).word == "not decided"
    assert judge([agrees, differs, open_], runs).word == "differs"
    assert Verdict(outcomes=[]).word == "not decided"


def test_a_section_sets_the_finding_beside_our_numbers() -> None:
    experiment = EXPERIMENTS["vader-truncation"]
    runs = [made(label, s, [0.5, end + 0.01 * s]) for label, end in (("K=1", 0.6), ("K=10", 0.55)) for s in range(3)]
    found = section(experiment, runs)
    assert found.title == "vader-truncation: agrees"
    for text in (page.markdown("title", [], [found]), page.html_page("title", [], [found])):
        for part in (
            "5.648",
            "arXiv:2407.08737",
            "preprint Table 9",
            "agrees",
            "K=1 0.61",
            "n = 3",
            experiment.command,
        ):
            assert part in text
    empty = section(experiment, [])
    assert empty.title.endswith("not decided")
    assert "no finished run of K=1, K=10" in page.markdown("title", [], [empty])
    assert sections("vader-truncation", runs) == [found]
    assert sections("quick", runs) == []
