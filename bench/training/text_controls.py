"""What class texts are worth on the letters benchmark: texts x seeds -> one table.

The recipe of the demo adapts from each set of texts. Sets that say nothing about the classes show
how much of the accuracy the descriptions bring by what they say. Random words are drawn again for
each seed. Finished runs are not repeated. The last line of stdout is one JSON document.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from microclip_deploy.bench.card import environment
from microclip_deploy.bench.document import write_files
from microclip_deploy.bench.table_text import markdown_table
from microclip_deploy.bench.training.ablations import adapt_once, measure_once, spread
from microclip_deploy.data.classes import ClassTexts, class_texts
from microclip_deploy.demo.folders import write_benchmark
from microclip_deploy.demo.letters.benchmark import LETTERS
from microclip_deploy.describe.controls import filtered, random_words, words_of
from microclip_deploy.model.clip import BackboneSpec, TextEncoder, load_clip

DESCRIPTIONS = "descriptions"
CONTROLS = ("random words", "shuffled words", "templates")
"""Texts that the descriptions must beat."""

COLUMNS = {
    "zero-shot [CLS]": "zero_shot_descriptions",
    "fused": "fused",
    "[CLS]": "cls",
    "[FG]": "fg",
}
"""Column -> key of `measure_once`; zero-shot is with the texts of the row."""

Results = dict[str, list[dict[str, Any]]]
"""Texts -> what `measure_once` returned for each seed."""


def text_sets(images: Path, encode: TextEncoder, seed: int) -> dict[str, ClassTexts]:
    """Return the class texts of every row.

    Args:
        images: the benchmark's folder.
        encode: what filters.
        seed: of the random words.
    """
    described = class_texts(images / "classes.txt", images / "descriptions.json")
    names, said = described.names, described.descriptions
    groups = {
        DESCRIPTIONS: said,
        "filtered": filtered(encode, said, names),
        "random words": random_words(said, names, seed),
        "shuffled words": random_words(said, names, seed, words_of(said, names)),
    }
    bare = ClassTexts(names, tuple((name,) for name in names), ("{}",))
    made = {
        title: replace(described, descriptions=group, provenance={"descriptions": title})
        for title, group in groups.items()
    }
    return {"names only": bare, "templates": class_texts(images / "classes.txt"), **made}


def run_all(
    out: Path, seeds: Sequence[int], notes: Console, *, sets: Sequence[str] = ()
) -> Results:
    """Adapt and measure what is missing.

    Args:
        out: working folder with the benchmark in `images`.
        seeds: of the adaptation and of the random words.
        notes: progress.
        sets: settings in place of the recipe's.
    """
    encode = load_clip(BackboneSpec(model="demo")).text
    results: Results = {}
    for seed in seeds:
        for title, texts in text_sets(out / "images", encode, seed).items():
            directory = out / title.replace(" ", "-") / f"seed-{seed}"
            adapt_once(LETTERS, out / "images", directory, seed, texts=texts, sets=sets)
            run = measure_once(LETTERS, out / "images", directory)
            results.setdefault(title, []).append(run)
            notes.print(f"{title}, seed {seed}: fused {run['fused']:.3f}")
    return results


def markdown(results: Results) -> str:
    """Return the table, one row a set of texts, percent of the test images, and what follows."""
    rows = [["class texts", "seeds", *COLUMNS, "pseudo-labels"]]
    for title, runs in results.items():
        cells = [spread([run[key] for run in runs]) for key in COLUMNS.values()]
        labels = spread([run["pseudo_labels"][-1] for run in runs])
        rows.append([title, str(len(runs)), *cells, labels])
    return "\n".join([*markdown_table(rows), "", *differences(results), ""])


def differences(results: Results) -> list[str]:
    """Say how far the descriptions are above each control after adaptation, seed by seed."""
    told = []
    for control in CONTROLS:
        pairs = zip(results[DESCRIPTIONS], results[control], strict=True)
        gains = [ours["fused"] - other["fused"] for ours, other in pairs]
        mean, sign = statistics.mean(gains), sum(gain > 0 for gain in gains)
        told.append(
            f"Adapted, fused: descriptions minus {control} {100 * mean:+.1f} points on average, "
            f"above it with {sign} of {len(gains)} seeds."
        )
    return told


def main(
    out: Annotated[Path, typer.Option("-o", "--out", help="Working folder.")] = Path(
        "runs/text-controls"
    ),
    seeds: Annotated[str, typer.Option(help="Comma-separated.")] = "0,1,2",
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="Setting in place of the recipe's.")
    ] = None,
    results_to: Annotated[
        Path | None, typer.Option(help="Write NAME.json and NAME.md with this prefix.")
    ] = None,
) -> None:
    """Run what is missing and print the table."""
    notes = Console(stderr=True)
    write_benchmark(LETTERS, out / "images", notes)
    results = run_all(out, [int(seed) for seed in seeds.split(",")], notes, sets=sets or ())
    document = {"benchmark": "text controls", "results": results, "environment": environment()}
    if results_to is not None:
        write_files(results_to.parent, results_to.stem, document, {".md": markdown(results)})
    print(markdown(results))
    print(json.dumps(document))


if __name__ == "__main__":
    typer.run(main)
