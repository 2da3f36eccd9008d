"""One training run of any algorithm, with the evaluation and the record that reports are made of."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.arguments import one_line
from benchmarks.configs import finite
from benchmarks.evaluation import evaluators
from benchmarks.plan import Arm, Benchmark, run_folder
from benchmarks.settings import algorithm_config, keyword_settings

ENV_ID = "MovingShapes-HPS"
REWARD = f"{ENV_ID} (own small weights)"
# Half the model's steps and no guidance: a quarter of the cost of a video, and room above the base model's reward.
SAMPLING: dict[str, Any] = {"num_envs": 16, "num_steps": 5, "guidance_scale": 1.0}
_SIZE = ("num_frames", "height", "width")


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
    further_splits: Sequence[str] = ()
    """prompts that are evaluated beside them, such as "train" """
    num_prompts: int = 16
    """of each split, spread over it"""
    noise_seeds: Sequence[int] = (0, 1)
    """videos of each prompt in an evaluation"""
    heldout: Sequence[str] = ()
    """rewards that are evaluated and never optimised, such as Aesthetic"""
    question: str = ""
    """what the runs are to answer, for the report"""
    limits: Sequence[str] = ()
    """what they do not show, for the report"""

    @classmethod
    def of(cls, benchmark: Benchmark) -> Setup:
        """That of a benchmark."""
        return cls(
            env_id=benchmark.env_id,
            sampling=benchmark.sampling,
            split=benchmark.splits[0],
            further_splits=benchmark.splits[1:],
            num_prompts=benchmark.eval_prompts,
            noise_seeds=range(benchmark.noise_seeds),
            heldout=benchmark.heldout,
            question=benchmark.question,
            limits=benchmark.limits,
        )


@dataclass(frozen=True, kw_only=True)
class Built:
    """The parts of a run."""

    env: Any
    policy: Any
    algorithm: Any
    evaluators: tuple[Any, ...]
    """one for each split, the main one first"""
    note: str
    """where the algorithm's settings come from"""
    config: Any = None
    """the algorithm's config, or its settings by name where it has no config"""


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
        name: of the zoo, or package.module:Class.
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
    from algos.zoo import recipe

    try:
        found = recipe(name)
        # Where preference data are kept: those that VideoDPO built serve OfflineDPO with the same seed.
        data = {"folder": str(run_folder(out, "preferences", setup.env_id, seed))} if found.data else {}
        arm = Arm(label=found.label, algo=name, settings={**data, **(changes or {})})
        built = build(arm, setup, seed)
    except (ValueError, TypeError, OSError) as error:
        raise SetupError(one_line(error)) from error
    return algos.run(
        built.algorithm,
        out=run_folder(out, arm.label, setup.env_id, seed),
        budget=budget,
        updates=updates,
        evaluate=built.evaluators,
        eval_every=eval_every,
        seed=seed,
        task=describe(built.env, built.evaluators[0].env, setup, command),
        algo=arm.label,
        env=built.env,
        policy=built.policy,
        setup_s=time.perf_counter() - started,
        fresh=fresh,
        resume=resume,
    )


def build_algorithm(
    found: Any, env: Any, make_policy: Any, settings: Mapping[str, Any], seed: int, *, strict: bool = False
) -> tuple[Any, Any, Any, str]:
    """Policy, algorithm, its config (or settings by name), and where these come from.

    Args:
        found: the `algos.zoo.Recipe`.
        env: to train in.
        make_policy: makes the policy; called when the settings are known to be good.
        settings: that differ from the preset or the class's defaults.
        seed: of the run.
        strict: see `algorithm_config`.

    Raises:
        ValueError, TypeError, OSError: whatever the config or the class refuses.
    """
    if found.config is not None:
        config, note = algorithm_config(found.config, env.model.spec.name, settings, seed, strict=strict)
        policy = make_policy()
        return policy, found.algorithm(env, policy, config), config, note
    chosen = keyword_settings(found.algorithm, settings, seed)
    policy = make_policy()
    note = f"defaults of {found.label}" + (", with the settings given" if settings else "")
    return policy, found.algorithm(env, policy, **chosen), chosen, note


def build(arm: Arm, setup: Setup, seed: int, *, device: str = "cpu", strict: bool = True) -> Built:
    """Environment, policy, algorithm and evaluators of a run.

    Args:
        arm: the algorithm and what it changes.
        setup: task and evaluation.
        seed: of all parts.
        device: of the networks, unless the sampling names one.
        strict: refuse a model for which the algorithm has no preset.

    Raises:
        ValueError, TypeError, OSError: see `train`.
    """
    import vdm_env
    from algos.zoo import recipe

    found = recipe(arm.algo)
    sampling = dict(SAMPLING if setup.sampling is None else setup.sampling)
    env = vdm_env.make(setup.env_id, seed=seed, **_options({"device": device, **sampling, **found.env, **arm.env}))
    policy, algorithm, config, note = build_algorithm(
        found, env, lambda: env.make_policy(**{"seed": seed, **arm.policy}), arm.settings, seed, strict=strict
    )
    shown = {**sampling, **arm.env} if arm.evaluate_as_trained else sampling
    splits = (setup.split, *setup.further_splits)
    guidance, interval = shown.get("guidance_scale", env.model.spec.guidance_scale), shown.get("guidance_interval")
    if arm.evaluate_as_trained:
        guidance, interval = policy.guidance_scale, policy.guidance_interval
    return Built(
        env=env,
        policy=policy,
        algorithm=algorithm,
        evaluators=evaluators(
            env,
            splits,
            num_prompts=setup.num_prompts,
            noise_seeds=setup.noise_seeds,
            heldout=setup.heldout,
            guidance_scale=guidance,
            guidance_interval=None if guidance == 1.0 else interval,
            num_envs=shown.get("num_envs", env.num_envs),
            **_as_planned(env, setup.env_id, shown, arm),
        ),
        note=note,
        config=config,
    )


def _options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `vdm_env.make` with a number format by name."""
    import torch

    if isinstance(given.get("dtype"), str):
        return {**given, "dtype": getattr(torch, given["dtype"])}
    return dict(given)


def _as_planned(env: Any, env_id: str, sampling: Mapping[str, Any], arm: Arm) -> dict[str, Any]:
    """What takes an environment to the sampling of the evaluations, whatever the algorithm trains with."""
    spec = env.model.spec
    found: dict[str, Any] = {
        "sampler": sampling.get("sampler", spec.sampler),
        "num_steps": sampling.get("num_steps", spec.num_steps),
    }
    own_noise = spec.noise_level if found["sampler"] == spec.sampler else None
    found["noise_level"] = sampling.get("noise_level", own_noise)
    if any(name in arm.env for name in _SIZE):
        found["size"] = tuple(sampling.get(name, getattr(spec, name)) for name in _SIZE)
    if "reward" in arm.env:
        from vdm_env.registry import parse_id

        found["reward"] = sampling.get("reward", parse_id(env_id)[1])
    return found


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
        "guidance_interval": finite(held_out.config.guidance_interval),  # no upper limit is null
        "num_envs": env.num_envs,
        "group_size": env.group_size,
        "prompts_train_sha256": env.prompts.sha256("train"),
        "question": setup.question,
        "limits": limits,
        "command": command,
    }
