"""A reward behind HTTP: the real server on this machine, and one that is slow, dies, lies, or miscounts."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import served
from torch import Tensor

import vdm_env
from vdm_env.errors import RemoteRewardError
from vdm_env.registry import make_reward
from vdm_env.rewards import RemoteReward, WeightedSum, as_reward, score_parts
from vdm_env.rewards.combine import Part
from vdm_env.rewards.server import RewardServer
from vdm_env.rewards.wire import Retries, pack_request, pack_scores, side_by_side, unpack_request, unpack_scores

PROMPTS = ["a red circle moving left", "a blue square moving right", "a green cross moving up"]
FAST = Retries(attempts=3, timeout_s=5.0, wait_s=0.5, max_wait_s=4.0)


def videos(count: int = 3) -> Tensor:
    return torch.rand(count, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def brightness(video: Tensor, prompts: list[str]) -> Tensor:
    """Also says which prompt it was."""
    return video.mean((1, 2, 3, 4)) + torch.tensor([float(len(p)) for p in prompts])


@pytest.fixture
def server() -> Iterator[RewardServer]:
    reward = as_reward(brightness, name="Bright", frames="random1", range=(0.0, float("inf")))
    with served(RewardServer(reward)) as running:
        yield running


class Scripted(ThreadingHTTPServer):
    """Answers /score by what `behaviour` does with the number of the request and its content; remembers the times."""

    daemon_threads = True

    def __init__(self, behaviour: Callable[[int, bytes], tuple[int, bytes]]) -> None:
        self.behaviour, self.count, self.lock = behaviour, 0, threading.Lock()
        self.headers: dict[str, str] = {}
        super().__init__(("127.0.0.1", 0), ScriptedHandler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class ScriptedHandler(BaseHTTPRequestHandler):
    server: Scripted

    def do_GET(self) -> None:
        self.answer(200, json.dumps({"name": "Scripted", "range": ["-inf", "inf"], "frames": "all"}).encode())

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:
            self.server.count += 1
            number = self.server.count
        status, answer = self.server.behaviour(number, content)
        if status:
            self.answer(status, answer)
        else:  # hangs up in the middle
            self.close_connection = True

    def answer(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for key, value in self.server.headers.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None: ...


def right(content: bytes) -> bytes:
    scores = brightness(*unpack_request(content))
    return pack_scores(scores, {})


def wrong(kind: str, content: bytes) -> tuple[int, bytes]:
    scores = brightness(*unpack_request(content))
    return {
        "error": (500, b'{"error": "out of memory"}'),
        "busy": (503, b"try later"),
        "hangs up": (0, b""),
        "nan": (200, pack_scores(scores * float("nan"), {})),
        "infinite part": (200, pack_scores(scores, {"p": scores / 0})),
        "count": (200, pack_scores(scores[:-1], {})),
        "integers": (200, pack_scores(scores.long(), {})),
        "no tensors": (200, b"not a tensor"),
        "no scores": (200, pack_request(torch.zeros(1), [])),
    }[kind]


KINDS = {
    "error": "HTTP 500: out of memory",
    "busy": "HTTP 503: try later",
    "hangs up": "closed connection|reset",
    "nan": r"scores that are not finite for videos \[0, 1, 2\] of 3",
    "infinite part": "p that are not finite",
    "count": r"scores of shape \[2\].*for 3 videos",
    "integers": r"torch\.int64 for 3 videos",
    "no tensors": "12 bytes that are no safetensors",
    "no scores": "without scores",
}


def client(url: str, waits: list[float] | None = None, **options: Any) -> RemoteReward:
    record = [] if waits is None else waits
    return RemoteReward(url, **({"retries": FAST, "sleep": record.append} | options))


# ---- the real server ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "concurrency"), [(8, 1), (2, 2), (1, 4)])
def test_scores_are_the_rewards_own(server: RewardServer, batch: int, concurrency: int) -> None:
    reward = client(server.url, batch=batch, concurrency=concurrency)
    assert (reward.name, reward.frames, reward.range) == ("Bright", "random1", (0.0, float("inf")))
    assert not reward.differentiable
    assert torch.equal(reward(videos(), PROMPTS), brightness(videos(), PROMPTS))
    order = [2, 0, 1]
    assert torch.equal(reward(videos()[order], [PROMPTS[i] for i in order]), brightness(videos(), PROMPTS)[order])
    vdm_env.check_reward(reward, prompts=PROMPTS, size=(2, 8, 8))


def test_parts_and_payloads(server: RewardServer) -> None:
    total = WeightedSum([Part(reward=as_reward(brightness, name=n), weight=w) for n, w in (("a", 2.0), ("b", -1.0))])
    server.reward = total
    reward = client(server.url, batch=2)
    scores, parts = score_parts(reward, videos(), PROMPTS)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, brightness(videos(), PROMPTS))
    assert list(parts) == ["a", "b"] and torch.equal(parts["a"], brightness(videos(), PROMPTS))
    for payload, tolerance in (("float16", 1e-3), ("uint8", 1 / 255)):
        found = client(server.url, payload=payload)(videos(), PROMPTS)
        torch.testing.assert_close(found, scores, rtol=0, atol=tolerance)
        assert not torch.equal(found, scores)


def test_what_the_server_refuses_is_not_tried_again(server: RewardServer) -> None:
    waits: list[float] = []
    reward = client(server.url, waits)
    server.reward = as_reward(lambda video, prompts: video.sum())  # its own contract broken: no retry helps
    with pytest.raises(RemoteRewardError, match=r"refused.*HTTP 400.*one score a video"):
        reward(videos(), PROMPTS)
    assert waits == []

    def broken(video: Tensor, prompts: list[str]) -> Tensor:
        raise RuntimeError("no memory")

    server.reward = as_reward(broken)
    with pytest.raises(RemoteRewardError, match=r"3 attempts.*HTTP 500: RuntimeError: no memory"):
        reward(videos(), PROMPTS)
    reward.url += "/elsewhere"
    with pytest.raises(RemoteRewardError, match="refused"):
        reward(videos(), PROMPTS)


def test_no_server_and_no_reward_are_named() -> None:
    waits: list[float] = []
    with pytest.raises(
        RemoteRewardError, match=r"http://127\.0\.0\.1:9/health in 3 attempts.*see that the server runs"
    ):
        client("http://127.0.0.1:9", waits)
    assert waits == [0.5, 1.0]
    for bad in ({"url": "ftp://x"}, {"url": "http://x", "batch": 0}, {"url": "http://x", "payload": "pickle"}):
        with pytest.raises(ValueError, match="expected"):
            RemoteReward(**bad)
    for bad_times in ({"attempts": 0}, {"deadline_s": 0.0}, {"timeout_s": 0.0}, {"wait_s": 40.0}):
        with pytest.raises(ValueError, match="attempts >= 1, timeout_s and deadline_s > 0"):
            Retries(**bad_times)  # type: ignore[arg-type]


# ---- servers that fail -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_failure_that_passes_is_survived(kind: str) -> None:
    waits: list[float] = []
    behaviour = lambda number, content: wrong(kind, content) if number < 3 else (200, right(content))  # noqa: E731
    with served(Scripted(behaviour)) as scripted:
        scores = client(scripted.url, waits)(videos(), PROMPTS)
    assert torch.equal(scores, brightness(videos(), PROMPTS))
    assert waits == [0.5, 1.0] and scripted.count == 3


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_failure_that_stays_ends_in_one_clear_error(kind: str) -> None:
    waits: list[float] = []
    with served(Scripted(lambda number, content: wrong(kind, content))) as scripted:
        reward = client(scripted.url, waits)
        with pytest.raises(RemoteRewardError, match=f"'Scripted'.*3 attempts.*({KINDS[kind]})") as caught:
            reward(videos(), PROMPTS)
    assert scripted.count == 3 and len(waits) == 2 and "make the same call again" in str(caught.value)


def test_a_slow_server_times_out() -> None:
    release = threading.Event()

    def behaviour(number: int, content: bytes) -> tuple[int, bytes]:
        if number == 1:
            release.wait(10)
        return 200, right(content)

    with served(Scripted(behaviour)) as scripted:
        reward = client(scripted.url, retries=Retries(attempts=2, timeout_s=0.3, wait_s=0.0))
        started = time.monotonic()
        assert torch.equal(reward(videos(), PROMPTS), brightness(videos(), PROMPTS))
        assert time.monotonic() - started < 8 and scripted.count == 2
        release.set()


def test_waits_double_up_to_the_most_and_heed_the_server() -> None:
    waits: list[float] = []
    with served(Scripted(lambda number, content: (503, b""))) as scripted:
        reward = client(scripted.url, waits, retries=Retries(attempts=6, timeout_s=5, wait_s=1.0, max_wait_s=5.0))
        with pytest.raises(RemoteRewardError):
            reward(videos(), PROMPTS)
        assert waits == [1.0, 2.0, 4.0, 5.0, 5.0]
        waits.clear()
        scripted.headers["Retry-After"] = "3"
        with pytest.raises(RemoteRewardError):
            reward(videos(), PROMPTS)
        assert waits == [3.0, 3.0, 4.0, 5.0, 5.0]


def test_concurrency_is_bounded_and_an_error_stops_the_rest() -> None:
    running, most, lock = [0], [0], threading.Lock()

    def work(item: int) -> int:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.01)
        with lock:
            running[0] -= 1
        return item * item

    assert side_by_side(work, range(12), 3) == [i * i for i in range(12)] and most[0] == 3
    seen: list[int] = []

    def fails(item: int) -> int:
        seen.append(item)
        if item == 0:
            raise KeyError(item)
        time.sleep(0.05)
        return item

    with pytest.raises(KeyError):
        side_by_side(fails, range(50), 2)
    assert len(seen) < 10


def test_a_run_goes_on_where_the_server_came_back() -> None:
    """Nothing was counted and nothing learned: the episode is played again, and scored as it would have been."""
    down = threading.Event()
    down.set()
    behaviour = lambda number, content: (503, b"") if down.is_set() else (200, right(content))  # noqa: E731
    with served(Scripted(behaviour)) as scripted:
        env = vdm_env.make(
            model="MovingShapes", prompts=PROMPTS, num_envs=2, num_steps=1, seed=3, reward=client(scripted.url)
        )
        action = torch.zeros(2, *env.mdp.latent_shape)
        obs, _ = env.reset(seed=3)
        with pytest.raises(RemoteRewardError):
            env.step(action)
        assert env.mdp.counters.reward_queries == 0
        down.clear()
        again, _ = env.reset(seed=3)
        assert all(torch.equal(obs[key], again[key]) for key in obs)
        _, reward, _, _, info = env.step(action)
    assert torch.equal(reward, brightness(info["video"], [env.mdp.prompts[int(i)] for i in again["prompt_id"]]))


# ---- what travels ------------------------------------------------------------------------------------------------


def test_round_trips_without_pickle() -> None:
    texts = ['a "dog" \U0001f415', "", "line\nbreak"]
    content = pack_request(videos(), texts)
    video, prompts = unpack_request(content)
    assert torch.equal(video, videos()) and prompts == texts and b"pickle" not in content
    scores, parts = unpack_scores(pack_scores(torch.arange(3.0), {"p": torch.ones(3)}), 3)
    assert scores.tolist() == [0, 1, 2] and parts["p"].tolist() == [1, 1, 1]


@pytest.mark.slow
def test_the_command_serves_and_make_reward_builds_the_same() -> None:
    code = Path(__file__).parents[1]
    command = [sys.executable, "-m", "vdm_env.rewards.server", "MovingShapes-Brightness", "--port", "0"]
    process = subprocess.Popen(command, cwd=code, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        assert line.startswith("Brightness at http://127.0.0.1:")
        found = client(line.split(" at ")[1])(videos(), PROMPTS)
    finally:
        process.kill()
        process.communicate()
    assert torch.equal(found, make_reward("Brightness")(videos(), PROMPTS))


def test_make_reward_knows_worlds() -> None:
    own = make_reward("MovingShapes-HPS+0.5*Brightness")
    env = vdm_env.make("MovingShapes-HPS+0.5*Brightness", num_envs=1)
    assert own.name == env.mdp.reward.name
    assert torch.equal(own(videos(), PROMPTS), env.mdp.reward(videos(), PROMPTS))
    with pytest.raises(ValueError, match="unknown reward 'HSP'.*did you mean HPS"):
        make_reward("HSP")
