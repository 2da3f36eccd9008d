"""The curves of a report: rewards against costs, and one measurement against another. Needs no torch.

A `Plate` is a figure that is not drawn yet: it is drawn at two sizes, and carries the numbers behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks import charts, plots
from benchmarks.conditions import device_name, reward_name
from benchmarks.palette import Look, looks
from benchmarks.plots import Line
from benchmarks.records import DIVERSITY, GOLD, HELDOUT, KL, MOTION, PROXY, Run, by_algorithm
from benchmarks.summary import Summary
from benchmarks.thresholds import Threshold

Size = tuple[float, float]


@dataclass(frozen=True, eq=False)
class Plate:
    """One figure of the report; `draw` makes it at a size, `header` and `rows` are the numbers behind it."""

    name: str
    title: str
    text: str
    draw: Callable[[Size], Figure]
    header: Sequence[str]
    rows: Sequence[Sequence[object]]


@dataclass(frozen=True, eq=False)
class View:
    """The runs of one environment, and what every figure of them shares."""

    runs: Sequence[Run]
    summaries: Sequence[Summary]
    threshold: Threshold | None = None

    @cached_property
    def groups(self) -> dict[str, list[Run]]:
        """Runs by algorithm."""
        return by_algorithm(self.runs)

    @cached_property
    def looks(self) -> Mapping[str, Look]:
        """Colours and line styles, the same in every figure."""
        return looks(self.groups)

    @cached_property
    def names(self) -> list[str]:
        """Everything that was evaluated in any run."""
        return list(dict.fromkeys(name for run in self.runs for name in run.rewards()))

    @property
    def device(self) -> str:
        return device_name(self.runs[0])

    @property
    def reward(self) -> str:
        return reward_name(self.runs[0])

    @property
    def hours(self) -> str:
        """The label of an axis of hours; on short runs with what one of its ticks is in seconds."""
        short = max(run.device_s() for run in self.runs) < 1800
        return f"{self.device}-hours of training" + (" (0.01 h = 36 s)" if short else "")

    @property
    def spread(self) -> str:
        """What a figure says about its bands."""
        few = {name: len(group) for name, group in self.groups.items() if len(group) < 3}
        text = "Thin: seeds. Thick: their mean, with a 95 % t-band from three seeds on."
        if len(few) < len(self.groups):
            return text + (f" {', '.join(few)}: fewer than 3 seeds, no interval." if few else "")
        return f"n = {'/'.join(map(str, sorted(set(few.values()))))} per algorithm, no interval."

    def line(self, algo: str, curve: Callable[[Run], tuple[np.ndarray, np.ndarray]]) -> Line | None:
        """An algorithm's runs as curves; None where no run has one."""
        drawn = [(run, *curve(run)) for run in self.groups[algo]]
        full = [(run, x, y) for run, x, y in drawn if len(x) and np.isfinite(y).any()]
        if not full:
            return None
        failed = [run.status == "FAILED" or run.diverged() for run, _, _ in full]
        return Line(algo, [(x, y) for _, x, y in full], failed, self.looks[algo])

    def lines(self, curve: Callable[[Run], tuple[np.ndarray, np.ndarray]]) -> list[Line]:
        """`line` of every algorithm that has one."""
        return [line for algo in self.groups if (line := self.line(algo, curve))]

    def cost_lines(self, reward: str, x: str = "device_s", scale: float = 1.0) -> list[Line]:
        """Curves of a reward against a cost."""

        def curve(run: Run) -> tuple[np.ndarray, np.ndarray]:
            cost, value = run.curve(reward, x)
            return cost * scale, value

        return self.lines(curve)

    def base(self, reward: str) -> float | None:
        """The untrained model's mean; None where it was not measured."""
        starts = [run.mean(reward, 0) for run in self.runs]
        finite = [value for value in starts if np.isfinite(value)]
        return float(np.mean(finite)) if finite else None


