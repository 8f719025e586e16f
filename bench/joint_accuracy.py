"""Joint reading against reading each photo alone: all of a labelled set, and unlike parts of it.

Parts have few of the classes, or are thinned exponentially by class in a random order of classes,
as users' folders are; each is drawn several times and read as a folder of its own. The last line of
stdout is one JSON document.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from microclip_deploy.artifact import write_json
from microclip_deploy.bench.card import environment
from microclip_deploy.data.decode import BadImage
from microclip_deploy.data.labelled import LabelledImages
from microclip_deploy.data.sources import read_batches
from microclip_deploy.joint import Folder
from microclip_deploy.serving import open_session

FEW = {1: 20, 3: 20, 10: 8}
"""Classes that are present -> how often they are drawn."""
IMBALANCES = {10: 4, 50: 4}
"""Images of the first class over those of the last -> how often the order is drawn."""

Labels = NDArray[np.int64]
Said = tuple[NDArray[np.float32], NDArray[np.float32], Labels, NDArray[np.float32]]
"""[CLS] embeddings, logits, labels and the class matrix."""


def said_of(model: Path, images: Path) -> Said:
    """Return what a run or an export says of labelled images."""

    def skip(index: int, error: BadImage) -> None:
        raise error

    with open_session(model, "cpu") as session:
        listed = LabelledImages.read(images, session.classes)
        found, indices = [], []
        for batch in read_batches(listed.paths, session.preprocess, 64, on_bad=skip):
            found.append(session.predict(batch.images))
            indices.append(batch.indices)
        cls, logits = (
            np.concatenate([getattr(said, part) for said in found]) for part in ("cls", "logits")
        )
        return cls, logits, listed.labels[np.concatenate(indices)], session.classifier()


def parts_of(labels: Labels, rng: np.random.Generator) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """Yield the name and the indices of each part."""
    classes = labels.max() + 1
    yield "all", np.arange(len(labels))
    for present, draws in FEW.items():
        for _ in range(draws):
            chosen = rng.permutation(classes)[:present]
            yield f"{present} present", np.flatnonzero(np.isin(labels, chosen))
    for imbalance, draws in IMBALANCES.items():
        for _ in range(draws):
            yield f"imbalance {imbalance}", _thinned(labels, imbalance, rng)


def _thinned(labels: Labels, imbalance: int, rng: np.random.Generator) -> NDArray[np.int64]:
    classes = labels.max() + 1
    kept = []
    for place, c in enumerate(rng.permutation(classes)):
        images = rng.permutation(np.flatnonzero(labels == c))
        share = imbalance ** (-place / max(classes - 1, 1))
        kept.append(images[: max(1, round(len(images) * share))])
    return np.sort(np.concatenate(kept))


def compared(said: Said) -> dict[str, list[tuple[float, float]]]:
    """Return top-1 alone and jointly for every draw of every part."""
    cls, logits, labels, classifier = said
    found: dict[str, list[tuple[float, float]]] = {}
    for name, part in parts_of(labels, np.random.default_rng(0)):
        folder = Folder(classifier)
        folder.add(cls[part], logits[part])
        answers = (logits[part].argmax(axis=1), folder.read().best())
        alone, together = (float((answer == labels[part]).mean()) for answer in answers)
        found.setdefault(name, []).append((alone, together))
    return found


def main(
    images: Annotated[Path, typer.Argument(help="Labelled images, as for `evaluate`.")],
    models: Annotated[list[Path], typer.Argument(help="What adapt or export wrote.")],
    out: Annotated[Path | None, typer.Option(help="Write the result here (JSON).")] = None,
) -> None:
    """Compare, print a line for each part, then one line of JSON."""
    found: dict[str, list[tuple[float, float]]] = {}
    for model in models:
        for name, draws in compared(said_of(model, images)).items():
            found.setdefault(name, []).extend(draws)
    rows: list[dict[str, Any]] = []
    for name, draws in found.items():
        alone, together = 100 * np.array(draws).T
        gain = together - alone
        rows.append(
            {
                "part": name,
                "draws": len(draws),
                "alone": round(float(alone.mean()), 2),
                "joint": round(float(together.mean()), 2),
                "worse": int((gain < 0).sum()),
                "least": round(float(gain.min()), 2),
            }
        )
        print(
            f"{name:12} alone {alone.mean():5.1f}  joint {together.mean():5.1f}  "
            f"({gain.mean():+.2f}; worse in {(gain < 0).sum()} of {len(gain)} draws, "
            f"by {max(0, -gain.min()):.1f} at most)"
        )
    result = {
        "benchmark": "joint accuracy",
        "images": images.name,
        "models": [model.name for model in models],
        "rows": rows,
        "environment": environment(),
    }
    if out is not None:
        write_json(out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
