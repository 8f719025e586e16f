"""What a benchmark is: classes with texts, a model and a recipe, and images drawn by number."""

from collections.abc import Iterator, Mapping, Sequence
from enum import IntEnum
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray


class Split(IntEnum):
    """The three image sets; the value keeps their random numbers apart."""

    ADAPT = 0
    VAL = 1
    TEST = 2


class Example(NamedTuple):
    """One rendered image."""

    label: int
    """Index into the benchmark's classes."""
    image: NDArray[np.uint8]
    """(S, S, 3)."""
    cover: NDArray[np.float32]
    """(S, S) in [0, 1]: where the object is."""


class Benchmark(Protocol):
    """A task that ships with the package: `letters` or `objects`."""

    name: ClassVar[str]
    model: ClassVar[str]
    """What `adapt --model` is given."""
    recipe: ClassVar[str]
    """What `adapt --recipe` is given."""
    sizes: ClassVar[Mapping[Split, int]]
    """Images of each split; every class equally often in the labelled ones."""
    covered: ClassVar[float]
    """A token shows the object when at least this share of its pixels does."""
    descriptions: ClassVar[Mapping[str, Sequence[str]]]
    """Class name -> sentences."""

    templates: ClassVar[Sequence[str]]
    """In the wording that the model was pretrained with; none for the usual one."""

    def labels(self, split: Split, count: int, *, seed: int = 0) -> NDArray[np.int64]:
        """Return the classes of the first images of a split, int64 (count,), without them."""
        ...

    def examples(self, split: Split, start: int, count: int, *, seed: int = 0) -> Iterator[Example]:
        """Render images `start` to `start + count` of a split.

        Args:
            split: which set.
            start: first index, a multiple of `BATCH`, whose images may be drawn together.
            count: number of images.
            seed: of the whole benchmark; two seeds give unrelated images.
        """
        ...


BATCH = 64
"""Images that are rendered together."""