def evaluations(view: View, columns: Mapping[str, Callable[[Run, int], Any]]) -> list[list[object]]:
    """One row per run and evaluation: algorithm, seed, update and the given columns."""
    return [
        [run.algo, run.seed, update, *(value(run, update) for value in columns.values())]
        for run in view.runs
        for update in run.updates()
    ]


def _table(view: View, costs: Sequence[str], rewards: Sequence[str]) -> tuple[list[str], list[list[object]]]:
    columns: dict[str, Callable[[Run, int], Any]] = {name: partial(_cost, x=name) for name in costs}
    columns |= {name: partial(_mean, reward=name) for name in rewards}
    return ["algorithm", "seed", "update", *columns], evaluations(view, columns)


def _cost(run: Run, update: int, *, x: str) -> float | None:
    return run.cost(update, x)


def _mean(run: Run, update: int, *, reward: str) -> float:
    return run.mean(reward, update)


def curve_plates(view: View) -> Iterator[Plate]:
    """The figures of curves that these runs allow, the most important one first."""
    split = view.runs[0].split
    rewards = [name for name in (PROXY, GOLD) if name in view.names]
    header, rows = _table(view, ("device_s", "reward_queries"), rewards)
    yield Plate(
        "reward_vs_hours", f"Reward against {view.device}-hours",
        f"{view.reward} on fixed {split} prompts and noise, against {view.device}-hours of rollout, reward and update. "
        f"{view.spread}{_crosses(view)}",
        partial(_draw, view.cost_lines(PROXY, scale=1 / 3600), view.hours, "reward", view.base(PROXY), False),
        header, rows,
    )  # fmt: skip
    yield Plate(
        "reward_vs_queries", "Reward against reward queries",
        "The same evaluations over the number of videos the reward model has scored in training.",
        partial(_draw, view.cost_lines(PROXY, "reward_queries"), "reward queries", "reward", view.base(PROXY), True),
        header, rows,
    )  # fmt: skip
    for name, what in (("flops", "training"), ("denoiser_flops", "the denoiser in training")):
        lines = view.cost_lines(PROXY, name, 1e-12)
        if lines:
            yield Plate(
                "reward_vs_flops", "Reward against computation",
                f"The same evaluations over the floating-point operations of {what}, which no hardware changes.",
                partial(_draw, lines, "training computation (TFLOP)", "reward", view.base(PROXY), False),
                *_table(view, (name,), (PROXY,)),
            )  # fmt: skip
            break
    yield from _planes(view)
    yield from _beside(view)


def _crosses(view: View) -> str:
    broken = [run for run in view.runs if run.status == "FAILED" or run.diverged()]
    return " A cross marks the last value of a run that failed or diverged." if broken else ""


def _draw(lines: Sequence[Line], x_label: str, y_label: str, base: float | None, log_x: bool, size: Size) -> Figure:
    return plots.curves(lines, x_label=x_label, y_label=y_label, base=base, log_x=log_x, size=size)


def _planes(view: View) -> Iterator[Plate]:
    """Gold score, KL and diversity beside the reward."""
    if GOLD in view.names:
        text = (
            "The optimised reward against what is truly wanted, from the untrained model (open circle) to the end "
            "(filled; small dots are seeds). To the right and down is over-optimisation."
        )
        labels = ("reward (optimised)", "gold score (never optimised)")
        yield _plane(view, "gold_vs_proxy", "Gold score against reward", text, (PROXY, GOLD), labels)
    if KL in view.names:
        text = (
            "How far the policy went from the untrained model for its reward: the sum over denoising steps and "
            "elements of KL(policy || untrained model), in nats, on the evaluated trajectories."
        )
        if view.runs[0].task.get("noise_level") == 0:
            text += " Only steps with noise have a KL."
        labels = ("KL to the untrained model (nats)", "reward")
        yield _plane(view, "reward_vs_kl", "Reward against KL", text, (KL, PROXY), labels, log_x=True)
    if DIVERSITY in view.names:
        features = view.runs[0].task.get("diversity_features")
        text = (
            "Diversity is the mean pairwise 1 - cosine between the videos of one prompt from different noise"
            f"{f', by the features of {features}' if features else ''}. To the left and up, reward was paid for with "
            "sameness."
        )
        yield _plane(
            view, "reward_vs_diversity", "Reward against diversity", text, (DIVERSITY, PROXY), ("diversity", "reward")
        )


