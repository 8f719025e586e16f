"""How often each class occurs in a folder, estimated without labels.

Expectation-maximisation on the zero-shot probabilities (Saerens, Latinne, Decaestecker, Neural
Computation 2002): the class frequencies that make the probabilities, corrected by them, come out
as their own mean. It holds where the zero-shot probabilities are calibrated for equally frequent
classes; docs/long-tails.md says how wrong it was where the truth is known.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from microclip_deploy.adapt.train_step import AdaptConfig
from microclip_deploy.errors import printable
from microclip_deploy.verdict import effective_classes

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


UNEVEN = 0.75
"""Share of the classes that are effectively there, below which a folder is called uneven. Even
folders of the letters benchmark are estimated at 0.83, those of imbalance 10 at 0.75, of 50 at
0.67 (docs/long-tails.md)."""


def summary(frequencies: NDArray[np.float64], classes: Sequence[str], photos: int) -> str:
    """Tell a user how often the classes seem to occur among so many photos."""
    if photos < len(classes):
        return f"class frequencies: {photos} photos are too few to estimate those of {len(classes)}"
    order = np.argsort(-frequencies, kind="stable")
    tenth = max(1, len(order) // 10)
    return (
        f"class frequencies, estimated without labels: as uneven as "
        f"{effective_classes(frequencies):.0f} equally frequent classes of {len(order)}; the "
        f"{tenth} most frequent hold {frequencies[order[:tenth]].sum():.0%} of the images "
        f"({', '.join(printable(classes[c]) for c in order[: min(3, tenth)])})"
    )


def warning(frequencies: NDArray[np.float64], photos: int, config: AdaptConfig) -> str | None:
    """Warn where a fairness term that wants all classes equally often contradicts the folder."""
    there = effective_classes(frequencies) / len(frequencies)
    forced = config.fairness_weight > 0 and config.fairness_prior == "uniform"
    if not forced or there >= UNEVEN or photos < len(frequencies):
        return None
    return (
        f"the classes seem to be unevenly frequent (as {there:.0%} of them at equal frequencies), "
        "and this recipe teaches the model that they are not: frequent classes lose; adapt with "
        "--recipe default, unless you know that they are equally frequent"
    )
