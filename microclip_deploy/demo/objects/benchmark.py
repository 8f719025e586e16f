"""The objects benchmark: 42 animals, in drawings that the tiny model never saw."""

from collections.abc import Iterator
from functools import cache
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from microclip_deploy.demo.benchmark import BATCH, Benchmark, Example, Split
from microclip_deploy.demo.objects.drawings import TARGET_ARTISTS, Drawings, target_sheets
from microclip_deploy.demo.objects.names import CAPTIONS, CLASSES, CLUTTER, descriptions
from microclip_deploy.demo.objects.scene import COVERED, Domain, render

TARGET = Domain(sizes=((30, 44),), clutter=0.9, clutter_sizes=(14, 24))
"""One animal in each scene."""


class Objects(Benchmark):
    """Small animals among clutter (docs/demo.md)."""

    name = "objects"
    model = "demo-objects"
    recipe = "demo-objects"
    sizes: ClassVar = {Split.ADAPT: 42 * 72, Split.VAL: 42 * 36, Split.TEST: 42 * 36}
    covered = COVERED
    descriptions = descriptions()
    templates = CAPTIONS

    def labels(self, split: Split, count: int, *, seed: int = 0) -> NDArray[np.int64]:
        """Return the classes of the first images of a split, int64 (count,), without them."""
        batches = range(0, count, BATCH)
        return torch.cat([_labels(split, start, seed) for start in batches])[:count].numpy()

    def examples(self, split: Split, start: int, count: int, *, seed: int = 0) -> Iterator[Example]:
        """Render images `start` to `start + count` of a split; `start` is a multiple of `BATCH`."""
        if start % BATCH:
            raise ValueError(f"start: expected a multiple of {BATCH}, found {start}")
        animals, clutter = _drawings(split)
        for first in range(start, start + count, BATCH):
            labels, generator = _labels(split, first, seed), _generator(split, first, seed, 1)
            scenes = render(animals, clutter, BATCH, TARGET, generator, labels=labels)
            pixels = (scenes.images * 255).round().byte().permute(0, 2, 3, 1).numpy()
            for i in range(min(BATCH, start + count - first)):
                yield Example(int(labels[i]), pixels[i], scenes.cover[i, 0].numpy())


OBJECTS = Objects()


@cache
def _drawings(split: Split) -> tuple[Drawings, Drawings]:
    """Return animals and clutter; validation and test show different drawings of each animal."""
    sheets = target_sheets()

    def chosen(thing: str, artist: str) -> bool:
        parity = (CLASSES.index(thing) + TARGET_ARTISTS.index(artist)) % 2
        return split is Split.ADAPT or parity == (split is Split.TEST)

    return Drawings(sheets, CLASSES, chosen), Drawings(sheets, CLUTTER)


def _labels(split: Split, start: int, seed: int) -> Tensor:
    """Return the classes of a batch, int64 (BATCH,)."""
    if split is not Split.ADAPT:
        return torch.arange(start, start + BATCH) % len(CLASSES)
    # Drawn, not counted: the order of the files tells nothing.
    return torch.randint(len(CLASSES), (BATCH,), generator=_generator(split, start, seed, 0))


def _generator(split: Split, start: int, seed: int, stream: int) -> torch.Generator:
    """Return the generator of a batch's labels (stream 0) or pixels (1)."""
    state = np.random.SeedSequence([seed, split, start, stream]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))
