"""What a run's record says of its costs: set-up, devices that serve rewards, memory; and of metrics that are none."""

from __future__ import annotations

import json
import math
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from serving import served
from test_remote_reward import FAST, Scripted, brightness, right
from test_run import Clock, Counters, FakeAlgorithm, FakeEnv, rows

from algos import Evaluator, run
from algos.budget import Schedule, seconds
from algos.meter import Meter
from algos.provenance import provenance
from algos.run_files import differences
from vdm_env.errors import RemoteRewardError
from vdm_env.rewards import Chunked, RemoteReward, WeightedSum, as_reward
from vdm_env.rewards.combine import Part
from vdm_env.rewards.remote import remote_parts, serving_devices
from vdm_env.rewards.server import RewardServer

RUN = sys.modules["algos.run"]  # the name `algos.run` is the function's
PHASES = ("setup_s", "train_s", "eval_s", "checkpoint_s")

# ------------------------------------------------------------------ set-up


def with_clock(monkeypatch):
    """All meters of runs on one clock, which only the hooks of updates move."""
    clock = Clock()
    monkeypatch.setattr(RUN, "Meter", partial(Meter, clock=clock))
    return clock


def test_the_callers_set_up_is_part_of_the_whole(tmp_path, monkeypatch):
    clock = with_clock(monkeypatch)

    def work():
        clock.now += 2.0

    hooks = dict.fromkeys((1, 2, 3, 4), work)
    run(FakeAlgorithm(hooks=hooks), out=tmp_path, updates=2, setup_s=5.0, checkpoint_every=1, progress=False)
    found = rows(tmp_path / "train.jsonl") + [json.loads((tmp_path / "DONE").read_text())]
    for row in found:
        assert sum(row[name] for name in PHASES) == pytest.approx(row["wall_s"], rel=0.03)
    assert (found[-1]["setup_s"], found[-1]["train_s"], found[-1]["wall_s"]) == (5.0, 4.0, 9.0)


def test_set_up_of_a_resume_is_part_of_the_whole_at_once(tmp_path, monkeypatch):
    clock = with_clock(monkeypatch)

    def crash():
        raise RuntimeError("power")

    def work():
        clock.now += 2.0

    start = partial(run, out=tmp_path, updates=3, checkpoint_every=1, progress=False)
    with pytest.raises(RuntimeError, match="power"):
        start(FakeAlgorithm(hooks={1: work, 2: crash}), setup_s=5.0)
    start(FakeAlgorithm(hooks={2: work, 3: work}), setup_s=7.0, resume=True)
    last = rows(tmp_path / "train.jsonl")[-1]
    assert (last["setup_s"], last["train_s"], last["wall_s"]) == (12.0, 6.0, 18.0)
    meter = Meter(counters=Counters(), clock=clock)
    meter.add_setup(3.0)
    assert (meter.seconds["setup"], meter.wall_s, meter.device_s) == (3.0, 3.0, 0.0)


# ------------------------------------------------------------------ devices that serve rewards


class Served:
    """A reward elsewhere, on so many accelerators."""

    differentiable, frames, range = False, "all", (0.0, 1.0)

    def __init__(self, name, devices):
        self.name, self.devices = name, devices

    def __call__(self, video, prompts):
        return video.mean((1, 2, 3, 4))


def test_a_server_says_how_many_accelerators_it_holds():
    own = as_reward(brightness, name="Bright")
    with served(RewardServer(own)) as server:
        assert RemoteReward(server.url, retries=FAST).devices == 0
    server = RewardServer(own)
    server.device = torch.device("cuda")
    assert server.health()["devices"] == 1
    server.reward = WeightedSum([Part(reward=Served("a", 2)), Part(reward=own)])  # it asks a server itself
    assert server.health()["devices"] == 3
    server.reward = Served("a", None)
    assert server.health()["devices"] is None
    server.server_close()


def test_a_server_that_does_not_say_is_asked_no_further_and_one_that_lies_is_refused(monkeypatch):
    with served(Scripted(lambda number, content: (200, right(content)))) as scripted:
        assert RemoteReward(scripted.url, retries=FAST).devices is None
    for wrong in (-1, 1.5, True, "two"):
        with served(RewardServer(as_reward(brightness, name="Bright"))) as server:
            told = {**server.health(), "devices": wrong}
            monkeypatch.setattr(server, "health", lambda told=told: told)
            with pytest.raises(RemoteRewardError, match="devices"):
                RemoteReward(server.url, retries=FAST, sleep=lambda _: None)


