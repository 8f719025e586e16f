"""What each part of the method is worth on the embedded benchmark: recipes x seeds -> one table.

Accuracy on the untouched test split, pseudo-label accuracy after every epoch (the labels are known
to the renderer and never to the training), and the overlap of the masks with the ink. Finished runs
are not repeated. The last line of stdout is one JSON document.
"""

import json
import statistics
from collections.abc import Mapping
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
from microclip_deploy.artifact import MANIFEST, read_json, write_bytes, write_json
from microclip_deploy.bench.card import environment
from microclip_deploy.config import resolve
from microclip_deploy.data.classes import class_texts
from microclip_deploy.data.sources import list_images
from microclip_deploy.demo.folders import RECIPE, hidden_labels, write_benchmark
from microclip_deploy.demo.ink import mask_ink_iou
from microclip_deploy.evaluation.evaluate import evaluate
from microclip_deploy.model.clip import BackboneSpec, load_clip
from microclip_deploy.model.microclip import MicroCLIP
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
}
"""Recipe name -> row title."""

ROWS = {
    "zero_shot_names": ("zero-shot", "cls", "names"),
    "zero_shot_descriptions": ("zero-shot", "cls", "descriptions"),
    "fused": ("adapted", "fused", "adapted"),
    "cls": ("adapted", "cls", "adapted"),
    "fg": ("adapted", "fg", "adapted"),
}
"""Column -> row of an Evaluation."""


def adapt_once(images: Path, out: Path, recipe: str, seed: int) -> None:
    """Adapt the demo model by a recipe, unless the run is already finished."""
    if (out / MANIFEST).is_file():
        return
    settings = resolve(Recipe, recipe, [f"adapt.seed={seed}"])
    texts = class_texts(images / "classes.txt", images / "descriptions.json")
    paths = list_images(images / "adapt").paths
    clip = load_clip(BackboneSpec(model="demo"))
    inputs = make_inputs(clip, settings, texts, good=paths)
    with locked(out):
        write_inputs(out, inputs)
        execute(inputs, Operation(out), clip, validator=label_accuracy(len(paths)))


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
        **{name: found.top1 for name, found in scores.items() if found is not None},
        "mask_ink_iou": overlap,
        "mask_share": evaluation.mask_share,
        "complete_graphs": evaluation.complete_graphs,
        "seconds": sum(epoch["seconds"] for epoch in history),
        "pseudo_labels": [epoch["validation"]["pseudo_label_accuracy"] for epoch in history],
    }
    write_json(stored, result)
    return result


def spread(values: list[float]) -> str:
    """Return "mean ± standard deviation" in percent, or the one value there is."""
    mean = 100 * statistics.mean(values)
    return (
        f"{mean:.1f}" if len(values) < 2 else f"{mean:.1f} ± {100 * statistics.stdev(values):.1f}"
    )


def markdown(results: Mapping[str, list[dict[str, Any]]]) -> str:
    """Return the table, one row a recipe, percent of the test images."""
    lines = [
        "| recipe | what changes | seeds | fused | [CLS] | [FG] | pseudo-labels | ink IoU | s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for recipe, runs in results.items():
        numbers = [spread([run[name] for run in runs]) for name in ("fused", "cls", "fg")]
        labels = spread([run["pseudo_labels"][-1] for run in runs])
        overlap = spread([run["mask_ink_iou"] for run in runs])
        seconds = statistics.mean(run["seconds"] for run in runs)
        cells = [
            recipe,
            RECIPES[recipe],
            str(len(runs)),
            *numbers,
            labels,
            overlap,
            f"{seconds:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    first = next(iter(results.values()))[0]
    names, descriptions = (100 * first[f"zero_shot_{kind}"] for kind in ("names", "descriptions"))
    before = (
        f"Before adaptation, [CLS]: {names:.1f} with names, {descriptions:.1f} with descriptions."
    )
    return "\n".join([*lines, "", before, ""])


def plot(results: Mapping[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw pseudo-label accuracy over epochs, one line for each gamma."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "ablations"
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot(xlabel="epoch", ylabel="pseudo-labels right (%)")
    gammas = {"ablation-gamma-0": "gamma 0", "demo": "gamma 0.5", "ablation-gamma-1": "gamma 1"}
    for recipe, title in gammas.items():
        curves = [run["pseudo_labels"] for run in results.get(recipe, [])]
        if curves:
            mean = [100 * statistics.mean(values) for values in zip(*curves, strict=True)]
            epochs = range(1, len(mean) + 1)
            axes.plot(epochs, mean, marker="o", label=title)
            axes.set_xticks(epochs)
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


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
    results: dict[str, list[dict[str, Any]]] = {}
    for recipe in RECIPES:
        for seed in (seeds if recipe == RECIPE else ablation_seeds).split(","):
            directory = out / recipe / f"seed-{seed}"
            adapt_once(out / "images", directory, recipe, int(seed))
            results.setdefault(recipe, []).append(measure_once(out / "images", directory))
            found = results[recipe][-1]
            notes.print(
                f"{recipe} seed {seed}: fused {found['fused']:.3f}, {found['seconds']:.0f} s"
            )
    document = {"benchmark": "ablations", "results": results, "environment": environment()}
    if results_to is not None:
        write_json(results_to.with_suffix(".json"), document)
        write_bytes(results_to.with_suffix(".md"), markdown(results).encode())
        plot(results, results_to.with_suffix(".svg"))
    print(markdown(results))
    print(json.dumps(document))


if __name__ == "__main__":
    typer.run(main)
