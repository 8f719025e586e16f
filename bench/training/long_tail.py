"""Recipes on long-tailed folders of the letters benchmark: folders x recipes x seeds -> tables.

Each run adapts to a folder with hidden labels and is measured on that folder, as it is, and on the
balanced test split, with the folder's class frequencies and with uniform ones expected. The last
table holds each run's verdict against the truth. Harmful recipes are there for it. Finished runs
are not repeated.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console

from microclip_deploy.adapt.log import HISTORY, read_history
from microclip_deploy.bench.card import environment
from microclip_deploy.bench.document import write_files
from microclip_deploy.bench.table_text import markdown_table
from microclip_deploy.bench.training.ablations import adapt_paths, spread
from microclip_deploy.bench.training.answers import (
    Answers,
    Photos,
    run_answers,
    test_photos,
    unlabelled_photos,
)
from microclip_deploy.calibrating import calibrate
from microclip_deploy.calibration import softmax
from microclip_deploy.demo.folders import write_benchmark
from microclip_deploy.demo.letters.benchmark import LETTERS
from microclip_deploy.demo.long_tail import long_tail
from microclip_deploy.evaluation.reliability import Reliability
from microclip_deploy.verdict import Verdict, verdict

EPOCHS = 8
"""The folders hold a quarter of the benchmark's images; the demo takes 2 epochs over all."""


class Folder(NamedTuple):
    """A choice of the unlabelled images."""

    name: str
    imbalance: float
    order: int = 0
    most: int | None = None


FOLDERS = (
    Folder("balanced", 1, most=10),
    *(Folder(f"imbalance-{i}-order-{o}", i, o) for i in (10, 50) for o in (0, 1)),
)

RECIPES: dict[str, tuple[str, ...]] = {
    "microclip": (),
    "default": ("adapt.fairness_weight=0", "adapt.rollback=true"),
    "estimated": ("adapt.fairness_prior=estimated",),
    "boundary": ("adapt.boundary=true", "adapt.fairness_weight=0"),
    "fairness-16": ("adapt.fairness_weight=16",),
    "own-labels": ("adapt.gamma=0", "adapt.fairness_weight=0"),
    "own-labels-fair": ("adapt.gamma=0",),
    "single-head": ("adapt.gamma=0", "adapt.confidence=0.7"),
    "hot": ("adapt.lr=0.01",),
    "warm": ("adapt.lr=0.004",),
}
"""Name -> settings in place of the demo's; those after the second are for the verdict's table: some
do harm."""

COLLAPSED_ACCURACY = 0.3
"""Runs below it collapsed, and are no ground for an estimate."""

FEW = ("balanced", "imbalance-50-order-0")
"""Folders on which these run."""


class Measured(NamedTuple):
    """What one run came to; accuracies are fractions."""

    folder: float
    """On the folder that was adapted to, with its own class frequencies."""
    test: float
    """On the balanced test split, read likewise."""
    test_uniform: float
    """The same with uniform class frequencies expected."""
    zero_shot_folder: float
    zero_shot_test: float
    error: float
    """Expected calibration error on the folder, with the temperature found without labels."""
    error_before: float
    """The same at temperature 1."""
    views_agree: float
    """Share of the last epoch's strong views that agree with their pseudo-label."""
    tokens_agree: float
    """Share of the folder for which [CLS] and [FG] name the same class."""
    verdict: dict[str, Any]

    @property
    def change(self) -> float:
        """Return the accuracy gained on the folder, in points."""
        return 100 * (self.folder - self.zero_shot_folder)


Results = dict[str, dict[str, list[Measured]]]
"""Folder -> recipe -> one for each seed."""


def folder_photos(images: Path, folder: Folder) -> Photos:
    """Return the images of a folder, in the order the adaptation has them."""
    paths, labels = unlabelled_photos(LETTERS, images)
    kept = long_tail(labels, folder.imbalance, folder.order, folder.most)
    return Photos(tuple(paths[i] for i in kept), labels[kept])


def run_once(images: Path, out: Path, folder: Folder, sets: tuple[str, ...], seed: int) -> Answers:
    """Adapt to a folder unless it is done, and return the answers to it and to the test split."""
    photos = folder_photos(images, folder)
    sets = (f"adapt.epochs={EPOCHS}", *sets)
    adapt_paths(LETTERS, images, out, seed, photos.paths, sets=sets)
    return run_answers(out, {"folder": photos, "test": test_photos(LETTERS, images)})


