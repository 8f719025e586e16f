"""Which photos are asked about, in which order.

Photos on which the models differ and photos on which they agree are each put in a random order,
and the two orders are merged in a fixed ratio. So the first n photos of the order are, for every n,
a simple random sample without replacement of each kind: one may stop anywhere.
"""

import numpy as np
from numpy.typing import NDArray

CYCLE = (True, True, False)
"""Whether the models differ on the photos asked about: two of three decide which one is better."""


def order(differ: NDArray[np.bool_], seed: int) -> NDArray[np.int64]:
    """Return all photos (N,) in the order in which they are asked about.

    Args:
        differ: (N,), whether the models differ on a photo.
        seed: of the order.
    """
    generator = np.random.default_rng(seed)
    places = np.empty(len(differ))
    for kind in (True, False):
        [rows] = np.nonzero(differ == kind)
        [slots] = np.nonzero(np.array(CYCLE) == kind)
        turn = np.arange(len(rows))
        places[generator.permutation(rows)] = (
            turn // len(slots) * len(CYCLE) + slots[turn % len(slots)]
        )
    return np.argsort(places, kind="stable")


def drawn(clicks: int, differ: int, agree: int) -> tuple[int, int]:
    """Return of how many photos of each kind the first `clicks` of the order consist.

    Args:
        clicks: length of the beginning.
        differ: all photos on which the models differ.
        agree: all others.
    """
    wanted = [int(np.sum(np.resize(CYCLE, clicks) == kind)) for kind in (True, False)]
    first = min(differ, max(wanted[0], clicks - agree))
    return first, min(agree, clicks - first)
