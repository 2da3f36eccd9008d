"""A training run whose reward lives elsewhere: the server fails in the middle, and the run ends as if it had not."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from gaussian import ddpo_on, full_policy, gaussian_env
from serving import served
from torch import Tensor

from algos import run
from vdm_env.errors import RemoteRewardError
from vdm_env.rewards import RemoteReward, as_reward
from vdm_env.rewards.server import RewardServer
from vdm_env.rewards.wire import Retries
from vdm_env.worlds.gaussian import TargetReward

UPDATES, BROKEN_AT = 4, 5
"""the server is broken from that call on, until it is mended"""


def train(out: Path, reward: Any) -> Tensor:
    """The weights after UPDATES updates; a folder that is begun is continued."""
    env = gaussian_env(reward=reward, num_steps=3)
    policy = full_policy(env)
    run(
        ddpo_on(env, policy, updates_per_rollout=1, videos_per_rollout=16),
        out=out,
        updates=UPDATES,
        checkpoint_every=1,
        resume=(out / "run.json").exists(),
        progress=False,
    )
    (weight,) = policy.trainable_parameters()
    return weight.detach().clone()


def lines(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in ("update", "reward_mean", "reward_queries", "videos_sampled")} for row in rows]


@pytest.mark.parametrize("failure", ["error", "NaN", "count"])
def test_a_run_goes_on_where_its_reward_failed(failure: str, tmp_path: Path) -> None:
    real, calls, mended = TargetReward(1.0), [0], threading.Event()

    def flaky(video: Tensor, prompts: list[str]) -> Tensor:
        calls[0] += 1
        scores = real(video, prompts)
        if calls[0] < BROKEN_AT or mended.is_set():
            return scores
        if failure == "error":
            raise RuntimeError("the device fell over")
        return scores * float("nan") if failure == "NaN" else scores[:-1]

    with served(RewardServer(as_reward(real, name=real.name, range=real.range))) as server:
        expected = train(tmp_path / "whole", RemoteReward(server.url, batch=64, concurrency=1))
    torch.testing.assert_close(expected, train(tmp_path / "home", real), rtol=1e-4, atol=1e-5)
    with served(RewardServer(as_reward(flaky, name=real.name, range=real.range))) as server:
        retries = Retries(attempts=2, wait_s=0.0)
        # One request a call: the calls are counted.
        remote = RemoteReward(server.url, batch=64, concurrency=1, retries=retries)
        with pytest.raises(RemoteRewardError, match="refused" if failure == "count" else "2 attempts"):
            train(tmp_path / "remote", remote)
        kept = lines(tmp_path / "remote")
        assert 0 < len(kept) < UPDATES and not (tmp_path / "remote" / "DONE").exists()
        assert kept == lines(tmp_path / "whole")[: len(kept)]
        mended.set()
        found = train(tmp_path / "remote", remote)
    assert torch.equal(found, expected)
    assert lines(tmp_path / "remote") == lines(tmp_path / "whole") and (tmp_path / "remote" / "DONE").exists()
