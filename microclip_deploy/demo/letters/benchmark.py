"""The letters benchmark: 82 classes, each image drawn from its own number."""

from collections.abc import Iterator
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from microclip_deploy.demo.benchmark import Benchmark, Example, Split
from microclip_deploy.demo.letters.glyphs import CLASS_CHARACTERS, descriptions_by_name
from microclip_deploy.demo.letters.render import TARGET, image_generator, render_glyph


class Letters(Benchmark):
    """Small Latin letters with one mark, photographed on paper (docs/demo.md)."""

    name = "letters"
    model = "demo"
    recipe = "demo"
    sizes: ClassVar = {Split.ADAPT: 3072, Split.VAL: 82 * 12, Split.TEST: 82 * 20}
    covered = 0.1
    descriptions = descriptions_by_name()
    templates = ()

    def labels(self, split: Split, count: int, *, seed: int = 0) -> NDArray[np.int64]:
        """Return the classes of the first images of a split, int64 (count,), without them."""
        return np.array([_label(split, i, image_generator(seed, split, i)) for i in range(count)])

    def examples(self, split: Split, start: int, count: int, *, seed: int = 0) -> Iterator[Example]:
        """Render images `start` to `start + count` of a split."""
        for index in range(start, start + count):
            rng = image_generator(seed, split, index)
            label = _label(split, index, rng)
            glyph = render_glyph(CLASS_CHARACTERS[label], TARGET, rng)
            yield Example(label, glyph.image, glyph.ink)


LETTERS = Letters()


def _label(split: Split, index: int, rng: np.random.Generator) -> int:
    """Return the class index of an image; the generator's first draw in every split."""
    # Drawn, not counted, in the unlabelled split: the order of its files tells nothing.
    drawn = int(rng.integers(len(CLASS_CHARACTERS)))
    return drawn if split is Split.ADAPT else index % len(CLASS_CHARACTERS)
