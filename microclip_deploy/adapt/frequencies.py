"""How often each class occurs in a folder, estimated without labels.

Expectation-maximisation on the zero-shot probabilities (Saerens, Latinne, Decaestecker, Neural
Computation 2002): the class frequencies that make the probabilities, corrected by them, come out
as their own mean. It holds where the zero-shot probabilities are calibrated for equally frequent
classes; docs/long-tails.md says how wrong it was where the truth is known.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ITERATIONS = 100
_SETTLED = 1e-4
"""L1 change at which the estimate has settled."""


def estimate(passes: Callable[[], Iterable[NDArray[np.float32]]]) -> NDArray[np.float64]:
    """Return the class frequencies, float64 (C,), sum 1.

    Args:
        passes: called once an iteration; yields the zero-shot probabilities of all photos,
            float32 (n, C) at a time, rows sum to 1.
    """
    frequencies: NDArray[np.float64] | None = None
    for _ in range(_ITERATIONS):
        total: Any = 0
        photos = 0
        for rows in passes():
            weighted = rows if frequencies is None else rows * (frequencies * rows.shape[1])
            total += (weighted / weighted.sum(axis=1, keepdims=True)).sum(axis=0, dtype=np.float64)
            photos += len(rows)
        before, frequencies = frequencies, np.asarray(total / photos)
        if before is not None and float(np.abs(frequencies - before).sum()) < _SETTLED:
            break
    assert frequencies is not None, "at least one iteration"
    return frequencies
