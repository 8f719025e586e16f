"""Accuracies and their difference from a stratified sample, with intervals.

Two strata: photos on which the models differ, and those on which they agree. In each the answered
photos are a simple random sample without replacement. The difference depends on the first alone.

    share_limits        of one stratum: inverts the hypergeometric test with mid-p
    accuracy            both strata: unbiased; limits are put together by squares (MOVER)
    difference_limits   inverts Tango's score test, with the finite population correction
    verdict             at planned looks, with the boundary of O'Brien and Fleming

Mid-p and score tests are used because they hold 95 % on the average. Tests that never fall below
it are wider by a fifth at 100 answers. Once a stratum is answered completely its limits meet.
All functions take whole numbers or arrays of them and compute elementwise, in float64.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Z = 1.959964
"""Normal quantile of a two-sided 95 % interval."""
LOOKS = (0.25, 0.5, 0.75, 1.0)
"""Shares of the planned clicks after which it may be said that one model is better."""
BOUNDARY = 2.1
"""Constant of O'Brien and Fleming's boundary. For four looks and an error of 5 % it is 2.024; as
counts are whole numbers, 2.1 is needed to stay below 5 % in every setting that was simulated."""

FEW, FEW_LEFT = 50, 10
"""Photos in a stratum, and without an answer, up to which the difference's interval is widened:
exact enumeration found the plain score test to hold the truth too rarely there."""

_STEPS = 50  # halvings of [-1, 1]: far below one photo in a million

Counts = Any
"""A whole number or an array of them."""


class Tally(NamedTuple):
    """What is known of one stratum."""

    photos: Counts
    """All that belong to it."""
    answered: Counts
    a_right: Counts
    """Of the answered ones."""
    b_right: Counts


class Interval(NamedTuple):
    """An estimate, and what 95 % of such intervals hold; fractions of all photos."""

    estimate: Any
    low: Any
    high: Any


def share_limits(right: Counts, answered: Counts, photos: Counts) -> tuple[Any, Any]:
    """Return 95 % limits of the share of right answers in one stratum."""
    x, n, total = np.broadcast_arrays(right, answered, photos)
    high = 1 - _least(n - x, n, total) / np.maximum(total, 1)
    return _least(x, n, total) / np.maximum(total, 1), high


def _least(x: NDArray[np.int64], n: NDArray[np.int64], total: NDArray[np.int64]) -> Any:
    """Return the fewest right photos in a stratum under which `x` right ones are not too many."""
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, int(total.max(initial=0)) + 1)))])
    low, high = x.copy(), total - n + x
    while np.any(low < high):
        middle = (low + high) // 2
        enough = _tail(x, n, middle, total, logs) > (1 - 0.95) / 2
        low, high = (
            np.where(enough, low, np.minimum(middle + 1, high)),
            np.where(enough, middle, high),
        )
    return low


def _tail(x: Any, n: Any, right: Any, total: Any, logs: NDArray[np.float64]) -> Any:
    """Return the probability of more than `x` right answers, and half that of `x`."""
    k = np.arange(int(np.max(n, initial=0)) + 1)
    x, n, right, total = (part[..., None] for part in (x, n, right, total))
    possible = (k >= x) & (k <= n) & (k <= right) & (n - k <= total - right)

    def choose(of: Any, some: Any) -> Any:
        of, some = np.where(possible, of, 0), np.where(possible, some, 0)
        return logs[of] - logs[some] - logs[of - some]

    ways = choose(right, k) + choose(total - right, n - k) - choose(total, n)
    weights = np.where(k == x, 0.5, 1.0)
    return np.where(possible, weights * np.exp(ways), 0.0).sum(axis=-1)


def accuracy(*strata: tuple[Counts, Counts, Counts]) -> Interval:
    """Return the accuracy over all strata.

    Args:
        strata: each (right, answered, photos). Where none of a stratum is answered, its share is
            taken for anything from 0 to 1.
    """
    everything = np.maximum(sum(np.asarray(photos) for _, _, photos in strata), 1)
    estimate: Any = 0.0
    below: Any = 0.0
    above: Any = 0.0
    for right, answered, photos in strata:
        weight = photos / everything
        share = np.where(np.equal(answered, 0), 0.5, right / np.maximum(answered, 1))
        low, high = share_limits(right, answered, photos)
        estimate = estimate + weight * share
        below = below + (weight * (share - low)) ** 2
        above = above + (weight * (high - share)) ** 2
    return Interval(estimate, estimate - np.sqrt(below), estimate + np.sqrt(above))


def difference(differ: Tally, agree_photos: Counts, z: float = Z) -> Interval:
    """Return accuracy of A minus that of B, over all photos.

    Args:
        differ: the photos on which they differ.
        agree_photos: how many there are on which they agree.
        z: normal quantile of the interval.
    """
    weight = differ.photos / np.maximum(differ.photos + agree_photos, 1)
    lead = (differ.a_right - differ.b_right) / np.maximum(differ.answered, 1)
    low, high = difference_limits(differ, z)
    return Interval(weight * lead, weight * low, weight * high)


def difference_limits(differ: Tally, z: Any = Z) -> tuple[Any, Any]:
    """Return limits of the difference as a share of the photos on which the models differ.

    The score test takes counts for continuous. Where there are few photos, or few left, one photo
    is added at either side. Nothing lies outside of what the photos without an answer can bring.
    """
    total, n, a, b = np.broadcast_arrays(*(np.asarray(part, np.int64) for part in differ))
    lead, rest, photos = a - b, total - n, np.maximum(total, 1)
    more = ((total <= FEW) | (rest <= FEW_LEFT)) / photos
    low = np.maximum(-_most(total, n, b, a, z) - more, (lead - rest) / photos)
    high = np.minimum(_most(total, n, a, b, z) + more, (lead + rest) / photos)
    return low, high


def _most(total: Any, n: Any, a: Any, b: Any, z: Any) -> Any:
    """Return the largest difference that the answers do not contradict."""
    correction = (total - n) / np.maximum(total - 1, 1)
    low = (a - b) / np.maximum(n, 1)
    high = np.ones_like(low)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        inside = (n * middle - (a - b)) ** 2 <= z**2 * correction * _variance(n, a, b, middle)
        low, high = np.where(inside, middle, low), np.where(inside, high, middle)
    return np.where(n == 0, 1.0, high)


def _variance(n: Any, a: Any, b: Any, delta: Any) -> Any:
    """Return the variance of a - b, if `delta` is the difference and the rest fits best.

    Source: Tango 1998, Statistics in Medicine 17, 891-908: the restricted estimate of P(B right).
    """
    linear = -a - b + (2 * n - a + b) * delta
    constant = -b * delta * (1 - delta)
    root = np.sqrt(np.maximum(linear**2 - 8 * n * constant, 0))
    only_b = (root - linear) / np.maximum(4 * n, 1)
    return np.maximum(n * (2 * only_b + delta * (1 - delta)), 0)


def verdict(differ: Tally, planned: Counts) -> Any:
    """Say at a planned look which model is better: 1 for A, -1 for B, 0 if it cannot be told.

    Args:
        differ: the photos on which the models differ, as they were answered then.
        planned: how many of these are asked about in all.
    """
    n, total = differ.answered, differ.photos
    # Share of what the planned answers tell, where each tells more the fewer others there are.
    told = n * (total - planned) / np.maximum(planned * (total - n), 1)
    low, high = difference_limits(differ, BOUNDARY / np.sqrt(np.clip(told, 1e-6, 1)))
    return (low > 0).astype(int) - (high < 0).astype(int)
