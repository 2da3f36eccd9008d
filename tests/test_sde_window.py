"""The window of noisy steps: where it may stand, how long, and where it goes next."""

from __future__ import annotations

import math

import pytest
import torch

from algos.sde_window import (
    Place,
    SDEWindow,
    first_place,
    levels_inside,
    next_place,
    stay,
    window_places,
    window_steps,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def walk(window, updates, seed=0):
    """The starts of the first updates."""
    draws = generator(seed)
    place, starts = first_place(window, draws), []
    for _ in range(updates):
        starts.append(place.start)
        place = next_place(window, place, draws)
    return starts


def test_places_are_where_whole_windows_fit():
    assert window_places(4, 0, None, range(25), 25, "flow_grpo") == range(22)
    assert window_places(2, 0, 5, range(10), 10, "cps") == range(4)
    assert window_places(2, 3, 5, range(10), 10, "cps") == range(3, 4)
    # past the last noisy step by default, here of a sampler without noise in its last one
    assert window_places(2, 0, None, range(9), 10, "cps") == range(8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((6, 0, None), r"window_size=6 has no place in steps 0\.\.4 of this env's 0\.\.5"),
        ((2, 0, 7), r"no place in steps 0\.\.6"),
        ((2, 4, 5), r"no place in steps 4\.\.4.*more steps"),
        ((2, 0, 6), r"steps \[5\], which have no noise with 'cps'.*0\.\.5"),
    ],
)
def test_windows_without_a_place_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        window_places(*arguments, range(5), 6, "cps")


def test_noise_is_only_inside():
    window = SDEWindow(size=2, places=range(4))
    steps = window_steps(window, Place(1, 7))
    assert steps == [1, 2]
    assert levels_inside([0.5, 0.6, 0.7, 0.8, 0.9], steps) == [0.0, 0.6, 0.7, 0.0, 0.0]


def test_progressive_moves_on_and_rolls_back():
    window = SDEWindow(size=2, places=range(1, 5), iterations=2, shift=2)
    assert walk(window, 10) == [1, 1, 3, 3, 1, 1, 3, 3, 1, 1]
    assert walk(SDEWindow(size=1, places=range(3), iterations=1), 5) == [0, 1, 2, 0, 1]
    assert walk(SDEWindow(size=4, places=range(1), iterations=1), 3) == [0, 0, 0]


def test_fixed_stays():
    window = SDEWindow(size=2, places=range(1, 5), iterations=1, strategy="fixed")
    assert walk(window, 5) == [1] * 5 and next_place(window, Place(1, 0), generator()) == (1, 0)


def test_random_is_uniform_stays_its_time_and_repeats():
    window = SDEWindow(size=2, places=range(2, 6), iterations=1, strategy="random")
    starts = walk(window, 4000)
    assert set(starts) == {2, 3, 4, 5} and all(900 < starts.count(k) < 1100 for k in window.places)
    assert starts == walk(window, 4000) != walk(window, 4000, seed=1)
    window = SDEWindow(size=2, places=range(2, 6), iterations=3, strategy="random")
    starts = walk(window, 30)
    assert all(len(set(starts[i : i + 3])) == 1 for i in range(0, 30, 3)) and len(set(starts)) > 1


def test_decay_goes_linearly_from_ten_updates_to_one():
    window = SDEWindow(size=4, places=range(10), iterations=10, min_iterations=1, strategy="decay")
    assert [stay(window, k) for k in window.places] == [10, 9, 8, 7, 6, 5, 4, 3, 2, 1]
    # MixGRPO's quarter of 25, on 25 steps: 25 - 19 k / 21, rounded down
    window = SDEWindow(size=4, places=range(22), iterations=25, min_iterations=6, strategy="decay")
    assert [stay(window, k) for k in (0, 1, 10, 21)] == [25, 24, math.floor(25 - 190 / 21), 6]
    assert stay(SDEWindow(size=4, places=range(3, 4), iterations=7, strategy="decay"), 3) == 7
    window = SDEWindow(size=2, places=range(2, 5), iterations=3, min_iterations=1, strategy="decay")
    assert walk(window, 8) == [2, 2, 2, 3, 3, 4, 2, 2]


def test_exponential_decay_has_the_published_durations():
    window = SDEWindow(size=4, places=range(22), iterations=25, strategy="exp_decay")
    assert [stay(window, k) for k in (0, 13)] == [25, 25]
    # 25 e^-0.1 = 22.6, 25 e^-0.5 = 15.2, 25 e^-0.8 = 11.2
    assert [stay(window, k) for k in (14, 18, 21)] == [23, 16, 12]
    assert stay(SDEWindow(size=1, places=range(200), iterations=5, strategy="exp_decay"), 199) == 1


def test_it_goes_on_from_any_place():
    window = SDEWindow(size=2, places=range(6), iterations=3)
    assert next_place(window, Place(2, 1), generator()) == (2, 2)
    assert next_place(window, Place(2, 2), generator()) == (3, 0)
    assert next_place(window, Place(5, 2), generator()) == (0, 0)
