"""`algos.run`, its meter, evaluator and checkpoints, against small fakes whose every cost is known."""

from __future__ import annotations

import json
import os
import re
import signal
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from algos import Evaluator, run
from algos.budget import seconds
from algos.checkpoint import DamagedCheckpointError, load_checkpoint, save_checkpoint, split_tensors
from algos.checkpoint_store import best_checkpoint, checkpoints, newest_checkpoint
from algos.meter import COUNTS, METRICS, RESERVED, Meter
from algos.run import run_folder


@dataclass
class Counters:
    videos_sampled: int = 0
    reward_queries: int = 0
    reward_backward_queries: int = 0
    denoiser_forwards: int = 0
    denoiser_backwards: int = 0
    decode_s: float = 0.0
    reward_s: float = 0.0


@dataclass(frozen=True)
class Gold:
    colour: Tensor
    shape: Tensor

    @property
    def total(self) -> Tensor:
        return (self.colour + self.shape) / 2


class FakeEnv:
    """Two steps; the reward is the action plus the prompt's number; the video is grey of the seed's level."""

    group_size = 1
    device = torch.device("cpu")
    split = "test"

    def __init__(self, num_envs: int = 3, counters: Counters | None = None) -> None:
        self.num_envs = num_envs
        self.prompts = [f"prompt {index}" for index in range(6)]
        self.mdp = SimpleNamespace(counters=counters or Counters(), gold=self.gold, decode=self.decode)
        self.mdp.decode_frames, self.mdp.dtype = "all", torch.float32
        self.resets: list[tuple[list[int], list[int]]] = []

    def gold(self, video: Tensor, prompts: list[str]) -> Gold:
        assert prompts == [self.prompts[index] for index in self.prompt_ids]
        return Gold(video.mean((1, 2, 3, 4)), torch.ones(len(prompts)))

    def decode(self, latents: Tensor) -> Tensor:
        return latents.view(-1, 1, 1, 1, 1).expand(-1, 2, 3, 4, 4)

    def reset(self, *, seed: list[int], options: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        self.seeds, self.prompt_ids, self.k = seed, options["prompt_ids"], 0
        assert len(self.seeds) == len(self.prompt_ids) == self.num_envs
        self.resets.append((self.seeds, self.prompt_ids))
        return {"video_seed": torch.tensor(seed)}, {}

    def grey(self) -> Tensor:
        return torch.tensor(self.seeds, dtype=torch.float32) / 10

    def step(self, action: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor, dict[str, Any]]:
        self.k += 1
        done = torch.full((self.num_envs,), self.k == 2)
        self.mdp.counters.denoiser_forwards += self.num_envs
        reward, info = torch.zeros(self.num_envs), {}
        if self.k == 2:
            self.mdp.counters.videos_sampled += self.num_envs
            self.mdp.counters.reward_queries += self.num_envs
            reward = action + torch.tensor(self.prompt_ids, dtype=torch.float32)
            seen = self.decode(self.grey())
            if self.mdp.decode_frames != "all":
                seen = torch.full_like(seen[:, :1], 0.9)
            info = {"reward_parts": {"HPS": reward}, "video": seen}
        return (
            {"video_seed": torch.tensor(self.seeds), "latents": self.grey()},
            reward,
            done,
            torch.zeros_like(done),
            info,
        )


class FakePolicy:
    def __init__(self, value: float = 0.5) -> None:
        self.value = value

    def __call__(self, obs: dict[str, Tensor]) -> Tensor:
        assert not torch.is_grad_enabled()
        return torch.full((len(obs["video_seed"]),), self.value)

    def save(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "adapter.txt").write_text(str(self.value))

    def load(self, folder: Path) -> None:
        self.value = float((folder / "adapter.txt").read_text())


@dataclass(frozen=True, kw_only=True)
class FakeConfig:
    learning_rate: float = 0.1
    layers: tuple[str, ...] = ("a", "b")


@dataclass
class FakeAlgorithm:
    """Each update costs 4 videos and moves the policy; `hooks` may break in at an update."""

    env: FakeEnv = field(default_factory=FakeEnv)
    policy: FakePolicy = field(default_factory=FakePolicy)
    config: FakeConfig = FakeConfig()
    hooks: dict[int, Any] = field(default_factory=dict)
    rewards: list[float] = field(default_factory=list)
    done: int = 0

    def update(self) -> dict[str, Any]:
        counters = self.env.mdp.counters
        counters.videos_sampled += 4
        counters.reward_queries += 4
        counters.denoiser_forwards += 8
        counters.denoiser_backwards += 8
        self.policy.value += 0.25
        if self.done + 1 in self.hooks:
            self.hooks[self.done + 1]()
        self.done += 1
        reward = self.rewards[self.done - 1] if self.rewards else self.policy.value
        return {"reward_mean": reward, "loss": torch.tensor(-reward), "mine": 1}

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done, "moments": {0: torch.full((2,), float(self.done))}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = state["done"]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_meter_counts_training_only_and_splits_its_time() -> None:
    counters, clock = Counters(), Clock()
    cpu = Clock()
    meter = Meter(counters=counters, clock=clock, cpu_clock=cpu, num_devices=2)
    with meter.phase("setup"):
        clock.now += 3
        cpu.now += 100
    with meter.phase("train"):
        clock.now += 10
        cpu.now += 8
        counters.reward_queries += 5
        counters.denoiser_backwards += 7
        counters.decode_s += 1.5
        counters.reward_s += 2.5
    with meter.phase("eval"):
        clock.now += 4
        counters.reward_queries += 100  # the same networks may serve the evaluation: not a training cost
        counters.reward_s += 50
    row = meter.row(1, {"reward_mean": float("nan"), "loss": 2.0, "mine": torch.tensor(3.0)})
    assert (row["reward_queries"], row["denoiser_backwards"], row["videos_sampled"]) == (5, 7, 0)
    assert (row["decode_s"], row["reward_s"], row["rollout_s"], row["update_s"]) == (1.5, 2.5, None, 6.0)
    assert (row["setup_s"], row["train_s"], row["eval_s"], row["wall_s"]) == (3.0, 10.0, 4.0, 17.0)
    assert row["device_s"] == row["cpu_s"] == 8.0  # of a CPU: the work, not the time it took
    meter.device = torch.device("meta")  # anything else is held, and for the wall time
    assert meter.device_s == 20.0
    assert (row["reward_mean"], row["nan_values"], row["loss"], row["mine"]) == (None, 1, 2.0, 3.0)
    assert row["ratio_mean"] is None
    assert set(row) == RESERVED | set(METRICS) | {"mine"}
    assert 0 < row["peak_rss_gib"] < 1000


def test_meter_takes_the_rollout_clock_of_an_environment_that_has_one() -> None:
    @dataclass
    class Clocked(Counters):
        rollout_s: float = 0.0

    counters, clock = Clocked(), Clock()
    meter = Meter(counters=counters, clock=clock)
    with meter.phase("train"):
        clock.now += 10
        counters.rollout_s += 3
        counters.reward_s += 1
    row = meter.row(1, {})
    assert (row["rollout_s"], row["reward_s"], row["update_s"]) == (3.0, 1.0, 6.0)


def test_meter_adds_time_of_a_body_that_raises_and_continues_from_its_state() -> None:
    counters, clock = Counters(), Clock()
    meter = Meter(counters=counters, clock=clock, cpu_clock=clock)
    with pytest.raises(RuntimeError), meter.phase("train"):
        clock.now += 2
        counters.videos_sampled += 1
        raise RuntimeError
    later = Meter(counters=Counters(), clock=clock)
    later.load_state_dict(json.loads(json.dumps(meter.state_dict())))
    clock.now += 5
    assert (later.device_s, later.totals["videos_sampled"], later.wall_s) == (2.0, 1, 7.0)


def test_meter_refuses_what_it_cannot_tell_apart() -> None:
    meter = Meter(counters=Counters())
    with pytest.raises(ValueError, match="reward_queries"):
        meter.row(1, {"reward_queries": 3})
    with pytest.raises(ValueError, match="unknown phase 'sleep'"), meter.phase("sleep"):
        pass
    with pytest.raises(TypeError, match="videos_sampled.*env.mdp.counters"):
        Meter(counters=object())


def test_evaluator_pairs_every_prompt_with_every_seed_in_chunks() -> None:
    env = FakeEnv(num_envs=3)
    found = Evaluator(env, [4, 1], [2, 7], num_videos=2).evaluate(FakePolicy())
    # Two chunks of three; the second is filled up, and what fills it is not reported.
    assert env.resets == [([2, 7, 2], [4, 4, 1]), ([7, 7, 7], [1, 1, 1])]
    proxy = {(r["prompt_id"], r["noise_seed"]): r["value"] for r in found.rows if r["reward"] == "proxy"}
    assert proxy == {(4, 2): 4.5, (4, 7): 4.5, (1, 2): 1.5, (1, 7): 1.5}
    gold = {(r["prompt_id"], r["noise_seed"]): r["value"] for r in found.rows if r["reward"] == "gold"}
    assert gold == pytest.approx({(4, 2): 0.6, (4, 7): 0.85, (1, 2): 0.6, (1, 7): 0.85})
    assert {r["reward"] for r in found.rows} == {"proxy", "proxy/HPS", "gold", "gold/colour", "gold/shape", "motion"}
    assert len(found.rows) == 6 * 4 and {r["split"] for r in found.rows} == {"test"}
    assert found.mean() == 3.0
    assert found.videos is not None and found.videos.shape == (2, 2, 4, 4, 3) and found.videos.dtype == np.uint8
    assert found.pairs == [(4, 2), (1, 2)] and found.prompts == ["prompt 4", "prompt 1"]
    assert (found.videos == 51).all()


def test_the_gold_score_sees_the_whole_video_where_the_reward_sees_one_frame() -> None:
    env = FakeEnv()
    env.mdp.decode_frames = "random1"
    found = Evaluator(env, [0], [2], num_videos=1).evaluate(FakePolicy())
    assert found.mean("gold/colour") == pytest.approx(0.2)
    assert found.videos is not None and found.videos.shape == (1, 2, 4, 4, 3) and (found.videos == 51).all()


def test_evaluator_refuses_pairs_it_cannot_place() -> None:
    env = FakeEnv()
    with pytest.raises(ValueError, match="without repeats"):
        Evaluator(env, [1, 1])
    with pytest.raises(ValueError, match="not in env.prompts"):
        Evaluator(env, [6])
    env.group_size = 3
    with pytest.raises(ValueError, match=r"env.derive\(group_size=1\)"):
        Evaluator(env, [1])


def test_a_run_in_updates_writes_the_whole_record(tmp_path: Path) -> None:
    algorithm = FakeAlgorithm()
    evaluator = Evaluator(FakeEnv(counters=algorithm.env.mdp.counters), [0, 1], [5], num_videos=1)
    out = run_folder(tmp_path, "demo", "fake", "Task", 3)
    assert out == tmp_path / "demo/fake/Task/seed_3"
    task = {"env_id": "Fake-Env"}
    result = run(algorithm, out=out, updates=5, evaluate=evaluator, eval_every=2, seed=3, task=task, progress=False)
    assert (result.ended, result.updates, result.interrupted) == ("updates", 5, False)
    assert result.scores == pytest.approx({"proxy": 0.5 + 5 * 0.25 + 0.5, "gold": 0.75})

    about = json.loads((out / "run.json").read_text())
    assert about["config"] == {"learning_rate": 0.1, "layers": ["a", "b"]}
    assert (about["algo"], about["seed"], about["budget_updates"]) == ("fakealgorithm", 3, 5)
    assert about["task"]["env_id"] == "Fake-Env" and about["task"]["eval_noise_seeds"] == [5]
    assert about["task"]["eval_split"] == "test" and list(about["task"]["eval_splits"]) == ["test"]
    # The fake has no network whose operations could be counted.
    assert "decode was not measured: AttributeError" in about["flops_note"]
    assert {"git_commit", "python", "torch", "packages", "cpu_threads", "dtype", "started_utc"} <= set(about)
    assert os.uname().nodename not in (out / "run.json").read_text().split('"')

    train = rows(out / "train.jsonl")
    assert [row["update"] for row in train] == [1, 2, 3, 4, 5]
    # Exact although every evaluation moves the same counters.
    assert [row["reward_queries"] for row in train] == [4, 8, 12, 16, 20]
    assert [row["denoiser_forwards"] for row in train] == [8, 16, 24, 32, 40]
    assert [row["reward_mean"] for row in train] == [0.75, 1.0, 1.25, 1.5, 1.75]
    assert all(later["device_s"] >= row["device_s"] for row, later in zip(train, train[1:], strict=False))
    assert set(COUNTS) <= set(train[0])

    evals = rows(out / "eval.jsonl")
    assert sorted({row["update"] for row in evals}) == [0, 2, 4, 5]
    assert set(evals[0]) == {
        "update", "device_s", "cpu_s", "reward_queries", "denoiser_forwards", "denoiser_backwards", "flops",
        "denoiser_flops", "split", "reward", "prompt_id", "noise_seed", "value",
    }  # fmt: skip
    first = [row for row in evals if row["update"] == 0]
    assert {row["device_s"] for row in first} == {0.0} and {row["reward_queries"] for row in first} == {0}
    assert train[0]["eval_s"] > 0

    assert json.loads((out / "DONE").read_text())["reason"] == "updates"
    with np.load(out / "samples" / "eval_000004.npz", allow_pickle=False) as kept:
        assert kept["videos"].shape == (1, 2, 4, 4, 3) and kept["prompts"].tolist() == ["prompt 0"]
    state = load_checkpoint(newest_checkpoint(out))
    assert state["update"] == 5 and state["algorithm"]["moments"][0].tolist() == [5.0, 5.0]
    assert (newest_checkpoint(out) / "policy" / "adapter.txt").read_text() == "1.75"
    assert [path.name for path in sorted((out / "checkpoints").iterdir())] == ["000004", "000005", "best.json"]
    assert best_checkpoint(out) == newest_checkpoint(out) and not list(out.rglob("*.part"))


def test_a_budget_in_device_seconds_ends_with_the_update_that_crosses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(
        import_module("algos.run"), "Meter", lambda **options: Meter(clock=clock, cpu_clock=clock, **options)
    )
    algorithm = FakeAlgorithm(hooks={n: lambda: setattr(clock, "now", clock.now + 4) for n in range(1, 20)})
    evaluator = Evaluator(FakeEnv(), [0])
    slow = evaluator.evaluate

    def evaluate(policy: Any) -> Any:
        clock.now += 1000  # evaluation is not charged
        return slow(policy)

    evaluator.evaluate = evaluate  # type: ignore[method-assign]
    result = run(algorithm, out=tmp_path, budget="10s", evaluate=evaluator, eval_every="3s", progress=False)
    assert (result.ended, result.updates, result.device_s) == ("budget", 3, 12.0)
    # Each update takes longer than the interval: one evaluation after each, none twice.
    assert [row["update"] for row in rows(tmp_path / "eval.jsonl") if row["reward"] == "proxy"] == [0, 1, 2, 3]
    assert [row["device_s"] for row in rows(tmp_path / "train.jsonl")] == [4.0, 8.0, 12.0]


def test_nan_rewards_are_null_and_counted(tmp_path: Path) -> None:
    algorithm = FakeAlgorithm(rewards=[1.0, float("nan"), 2.0])
    algorithm.hooks = {3: lambda: setattr(algorithm.policy, "value", float("nan"))}
    run(algorithm, out=tmp_path, updates=3, evaluate=Evaluator(FakeEnv(), [0, 1]), eval_every=99, progress=False)
    train = rows(tmp_path / "train.jsonl")
    assert [row["reward_mean"] for row in train] == [1.0, None, 2.0]
    assert [row["nan_values"] for row in train] == [0, 2, 2]
    last = [row for row in rows(tmp_path / "eval.jsonl") if row["update"] == 3]
    assert [row["value"] for row in last if row["reward"] == "proxy"] == [None, None]
    assert all(row["value"] is not None for row in last if row["reward"] == "gold")
    assert "NaN" not in (tmp_path / "train.jsonl").read_text() + (tmp_path / "eval.jsonl").read_text()
    assert json.loads((tmp_path / "DONE").read_text())["nan_values"] == 2 + 4  # proxy and proxy/HPS of two prompts


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_finishes_the_update(tmp_path: Path, number: int) -> None:
    before = signal.getsignal(number)
    algorithm = FakeAlgorithm(hooks={2: lambda: os.kill(os.getpid(), number)})
    result = run(algorithm, out=tmp_path, updates=9, evaluate=Evaluator(FakeEnv(), [0]), eval_every=1, progress=False)
    assert result.interrupted and result.updates == 2
    assert [row["update"] for row in rows(tmp_path / "train.jsonl")] == [1, 2]
    assert json.loads((tmp_path / "INTERRUPTED").read_text())["videos_sampled"] == 8
    assert not (tmp_path / "DONE").exists()
    assert load_checkpoint(newest_checkpoint(tmp_path))["algorithm"]["done"] == 2
    assert signal.getsignal(number) is before


def test_the_second_signal_drops_the_update(tmp_path: Path) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the second signal must not return")

    algorithm = FakeAlgorithm(hooks={3: twice})
    result = run(algorithm, out=tmp_path, updates=9, checkpoint_every=2, progress=False)
    assert result.interrupted and result.updates == 2
    assert [row["update"] for row in rows(tmp_path / "train.jsonl")] == [1, 2]
    # The dropped update's cost was spent all the same; its half-changed weights are not kept.
    assert json.loads((tmp_path / "INTERRUPTED").read_text())["videos_sampled"] == 12
    assert load_checkpoint(newest_checkpoint(tmp_path))["update"] == 2


def test_a_signal_breaks_off_an_evaluation_without_half_of_its_rows(tmp_path: Path) -> None:
    algorithm = FakeAlgorithm()
    evaluator = Evaluator(FakeEnv(num_envs=1), [0, 1, 2])
    step, calls = evaluator.env.step, []

    def interrupted(action: Tensor) -> Any:
        calls.append(1)
        if len(calls) == 6 + 4:  # the second prompt of the second evaluation
            os.kill(os.getpid(), signal.SIGINT)
        return step(action)

    evaluator.env.step = interrupted
    result = run(algorithm, out=tmp_path, updates=9, evaluate=evaluator, eval_every=1, progress=False)
    assert result.interrupted and result.updates == 1
    assert {row["update"] for row in rows(tmp_path / "eval.jsonl")} == {0}
    assert load_checkpoint(newest_checkpoint(tmp_path))["update"] == 1


def test_a_crash_is_recorded_and_raised(tmp_path: Path) -> None:
    def crash() -> None:
        raise FloatingPointError("gradient is not finite")

    with pytest.raises(FloatingPointError):
        run(FakeAlgorithm(hooks={2: crash}), out=tmp_path, updates=3, progress=False)
    failed = json.loads((tmp_path / "FAILED").read_text())
    assert failed["reason"] == "FloatingPointError: gradient is not finite" and failed["update"] == 1
    assert len(rows(tmp_path / "train.jsonl")) == 1 and not (tmp_path / "DONE").exists()


@pytest.mark.parametrize(("every", "kept"), [(None, [2, 4, 5]), (3, [3, 5]), (0, [5]), (5, [5])])
def test_checkpoints_come_with_the_evaluations_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int | None, kept: list[int]
) -> None:
    clock, saved = Clock(), []

    def save(folder: Path, state: dict[str, Any], policy: Any) -> None:
        clock.now += 7
        saved.append(state["update"])

    monkeypatch.setattr(import_module("algos.checkpoint_store"), "save_checkpoint", save)
    monkeypatch.setattr(
        import_module("algos.run"), "Meter", lambda **options: Meter(clock=clock, cpu_clock=clock, **options)
    )
    run(FakeAlgorithm(), out=tmp_path, updates=5, eval_every=2, checkpoint_every=every, progress=False)
    assert saved == kept
    done = json.loads((tmp_path / "DONE").read_text())
    assert (done["checkpoint_s"], done["device_s"]) == (7 * len(kept), 0)  # timed, and not charged


