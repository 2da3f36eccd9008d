"""The blind study: its order, its file of votes, its pages, and a real browser that votes twice."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest

from benchmarks.study import Study, StudyConfig, main, make_server
from benchmarks.study_votes import Vote, VoteFile, order, result, wilson
from tests import chromium

PROMPTS = ["a red circle", "a <b>blue</b> square & more", "a green cross", "a white triangle"]
LEVELS = {"first": 60, "second": 200}  # every video of a run has this brightness, so that they can be told apart


def write_run(
    root: Path, name: str, *, prompts: list[str] = PROMPTS, seeds: tuple[int, ...] = (0,), size: int = 10
) -> Path:
    folder = root / name
    (folder / "samples").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"schema_version": 1, "algo": name, "seed": 0}))
    (folder / "DONE").write_text(json.dumps({"reason": "budget"}))
    rows = []
    for update in (0, 5):
        keys = [(prompt, seed) for prompt in range(len(prompts)) for seed in seeds]
        level = LEVELS.get(name, 100) if update else 20
        np.savez(
            folder / "samples" / f"eval_{update:06d}.npz",
            videos=np.full((len(keys), 4, size, 12, 3), level, np.uint8),
            prompt_ids=[prompt for prompt, _ in keys],
            noise_seeds=[seed for _, seed in keys],
            prompts=[prompts[prompt] for prompt, _ in keys],
        )
        for prompt, seed in keys:
            row = {"update": update, "device_s": 1.0, "reward": "proxy", "prompt_id": prompt, "noise_seed": seed}
            rows.append({**row, "value": level / 255})
    (folder / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def config(tmp_path: Path) -> StudyConfig:
    runs = {name: str(write_run(tmp_path, name)) for name in ("first", "second")}
    return StudyConfig(run_a=runs["first"], run_b=runs["second"], out=str(tmp_path / "study"))


@pytest.fixture
def server(config: StudyConfig) -> Iterator[tuple[Study, int]]:
    study = Study(config)
    running = make_server(study, 0)
    thread = threading.Thread(target=running.serve_forever, args=(0.05,))
    thread.start()
    yield study, running.server_address[1]
    running.shutdown()
    thread.join()
    running.server_close()


def request(
    port: int, method: str, path: str, body: str | None = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, {name.lower(): value for name, value in answer.getheaders()}, content


def votes_in(config: StudyConfig) -> list[dict[str, object]]:
    lines = (Path(config.out) / "votes.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[1:]]


def brightness(mp4: bytes, path: Path) -> float:
    path.write_bytes(mp4)
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 4
    return float(np.mean(frames))


def test_order() -> None:
    first = order(7, 0, "me")
    assert first == order(7, 0, "me")
    assert sorted(index for index, _ in first) == list(range(7))
    assert sum(left for _, left in first) in (3, 4)
    assert len({str(order(7, seed, rater)) for seed in (0, 1) for rater in ("me", "you")}) == 4


def test_two_posts_make_two_lines(server: tuple[Study, int], config: StudyConfig) -> None:
    study, port = server
    for place, choice in ((0, "left"), (1, "tie")):
        status, headers, _ = request(port, "POST", "/vote", f"place={place}&choice={choice}")
        assert (status, headers["location"]) == (303, "/")
    votes = votes_in(config)
    assert [vote["choice"] for vote in votes] == ["left", "tie"]
    for place, vote in enumerate(votes):
        index, b_left = study.order[place]
        pair = study.pairs[index]
        assert (vote["prompt_id"], vote["noise_seed"]) == (pair.prompt_id, pair.noise_seed)
        assert vote["left"] == ("b" if b_left else "a")
    own = study.results()[0]
    left_is_b = study.order[0][1]
    assert (own.wins_a, own.wins_b, own.ties) == (int(not left_is_b), int(left_is_b), 1)


def test_each_side_shows_the_run_that_the_vote_names(server: tuple[Study, int], tmp_path: Path) -> None:
    study, port = server
    for place, (_, b_left) in enumerate(study.order):
        for side in ("left", "right"):
            status, headers, content = request(port, "GET", f"/video/{place}/{side}.mp4")
            assert (status, headers["content-type"]) == (200, "video/mp4")
            run = "second" if (side == "left") == b_left else "first"
            assert brightness(content, tmp_path / "video.mp4") == pytest.approx(LEVELS[run], abs=4)


def test_pages_are_blind_and_bring_everything_along(server: tuple[Study, int]) -> None:
    study, port = server
    for place in range(len(study.pairs)):
        status, headers, content = request(port, "GET", "/")
        page = content.decode()
        assert status == 200 and f"Pair {place + 1} of {len(PROMPTS)}" in page
        assert "first" not in page and "second" not in page
        assert (
            "http" not in page.replace("<!doctype html>", "")
            and "default-src 'none'" in headers["content-security-policy"]
        )
        assert "<b>" not in page  # a prompt is text
        request(port, "POST", "/vote", f"place={place}&choice=right")
    page = request(port, "GET", "/")[2].decode()
    assert "last pair" in page and "first, seed 0, update 5" in page and "4 votes of 1 person" in page
    assert b"Pair 2 of" in request(port, "GET", "/pair/1")[2]  # a vote can be looked at again, and changed


def test_a_later_pair_stays_closed_and_a_vote_can_be_corrected(server: tuple[Study, int], config: StudyConfig) -> None:
    study, port = server
    assert b"Pair 1 of" in request(port, "GET", "/pair/3")[2]
    for choice in ("left", "right"):
        request(port, "POST", "/vote", f"place=0&choice={choice}")
    assert len(votes_in(config)) == 2
    assert [vote.choice for vote in study.file.latest()] == ["right"]


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status"),
    [
        ("POST", "/vote", "place=99&choice=left", {}, 400),
        ("POST", "/vote", "place=0&choice=both", {}, 400),
        ("POST", "/vote", "place=x", {}, 400),
        ("POST", "/vote", "", {}, 400),
        ("POST", "/other", "place=0&choice=left", {}, 400),
        ("POST", "/vote", "place=0&choice=left", {"Origin": "http://example.org"}, 403),
        ("GET", "/", None, {"Host": "example.org"}, 403),
        ("GET", "/video/99/left.mp4", None, {}, 404),
        ("GET", "/../run.json", None, {}, 404),
    ],
)
def test_refused_requests(
    server: tuple[Study, int],
    config: StudyConfig,
    method: str,
    path: str,
    body: str | None,
    headers: dict[str, str],
    status: int,
) -> None:
    assert request(server[1], method, path, body, **headers)[0] == status
    assert votes_in(config) == []


def test_goes_on_where_it_stopped(config: StudyConfig, capsys: pytest.CaptureFixture[str]) -> None:
    study = Study(config)
    study.vote(0, "left")
    study.vote(1, "right")
    path = Path(config.out) / "votes.jsonl"
    with path.open("a") as file:
        file.write('{"prompt_id": 2, "noise')  # killed while writing
    again = Study(config)
    assert again.next_place() == 2 and again.order == study.order
    again.vote(2, "tie")
    assert [vote["choice"] for vote in votes_in(config)] == ["left", "right", "tie"]
    assert main([config.run_a, config.run_b, "--out", config.out, "--results"]) == 0
    printed = capsys.readouterr().out
    assert "3 votes of 1 person" in printed and "A: first, seed 0, update 5" in printed
    other = Study(StudyConfig(run_a=config.run_a, run_b=config.run_b, out=config.out, rater="you"))
    assert other.next_place() == 0  # another person begins at the beginning


def test_a_vote_is_on_the_disk_before_the_answer(config: StudyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    study = Study(config)
    monkeypatch.setattr("os.fsync", lambda number: synced.append(study.file.path.read_text()))
    study.vote(0, "left")
    assert len(synced) == 1 and synced[0].count("\n") == 2


def test_refuses_other_studies_and_broken_files(config: StudyConfig) -> None:
    Study(config).vote(0, "left")
    swapped = StudyConfig(run_a=config.run_b, run_b=config.run_a, out=config.out)
    with pytest.raises(ValueError, match="another study.*a, b differ.*--out"):
        Study(swapped)
    path = Path(config.out) / "votes.jsonl"
    path.write_text(path.read_text() + "broken\n")
    with pytest.raises(ValueError, match="line 3 is broken"):
        Study(config)


def test_refuses_runs_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(write_run(tmp_path, "first"))
    cases = {
        "same": (run, "choose another run or another update"),
        "larger": (str(write_run(tmp_path, "larger", size=20)), "one task"),
        "seeds": (str(write_run(tmp_path, "seeds", seeds=(7,))), "same evaluation prompts"),
        "prompts": (str(write_run(tmp_path, "prompts", prompts=["x"] * 4)), "one task"),
        "none": (str(tmp_path), "no run.json"),
    }
    for other, message in cases.values():
        assert main([run, other, "--out", str(tmp_path / "study")]) == 1
        assert message in capsys.readouterr().err
    assert main([run, run, "--update-a", "3", "--out", str(tmp_path / "study")]) == 1
    assert "its evaluations are [0, 5]" in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


def vote_for(prompt: int, score_b: float, rater: str = "me") -> Vote:
    choice = {0.0: "right", 0.5: "tie", 1.0: "left"}[score_b]
    return Vote(prompt_id=prompt, noise_seed=0, rater=rater, left="b", choice=choice)  # type: ignore[arg-type]


def test_result() -> None:
    votes = [vote_for(i, float(i < 7)) for i in range(10)]
    found = result(votes)
    assert (found.wins_a, found.wins_b, found.ties, found.raters) == (3, 7, 0, 1)
    # Wilson's interval of 7 of 10, as tables give it.
    assert (found.prefers_b.low, found.prefers_b.high) == pytest.approx((0.3968, 0.8922), abs=1e-4)
    # Several people on a pair are one pair.
    doubled = result(votes + [vote_for(i, 0.5, "you") for i in range(10)])
    assert (doubled.prefers_b.n, doubled.raters) == (10, 2)
    assert doubled.prefers_b.centre == pytest.approx(0.6)
    assert str(result([])) == "no votes yet"
    assert wilson([1.0] * 5).high == 1.0 and wilson([1.0] * 5).low == pytest.approx(0.5655, abs=1e-4)
    assert Vote(prompt_id=0, noise_seed=0, rater="", left="a", choice="left").score_b == 0


def test_agreement_with_rewards(config: StudyConfig) -> None:
    """The reward scores every video of the second run higher."""
    study = Study(config)
    for place, (_, b_left) in enumerate(study.order):
        better = "left" if b_left else "right"
        worse = "right" if b_left else "left"
        study.vote(place, [better, better, worse, "tie"][place])
    assert study.agreement() == {"proxy": pytest.approx((1 + 1 + 0 + 0.5) / 4)}
    assert study.results()[1].prefers_b.centre == pytest.approx(2.5 / 4)


def test_vote_file_keeps_votes_of_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    VoteFile(path, {"seed": 0}).add(vote_for(1, 1.0))
    content = path.read_bytes()
    for cut in range(1, len(content) + 1):  # killed after any byte
        path.write_bytes(content[:cut])
        votes = VoteFile(path, {"seed": 0}).votes
        assert len(votes) == int(cut == len(content))


@pytest.mark.skipif(chromium.find() is None, reason=f"no browser; install one of {', '.join(chromium.NAMES)}")
def test_a_browser_votes_twice(server: tuple[Study, int], config: StudyConfig, tmp_path: Path) -> None:
    study, port = server
    program = chromium.find()
    assert program is not None
    with chromium.browser(program, tmp_path / "profile") as page:
        page.size(390, 844, mobile=True)
        page.open(f"http://127.0.0.1:{port}/")
        playing = "[...document.querySelectorAll('video')].filter(v => v.readyState >= 2 && !v.error && !v.paused)"
        assert page.wait(f"{playing}.length") in (1, 2)
        page.wait(f"{playing}.length === 2")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        tops = page.evaluate("[...document.querySelectorAll('video')].map(v => v.getBoundingClientRect().top)")
        assert tops[0] == tops[1]  # side by side on a phone too
        page.click("button[value=right]")
        page.wait("document.title.startsWith('Pair 2') && document.readyState === 'complete'")
        page.size(1280, 844)
        page.press("ArrowLeft")
        page.wait("document.title.startsWith('Pair 3')")
    votes = votes_in(config)
    assert [vote["choice"] for vote in votes] == ["right", "left"]
    shown = [study.pairs[index].prompt_id for index, _ in study.order[:2]]
    assert [vote["prompt_id"] for vote in votes] == shown
