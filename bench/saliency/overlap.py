"""Intersection over union with true masks: its mean by the size of the object, with intervals."""

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

SIZES = {
    "under 10 %": (0.0, 0.1),
    "10 to 20 %": (0.1, 0.2),
    "20 to 35 %": (0.2, 0.35),
    "35 to 50 %": (0.35, 0.5),
    "over 50 %": (0.5, np.inf),
    "all": (0.0, np.inf),
}
"""Name -> share of the frame that the object covers, from and below."""
RESAMPLES = 2000
FOUND = 0.5
"""An overlap above it counts as found."""


class Mean(BaseModel):
    """A mean and its 95 % interval by the bootstrap."""

    mean: float
    low: float
    high: float
    images: int


class Sizes:
    """Means over images by the size of their object.

    Cut-outs are resampled, not images: those of one cut-out are alike.
    """

    def __init__(self, share: NDArray[np.float64], cutout: NDArray[np.int64]) -> None:
        """Draw the resamples, always the same ones.

        Args:
            share: (B,) of the frame that the object covers.
            cutout: (B,) which one it is.
        """
        count = int(cutout.max()) + 1
        rng = np.random.default_rng(0)
        self._drawn = rng.multinomial(count, np.full(count, 1 / count), RESAMPLES)
        self._of = {
            name: np.equal.outer(np.arange(count), cutout) & (low <= share) & (share < high)
            for name, (low, high) in SIZES.items()
        }

    def means(self, values: NDArray[np.float64]) -> dict[str, Mean]:
        """Return size -> mean of values (B,); a size without images is left out."""
        return {name: self._mean(values, of) for name, of in self._of.items() if of.any()}

    def _mean(self, values: NDArray[np.float64], of: NDArray[np.bool_]) -> Mean:
        images = int(of.sum())
        sums, counts = self._drawn @ (of @ values), self._drawn @ of.sum(axis=1)
        means = sums[counts > 0] / counts[counts > 0]
        low, high = np.percentile(means, (2.5, 97.5))
        return Mean(mean=(of @ values).sum() / images, low=low, high=high, images=images)
