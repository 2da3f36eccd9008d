"""Where a run can be watched beside its JSONL, which stays the record: TensorBoard, Weights & Biases, or one's own.

    algos.run(algorithm, out="runs/mine", updates=100, watch="tensorboard")     # vdm-env train --watch tensorboard
    tensorboard --logdir runs

A watcher is told what was written down, after it was written. One that raises is told nothing more, and the run goes
on. In a run that is continued no update is shown twice.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import secrets
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from algos.evaluate import Evaluation
from algos.random_state import get_random_state, set_random_state
from algos.run_files import TENSORBOARD, WANDB_STATE, read_json, read_rows, replace_json
from algos.sample_videos import as_video, distinct
from vdm_env.video import save_gif, save_mp4


class Watcher(Protocol):
    """What `algos.run(watch=...)` calls, in the first process of a run only. The arguments are its own to keep."""

    def begin(self, folder: Path, about: Mapping[str, Any], update: int, evaluated_at: int) -> None:
        """Before anything else: the run's folder, its `run.json`, and where it goes on.

        A run is continued after `update` updates and the evaluation after `evaluated_at` of them; 0 and -1 in a new
        one. What a watcher was told of later ones is void: it will be told again.
        """

    def train(self, row: Mapping[str, Any]) -> None:
        """After an update: its row of train.jsonl."""

    def evaluation(self, update: int, means: Mapping[str, float]) -> None:
        """After an evaluation: the mean of every measure of eval.jsonl, as split/measure but for the main split."""

    def videos(self, update: int, videos: np.ndarray, captions: Sequence[str], fps: float) -> None:
        """After an evaluation that keeps videos: uint8 [n, F, H, W, 3], their n prompts, frames per second."""

    def alarm(self, row: Mapping[str, Any], text: str) -> None:
        """The alarm went off: a row of alarms.jsonl, and the same in one line."""

    def end(self, how: str) -> None:
        """Last: "DONE", "INTERRUPTED" or "FAILED"."""


_METHODS = ("begin", "train", "evaluation", "videos", "alarm", "end")


class TensorBoard:
    """Event files in the run's folder `tensorboard/`; sample videos are animated images named by their captions."""

    def begin(self, folder: Path, about: Mapping[str, Any], update: int, evaluated_at: int) -> None:
        """Opens a file; in a run that is continued, one that takes earlier ones back to `evaluated_at`."""
        from torch.utils.tensorboard import SummaryWriter

        continued = update > 0 or evaluated_at >= 0
        self._writer = SummaryWriter(str(folder / TENSORBOARD), purge_step=evaluated_at + 1 if continued else None)
        if not continued:
            for name in ("config", "task"):
                self._writer.add_text(name, "\n".join(f"    {key}: {value}" for key, value in about[name].items()), 0)
        # The evaluation that is due again may have been shown at the same step as updates that are not.
        for row in read_rows(folder / "train.jsonl"):
            if evaluated_at < row["update"] <= update:
                self.train(row)

    def train(self, row: Mapping[str, Any]) -> None:
        """Scalars train/<column>, at the step of the update."""
        for name, value in row.items():
            if name != "update" and value is not None:
                self._writer.add_scalar(f"train/{name}", value, row["update"])

    def evaluation(self, update: int, means: Mapping[str, float]) -> None:
        """Scalars eval/<measure>."""
        for name, value in means.items():
            self._writer.add_scalar(f"eval/{name}", value, update)
        self._writer.flush()

    def videos(self, update: int, videos: np.ndarray, captions: Sequence[str], fps: float) -> None:
        """Images samples/<caption>. By hand: `SummaryWriter.add_video` needs a moviepy before 2."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        with tempfile.TemporaryDirectory() as folder:
            for video, name in zip(videos, distinct(captions), strict=True):
                path = save_gif(Path(folder) / "video.gif", as_video(video), fps)
                height, width = video.shape[1:3]
                image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=path.read_bytes())
                summary = Summary(value=[Summary.Value(tag=f"samples/{name}", image=image)])
                self._writer._get_file_writer().add_summary(summary, update)

    def alarm(self, row: Mapping[str, Any], text: str) -> None:
        """A text under alarms/<measure>."""
        self._writer.add_text(f"alarms/{row['alarm']}", text, row["update"])

    def end(self, how: str) -> None:
        """Closes the file."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases, with `update` on the horizontal axis; its files are in the run's folder `wandb/`.

    Its environment variables hold: WANDB_MODE=offline needs no network (`wandb sync` sends the files later),
    WANDB_PROJECT names the project. `wandb.json` keeps the run's id and what it was told, so that a run that is
    continued goes on there too. Nothing can be taken back there: updates that were lost and done again show what they
    were first. With the budget in updates that is the same.

    Args:
        options: of `wandb.init`, over those that are chosen here.
    """

    def __init__(self, **options: Any) -> None:
        self._options = options

    def begin(self, folder: Path, about: Mapping[str, Any], update: int, evaluated_at: int) -> None:
        """Starts the run there, or goes on with it."""
        import wandb

        self._path, self._shown = folder / WANDB_STATE, False
        self._state: dict[str, Any] = {"id": secrets.token_hex(4), "step": 0, "train": 0, "evaluation": -1}
        if self._path.exists():
            self._state = read_json(self._path)
        options = {
            "project": os.environ.get("WANDB_PROJECT", "vdm_env"),
            "name": about["run_id"],
            "dir": folder,
            "config": {name: value for name, value in about.items() if name != "resumes"},
            **self._options,
        }
        self._run = wandb.init(id=self._state["id"], resume="allow", allow_val_change=True, **options)
        self._run.define_metric("*", step_metric="update")
        self._state["step"] = max(self._state["step"], self._run.step)

    def train(self, row: Mapping[str, Any]) -> None:
        """Columns train/<column>."""
        values = {f"train/{name}": value for name, value in row.items() if name != "update" and value is not None}
        self._log("train", row["update"], values)

    def evaluation(self, update: int, means: Mapping[str, float]) -> None:
        """Columns eval/<measure>."""
        self._shown = update <= self._state["evaluation"]
        self._log("evaluation", update, {f"eval/{name}": value for name, value in means.items()})

    def videos(self, update: int, videos: np.ndarray, captions: Sequence[str], fps: float) -> None:
        """The videos as samples, with their captions."""
        if self._shown:
            return
        import wandb

        with tempfile.TemporaryDirectory() as folder:
            paths = [save_mp4(Path(folder) / f"{n}.mp4", as_video(video), fps) for n, video in enumerate(videos)]
            shown = [wandb.Video(str(path), caption=text) for path, text in zip(paths, captions, strict=True)]
            self._log("videos", update, {"samples": shown})

    def alarm(self, row: Mapping[str, Any], text: str) -> None:
        """An alert, which may become a message, see the settings of one's account there."""
        if not self._shown:
            self._run.alert(title=f"alarm: {row['alarm']}", text=text)

    def end(self, how: str) -> None:
        """Sends what is left."""
        self._run.finish(exit_code=1 if how == "FAILED" else 0)

    def _log(self, kind: str, update: int, values: Mapping[str, Any]) -> None:
        """Sends values once: written down first, since twice would be worse than not at all."""
        if update <= self._state.get(kind, -1):
            return
        step = self._state["step"]
        self._state |= {"step": step + 1, kind: update}
        replace_json(self._path, self._state)
        self._run.log({"update": update, **values}, step=step, commit=True)


