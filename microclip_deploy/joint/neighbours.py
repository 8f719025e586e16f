"""Which photos resemble each other: exact nearest neighbours, found a block of photos at a time."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

BLOCK = 2**24
"""Numbers in the largest temporary array: 64 MiB of float32."""


class Graph(NamedTuple):
    """Edges between photos in both directions, sorted by the photo that is told."""

    told: NDArray[np.int32]
    """(M,): the photo at the edge's end."""
    teller: NDArray[np.int32]
    """(M,): the photo at its beginning."""
    weight: NDArray[np.float32]
    """(M,), from 0 to 1 / 2k."""
    first: NDArray[np.int64]
    """(N + 1,): where the edges to each photo begin, and M. None has less than k of them."""


def blocks(count: int, width: int) -> Iterator[slice]:
    """Yield slices of `count` rows of `width` numbers, each of no more than `BLOCK` numbers."""
    step = max(1, BLOCK // max(width, 1))
    for begin in range(0, count, step):
        yield slice(begin, min(begin + step, count))


def nearest(features: NDArray[np.float32], k: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Return the indices and cosines, (N, k), of the k most similar other photos.

    All pairs are compared. Of equally similar photos the one of the lower index comes first.

    Args:
        features: float32 (N, E), unit rows.
        k: from 1 to N - 1.
    """
    count = len(features)
    index, cosine = np.empty((count, k), np.int32), np.empty((count, k), np.float32)
    for block in blocks(count, count):
        similar = features[block] @ features.T
        rows = np.arange(len(similar))
        similar[rows, rows + block.start] = -np.inf
        for place in range(k):  # faster than a partition of rows that are this long
            best = similar.argmax(axis=1)
            index[block, place], cosine[block, place] = best, similar[rows, best]
            similar[rows, best] = -np.inf
    return index, cosine


def graph_of(features: NDArray[np.float32], k: int) -> Graph:
    """Return the symmetric graph (W + W^T) / 2k; W_ij is the cosine, at least 0, of neighbours."""
    index, cosine = nearest(features, k)
    photo = np.repeat(np.arange(len(features), dtype=np.int32), k)
    told, teller = np.concatenate([photo, index.ravel()]), np.concatenate([index.ravel(), photo])
    weight = np.tile(cosine.ravel().clip(0) / (2 * k), 2).astype(np.float32, copy=False)
    order = np.argsort(told, kind="stable")
    first = np.searchsorted(told[order], np.arange(len(features) + 1))
    return Graph(told[order], teller[order], weight[order], first)


class Messages:
    """What neighbours tell each photo about the classes of its shortlist: W z."""

    def __init__(self, graph: Graph, classes: NDArray[np.int32], count: int) -> None:
        """Find every class of a photo among those of its neighbours, once.

        Args:
            graph: of N photos.
            classes: (N, K), as in `Shortlist`.
            count: C, how many classes there are.
        """
        self._graph, self._listed = graph, classes.shape[1]
        # Column K of a photo's probabilities is 0: the class is not on the teller's shortlist.
        self._column = np.empty((len(graph.told), self._listed), np.uint8)
        for block in blocks(len(graph.told), count):
            places = np.full((block.stop - block.start, count), self._listed, np.uint8)
            own = np.arange(self._listed, dtype=np.uint8)[None]
            np.put_along_axis(places, classes[graph.teller[block]], own, axis=1)
            self._column[block] = np.take_along_axis(places, classes[graph.told[block]], axis=1)

    def told(self, probabilities: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return W z, float32 (N, K), for z (N, K)."""
        graph, width = self._graph, self._listed + 1
        padded = np.pad(probabilities, ((0, 0), (0, 1))).ravel()
        heard = np.empty_like(probabilities)
        for block in blocks(len(heard), 16 * width):
            begin, end = graph.first[block.start], graph.first[block.stop]
            edges = slice(begin, end)
            cells = graph.teller[edges, None].astype(np.int64) * width + self._column[edges]
            said = padded[cells] * graph.weight[edges, None]
            np.add.reduceat(said, graph.first[block] - begin, axis=0, out=heard[block])
        return heard
