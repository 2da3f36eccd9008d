"""Serves a reward over HTTP, for `RemoteReward`.

    python -m vdm_env.rewards.server MovingShapes-HPS --port 8790
    python -m vdm_env.rewards.server VideoScore:temporal --device cuda --dtype bfloat16 --host 0.0.0.0

GET /health says what it is and how many accelerators it holds; POST /score takes videos and prompts as safetensors
bytes and answers with scores in the same form. It has no passwords: let it listen on an address that only your own
machines reach. Nothing is unpickled.
"""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

import torch

from vdm_env.rewards.base import NotFiniteError, Reward, score_parts
from vdm_env.rewards.remote import remote_parts
from vdm_env.rewards.wire import CONTENT_TYPE, BadAnswer, pack_scores, unpack_request

MAX_REQUEST = 4 * 2**30
"""bytes of a request that are accepted"""


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is served, and where."""

    host: str = "127.0.0.1"
    """address to listen on; 0.0.0.0 is every address of the machine"""
    port: int = 8790
    """0 chooses a free one"""
    device: str = "cpu"
    """of the reward's network"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """of the reward's network"""
    weights: Literal["pretrained", "random"] = "pretrained"
    """random is for tests and speed"""
    scale: Literal["full", "tiny"] = "full"
    """tiny only with random weights"""
    num_frames: int | None = None
    """frames of the videos that will come, where the network has to fit them"""
    seed: int = 0
    """of random weights"""


class RewardServer(ThreadingHTTPServer):
    """A server of one reward; requests are scored one at a time, in the order they come.

    Args:
        reward: what is served.
        host: address to listen on.
        port: to listen on; 0 chooses a free one, see `url`.
        device: where videos go to be scored.
    """

    daemon_threads = True

    def __init__(
        self, reward: Reward, host: str = "127.0.0.1", port: int = 0, *, device: torch.device | str = "cpu"
    ) -> None:
        self.reward, self.device, self.turn = reward, torch.device(device), threading.Lock()
        super().__init__((host, port), _Handler)

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{self.server_address[0]!s}:{self.server_address[1]}"

    def health(self) -> dict[str, Any]:
        """What /health answers."""
        frames = self.reward.frames
        further = [part.devices for part in remote_parts(self.reward)]  # of servers behind this one
        policy = frames if isinstance(frames, str | int) else [int(i) for i in frames]
        return {
            "name": self.reward.name,
            "frames": policy,
            "range": [str(bound) for bound in self.reward.range],
            "devices": None if None in further else int(self.device.type != "cpu") + sum(further),
        }

    def score(self, content: bytes) -> bytes:
        """What /score answers to a request of that content."""
        video, prompts = unpack_request(content)
        with self.turn, torch.no_grad():
            return pack_scores(*score_parts(self.reward, video.to(self.device), prompts))


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer
    protocol_version = "HTTP/1.1"
    timeout = 300.0  # seconds without a byte after which a client that vanished is let go

    def do_GET(self) -> None:  # the name is http.server's
        if self.path == "/health":
            self._answer(200, json.dumps(self.server.health()).encode(), "application/json")
        else:
            self._refuse(404, f"there is no {self.path}; there are GET /health and POST /score")

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if self.path != "/score" or not length.isdigit() or int(length) > MAX_REQUEST:
            self.close_connection = True
            self._refuse(413 if length.isdigit() else 411, f"expected POST /score of at most {MAX_REQUEST} bytes")
            return
        content = self.rfile.read(int(length))
        try:
            scores = self.server.score(content)
        except NotFiniteError as error:  # the network's fault, and another time it may be right
            self._refuse(500, str(error))
        except (BadAnswer, ValueError, TypeError) as error:  # the request's own fault
            self._refuse(400, f"{type(error).__name__}: {error}")
        except Exception as error:
            self._refuse(500, f"{type(error).__name__}: {error}")
        else:
            self._answer(200, scores, CONTENT_TYPE)

    def _refuse(self, status: int, reason: str) -> None:
        self._answer(status, json.dumps({"error": reason}).encode(), "application/json")

    def _answer(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: a line a request would drown everything else."""


def main(reward: str, config: Config) -> None:
    """Serves the reward of that name (`HPS`, `HPS+0.1*Aesthetic`) or of that environment (`MovingShapes-HPS`)."""
    from vdm_env.registry import make_reward

    built = make_reward(
        reward,
        weights=config.weights,
        scale=config.scale,
        device=config.device,
        dtype=getattr(torch, config.dtype),
        seed=config.seed,
        num_frames=config.num_frames,
    )
    with RewardServer(built, config.host, config.port, device=config.device) as server:
        print(f"{built.name} at {server.url}", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped")


if __name__ == "__main__":
    import tyro
    from tyro.conf import Positional

    def _serve(reward: Positional[str], config: tyro.conf.OmitArgPrefixes[Config] = Config()) -> None:  # noqa: B008
        """Serves a reward over HTTP.

        Args:
            reward: a reward's name, or an environment's id, whose reward is served.
            config: what is served, and where.
        """
        main(reward, config)

    tyro.cli(_serve)
