"""`vdm-env sample`: videos of a model, and of its trained version from the same noise, side by side."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from benchmarks.arguments import one_line, parse, refuse
from benchmarks.options import ProcessOptions, check_seed, check_target, make_env, own_prompts

PROGRAM = "vdm-env sample"
_SHOWN = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleConfig:
    """Write videos of a model: before training and, with --lora, after it, from the same noise side by side.

    With a run's folder, environment and sampling are those of the run unless options say otherwise.
    """

    env: str | None = None
    """environment, <Model>-<Reward>; None: the run's"""
    lora: str | None = None
    """folder of a run, a checkpoint, an export or a PEFT adapter; None: the untrained model alone"""
    checkpoint: Literal["newest", "best"] | int = "newest"
    """of a run's checkpoints; best: with the highest reward in an evaluation; a number: of that update"""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """text of a video; without any, four held-out prompts of the model"""
    image: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """picture to start from, for models that animate images; as many as prompts"""
    seed: tyro.conf.UseAppendAction[tuple[int, ...]] = ()
    """of the noise, a row of videos for each prompt and seed; without any, 0"""
    out: str = "sample.mp4"
    """file to write, .mp4 or .gif"""
    fps: float | None = None
    """frames a second; None: the model's"""
    batch_size: int = 8
    """videos made at a time"""
    process: ProcessOptions = field(default_factory=ProcessOptions)


def main(arguments: Sequence[str]) -> int:
    """Runs the command. Returns the exit code: 0, or 1 if making the videos failed.

    Raises:
        SystemExit: code 2 for wrong usage, before any video is made.
    """
    config = parse(SampleConfig, arguments, PROGRAM)
    try:
        env, policy, rows = prepare(config)
    except (ValueError, TypeError, OSError) as error:
        refuse(PROGRAM, one_line(error))
    try:
        print(write(config, env, policy, rows))
    except Exception as error:  # out of memory, a full disk
        print(f"{PROGRAM}: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


def prepare(config: SampleConfig) -> tuple[Any, Any, list[tuple[int, int]]]:
    """Environment, policy and the (prompt id, seed) of each row.

    Raises:
        ValueError, TypeError, OSError: what was asked for is impossible, or pretrained weights are missing.
    """
    seeds = config.seed or (0,)
    if Path(config.out).suffix not in (".mp4", ".gif"):
        raise ValueError(f"--out {config.out}: the name of a video ends in .mp4 or .gif")
    if config.batch_size < 1 or not (config.fps is None or config.fps > 0):
        raise ValueError("--batch-size must be at least 1 and --fps above 0")
    for seed in seeds:
        check_seed(seed)
    if config.image and config.prompt and len(config.image) != len(config.prompt):
        raise ValueError(f"{len(config.image)} images for {len(config.prompt)} prompts: give as many")
    from benchmarks.trained import Trained, environment, find, load_policy, merged

    trained = Trained(weights=Path()) if config.lora is None else find(config.lora, config.checkpoint)
    env_id = environment(trained, config.env)
    if env_id is None:
        known = (
            "--lora with a run's folder" if config.lora is None else "this folder does not say what it was trained on"
        )
        raise ValueError(f"which environment? Give --env, such as --env MovingShapes-HPS ({known})")
    check_target(config.out)
    given = own_prompts(trained.batch)
    if config.image:
        given = {"images": list(config.image), "prompts": list(config.prompt) or None}
    elif config.prompt:
        given = {"prompts": list(dict.fromkeys(config.prompt))}
    env = make_env(env_id, merged(trained.process, config.process), num_envs=1, **given)
    policy = load_policy(env, None if config.lora is None else trained.weights)
    ids = _prompt_ids(env, bool(config.prompt or config.image))
    rows = [(prompt, seed) for prompt in ids for seed in dict.fromkeys(seeds)]
    size = min(config.batch_size, len(rows))
    return env.derive(num_envs=size, decode_frames="all"), policy, rows


def _prompt_ids(env: Any, own: bool) -> list[int]:
    """All prompts that were given; of a model's own the first held-out ones."""
    for split in ("train",) if own else ("test", "train"):
        try:
            ids = env.prompt_ids(split)
        except ValueError:
            continue
        return ids if own else ids[:_SHOWN]
    raise ValueError("the model has no prompts of its own: give --prompt")


def videos(env: Any, policy: Any, rows: Sequence[tuple[int, int]]) -> list[Any]:
    """A uint8 video [F,H,W,3] for each (prompt id, seed)."""
    import torch

    from vdm_env.video import to_uint8

    found: list[Any] = []
    for start in range(0, len(rows), env.num_envs):
        chunk = list(rows[start : start + env.num_envs])
        whole = chunk + [chunk[-1]] * (env.num_envs - len(chunk))
        with torch.no_grad():
            obs, _ = env.reset(
                seed=[seed for _, seed in whole], options={"prompt_ids": [prompt for prompt, _ in whole]}
            )
            for _ in range(env.num_steps):
                obs, *_, info = env.step(policy(obs))
        found += [to_uint8(video) for video in info["video"][: len(chunk)]]
    return found


def write(config: SampleConfig, env: Any, policy: Any, rows: Sequence[tuple[int, int]]) -> Path:
    """Makes the videos and writes the film."""
    import torch

    from benchmarks.pictures import side_by_side
    from benchmarks.trained import Untrained
    from vdm_env.video import save_gif, save_mp4

    policies = {"base model": Untrained(policy)} | ({} if config.lora is None else {"trained": policy})
    columns = [videos(env, one, rows) for one in policies.values()]
    captions = [f"{env.prompts[prompt]} (seed {seed})" for prompt, seed in rows]
    film = side_by_side(list(zip(captions, zip(*columns, strict=True), strict=True)), list(policies))
    frames = torch.from_numpy(film).permute(0, 3, 1, 2).float() / 255
    fps = config.fps or env.model.spec.fps
    return (save_gif if config.out.endswith(".gif") else save_mp4)(config.out, frames, fps)
