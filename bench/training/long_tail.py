"""Recipes on long-tailed folders of the embedded benchmark: folders x recipes x seeds -> one table.

Each run adapts to a folder with hidden labels and is measured on that folder and on the balanced
test split. The answers to both are kept beside it (`answers.safetensors`), so that whatever reads
logits can be measured without training again. Finished runs are not repeated.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from microclip_deploy.bench.training.ablations import adapt_paths
from microclip_deploy.data.sources import list_images, read_batches
from microclip_deploy.demo.folders import hidden_labels
from microclip_deploy.demo.long_tail import long_tail
from microclip_deploy.serving import Session, open_run

EPOCHS = 8
"""The folders hold a quarter of the benchmark's images; the demo takes 2 epochs over all."""

ANSWERS = "answers.safetensors"


Answers = dict[str, NDArray[Any]]
"""`SPLIT.labels`, `SPLIT.adapted|initial.cls|fg|logits` for the splits folder and test, and the
class matrices `classifier`, `names` and `prior`."""


class Folder(NamedTuple):
    """A choice of the unlabelled images."""

    name: str
    imbalance: float
    order: int = 0
    most: int = 38


FOLDERS = (
    Folder("balanced", 1, most=10),
    *(Folder(f"imbalance-{i}-order-{o}", i, o) for i in (10, 50) for o in (0, 1)),
)

RECIPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "no-fairness": ("adapt.fairness_weight=0",),
    "estimated": ("adapt.fairness_prior=estimated",),
    "boundary": ("adapt.boundary=true", "adapt.fairness_weight=0"),
    "boundary-estimated": ("adapt.boundary=true", "adapt.fairness_prior=estimated"),
}
"""Name -> settings in place of the demo's."""


class Photos(NamedTuple):
    """Images with their classes."""

    paths: tuple[Path, ...]
    labels: NDArray[np.int64]


def folder_photos(images: Path, folder: Folder) -> Photos:
    """Return the images of a folder, in the order the adaptation has them."""
    paths = list_images(images / "adapt").paths
    labels = hidden_labels(len(paths))
    kept = long_tail(labels, folder.imbalance, folder.order, folder.most)
    return Photos(tuple(paths[i] for i in kept), labels[kept])


def test_photos(images: Path, classes: tuple[str, ...]) -> Photos:
    """Return the balanced test split."""
    listed = list_images(images / "test")
    return Photos(
        listed.paths, np.array([classes.index(str(label)) for label in listed.labels], np.int64)
    )


def answers(session: Session, photos: Photos) -> dict[str, NDArray[np.float32]]:
    """Return what a session says: cls and fg (N, E), logits (N, C)."""
    found = [
        session.predict(batch.images)
        for batch in read_batches(photos.paths, session.preprocess, 256)
    ]
    return {
        name: np.concatenate([getattr(each, name) for each in found])
        for name in ("cls", "fg", "logits")
    }


def run_once(images: Path, out: Path, folder: Folder, sets: tuple[str, ...], seed: int) -> Answers:
    """Adapt to a folder unless it is done, and return the answers to it and to the test split."""
    kept = out / ANSWERS
    if kept.is_file():
        return read_answers(kept)
    photos = folder_photos(images, folder)
    adapt_paths(images, out, "demo", seed, photos.paths, sets=(f"adapt.epochs={EPOCHS}", *sets))
    with open_run(out) as run:
        told: Answers = {"classifier": run.adapted.classifier()}
        told |= {"names": run.names, "prior": run.prior}
        test = test_photos(images, run.adapted.classes)
        for split, those in {"folder": photos, "test": test}.items():
            told[f"{split}.labels"] = those.labels
            for model, session in {"adapted": run.adapted, "initial": run.initial}.items():
                found = answers(session, those)
                told |= {f"{split}.{model}.{name}": array for name, array in found.items()}
    save_file(told, kept)
    return told


def read_answers(path: Path) -> Answers:
    """Return what `run_once` kept."""
    return dict(load_file(path))
