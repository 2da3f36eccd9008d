"""Statistics of curves: hand-computed values, and coverage of intervals by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from benchmarks.aggregate import (
    area_under_curve,
    iqm,
    locf,
    paired_difference,
    probability_of_improvement,
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


TRIALS = 1500


def off_by(covered: int, nominal: float, trials: int = TRIALS) -> float:
    """How far a number of covered trials is from the nominal one, in binomial standard deviations."""
    return abs(covered - nominal * trials) / math.sqrt(trials * nominal * (1 - nominal))


@pytest.mark.parametrize("runs", [3, 5, 10])
def test_t_intervals_cover_at_their_nominal_rate(runs: int) -> None:
    draws = np.random.default_rng(runs).normal(1.0, 2.0, (TRIALS, runs))
    found = [t_interval(draw) for draw in draws]
    assert off_by(sum(i.low <= 1.0 <= i.high for i in found), 0.95) < 3.5
    bands = t_band(draws.T)  # every trial is a point of one band
    assert off_by(int(np.sum((bands[1] <= 1.0) & (bands[2] >= 1.0))), 0.95) < 3.5
    # A normal quantile in place of Student's would be found out at these numbers of runs.
    narrow = 1.96 / stats.t.ppf(0.975, runs - 1)
    covered = sum(abs(i.centre - 1.0) <= (i.high - i.centre) * narrow for i in found)
    assert off_by(covered, 0.95) > 3.5


@pytest.mark.parametrize("runs", [3, 5, 10])
def test_paired_differences_cover_whatever_the_seeds_share(runs: int) -> None:
    rng = np.random.default_rng(10 + runs)
    covered = 0
    for _ in range(TRIALS):
        shared = rng.normal(0, 5, runs)  # what a seed does to both algorithms
        a, b = (dict(enumerate(shared + shift + rng.normal(0, 1, runs))) for shift in (0.7, 0.2))
        interval, _ = paired_difference(a, b)
        covered += interval.low <= 0.5 <= interval.high
    assert off_by(covered, 0.95) < 3.5


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


def test_bootstrap_is_seeded_and_stratified() -> None:
    tasks = [np.array([0.0, 0.0, 0.0]), np.array([1.0, 1.0, 1.0, 1.0])]
    # Runs never move between tasks: with constant tasks no resample differs.
    found = stratified_bootstrap(tasks, statistic=mean, resamples=50)
    assert found.low == found.high == pytest.approx(4 / 7) and found.n == 7
    rng = np.random.default_rng(2)
    data = rng.normal(0.5, 0.2, (4, 10))
    assert stratified_bootstrap(data, resamples=200) == stratified_bootstrap(data, resamples=200)
    assert stratified_bootstrap(data, resamples=200, seed=1) != stratified_bootstrap(data, resamples=200)
    with pytest.raises(ValueError, match="at least one run"):
        stratified_bootstrap([[1.0], []])


@pytest.mark.parametrize(("runs", "documented"), [(3, 0.85), (5, 0.90), (10, 0.93)])
def test_the_bootstrap_of_pooled_tasks_covers_as_documented(runs: int, documented: float) -> None:
    """Below its nominal 95 %, and less so with more runs: the figures in its docstring."""
    rng = np.random.default_rng(20 + runs)
    trials = [stratified_bootstrap(draw, resamples=400) for draw in rng.normal(0.0, 1.0, (600, 3, runs))]
    covered = sum(t.low <= 0 <= t.high for t in trials)
    assert off_by(covered, documented, 600) < 3.5
    assert f"{documented:.2f}"[1:] in (stratified_bootstrap.__doc__ or "")


def test_probability_of_improvement_by_hand() -> None:
    # First task: 3 of 4 pairs are above; second: one pair above, one tie, two below.
    found = probability_of_improvement([[2, 4], [1, 2]], [[1, 3], [2, 1]])
    assert found.centre == pytest.approx((3 / 4 + (1 + 2 * 0.5) / 4) / 2)
    assert 0 <= found.low <= found.centre <= found.high <= 1
    back = probability_of_improvement([[1, 3], [2, 1]], [[2, 4], [1, 2]])
    assert back.centre == pytest.approx(1 - found.centre)
    certain = probability_of_improvement([[2, 3], [2, 3]], [[0, 1], [0, 1]])
    assert (certain.centre, certain.low, certain.high) == (1, 1, 1)
    with pytest.raises(ValueError, match="two tasks or more"):
        probability_of_improvement([[1.0]], [[0.0]])
