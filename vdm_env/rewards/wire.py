"""What remote rewards send and how often they try: tensors as safetensors bytes, HTTP by the standard library.

Nothing is pickled on either side. A request that fails for a reason that may pass (no connection, a time-out, a
server's own error, an answer that makes no sense) is made again after a wait that doubles; one that the server refuses
is not. Each attempt ends at its deadline, also when bytes keep coming (`deadline.py`).
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from vdm_env.errors import RemoteRewardError
from vdm_env.rewards.deadline import Deadline

T = TypeVar("T")
A = TypeVar("A")
CONTENT_TYPE = "application/octet-stream"
MAX_ANSWER = 64 * 2**20
"""bytes of an answer that are read at most"""
_PART = "part/"
_MAY_PASS = (408, 425, 429)


class BadAnswer(ValueError):
    """An answer that came, and is not what was asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Retries:
    """How often and how long to try."""

    attempts: int = 4
    """requests in all, at least 1"""
    timeout_s: float = 60.0
    """seconds without a byte from the server after which a request has failed"""
    deadline_s: float = 600.0
    """seconds that a request may take in all, however steadily bytes come"""
    wait_s: float = 0.5
    """before the second attempt; doubles with each further one"""
    max_wait_s: float = 30.0
    """the longest wait, whatever the server asks for"""

    def __post_init__(self) -> None:
        times = self.timeout_s > 0 and self.deadline_s > 0 and 0 <= self.wait_s <= self.max_wait_s
        if self.attempts < 1 or not times:
            raise ValueError(
                f"{self}: expected attempts >= 1, timeout_s and deadline_s > 0, and 0 <= wait_s <= max_wait_s"
            )


