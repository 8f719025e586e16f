"""What each part of the method is worth on an embedded benchmark: recipes x seeds -> one table.

Accuracy on the untouched test split, pseudo-label accuracy after every epoch (the labels are known
to the renderer and never to the training), and the overlap of the masks with the objects. Finished
runs are not repeated. The last line of stdout is one JSON document.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from torch import Tensor

from microclip_deploy.adapt.log import HISTORY, read_history
from microclip_deploy.adapt.run import execute
from microclip_deploy.adapt.run_directory import locked, make_inputs, write_inputs
from microclip_deploy.adapt.trainer import Operation, Recipe, Validator
from microclip_deploy.artifact import MANIFEST, read_json, write_json
from microclip_deploy.bench.card import environment
from microclip_deploy.bench.document import write_files
from microclip_deploy.bench.table_text import markdown_table
from microclip_deploy.config import recipe_changes, resolve
from microclip_deploy.data.classes import DEFAULT_TEMPLATES, ClassTexts, class_texts
from microclip_deploy.data.sources import list_images
from microclip_deploy.demo import BENCHMARKS
from microclip_deploy.demo.benchmark import Benchmark, Split
from microclip_deploy.demo.folders import write_benchmark
from microclip_deploy.demo.truth import mask_iou
from microclip_deploy.evaluation.chart import epoch_chart
from microclip_deploy.evaluation.evaluate import evaluate
from microclip_deploy.model.clip import BackboneSpec, load_clip
from microclip_deploy.model.microclip import MicroCLIP
from microclip_deploy.model.text import text_heads
from microclip_deploy.serving import open_session

OWN = "microCLIP"
"""The benchmark's own recipe, nothing changed."""

RECIPES = {
    OWN: "the benchmark's recipe",
    "ablation-token-mean": "token mean instead of SOAP",
    "ablation-cls-only": "[CLS] only",
    "ablation-gamma-0": "gamma 0: learnable head alone",
    "ablation-gamma-1": "gamma 1: frozen prior alone",
    "ablation-no-fairness": "no fairness",
    "ablation-single-head": "one learnable head, confidence threshold",
    "ablation-cosine": "affinity cosine",
    "ablation-centered-cosine": "affinity centered cosine",
    "ablation-object": "saliency of the recipe object",
}
"""Recipe whose changes are made to the benchmark's own -> row title."""

Results = dict[str, list[dict[str, Any]]]
"""Recipe -> what `measure_once` returned for each seed."""

ROWS = {
    "zero_shot_names": ("zero-shot", "cls", "names"),
    "zero_shot_descriptions": ("zero-shot", "cls", "descriptions"),
    "fused": ("adapted", "fused", "adapted"),
    "cls": ("adapted", "cls", "adapted"),
    "fg": ("adapted", "fg", "adapted"),
}
"""Column -> row of an Evaluation."""


def adapt_once(
    benchmark: Benchmark,
    images: Path,
    out: Path,
    seed: int,
    *,
    texts: ClassTexts | None = None,
    sets: Sequence[str] = (),
) -> None:
    """Adapt the benchmark's model by its recipe, unless the run is already finished.

    Args:
        benchmark: whose images, model and recipe.
        images: the benchmark's folder.
        out: run directory.
        seed: of the adaptation.
        texts: of the classes; None takes the benchmark's descriptions.
        sets: further settings, as `section.key=value`.
    """
    paths = list_images(images / "adapt").paths
    adapt_paths(benchmark, images, out, seed, paths, texts=texts, sets=sets, labels=True)


def adapt_paths(
    benchmark: Benchmark,
    images: Path,
    out: Path,
    seed: int,
    paths: Sequence[Path],
    *,
    texts: ClassTexts | None = None,
    sets: Sequence[str] = (),
    labels: bool = False,
) -> None:
    """Adapt as `adapt_once`, to some images; `labels` measures the pseudo-labels of all."""
    if (out / MANIFEST).is_file():
        return
    settings = resolve(Recipe, benchmark.recipe, [f"adapt.seed={seed}", *sets])
    texts = texts or class_texts(
        images / "classes.txt",
        images / "descriptions.json",
        benchmark.templates or DEFAULT_TEMPLATES,
    )
    clip = load_clip(BackboneSpec(model=benchmark.model))
    inputs = make_inputs(clip, settings, texts, good=paths)
    with locked(out):
        write_inputs(out, inputs)
        validator = label_accuracy(benchmark, len(paths)) if labels else None
        execute(inputs, Operation(out), clip, text_heads(clip.text, texts), validator=validator)


def label_accuracy(benchmark: Benchmark, count: int) -> Validator:
    """Return a measurement of the pseudo-labels against the renderer's classes."""
    truth = torch.from_numpy(benchmark.labels(Split.ADAPT, count))

    def measure(_model: MicroCLIP, labels: Tensor) -> Mapping[str, float]:
        return {"pseudo_label_accuracy": (labels.cpu() == truth).double().mean().item()}

    return measure


