"""Ways to weigh [CLS], [FG] and photos of the folder, measured on finished runs.

No training: what each run answered is kept beside it. A weight a photo, by how sure each token is
or by whether they agree, is held against fixed weights; the mean photo of each class (prototype),
of the surest half or of all, is blended into the rows of the classifier.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer
from numpy.typing import NDArray

from microclip_deploy.artifact import MANIFEST
from microclip_deploy.bench.card import environment
from microclip_deploy.bench.document import write_files
from microclip_deploy.bench.table_text import markdown_table
from microclip_deploy.bench.training.ablations import OWN, spread
from microclip_deploy.bench.training.answers import (
    ANSWERS,
    Answers,
    read_answers,
    run_answers,
    test_photos,
    unlabelled_photos,
)
from microclip_deploy.calibration import softmax
from microclip_deploy.demo import BENCHMARKS
from microclip_deploy.demo.benchmark import Benchmark
from microclip_deploy.head import LOGIT_SCALE, fused_logits

ACCURACY = "half and half, top-1"
TEMPERATURE = 3.0
"""About where the probabilities of these runs are calibrated."""


def entropy(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the entropy (N,) of float (N, C) probabilities."""
    return np.asarray(-(shares * np.log(shares + 1e-12)).sum(axis=1))


def share_by_entropy(
    cls: NDArray[Any], fg: NDArray[Any], temperature: float
) -> NDArray[np.float64]:
    """Return the weight (N, 1) of [CLS]: more for the token whose prediction is sharper."""
    weights = [np.exp(-entropy(softmax(logits, temperature))) for logits in (cls, fg)]
    return (weights[0] / sum(weights))[:, None]


def with_prototypes(told: Answers, split: str, blend: float, surest: float) -> NDArray[np.float32]:
    """Return the logits of a split after the folder's class means were blended into the rows."""
    shares = softmax(told["folder.adapted.logits"], TEMPERATURE)
    sure = shares.max(axis=1)
    kept = sure >= np.quantile(sure, 1 - surest)
    classifier = told["classifier"]
    means = np.zeros_like(classifier)
    np.add.at(means, shares.argmax(axis=1)[kept], told["folder.adapted.cls"][kept])
    rows = (1 - blend) * classifier + blend * _unit(means)
    return _fused(told, split, _unit(rows), 0.5)


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12))


def _fused(
    told: Answers, split: str, classifier: NDArray[np.float32], share: Any
) -> NDArray[np.float32]:
    cls, fg = told[f"{split}.adapted.cls"], told[f"{split}.adapted.fg"]
    return np.asarray(fused_logits(cls, fg, classifier, share))


def readings(told: Answers, split: str) -> dict[str, NDArray[np.float32]]:
    """Return logits (N, C) of every way, the method's own first."""
    classifier = told["classifier"]
    cls, fg = (
        LOGIT_SCALE * told[f"{split}.adapted.{token}"] @ classifier.T for token in ("cls", "fg")
    )
    agree = (cls.argmax(axis=1) == fg.argmax(axis=1))[:, None]
    shares: dict[str, Any] = {
        "half and half": 0.5,
        "[CLS] 0.6": 0.6,
        "[CLS] 0.7": 0.7,
        "[CLS] 0.8": 0.8,
        "[CLS] alone": 1.0,
        "by entropy, temperature 1": share_by_entropy(cls, fg, 1),
        f"by entropy, temperature {TEMPERATURE:g}": share_by_entropy(cls, fg, TEMPERATURE),
        "[CLS] 0.7 where they disagree": np.where(agree, 0.5, 0.7),
    }
    found = {name: _fused(told, split, classifier, share) for name, share in shares.items()}
    for blend in (0.2, 0.5):
        for surest in (1.0, 0.5):
            name = f"prototypes {blend:g}, " + ("all photos" if surest == 1 else "surest half")
            found[name] = with_prototypes(told, split, blend, surest)
    return found


def measure(told: Answers) -> dict[str, dict[str, float]]:
    """Return top-1 of the method's own way, then of every way less that, by split; fractions."""
    found: dict[str, dict[str, float]] = {}
    for split in ("folder", "test"):
        labels = told[f"{split}.labels"]
        right = {
            name: float((logits.argmax(axis=1) == labels).mean())
            for name, logits in readings(told, split).items()
        }
        own = right["half and half"]
        told_of = {ACCURACY: own} | {name: share - own for name, share in right.items()}
        for name, share in told_of.items():
            found.setdefault(name, {})[split] = share
    return found


def long_tailed(runs: Path, recipes: Sequence[str]) -> dict[str, list[Answers]]:
    """Return the answers that `long_tail` kept, by recipe and kind of folder."""
    return {
        f"{recipe}, {title}": [
            read_answers(path) for path in sorted(runs.glob(f"{recipe}/{pattern}/*/{ANSWERS}"))
        ]
        for recipe in recipes
        for title, pattern in {"balanced": "balanced", "long-tailed": "imbalance-*"}.items()
    }


def ablated(benchmark: Benchmark, runs: Path, recipes: Sequence[str]) -> dict[str, list[Answers]]:
    """Return the answers of the finished runs of `ablations`, by recipe."""
    images = runs / "images"
    splits = {
        "folder": unlabelled_photos(benchmark, images),
        "test": test_photos(benchmark, images),
    }
    return {
        recipe: [
            run_answers(done.parent, splits)
            for done in sorted(runs.glob(f"{recipe}/seed-*/{MANIFEST}"))
        ]
        for recipe in recipes
    }


def main(
    runs: Annotated[
        Path | None,
        typer.Argument(help="Folder of the runs; runs/long-tail or runs/ablations-BENCHMARK."),
    ] = None,
    benchmark: Annotated[
        Literal["objects", "letters"] | None,
        typer.Option(help="Whose runs of `ablations`; without it those of `long_tail`."),
    ] = None,
    recipes: Annotated[
        str | None, typer.Option(help=f"Comma-separated; microclip,default or {OWN}.")
    ] = None,
    results_to: Annotated[
        Path | None, typer.Option(help="Write NAME.json and NAME.md with this prefix.")
    ] = None,
) -> None:
    """Measure all ways on finished runs and print the table: points, after the first row."""
    if benchmark is None:
        runs = runs or Path("runs/long-tail")
        groups = long_tailed(runs, (recipes or "microclip,default").split(","))
    else:
        runs = runs or Path(f"runs/ablations-{benchmark}")
        groups = ablated(BENCHMARKS[benchmark], runs, (recipes or OWN).split(","))
    results = {group: [*map(measure, found)] for group, found in groups.items() if found}
    if not results:
        maker = "long_tail" if benchmark is None else f"ablations --benchmark {benchmark}"
        raise typer.BadParameter(f"{runs}: expected finished runs, found none; run {maker} first")
    columns = [f"{group} ({split})" for group in results for split in ("folder", "test")]
    rows = [["reading", *columns]]
    for name in next(iter(results.values()))[0]:
        cells = [
            spread([run[name][split] for run in found])
            for found in results.values()
            for split in ("folder", "test")
        ]
        rows.append([name, *cells])
    text = "\n".join([*markdown_table(rows), ""])
    document = {"benchmark": "fusion", "results": results, "environment": environment()}
    if results_to is not None:
        write_files(results_to.parent, results_to.stem, document, {".md": text})
    print(text)
    print(json.dumps(document))


if __name__ == "__main__":
    typer.run(main)
