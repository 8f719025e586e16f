"""The filter: which sentences separate their class from its neighbours in CLIP's text space.

The name alone would separate any sentence that holds it, so a sentence is measured without it
(`neutral`). With e its unit row, u the unit rows of the class names as plain CLIP uses them, c its
class and N(c) the NEIGHBOURS classes nearest to u_c by cosine, its margin is

    m = e . u_c - max over n in N(c) of e . u_n

and it is kept where m > 0. Every class keeps its LEAST best sentences, or all if it has fewer.

Source: arXiv 2412.11917 selects class-name-free descriptions in the neighbourhood of labels that
CLIP confuses. It measures them on images; here the class names stand in for these, because there
are no labels. Nothing is trained.
"""

import re
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

NEIGHBOURS = 5
"""Classes that a sentence must tell its own from."""
LEAST = 3
"""Sentences that a class keeps at least, if it has so many."""

STAND_IN = "it"
"""Stands where the class name was."""


class Margins(NamedTuple):
    """How far sentences separate their classes."""

    values: NDArray[np.float32]
    """(S,), m of each sentence."""
    rivals: NDArray[np.int64]
    """(S,), the neighbour that comes nearest to it."""


def neutral(text: str, name: str) -> str:
    """Return a sentence with its class name replaced, so that only what it says counts."""
    pattern = r"\s+".join(map(re.escape, name.split()))
    named = rf"(?:\b(?:an?|the)\s+)?\b{pattern}(?:'s|s)?\b(?::\s*)?"
    return " ".join(re.sub(named, f"{STAND_IN} ", text, flags=re.IGNORECASE).split())


def margins(
    rows: NDArray[np.float32],
    owners: NDArray[np.int64],
    class_rows: NDArray[np.float32],
    neighbours: NDArray[np.int64],
) -> Margins:
    """Return how much nearer sentences are to their class than to its neighbours.

    Args:
        rows: float32 (S, E), unit rows of neutral sentences.
        owners: int64 (S,), the class of each.
        class_rows: float32 (C, E), unit rows of the class names.
        neighbours: int64 (C, K), as from `pairs.nearest`.
    """
    own = np.einsum("se,se->s", rows, class_rows[owners])
    others = np.einsum("se,ske->sk", rows, class_rows[neighbours[owners]])
    worst = others.argmax(axis=1)
    rivals = np.take_along_axis(neighbours[owners], worst[:, None], axis=1)[:, 0]
    return Margins(own - others.max(axis=1), rivals)


def separating(
    margin: NDArray[np.float32], owners: NDArray[np.int64], least: int = LEAST
) -> NDArray[np.bool_]:
    """Return bool (S,): which sentences are kept; of equal margins the earlier sentence wins."""
    order = np.lexsort((np.arange(len(margin)), -margin, owners))
    first = np.searchsorted(owners[order], owners[order])
    kept = margin > 0
    kept[order[np.arange(len(order)) - first < least]] = True
    return kept
