"""Watching a run: TensorBoard, Weights & Biases, one's own watcher, sample videos, the bar."""

from __future__ import annotations

import io
import json
import sys
from collections import Counter
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from test_run import FakeAlgorithm, FakeEnv, rows

from algos import Evaluator, run
from algos.alarm import Alarm
from algos.progress import Progress
from algos.sample_videos import distinct, file_name, save_samples
from algos.watchers import WATCHERS, WandB, make_watchers
from benchmarks import cli


class Diary:
    """A watcher that keeps what it is told; it may fail at one kind."""

    def __init__(self, fails=""):
        self.told, self.fails = [], fails

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)

        def listen(*values):
            torch.rand(1)  # others use global random states
            self.told.append((name, *values))
            if name == self.fails:
                raise ConnectionError("no route to\nthe host")

        return listen

    def of(self, name):
        return [values for kind, *values in self.told if kind == name]


def evaluator(algorithm, videos=2):
    return Evaluator(FakeEnv(counters=algorithm.env.mdp.counters), [0, 1, 2], [5], num_videos=videos)


def fake(hooks=None):
    return FakeAlgorithm(hooks=hooks or {})


def broken():
    raise RuntimeError("power cut")


def watched(out, watch, *, fails_at=None, updates=6, resume=False, **options):
    """A run with evaluations after every third update and checkpoints after every second."""
    algorithm = fake({fails_at: broken} if fails_at else None)
    given = {"updates": updates, "eval_every": 3, "checkpoint_every": 2, "progress": False, **options}
    return run(algorithm, out=out, watch=watch, evaluate=evaluator(algorithm), resume=resume, **given)


# ------------------------------------------------------------------ what watchers are told


def test_a_watcher_is_told_what_the_record_says(tmp_path):
    diary = Diary()
    watched(tmp_path, [diary])
    about = json.loads((tmp_path / "run.json").read_text())
    about.pop("flops_note")  # it came later
    assert diary.of("begin") == [[tmp_path, about, 0, -1]]
    assert [row for (row,) in diary.of("train")] == rows(tmp_path / "train.jsonl")
    evals = rows(tmp_path / "eval.jsonl")
    for update, means in diary.of("evaluation"):
        now = [row for row in evals if row["update"] == update]
        assert set(means) == {row["reward"] for row in now} >= {"proxy", "gold"}
        for name, mean in means.items():
            assert mean == pytest.approx(np.mean([row["value"] for row in now if row["reward"] == name]))
    assert [update for update, _ in diary.of("evaluation")] == [0, 3, 6]
    for update, videos, captions, fps in diary.of("videos"):
        with np.load(tmp_path / "samples" / f"eval_{update:06d}.npz") as kept:
            assert np.array_equal(kept["videos"], videos) and kept["prompts"].tolist() == captions and fps == 8.0
    assert diary.told[-1] == ("end", "DONE") and len(diary.of("end")) == 1


def test_alarms_and_other_splits(tmp_path):
    algorithm, diary = fake(), Diary()
    first, second = evaluator(algorithm), evaluator(algorithm, videos=0)
    second.env.split = "validation"
    # The gold score of the fake is the same every time: a measure that falls is added.
    real, fallen = first.evaluate, []

    def evaluate(policy):
        found = real(policy)
        fallen.append(-len(fallen))
        for row in [row for row in found.rows if row["reward"] == "gold"]:
            row["value"] += fallen[-1] + 0.01 * row["prompt_id"]
        for row in [row for row in found.rows if row["reward"] == "proxy"]:
            row["value"] += 0.02 * row["prompt_id"] * len(fallen)
        return found

    first.evaluate = evaluate
    options = {"updates": 3, "eval_every": 1, "alarm": Alarm(), "progress": False}
    run(algorithm, out=tmp_path, watch=diary, evaluate=[first, second], **options)
    _, means = diary.of("evaluation")[-1]
    assert means["validation/proxy"] == pytest.approx(means["proxy"] - 0.02 * 4, abs=1e-6)
    kept = rows(tmp_path / "alarms.jsonl")
    assert kept and [row for row, _ in diary.of("alarm")] == kept
    assert "ALARM over-optimisation" in diary.of("alarm")[0][1]


