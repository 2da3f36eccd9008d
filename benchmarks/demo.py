"""Two algorithms on the small embedded video model, with the same budget, and a report.

    python -m benchmarks.demo --budget 60s --out runs/demo --seed 0

Reward back-propagation (VADER) against policy gradients (DDPO) on MovingShapes-HPS. Ctrl-C ends it with a report of
what was done.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.arguments import parse
from benchmarks.records import GOLD, PROXY, read_runs
from benchmarks.report import device_name, write_report
from benchmarks.summary import difference, explain_unit, show, show_interval, summarise, unmeasured

ENV_ID = "MovingShapes-HPS"
REWARD = f"{ENV_ID} (own small weights)"
# Half the model's steps and no guidance: a quarter of the cost of a video, and room above the base model's reward.
SAMPLING: dict[str, Any] = {"num_envs": 16, "num_steps": 5, "guidance_scale": 1.0}
ENV_OPTIONS: dict[str, dict[str, Any]] = {
    "vader": {**SAMPLING, "decode_frames": "random1"},  # the frame subsampling of the paper
    "ddpo": {**SAMPLING, "group_size": 8},  # its advantages compare videos of one prompt
}
LIMITS = (
    f"{REWARD}: the video model and the reward model were trained by this package on its own synthetic world. "
    "This is not HPSv2, and says nothing about how the algorithms rank on large models.",
    "Hyper-parameters are each algorithm's preset for this world; a demonstration is no tuned comparison.",
)
QUESTION = (
    "With the same computing time, does reward back-propagation (VADER) or a policy gradient (DDPO) raise the reward "
    "more, and does the true preference (gold score) follow?"
)
_NUM_PROMPTS, _NOISE_SEEDS, _NUM_VIDEOS = 16, (0, 1), 6


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """Train VADER and DDPO on the small embedded video model, and write a report."""

    budget: str = "60s"
    """device time of each algorithm for rollout, reward and update, such as 90s or 2min"""
    out: str = "runs/demo"
    """folder of the runs and the report; an earlier demo's runs in it are removed"""
    seed: int = 0
    """training seed"""


