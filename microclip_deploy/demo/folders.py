"""Write the benchmark as ordinary folders of PNG files, as a user's photos would lie.

    DIR/adapt/000000.png ...             unlabelled; neither name nor order tells the class
    DIR/val/CLASS/000000.png ...         ImageFolder: the folder is the label
    DIR/test/CLASS/000000.png ...
    DIR/val-ink/CLASS/000000.png ...     grey: coverage of the image of the same name by ink
    DIR/test-ink/CLASS/000000.png ...
    DIR/classes.txt, DIR/descriptions.json
    DIR/long-tail/imbalance-50-order-0.txt ...   lists of adapt/: classes are unevenly frequent

The number in a file name is the index of the image: with seed and split it decides every pixel,
so writing the same images again, for instance after an interruption, gives the same files.
"""

import multiprocessing
from enum import IntEnum
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

from microclip_deploy.artifact import make_directory, write_bytes, write_json, write_problem
from microclip_deploy.demo.glyphs import (
    CLASS_CHARACTERS,
    class_names,
    descriptions_by_name,
    glyph_name,
)
from microclip_deploy.demo.long_tail import IMBALANCES, ORDERS, long_tail
from microclip_deploy.demo.render import TARGET, RenderedGlyph, image_generator, render_glyph
from microclip_deploy.errors import UsageError

_WORKERS = 2
_CHUNK = 100


class Split(IntEnum):
    """The three image sets; the value keeps their random numbers apart."""

    ADAPT = 0
    VAL = 1
    TEST = 2


SIZES = {Split.ADAPT: 3072, Split.VAL: 82 * 12, Split.TEST: 82 * 20}
"""Images of each split; every class equally often in the labelled ones."""

RECIPE = "demo"
_WRITTEN = "complete.json"
"""Written last into the image folder: it need not be rendered again."""


def write_benchmark(directory: Path, notes: Console) -> None:
    """Write the images of all splits, class names, descriptions and lists into `directory`."""
    write_long_tails(directory)
    if (directory / _WRITTEN).is_file():
        notes.print(f"images: {directory} (already written)", markup=False)
        return
    write_class_texts(directory)
    for split, count in SIZES.items():
        notes.print(f"rendering {count} images: {split.name.lower()}")
        write_images(directory, split, count)
    write_json(directory / _WRITTEN, {split.name.lower(): count for split, count in SIZES.items()})
    notes.print(f"images: {directory}", markup=False)


def write_long_tails(directory: Path) -> None:
    """Write lists of the unlabelled images that thin them to long tails."""
    lists = directory / "long-tail"
    make_directory(lists)
    labels = hidden_labels(SIZES[Split.ADAPT])
    for imbalance, order in product(IMBALANCES, ORDERS):
        kept = long_tail(labels, imbalance, order)
        lines = "".join(f"../{Split.ADAPT.name.lower()}/{index:06d}.png\n" for index in kept)
        write_bytes(lists / f"imbalance-{imbalance}-order-{order}.txt", lines.encode())


def write_class_texts(directory: Path) -> None:
    """Write classes.txt and descriptions.json of the 82 classes."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_problem(directory, error) from error
    write_bytes(directory / "classes.txt", ("\n".join(class_names()) + "\n").encode())
    write_json(directory / "descriptions.json", descriptions_by_name())


def write_images(directory: Path, split: Split, count: int, *, seed: int = 0) -> Path:
    """Render target images of one split into PNG files, in two worker processes.

    Args:
        directory: benchmark folder; the split's folders are made in it.
        split: which set; labelled sets also get their ink masks.
        count: number of images. Labelled sets hold every class equally often when it is a
            multiple of 82.
        seed: seed of the whole benchmark; two seeds give unrelated images.

    Returns:
        The folder of the images.

    Raises:
        UsageError: `count` is not positive.
        EnvironmentProblem: the folder cannot be written.
    """
    if count < 1:
        raise UsageError(f"number of images: expected at least 1, found {count}; ask for more")
    write = partial(_write_image, directory, split, seed)
    # spawn, not fork: the caller may already run torch threads.
    try:
        for folder in _folders(directory, split):
            folder.mkdir(parents=True, exist_ok=True)
        with multiprocessing.get_context("spawn").Pool(_WORKERS) as workers:
            workers.map(write, range(count), chunksize=_CHUNK)
    except OSError as error:
        raise write_problem(directory, error) from error
    return directory / split.name.lower()


def target_image(split: Split, index: int, *, seed: int = 0) -> tuple[str, RenderedGlyph]:
    """Render one image of the benchmark again.

    Returns:
        The class character and the image with its ink.
    """
    rng = image_generator(seed, split, index)
    character = CLASS_CHARACTERS[_label(split, index, rng)]
    return character, render_glyph(character, TARGET, rng)


def hidden_labels(count: int, *, seed: int = 0) -> NDArray[np.int64]:
    """Return the classes of the first `count` unlabelled images: for measuring only, int64 (n,)."""
    split = Split.ADAPT
    return np.array([_label(split, i, image_generator(seed, split, i)) for i in range(count)])


def _label(split: Split, index: int, rng: np.random.Generator) -> int:
    """Return the class index of an image; the generator's first draw in every split."""
    # Drawn, not counted, in the unlabelled split: the order of its files tells nothing.
    drawn = int(rng.integers(len(CLASS_CHARACTERS)))
    return drawn if split is Split.ADAPT else index % len(CLASS_CHARACTERS)


def _folders(directory: Path, split: Split) -> list[Path]:
    name = split.name.lower()
    if split is Split.ADAPT:
        return [directory / name]
    tops = (directory / name, directory / f"{name}-ink")
    return [top / class_name for top in tops for class_name in class_names()]


def _write_image(directory: Path, split: Split, seed: int, index: int) -> None:
    name, file_name = split.name.lower(), f"{index:06d}.png"
    character, glyph = target_image(split, index, seed=seed)
    image = Image.fromarray(glyph.image)
    if split is Split.ADAPT:
        image.save(directory / name / file_name)
        return
    class_name = glyph_name(character)
    image.save(directory / name / class_name / file_name)
    ink = Image.fromarray(np.rint(glyph.ink * 255).astype(np.uint8))
    ink.save(directory / f"{name}-ink" / class_name / file_name)
