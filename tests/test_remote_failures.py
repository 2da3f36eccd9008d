"""A reward server that drips, hangs, dies or computes NaN: every wait is bounded, and a run goes on afterwards."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from serving import served
from torch import Tensor

import vdm_env
from vdm_env.errors import RemoteRewardError
from vdm_env.rewards import RemoteReward, as_reward
from vdm_env.rewards.server import RewardServer
from vdm_env.rewards.wire import Retries, pack_scores

PROMPTS = ["a red circle moving left", "a blue square moving right"]
QUICK = Retries(attempts=2, timeout_s=5.0, deadline_s=0.5, wait_s=0.0)


def videos(count: int = 2) -> Tensor:
    return torch.rand(count, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def brightness(video: Tensor, prompts: list[str]) -> Tensor:
    return video.mean((1, 2, 3, 4))


@contextmanager
def raw_server(answer: Callable[[socket.socket, threading.Event], None]) -> Iterator[str]:
    """Answers /health as a reward does, and leaves the bytes of everything else to `answer`."""
    over = threading.Event()
    health = json.dumps({"name": "Raw", "range": ["-inf", "inf"], "frames": "all"}).encode()
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(connection: socket.socket) -> None:
        with connection:
            try:
                if connection.recv(65536).startswith(b"GET /health"):
                    head = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(health)
                    connection.sendall(head + health)
                else:
                    answer(connection, over)
            except OSError:
                pass  # the client has hung up

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        over.set()
        listener.close()


def drip(content: bytes, rest: bytes = b"x") -> Callable[[socket.socket, threading.Event], None]:
    """Sends the content, and then one byte now and then, for ever."""

    def answer(connection: socket.socket, over: threading.Event) -> None:
        connection.sendall(content)
        while not over.wait(0.02):
            connection.sendall(rest)

    return answer


def no_clock_runs() -> bool:
    """Whether the threads of all deadlines have ended."""
    for _ in range(200):
        if not any(isinstance(thread, threading.Timer) for thread in threading.enumerate()):
            return True
        time.sleep(0.02)
    return False


SCORES = pack_scores(torch.zeros(2), {})
DRIPS = {
    "headers": (b"HTTP/1.1 200 OK\r\nX-Endless: ", b"x"),
    "status": (b"HTTP/1.1 2", b"0"),
    "body": (b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b"x"),
    "body without length": (b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n", b"x"),
    "scores that seem whole": (b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + SCORES, b""),
    "error page": (b"HTTP/1.1 500 Oops\r\nContent-Length: 1000\r\n\r\n", b"x"),
    "refusal": (b"HTTP/1.1 400 Bad\r\nContent-Length: 1000\r\n\r\n", b"x"),
}


@pytest.mark.parametrize("kind", sorted(DRIPS))
def test_a_server_that_drips_is_left_at_the_deadline(kind: str) -> None:
    with raw_server(drip(*DRIPS[kind])) as url:
        reward = RemoteReward(url, retries=QUICK)
        started = time.monotonic()
        with pytest.raises(RemoteRewardError, match="deadline of 0.5 s|refused") as caught:
            reward(videos(), PROMPTS)
        assert time.monotonic() - started < 10
    if kind != "refusal":
        assert "'Raw': no usable answer" in str(caught.value) and "2 attempts" in str(caught.value)
    assert no_clock_runs()


def test_a_dripping_health_does_not_hold_the_start() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    started = time.monotonic()
    with pytest.raises(RemoteRewardError, match=r"/health in 2 attempts.*(without a byte|timed out|deadline)"):
        RemoteReward(f"http://127.0.0.1:{listener.getsockname()[1]}", retries=QUICK)  # accepts, and says nothing
    assert time.monotonic() - started < 10
    listener.close()


def test_an_answer_before_the_deadline_is_taken_and_leaves_no_clock() -> None:
    with served(RewardServer(as_reward(brightness))) as server:
        reward = RemoteReward(server.url, retries=Retries(deadline_s=3600.0))
        torch.testing.assert_close(reward(videos(), PROMPTS), brightness(videos(), PROMPTS))
    assert no_clock_runs()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_asked_for_again(bad: float) -> None:
    """The server itself says so; a network that overflowed once may not do it again."""
    calls: list[int] = []

    def flaky(video: Tensor, prompts: list[str]) -> Tensor:
        calls.append(len(video))
        return brightness(video, prompts) * (bad if len(calls) < 3 else 1.0)

    waits: list[float] = []
    with served(RewardServer(as_reward(flaky))) as server:
        reward = RemoteReward(server.url, retries=Retries(attempts=3, wait_s=0.5), sleep=waits.append)
        torch.testing.assert_close(reward(videos(), PROMPTS), brightness(videos(), PROMPTS))
        assert waits == [0.5, 1.0] and len(calls) == 3
        server.reward = as_reward(lambda video, prompts: brightness(video, prompts) * bad, name="broken")
        with pytest.raises(RemoteRewardError, match=r"3 attempts.*HTTP 500: reward 'broken'.*not finite.*\[0, 1\]"):
            reward(videos(), PROMPTS)


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_requests_at_a_time_than_asked_for(concurrency: int) -> None:
    running, most, lock = [0], [0], threading.Lock()

    class Counting(RewardServer):
        def score(self, content: bytes) -> bytes:
            with lock:
                running[0] += 1
                most[0] = max(most[0], running[0])
            time.sleep(0.05)
            with lock:
                running[0] -= 1
            return super().score(content)

    with Counting(as_reward(brightness)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        reward = RemoteReward(server.url, batch=1, concurrency=concurrency)
        scores = reward(videos(8), ["a"] * 8)
        server.shutdown()
        thread.join()
    torch.testing.assert_close(scores, brightness(videos(8), []))
    assert most[0] == concurrency


@pytest.mark.parametrize("failure", ["dies", "NaN", "drips"])
def test_the_state_of_a_run_is_intact(failure: str) -> None:
    """Nothing is counted and nothing drawn: the episode is played again, and scored as it would have been."""
    broken = threading.Event()

    def score(video: Tensor, prompts: list[str]) -> Tensor:
        if broken.is_set() and failure == "drips":
            time.sleep(0.4)
        return brightness(video, prompts) * (float("nan") if broken.is_set() and failure == "NaN" else 1.0)

    retries = Retries(attempts=2, timeout_s=5.0, deadline_s=0.2 if failure == "drips" else 60.0, wait_s=0.0)
    with served(RewardServer(as_reward(score, name="Bright"))) as server:
        port = server.server_address[1]
        reward = RemoteReward(server.url, retries=Retries(), name="Bright")
        env = vdm_env.make(model="MovingShapes", prompts=PROMPTS, num_envs=2, num_steps=1, seed=3, reward=reward)
        action = torch.zeros(2, *env.mdp.latent_shape)
        env.reset(seed=3)
        expected = env.step(action)[1]
        counted = env.mdp.counters.reward_queries
        env.reset(seed=3)
        reward.retries = retries
        if failure != "dies":
            broken.set()
            with pytest.raises(RemoteRewardError, match="2 attempts"):
                env.step(action)
    if failure == "dies":
        with pytest.raises(RemoteRewardError, match=r"2 attempts.*refused"):
            env.step(action)
    assert env.mdp.counters.reward_queries == counted
    broken.clear()
    reward.retries = Retries()
    with served(RewardServer(as_reward(score, name="Bright"), port=int(port))):
        env.reset(seed=3)
        again = env.step(action)[1]
    assert torch.equal(again, expected) and env.mdp.counters.reward_queries == 2 * counted