def test_devices_of_a_sum_add_up():
    parts = [Served("a", 1), as_reward(brightness, name="here"), Served("b", 2)]
    whole = WeightedSum([Part(reward=part, weight=0.5) for part in parts])
    assert remote_parts(whole) == [parts[0], parts[2]] and remote_parts(parts[1]) == remote_parts(None) == []
    found = provenance("cpu", reward=whole)
    assert (found["num_gpus_policy"], found["num_gpus_reward"], found["remote_rewards"]) == (0, 3, ["a", "b"])
    assert "reward_devices_note" not in found
    silent = provenance("cpu", reward=WeightedSum([Part(reward=Served("a", None)), Part(reward=Served("b", 2))]))
    assert silent["num_gpus_reward"] == 2 and "server of a does not say" in silent["reward_devices_note"]
    given = provenance("cpu", reward=Served("a", None), reward_devices=4)
    assert given["num_gpus_reward"] == 4 and "reward_devices_note" not in given
    assert provenance("cpu")["num_gpus_reward"] == 0 and "remote_rewards" not in provenance("cpu")


def sum_of(reward):
    return WeightedSum([Part(reward=reward), Part(reward=as_reward(brightness, name="here"))])


@pytest.mark.parametrize(
    "wrap",
    [
        partial(as_reward, frames="first"),
        partial(Chunked, chunk=2),
        lambda reward: as_reward(as_reward(sum_of(reward), name="sum"), frames="last"),
        lambda reward: sum_of(Chunked(as_reward(reward, frames="first"), 2)),
    ],
)
def test_devices_are_counted_through_what_wraps_a_reward(wrap):
    server = RewardServer(as_reward(brightness, name="Bright"))
    server.device = torch.device("cuda")  # what it says of itself; nobody scores
    with served(server):
        reward = RemoteReward(server.url, retries=FAST)
    found = provenance("cpu", reward=wrap(reward))
    assert (found["num_gpus_reward"], found["remote_rewards"]) == (1, ["Bright"])
    reward.devices = None
    assert "server of Bright does not say" in provenance("cpu", reward=wrap(reward))["reward_devices_note"]
    assert remote_parts(wrap(as_reward(brightness, name="Bright"))) == []


def test_devices_of_a_plain_function_are_counted():
    def far(video, prompts):
        return brightness(video, prompts)

    far.devices = 2
    found = provenance("cpu", reward=as_reward(far))
    assert (found["num_gpus_reward"], found["remote_rewards"]) == (2, ["far"])


@pytest.mark.parametrize(("given", "devices"), [(None, 2), (0, 0), (5, 5)])
def test_a_run_counts_the_devices_of_its_reward(tmp_path, monkeypatch, given, devices):
    meters = []

    def meter(**options):
        meters.append(options["num_devices"])
        return Meter(**options)

    monkeypatch.setattr(RUN, "Meter", meter)
    env = FakeEnv()
    env.mdp.reward = Served("far", 2)
    start = partial(run, updates=1, progress=False, out=tmp_path)
    start(FakeAlgorithm(env=env), reward_devices=given)
    about = json.loads((tmp_path / "run.json").read_text())
    assert meters == [1 + devices] and about["num_gpus_reward"] == devices and about["remote_rewards"] == ["far"]
    with pytest.raises(ValueError, match="num_gpus_reward"):
        start(FakeAlgorithm(env=env), reward_devices=devices + 1, resume=True)
    with pytest.raises(ValueError, match="reward_devices must be at least 0"):
        start(FakeAlgorithm(env=env), reward_devices=-1, fresh=True)


# ------------------------------------------------------------------ records of older versions, durations


def test_what_an_older_record_does_not_know_counts_as_none():
    new = {"config": {"learning_rate": 0.1, "data_seed": None}, "task": {"guidance_interval": None}, "stops_at": None}
    assert differences({"config": {"learning_rate": 0.1}, "task": {}}, new) == []
    assert differences(new, {"config": {"learning_rate": 0.1}, "task": {}}) == []
    new["config"]["data_seed"] = 3
    assert differences({"config": {"learning_rate": 0.1}}, new) == ["config.data_seed: 'absent' there, 3 given"]


@pytest.mark.parametrize(
    ("text", "value"), [("8.75e-05s", 8.75e-05), ("1e3s", 1000.0), ("1E2", 100.0), ("2.5e+1min", 1500.0), (1e-7, 1e-7)]
)
def test_durations_in_scientific_notation(text, value):
    assert seconds(text) == pytest.approx(value)


def test_a_schedule_of_the_shortest_budget_reads_what_it_writes():
    limit = seconds("0.0007s")
    assert Schedule(None, limit, None).every == pytest.approx(limit / 8)