def measure(told: Answers, expected_accuracy: float) -> Measured:
    """Return what a run came to.

    Args:
        told: its answers.
        expected_accuracy: as the run's own calibration had it.
    """
    folder, test = told["folder.adapted.logits"], told["test.adapted.logits"]
    calibration = calibrate(folder, expected_accuracy)
    sure, sharp = (
        softmax(folder, temperature).max(axis=1) for temperature in (calibration.temperature, 1.0)
    )
    right = folder.argmax(axis=1) == told["folder.labels"]
    reliability = Reliability.of(sure, sharp, right, calibration.temperature, 0)
    return Measured(
        folder=_accuracy(folder, told["folder.labels"]),
        test=_accuracy(test, told["test.labels"]),
        test_uniform=_accuracy(test + calibration.bias(), told["test.labels"]),
        zero_shot_folder=_accuracy(_zero_shot(told, "folder"), told["folder.labels"]),
        zero_shot_test=_accuracy(_zero_shot(told, "test"), told["test.labels"]),
        error=reliability.ece,
        error_before=reliability.ece_uncalibrated,
        views_agree=expected_accuracy,
        tokens_agree=float((_best(told, "cls") == _best(told, "fg")).mean()),
        verdict=judged(told).model_dump(mode="json"),
    )


def judged(told: Answers) -> Verdict:
    """Return the verdict on a run, as `adapt` gives it."""
    before = (told["folder.initial.cls"] @ told["prior"].T).argmax(axis=1)
    after = told["folder.adapted.logits"].argmax(axis=1)
    return verdict(told["folder.adapted.cls"], before, after, len(told["prior"]))


def _zero_shot(told: Answers, split: str) -> NDArray[np.float32]:
    """Return the logits of plain zero-shot CLIP, with the class names."""
    return np.asarray(told[f"{split}.initial.cls"] @ told["names"].T)


def _best(told: Answers, token: str) -> NDArray[np.int64]:
    """Return the best class of each photo of the folder by one token."""
    return np.asarray((told[f"folder.adapted.{token}"] @ told["classifier"].T).argmax(axis=1))