def test_the_last_checkpoints_and_the_best_one_are_kept(tmp_path: Path) -> None:
    algorithm = FakeAlgorithm()

    def move(by: float) -> Any:
        return lambda: setattr(algorithm.policy, "value", algorithm.policy.value + by)

    algorithm.hooks = {4: move(-9.0), 6: move(-1.0)}
    evaluator = Evaluator(FakeEnv(), [0])
    run(algorithm, out=tmp_path, updates=7, evaluate=evaluator, eval_every=1, checkpoint_every=2, progress=False)
    # Update 3 evaluated best, and was not due for a checkpoint.
    assert list(checkpoints(tmp_path)) == [3, 6, 7] and best_checkpoint(tmp_path).name == "000003"
    assert json.loads((tmp_path / "checkpoints/best.json").read_text()) == {"update": 3, "reward": 1.25}
    assert load_checkpoint(best_checkpoint(tmp_path))["algorithm"]["done"] == 3
    run(FakeAlgorithm(), out=tmp_path / "b", updates=7, checkpoint_every=1, keep_checkpoints=3, progress=False)
    assert list(checkpoints(tmp_path / "b")) == [5, 6, 7]
    with pytest.raises(FileNotFoundError, match="no evaluated checkpoint"):
        best_checkpoint(tmp_path / "b")
    with pytest.raises(FileNotFoundError, match="stopped before its first one"):
        newest_checkpoint(tmp_path / "c")


