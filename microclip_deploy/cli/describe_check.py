"""`microclip-deploy describe check`: descriptions that somebody wrote by hand or elsewhere."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from microclip_deploy.cli import next_steps
from microclip_deploy.cli.options import MODEL, OUTPUT, PHOTOS, AsJson, option
from microclip_deploy.console import notes, out, print_json, waiting
from microclip_deploy.errors import DataError, printable, require

if TYPE_CHECKING:
    from microclip_deploy.model.clip import Clip

_SHOWN = 5  # names that a message or a remark lists


def describe_check(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Descriptions, as `adapt` takes them.")
    ],
    classes: Annotated[Path, typer.Argument(metavar="CLASSES", help="Class names, one a line.")],
    domain: Annotated[
        str | None, option(PHOTOS, "TEXT", "What the classes are, such as 'bird species'.")
    ] = None,
    clip: Annotated[
        str | None,
        option(
            MODEL, "NAME", "As --model of `adapt`: also count tokens, filter, and compare classes."
        ),
    ] = None,
    clip_weights: Annotated[
        str | None, option(MODEL, "TAG|FILE", "As --pretrained of `adapt`.")
    ] = None,
    report: Annotated[
        Path | None, option(OUTPUT, "FILE.html", "Also write a page.", "--report")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check descriptions without labels; nothing is changed.

    Exit 3 where a class is left without sentences.

    Example: microclip-deploy describe check descriptions.json classes.txt --clip ViT-B-32
    --clip-weights openai --report descriptions.html
    """
    if report is not None:
        require("jinja2", "describe")
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
    with waiting(notes, "checking"):
        model = load_text_model(clip, clip_weights)
        outcome = judged(sentences, names, domain, model)
    for remark in outcome.remarks[:_SHOWN]:
        line = f"warning: '{printable(remark.name)}' {remark.text}"
        notes.print(line, style="yellow", markup=False)
    if len(outcome.remarks) > _SHOWN:
        notes.print(
            f"warning: {len(outcome.remarks) - _SHOWN} more names like that", style="yellow"
        )
    if report is not None:
        from microclip_deploy.describe.report import write_report

        write_report(report, outcome, provenance=read.provenance)
        notes.print(f"report: {printable(report)}", markup=False)
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


def load_text_model(name: str | None, weights: str | None) -> "Clip | None":
    """Return the CLIP model of that name, or None without one."""
    if name is None:
        return None
    require("torch", "adapt")
    from microclip_deploy.model.clip import BackboneSpec, load_clip

    return load_clip(BackboneSpec(model=name, pretrained=weights))
