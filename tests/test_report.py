"""Reports from synthetic run folders: what is drawn, what is said, and that the page needs nothing else."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import av
import numpy as np
import pytest

from benchmarks import cli, plots
from benchmarks.answer import answer
from benchmarks.clips import fit, for_page, mp4
from benchmarks.overview import table
from benchmarks.records import check_comparable, read_run, read_runs
from benchmarks.report import main, make_view, plates, write_report
from benchmarks.summary import common_cost, difference, summarise
from tests.synthetic_runs import PROMPTS, write_run


class Page(HTMLParser):
    """Collects elements with their attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs") / "demo"
    write_run(root, "vader", gain=0.4, gold=-0.2)
    write_run(root, "ddpo", gain=0.1, gold=0.1, end=61.5)
    return write_report(root).parent


def test_page_holds_its_figures_and_videos_and_loads_nothing(report: Path) -> None:
    text = (report / "report.html").read_text()
    page = Page(text)
    # Reward against hours and queries, gold against proxy, phases, memory, threshold, two of frames; wide and narrow.
    assert page.count("svg") == 2 * 8
    assert page.count("video") == 3 * 3  # three prompts: before, and after each algorithm
    assert page.count("script") == page.count("link") == page.count("iframe") == 0
    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "data", "srcset", "poster"):
            target = attributes.get(name)
            assert target is None or target.startswith(("#", "data:")), f"<{tag} {name}={target}> would be loaded"
    assert not re.search(r"url\((?!#)|@import", re.sub(r'url\("?#', "url(#", text))
    # Nothing else may look like an address either, but for the names of XML's own namespaces.
    assert not re.findall(r'(?<!xmlns=")(?<!xmlns:xlink=")https?://', text)
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids)), "two figures share an id: one would be drawn with the other's parts"


def test_page_says_what_was_measured(report: Path) -> None:
    text = " ".join(Page((report / "report.html").read_text()).text.split())
    for said in (
        "Which <one> is better & why?",
        "MovingShapes-HPS (own small weights)",
        "CPU-hours",
        "vader raises it",
        "over-optimisation",
        "at equal cost (60 device-seconds) vader is above ddpo",
        "one seed",
        "says nothing about other seeds",
        "A limit of the task.",
        "a <blue> square",
        "python -m benchmarks.demo --seed 0",
        "2 CPU threads",
        "abc with local changes",
    ):
        assert said in text, said


def test_markdown_says_the_same_and_its_images_exist(report: Path) -> None:
    text = (report / "report.md").read_text()
    images = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert len(images) == 8 and all((report / image).stat().st_size > 1000 for image in images)
    links = re.findall(r"(?<!!)\[[^]]*\]\(([^)]+)\)", text)
    assert links and all((report / link).exists() for link in links)
    html_answer = re.search(r'class="answer">(.*?)</p>', (report / "report.html").read_text())
    assert html_answer and html_answer[1].replace("&gt;", ">") in text


def test_numbers_behind_a_figure_are_the_runs(report: Path) -> None:
    lines = (report / "figures" / "reward_vs_hours.csv").read_text().splitlines()
    assert lines[0] == "algorithm,seed,update,device_s,reward_queries,proxy,gold"
    first = lines[1].split(",")
    run = read_run(report / "ddpo" / "Task" / "seed_0")
    assert first[:4] == ["ddpo", "0", "0", "0.0"]
    assert float(first[5]) == pytest.approx(np.mean(list(run.per_prompt("proxy", 0).values())))
    assert len(lines) == 1 + 2 * 5


def test_videos_in_the_page_are_the_samples_enlarged(report: Path) -> None:
    source = next(a["src"] for tag, a in Page((report / "report.html").read_text()).elements if tag == "video")
    assert source is not None
    kind, _, data = source.partition(",")
    assert kind == "data:video/mp4;base64"
    with av.open(io.BytesIO(base64.b64decode(data))) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 4 and frames[0].shape == (128, 128, 3)


def test_mp4_keeps_the_colours_of_a_video() -> None:
    video = np.zeros((3, 8, 8, 3), np.uint8)
    video[0, ..., 0], video[1, ..., 1], video[2, ..., 2] = 200, 200, 200
    with av.open(io.BytesIO(mp4(video))) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    for frame, expected in zip(frames, video, strict=True):
        assert np.abs(frame.mean((0, 1)) - expected.mean((0, 1))).max() < 12
    with pytest.raises(ValueError, match="uint8"):
        mp4(video / 255)
    with pytest.raises(ValueError, match="even"):
        mp4(video[:, :7], scale=1)


def test_videos_of_a_page_stay_below_its_size() -> None:
    rows = [[np.random.default_rng(i).integers(0, 255, (4, 32, 32, 3)).astype(np.uint8)] * 2 for i in range(3)]
    whole = fit(rows, 10**9)
    size = sum(map(len, whole[0]))
    assert len(whole) == 3 and [len(row) for row in fit(rows, size + 10)] == [2]
    harder = fit(rows, size - 10)  # not even one row fits: it is compressed harder
    assert harder and sum(map(len, harder[0])) < size
    assert len(fit(rows, 1)) == 1 and fit([], 10) == []
    assert for_page(np.zeros((1, 320, 512, 3), np.uint8)).shape == (1, 160, 256, 3)
    assert for_page(np.zeros((1, 32, 32, 3), np.uint8)).shape == (1, 128, 128, 3)


def test_an_unclear_difference_is_called_that(tmp_path: Path) -> None:
    write_run(tmp_path, "vader", gain=0.0, spread=0.2)
    write_run(tmp_path, "ddpo", gain=0.0, spread=0.2)
    said = answer(summarise(read_runs(tmp_path)), "HPS")
    assert "vader does not clearly move it" in said and "cannot be told apart" in said


