"""`microclip-deploy classes`: the classes of an export."""

import hashlib
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from microclip_deploy.cli import next_steps
from microclip_deploy.cli.help import SectionedCommand, SectionedGroup
from microclip_deploy.cli.options import (
    LANGUAGE,
    MODEL,
    AsJson,
    Descriptions,
    Domain,
    ExportDirectory,
    LanguageEndpoint,
    Names,
    option,
)
from microclip_deploy.console import notes, out, print_json
from microclip_deploy.errors import UsageError, require

app = typer.Typer(
    help="List, add or remove the classes of an export; its graphs stay as they are.",
    no_args_is_help=True,
    rich_markup_mode=None,
    cls=SectionedGroup,
)


command = partial(app.command, cls=SectionedCommand)


@command("list")
def list_classes(export: ExportDirectory, as_json: AsJson = False) -> None:
    """Print the classes in the order of the logits."""
    from microclip_deploy.errors import printable
    from microclip_deploy.export import class_rows

    rows = class_rows.list_classes(export)
    if as_json:
        print_json({"classes": [row.to_json() for row in rows]})
        return
    for row in rows:
        mark = "" if row.adapted else "  (not adapted)"
        out.print(printable(row.name) + mark, markup=False, soft_wrap=True)
    add = (("classes", "add", export, "NAME"), "another class, in seconds")
    next_steps.tell(notes, add, next_steps.predict(export))


@command("add")
def add_classes(
    export: ExportDirectory,
    names: Names,
    descriptions: Descriptions = None,
    model: Annotated[
        str | None, option(MODEL, "NAME", "Where the CLIP model lies now, if it was moved.")
    ] = None,
    pretrained: Annotated[
        str | None, option(MODEL, "FILE", "Where its .safetensors file lies now.")
    ] = None,
    describe: Annotated[
        str | None,
        option(LANGUAGE, "MODEL", "Let this one write descriptions, as `describe` does."),
    ] = None,
    endpoint: LanguageEndpoint = None,
    domain: Domain = None,
    as_json: AsJson = False,
) -> None:
    """Add classes, encoded with the text tower and not adapted to any photo."""
    from microclip_deploy.export import class_rows

    if describe is not None:
        if descriptions is not None:
            raise UsageError("--describe: expected no --descriptions beside it; leave one out")
        descriptions = _described(export, names, describe, endpoint, domain)
    rows = class_rows.add_classes(export, names, descriptions, model=model, pretrained=pretrained)
    added = rows[-len(names) :]
    if as_json:
        print_json(
            {"added": [row.name for row in added], "classes": [row.to_json() for row in rows]}
        )
        return
    out.print(
        f"{len(added)} added, {len(rows)} classes now. The new rows were never adapted to photos, "
        "so their accuracy is zero-shot; adapt again to change that.",
        soft_wrap=True,
    )
    next_steps.tell(notes, next_steps.predict(export), next_steps.evaluate(export))


def _described(
    export: Path, names: list[str], model: str, endpoint: str | None, domain: str | None
) -> Path:
    """Have new classes described, beside the export; return the file."""
    require("openai", "describe")
    from microclip_deploy.describe.endpoint import api_key
    from microclip_deploy.describe.judge import judged
    from microclip_deploy.describe.run import run_describe
    from microclip_deploy.describe.settings import DEFAULT_ENDPOINT, Settings
    from microclip_deploy.export import class_rows

    checked = class_rows.new_names(export, names)
    settings = Settings(model=model, endpoint=endpoint or DEFAULT_ENDPOINT, domain=domain)
    which = hashlib.sha256("\n".join(checked).encode()).hexdigest()[:8]
    path = export.with_name(f"{export.absolute().name}-{which}.jsonl")
    judge = partial(judged, names=checked, domain=domain, clip=None)
    key = api_key(settings.endpoint)
    outcome = run_describe(checked, path, settings, notes, key=key, judge=judge)
    notes.print(f"wrote {outcome.sentences} sentences to {path}", markup=False)
    return path


@command("remove")
def remove_classes(export: ExportDirectory, names: Names, as_json: AsJson = False) -> None:
    """Remove classes for good: what is added again is not adapted."""
    from microclip_deploy.export import class_rows

    rows = class_rows.remove_classes(export, names)
    if as_json:
        print_json({"classes": [row.to_json() for row in rows]})
        return
    out.print(f"{len(rows)} classes remain.", soft_wrap=True)
    next_steps.tell(notes, next_steps.predict(export), next_steps.evaluate(export))