def measure_once(benchmark: Benchmark, images: Path, out: Path) -> dict[str, Any]:
    """Return what a finished run scores on the test split, as plain values."""
    stored = out / "ablation.json"
    known = dict(read_json(stored)) if stored.is_file() else {}
    if "mask_iou" in known:  # older ones lack it
        return known
    evaluation = evaluate(out, images / "test", batch_size=128)
    scores = {name: evaluation.row(*row) for name, row in ROWS.items()}
    history = read_history(out / HISTORY)
    with open_session(out) as session:
        overlap = mask_iou(session, benchmark, images)
    result = {
        **{name: row.top1 for name, row in scores.items() if row is not None},
        "mask_iou": overlap,
        "mask_share": evaluation.masks.share,
        "complete_graphs": evaluation.masks.complete,
        "seconds": sum(epoch["seconds"] for epoch in history),
        "pseudo_labels": [epoch["validation"]["pseudo_label_accuracy"] for epoch in history],
    }
    write_json(stored, result)
    return result


def spread(values: list[float]) -> str:
    """Return "mean ± standard deviation" in percent, or the one value there is."""
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{deviation}"


def markdown(results: Results) -> str:
    """Return the table, one row a recipe, percent of the test images."""
    columns = {"fused": "fused", "[CLS]": "cls", "[FG]": "fg"}
    rows = [["recipe", "what changes", "seeds", *columns, "pseudo-labels", "mask IoU", "s"]]
    for recipe, runs in results.items():
        cells = [recipe, RECIPES[recipe], str(len(runs))]
        cells += [spread([run[key] for run in runs]) for key in columns.values()]
        cells.append(spread([run["pseudo_labels"][-1] for run in runs]))
        cells.append(spread([run["mask_iou"] for run in runs]))
        rows.append([*cells, f"{statistics.mean(run['seconds'] for run in runs):.0f}"])
    first = next(iter(results.values()))[0]
    names, descriptions = (100 * first[f"zero_shot_{kind}"] for kind in ("names", "descriptions"))
    before = (
        f"Before adaptation, [CLS]: {names:.1f} with names, {descriptions:.1f} with descriptions."
    )
    return "\n".join([*markdown_table(rows), "", before, ""])


def label_chart(results: Results) -> str:
    """Draw pseudo-label accuracy over epochs, one line for each gamma; SVG."""
    gammas = {"ablation-gamma-0": "gamma 0", OWN: "gamma 0.5", "ablation-gamma-1": "gamma 1"}
    curves = {
        title: [run["pseudo_labels"] for run in results[recipe]]
        for recipe, title in gammas.items()
        if recipe in results
    }
    means = {
        title: [*map(statistics.mean, zip(*runs, strict=True))] for title, runs in curves.items()
    }
    return epoch_chart(means, percent=True)


def changes(recipe: str) -> tuple[str, ...]:
    """Return what a recipe sets otherwise than the one it extends, as `section.key=value`.

    All of them extend `demo`; a value that `demo` has already is not among them.
    """
    changed = {} if recipe == OWN else recipe_changes(recipe)[1]
    return tuple(f"{key}={json.dumps(value)}" for key, (value, _) in changed.items())


def main(
    benchmark: Annotated[Literal["objects", "letters"], typer.Option(help="Which.")] = "objects",
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Working folder; runs/ablations-BENCHMARK.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds of microCLIP, comma-separated.")] = "0,1,2",
    ablation_seeds: Annotated[str, typer.Option(help="Seeds of the other recipes.")] = "0,1,2",
    recipes: Annotated[str, typer.Option(help="Which of them, comma-separated.")] = ",".join(
        RECIPES
    ),
    results_to: Annotated[
        Path | None, typer.Option(help="Write NAME.json, NAME.md and NAME.svg with this prefix.")
    ] = None,
) -> None:
    """Run what is missing and print the table."""
    unknown = set(recipes.split(",")) - set(RECIPES)
    if unknown:
        raise typer.BadParameter(
            f"--recipes: expected some of {', '.join(RECIPES)}, found {unknown}"
        )
    notes, task = Console(stderr=True), BENCHMARKS[benchmark]
    out = out or Path("runs") / f"ablations-{benchmark}"
    write_benchmark(task, out / "images", notes)
    results: Results = {}
    for recipe in recipes.split(","):
        for seed in (seeds if recipe == OWN else ablation_seeds).split(","):
            directory = out / recipe / f"seed-{seed}"
            adapt_once(task, out / "images", directory, int(seed), sets=changes(recipe))
            run = measure_once(task, out / "images", directory)
            results.setdefault(recipe, []).append(run)
            notes.print(f"{recipe} seed {seed}: fused {run['fused']:.3f}, {run['seconds']:.0f} s")
    document = {
        "benchmark": f"ablations, {benchmark}",
        "results": results,
        "environment": environment(),
    }
    if results_to is not None:
        texts = {".md": markdown(results), ".svg": label_chart(results)}
        write_files(results_to.parent, results_to.stem, document, texts)
    print(markdown(results))
    print(json.dumps(document))


if __name__ == "__main__":
    typer.run(main)
