"""`microclip-deploy describe check`: descriptions that somebody wrote by hand or elsewhere."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from microclip_deploy.cli import next_steps
from microclip_deploy.cli.options import MODEL, OUTPUT, PHOTOS, AsJson, option
from microclip_deploy.console import bar, notes, out, print_json, waiting
from microclip_deploy.errors import DataError, printable, require

if TYPE_CHECKING:
    from microclip_deploy.describe.judge import Judgement
    from microclip_deploy.model.clip import Clip as ClipModel

Clip = Annotated[
    str | None,
    option(MODEL, "NAME", "As --model of `adapt`: also count tokens, filter, and compare classes."),
]
ClipWeights = Annotated[str | None, option(MODEL, "TAG|FILE", "As --pretrained of `adapt`.")]
Report = Annotated[Path | None, option(OUTPUT, "FILE.html", "Also write a page.", "--report")]

_SHOWN = 5  # names that a message or a remark lists


def describe_check(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Descriptions, as `adapt` takes them.")
    ],
    classes: Annotated[Path, typer.Argument(metavar="CLASSES", help="Class names, one a line.")],
    domain: Annotated[
        str | None, option(PHOTOS, "TEXT", "What the classes are, such as 'bird species'.")
    ] = None,
    clip: Clip = None,
    clip_weights: ClipWeights = None,
    report: Report = None,
    as_json: AsJson = False,
) -> None:
    """Check descriptions without labels; nothing is changed.

    Exit 3 where a class is left without sentences.

    Example: microclip-deploy describe check descriptions.json classes.txt --clip ViT-B-32
    --clip-weights openai --report descriptions.html
    """
    from microclip_deploy.data.classes import read_classes, read_descriptions
    from microclip_deploy.describe.judge import judged
    from microclip_deploy.describe.sentence import Sentence

    names = read_classes(classes)
    read = read_descriptions(file, names)
    sentences = [
        Sentence(name, text, {})
        for name, texts in zip(names, read.texts, strict=True)
        for text in texts
    ]
    model = opened(clip, clip_weights, report)
    with bar(notes, "comparing", "classes") as progress:
        outcome = judged(sentences, names, domain, model, progress=progress.update)
    show_remarks(outcome)
    if report is not None:
        write_page(report, outcome, read.provenance)
    if as_json:
        print_json(outcome.to_json())
    else:
        out.print(*outcome.tables(), outcome.summary(), sep="\n")
    if outcome.empty:
        shown = ", ".join(f"'{printable(name)}'" for name in outcome.empty[:_SHOWN])
        more = f" and {len(outcome.empty) - _SHOWN} more" if len(outcome.empty) > _SHOWN else ""
        raise DataError(
            f"{printable(file.name)}: expected usable sentences for every class, found none for "
            f"{shown}{more}; write others, or leave --descriptions out to use templates"
        )
    next_steps.tell(notes, next_steps.adapt("--descriptions", str(file)))


def opened(name: str | None, weights: str | None, report: Path | None) -> "ClipModel | None":
    """Return the CLIP model of that name, or None without one; a page needs its package, too."""
    if report is not None:
        require("jinja2", "describe")
    if name is None:
        return None
    with waiting(notes, "loading the model"):
        require("torch", "adapt")
        from microclip_deploy.model.clip import BackboneSpec, load_clip

        return load_clip(BackboneSpec(model=name, pretrained=weights))


def show_remarks(outcome: "Judgement") -> None:
    """Warn of names that a model may take for something else."""
    for remark in outcome.remarks[:_SHOWN]:
        line = f"warning: '{printable(remark.name)}' {remark.text}"
        notes.print(line, style="yellow", markup=False)
    if len(outcome.remarks) > _SHOWN:
        notes.print(
            f"warning: {len(outcome.remarks) - _SHOWN} more names like that", style="yellow"
        )


def write_page(
    path: Path,
    outcome: "Judgement",
    provenance: Mapping[str, str],
    spend: Mapping[str, str] | None = None,
) -> None:
    """Write the page about descriptions."""
    from microclip_deploy.describe.report import write_report

    write_report(path, outcome, provenance=provenance, spend=spend)
    notes.print(f"report: {printable(path)}", markup=False)
