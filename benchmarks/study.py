"""A blind study of two runs in the browser: videos of the same prompt and noise side by side, and which is better.

    python -m benchmarks.study RUN_A RUN_B --out runs/study

Opens a page on this machine only. Order and sides are random and fixed by the seed and the person's name; what is left
and right stays hidden until the last pair. Each vote is on the disk (`votes.jsonl`) before the next pair appears; the
same command goes on where it stopped. Ctrl-C ends it and prints the result so far.

A run is a folder with run.json; its latest kept videos count unless an update is given, so `RUN RUN --update-a 0` asks
whether training helped.
"""

from __future__ import annotations

import math
import re
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated
from urllib.parse import parse_qs

import tyro

from benchmarks.arguments import one_line, parse
from benchmarks.clips import mp4
from benchmarks.records import Run, read_run
from benchmarks.study_page import KEYS_JS, SECURITY, done_page, error_page, vote_page
from benchmarks.study_votes import CHOICES, Result, Vote, VoteFile, last_update_with_samples, order, pairs_of, result

HOST = "127.0.0.1"
MIN_SIDE_PX = 256
COMMAND = "python -m benchmarks.study"


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyConfig:
    """Ask a person, blind, which of two runs makes the better videos."""

    run_a: Annotated[str, tyro.conf.Positional]
    """folder of a run (the one with run.json)"""
    run_b: Annotated[str, tyro.conf.Positional]
    """folder of another run, or of the same with another update"""
    update_a: int | None = None
    """evaluation whose videos are shown; the latest by default"""
    update_b: int | None = None
    """the same for run_b"""
    out: str = "runs/study"
    """folder of votes.jsonl; the same folder goes on with the same study"""
    rater: str = "me"
    """name of the person who votes; each has an order and votes of their own"""
    question: str = "Which video shows this better?"
    """what the page asks"""
    seed: int = 0
    """of the order and the sides"""
    fps: int = 8
    """frames a second of the videos"""
    port: int = 8765
    """of the page on this machine; 0 takes a free one"""
    results: bool = False
    """print what the votes say so far, and end"""


class Study:
    """The pairs in one person's order, and the votes on them. Safe to use from several threads."""

    def __init__(self, config: StudyConfig) -> None:
        runs = [read_run(Path(folder)) for folder in (config.run_a, config.run_b)]
        given = (config.update_a, config.update_b)
        updates = [
            last_update_with_samples(run) if update is None else update for run, update in zip(runs, given, strict=True)
        ]
        if not config.rater.strip() or config.fps < 1:
            raise ValueError(f"rater is {config.rater!r} and fps {config.fps}; expected a name and at least 1")
        self.pairs = pairs_of(runs[0], updates[0], runs[1], updates[1])
        self.runs = [(run, update) for run, update in zip(runs, updates, strict=True)]
        self.names = [_name(run, update) for run, update in zip(runs, updates, strict=True)]
        self.config = config
        self.order = order(len(self.pairs), config.seed, config.rater)
        about = {
            "a": {"run": str(runs[0].folder), "update": updates[0]},
            "b": {"run": str(runs[1].folder), "update": updates[1]},
            "question": config.question,
            "seed": config.seed,
        }
        self.file = VoteFile(Path(config.out) / "votes.jsonl", about)
        self._lock = threading.Lock()
        self.video = cache(self._video)

    def voted(self) -> set[tuple[int, int]]:
        """Prompt and noise seed of the pairs this person has voted on."""
        return {(v.prompt_id, v.noise_seed) for v in self.file.votes if v.rater == self.config.rater}

    def next_place(self) -> int | None:
        """The first pair in this person's order without a vote; None after the last."""
        voted = self.voted()
        for place, (index, _) in enumerate(self.order):
            pair = self.pairs[index]
            if (pair.prompt_id, pair.noise_seed) not in voted:
                return place
        return None

    def vote(self, place: int, choice: str) -> None:
        """Stores a vote.

        Raises:
            ValueError: no such place or choice.
        """
        chosen = next((name for name in CHOICES if name == choice), None)
        if not 0 <= place < len(self.order) or chosen is None:
            raise ValueError(f"no choice {choice!r} for pair {place + 1} of {len(self.order)}")
        index, b_left = self.order[place]
        pair = self.pairs[index]
        with self._lock:
            self.file.add(
                Vote(
                    prompt_id=pair.prompt_id,
                    noise_seed=pair.noise_seed,
                    rater=self.config.rater,
                    left="b" if b_left else "a",
                    choice=chosen,
                )
            )

    def page(self, place: int) -> str:
        """The page of a pair.

        Raises:
            ValueError: no such place.
        """
        if not 0 <= place < len(self.order):
            raise ValueError(f"there is no pair {place + 1}; this study has {len(self.order)}")
        pair = self.pairs[self.order[place][0]]
        return vote_page(
            place=place,
            total=len(self.order),
            done=len(self.voted()),
            question=self.config.question,
            prompt=pair.prompt,
            size=(pair.video_a.shape[1], pair.video_a.shape[2]),
        )

    def results(self) -> tuple[Result, Result]:
        """Of this person, and of everybody."""
        latest = self.file.latest()
        return result([vote for vote in latest if vote.rater == self.config.rater]), result(latest)

    def agreement(self) -> dict[str, float]:
        """How often each evaluated reward prefers the video that people do: {reward: share of the pairs voted on}.

        Pairs that a reward has no finite score for are left out, and rewards without any pair.
        """
        import torch

        from vdm_env.metrics.diversity import two_afc

        by_pair: dict[tuple[int, int], list[float]] = {}
        for vote in self.file.latest():
            by_pair.setdefault((vote.prompt_id, vote.noise_seed), []).append(vote.score_b)
        found = {}
        for reward in self.runs[0][0].rewards():
            a, b = (_scores(run, update, reward) for run, update in self.runs)
            rows = [(-a[key], -b[key], sum(s) / len(s)) for key, s in by_pair.items() if key in a and key in b]
            if rows:
                # The video with the larger score is the reward's choice; two_afc takes distances.
                found[reward] = float(two_afc(*torch.tensor(rows, dtype=torch.float64).T))
        return found

    def done_page(self) -> str:
        """What the votes say."""
        own, everyone = self.results()
        return done_page(name_a=self.names[0], name_b=self.names[1], own=own, everyone=everyone)

    def _video(self, place: int, side: str) -> bytes:
        if not 0 <= place < len(self.order):
            raise ValueError(f"there is no pair {place + 1}")
        index, b_left = self.order[place]
        pair = self.pairs[index]
        video = pair.video_b if (side == "left") == b_left else pair.video_a
        scale = math.ceil(MIN_SIDE_PX / min(video.shape[1:3]))
        if (video.shape[1] * scale) % 2 or (video.shape[2] * scale) % 2:
            scale += 1  # H.264 needs even sizes
        return mp4(video, fps=self.config.fps, scale=scale)


