"""Scores of videos on fixed prompts and noise, before and after training, with intervals over prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from algos.evaluate import Evaluator
from benchmarks.aggregate import Interval, paired_difference, t_interval
from vdm_env.metrics.temporal import dynamic_degree, motion_smoothness, temporal_flicker

METRICS = {
    "metric/steadiness": (temporal_flicker, 2),
    "metric/smoothness": (motion_smoothness, 3),
    "metric/dynamics": (dynamic_degree, 2),
}
"""Metrics of the frames alone, and how many frames they need; see `vdm_env.metrics.temporal`."""
Scores = dict[str, dict[int, list[float | None]]]
"""{name: {prompt id: [a score for each noise seed]}}; None where it was not finite."""


def score(env: Any, policy: Any, prompt_ids: Sequence[int], seeds: Sequence[int], scorers: Mapping[str, Any]) -> Scores:
    """Samples each prompt from each seed and scores it.

    Args:
        env: without groups.
        policy: callable from observations to actions.
        prompt_ids: indices into `env.prompts`.
        seeds: video seeds.
        scorers: {name: environment with another reward}, which score the same videos, 8-bit as files hold them.

    Returns:
        "proxy" is the env's reward, "proxy/<part>" its parts, "gold" and "gold/<part>" the world's; see `METRICS`.
    """
    found: Scores = {}
    for seed in seeds:  # an evaluation keeps the videos of one seed
        evaluation = Evaluator(env, prompt_ids, [seed], num_videos=len(prompt_ids)).evaluate(policy)
        for row in evaluation.rows:
            found.setdefault(row["reward"], {}).setdefault(row["prompt_id"], []).append(row["value"])
        assert evaluation.videos is not None  # of every prompt
        for start in range(0, len(prompt_ids), env.num_envs):
            part = slice(start, start + env.num_envs)
            for name, values in _more(evaluation.videos[part], evaluation.prompts[part], seed, scorers).items():
                for prompt, value in zip(prompt_ids[part], values, strict=True):
                    found.setdefault(name, {}).setdefault(prompt, []).append(value if np.isfinite(value) else None)
    return found


@torch.no_grad()
def _more(videos: np.ndarray, prompts: list[str], seed: int, scorers: Mapping[str, Any]) -> dict[str, list[float]]:
    """Metrics and further rewards of some videos [B,F,H,W,3]."""
    video = torch.from_numpy(videos).permute(0, 1, 4, 2, 3).float() / 255
    found = {name: metric(video).tolist() for name, (metric, frames) in METRICS.items() if video.shape[1] >= frames}
    for name, scorer in scorers.items():
        chosen = scorer.mdp.frames_of(torch.full((len(video),), seed))
        seen = (
            video if chosen is None else torch.stack([one[frames] for one, frames in zip(video, chosen, strict=True)])
        )
        found[f"reward/{name}"] = scorer.mdp.score(seen.to(scorer.device), prompts).float().tolist()
    return found


def per_prompt(scores: Mapping[int, Sequence[float | None]]) -> dict[int, float]:
    """Mean over the seeds for each prompt whose scores were all finite."""
    return {
        prompt: float(np.mean([value for value in values if value is not None]))
        for prompt, values in scores.items()
        if None not in values
    }


def compare(before: Scores, after: Scores | None) -> dict[str, dict[str, Any]]:
    """For each score its means with intervals over prompts and, after training, the paired change.

    Raises:
        ValueError: a score that was finite on no prompt.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, values in before.items():
        means = per_prompt(values)
        if not means:
            raise ValueError(f"{name} was not finite on any prompt")
        found[name] = {"before": _plain(t_interval(list(means.values())))}
        if after is not None:
            trained = per_prompt(after[name])
            found[name]["after"] = _plain(t_interval(list(trained.values())))
            found[name]["change"] = _plain(paired_difference(trained, means)[0])
        missing = sum(
            value is None for part in (before, after or {}) for row in part.get(name, {}).values() for value in row
        )
        if missing:
            found[name]["not_finite"] = missing
    return found


def _plain(interval: Interval) -> dict[str, Any]:
    return {"mean": interval.centre, "low": interval.low, "high": interval.high, "prompts": interval.n}


def table(found: Mapping[str, Any]) -> str:
    """What `vdm-env eval` prints, at most 80 columns wide."""
    trained = found["trained"] is not None
    lines = [f"{found['env_id']}, {len(found['prompts'])} {found['split']} prompts x {len(found['noise_seeds'])} seeds"]
    head = ["before", "after", "change [low, high]"] if trained else ["mean [low, high]"]
    rows = [["score", *head]]
    for name, values in found["scores"].items():
        if trained:
            cells = [
                _show(values["before"]["mean"]),
                _show(values["after"]["mean"]),
                _with_interval(values["change"], "+"),
            ]
        else:
            cells = [_with_interval(values["before"], "")]
        rows.append([name, *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if found["random_weights"]:
        lines.append("random weights: this tests the code and says nothing about any model")
    return "\n".join([*lines, f"[low, high]: {found['interval']}"])


def _show(value: float) -> str:
    return f"{value:.4g}"


def _with_interval(values: Mapping[str, Any], sign: str) -> str:
    if values["low"] is None or np.isnan(values["low"]):
        return f"{values['mean']:{sign}.3g} (one prompt, no interval)"
    return f"{values['mean']:{sign}.3g} [{values['low']:{sign}.3g}, {values['high']:{sign}.3g}]"