@pytest.mark.parametrize("kind", ["begin", "train", "evaluation", "videos", "end"])
def test_a_watcher_that_fails_is_left_out_and_the_run_goes_on(kind, tmp_path, capsys):
    bad, good = Diary(kind), Diary()
    assert watched(tmp_path, [bad, good]).ended == "updates"
    said = capsys.readouterr().err
    assert said.count("Diary is told nothing more, the run goes on: no route to the host") == 1
    assert len(bad.of(kind)) == 1 and bad.told[-1][0] == kind
    assert len(good.of("train")) == 6 and len(good.of("end")) == 1


def test_a_failed_run_is_told(tmp_path):
    diary = Diary()
    with pytest.raises(RuntimeError, match="power cut"):
        watched(tmp_path, diary, fails_at=4)
    assert diary.told[-1] == ("end", "FAILED")
    diary = Diary()
    watched(tmp_path, diary, resume=True)
    # The evaluation after update 3 was the best so far, and has a checkpoint of its own.
    assert [values[2:] for values in diary.of("begin")] == [[3, 3]]
    assert [row["update"] for (row,) in diary.of("train")] == [4, 5, 6]


def test_what_a_watcher_draws_does_not_change_the_run(tmp_path):
    drawn = []
    for name, watch in (("a", ()), ("b", [Diary()])):
        torch.manual_seed(0)
        algorithm = fake({2: lambda: drawn.append(float(torch.rand(1)))})
        run(algorithm, out=tmp_path / name, updates=2, watch=watch, progress=False)
    assert drawn[0] == drawn[1]


def test_wrong_watchers_are_refused(monkeypatch, tmp_path, capsys):
    with pytest.raises(ValueError, match="unknown watcher 'tensorbord': did you mean 'tensorboard'"):
        run(fake(), out=tmp_path, updates=1, watch="tensorbord")
    with pytest.raises(TypeError, match=r"SimpleNamespace has no begin, train, .*see algos.watchers.Watcher"):
        run(fake(), out=tmp_path, updates=1, watch=SimpleNamespace(end=print))
    assert make_watchers(()) == [] and isinstance(make_watchers(Diary())[0], Diary)
    real = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in WATCHERS else real(name))
    for name in WATCHERS:
        with pytest.raises(ImportError, match=rf"needs the package {name}: pip install 'vdm-env\[{name}\]'"):
            run(fake(), out=tmp_path, updates=1, watch=(name,))
        with pytest.raises(SystemExit) as stop:
            cli.main(["train", "--algo", "vader", "--updates", "1", "--watch", name, "--out", str(tmp_path)])
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.count("\n") == 1 and f"vdm-env[{name}]" in said
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------ TensorBoard


