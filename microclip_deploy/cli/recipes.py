"""`microclip-deploy recipes`: what the shipped recipes are for, and the recipes themselves."""

import json
from itertools import takewhile
from typing import Annotated

import typer
from rich.padding import Padding
from rich.text import Text

from microclip_deploy.cli import next_steps
from microclip_deploy.cli.options import AsJson, recipe_names
from microclip_deploy.config import COMPLETE, recipe_changes, recipe_text, shipped_recipes
from microclip_deploy.console import machine_stdout, notes, out, print_json

_CAVEAT = "Differences under about two points mean nothing: most were measured with one seed."


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            help="Print this recipe, to copy and change it.",
            autocompletion=recipe_names,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Explain the shipped recipes: what each is for, what it changes, and what that brings.

    Example: microclip-deploy recipes microclip > mine.toml
    """
    if name is not None:
        machine_stdout().write(recipe_text(name))
    elif as_json:
        print_json(shipped_recipes())
    else:
        for each in sorted(shipped_recipes(), key=lambda name: name.startswith("ablation-")):
            out.print(Text(each, style="bold"))
            out.print(Padding(Text(_explanation(each)), (0, 0, 0, 4)))
        out.print(_CAVEAT)
        copy = (("recipes", COMPLETE), "print one, to copy and change it")
        next_steps.tell(notes, copy, next_steps.adapt("--recipe", "FILE.toml"))


def _explanation(name: str) -> str:
    """Return the comment at the head of a recipe, and its changes."""
    head = takewhile(lambda line: line.startswith("#"), recipe_text(name).splitlines())
    about = " ".join(line.lstrip("# ") for line in head)
    base, changes = recipe_changes(name)
    told = ", ".join(
        f"{key} = {json.dumps(value)} ({json.dumps(before)})"
        for key, (value, before) in changes.items()
    )
    return f"{about}\nchanges {base} (values there in brackets): {told}" if told else about