WATCHERS: dict[str, Callable[[], Watcher]] = {"tensorboard": TensorBoard, "wandb": WandB}
"""By name, which is that of the package and of the extra that installs it."""


def make_watchers(watch: str | Watcher | Sequence[str | Watcher]) -> list[Watcher]:
    """Watchers from names and objects.

    Raises:
        ValueError: an unknown name.
        ImportError: the package of a named one is not installed.
        TypeError: an object without the methods of `Watcher`.
    """
    found: list[Watcher] = []
    for one in [watch] if isinstance(watch, str) or not isinstance(watch, Sequence) else watch:
        if isinstance(one, str):
            if one not in WATCHERS:
                near = difflib.get_close_matches(one, WATCHERS, 1)
                raise ValueError(
                    f"unknown watcher {one!r}: {f'did you mean {near[0]!r}?' if near else 'give one of'} "
                    f"({', '.join(WATCHERS)})"
                )
            if importlib.util.find_spec(one) is None:
                raise ImportError(f"watch={one!r} needs the package {one}: pip install 'vdm-env[{one}]'")
            found.append(WATCHERS[one]())
            continue
        missing = [name for name in _METHODS if not callable(getattr(one, name, None))]
        if missing:
            raise TypeError(f"the watcher {type(one).__name__} has no {', '.join(missing)}; see algos.watchers.Watcher")
        found.append(one)
    return found


class Watchers:
    """Tells several watchers; leaves out one that raises, and says so.

    Args:
        watchers: see `Watcher`.
        say: takes one line for people.
        device: of the run. What a watcher draws from global random states must not change the run.
    """

    def __init__(
        self,
        watchers: Sequence[Watcher] = (),
        say: Callable[[str], None] = print,
        device: torch.device | str = "cpu",
    ) -> None:
        self._watchers, self._say, self._device = list(watchers), say, device

    def __bool__(self) -> bool:
        return bool(self._watchers)

    def evaluated(self, update: int, every: Sequence[Evaluation], fps: float) -> None:
        """Tells of evaluations of several splits after an update: means, and the videos of the first."""
        if not self:
            return
        names: dict[str, tuple[Evaluation, str]] = {}
        for number, one in enumerate(every):
            for row in one.rows:
                names.setdefault(f"{row['split']}/{row['reward']}" if number else row["reward"], (one, row["reward"]))
        means = {name: one.mean(reward) for name, (one, reward) in names.items()}
        self.tell("evaluation", update, {name: mean for name, mean in means.items() if mean == mean})
        if every[0].videos is not None:
            self.tell("videos", update, every[0].videos, every[0].prompts, fps)

    def tell(self, what: str, *values: Any) -> None:
        """Calls this method of each."""
        if not self._watchers:
            return
        before = get_random_state(self._device)
        for watcher in list(self._watchers):
            try:
                getattr(watcher, what)(*(dict(value) if isinstance(value, Mapping) else value for value in values))
            except Exception as error:
                self._watchers.remove(watcher)
                problem = " ".join(str(error).split()) or type(error).__name__
                self._say(f"{type(watcher).__name__} is told nothing more, the run goes on: {problem}")
        set_random_state(before, self._device)
