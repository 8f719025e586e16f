"""When requests of an open loop are due: users who do not know of one another."""

import numpy as np
from numpy.typing import NDArray


def poisson(rate: float, seconds: float, seed: int) -> NDArray[np.float64]:
    """Return when requests are due, seconds from the start, in rising order; at least one.

    Gaps are exponential, so that requests come in bunches as those of many users do.

    Args:
        rate: mean number a second.
        seconds: the last one is due before.
        seed: the same arrivals for the same seed, so that everybody measured gets the same.
    """
    rng = np.random.default_rng(seed)
    due = rng.exponential(1 / rate, size=1)
    while due[-1] < seconds:
        more = rng.exponential(1 / rate, size=1 + int(rate * seconds))
        due = np.concatenate([due, due[-1] + more.cumsum()])
    return due[: max(1, int(np.searchsorted(due, seconds)))]