def _accuracy(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    return float((logits.argmax(axis=1) == labels).mean())


COLUMNS = {
    "folder": "folder",
    "test": "test",
    "test, uniform": "test_uniform",
    "ECE": "error",
    "ECE at T 1": "error_before",
}


def accuracy_rows(results: Results) -> list[list[str]]:
    """Return a row for each folder and recipe, percent."""
    rows = [["folder", "recipe", "seeds", *COLUMNS]]
    for folder, by_recipe in results.items():
        first = next(iter(by_recipe.values()))[0]
        zero_shot = (first.zero_shot_folder, first.zero_shot_test)
        rows.append([folder, "zero-shot", "", *(f"{100 * each:.1f}" for each in zero_shot)])
        rows[-1] += ["", "", ""]
        for recipe, runs in by_recipe.items():
            cells = [spread([getattr(run, key) for run in runs]) for key in COLUMNS.values()]
            rows.append([folder, recipe, str(len(runs)), *cells])
    return rows


def verdict_rows(results: Results) -> list[list[str]]:
    """Return a row for each run: what was predicted, what was true, points."""
    rows = [["folder", "recipe", "seed", "true", "predicted", "90 % interval", "verdict"]]
    for folder, recipe, seed, run in _each(results):
        said = run.verdict
        told = ["–", "–"]
        if said["change"] is not None:
            told = [f"{said['change']:+.1f}", f"{said['low']:+.1f} to {said['high']:+.1f}"]
        rows.append([folder, recipe, str(seed), f"{run.change:+.1f}", *told, said["decision"]])
    return rows


def verdict_lines(results: Results) -> list[str]:
    """Say how often verdicts and intervals were right."""
    runs = [run for *_, run in _each(results)]
    lines = []
    for decision, right in {
        "adapted": [run.change > 0 for run in runs if run.verdict["decision"] == "adapted"],
        "keep zero-shot": [
            run.change < 0 for run in runs if run.verdict["decision"] == "keep zero-shot"
        ],
    }.items():
        lines.append(f"* {decision}: said {len(right)} times, right {sum(right)} times")
    unsure = [run.change for run in runs if run.verdict["decision"] == "cannot tell"]
    if unsure:
        lines.append(
            f"* cannot tell: said {len(unsure)} times; the truth was {min(unsure):+.1f} to "
            f"{max(unsure):+.1f}"
        )
    told = [run for run in runs if run.verdict["change"] is not None]
    held = sum(run.verdict["low"] <= run.change <= run.verdict["high"] for run in told)
    lines.append(f"* interval of 90 %: held the truth in {held} of {len(told)} runs")
    return lines


def estimate_lines(results: Results) -> list[str]:
    """Say how near two estimates of the accuracy on the folder came."""
    runs = [run for *_, run in _each(results) if run.folder > COLLAPSED_ACCURACY]
    lines = []
    for title, key in {
        "strong views agree with their pseudo-label": "views_agree",
        "[CLS] and [FG] agree": "tokens_agree",
    }.items():
        off = [100 * (getattr(run, key) - run.folder) for run in runs]
        lines.append(
            f"* accuracy estimated by how often {title}: {statistics.mean(off):+.1f} points off on "
            f"average, {min(off):+.1f} to {max(off):+.1f}, in {len(off)} runs"
        )
    return lines


def fitted_line(results: Results) -> str:
    """Fit the line on these runs, and say how far runs of a folder that was left out lie."""
    runs = [
        (folder, run) for folder, *_, run in _each(results) if run.verdict["change"] is not None
    ]
    folders = np.array([folder for folder, _ in runs])
    x = np.array([100 * np.subtract(*run.verdict["agreement"][::-1]) for _, run in runs])
    y = np.array([run.change for _, run in runs])
    if len(set(folders)) < 2:
        return "* one folder alone: the line is not fitted"
    misses: list[float] = []
    for folder in set(folders):
        mine = folders == folder
        slope, offset = np.polyfit(x[~mine], y[~mine], 1)
        misses += np.abs(offset + slope * x[mine] - y[mine]).tolist()
    slope, offset = np.polyfit(x, y, 1)
    return (
        f"* fitted: change = {offset:.2f} + {slope:.2f} x agreement's change; fitted without a "
        f"folder, 90 % of the runs on it lie within {np.quantile(misses, 0.9):.1f} points, and "
        f"{statistics.mean(misses):.1f} on average"
    )


def _each(results: Results) -> Sequence[tuple[str, str, int, Measured]]:
    return [
        (folder, recipe, seed, run)
        for folder, by_recipe in results.items()
        for recipe, runs in by_recipe.items()
        for seed, run in enumerate(runs)
    ]


def collect(out: Path, jobs: Mapping[str, Sequence[int]], notes: Console) -> Results:
    """Run what is missing and measure.

    Args:
        out: working folder with the benchmark in `images`.
        jobs: recipe -> its seeds.
        notes: progress.
    """
    results: Results = {}
    for folder in FOLDERS:
        for recipe, seeds in jobs.items():
            if folder.name not in FEW and recipe in list(RECIPES)[2:]:
                continue
            for seed in seeds:
                place = out / recipe / folder.name / f"seed-{seed}"
                told = run_once(out / "images", place, folder, RECIPES[recipe], seed)
                agreement = read_history(place / HISTORY)[-1]["agreement"]
                run = measure(told, agreement)
                results.setdefault(folder.name, {}).setdefault(recipe, []).append(run)
                notes.print(f"{folder.name}, {recipe}, seed {seed}: {run.change:+.1f} points")
    return results


def main(
    out: Annotated[Path, typer.Option("-o", "--out", help="Working folder.")] = Path(
        "runs/long-tail"
    ),
    recipes: Annotated[str, typer.Option(help="Comma-separated, with --seeds.")] = (
        "microclip,default"
    ),
    seeds: Annotated[str, typer.Option(help="Comma-separated.")] = "0,1,2",
    others: Annotated[str, typer.Option(help="Further recipes, with seed 0.")] = ",".join(
        list(RECIPES)[2:]
    ),
    results_to: Annotated[
        Path | None, typer.Option(help="Write NAME.json and NAME.md with this prefix.")
    ] = None,
) -> None:
    """Run what is missing and print the tables."""
    notes = Console(stderr=True)
    write_benchmark(LETTERS, out / "images", notes)
    jobs = {recipe: [int(seed) for seed in seeds.split(",")] for recipe in recipes.split(",")}
    jobs |= {recipe: [0] for recipe in others.split(",") if recipe}
    results = collect(out, jobs, notes)
    text = "\n".join(
        [
            *markdown_table(accuracy_rows(results)),
            "",
            *verdict_lines(results),
            fitted_line(results),
            *estimate_lines(results),
            "",
            *markdown_table(verdict_rows(results)),
            "",
        ]
    )
    plain = {
        folder: {recipe: [run._asdict() for run in runs] for recipe, runs in by_recipe.items()}
        for folder, by_recipe in results.items()
    }
    document = {"benchmark": "long tails", "results": plain, "environment": environment()}
    if results_to is not None:
        write_files(results_to.parent, results_to.stem, document, {".md": text})
    print(text)
    print(json.dumps(document))


if __name__ == "__main__":
    typer.run(main)