def test_tensorboard_shows_every_step_once_also_after_a_resume(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(RuntimeError, match="power cut"):
        watched(tmp_path, "tensorboard", fails_at=6)  # after update 5, with a checkpoint of update 4
    watched(tmp_path, "tensorboard", resume=True)
    shown = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    shown.Reload()
    train, evals = rows(tmp_path / "train.jsonl"), rows(tmp_path / "eval.jsonl")
    points = {tag: [(e.step, e.value) for e in shown.Scalars(tag)] for tag in shown.Tags()["scalars"]}
    for name in ("reward_mean", "reward_queries"):
        assert points[f"train/{name}"] == [(row["update"], pytest.approx(row[name])) for row in train]
    assert [step for step, _ in points["train/device_s"]] == [1, 2, 3, 4, 5, 6]
    for step, value in points["eval/proxy"]:
        now = [row["value"] for row in evals if (row["update"], row["reward"]) == (step, "proxy")]
        assert value == pytest.approx(np.mean(now))
    assert [step for step, _ in points["eval/proxy"]] == [0, 3, 6]
    assert set(shown.Tags()["images"]) == {"samples/prompt 0", "samples/prompt 1"}
    images = shown.Images("samples/prompt 1")
    assert [image.step for image in images] == [0, 3, 6]
    assert images[0].encoded_image_string[:4] == b"GIF8"


def test_an_evaluation_that_is_due_again_is_not_shown_twice(tmp_path):
    """The checkpoint before an evaluation has the same number of updates: only part of that step is taken back."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {"checkpoint_every": None}
    with pytest.raises(RuntimeError, match="power cut"):
        watched(tmp_path, "tensorboard", fails_at=5, **options)
    watched(tmp_path, "tensorboard", resume=True, **options)
    shown = EventAccumulator(str(tmp_path / "tensorboard"))
    shown.Reload()
    assert [event.step for event in shown.Scalars("eval/proxy")] == [0, 3, 6]
    assert [event.step for event in shown.Scalars("train/reward_mean")] == [1, 2, 3, 4, 5, 6]


# ------------------------------------------------------------------ Weights & Biases


class Server:
    """In the place of the package: keeps what each process logged to which run."""

    def __init__(self):
        self.logged, self.inits, self.finished, self.step = [], [], [], 0

    def init(self, **options):
        self.inits.append(options)
        return self

    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "update")

    def log(self, values, step, commit):
        assert step >= self.step and commit
        self.step = step + 1
        self.logged.append(values)

    def Video(self, path, caption):  # noqa: N802 - the package's name
        with av.open(path) as video:
            return caption, video.streams.video[0].frames

    def alert(self, title, text):
        pass

    def finish(self, exit_code):
        self.finished.append(exit_code)


def test_wandb_goes_on_with_one_run_and_shows_every_step_once(tmp_path, monkeypatch):
    server = Server()
    monkeypatch.setitem(sys.modules, "wandb", server)
    monkeypatch.setenv("WANDB_PROJECT", "films")
    with pytest.raises(RuntimeError, match="power cut"):
        watched(tmp_path, WandB(mode="offline"), fails_at=6)
    server.step = 0  # offline it does not know what was logged before
    watched(tmp_path, WandB(mode="offline"), resume=True)
    first, second = server.inits
    assert first["id"] == second["id"] and first["resume"] == "allow" and first["mode"] == "offline"
    assert first["project"] == "films" and first["config"]["seed"] == 0 and first["dir"] == tmp_path
    assert server.finished == [1, 0]
    updates = Counter(
        (next(name for name in values if name != "update").split("/")[0], values["update"]) for values in server.logged
    )
    assert updates == {
        **{("train", n): 1 for n in (1, 2, 3, 4, 5, 6)},
        **{(kind, n): 1 for kind in ("eval", "samples") for n in (0, 3, 6)},
    }
    samples = [values["samples"] for values in server.logged if "samples" in values]
    assert samples == [[("prompt 0", 2), ("prompt 1", 2)]] * 3
    train = rows(tmp_path / "train.jsonl")
    told = [values["train/reward_mean"] for values in server.logged if "train/reward_mean" in values]
    assert told == [row["reward_mean"] for row in train]
    run(fake(), out=tmp_path, updates=1, watch=(), fresh=True, progress=False)
    assert not (tmp_path / "wandb.json").exists()  # a new run has an id of its own


def test_wandb_offline_with_the_package(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    with pytest.raises(RuntimeError, match="power cut"):
        watched(tmp_path, "wandb", fails_at=5)
    assert watched(tmp_path, "wandb", resume=True).ended == "updates"
    state = json.loads((tmp_path / "wandb.json").read_text())
    assert (state["train"], state["evaluation"], state["videos"]) == (6, 6, 6)
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{state['id']}"))) == 2
    assert list((tmp_path / "wandb").rglob("*.mp4"))


# ------------------------------------------------------------------ videos


def test_sample_videos_are_files_that_people_open(tmp_path):
    with pytest.raises(RuntimeError, match="power cut"):
        watched(tmp_path, (), fails_at=5, checkpoint_every=2)
    late = tmp_path / "samples" / "eval_000003"
    assert {path.name for path in late.iterdir()} == {"prompt 0.mp4", "prompt 1.mp4"}
    with av.open(str(late / "prompt 1.mp4")) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(frames) == 2 and frames[0].shape[0] >= 96
    assert abs(float(np.mean(frames[0])) - 128) < 4  # the fake's grey of seed 5, through a codec
    (tmp_path / "samples" / "eval_000009").mkdir()
    (tmp_path / "samples" / "eval_000009.part").mkdir()
    watched(tmp_path, (), resume=True)
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert names == [f"eval_{n:06d}{end}" for n in (0, 3, 6) for end in ("", ".npz")]
    watched(tmp_path, (), fresh=True, sample_mp4=False)
    assert all(path.suffix == ".npz" for path in (tmp_path / "samples").iterdir())


def test_names_of_files_are_captions():
    assert file_name("a red circle moving left") == "a red circle moving left"
    assert file_name('what/is "this"?\n...') == "what is this"
    assert file_name("???") == "video" and file_name("..") == "video"
    long = file_name("word " * 60)
    assert len(long) <= 100 and long.endswith("word")
    assert distinct(["a", "A", "a", "a (2)", "b"]) == ["a", "A (2)", "a (3)", "a (2) (2)", "b"]


def test_half_written_videos_leave_nothing(tmp_path):
    videos = np.zeros((2, 2, 8, 8, 3), dtype=np.uint8)
    with pytest.raises(ValueError):
        save_samples(tmp_path / "eval_000001", videos, ["one"], 8.0)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------ the bar


def row(update, **given):
    row = {"update": update, "device_s": 6.0 * update, "train_s": 2.0 * update, "videos_sampled": 8 * update}
    return {**row, "reward_mean": 0.5, "kl_ref_nats": None, "peak_allocated_gib": None, "peak_rss_gib": 1.25, **given}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_shows_budget_reward_kl_speed_and_memory(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    with Progress("mine", 20.0, None) as bar:
        bar.show(row(1, kl_ref_nats=3.25), {"proxy": 0.125})
        bar.bar.refresh()
    said = terminal.getvalue()
    for text in ("30%", "6/20 device-s left", "reward=0.5", "kl=3.25", "videos/s=4", "GiB=1.25", "eval proxy=0.125"):
        assert text in said, (text, said)


def test_a_line_shows_the_same(capsys):
    with Progress("mine", 20.0, None) as bar:
        bar.show(row(1), {})
        bar.show(row(2, videos_sampled=8, peak_allocated_gib=70.5), {})
        bar.show(row(3, videos_sampled=20, reward_mean=None, kl_ref_nats=1.0), {"gold": 0.25})
        bar.show(row(4, device_s=24.0), {})
    assert capsys.readouterr().out.splitlines() == [
        "mine  update 1  6.0/20 device-s (14.0 left)  reward 0.5  videos/s 4  GiB 1.25",
        "mine  update 2  12.0/20 device-s (8.0 left)  reward 0.5  GiB 70.5",  # it sampled none
        "mine  update 3  18.0/20 device-s (2.0 left)  reward nan  kl 1  videos/s 6  GiB 1.25  eval gold 0.25",
        "mine  update 4  24.0/20 device-s (0.0 left)  reward 0.5  videos/s 6  GiB 1.25",
    ]


def test_a_watched_run_is_recorded_where_it_is_told(tmp_path):
    """`vdm-env train --watch`, on the embedded world."""
    pytest.importorskip("tensorboard")
    given = ["--algo", "ddpo", "--updates", "1", "--num-envs", "8", "--num-steps", "2", "--eval-prompts", "2"]
    given += ["--eval-seeds", "1", "--eval-videos", "1", "--lora-rank", "2", "--set", "videos_per_rollout=8"]
    given += ["--num-threads", str(torch.get_num_threads()), "--watch", "tensorboard", "--on-oom", "halve_micro_batch"]
    assert cli.main(["train", *given, "--out", str(tmp_path)]) == 0
    folder = tmp_path / "ddpo" / "MovingShapes-HPS" / "seed_0"
    assert list((folder / "tensorboard").iterdir())
    assert [path.suffix for path in (folder / "samples" / "eval_000001").iterdir()] == [".mp4"]