def _plane(
    view: View, name: str, title: str, text: str, names: tuple[str, str], labels: tuple[str, str], log_x: bool = False
) -> Plate:
    def curve(run: Run) -> tuple[np.ndarray, np.ndarray]:
        both = [(run.mean(names[0], update), run.mean(names[1], update)) for update in run.updates()]
        finite = [pair for pair in both if np.isfinite(pair).all()]
        return tuple(np.array(finite, float).reshape(-1, 2).T)  # type: ignore[return-value]

    lines = view.lines(curve)
    header, rows = _table(view, ("device_s",), names)

    def draw(size: Size) -> Figure:
        return plots.plane(lines, x_label=labels[0], y_label=labels[1], log_x=log_x, size=size)

    return Plate(name, title, text, draw, header, rows if lines else [])


def _beside(view: View) -> Iterator[Plate]:
    """What is measured beside the optimised reward: held-out rewards, the gap to training prompts, motion."""
    heldout = [name for name in view.names if name.startswith(HELDOUT) and view.base(name) is not None]
    if heldout:
        panels = {name.removeprefix(HELDOUT): view.cost_lines(name, scale=1 / 3600) for name in heldout}
        base = {name.removeprefix(HELDOUT): view.base(name) or 0.0 for name in heldout}
        yield Plate(
            "heldout_rewards", "Held-out rewards",
            "Rewards that no algorithm optimised, on the same videos; dashed is the untrained model. Higher is better.",
            lambda size: charts.multiples(panels, x_label=f"{view.device}-hours of training", base=base, size=size),
            *_table(view, ("device_s",), heldout),
        )  # fmt: skip
    for split in dict.fromkeys(split for run in view.runs for split in run.further):
        yield from _gap(view, split)
    if MOTION in view.names:
        yield Plate(
            "motion_vs_hours", "Motion",
            "Motion of the evaluated videos. A reward that rises while motion falls is paid for with still pictures.",
            partial(_draw, view.cost_lines(MOTION, scale=1 / 3600), view.hours, "motion", view.base(MOTION), False),
            *_table(view, ("device_s",), (MOTION,)),
        )  # fmt: skip


def _gap(view: View, split: str) -> Iterator[Plate]:
    main = view.runs[0].split

    def gap(run: Run, update: int) -> float:
        gains = [run.mean(PROXY, update, part) - run.mean(PROXY, 0, part) for part in (split, main)]
        return gains[0] - gains[1]

    def curve(run: Run) -> tuple[np.ndarray, np.ndarray]:
        cost, _ = run.curve(PROXY, split=split)
        at = [update for update in run.updates() if run.rows(PROXY, update, split)]
        return cost / 3600, np.array([gap(run, update) for update in at], float)

    lines = view.lines(curve)
    if lines:
        columns: dict[str, Callable[[Run, int], Any]] = {
            "device_s": lambda run, update: run.cost(update),
            f"proxy_{main}": lambda run, update: run.mean(PROXY, update),
            f"proxy_{split}": lambda run, update: run.mean(PROXY, update, split),
            "gap": gap,
        }
        yield Plate(
            f"gap_{split}_{main}", f"Gap between {split} and {main} prompts",
            f"Gain of the reward on {split} prompts minus its gain on {main} prompts; above 0 is what does not carry "
            "over to new prompts.",
            partial(_draw, lines, view.hours, "gap of gains", None, False),
            ["algorithm", "seed", "update", *columns], evaluations(view, columns),
        )  # fmt: skip
