"""The benchmark of rewards: a row for every registered one, in the file as soon as it is measured."""

from __future__ import annotations

import csv
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import reward_speed
from benchmarks.reward_speed import COLUMNS, Config, main, measure
from vdm_env import list_rewards
from vdm_env.rewards import REWARDS

SMALL: dict[str, Any] = {"batch": 2, "num_frames": 4, "height": 24, "width": 24, "repeats": 1, "num_threads": 1}


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_registered_reward_has_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "speed.csv"
    rows = main(Config(**SMALL, out=out, dtype="bfloat16"))
    assert [row["reward"] for row in rows] == list_rewards() and set(REWARDS) <= set(list_rewards())
    written = read(out)
    assert [list(row) for row in written] == [list(COLUMNS)] * len(rows)
    for row, printed in zip(written, capsys.readouterr().out.splitlines(), strict=True):
        assert float(row["videos_per_s"]) > 0 and row["error"] == "" and row["dtype"] == "bfloat16"
        assert float(row["videos_per_s"]) == pytest.approx(2 / float(row["seconds_median"]), rel=0.05, abs=0.01)
        assert printed.startswith(f"reward={row['reward']}, videos_per_s={row['videos_per_s']}, ")


def test_rows_are_kept_when_a_later_reward_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "speed.csv"
    out.write_text("of another time\n")
    real = reward_speed.timed

    def fails(reward: Any, *rest: Any) -> float:
        if reward.name == "JPEGSurrogate":
            raise RuntimeError("the device fell over")
        return real(reward, *rest)

    monkeypatch.setattr(reward_speed, "timed", fails)
    with pytest.raises(RuntimeError, match="fell over"):
        main(Config(**SMALL, rewards=("Brightness", "JPEGSurrogate", "JPEGCompressibility"), out=out))
    assert [row["reward"] for row in read(out)] == ["Brightness"]


def test_a_reward_without_room_says_so_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(reward: Any, *rest: Any) -> float:
        if reward.name == "Brightness":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 17 GiB\nmore")
        return 0.5

    monkeypatch.setattr(reward_speed, "timed", full)
    rows = main(Config(**SMALL, rewards=("Brightness", "JPEGSurrogate")))
    assert rows[0]["error"] == "CUDA out of memory. Tried to allocate 17 GiB" and rows[0]["videos_per_s"] == ""
    assert rows[1]["videos_per_s"] == 4.0 and rows[1]["error"] == ""


def test_gradients_are_timed_where_there_are_some() -> None:
    config = Config(**SMALL, gradients=True)
    assert measure("Brightness", config)["backward"] is True
    assert measure("JPEGCompressibility", config)["backward"] is False


def test_what_cannot_be_measured_is_refused_before_anything_is() -> None:
    for bad, message in (
        ({"rewards": ("Brightness", "Beauty")}, r"unknown rewards \['Beauty'\].*Brightness"),
        ({"batch": 0}, "batch=0"),
        ({"repeats": 0}, "repeats=0"),
    ):
        with pytest.raises(ValueError, match=message):
            main(Config(**(SMALL | bad)))


def test_no_reward_loops_over_frames() -> None:
    """A batch of frames is one call of the network: the number of calls does not grow with frames or videos.

    JPEGCompressibility encodes files and is the one exception.
    """
    import functools

    calls: list[int] = []

    def count(reward: Any, video: torch.Tensor) -> int:
        calls.clear()
        modules = {id(m): m for m in _modules(reward)}
        hooks = [m.register_forward_hook(lambda *_: calls.append(1)) for m in modules.values()]
        with torch.no_grad():
            reward(video, ["playing piano"] * len(video))
        for hook in hooks:
            hook.remove()
        return len(calls)

    build = functools.partial(reward_speed.make_reward, weights="random", scale="tiny", num_frames=4)
    for name in sorted(set(REWARDS) - {"JPEGCompressibility"}):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.warn", lambda *_, **__: None)
            reward = build(name)
        generator = torch.Generator().manual_seed(0)
        few, many = (torch.rand(*shape, 3, 24, 24, generator=generator) for shape in ((1, 4), (3, 4)))
        assert count(reward, few) == count(reward, many), name
        if reward.frames == "all":
            assert count(reward, torch.rand(1, 7, 3, 24, 24, generator=generator)) == count(reward, few), name


def _modules(thing: Any, depth: int = 0) -> list[torch.nn.Module]:
    """All networks a reward holds, wherever it keeps them."""
    if isinstance(thing, torch.nn.Module):
        return list(thing.modules())
    if depth > 4 or isinstance(thing, torch.Tensor | str) or inspect.isroutine(thing):
        return []
    if isinstance(thing, dict):
        held: list[Any] = list(thing.values())
    elif isinstance(thing, list | tuple):
        held = list(thing)
    else:
        slots = [getattr(thing, s) for s in getattr(type(thing), "__slots__", ()) if hasattr(thing, s)]
        held = [*getattr(thing, "__dict__", {}).values(), *slots]
    return [module for one in held for module in _modules(one, depth + 1)]