def test_intervals_name_their_unit(tmp_path: Path) -> None:
    for seed in range(2):
        write_run(tmp_path, "vader", seed=seed)
        write_run(tmp_path, "ddpo", seed=seed, gain=0.1)
    vader, ddpo = sorted(summarise(read_runs(tmp_path)), key=lambda s: s.algo, reverse=True)
    assert vader.changes["proxy"].unit == "" and np.isnan(vader.changes["proxy"].difference.low)
    write_run(tmp_path, "vader", seed=2)
    write_run(tmp_path, "ddpo", seed=2, gain=0.1)
    ddpo, vader = summarise(read_runs(tmp_path))
    interval, unit = difference(vader, ddpo)
    assert unit == "runs" and interval.n == 3 and interval.centre == pytest.approx(0.2, abs=0.02)
    assert vader.changes["proxy"].unit == "runs"


def test_an_interrupted_run_is_compared_where_both_were_measured(tmp_path: Path) -> None:
    write_run(tmp_path, "vader", gain=0.4)
    write_run(tmp_path, "ddpo", gain=0.4, end=30.0, status="INTERRUPTED", evaluations=3)
    runs = read_runs(tmp_path)
    assert common_cost(runs) == 30.0
    ddpo, vader = summarise(runs)
    assert (ddpo.at, vader.at) == ([10], [10])  # vader's evaluation at 30 s, not its last one at 60 s
    assert vader.changes["proxy"].difference.centre == pytest.approx(0.2, abs=0.02)
    page = Page(write_report(tmp_path).read_text()).text
    assert "ddpo, seed 0 is interrupted" in page


def test_a_run_whose_last_update_overran_the_budget_is_not_compared_at_it(tmp_path: Path) -> None:
    write_run(tmp_path, "vader", gain=0.4)
    write_run(tmp_path, "ddpo", gain=0.9, end=300.0, evaluations=2)  # one update, five budgets long
    ddpo, vader = summarise(read_runs(tmp_path))
    assert (ddpo.at, vader.at, vader.cost) == ([0], [20], 60.0)
    said = answer([ddpo, vader], "HPS")
    assert "ddpo was not evaluated after training within the 60 device-seconds compared" in said
    assert "vader raises it" in said and "at equal cost" not in said
    _, rows = table(make_view(read_runs(tmp_path)))
    shown = {name: values for name, *values in rows}
    assert shown["reward, after"][0] == shown["reward, change"][0] == "-" != shown["reward, after"][1]


def test_a_run_that_was_only_started_makes_a_report(tmp_path: Path) -> None:
    write_run(tmp_path, "vader", status="UNFINISHED", evaluations=1)
    (tmp_path / "ddpo").mkdir()
    (tmp_path / "ddpo" / "run.json").write_text('{"schema_version": 1, "algo": "ddpo", "seed": 0}')  # nothing evaluated
    page = Page(write_report(tmp_path).read_text())
    assert "vader was not evaluated after training" in page.text
    assert page.count("video") == 3


def test_a_half_written_last_line_is_left_out_and_a_broken_one_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "vader")
    path = folder / "eval.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"update": 2')
    assert len(read_run(folder).evals) == whole.count("\n")
    path.write_text('{"update": 2\n' + whole)
    with pytest.raises(ValueError, match="line 1 is broken"):
        read_run(folder)


def test_missing_scores_are_counted_and_not_averaged(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "vader")
    path = folder / "eval.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()]
    for row in found:
        if row["update"] == 20 and row["prompt_id"] == 0:
            row["value"] = None
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    run = read_run(folder)
    assert run.missing() == 2 and 0 not in run.per_prompt("proxy", 20)
    change = summarise([run])[0].changes["proxy"]
    assert change.difference.n == PROMPTS - 1
    assert change.after - change.before == pytest.approx(change.difference.centre)
    assert "2 scores were not finite" in Page(write_report(tmp_path).read_text()).text


@pytest.mark.parametrize(
    "name",
    ["prompts_test_sha256", "eval_prompt_ids", "eval_noise_seeds", "reward_train", "model_id", "num_steps", "sampler",
     "noise_level", "guidance_scale", "height_px"],
)  # fmt: skip
def test_runs_of_two_kinds_are_refused(tmp_path: Path, name: str) -> None:
    write_run(tmp_path, "vader")
    write_run(tmp_path, "ddpo", task={name: "other"})
    with pytest.raises(ValueError, match=f"'{name}' differs"):
        check_comparable(read_runs(tmp_path))


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no run with an evaluation"):
        read_runs(tmp_path / "nothing")


def test_axis_is_called_after_the_device(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "vader")
    about = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**about, "device": "cuda", "gpu_name": "NVIDIA H200"}))
    figure = plates(make_view(read_runs(tmp_path)))[0].draw(plots.WIDE)
    assert figure.axes[0].get_xlabel().startswith("H200-hours")


def test_command_lines_fail_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["demo", "--budgett", "1s"], ["nothing"], [], ["report"], ["demo", "--seed", "x"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        said = capsys.readouterr()
        assert stop.value.code == 2 and said.err.count("\n") == 1 and not said.out, arguments
    for folder in (tmp_path, tmp_path / "nothing"):
        assert cli.main(["report", str(folder)]) == 2
        said = capsys.readouterr()
        assert said.err.startswith("report: no run with an evaluation") and said.err.count("\n") == 1
    with pytest.raises(SystemExit) as stop:
        main(["--wrong"])
    assert stop.value.code == 2
    write_run(tmp_path, "vader")
    assert cli.main(["report", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").exists()
