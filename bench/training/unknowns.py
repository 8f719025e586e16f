"""Whether photos of no known class are told apart: other letters, and scrambled ones.

A model adapts to 62 of the 82 classes with their images alone. On the test split, images of these
are known; images of the other 20 and images whose blocks were shuffled are unknown. How well the
probability of the best class tells them apart is the AUROC; the threshold is the one that the run
carries, found without labels. Finished runs are not repeated.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

from microclip_deploy.bench.card import environment
from microclip_deploy.bench.document import write_files
from microclip_deploy.bench.table_text import markdown_table
from microclip_deploy.bench.training.ablations import adapt_paths, spread
from microclip_deploy.bench.training.answers import Photos, ask, test_photos, unlabelled_photos
from microclip_deploy.bench.training.long_tail import EPOCHS
from microclip_deploy.calibration import softmax
from microclip_deploy.data.classes import ClassTexts, class_texts
from microclip_deploy.demo.folders import write_benchmark
from microclip_deploy.demo.letters.benchmark import LETTERS
from microclip_deploy.demo.long_tail import long_tail
from microclip_deploy.evaluation.reliability import Strangers
from microclip_deploy.serving import Session, open_session

KNOWN = 62
BLOCK = 16
"""Side of the blocks that are shuffled, pixels of 64."""

Row = dict[str, float]


def split_classes(texts: ClassTexts, seed: int) -> tuple[ClassTexts, NDArray[np.int64]]:
    """Return the texts of the known classes, and their positions among all, ascending."""
    known = np.sort(np.random.default_rng(seed).permutation(len(texts.names))[:KNOWN])
    names = tuple(texts.names[c] for c in known)
    said = tuple(texts.descriptions[c] for c in known)
    return replace(texts, names=names, descriptions=said), known


def scrambled(photos: Photos, seed: int) -> list[Image.Image]:
    """Return the images with their blocks in another order."""
    rng, found = np.random.default_rng(seed), []
    for path in photos.paths:
        pixels = np.asarray(Image.open(path).convert("RGB"))
        side = len(pixels) // BLOCK
        blocks = (
            pixels.reshape(side, BLOCK, side, BLOCK, 3).swapaxes(1, 2).reshape(-1, BLOCK, BLOCK, 3)
        )
        mixed = blocks[rng.permutation(len(blocks))].reshape(side, side, BLOCK, BLOCK, 3)
        found.append(Image.fromarray(mixed.swapaxes(1, 2).reshape(pixels.shape)))
    return found


def measure(session: Session, known: Photos, others: dict[str, NDArray[np.float32]]) -> Row:
    """Return accuracy, coverage and how each kind of unknown is told apart."""
    calibration = session.calibration
    assert calibration is not None, "every run carries one"
    logits = ask(session, known)["logits"]
    sure = softmax(logits, calibration.temperature).max(axis=1)
    right, answered = logits.argmax(axis=1) == known.labels, sure >= calibration.unknown_below
    row = {
        "accuracy": float(right.mean()),
        "answered": float(answered.mean()),
        "accuracy of answered": float(right[answered].mean()),
    }
    for kind, said in others.items():
        surest = softmax(said, calibration.temperature).max(axis=1)
        told = Strangers.of(surest, sure, calibration.unknown_below)
        row |= {f"AUROC, {kind}": told.auroc, f"called unknown, {kind}": told.flagged}
    return row


def run_once(images: Path, out: Path, seed: int) -> Row:
    """Adapt to the known classes unless it is done, and measure."""
    texts = class_texts(images / "classes.txt", images / "descriptions.json")
    some, known = split_classes(texts, seed)
    paths, labels = unlabelled_photos(LETTERS, images)
    chosen = long_tail(labels, 1, 0, most=10)
    chosen = chosen[np.isin(labels[chosen], known)]
    own = tuple(paths[i] for i in chosen)
    sets = (f"adapt.epochs={EPOCHS}",)
    adapt_paths(LETTERS, images, out, seed, own, texts=some, sets=sets)
    test = test_photos(LETTERS, images)
    is_known = np.isin(test.labels, known)

    def part(mask: NDArray[np.bool_]) -> Photos:
        rows = np.flatnonzero(mask)
        labels = np.searchsorted(known, test.labels[rows])
        return Photos(tuple(test.paths[row] for row in rows.tolist()), labels)

    with open_session(out) as session:
        others = {
            "other letters": ask(session, part(~is_known))["logits"],
            "scrambled": session.predict_photos(scrambled(part(is_known), seed)).logits,
        }
        return measure(session, part(is_known), others)


def main(
    out: Annotated[Path, typer.Option("-o", "--out", help="Working folder.")] = Path(
        "runs/unknowns"
    ),
    seeds: Annotated[str, typer.Option(help="Comma-separated.")] = "0,1,2",
    results_to: Annotated[
        Path | None, typer.Option(help="Write NAME.json and NAME.md with this prefix.")
    ] = None,
) -> None:
    """Run what is missing and print the table."""
    notes = Console(stderr=True)
    write_benchmark(LETTERS, out / "images", notes)
    rows = [run_once(out / "images", out / f"seed-{seed}", int(seed)) for seed in seeds.split(",")]
    table = [["measured", "%"], *([name, spread([row[name] for row in rows])] for name in rows[0])]
    text = "\n".join([*markdown_table(table), ""])
    document: dict[str, Any] = {
        "benchmark": "unknowns",
        "results": rows,
        "environment": environment(),
    }
    if results_to is not None:
        write_files(results_to.parent, results_to.stem, document, {".md": text})
    print(text)
    print(json.dumps(document))


if __name__ == "__main__":
    typer.run(main)
