"""`microclip-deploy classes`: the classes of an export."""

from functools import partial
from typing import Annotated

import typer

from microclip_deploy.cli import next_steps
from microclip_deploy.cli.help import SectionedCommand, SectionedGroup
from microclip_deploy.cli.options import MODEL, AsJson, Descriptions, ExportDirectory, Names, option
from microclip_deploy.console import notes, out, print_json

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
    as_json: AsJson = False,
) -> None:
    """Add classes, encoded with the text tower and not adapted to any photo."""
    from microclip_deploy.export import class_rows

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
