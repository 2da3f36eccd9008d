"""Two algorithms on the small embedded video model, with the same budget, and a report.

    python -m benchmarks.demo --budget 60s --out runs/demo --seed 0

Reward back-propagation (VADER) against policy gradients (DDPO) on MovingShapes-HPS. Ctrl-C, or a failure in one of
them, ends it with a report of what was done.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.arguments import one_line, parse
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
COMMAND = "python -m benchmarks.demo"
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


class SetupError(ValueError):
    """A run that cannot be set up as asked; nothing was trained."""


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
    fresh: bool = False,
) -> Any:
    """Trains one algorithm ("vader" or "ddpo") on train prompts and evaluates it on `split`.

    Args:
        name: the algorithm.
        out: folder of all runs.
        budget: device time, such as "60s".
        seed: of the environment, the policy and the algorithm.
        command: what repeats the run, for the record.
        env_id: of an environment whose model the algorithm has a preset for.
        split: prompts of the evaluations.
        noise_seeds: videos of each prompt in an evaluation.
        fresh: remove an earlier run of this seed first.

    Returns:
        The `algos.run.RunResult`; the run's folder is <out>/<algorithm>/<env_id>/seed_<n>.

    Raises:
        SetupError: the arguments fit no environment, preset or prompts; nothing was written.
        Exception: whatever stopped the training, which its folder records as FAILED.
    """
    started = time.perf_counter()
    import algos
    import vdm_env
    from algos.run import run_folder

    try:
        env, policy, algorithm, evaluator = _build(algos, vdm_env, name, env_id, seed, split, noise_seeds)
    except ValueError as error:
        raise SetupError(one_line(error)) from error
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
        fresh=fresh,
    )


def _build(
    algos: Any, vdm_env: Any, name: str, env_id: str, seed: int, split: str, noise_seeds: Sequence[int]
) -> tuple[Any, Any, Any, Any]:
    """Environment, policy, algorithm and evaluator of a run."""
    classes: dict[str, tuple[Any, Any]] = {
        "vader": (algos.VADER, algos.VADERConfig),
        "ddpo": (algos.DDPO, algos.DDPOConfig),
    }
    algorithm_class, config_class = classes[name]
    env = vdm_env.make(env_id, seed=seed, **ENV_OPTIONS[name])
    spec = env.model.spec
    # The embedded world's models are of one size and see the same videos: the settings of one serve the others.
    config = config_class.preset("MovingShapes" if spec.world == "moving_shapes" else spec.name)
    policy = env.make_policy(seed=seed)
    algorithm = algorithm_class(env, policy, replace(config, seed=seed))
    held_out = env.derive(split=split, num_envs=16, group_size=1, decode_frames=None)
    prompt_ids = held_out.prompt_ids(split)
    every = max(1, len(prompt_ids) // _NUM_PROMPTS)  # spread over the split, whose neighbours resemble each other
    evaluator = algos.Evaluator(held_out, prompt_ids[::every][:_NUM_PROMPTS], noise_seeds, num_videos=_NUM_VIDEOS)
    return env, policy, algorithm, evaluator


def _task(env: Any, env_id: str, command: str) -> dict[str, Any]:
    label = f"{env_id} (own small weights)" if env.model.spec.world else env_id
    limits = ["Hyper-parameters are each algorithm's preset for this model; a demonstration is no tuned comparison."]
    if env.model.spec.world:
        limits.insert(
            0,
            f"{label}: the video model and the reward model were trained by this package on its own synthetic world. "
            "This is no published network such as HPSv2, and says nothing about how the algorithms rank on large "
            "models.",
        )
    frames, height, width = env.mdp.num_frames, env.mdp.height, env.mdp.width
    return {
        "env_id": env_id,
        "model_id": env.model.spec.name,
        "reward_train": label,
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
        "limits": limits,
        "command": command,
    }


def _clear(out: Path) -> None:
    """Removes an earlier demo's runs, and nothing else: their numbers must not enter this report.

    Raises:
        ValueError: there is a run of another command; nothing is removed.
    """
    records = sorted(out.rglob("run.json"))
    own = [record for name in ENV_OPTIONS for record in (out / name).glob("*/seed_*/run.json") if _is_demo(record)]
    others = [record.parent for record in records if record not in own]
    if others:
        raise ValueError(
            f"{others[0]} is a run of another command, which would enter this report (nothing was removed): "
            "choose another --out"
        )
    for record in own:
        shutil.rmtree(record.parent)


def _is_demo(record: Path) -> bool:
    try:
        command = json.loads(record.read_text(encoding="utf-8"))["task"]["command"]
    except (ValueError, KeyError, TypeError):
        return False
    return str(command).startswith(COMMAND)


def _command(config: DemoConfig) -> str:
    return f"{COMMAND} --budget {config.budget} --out {config.out} --seed {config.seed}"


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
    """Runs the demo.

    Returns:
        The exit code: 0; 1 after a failure or 130 if it was interrupted, with a report of what was done all the same;
        2 for a bad budget or a folder with other runs, before anything is removed.
    """
    out = Path(config.out)
    code = 0
    try:
        from algos.run import seconds

        seconds(config.budget)
        _clear(out)
    except (ValueError, OSError) as error:
        print(f"demo: {one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    try:
        for name in ENV_OPTIONS:
            print(f"{name}: setting up", flush=True)
            if train(name, out=out, budget=config.budget, seed=config.seed, command=_command(config)).interrupted:
                code = 130
                break
    except KeyboardInterrupt:
        code = 130
    except Exception as error:  # whatever it is, the runs before it deserve their report
        print(f"demo: {name} stopped: {one_line(error)}", file=sys.stderr)
        code = 1
    if code == 1 and not _evaluated(out):
        return code  # the one line said it all
    try:
        report = write_report(out)
    except (ValueError, OSError) as error:
        print(f"demo: no report: {one_line(error)}", file=sys.stderr)
        return code or 1
    print("", *results(out), f"report: {report}", sep="\n")
    return code


def _evaluated(out: Path) -> bool:
    """Whether there is anything to report."""
    try:
        return bool(read_runs(out))
    except ValueError:
        return False


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of `python -m benchmarks.demo`."""
    return demo(parse(DemoConfig, arguments, "demo"))


if __name__ == "__main__":
    sys.exit(main())
