"""The script that kills runs: every algorithm of the zoo can be trained with its settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from algos.zoo import ZOO
from benchmarks.kill_and_resume import build, make_data

ENV = "MovingShapes-Brightness"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "preferences"
    make_data(ENV, str(folder), 0)
    return folder


@pytest.mark.parametrize("name", ZOO)
def test_every_algorithm_takes_the_settings_of_the_script(name: str, data: Path) -> None:
    _, policy, algorithm = build(name, ENV, str(data), 0)
    before = [parameter.detach().clone() for parameter in policy.trainable_parameters()]
    metrics = algorithm.update()
    assert metrics
    assert any((a != b).any() for a, b in zip(before, policy.trainable_parameters(), strict=True))
