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
from benchmarks.summary import difference, explain_unit, show, show_interval, summarise

ENV_ID = "MovingShapes-HPS"
REWARD = f"{ENV_ID} (own small weights)"
# DDPO's advantages compare videos of one prompt, so its environment has groups.
ENV_OPTIONS: dict[str, dict[str, Any]] = {"vader": {"num_envs": 16}, "ddpo": {"num_envs": 16, "group_size": 8}}
LIMITS = (
    f"{REWARD}: the video model and the reward model were trained by this package on its own synthetic world. "
    "This is not HPSv2, and says nothing about how the algorithms rank on large models.",
    "Hyper-parameters are each algorithm's preset for this world; a demonstration is no tuned comparison.",
)
QUESTION = (
    "With the same computing time, does reward back-propagation (VADER) or a policy gradient (DDPO) raise the reward "
    "more, and does the true preference (gold score) follow?"
)
_NUM_PROMPTS, _NOISE_SEEDS, _NUM_VIDEOS, _EVALUATIONS = 16, (0, 1), 6, 6


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """Train VADER and DDPO on the small embedded video model, and write a report."""

    budget: str = "60s"
    """device time of each algorithm for rollout, reward and update, such as 90s or 2min"""
    out: str = "runs/demo"
    """folder of the runs and the report; an earlier demo's runs in it are removed"""
    seed: int = 0
    """training seed"""


def train(name: str, config: DemoConfig) -> Any:
    """Trains one algorithm ("vader" or "ddpo") and returns its `algos.run.RunResult`."""
    started = time.perf_counter()
    import algos
    import vdm_env
    from algos.run import run_folder, seconds

    classes: dict[str, tuple[Any, Any]] = {
        "vader": (algos.VADER, algos.VADERConfig),
        "ddpo": (algos.DDPO, algos.DDPOConfig),
    }
    algorithm_class, config_class = classes[name]
    env = vdm_env.make(ENV_ID, seed=config.seed, **ENV_OPTIONS[name])
    policy = env.make_policy()
    algorithm = algorithm_class(env, policy, replace(config_class.preset("MovingShapes"), seed=config.seed))
    test = env.derive(split="test", num_envs=16, group_size=1)
    prompt_ids = test.prompt_ids("test")
    every = max(1, len(prompt_ids) // _NUM_PROMPTS)  # spread over the split, whose neighbours resemble each other
    evaluator = algos.Evaluator(test, prompt_ids[::every][:_NUM_PROMPTS], _NOISE_SEEDS, num_videos=_NUM_VIDEOS)
    return algos.run(
        algorithm,
        out=run_folder(Path(config.out).parent, Path(config.out).name, name, ENV_ID, config.seed),
        budget=config.budget,
        evaluate=evaluator,
        eval_every=f"{seconds(config.budget) / _EVALUATIONS}s",
        seed=config.seed,
        task=_task(env, config),
        algo=name,
        env=env,
        policy=policy,
        setup_s=time.perf_counter() - started,
    )


def _task(env: Any, config: DemoConfig) -> dict[str, Any]:
    frames, height, width = env.mdp.num_frames, env.mdp.height, env.mdp.width
    return {
        "env_id": ENV_ID,
        "model_id": ENV_ID.partition("-")[0],
        "reward_train": REWARD,
        "num_frames": frames,
        "height_px": height,
        "width_px": width,
        "num_steps": env.num_steps,
        "sampler": env.mdp.sampler,
        "noise_level": env.mdp.noise_level,
        "num_envs": env.num_envs,
        "group_size": env.group_size,
        "prompts_train_sha256": env.prompts.sha256("train"),
        "question": QUESTION,
        "limits": list(LIMITS),
        "command": f"python -m benchmarks.demo --budget {config.budget} --out {config.out} --seed {config.seed}",
    }


def _clear(out: Path) -> None:
    """Removes an earlier demo's runs, and nothing else: their numbers must not enter this report."""
    for name in ENV_OPTIONS:
        for record in (out / name).glob("*/seed_*/run.json"):
            shutil.rmtree(record.parent)


def results(out: Path) -> list[str]:
    """What the runs in a folder found, as lines of text."""
    runs = read_runs(out)
    summaries = summarise(runs)
    lines = [f"{REWARD}, {device_name(runs[0])}, seed {', '.join(sorted({str(run.seed) for run in runs}))}"]
    for summary in summaries:
        lines.append(
            f"{summary.algo} ({summary.status}, {summary.device_s:.0f} device-s, {summary.costs['update']:.0f} updates)"
        )
        for name, word in ((PROXY, "reward"), (GOLD, "gold  ")):
            change = summary.changes.get(name)
            if change is not None and max(summary.at) > 0:
                shown = show_interval(change.difference, change.unit)
                lines.append(f"  {word} {show(change.before)} -> {show(change.after)}   change {shown}")
    if all(max(summary.at) > 0 for summary in summaries):
        notes = dict.fromkeys(explain_unit(s.changes[PROXY].unit, s.changes[PROXY].difference) for s in summaries)
        lines.append(f"[...] {'; '.join(notes)}")
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
            if train(name, config).interrupted:
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