def _name(run: Run, update: int) -> str:
    return f"{run.label}, seed {run.seed}, update {update} ({run.folder})"


def _scores(run: Run, update: int, reward: str) -> dict[tuple[int, int], float]:
    """{(prompt, noise seed): score} of one evaluation."""
    rows = [row for row in run.evals if row["update"] == update and row["reward"] == reward]
    return {(row["prompt_id"], row["noise_seed"]): row["value"] for row in rows if row["value"] is not None}


def make_server(study: Study, port: int) -> ThreadingHTTPServer:
    """The study's server on this machine; port 0 takes a free one."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not self._from_here():
                return
            place = study.next_place()
            try:
                if self.path == "/":
                    self._send(study.done_page() if place is None else study.page(place))
                elif match := re.fullmatch(r"/pair/(\d{1,9})", self.path):
                    # Later pairs stay closed: everybody goes through their order once.
                    asked = int(match[1])
                    self._send(study.page(asked if place is None else min(asked, place)))
                elif match := re.fullmatch(r"/video/(\d{1,9})/(left|right)\.mp4", self.path):
                    self._send(study.video(int(match[1]), match[2]), "video/mp4")
                elif self.path == "/keys.js":
                    self._send(KEYS_JS, "text/javascript; charset=utf-8")
                else:
                    self._send(error_page("There is no such page."), status=404)
            except ValueError as error:
                self._send(error_page(str(error)), status=404)

        def do_POST(self) -> None:
            if not self._from_here():
                return
            try:
                length = int(self.headers.get("Content-Length", ""))
                if self.path != "/vote" or not 0 < length < 1000:
                    raise ValueError("votes are sent to /vote")
                form = parse_qs(self.rfile.read(length).decode())
                study.vote(int(form["place"][0]), form["choice"][0])
            except (ValueError, KeyError) as error:
                self._send(error_page(f"This vote was not understood: {one_line(error)}"), status=400)
                return
            self.send_response(303)
            self.send_header("Location", "/")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _from_here(self) -> bool:
            """Only this page may send votes: another site's page, open in the same browser, is refused."""
            own = {f"{name}:{server.server_port}" for name in (HOST, "localhost")}
            origin = self.headers.get("Origin")
            if self.headers.get("Host") in own and (origin is None or origin.removeprefix("http://") in own):
                return True
            self._send(error_page("This page answers to 127.0.0.1 only."), status=403)
            return False

        def _send(self, content: str | bytes, kind: str = "text/html; charset=utf-8", status: int = 200) -> None:
            body = content.encode() if isinstance(content, str) else content
            self.send_response(status)
            for name, value in (
                ("Content-Type", kind),
                ("Content-Length", str(len(body))),
                ("Cache-Control", "no-store"),
                ("Content-Security-Policy", SECURITY),
                ("X-Content-Type-Options", "nosniff"),
            ):
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Requests are no news."""

    server = ThreadingHTTPServer((HOST, port), Handler)
    return server


def study(config: StudyConfig) -> int:
    """Serves the study until Ctrl-C. Returns the exit code: 0 done, 1 failed."""
    try:
        own = Study(config)
        if not config.results:
            server = make_server(own, config.port)
    except (ValueError, OSError) as error:
        print(f"{COMMAND}: {one_line(error)}", file=sys.stderr)
        return 1
    if not config.results:
        voted = f"{len(own.voted())} of {len(own.pairs)} pairs voted on"
        print(f"http://{HOST}:{server.server_port}/  ({voted}; Ctrl-C ends)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
        finally:
            server.server_close()
    for letter, name in zip("AB", own.names, strict=True):
        print(f"{letter}: {name}")
    print(own.results()[1])
    for reward, share in own.agreement().items():
        print(f"reward {reward!r} prefers the same video as people in {100 * share:.0f} % of the pairs voted on")
    print(f"votes: {own.file.path}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; see `study`.

    Raises:
        SystemExit: code 2 for arguments the parser refuses, 0 after --help.
    """
    return study(parse(StudyConfig, arguments, COMMAND))


if __name__ == "__main__":
    sys.exit(main())
