"""One Gaussian a class over the features, with means that are held near the class's text.

Source: docs/joint.md.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from microclip_deploy.joint.neighbours import blocks
from microclip_deploy.joint.shortlist import Shortlist

WEIGHT = 20.0
"""Of the mean log-likelihood over the E dimensions: 1/26 of their sum for the E = 512 of CLIP."""
ANCHOR = 4.0
"""How many photos the text of a class counts as."""
VARIANCE_FLOOR = 1e-3
"""Least variance of a dimension, in units of 1 / E, which is that of random unit vectors."""


class Mixture:
    """Means (C, E) and one diagonal variance (E,) for all classes.

    With the variance shared, the square of a feature says the same to all classes and is left out.
    """

    def __init__(
        self, features: NDArray[np.float32], texts: NDArray[np.float32], read: Shortlist
    ) -> None:
        """Start at the texts.

        Args:
            features: (N, E), unit rows.
            texts: the class matrix (C, E), unit rows.
            read: probabilities of the texts.
        """
        self._features, self._texts, self.means = features, texts, texts
        mass, sums = self._moments(read)
        squares = np.einsum("ne,ne->e", features, features)
        spread = squares - 2 * (texts * sums).sum(axis=0) + mass @ texts**2
        self._start = self._floored(spread / len(features))
        self._variance = self._start

    def log_likelihood(self, classes: NDArray[np.int32]) -> NDArray[np.float32]:
        """Return `WEIGHT` / E times the log-likelihood (N, K) of each photo's classes.

        What is the same for all classes of a photo is left out.
        """
        scaled = (WEIGHT / self.means.shape[1]) * self.means / self._variance
        constant = 0.5 * (scaled * self.means).sum(axis=1)
        likelihood = np.empty(classes.shape, np.float32)
        for block in blocks(len(classes), len(scaled)):
            every = self._features[block] @ scaled.T - constant
            likelihood[block] = np.take_along_axis(every, classes[block], axis=1)
        return likelihood

    def update(self, read: Shortlist) -> None:
        """Move means and variance to what photos of these probabilities say, and their texts."""
        mass, sums = self._moments(read)
        photos = np.bincount(read.best(), minlength=len(mass))[:, None]
        own = (photos / (ANCHOR + photos)).astype(np.float32)
        self.means = _unit(own * _unit(sums) + (1 - own) * self._texts)
        moved = (self._texts - self.means) ** 2
        counted = (read.values * own[read.classes, 0]).sum(axis=1)
        spread: NDArray[np.float32] = np.zeros(self.means.shape[1], np.float32)
        for block in blocks(*self._features.shape):
            spread += counted[block] @ self._features[block] ** 2
        spread += (own * (mass[:, None] * self.means**2 - 2 * self.means * sums)).sum(axis=0)
        spread += ((1 - own) * mass[:, None] * (self._start + moved)).sum(axis=0)
        self._variance = self._floored(spread / len(self._features))

    def _moments(self, read: Shortlist) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return sum_i z_ic (C,) and sum_i z_ic x_i (C, E)."""
        count, size = self._texts.shape
        listed = read.classes.ravel()
        mass = np.bincount(listed, read.values.ravel(), count).astype(np.float32)
        sums = np.zeros((count, size), np.float32)
        for block in blocks(len(self._features), count):
            table = Shortlist(read.classes[block], read.values[block]).dense(count)
            sums += table.T @ self._features[block]
        return mass, sums

    def _floored(self, variance: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
        return variance.clip(VARIANCE_FLOOR / len(variance)).astype(np.float32, copy=False)


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return rows of norm 1; those that are 0 stay so."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    units: NDArray[np.float32] = rows / np.maximum(norms, np.float32(1e-12))
    return units
