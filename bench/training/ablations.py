"""What each part of the method is worth on the embedded benchmark: recipes x seeds -> one table.

Accuracy on the untouched test split, pseudo-label accuracy after every epoch (the labels are known
to the renderer and never to the training), and the overlap of the masks with the ink. Finished runs
are not repeated. The last line of stdout is one JSON document.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

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
from microclip_deploy.config import resolve
from microclip_deploy.data.classes import ClassTexts, class_texts
from microclip_deploy.data.sources import list_images
from microclip_deploy.demo.folders import RECIPE, hidden_labels, write_benchmark
from microclip_deploy.demo.ink import mask_ink_iou
from microclip_deploy.evaluation.chart import epoch_chart
from microclip_deploy.evaluation.evaluate import evaluate
from microclip_deploy.model.clip import BackboneSpec, load_clip
from microclip_deploy.model.microclip import MicroCLIP
from microclip_deploy.model.text import text_heads
from microclip_deploy.serving import open_session

RECIPES = {
    "demo": "microCLIP",
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
"""Recipe name -> row title."""

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
    images: Path,
    out: Path,
    recipe: str,
    seed: int,
    *,
    texts: ClassTexts | None = None,
    sets: Sequence[str] = (),
) -> None:
    """Adapt the demo model by a recipe, unless the run is already finished.

    Args:
        images: the benchmark's folder.
        out: run directory.
        recipe: its name.
        seed: of the adaptation.
        texts: of the classes; None takes the benchmark's descriptions.
        sets: further settings, as `section.key=value`.
    """
    paths = list_images(images / "adapt").paths
    adapt_paths(images, out, recipe, seed, paths, texts=texts, sets=sets, labels=True)


def adapt_paths(
    images: Path,
    out: Path,
    recipe: str,
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
    settings = resolve(Recipe, recipe, [f"adapt.seed={seed}", *sets])
    texts = texts or class_texts(images / "classes.txt", images / "descriptions.json")
    clip = load_clip(BackboneSpec(model="demo"))
    inputs = make_inputs(clip, settings, texts, good=paths)
    with locked(out):
        write_inputs(out, inputs)
        validator = label_accuracy(len(paths)) if labels else None
        execute(inputs, Operation(out), clip, text_heads(clip.text, texts), validator=validator)


def label_accuracy(count: int) -> Validator:
    """Return a measurement of the pseudo-labels against the renderer's classes."""
    truth = torch.from_numpy(hidden_labels(count))

    def measure(_model: MicroCLIP, labels: Tensor) -> Mapping[str, float]:
        return {"pseudo_label_accuracy": (labels.cpu() == truth).double().mean().item()}

    return measure


def measure_once(images: Path, out: Path) -> dict[str, Any]:
    """Return what a finished run scores on the test split, as plain values."""
    stored = out / "ablation.json"
    if stored.is_file():
        return dict(read_json(stored))
    evaluation = evaluate(out, images / "test", batch_size=128)
    scores = {name: evaluation.row(*row) for name, row in ROWS.items()}
    history = read_history(out / HISTORY)
    with open_session(out) as session:
        overlap = mask_ink_iou(session, images)
    result = {
        **{name: row.top1 for name, row in scores.items() if row is not None},
        "mask_ink_iou": overlap,
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
    rows = [["recipe", "what changes", "seeds", *columns, "pseudo-labels", "ink IoU", "s"]]
    for recipe, runs in results.items():
        cells = [recipe, RECIPES[recipe], str(len(runs))]
        cells += [spread([run[key] for run in runs]) for key in columns.values()]
        cells.append(spread([run["pseudo_labels"][-1] for run in runs]))
        cells.append(spread([run["mask_ink_iou"] for run in runs]))
        rows.append([*cells, f"{statistics.mean(run['seconds'] for run in runs):.0f}"])
    first = next(iter(results.values()))[0]
    names, descriptions = (100 * first[f"zero_shot_{kind}"] for kind in ("names", "descriptions"))
    before = (
        f"Before adaptation, [CLS]: {names:.1f} with names, {descriptions:.1f} with descriptions."
    )
    return "\n".join([*markdown_table(rows), "", before, ""])


def label_chart(results: Results) -> str:
    """Draw pseudo-label accuracy over epochs, one line for each gamma; SVG."""
    gammas = {"ablation-gamma-0": "gamma 0", "demo": "gamma 0.5", "ablation-gamma-1": "gamma 1"}
    curves = {
        title: [run["pseudo_labels"] for run in results[recipe]]
        for recipe, title in gammas.items()
        if recipe in results
    }
    means = {
        title: [*map(statistics.mean, zip(*runs, strict=True))] for title, runs in curves.items()
    }
    return epoch_chart(means, percent=True)


def main(
    out: Annotated[Path, typer.Option("-o", "--out", help="Working folder.")] = Path(
        "runs/ablations"
    ),
    seeds: Annotated[str, typer.Option(help="Seeds of microCLIP, comma-separated.")] = "0,1,2",
    ablation_seeds: Annotated[str, typer.Option(help="Seeds of the other recipes.")] = "0",
    results_to: Annotated[
        Path | None, typer.Option(help="Write NAME.json, NAME.md and NAME.svg with this prefix.")
    ] = None,
) -> None:
    """Run what is missing and print the table."""
    notes = Console(stderr=True)
    write_benchmark(out / "images", notes)
    results: Results = {}
    for recipe in RECIPES:
        for seed in (seeds if recipe == RECIPE else ablation_seeds).split(","):
            directory = out / recipe / f"seed-{seed}"
            adapt_once(out / "images", directory, recipe, int(seed))
            run = measure_once(out / "images", directory)
            results.setdefault(recipe, []).append(run)
            notes.print(f"{recipe} seed {seed}: fused {run['fused']:.3f}, {run['seconds']:.0f} s")
    document = {"benchmark": "ablations", "results": results, "environment": environment()}
    if results_to is not None:
        texts = {".md": markdown(results), ".svg": label_chart(results)}
        write_files(results_to.parent, results_to.stem, document, texts)
    print(markdown(results))
    print(json.dumps(document))


if __name__ == "__main__":
    typer.run(main)
