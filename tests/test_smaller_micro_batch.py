"""An update that memory does not suffice for, done again in smaller pieces: the weights are those of one with room."""

from __future__ import annotations

import json

import pytest
import torch
from spread import build
from test_run import FakeAlgorithm, rows

from algos import run
from algos.checkpoint import load_checkpoint
from algos.checkpoint_store import newest_checkpoint
from algos.preference_sampling import build_preferences
from algos.run import OutOfMemoryError

CASES = (
    "ddpo", "ddpo per prompt", "flow_grpo", "flow_grpo window", "d3po", "diffusion_dpo", "online_vpo", "diffusion_kto",
    "diffusion_nft", "rwr", "rwr best", "videodpo", "offline_dpo",
)  # fmt: skip


class Short:
    """Memory that is short at some backward passes, counted over the life of a policy, and says what came of it."""

    def __init__(self, policy, at=()):
        self.passes, self.at = 0, set(at)
        # the tensor hook of one parameter is called once in each backward pass
        policy.trainable_parameters()[-1].register_hook(self._count)

    def _count(self, gradient):
        self.passes += 1
        if self.passes in self.at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return gradient


def trained(case, data, out, at=(), updates=2, algorithm=None, **options):
    """The weights in the end, backward passes after each update, and the algorithm."""
    algorithm = algorithm or build(case, data)
    short, after, update = Short(algorithm.policy, at), [], algorithm.update

    def counted():
        try:
            return update()
        finally:
            after.append(short.passes)

    algorithm.update = counted
    run(algorithm, out=out, updates=updates, progress=False, **options)
    return [p.detach().clone() for p in algorithm.policy.trainable_parameters()], after, algorithm


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of preferences, for the one that learns from a given one."""
    from gaussian import gaussian_env

    out = tmp_path_factory.mktemp("data")
    env = gaussian_env(dtype=torch.float64, num_envs=8, num_steps=3)
    policy = env.make_policy(lora_rank=2)
    build_preferences(out, env, policy, groups=12, candidates=3)
    return out


@pytest.mark.parametrize("case", CASES)
def test_the_weights_are_those_of_a_run_with_room(case, data, tmp_path, capsys):
    own = {name: data if case == "offline_dpo" else tmp_path / f"{name}_data" for name in ("whole", "short")}
    whole, after, algorithm = trained(case, own["whole"], tmp_path / "whole")
    # In the last backward pass of the second update: where it takes several steps, the weights have moved before.
    found, _, halved = trained(case, own["short"], tmp_path / "short", at=after[1:2], on_oom="halve_micro_batch")
    given, smaller = algorithm.config.micro_batch or 8, halved.config.micro_batch
    assert smaller == given // 2 >= 1
    change = {"update": 2, "micro_batch": smaller}
    assert json.loads((tmp_path / "short" / "run.json").read_text())["micro_batch_halved"] == [change]
    assert f"out of memory in update 2: once more, now with micro_batch={smaller}" in capsys.readouterr().err
    start = [p.detach() for p in build(case, own["whole"]).policy.trainable_parameters()]
    moved = max(float((a - b).abs().max()) for a, b in zip(whole, start, strict=True))
    off = max(float((a - b).abs().max()) for a, b in zip(whole, found, strict=True))
    assert moved > 1e-5 and off < 1e-9 * moved, (moved, off)
    lines = [rows(tmp_path / name / "train.jsonl") for name in ("whole", "short")]
    for a, b in zip(*lines, strict=True):
        assert a["reward_mean"] == pytest.approx(b["reward_mean"], abs=1e-6)
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5, abs=1e-6)
    # The attempt that failed has cost what it has cost.
    assert lines[1][1]["denoiser_forwards"] > lines[0][1]["denoiser_forwards"]


def test_a_resumed_run_keeps_the_smaller_one_and_its_bits(tmp_path):
    whole, after, _ = trained("ddpo", None, tmp_path / "a", at=[2], updates=3, on_oom="halve_micro_batch")
    algorithm = build("ddpo", None)
    real, calls = algorithm.update, []

    def fails():
        calls.append(1)
        if len(calls) == 4:  # the first update took two
            raise RuntimeError("power cut")
        return real()

    algorithm.update = fails
    options = {"updates": 3, "on_oom": "halve_micro_batch", "checkpoint_every": 1, "progress": False}
    Short(algorithm.policy, [2])
    with pytest.raises(RuntimeError, match="power cut"):
        run(algorithm, out=tmp_path / "b", **options)
    again = build("ddpo", None)
    assert run(again, out=tmp_path / "b", resume=True, **options).resumed_from == 2
    assert again.config.micro_batch == 2 and build("ddpo", None).config.micro_batch == 4
    assert all(torch.equal(a, b) for a, b in zip(whole, again.policy.trainable_parameters(), strict=True))
    states = [load_checkpoint(newest_checkpoint(tmp_path / name)) for name in "ab"]
    assert states[0]["halvings"] == states[1]["halvings"] == [{"update": 1, "micro_batch": 2}]


def test_it_ends_where_it_cannot_be_smaller(tmp_path):
    algorithm = build("ddpo", None)
    Short(algorithm.policy, range(1, 99))
    with pytest.raises(OutOfMemoryError, match=r"micro_batch of the algorithm's config \(1 now\)"):
        run(algorithm, out=tmp_path, updates=1, on_oom="halve_micro_batch", progress=False)
    sizes = [one["micro_batch"] for one in json.loads((tmp_path / "run.json").read_text())["micro_batch_halved"]]
    assert sizes == [2, 1]
    d3po = build("d3po", None)
    Short(d3po.policy, range(1, 99))
    with pytest.raises(OutOfMemoryError, match=r"\(2 now\)"):  # two videos are a pair
        run(d3po, out=tmp_path / "b", updates=1, on_oom="halve_micro_batch", progress=False)


def test_without_being_asked_it_fails_as_it_did(tmp_path):
    algorithm = build("ddpo", None)
    Short(algorithm.policy, [1])
    with pytest.raises(OutOfMemoryError, match=r"\(4 now\)"):
        run(algorithm, out=tmp_path, updates=1, progress=False)
    with pytest.raises(ValueError, match="on_oom is 'retry', expected 'fail' or 'halve_micro_batch'"):
        run(FakeAlgorithm(), out=tmp_path / "b", updates=1, on_oom="retry")
