"""What a finished run answers to its folder and to the test split, kept beside it.

Whatever reads tokens or logits is measured on these without training again.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save

from microclip_deploy.artifact import write_bytes
from microclip_deploy.data.sources import list_images, read_batches
from microclip_deploy.demo.benchmark import Benchmark, Split
from microclip_deploy.serving import Session, open_run

ANSWERS = "answers.safetensors"
Answers = dict[str, NDArray[Any]]
"""`SPLIT.labels`, `SPLIT.adapted|initial.cls|fg|logits` for the splits folder and test, and the
class matrices `classifier`, `names` and `prior`."""


class Photos(NamedTuple):
    """Images with their classes."""

    paths: Sequence[Path]
    labels: NDArray[np.int64]


def unlabelled_photos(benchmark: Benchmark, images: Path) -> Photos:
    """Return the unlabelled images, in the order the adaptation has them."""
    paths = list_images(images / "adapt").paths
    return Photos(paths, benchmark.labels(Split.ADAPT, len(paths)))


def test_photos(benchmark: Benchmark, images: Path) -> Photos:
    """Return the balanced test split."""
    listed, classes = list_images(images / "test"), tuple(benchmark.descriptions)
    places = [classes.index(str(label)) for label in listed.labels]
    return Photos(listed.paths, np.array(places, np.int64))


def ask(session: Session, photos: Photos) -> dict[str, NDArray[np.float32]]:
    """Return what a session says: cls and fg (N, E), logits (N, C)."""
    batches = read_batches(photos.paths, session.preprocess, 256)
    found = [session.predict(batch.images) for batch in batches]
    names = ("cls", "fg", "logits")
    return {name: np.concatenate([getattr(each, name) for each in found]) for name in names}


def run_answers(out: Path, splits: Mapping[str, Photos]) -> Answers:
    """Return what a finished run answers, computed and kept unless it is there.

    Args:
        out: run directory.
        splits: folder and test.
    """
    kept = out / ANSWERS
    if kept.is_file():
        return read_answers(kept)
    with open_run(out) as run:
        told: Answers = {"classifier": run.adapted.classifier()}
        told |= {"names": run.names, "prior": run.prior}
        for split, photos in splits.items():
            told[f"{split}.labels"] = photos.labels
            for model, session in {"adapted": run.adapted, "initial": run.initial}.items():
                found = ask(session, photos)
                told |= {f"{split}.{model}.{name}": array for name, array in found.items()}
    write_bytes(kept, save(told))
    return told


def read_answers(path: Path) -> Answers:
    """Return what `run_answers` kept."""
    return dict(load_file(path))
