"""Metrics where the answer is known in closed form."""

from __future__ import annotations

import pytest
import torch

from vdm_env.metrics.diversity import diversity, two_afc
from vdm_env.metrics.fvd import frechet_distance, i3d_input


@pytest.mark.parametrize("convention", ["unbiased", "biased"])
def test_frechet_of_equal_and_shifted_sets(convention: str) -> None:
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shift = torch.arange(6.0, dtype=torch.float64)
    assert frechet_distance(x, x, covariance=convention).item() == pytest.approx(0, abs=1e-9)
    moved = frechet_distance(x, x + shift, covariance=convention).item()
    assert moved == pytest.approx(shift.square().sum().item(), rel=1e-9)


def test_frechet_refuses() -> None:
    with pytest.raises(ValueError, match="convention"):
        frechet_distance(torch.ones(3, 2), torch.ones(3, 2), covariance="other")
    with pytest.raises(ValueError, match="widths"):
        frechet_distance(torch.ones(3, 2), torch.ones(3, 4))
    with pytest.raises(ValueError, match="N >= 2"):
        frechet_distance(torch.ones(1, 2), torch.ones(3, 2))
    with pytest.raises(ValueError, match="floats"):
        i3d_input(torch.zeros(1, 2, 3, 8, 8, dtype=torch.uint8))


def test_diversity() -> None:
    assert diversity(torch.ones(4, 3)).item() == 0
    two = torch.tensor([[0.0, 0.0], [2.0, 4.0]])
    assert diversity(two).item() == 5
    assert diversity(two, ddof=0).item() == 2.5
    with pytest.raises(ValueError, match="ddof"):
        diversity(torch.ones(1, 3))


def test_two_afc() -> None:
    d0, d1 = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 1.0, 3.0])
    human = torch.tensor([0.25, 0.75, 1.0])
    assert two_afc(d0, d1, human).item() == pytest.approx((0.75 + 0.75 + 0.5) / 3)
    assert two_afc(d0, d0, human).item() == 0.5
    with pytest.raises(ValueError, match="equal"):
        two_afc(d0, d1[:2], human)
