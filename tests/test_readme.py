"""The README names only commands, options, files and settings that exist."""

import re
import shlex
from itertools import chain
from pathlib import Path

import pytest
import typer

from microclip_deploy.adapt.trainer import Recipe
from microclip_deploy.cli.main import app
from microclip_deploy.config import resolve

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
PROGRAM = typer.main.get_command(app)
COMMANDS = PROGRAM.commands  # type: ignore[attr-defined]


def command_lines() -> list[str]:
    found = re.findall(r"^\s*(microclip-deploy .*?)(?:\s+#.*)?$", README, re.MULTILINE)
    return list(found)


@pytest.mark.parametrize("line", command_lines())
def test_commands_and_options_exist(line: str) -> None:
    _, name, *arguments = shlex.split(line)
    command = COMMANDS[name]
    if hasattr(command, "commands"):  # a target stands for `bench model`
        command = command.commands.get(arguments[0]) or command.commands[command.target_command]
    known = {opt for param in command.params for opt in (*param.opts, *param.secondary_opts)}
    given = {argument for argument in arguments if argument.startswith("-")}
    assert given <= known


def test_every_option_named_in_the_text_exists() -> None:
    inner = [COMMANDS[name].commands.values() for name in ("bench", "describe")]
    groups = [PROGRAM, *COMMANDS.values(), *chain(*inner)]
    known = {opt for command in groups for p in command.params for opt in p.opts}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README))
    assert named <= known


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(((?!http)[^)#]+)", README))))
def test_links_lead_somewhere(target: str) -> None:
    assert (ROOT / target).exists()


def test_settings_exist() -> None:
    found = set(re.findall(r"--set (\S+=[^`\s]+)", README)) - {"section.key=value"}  # the form
    resolve(Recipe, None, [override.replace("''", "") for override in sorted(found)])