def train(
    name: str,
    *,
    out: Path,
    budget: str,
    seed: int,
    command: str,
    env_id: str = ENV_ID,
    split: str = "test",
    noise_seeds: Sequence[int] = _NOISE_SEEDS,
) -> Any:
    """Trains one algorithm ("vader" or "ddpo") on train prompts and evaluates it on `split`.

    Returns:
        The `algos.run.RunResult`; the run's folder is <out>/<algorithm>/<env_id>/seed_<n>.
    """
    started = time.perf_counter()
    import algos
    import vdm_env
    from algos.run import run_folder

    classes: dict[str, tuple[Any, Any]] = {
        "vader": (algos.VADER, algos.VADERConfig),
        "ddpo": (algos.DDPO, algos.DDPOConfig),
    }
    algorithm_class, config_class = classes[name]
    env = vdm_env.make(env_id, seed=seed, **ENV_OPTIONS[name])
    policy = env.make_policy(seed=seed)
    algorithm = algorithm_class(env, policy, replace(config_class.preset("MovingShapes"), seed=seed))
    held_out = env.derive(split=split, num_envs=16, group_size=1, decode_frames=None)
    prompt_ids = held_out.prompt_ids(split)
    every = max(1, len(prompt_ids) // _NUM_PROMPTS)  # spread over the split, whose neighbours resemble each other
    evaluator = algos.Evaluator(held_out, prompt_ids[::every][:_NUM_PROMPTS], noise_seeds, num_videos=_NUM_VIDEOS)
    return algos.run(
        algorithm,
        out=run_folder(out.parent, out.name, name, env_id, seed),
        budget=budget,
        evaluate=evaluator,
        seed=seed,
        task=_task(env, env_id, command),
        algo=name,
        env=env,
        policy=policy,
        setup_s=time.perf_counter() - started,
    )


def _task(env: Any, env_id: str, command: str) -> dict[str, Any]:
    frames, height, width = env.mdp.num_frames, env.mdp.height, env.mdp.width
    return {
        "env_id": env_id,
        "model_id": env_id.partition("-")[0],
        "reward_train": f"{env_id} (own small weights)",
        "num_frames": frames,
        "height_px": height,
        "width_px": width,
        "num_steps": env.num_steps,
        "sampler": env.mdp.sampler,
        "noise_level": env.mdp.noise_level,
        "guidance_scale": env.config.guidance_scale,
        "num_envs": env.num_envs,
        "group_size": env.group_size,
        "prompts_train_sha256": env.prompts.sha256("train"),
        "question": QUESTION,
        "limits": list(LIMITS),
        "command": command,
    }


def _clear(out: Path) -> None:
    """Removes an earlier demo's runs, and nothing else: their numbers must not enter this report."""
    for name in ENV_OPTIONS:
        for record in (out / name).glob("*/seed_*/run.json"):
            shutil.rmtree(record.parent)


def _command(config: DemoConfig) -> str:
    return f"python -m benchmarks.demo --budget {config.budget} --out {config.out} --seed {config.seed}"


def results(out: Path) -> list[str]:
    """What the runs in a folder found, as lines of text."""
    runs = read_runs(out)
    summaries = summarise(runs)
    seeds = ", ".join(sorted({str(run.seed) for run in runs}))
    lines = [f"{REWARD}, {device_name(runs[0])}, seed {seeds}, compared at {summaries[0].cost:.0f} device-s"]
    for summary in summaries:
        lines.append(
            f"{summary.algo} ({summary.status}, {summary.device_s:.0f} device-s, {summary.costs['update']:.0f} updates)"
        )
        for name, word in ((PROXY, "reward"), (GOLD, "gold  ")):
            change = summary.changes.get(name)
            if change is not None and max(summary.at) > 0:
                shown = show_interval(change.difference, change.unit)
                lines.append(f"  {word} {show(change.before)} -> {show(change.after)}   change {shown}")
        if max(summary.at) == 0:
            lines.append(f"  {unmeasured(summary)}")
    if all(max(summary.at) > 0 for summary in summaries):
        notes = dict.fromkeys(explain_unit(s.changes[PROXY].unit, s.changes[PROXY].difference) for s in summaries)
        lines.append(f"[low, high]: {'; '.join(notes)}")
        if len(summaries) == 2:
            interval, unit = difference(summaries[0], summaries[1])
            lines.append(f"reward, {summaries[0].algo} - {summaries[1].algo}: {show_interval(interval, unit)}")
    return lines


def demo(config: DemoConfig) -> int:
    """Runs the demo. Returns 0, 1 after an error, or 130 if it was interrupted (the report is written all the same)."""
    out = Path(config.out)
    interrupted = False
    try:
        from algos.run import seconds

        seconds(config.budget)  # a bad budget is refused before anything is removed
        _clear(out)
        for name in ENV_OPTIONS:
            print(f"{name}: setting up", flush=True)
            result = train(name, out=out, budget=config.budget, seed=config.seed, command=_command(config))
            if result.interrupted:
                interrupted = True
                break
    except KeyboardInterrupt:
        interrupted = True
    except (ValueError, OSError) as error:  # weights that are missing, a bad budget, a folder that cannot be written
        print(f"demo: {error}", file=sys.stderr)
        return 1
    try:
        report = write_report(out)
    except ValueError as error:
        print(f"demo: no report: {error}", file=sys.stderr)
        return 130 if interrupted else 1
    print("", *results(out), f"report: {report}", sep="\n")
    return 130 if interrupted else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of `python -m benchmarks.demo`."""
    return demo(parse(DemoConfig, arguments, "demo"))


if __name__ == "__main__":
    sys.exit(main())
