"""A vision-language model as the judge, behind any server that speaks OpenAI's chat completions (vLLM, SGLang, ...).

    score = the number in the reply's last line "Score: <number>"

Frames go as pictures in the request, with a question about the prompt; the reply has to end as the question asks, with
one number inside the range. Anything else is asked again, a bounded number of times, and then is an error: a reply that
cannot be read is never taken for a low score, which the policy would learn from.

Source: Black et al. 2023, arXiv:2305.13301 (a VLM as reward); the question is this package's own. There are no
gradients. Replies are asked for at temperature 0 with a fixed seed, as far as the server heeds them.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vdm_env.rewards.base import FramePolicy, check_inputs
from vdm_env.rewards.vlm_files import SLOT, fill
from vdm_env.rewards.wire import BadAnswer, Retries, read_object, request, side_by_side

NAME = "VLMJudge"
KEY_VARIABLE = "VLM_JUDGE_API_KEY"
"""environment variable of the key, where the server wants one"""
QUESTION = (
    f'These are frames of one video, in order. It was made for the prompt "{SLOT}". Judge how well it shows what the '
    "prompt says, whether it moves as the prompt says, and whether the pictures are clear and stay the same thing over "
    "time. Give one number from {low} (nothing fits) to {high} (everything fits). Say briefly why, then end with a "
    "line of exactly this form:\nScore: <number>"
)
# Emphasis around the words is let pass; a minus sign is part of the number.
_SCORE = re.compile(
    r"[\s*_]*score[\s*_]*[:=][\s*_]*(-?\d+(?:\.\d+)?)(?:\s*/\s*(\d+(?:\.\d+)?))?[\s*_.]*", re.IGNORECASE
)


class VLMJudge:
    """The score that a vision-language model gives a video for its prompt.

    Args:
        url: of the API, up to and with its version, `http://host:port/v1`.
        model: as the server calls it.
        question: asked about each video; `{text_prompt}`, `{low}` and `{high}` are filled in.
        score_range: the lowest and the highest score, which are also the bounds of what is accepted.
        frames: frame policy; every frame is a picture in the request.
        concurrency: requests at a time, one a video.
        retries: how often and how long each is tried.
        max_tokens: length of a reply.
        api_key: of the server; None: the environment variable VLM_JUDGE_API_KEY, if set. Never shown.
        name: as it is called in logs.
        sleep: waits that many seconds between attempts.

    Raises:
        ValueError: a range that is none, a question without a place for the prompt, or an address that is not HTTP.
    """

    differentiable = False

    def __init__(
        self,
        url: str,
        model: str,
        *,
        question: str = QUESTION,
        score_range: tuple[float, float] = (0.0, 10.0),
        frames: FramePolicy = "middle4",
        concurrency: int = 8,
        retries: Retries | None = None,
        max_tokens: int = 512,
        api_key: str | None = None,
        name: str = NAME,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        low, high = score_range
        if not -math.inf < low < high < math.inf:
            raise ValueError(f"score_range={score_range}: expected two finite numbers, the lower first")
        if SLOT not in question:
            raise ValueError(f"the question has no {SLOT}, so the judge would not know the prompt; add it")
        if not url.startswith(("http://", "https://")) or concurrency < 1:
            raise ValueError(
                f"url={url!r}, concurrency={concurrency}: expected an address such as 'http://127.0.0.1:8000/v1', and "
                "at least 1"
            )
        self.url, self.model, self.frames, self.name = url.rstrip("/"), model, frames, name
        self.range = (float(low), float(high))
        self.question = question.replace("{low}", f"{low:g}").replace("{high}", f"{high:g}")
        self.concurrency, self.max_tokens, self.retries = concurrency, max_tokens, retries or Retries()
        self._key, self._sleep = api_key or os.environ.get(KEY_VARIABLE), sleep

    def message(self, frames: Tensor, prompt: str) -> dict[str, Any]:
        """The request about one video [F,3,H,W] in [0,1], as JSON takes it."""
        pictures: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}} for picture in pngs(frames)
        ]
        text = {"type": "text", "text": fill(self.question, prompt)}
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": [*pictures, text]}],
            "temperature": 0,
            "seed": 0,
            "max_tokens": self.max_tokens,
        }

    def _read(self, content: bytes) -> float:
        try:
            reply = read_object(content)["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError) as error:
            raise BadAnswer(f"an answer that is no chat completion ({error!r})") from error
        return parse_score(reply, self.range)

    def __call__(self, video: Tensor, prompts: list[str]) -> Tensor:
        check_inputs(video, prompts, self.name)
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        pixels = video.detach().float().cpu()

        def judge(i: int) -> float:
            return request(
                f"{self.url}/chat/completions",
                self._read,
                who=f"reward {self.name!r}",
                retries=self.retries,
                body=json.dumps(self.message(pixels[i], prompts[i])).encode(),
                headers=headers,
                sleep=self._sleep,
            )

        scores = side_by_side(judge, range(len(video)), self.concurrency)
        return torch.tensor(scores, dtype=torch.float32, device=video.device)


def parse_score(reply: Any, score_range: tuple[float, float]) -> float:
    """The number of the reply's last line that is not empty, "Score: 7" or "Score: 7/10".

    Raises:
        BadAnswer: that line has another form, or a number outside the range.
    """
    low, high = score_range
    lines = [line.strip() for line in str(reply or "").splitlines() if line.strip()]
    match = _SCORE.fullmatch(lines[-1]) if lines else None
    if match is None:
        said = lines[-1][:80] if lines else ""
        raise BadAnswer(f"a reply that does not end with 'Score: <number>' but with {said!r}")
    score = float(match[1])
    if match[2] is not None and float(match[2]) != high:
        raise BadAnswer(f"a score out of {match[2]} where the highest is {high:g}")
    if not low <= score <= high:
        raise BadAnswer(f"the score {score:g}, outside [{low:g}, {high:g}]")
    return score


def pngs(frames: Tensor) -> Sequence[str]:
    """Frames [F,3,H,W] in [0,1] as PNG files, base64."""
    pixels = (frames.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    found = []
    for picture in pixels:
        buffer = io.BytesIO()
        Image.fromarray(picture.numpy()).save(buffer, "PNG")
        found.append(base64.b64encode(buffer.getvalue()).decode())
    return found