@pytest.mark.parametrize("text", ["inf", "nan", "infs", float("inf"), float("nan"), "1e999s", "-1e3s", "1e", "e5s"])
def test_durations_without_an_end_are_refused(text):
    with pytest.raises(ValueError, match="is no duration"):
        seconds(text)


# ------------------------------------------------------------------ what update() returns


@pytest.mark.parametrize(("returned", "kind"), [(None, "NoneType"), (0.5, "float"), ([("loss", 1.0)], "list")])
def test_an_update_that_returns_no_mapping_is_named(tmp_path, returned, kind):
    class Mine(FakeAlgorithm):
        def update(self):
            return returned

    with pytest.raises(TypeError, match=rf"^Mine\.update\(\) returned {kind}, expected a mapping of numbers"):
        run(Mine(), out=tmp_path, updates=1, progress=False)
    assert "Mine.update() returned" in json.loads((tmp_path / "FAILED").read_text())["reason"]


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("high", r"'high'"),
        ("1.5", r"'1\.5'"),
        (None, "None"),
        (torch.zeros(3), r"Tensor of shape \[3\]"),
        (np.zeros((2, 2)), r"ndarray of shape \[2, 2\]"),
        ([1.0], r"\[1\.0\]"),
    ],
)
@pytest.mark.parametrize("name", ["mine", "loss"])
def test_a_metric_that_is_no_number_is_named(tmp_path, name, value, found):
    class Mine(FakeAlgorithm):
        def update(self):
            return {**super().update(), name: value}

    with pytest.raises(TypeError, match=rf"update\(\) returned {name} = {found}, expected one number"):
        run(Mine(), out=tmp_path, updates=1, skip_nonfinite=1, progress=False)


def test_metrics_of_one_element_are_numbers():
    given = {"a": torch.tensor([2.0]), "b": np.float32(3), "c": np.array(4), "d": True, "e": math.inf}
    row = Meter(counters=Counters()).row(1, given)
    assert [row[name] for name in given] == [2.0, 3.0, 4.0, 1, None]


# ------------------------------------------------------------------ the KL of the evaluation


def test_the_progress_shows_the_kl_of_the_evaluation(tmp_path, capsys):
    algorithm = FakeAlgorithm()
    evaluator = Evaluator(FakeEnv(counters=algorithm.env.mdp.counters), [0], [5], num_videos=0)
    measured = evaluator.evaluate

    def with_kl(policy):
        found = measured(policy)
        at = {key: found.rows[0][key] for key in ("split", "prompt_id", "noise_seed")}
        found.rows.append({**at, "reward": "kl_ref_nats", "value": 12.5})
        return found

    evaluator.evaluate = with_kl
    start = partial(run, out=tmp_path, evaluate=evaluator, updates=3, eval_every=2)
    result = start(algorithm, checkpoint_every=1)
    said = [line for line in capsys.readouterr().out.splitlines() if "update 1 " in line]
    assert said and "eval kl 12.5" in said[0], said
    assert set(result.scores) == {"proxy", "gold"}


def test_a_kl_that_nobody_measured_is_not_shown(tmp_path, capsys):
    algorithm = FakeAlgorithm()
    evaluator = Evaluator(FakeEnv(counters=algorithm.env.mdp.counters), [0], [5], num_videos=0)
    run(algorithm, out=tmp_path, evaluate=evaluator, updates=1)
    said = capsys.readouterr().out
    assert "eval proxy" in said and "kl" not in said


# ------------------------------------------------------------------ memory of a GPU


def test_memory_of_an_evaluation_is_not_that_of_the_next_update(monkeypatch):
    card = SimpleNamespace(now=0, peak=0)

    def use(amount):
        card.now = amount
        card.peak = max(card.peak, amount)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: card.peak * 2**30)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda *_: card.peak * 2**30)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda *_: setattr(card, "peak", card.now))
    meter = Meter(counters=Counters(), device="cuda")
    with meter.phase("train"):
        use(3), use(1)
    assert meter.row(1, {})["peak_allocated_gib"] == 3.0
    with meter.phase("eval"):
        use(40), use(1)
    with meter.phase("train"):
        use(4), use(1)
    with meter.phase("checkpoint"):
        use(2)
    assert meter.row(2, {})["peak_allocated_gib"] == 4.0


def test_devices_that_are_no_number_are_a_rewards_own_business():
    class Sharded:
        devices = ["cuda:0", "cuda:1"]

    assert remote_parts(Sharded()) == [] and serving_devices(Sharded()) == 0
