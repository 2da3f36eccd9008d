"""`vdm-env eval`: scores of a model before and after training on held-out prompts."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.arguments import one_line, parse, refuse
from benchmarks.configs import finite
from benchmarks.options import ProcessOptions, check_target, make_env, own_prompts

PROGRAM = "vdm-env eval"


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """Score videos of held-out prompts before and, with --run or --lora, after training, from the same noise.

    Prints a table and writes JSON: the reward and its parts, the gold score where the world has one, further rewards,
    and metrics of the frames that need no network.
    """

    run: str | None = None
    """folder of a run; environment and sampling are the run's unless options say otherwise"""
    lora: str | None = None
    """instead of --run: folder of a checkpoint, an export or a PEFT adapter; without both, the model alone"""
    checkpoint: Literal["newest", "best"] | int = "newest"
    """of a run's checkpoints; best: with the highest reward in an evaluation; a number: of that update"""
    env: str | None = None
    """environment, <Model>-<Reward>; None: the run's"""
    split: Literal["train", "validation", "test"] = "test"
    """prompts; training draws from train"""
    num_prompts: int = 16
    """number of prompts, spread over the split"""
    noise_seeds: int = 4
    """videos of each prompt, from noise seeds 0, 1, ..."""
    num_envs: int = 16
    """videos made at a time"""
    rewards: tuple[str, ...] = ()
    """further rewards to score the same videos with, such as Aesthetic"""
    out: str | None = None
    """JSON file to write; None: evaluation.json in the run's folder, or here"""
    process: ProcessOptions = field(default_factory=ProcessOptions)


def main(arguments: Sequence[str]) -> int:
    """Runs the command. Returns the exit code: 0, or 1 if the evaluation failed.

    Raises:
        SystemExit: code 2 for wrong usage, before any video is made.
    """
    config = parse(EvalConfig, arguments, PROGRAM)
    try:
        parts = prepare(config)
    except (ValueError, TypeError, OSError) as error:
        refuse(PROGRAM, one_line(error))
    try:
        from benchmarks.scores import table

        found, out = measure(config, *parts), target(config)
        print(table(found), flush=True)  # before anything that could fail
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(finite(found), indent=1) + "\n", encoding="utf-8")
        print(f"written to {out}")
    except Exception as error:  # out of memory, a full disk
        print(f"{PROGRAM}: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


def target(config: EvalConfig) -> Path:
    """The file that is written."""
    return Path(config.out or Path(config.run or ".") / "evaluation.json")


def prepare(config: EvalConfig) -> tuple[Any, Any, list[int], Any, bool]:
    """Environment, policy, prompt ids, the environments of further rewards by name, and if the model's are random.

    Raises:
        ValueError, TypeError, OSError: what was asked for is impossible, or pretrained weights are missing.
    """
    if config.run is not None and config.lora is not None:
        raise ValueError("--run and --lora both say which weights: give one of them")
    for name in ("num_prompts", "noise_seeds", "num_envs"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(config, name)}")
    from benchmarks.evaluation import check_captions, spread
    from benchmarks.trained import Trained, environment, find, load_policy, merged

    folder = config.run or config.lora
    trained = Trained(weights=Path()) if folder is None else find(folder, config.checkpoint)
    if config.run is not None and trained.run is None:
        raise ValueError(f"{config.run} is no run: it holds no run.json (weights without a run go with --lora)")
    env_id = environment(trained, config.env)
    if env_id is None:
        raise ValueError("which environment? Give --env, such as --env MovingShapes-HPS, or --run with a run's folder")
    check_target(target(config))
    given = {"num_envs": config.num_envs, "split": config.split, **own_prompts(trained.batch)}
    process = merged(trained.process, config.process)
    env = make_env(env_id, process, **given)
    ids = spread(env.prompt_ids(config.split), config.num_prompts)
    check_captions(env, ids)
    policy = load_policy(env, None if folder is None else trained.weights)
    scorers = {name: env.derive(reward=name) for name in dict.fromkeys(config.rewards)}
    return env, policy, ids, scorers, process.weights == "random"


def measure(
    config: EvalConfig, env: Any, policy: Any, prompt_ids: list[int], scorers: Any, random_weights: bool
) -> dict[str, Any]:
    """Everything that evaluation.json says."""
    from benchmarks.scores import compare, score
    from benchmarks.trained import Untrained

    seeds = list(range(config.noise_seeds))
    before = score(env, Untrained(policy), prompt_ids, seeds, scorers)
    trained = config.run or config.lora
    after = None if trained is None else score(env, policy, prompt_ids, seeds, scorers)
    mdp = env.mdp
    return {
        "env_id": env.config.id,
        "model_id": env.model.spec.name,
        "trained": trained,
        "split": config.split,
        "prompts": [env.prompts[index] for index in prompt_ids],
        "noise_seeds": seeds,
        "num_steps": env.num_steps,
        "sampler": mdp.sampler,
        "noise_level": mdp.noise_level,
        "guidance_scale": env.config.guidance_scale,
        "guidance_interval": env.config.guidance_interval,
        "size": [mdp.num_frames, mdp.height, mdp.width],
        "random_weights": random_weights,
        "interval": f"95 % Student t over {len(prompt_ids)} prompts of one set of weights; it says nothing about seeds "
        "of training",
        "scores": compare(before, after),
    }
