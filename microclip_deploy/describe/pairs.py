"""Pairs of classes that CLIP confuses: by the texts of their names, and by unlabelled photos."""

from collections import Counter

import numpy as np
from numpy.typing import NDArray

CLOSE = 0.5
"""A photo stands between its two best classes if the second has this share of the first."""

_BLOCK = 1024  # rows compared with all others at once: 80 MB at 10,000 classes

Rows = NDArray[np.float32]


def confused_pairs(
    text_rows: Rows, most: int, image_probabilities: NDArray[np.floating] | None = None
) -> list[tuple[int, int]]:
    """Return the pairs of classes that are most alike, the most confused first.

    Args:
        text_rows: float32 (C, E), unit rows of the class names.
        most: pairs at most.
        image_probabilities: (P, C), softmax over the classes for each photo. Pairs between which
            photos stand come first, by their number; pairs by cosine fill the rest.

    Returns:
        (i, j) with i < j, each pair once.
    """
    pairs = [] if image_probabilities is None else _between_photos(image_probabilities)
    return list(dict.fromkeys([*pairs, *_by_cosine(text_rows, most)]))[:most]


def nearest(text_rows: Rows, count: int) -> NDArray[np.int64]:
    """Return int64 (C, min(count, C - 1)): the classes of the highest cosine, the nearest first."""
    classes = len(text_rows)
    count = min(count, classes - 1)
    found = []
    for start in range(0, classes, _BLOCK):
        cosine = _others(text_rows, start)
        some = np.argpartition(-cosine, count - 1, axis=1)[:, :count]
        order = np.argsort(-np.take_along_axis(cosine, some, axis=1), axis=1, kind="stable")
        found.append(np.take_along_axis(some, order, axis=1))
    return np.concatenate(found)


def nearest_cosine(text_rows: Rows) -> Rows:
    """Return float32 (C,): the cosine of each class with the one nearest to it."""
    starts = range(0, len(text_rows), _BLOCK)
    return np.concatenate([_others(text_rows, start).max(axis=1) for start in starts])


def _others(text_rows: Rows, start: int) -> Rows:
    """Return the cosines of a block of classes with all; -inf with itself."""
    block = text_rows[start : start + _BLOCK]
    cosine = block @ text_rows.T
    own = np.arange(len(block))
    cosine[own, start + own] = -np.inf
    return cosine


def _by_cosine(text_rows: Rows, most: int) -> list[tuple[int, int]]:
    best: list[tuple[float, int, int]] = []
    for start in range(0, len(text_rows), _BLOCK):
        cosine = _others(text_rows, start)
        below = np.arange(len(text_rows)) < start + np.arange(len(cosine))[:, None]
        cosine[below] = -np.inf
        some = np.argpartition(-cosine, min(most, cosine.size) - 1, axis=None)[:most]
        rows, columns = np.unravel_index(some, cosine.shape)
        values = cosine[rows, columns]
        best += [
            (-value, start + row, column)
            for value, row, column in zip(
                values.tolist(), rows.tolist(), columns.tolist(), strict=True
            )
            if np.isfinite(value)
        ]
        best = sorted(best)[:most]
    return [(one, other) for _, one, other in best]


def _between_photos(probabilities: NDArray[np.floating]) -> list[tuple[int, int]]:
    """Return the pairs of classes between which photos stand, those of most photos first."""
    best = np.argpartition(-probabilities, 1, axis=1)[:, :2]
    two = np.take_along_axis(probabilities, best, axis=1)
    close = two.min(axis=1) >= CLOSE * two.max(axis=1)
    counts = Counter(map(tuple, np.sort(best[close], axis=1).tolist()))
    order = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    return [(one, other) for (one, other), _ in order]
