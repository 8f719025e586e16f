"""Write a benchmark as ordinary folders of PNG files, as a user's photos would lie.

    DIR/adapt/000000.png ...             unlabelled; neither name nor order tells the class
    DIR/val/CLASS/000000.png ...         ImageFolder: the folder is the label
    DIR/test/CLASS/000000.png ...
    DIR/val-cover/CLASS/000000.png ...   grey: where the object of the image of the same name is
    DIR/test-cover/CLASS/000000.png ...
    DIR/classes.txt, DIR/descriptions.json
    DIR/long-tail/imbalance-50-order-0.txt ...   lists of adapt/: classes are unevenly frequent

The number in a file name is the index of the image: with seed and split it decides every pixel,
so writing the same images again, for instance after an interruption, gives the same files. On
another kind of processor a few pixels of `objects` may differ by a level.
"""

import multiprocessing
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from microclip_deploy.artifact import (
    make_directory,
    read_json,
    write_bytes,
    write_json,
    write_problem,
)
from microclip_deploy.demo.benchmark import BATCH, Benchmark, Example, Split
from microclip_deploy.demo.long_tail import IMBALANCES, ORDERS, long_tail
from microclip_deploy.errors import UsageError

_WORKERS = 2
_WRITTEN = "benchmark.json"
"""Written last into the image folder: it need not be rendered again."""


def write_benchmark(benchmark: Benchmark, directory: Path, notes: Console) -> None:
    """Write the images of all splits, class names, descriptions and lists into `directory`.

    Raises:
        UsageError: the folder holds the images of another benchmark, or of an older version.
        EnvironmentProblem: the folder cannot be written.
    """
    names, written = directory / "classes.txt", directory / _WRITTEN
    sizes = {split.name.lower(): count for split, count in benchmark.sizes.items()}
    contents = {"benchmark": benchmark.name, "images": sizes}
    found = read_json(written) if written.is_file() else None
    other = names.is_file() and names.read_text("utf-8").split("\n")[:-1] != [
        *benchmark.descriptions
    ]
    if other or found not in (None, contents):
        raise UsageError(
            f"{directory}: expected the images of {benchmark.name} or nothing, found others; "
            "choose another folder"
        )
    if found:
        notes.print(f"images: {directory} (already written)", markup=False)
        return
    write_class_texts(benchmark, directory)
    write_long_tails(benchmark, directory)
    for split, count in benchmark.sizes.items():
        notes.print(f"rendering {count} images: {split.name.lower()}")
        write_images(benchmark, directory, split, count)
    write_json(written, contents)
    notes.print(f"images: {directory}", markup=False)


def write_long_tails(benchmark: Benchmark, directory: Path) -> None:
    """Write lists of the unlabelled images that thin them to long tails."""
    lists = directory / "long-tail"
    make_directory(lists)
    labels = benchmark.labels(Split.ADAPT, benchmark.sizes[Split.ADAPT])
    for imbalance, order in product(IMBALANCES, ORDERS):
        kept = long_tail(labels, imbalance, order)
        lines = "".join(f"../{Split.ADAPT.name.lower()}/{index:06d}.png\n" for index in kept)
        write_bytes(lists / f"imbalance-{imbalance}-order-{order}.txt", lines.encode())


def write_class_texts(benchmark: Benchmark, directory: Path) -> None:
    """Write classes.txt and descriptions.json."""
    make_directory(directory)
    write_bytes(directory / "classes.txt", ("\n".join(benchmark.descriptions) + "\n").encode())
    write_json(directory / "descriptions.json", dict(benchmark.descriptions))


def write_images(
    benchmark: Benchmark, directory: Path, split: Split, count: int, *, seed: int = 0
) -> Path:
    """Render images of one split into PNG files, in two worker processes.

    Args:
        benchmark: whose images.
        directory: benchmark folder; the split's folders are made in it.
        split: which set; labelled sets also get where their objects are.
        count: number of images. Labelled sets hold every class equally often when it is a
            multiple of their number.
        seed: seed of the whole benchmark; two seeds give unrelated images.

    Returns:
        The folder of the images.

    Raises:
        UsageError: `count` is not positive.
        EnvironmentProblem: the folder cannot be written.
    """
    if count < 1:
        raise UsageError(f"number of images: expected at least 1, found {count}; ask for more")
    write = partial(_write_batch, benchmark, directory, split, count, seed)
    # spawn, not fork: the caller may already run torch threads. One thread each: processes share.
    spawn = multiprocessing.get_context("spawn")
    try:
        for folder in _folders(benchmark, directory, split):
            folder.mkdir(parents=True, exist_ok=True)
        with spawn.Pool(_WORKERS, torch.set_num_threads, (1,)) as workers:
            workers.map(write, range(0, count, BATCH), chunksize=1)
    except OSError as error:
        raise write_problem(directory, error) from error
    return directory / split.name.lower()


def cover_folder(split: Split) -> str:
    """Return the name of the folder that says where the objects of a labelled split are."""
    return f"{split.name.lower()}-cover"


def _folders(benchmark: Benchmark, directory: Path, split: Split) -> list[Path]:
    name = split.name.lower()
    if split is Split.ADAPT:
        return [directory / name]
    tops = (directory / name, directory / cover_folder(split))
    return [top / class_name for top in tops for class_name in benchmark.descriptions]


def _write_batch(
    benchmark: Benchmark, directory: Path, split: Split, total: int, seed: int, start: int
) -> None:
    names = tuple(benchmark.descriptions)
    examples = benchmark.examples(split, start, min(BATCH, total - start), seed=seed)
    for index, example in enumerate(examples, start):
        _write_image(directory, split, names[example.label], example, f"{index:06d}.png")


def _write_image(
    directory: Path, split: Split, class_name: str, example: Example, file_name: str
) -> None:
    image, folder = Image.fromarray(example.image), directory / split.name.lower()
    if split is Split.ADAPT:
        image.save(folder / file_name)
        return
    image.save(folder / class_name / file_name)
    cover = Image.fromarray(np.rint(example.cover * 255).astype(np.uint8))
    cover.save(directory / cover_folder(split) / class_name / file_name)
