"""A vision-language model as the judge: what is asked, what is read, and what is never taken for a score."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from serving import served
from torch import Tensor

from vdm_env import check_reward
from vdm_env.errors import RemoteRewardError
from vdm_env.rewards import VLMJudge
from vdm_env.rewards.vlm_judge import KEY_VARIABLE, parse_score
from vdm_env.rewards.wire import BadAnswer, Retries

PROMPTS = ["a {red} circle", "a blue square"]
FAST = Retries(attempts=3, timeout_s=5.0, wait_s=0.0)


class Judge(ThreadingHTTPServer):
    """Replies what `reply` says to the number of the request and its content; keeps the requests."""

    daemon_threads = True

    def __init__(self, reply: Callable[[int, dict[str, Any]], str | None]) -> None:
        self.reply, self.requests, self.lock = reply, [], threading.Lock()
        self.keys: set[str | None] = set()
        super().__init__(("127.0.0.1", 0), JudgeHandler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class JudgeHandler(BaseHTTPRequestHandler):
    server: Judge

    def do_POST(self) -> None:
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(content)
            number = len(self.server.requests)
        self.server.keys.add(self.headers.get("Authorization"))
        if self.path != "/v1/chat/completions":
            self.send_error(404)
            return
        reply = self.server.reply(number, content)
        body: Any = {"choices": [{"message": {"role": "assistant", "content": reply}}]}
        data = json.dumps(body if reply is not None else {"choices": []}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None: ...


def judging(reply: Callable[[int, dict[str, Any]], str | None]) -> AbstractContextManager[Judge]:
    return served(Judge(reply))


def pictures(content: dict[str, Any]) -> Tensor:
    """The frames of a request, [F,3,H,W] in [0,1]."""
    found = []
    for part in content["messages"][0]["content"][:-1]:
        head, _, data = part["image_url"]["url"].partition(",")
        assert part["type"] == "image_url" and head == "data:image/png;base64"
        found.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))))
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2) / 255


def honest(number: int, content: dict[str, Any]) -> str:
    """Ten times the mean of the pictures it got, if the prompt is about red, else half of it."""
    text = content["messages"][0]["content"][-1]["text"]
    return f"Looks fine.\n**Score: {10 * float(pictures(content).mean()) * (1.0 if 'red' in text else 0.5):.4f}**\n"


def videos() -> Tensor:
    return torch.rand(2, 3, 3, 8, 12, generator=torch.Generator().manual_seed(0))


def test_each_video_is_judged_with_its_own_pictures_and_prompt() -> None:
    with judging(honest) as server:
        judge = VLMJudge(server.url, "qwen", frames="all", retries=FAST, concurrency=2)
        assert (judge.name, judge.range, judge.differentiable) == ("VLMJudge", (0.0, 10.0), False)
        scores = judge(videos(), PROMPTS)
        expected = 10 * videos().mean((1, 2, 3, 4)) * torch.tensor([1.0, 0.5])
        torch.testing.assert_close(scores, expected, rtol=0, atol=0.02)
        torch.testing.assert_close(judge(videos().flip(0), PROMPTS[::-1]), scores.flip(0))
        check_reward(judge, prompts=PROMPTS, size=(3, 8, 12))
        content = next(r for r in server.requests if "red" in r["messages"][0]["content"][-1]["text"])
    torch.testing.assert_close(pictures(content), videos()[0], rtol=0, atol=0.5 / 255 + 1e-6)
    assert (content["model"], content["temperature"], content["seed"]) == ("qwen", 0, 0)
    text = content["messages"][0]["content"][-1]["text"]
    assert '"a {red} circle"' in text and "from 0 (nothing fits) to 10 (everything fits)" in text


def test_own_question_range_and_key(monkeypatch: pytest.MonkeyPatch) -> None:
    with judging(lambda number, content: "Score: -1") as server:
        options: dict[str, Any] = {"question": "{text_prompt}? {low}..{high}", "score_range": (-2, 2)}
        monkeypatch.setenv(KEY_VARIABLE, "from-the-environment")
        judge = VLMJudge(server.url + "/", "m", **options)
        assert judge(videos(), PROMPTS).tolist() == [-1, -1]
        VLMJudge(server.url, "m", api_key="given", **options)(videos(), PROMPTS)
        assert {r["messages"][0]["content"][-1]["text"] for r in server.requests} == {f"{p}? -2..2" for p in PROMPTS}
        assert server.keys == {"Bearer from-the-environment", "Bearer given"}


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Score: 7", 7.0),
        ("good\n\nscore = 7.5\n", 7.5),
        ("**Score:** 8/10", 8.0),
        ("Score: 3\nOn second thought\nScore: 4.", 4.0),
        ("Score: 10", 10.0),
    ],
)
def test_scores_that_are_read(reply: str, score: float) -> None:
    assert parse_score(reply, (0.0, 10.0)) == score


BAD = {
    "": "does not end with 'Score: <number>' but with ''",
    "7": "but with '7'",
    "Score: 7\nbut maybe more": "but with 'but maybe more'",
    "Score: seven": "does not end",
    "Score: 7 or 8": "does not end",
    "Score: 11": r"the score 11, outside \[0, 10\]",
    "Score: -1": "the score -1, outside",
    "Score: 7/5": "a score out of 5 where the highest is 10",
    "Score: nan": "does not end",
}


@pytest.mark.parametrize("reply", sorted(BAD))
def test_replies_that_are_no_score(reply: str) -> None:
    with pytest.raises(BadAnswer, match=BAD[reply]):
        parse_score(reply, (0.0, 10.0))


def test_an_unreadable_reply_is_asked_again_and_then_an_error() -> None:
    with judging(lambda number, content: "I cannot say" if number < 3 else "Score: 5") as server:
        judge = VLMJudge(server.url, "m", retries=FAST, concurrency=1)
        assert judge(videos()[:1], PROMPTS[:1]).tolist() == [5.0] and len(server.requests) == 3
        server.reply = lambda number, content: "I cannot say"
        with pytest.raises(RemoteRewardError, match=r"'VLMJudge'.*3 attempts.*but with 'I cannot say'"):
            judge(videos()[:1], PROMPTS[:1])
        assert len(server.requests) == 6
        server.reply = lambda number, content: None
        with pytest.raises(RemoteRewardError, match="no chat completion"):
            judge(videos()[:1], PROMPTS[:1])
        judge.url += "/wrong"
        with pytest.raises(RemoteRewardError, match="refused.*HTTP 404"):
            judge(videos()[:1], PROMPTS[:1])


def test_bad_options_are_refused() -> None:
    for options, message in (
        ({"score_range": (5, 5)}, "score_range"),
        ({"score_range": (0, float("inf"))}, "finite"),
        ({"question": "How good?"}, r"no \{text_prompt\}"),
        ({"concurrency": 0}, "concurrency=0"),
    ):
        with pytest.raises(ValueError, match=message):
            VLMJudge("http://127.0.0.1:1/v1", "m", **options)
    with pytest.raises(ValueError, match="expected an address"):
        VLMJudge("127.0.0.1:8000", "m")
