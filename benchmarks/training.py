"""One training run of any algorithm of the zoo, with the evaluation and the record that reports are made of."""

from __future__ import annotations

import ast
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from benchmarks.arguments import one_line

ENV_ID = "MovingShapes-HPS"
REWARD = f"{ENV_ID} (own small weights)"
# Half the model's steps and no guidance: a quarter of the cost of a video, and room above the base model's reward.
SAMPLING: dict[str, Any] = {"num_envs": 16, "num_steps": 5, "guidance_scale": 1.0}
_NUM_PROMPTS, _NUM_VIDEOS = 16, 6


class SetupError(ValueError):
    """A run that cannot be set up as asked; nothing was trained."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is the same for all runs that are to be compared."""

    env_id: str = ENV_ID
    """environment, such as MovingShapes-HPS"""
    sampling: Mapping[str, Any] | None = None
    """options of `vdm_env.make` for training and evaluation; None: `SAMPLING`"""
    split: str = "test"
    """prompts of the evaluations"""
    noise_seeds: Sequence[int] = (0, 1)
    """videos of each prompt in an evaluation"""
    question: str = ""
    """what the runs are to answer, for the report"""
    limits: Sequence[str] = ()
    """what they do not show, for the report"""


def train(
    name: str,
    *,
    out: Path,
    seed: int,
    command: str,
    setup: Setup,
    budget: str | None = None,
    updates: int | None = None,
    eval_every: str | int | None = None,
    changes: Mapping[str, Any] | None = None,
    fresh: bool = False,
    resume: bool | Literal["auto"] = False,
) -> Any:
    """Trains one algorithm on train prompts and evaluates it on those of `setup.split`.

    Args:
        name: of the zoo.
        out: folder of all runs.
        seed: of the environment, the policy and the algorithm.
        command: what repeats the run, for the record.
        setup: task and evaluation.
        budget: device time, such as "60s".
        updates: number of updates; this, a budget, or both.
        eval_every: see `algos.run`.
        changes: fields of the config that differ from its preset.
        fresh: remove an earlier run of this seed first.
        resume: continue an earlier run of this seed, see `algos.run`.

    Returns:
        The `algos.run.RunResult`; the run's folder is <out>/<algorithm>/<env_id>/seed_<n>.

    Raises:
        SetupError: the arguments fit no environment, preset or prompts; nothing was written.
        ValueError: the run cannot be continued, or there is one already; see `algos.run`.
        Exception: whatever stopped the training, which its folder records as FAILED.
    """
    started = time.perf_counter()
    import algos
    from algos.run import run_folder

    # Where preference data are kept: those that VideoDPO built serve OfflineDPO with the same seed.
    data = {"folder": str(run_folder(out.parent, out.name, "preferences", setup.env_id, seed))}
    try:
        keeps_data = any(field.name == "folder" for field in fields(algos.load(name)[1]))
        changes = {**(data if keeps_data else {}), **(changes or {})}
        env, policy, algorithm, evaluator = build(name, setup, seed, changes)
    except (ValueError, TypeError, OSError) as error:
        raise SetupError(one_line(error)) from error
    return algos.run(
        algorithm,
        out=run_folder(out.parent, out.name, name, setup.env_id, seed),
        budget=budget,
        updates=updates,
        evaluate=evaluator,
        eval_every=eval_every,
        seed=seed,
        task=describe(env, evaluator.env, setup, command),
        algo=name,
        env=env,
        policy=policy,
        setup_s=time.perf_counter() - started,
        fresh=fresh,
        resume=resume,
    )


def overrides(given: Sequence[str], seed: int) -> dict[str, Any]:
    """Config fields from texts such as "beta=500", "pairs=all_pairs" or "folder=runs/pairs_{seed}".

    Args:
        given: name=value; values are Python literals, anything else is taken as text.
        seed: replaces {seed}.

    Raises:
        ValueError: a text without "=".
    """
    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ValueError(f"--set {text!r}: expected name=value, such as beta=500")
        value = value.replace("{seed}", str(seed))
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found


def build(name: str, setup: Setup, seed: int, changes: Mapping[str, Any]) -> tuple[Any, Any, Any, Any]:
    """Environment, policy, algorithm and evaluator of a run.

    Raises:
        ValueError, TypeError, OSError: see `train`.
    """
    import algos
    import vdm_env

    algorithm_class, config_class = algos.load(name)
    sampling = SAMPLING if setup.sampling is None else setup.sampling
    env = vdm_env.make(setup.env_id, seed=seed, **{**sampling, **algos.ZOO[name].env})
    preset = config_class.preset(env.model.spec.name)
    known = [field.name for field in fields(preset)]
    if unknown := sorted(set(changes) - set(known)):
        raise ValueError(f"{config_class.__name__} has no field {unknown[0]!r}; it has {', '.join(known)}")
    config = replace(preset, seed=seed, **changes)
    policy = env.make_policy(seed=seed)
    algorithm = algorithm_class(env, policy, config)
    # All are evaluated with the same sampler, also those that train with another noise level.
    common = {"noise_level": sampling.get("noise_level", env.model.spec.noise_level), "decode_frames": None}
    held_out = env.derive(split=setup.split, num_envs=sampling["num_envs"], group_size=1, **common)
    prompt_ids = held_out.prompt_ids(setup.split)
    every = max(1, len(prompt_ids) // _NUM_PROMPTS)  # spread over the split, whose neighbours resemble each other
    evaluator = algos.Evaluator(held_out, prompt_ids[::every][:_NUM_PROMPTS], setup.noise_seeds, num_videos=_NUM_VIDEOS)
    return env, policy, algorithm, evaluator


def describe(env: Any, held_out: Any, setup: Setup, command: str) -> dict[str, Any]:
    """The task of a run, for its record; sampling is that of the evaluation environment."""
    env_id = setup.env_id
    label = f"{env_id} (own small weights)" if env.model.spec.world else env_id
    limits = list(setup.limits)
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
        "num_steps": held_out.num_steps,
        "sampler": held_out.mdp.sampler,
        "noise_level": held_out.mdp.noise_level,
        "guidance_scale": held_out.config.guidance_scale,
        "num_envs": env.num_envs,
        "group_size": env.group_size,
        "prompts_train_sha256": env.prompts.sha256("train"),
        "question": setup.question,
        "limits": limits,
        "command": command,
    }