@pytest.mark.parametrize(("fails_at", "kept"), [(3, 2), (2, 2), (5, 5)])
def test_a_failed_run_keeps_its_state(tmp_path: Path, fails_at: int, kept: int) -> None:
    algorithm = FakeAlgorithm()
    evaluator = Evaluator(FakeEnv(), [0])
    works = evaluator.evaluate

    def evaluate(policy: Any) -> Any:
        if algorithm.done == fails_at:
            raise RuntimeError("out of memory")
        return works(policy)

    def crash() -> None:
        raise RuntimeError("gradient")

    evaluator.evaluate = evaluate  # type: ignore[method-assign]
    algorithm.hooks = {4: crash} if fails_at == 3 else {}
    with pytest.raises(RuntimeError):
        run(algorithm, out=tmp_path, updates=5, evaluate=evaluator, eval_every=2, progress=False)
    assert (tmp_path / "FAILED").exists() and load_checkpoint(newest_checkpoint(tmp_path))["update"] == kept


def test_a_folder_holds_one_run(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    run(FakeAlgorithm(), out=tmp_path, updates=3, progress=False)
    with pytest.raises(ValueError, match="already holds a run"):
        run(FakeAlgorithm(), out=tmp_path, updates=1, progress=False)
    run(FakeAlgorithm(), out=tmp_path, updates=1, fresh=True, progress=False)
    assert len(rows(tmp_path / "train.jsonl")) == 1
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_run_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs an end"):
        run(FakeAlgorithm(), out=tmp_path)
    with pytest.raises(ValueError, match="'90s' or '2min'"):
        run(FakeAlgorithm(), out=tmp_path, budget="fast")
    with pytest.raises(ValueError, match="updates must be at least 1"):
        run(FakeAlgorithm(), out=tmp_path, updates=0)
    with pytest.raises(ValueError, match="checkpoint_every must be at least 0"):
        run(FakeAlgorithm(), out=tmp_path, updates=1, checkpoint_every=-1)
    with pytest.raises(ValueError, match="eval_every must be positive"):
        run(FakeAlgorithm(), out=tmp_path, updates=1, eval_every=0)
    bare = SimpleNamespace(update=dict, state_dict=dict, load_state_dict=None, policy=FakePolicy())
    with pytest.raises(TypeError, match="no attribute 'env'"):
        run(bare, out=tmp_path, updates=1)
    assert not (tmp_path / "run.json").exists()
    run(bare, out=tmp_path, updates=1, env=FakeEnv(), progress=False)


@pytest.mark.parametrize(
    ("text", "value"), [("90s", 90), ("2min", 120), ("1.5h", 5400), ("45", 45), (30, 30), (0.5, 0.5)]
)
def test_durations(text: str | float, value: float) -> None:
    assert seconds(text) == value


@pytest.mark.parametrize("text", ["", "0s", "-1s", "2 weeks", "s", "1.2.3s", "nan"])
def test_durations_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="is no duration"):
        seconds(text)


