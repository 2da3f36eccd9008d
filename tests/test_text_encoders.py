"""Text encoders of large models rest in main memory; prompts are embedded once, and all new ones in one visit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.every_model import load
from vdm_env import make
from vdm_env.models.visiting import visiting

NAMES = ("VideoCrafter2", "ModelScope", "Zeroscope", "T2VTurbo", "AnimateDiff", "OpenSora1.2", "CogVideoX2B")
PROMPTS = ["a dog riding a bike", "a cat playing chess"]


@pytest.mark.parametrize("name", NAMES)
def test_they_are_on_the_device_for_new_prompts_only(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = load(name)
    encoder, places = model.text.encoder, []
    move = type(encoder).to

    def record(self: torch.nn.Module, *arguments: Any, **options: Any) -> torch.nn.Module:
        places.append(str(arguments[0]))
        return move(self, *arguments, **options)

    monkeypatch.setattr(type(encoder), "to", record)
    env = make(model=model, reward="Brightness", prompts=PROMPTS, num_envs=2)
    first = env.mdp.condition([0, 1])
    assert places == ["cpu", "cpu"], "there and back, a single time for both prompts"
    again = env.mdp.condition([1, 0])
    assert places == ["cpu", "cpu"], "kept"
    assert all(torch.equal(again[key], value.flip(0)) for key, value in first.items())
    obs, _ = env.reset(options={"prompts": ["something new", PROMPTS[0]]})
    env.mdp.condition_of(obs)
    assert places == ["cpu"] * 4
    elsewhere = replace(model.text, device=torch.device("meta"))
    with pytest.raises(Exception, match="meta"):  # its weights have no values there
        elsewhere(PROMPTS)["text"].tolist()
    assert places[4:] == ["meta", "cpu"], "it came back all the same"


def test_a_visit_within_a_visit_moves_nothing() -> None:
    layer, places = torch.nn.Linear(2, 2), []
    layer.to = lambda place: places.append(place)  # type: ignore[method-assign, assignment]
    with visiting(layer, torch.device("cpu")), visiting(layer, torch.device("cpu")):
        assert places == [torch.device("cpu")]
    assert places == [torch.device("cpu"), "cpu"]
    with pytest.raises(KeyError), visiting(layer, torch.device("cpu")):
        raise KeyError
    assert len(places) == 4
