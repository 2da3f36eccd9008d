"""A reward that lives on another GPU or another machine, behind HTTP; `server.py` is the other side.

    python -m vdm_env.rewards.server MovingShapes-HPS --port 8790        # there
    env = vdm_env.make(model="MovingShapes", reward=RemoteReward("http://127.0.0.1:8790"))

Videos travel as safetensors bytes, a few at a time and several requests at once. Scores of the same video are the same
wherever it is scored; there are no gradients across a network.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from vdm_env.rewards.base import FramePolicy, FunctionReward, check_inputs
from vdm_env.rewards.chunked import Chunked
from vdm_env.rewards.wire import (
    CONTENT_TYPE,
    BadAnswer,
    Retries,
    pack_request,
    read_object,
    request,
    side_by_side,
    unpack_scores,
)

Payload = Literal["float32", "float16", "uint8"]


class RemoteReward:
    """The reward that a server offers. It says its name, frames and range when asked for its health.

    `devices` are the accelerators that the server holds, 0 on a CPU, as it said when it was asked first; None where it
    does not say. `algos.run` counts them as cost.

    Args:
        url: of the server, `http://host:port`.
        batch: videos in a request.
        concurrency: requests at a time.
        retries: how often and how long each request is tried.
        payload: how pixels travel: "float32" is exact, "float16" is half of it, "uint8" a quarter, rounded.
        name: as it is called in logs; None: the server's name for it.
        frames: frame policy; None: the server's.
        sleep: waits that many seconds between attempts.

    Raises:
        ValueError: batch, concurrency or payload out of bounds, or an address that is not HTTP.
        RemoteRewardError: the server does not answer, or with something else than a reward's health.
    """

    differentiable = False

    def __init__(
        self,
        url: str,
        *,
        batch: int = 8,
        concurrency: int = 4,
        retries: Retries | None = None,
        payload: Payload = "float32",
        name: str | None = None,
        frames: FramePolicy | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if batch < 1 or concurrency < 1 or payload not in ("float32", "float16", "uint8"):
            raise ValueError(
                f"batch={batch}, concurrency={concurrency}, payload={payload!r}: expected numbers of at least 1, and "
                "'float32', 'float16' or 'uint8'"
            )
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url={url!r}: expected an address such as 'http://127.0.0.1:8790'")
        self.url, self.batch, self.concurrency, self.payload = url.rstrip("/"), batch, concurrency, payload
        self.retries, self._sleep = retries or Retries(), sleep
        self.name = name or "remote reward"
        offered = self.health()
        self.name = name or offered["name"]
        self.frames: FramePolicy = offered["frames"] if frames is None else frames
        self.range: tuple[float, float] = offered["range"]
        self.devices: int | None = offered["devices"]

    def health(self) -> dict[str, Any]:
        """What the server offers: name, frames and range of the reward, and the accelerators it holds or None.

        Raises:
            RemoteRewardError: it does not answer.
        """
        return request(
            f"{self.url}/health", _read_health, who=f"reward {self.name!r}", retries=self.retries, sleep=self._sleep
        )

    def score_parts(self, video: Tensor, prompts: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Scores [B] and what the server says they are made of, {name: [B]}.

        Raises:
            RemoteRewardError: a request failed as often as it may; nothing was scored then.
        """
        check_inputs(video, prompts, self.name)
        starts = range(0, len(video), self.batch)
        pixels = self._packed(video)

        def score(start: int) -> tuple[Tensor, dict[str, Tensor]]:
            part, texts = pixels[start : start + self.batch], list(prompts[start : start + self.batch])
            return request(
                f"{self.url}/score",
                lambda content: unpack_scores(content, len(texts)),
                who=f"reward {self.name!r}",
                retries=self.retries,
                body=pack_request(part, texts),
                headers={"Content-Type": CONTENT_TYPE},
                sleep=self._sleep,
            )

        answers = side_by_side(score, starts, self.concurrency)
        scores = torch.cat([a[0] for a in answers]).to(video.device)
        if any(set(a[1]) != set(answers[0][1]) for a in answers):
            return scores, {self.name: scores}
        parts = {name: torch.cat([a[1][name] for a in answers]).to(video.device) for name in answers[0][1]}
        return scores, parts or {self.name: scores}

    def __call__(self, video: Tensor, prompts: list[str]) -> Tensor:
        return self.score_parts(video, prompts)[0]

    def _packed(self, video: Tensor) -> Tensor:
        video = video.detach().cpu()
        if self.payload == "uint8":
            return (video.float().clamp(0, 1) * 255).round().to(torch.uint8)
        return video.to(torch.float16 if self.payload == "float16" else torch.float32)


def remote_parts(reward: Any) -> list[Any]:
    """The parts of a reward that are scored elsewhere: those whose attribute `devices` is None or a whole number.

    It is the number of the accelerators there; None is an unknown one. Anything else is the reward's own business.
    Sums, `Chunked` rewards and what `as_reward` made are looked into.
    """
    devices = getattr(reward, "devices", False)
    if devices is None or (isinstance(devices, int) and not isinstance(devices, bool)):
        return [reward]
    inside = [getattr(term, "reward", None) for term in getattr(reward, "terms", ())]
    if isinstance(reward, FunctionReward):
        inside.append(reward.function)
    if isinstance(reward, Chunked):
        inside.append(reward.reward)
    return [part for one in inside for part in remote_parts(one)]


def serving_devices(reward: Any) -> int:
    """Accelerators that only serve a reward, as far as it says."""
    return sum(int(part.devices or 0) for part in remote_parts(reward))


def _read_health(content: bytes) -> dict[str, Any]:
    found = read_object(content)
    try:
        low, high = (float(value) for value in found["range"])
        name, frames, devices = found["name"], found["frames"], found.get("devices")
    except (KeyError, TypeError, ValueError) as error:
        raise BadAnswer(f"an answer that is no reward's health ({error!r})") from error
    if math.isnan(low) or math.isnan(high) or not low < high or not isinstance(name, str) or not name:
        raise BadAnswer(f"an answer that is no reward's health (name {name!r}, range {low}, {high})")
    if devices is not None and (not isinstance(devices, int) or isinstance(devices, bool) or devices < 0):
        raise BadAnswer(f"an answer that is no reward's health (devices {devices!r}, expected a number from 0 on)")
    return {"name": name, "frames": frames, "range": (low, high), "devices": devices}
