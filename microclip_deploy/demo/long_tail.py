"""Long-tailed choices of the benchmark's unlabelled images, as real folders are long-tailed.

The class of rank r, of C in a drawn order, keeps round(most / imbalance^(r / (C - 1))) images, at
least one: the frequent ones about as many as they have, the rarest `imbalance` times fewer. Made
from the hidden labels, which only those who measure know.
"""

import math

import numpy as np
from numpy.typing import NDArray

IMBALANCES = (10, 50)
ORDERS = (0, 1, 2)
"""Of the lists that `demo` writes."""


def long_tail(
    labels: NDArray[np.int64], imbalance: float, order: int, most: int | None = None
) -> NDArray[np.int64]:
    """Return the positions that are kept, int64 (n,), ascending.

    Args:
        labels: int64 (N,), the class of each image.
        imbalance: images of the most frequent class over those of the rarest, at least 1.
        order: seed of which class is frequent.
        most: images of the most frequent class; None for as many as a class has on average.
    """
    classes = int(labels.max()) + 1
    most = math.ceil(len(labels) / classes) if most is None else most
    rank = np.random.default_rng(order).permutation(classes)
    quota = np.maximum(1, np.rint(most * imbalance ** (-rank / (classes - 1))))
    return np.flatnonzero(_occurrence(labels, classes) < quota[labels])


def _occurrence(labels: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """Return int64 (N,): how many images of the same class come before each."""
    before = np.zeros_like(labels)
    for c in range(classes):
        mine = labels == c
        before[mine] = np.arange(np.count_nonzero(mine))
    return before
