"""Statistics of curves: hand-computed values, and coverage of intervals by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.aggregate import (
    area_under_curve,
    iqm,
    locf,
    paired_difference,
    stratified_bootstrap,
    t_band,
    t_interval,
    time_to_threshold,
)


def test_last_observation_is_carried_forward_and_never_beyond_the_run() -> None:
    found = locf([0, 1, 3], [1, 2, 5], [0, 0.5, 1, 2.9, 3, 3.1])
    np.testing.assert_array_equal(found, [1, 1, 2, 2, 5, np.nan])
    np.testing.assert_array_equal(locf([1, 2], [3, 4], [0.5]), [np.nan])
    # Of two observations at one cost the later one holds.
    np.testing.assert_array_equal(locf([0, 1, 1], [1, 2, 3], [1]), [3])


@pytest.mark.parametrize(("x", "y"), [([], []), ([1, 0], [1, 2]), ([0, 1], [1])])
def test_a_curve_must_be_one(x: list[float], y: list[float]) -> None:
    with pytest.raises(ValueError, match="a curve"):
        locf(x, y, [0])


def test_area_under_curve_is_the_mean_height_of_the_steps() -> None:
    assert area_under_curve([0, 1, 3], [1, 2, 5], 3) == pytest.approx((1 * 1 + 2 * 2) / 3)
    assert area_under_curve([0, 1, 3], [1, 2, 5], 2) == pytest.approx((1 + 2) / 2)
    assert math.isnan(area_under_curve([0, 1, 3], [1, 2, 5], 3.5))


def test_time_to_threshold_is_censored_where_it_was_not_reached() -> None:
    reached = time_to_threshold([0, 1, 3], [1, 2, 5], 2)
    assert (reached.x, reached.censored, str(reached)) == (1, False, "1")
    missed = time_to_threshold([0, 1, 3], [1, np.nan, 5], 6)
    assert (missed.x, missed.censored, str(missed)) == (3, True, "> 3")


def test_t_interval_by_hand() -> None:
    # mean 2, s 1, t_{.975, 2} = 4.3027
    found = t_interval([1, 2, 3])
    assert (found.centre, found.n) == (2, 3)
    assert found.high - 2 == pytest.approx(4.302652730 / math.sqrt(3))
    assert not found.excludes_zero and t_interval([10, 11, 12]).excludes_zero
    single = t_interval([4])
    assert single.centre == 4 and math.isnan(single.low) and not single.excludes_zero
    with pytest.raises(ValueError, match="no NaN"):
        t_interval([1, np.nan])


def test_t_interval_covers_at_five_runs() -> None:
    rng = np.random.default_rng(0)
    found = [t_interval(draw) for draw in rng.normal(1.0, 2.0, (2000, 5))]
    covered = np.mean([i.low <= 1.0 <= i.high for i in found])
    # Binomial standard error of 2000 trials is 0.005: four of them.
    assert abs(covered - 0.95) < 0.02


def test_a_band_needs_three_runs() -> None:
    centre, low, high = t_band([[1, 2], [3, 2]])
    np.testing.assert_array_equal(centre, [2, 2])
    assert np.isnan(low).all() and np.isnan(high).all()
    centre, low, high = t_band([[1, 2], [2, 2], [3, np.nan]])
    interval = t_interval([1, 2, 3])
    assert (low[0], high[0]) == pytest.approx((interval.low, interval.high))
    assert np.isnan([centre[1], low[1], high[1]]).all()  # a run that ended early leaves no band, not a smaller one


def test_paired_difference_takes_what_both_have() -> None:
    interval, unpaired = paired_difference({1: 5.0, 2: 6.0, 3: 9.0}, {2: 4.0, 1: 4.0, 7: 0.0})
    assert (interval.centre, interval.n, unpaired) == (1.5, 2, 2)
    with pytest.raises(ValueError, match="share no key"):
        paired_difference({1: 1.0}, {2: 1.0})


def test_paired_difference_is_narrower_than_the_values_spread() -> None:
    rng = np.random.default_rng(1)
    prompts = rng.normal(0, 10, 20)
    before = dict(enumerate(prompts))
    after = dict(enumerate(prompts + 1 + rng.normal(0, 0.1, 20)))
    interval, _ = paired_difference(after, before)
    assert interval.excludes_zero and abs(interval.centre - 1) < 0.1


def test_iqm_is_the_mean_of_the_middle_half() -> None:
    assert iqm([-100, 1, 2, 3, 4, 5, 6, 100]) == 3.5
    assert iqm([1, 2, 9]) == 4  # three values: nothing to trim


def mean(values: np.ndarray) -> np.ndarray:
    return values.mean(-1)


def test_bootstrap_is_seeded_stratified_and_covers() -> None:
    tasks = [np.array([0.0, 0.0, 0.0]), np.array([1.0, 1.0, 1.0, 1.0])]
    # Runs never move between tasks: with constant tasks no resample differs.
    found = stratified_bootstrap(tasks, statistic=mean, resamples=50)
    assert found.low == found.high == pytest.approx(4 / 7) and found.n == 7
    rng = np.random.default_rng(2)
    data = rng.normal(0.5, 0.2, (4, 10))
    assert stratified_bootstrap(data, resamples=200) == stratified_bootstrap(data, resamples=200)
    assert stratified_bootstrap(data, resamples=200, seed=1) != stratified_bootstrap(data, resamples=200)
    trials = [stratified_bootstrap(rng.normal(0.0, 1.0, (4, 10)), statistic=mean, resamples=200) for _ in range(300)]
    covered = np.mean([t.low <= 0 <= t.high for t in trials])
    assert 0.87 < covered < 0.98  # standard error 0.013; a bootstrap of 40 values covers a little below 0.95
    with pytest.raises(ValueError, match="at least one run"):
        stratified_bootstrap([[1.0], []])
