"""The few classes of each photo that a joint reading weighs: memory does not grow with classes."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

LONGEST = 32
"""Classes of a photo that are weighed. At scale 100 those after them have no share to speak of."""


class Shortlist(NamedTuple):
    """Classes of N photos with a number for each: K = min(C, `LONGEST`) a photo."""

    classes: NDArray[np.int32]
    """(N, K), rising along a row."""
    values: NDArray[np.float32]
    """(N, K): scores (logits, or logs of probabilities), or joint probabilities, which sum to 1."""

    def best(self) -> NDArray[np.int32]:
        """Return the class (N,) of the highest value; of equal ones the lower class."""
        column = self.values.argmax(axis=1)[:, None]
        return np.take_along_axis(self.classes, column, axis=1)[:, 0]

    def ranks(self, labels: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return (N,): how many classes are placed before the label; K where it is not listed."""
        listed = self.classes == labels[:, None]
        right = np.where(listed, self.values, -np.inf).max(axis=1, keepdims=True)
        before = (self.values == right) & (self.classes < labels[:, None])
        placed: NDArray[np.int64] = ((self.values > right) | before).sum(axis=1)
        return placed

    def dense(self, classes: int) -> NDArray[np.float32]:
        """Return the values as float32 (N, C), 0 where a class is not listed."""
        table = np.zeros((len(self.classes), classes), np.float32)
        np.put_along_axis(table, self.classes, self.values, axis=1)
        return table


def shortlisted(scores: NDArray[np.float32]) -> Shortlist:
    """Return the classes of the highest scores of each row of float32 (B, C)."""
    rows, count = scores.shape
    if count <= LONGEST:
        classes = np.tile(np.arange(count, dtype=np.int32), (rows, 1))
        return Shortlist(classes, scores.copy())
    best = np.argpartition(scores, count - LONGEST, axis=1)[:, count - LONGEST :]
    best.sort(axis=1)
    return Shortlist(best.astype(np.int32), np.take_along_axis(scores, best, axis=1))
