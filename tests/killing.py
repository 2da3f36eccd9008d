"""Runs of any algorithm of the zoo on Gaussian data that can be killed at any file operation or denoising step."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields, replace

import numpy as np
import torch
from gaussian import gaussian_env

import algos
from algos.checkpoint import load_checkpoint
from algos.checkpoint_store import newest_checkpoint

UPDATES = 5
# Few videos and several optimiser steps on them, references that are refreshed, buffers that overflow.
SMALL = {
    "videos_per_update": 16,
    "videos_per_rollout": 16,
    "videos_per_step": 8,
    "pairs_per_step": 8,
    "optimiser_steps": 2,
    "micro_batch": 8,
    "buffer_pairs": 60,
    "refresh_every": 2,
    "segments": 2,
    "tracker_min_count": 4,
    "prompts": 4,
}


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the package catches it."""


class Fuse:
    """Counts file operations and denoising steps, and kills at one of them, in the middle of it where it writes."""

    def __init__(self, monkeypatch):
        from pathlib import Path

        from algos import checkpoint, loop, resume, run_files, sample_videos
        from vdm_env import adapters, env

        self.count, self.at = 0, None
        for holder, name in (
            (Path, "rename"),
            (Path, "replace"),
            (Path, "unlink"),
            (Path, "mkdir"),
            (shutil, "rmtree"),
            (env.DenoisingVectorEnv, "step"),
        ):
            monkeypatch.setattr(holder, name, self._before(getattr(holder, name)))
        monkeypatch.setattr(Path, "write_text", self._half_text(Path.write_text))
        for holder in (checkpoint, adapters):
            monkeypatch.setattr(holder, "save_file", self._half_file(holder.save_file))
        append = self._half_rows(run_files.append_rows)
        monkeypatch.setattr(loop, "append_rows", append)
        replace_file = self._half_replacement(run_files.replace_file)
        for holder in (run_files, sample_videos):
            monkeypatch.setattr(holder, "replace_file", replace_file)
        assert resume.replace_json is run_files.replace_json  # which calls run_files.replace_file
        for holder in (checkpoint, run_files):
            monkeypatch.setattr(holder.os, "fsync", lambda handle: None)  # slow, and of no use to the living

    def blown(self):
        self.count += 1
        return self.count == self.at

    def _before(self, call):
        def counted(*given, **options):
            if self.blown():
                raise Killed
            return call(*given, **options)

        return counted

    def _half_text(self, call):
        def counted(path, text, *given, **options):
            if self.blown():
                call(path, text[: len(text) // 2], *given, **options)
                raise Killed
            return call(path, text, *given, **options)

        return counted

    def _half_file(self, call):
        def counted(tensors, path, *given, **options):
            call(tensors, path, *given, **options)
            if self.blown():
                with open(path, "r+b") as file:
                    file.truncate(file.seek(0, 2) // 2)
                raise Killed

        return counted

    def _half_rows(self, call):
        def counted(path, rows):
            if self.blown():
                text = "".join(json.dumps(row) + "\n" for row in rows)
                with path.open("a") as file:
                    file.write(text[: len(text) // 2])
                raise Killed
            call(path, rows)

        return counted

    def _half_replacement(self, call):
        def counted(path, data):
            if self.blown():
                path.with_name(path.name + ".part").write_bytes(data[: len(data) // 2])
                raise Killed
            call(path, data)

        return counted


def build(name, folder):
    """A zoo algorithm on Gaussian data with its preset, made small; `folder` is for those that learn from files."""
    entry = algos.ZOO[name]
    algorithm_class, config_class = algos.load(name)
    env = gaussian_env(**{"num_envs": 16, "group_size": 1, "num_steps": 3, **entry.env})
    policy = env.make_policy(lora_rank=2, seed=0)
    config = config_class.preset("MovingShapes")
    names = {field.name for field in fields(config)}
    config = replace(config, **{key: value for key, value in SMALL.items() if key in names})
    if "folder" in names:
        config = replace(config, folder=str(folder))
    return algorithm_class(env, policy, config)


def evaluator(algorithm):
    if not hasattr(algorithm.env, "derive"):
        return algos.Evaluator(type(algorithm.env)(), [0, 1], (0, 1), num_videos=1)
    env = algorithm.env.derive(split="train", num_envs=4, group_size=1, decode_frames=None)
    return algos.Evaluator(env, [0, 1], (0, 1), num_videos=1)


def start(algorithm, out, **options):
    options = {"updates": UPDATES, "eval_every": 2, "checkpoint_every": 2, **options}
    return algos.run(
        algorithm, out=out, evaluate=evaluator(algorithm), resume="auto", progress=False, env=algorithm.env, **options
    )


def rows(path):
    """Lines of a log without times and memory."""
    found = []
    for line in path.read_text().splitlines():
        found.append({k: v for k, v in json.loads(line).items() if not k.endswith("_s") and not k.startswith("peak_")})
    return found


def same(a, b):
    """Whether two trees of tensors and numbers are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_run(a, b):
    """Logs, videos, weights and the whole state of two finished run folders are equal."""
    for name in ("train.jsonl", "eval.jsonl"):
        assert rows(a / name) == rows(b / name), name
    samples = [sorted(path.relative_to(folder) for path in (folder / "samples").rglob("*.*")) for folder in (a, b)]
    assert samples[0] == samples[1]
    for name in sorted(path.name for path in (a / "samples").glob("*.npz")):
        assert np.array_equal(np.load(a / "samples" / name)["videos"], np.load(b / "samples" / name)["videos"])
    ends = [newest_checkpoint(folder) for folder in (a, b)]
    assert [end.name for end in ends] == [ends[0].name] * 2
    states = [load_checkpoint(end) for end in ends]
    assert same(states[0]["algorithm"], states[1]["algorithm"]) and states[0]["best"] == states[1]["best"]
    files = [sorted(path.relative_to(end) for path in (end / "policy").rglob("*")) for end in ends]
    assert files[0] and files[0] == files[1]
    for name in files[0]:
        assert (ends[0] / name).read_bytes() == (ends[1] / name).read_bytes(), name
    assert not [*b.rglob("*.part"), *b.rglob("*.new"), *b.rglob("*.old")]
