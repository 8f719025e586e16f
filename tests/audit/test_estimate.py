"""The numbers: exact where they can be enumerated, and as often right as they claim."""

from itertools import combinations
from math import comb

import numpy as np
import pytest

from microclip_deploy.audit.estimate import (
    Tally,
    accuracy,
    difference,
    difference_limits,
    share_limits,
)
from microclip_deploy.audit.sample import drawn, order
from microclip_deploy.bench.audit_coverage import Setting, measure

DRAWS = 2_000
"""Simulated audits: three standard errors of a coverage of 95 % are 1.5 points."""
SLACK = 0.015


def test_estimates_are_unbiased_over_all_samples() -> None:
    right, population = np.array([1, 1, 0, 1, 0]), 5
    agree = (2, 3, 4)  # right, answered, photos
    found = [
        accuracy((int(right[list(rows)].sum()), 3, population), agree).estimate
        for rows in combinations(range(population), 3)
    ]
    expected = (right.mean() * population + agree[0] / agree[1] * agree[2]) / 9
    assert np.mean(found) == pytest.approx(expected)
    lead = np.array([1, -1, 0, 1, 1])
    gains = [
        difference(Tally(5, 3, int((part == 1).sum()), int((part == -1).sum())), 15).estimate
        for part in (lead[list(rows)] for rows in combinations(range(5), 3))
    ]
    assert np.mean(gains) == pytest.approx(lead.sum() / 20)


def test_limits_are_those_of_the_hypergeometric_test() -> None:
    # If 5 of 6 were right, one right among 3 would be impossible; if 4, its chance were 1 in 5.
    assert share_limits(1, 3, 6) == pytest.approx((1 / 6, 4 / 6))
    low, high = share_limits(0, 30, 10**9 // 10**4)
    assert low == 0
    assert 0.5 * (1 - high) ** 30 == pytest.approx(0.025, rel=0.01)


@pytest.mark.parametrize("model", [0, 1])
def test_census_has_intervals_of_no_width(model: int) -> None:
    tally = Tally(7, 7, 4, 2)
    found = accuracy((tally[2 + model], 7, 7), (12, 13, 13))
    assert found.low == found.high == pytest.approx(found.estimate)
    gain = difference(tally, 13)
    assert gain.low == pytest.approx(gain.high) == pytest.approx(2 / 20)


def test_difference_is_the_mirror_image_when_models_change_places() -> None:
    low, high = difference_limits(Tally(50, 20, 9, 4))
    assert difference_limits(Tally(50, 20, 4, 9)) == pytest.approx((-high, -low))
    assert low < 5 / 20 < high


def test_limits_leave_out_what_is_impossible() -> None:
    low, high = difference_limits(Tally(10, 9, 9, 0))
    assert 8 / 10 < low < 9 / 10
    assert high == pytest.approx(1)


def test_nothing_answered_says_nothing() -> None:
    assert difference_limits(Tally(10, 0, 0, 0)) == (-1, 1)
    assert difference(Tally(0, 0, 0, 0), 10) == (0, 0, 0)
    assert share_limits(0, 0, 10) == (0, 1)


def exact_coverage(photos: int, answered: int, a_right: int, b_right: int) -> float:
    """Return how often the limits hold the true difference, over all samples."""
    counts = np.indices((min(a_right, answered) + 1, min(b_right, answered) + 1)).reshape(2, -1)
    a, b = counts[:, counts.sum(axis=0) <= answered]
    rest = photos - a_right - b_right
    ways = np.array(
        [
            comb(a_right, x) * comb(b_right, y) * comb(rest, answered - x - y)
            for x, y in zip(a.tolist(), b.tolist(), strict=True)
        ],
        float,
    )
    low, high = difference_limits(Tally(photos, answered, a, b))
    truth = (a_right - b_right) / photos
    inside = (low <= truth + 1e-9) & (high >= truth - 1e-9)
    return float(ways[inside & (ways > 0)].sum() / ways.sum())


@pytest.mark.parametrize("answered", [10, 20, 35, 39])
def test_limits_hold_the_truth_in_few_photos_too(answered: int) -> None:
    shares = [(a, b) for a in range(0, 41, 4) for b in range(0, 41 - a, 4)]
    found = [exact_coverage(40, answered, a, b) for a, b in shares]
    assert min(found) > 0.93
    assert np.mean(found) > 0.95


@pytest.mark.parametrize(
    "setting", [Setting(3000, 0.7, 0.25, 0.06, 100), Setting(3000, 0.5, 0.4, 0, 100)]
)
def test_coverage_is_as_claimed(setting: Setting) -> None:
    told = measure(setting, DRAWS)
    for name in ("a", "b", "difference"):
        assert told[name]["coverage"] == pytest.approx(0.95, abs=SLACK)
        assert abs(told[name]["bias"]) < 4 * told[name]["bias_error"]
    assert told["wrong"] < 0.05 + SLACK


@pytest.mark.parametrize(("differ", "agree"), [(0, 9), (9, 0), (3, 20), (20, 3)])
def test_beginning_of_the_order_holds_both_kinds_as_planned(differ: int, agree: int) -> None:
    kinds = np.arange(differ + agree) < differ
    places = order(kinds, 7)
    assert sorted(places) == list(range(differ + agree))
    for clicks in range(len(places) + 1):
        first = int(kinds[places[:clicks]].sum())
        assert (first, clicks - first) == drawn(clicks, differ, agree)


def test_every_photo_of_a_kind_is_drawn_with_the_same_probability() -> None:
    kinds = np.arange(10) < 4
    counts = np.bincount(
        np.concatenate([order(kinds, seed)[:5] for seed in range(4000)]), minlength=10
    )
    first, second = drawn(5, 4, 6)
    expected = np.where(kinds, first / 4, second / 6) * 4000
    assert np.abs(counts - expected).max() < 4 * np.sqrt(4000 * 0.25)