def request(
    url: str,
    read: Callable[[bytes], T],
    *,
    who: str,
    retries: Retries,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """What `read` makes of the answer to a GET, or to a POST of `body`.

    Args:
        url: where to.
        read: makes something of the answer's bytes, or raises BadAnswer.
        who: whose request it is, for errors.
        retries: how often and how long.
        body: bytes to post.
        headers: of the request.
        sleep: waits that many seconds.

    Raises:
        RemoteRewardError: refused, or all attempts failed; the message has the last reason.
    """
    failures: list[str] = []
    for attempt in range(retries.attempts):
        asked_s = 0.0
        message = urllib.request.Request(url, data=body, headers=dict(headers or {}))
        with Deadline(retries.deadline_s) as deadline:
            try:
                with deadline.open(message, min(retries.timeout_s, retries.deadline_s)) as answer:
                    content = answer.read(MAX_ANSWER + 1)
                if len(content) > MAX_ANSWER:
                    raise BadAnswer(f"an answer of more than {MAX_ANSWER} bytes")
                if not deadline.passed:  # an answer cut off there may look like a whole one
                    return read(content)
                reason = ""
            except urllib.error.HTTPError as error:
                with error:
                    reason = f"HTTP {error.code}: {_said(error)}"
                    asked_s = _seconds(error.headers.get("Retry-After"))
                if error.code < 500 and error.code not in _MAY_PASS:
                    raise RemoteRewardError(
                        f"{who}: {url} refused the request ({reason}); correct the address or the request, it would "
                        "not be answered another time"
                    ) from error
            except BadAnswer as error:
                reason = str(error)
            except (OSError, http.client.HTTPException) as error:  # URLError and time-outs are OSErrors
                reason = str(getattr(error, "reason", error)) or type(error).__name__
        if deadline.passed:
            reason = f"no complete answer within the deadline of {retries.deadline_s:g} s"
        failures.append(reason)
        if attempt + 1 < retries.attempts:
            sleep(min(retries.max_wait_s, max(asked_s, retries.wait_s * 2**attempt)))
    earlier = f" (before: {'; '.join(dict.fromkeys(failures[:-1]))})" if len(set(failures)) > 1 else ""
    raise RemoteRewardError(
        f"{who}: no usable answer from {url} in {retries.attempts} attempts of at most {retries.deadline_s:g} s, "
        f"{retries.timeout_s:g} s without a byte: {failures[-1]}{earlier}; see that the server runs, then make the "
        "same call again, or raise attempts, timeout_s or deadline_s"
    )


def _said(error: urllib.error.HTTPError) -> str:
    """What the server says about its error, on one line."""
    try:
        text = error.read(2000).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return str(error.reason)
    try:
        text = str(json.loads(text)["error"])
    except (ValueError, KeyError, TypeError):
        pass
    return " ".join(text.split())[:400] or str(error.reason)


def _seconds(text: str | None) -> float:
    return float(text) if text is not None and text.isdigit() else 0.0


def side_by_side(function: Callable[[A], T], items: Sequence[A], limit: int) -> list[T]:
    """`function` of every item, at most `limit` at a time, in order; the first error stops what has not begun."""
    with ThreadPoolExecutor(max_workers=min(limit, max(1, len(items)))) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            for future in futures:
                future.cancel()
            raise


def pack_request(video: Tensor, prompts: Sequence[str]) -> bytes:
    """Video [B,F,3,H,W] and B prompts, as safetensors bytes."""
    text = torch.frombuffer(bytearray(json.dumps(list(prompts)).encode()), dtype=torch.uint8)
    return save({"video": video.detach().cpu().contiguous(), "prompts": text})


def unpack_request(content: bytes) -> tuple[Tensor, list[str]]:
    """Video in [0,1], float32, and prompts.

    Raises:
        BadAnswer: the bytes are no such request.
    """
    tensors = _tensors(content)
    try:
        video, prompts = tensors["video"], json.loads(bytes(tensors["prompts"].tolist()).decode())
    except (KeyError, ValueError, TypeError) as error:
        raise BadAnswer(f"a request needs the tensors video and prompts ({error})") from error
    if not isinstance(prompts, list) or not all(isinstance(p, str) for p in prompts):
        raise BadAnswer("prompts are no list of texts")
    return (video.float() / 255 if video.dtype == torch.uint8 else video.float()), prompts


def pack_scores(scores: Tensor, parts: Mapping[str, Tensor]) -> bytes:
    """Scores [B] and their parts, as safetensors bytes."""
    # Safetensors sorts by name: the number keeps the order.
    named = {f"{_PART}{i:04}/{name}": part for i, (name, part) in enumerate(parts.items())}
    return save({k: v.detach().cpu().clone().contiguous() for k, v in {"scores": scores, **named}.items()})


def unpack_scores(content: bytes, batch: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Scores [batch] and their parts, checked.

    Raises:
        BadAnswer: no tensors, the wrong number of scores, or scores that are not finite.
    """
    tensors = _tensors(content)
    scores = tensors.pop("scores", None)
    found = sorted(name for name in tensors if name.startswith(_PART))
    parts = {name.removeprefix(_PART).partition("/")[2]: tensors[name] for name in found}
    for name, values in {"scores": scores, **parts}.items():
        if values is None:
            raise BadAnswer("an answer without scores")
        if tuple(values.shape) != (batch,) or not values.is_floating_point():
            raise BadAnswer(
                f"{name} of shape {list(values.shape)} and {values.dtype} for {batch} videos, expected [{batch}] floats"
            )
        if not bool(torch.isfinite(values).all()):
            bad = (~torch.isfinite(values)).nonzero().flatten().tolist()
            raise BadAnswer(f"{name} that are not finite for videos {bad[:8]} of {batch}")
    assert scores is not None
    return scores, parts


def _tensors(content: bytes) -> dict[str, Tensor]:
    try:
        return load(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise BadAnswer(f"{len(content)} bytes that are no safetensors ({error})") from error


def read_object(content: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        BadAnswer: it is none.
    """
    try:
        found = json.loads(content)
    except ValueError as error:
        raise BadAnswer(f"an answer that is no JSON ({error})") from error
    if not isinstance(found, dict):
        raise BadAnswer(f"an answer that is {type(found).__name__}, expected an object")
    return found