def test_one_line_an_update_without_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(FakeAlgorithm(), out=tmp_path, updates=2, evaluate=Evaluator(FakeEnv(), [0]), eval_every=9, algo="mine")
    lines = capsys.readouterr().out.splitlines()
    shown = [re.sub(r"(videos/s \S+  )?GiB \S+", "GiB *", line) for line in lines if "evaluation" not in line]
    assert shown == [
        "mine  update 1  1/2 updates (1 left)  reward 0.75  GiB *  eval proxy 0.5  eval gold 0.5",
        "mine  update 2  2/2 updates (0 left)  reward 1  GiB *  eval proxy 0.5  eval gold 0.5",
    ]


def test_checkpoints_come_back_as_they_were(tmp_path: Path) -> None:
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    state = {
        "optimizer": optimizer.state_dict(),
        "views": [weight, weight[:, 1:], weight.T],  # shared memory
        "rng": torch.Generator().manual_seed(5).get_state(),
        "none": None,
        "pair": (1, "two", 3.5),
        "flag": True,
    }
    folder = tmp_path / "checkpoint"
    save_checkpoint(folder, {"old": 1})
    save_checkpoint(folder, state)
    found = load_checkpoint(folder)
    assert found["pair"] == (1, "two", 3.5) and found["none"] is None and found["flag"] is True
    assert all(torch.equal(a, b) for a, b in zip(found["views"], state["views"], strict=True))
    assert torch.equal(found["rng"], state["rng"]) and found["rng"].dtype == torch.uint8
    assert torch.equal(found["optimizer"]["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])
    torch.optim.AdamW([parameter]).load_state_dict(found["optimizer"])
    with pytest.raises(TypeError, match="SimpleNamespace"):
        split_tensors({"a": [SimpleNamespace()]}, {})


def test_a_checkpoint_survives_a_crash_while_the_next_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    save_checkpoint(folder, {"update": 1})
    with pytest.raises(TypeError):
        save_checkpoint(folder, {"update": 2, "bad": object()})
    assert load_checkpoint(folder)["update"] == 1
    folder.rename(tmp_path / "checkpoint.old")  # between the two renames
    assert load_checkpoint(folder)["update"] == 1
    save_checkpoint(folder, {"update": 3})
    assert load_checkpoint(folder)["update"] == 3
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load_checkpoint(tmp_path / "other")


def break_file(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        path.write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])


@pytest.mark.parametrize("how", ["missing", "cut", "one bit"])
@pytest.mark.parametrize("name", ["state.json", "tensors.safetensors", "policy/adapter.txt", "manifest.json"])
def test_damage_of_a_checkpoint_is_seen(tmp_path: Path, name: str, how: str) -> None:
    folder = tmp_path / "checkpoint"
    save_checkpoint(folder, {"update": 1, "tensor": torch.ones(3)}, FakePolicy())
    assert load_checkpoint(folder)["tensor"].tolist() == [1, 1, 1]
    break_file(folder / name, how)
    with pytest.raises(DamagedCheckpointError, match=name.replace(".", r"\.")):
        load_checkpoint(folder)
