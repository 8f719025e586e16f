"""Help in sections: options and commands under what a user wants, in plain text of any width.

Typer draws such sections (`rich_help_panel`) with boxes, which a narrow terminal, a pipe or an
encoding without box characters spoils.
"""

from collections.abc import Iterable
from typing import Any

from typer.core import TyperCommand, TyperGroup

from microclip_deploy.cli.options import OUTPUT

_WIDEST = 30  # characters of the first column; what is longer has its help on the next line

_Row = tuple[str, str, str]
"""Section, name and text."""


class SectionedCommand(TyperCommand):
    """A command whose options stand in sections."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments and options."""
        write_parameters(self.get_params(ctx), ctx, formatter)


class SectionedGroup(TyperGroup):
    """A group whose commands stand in sections, before its options."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write commands and options."""
        self.format_commands(ctx, formatter)
        write_parameters(self.get_params(ctx), ctx, formatter)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the commands, each with the first sentence about it."""
        shown = [(name, self.commands[name]) for name in self.list_commands(ctx)]
        _write(
            formatter,
            (
                (getattr(command, "rich_help_panel", None) or "Commands", name, _summary(command))
                for name, command in shown
                if not command.hidden
            ),
        )


class TargetGroup(SectionedGroup):
    """Takes what is none of its commands for the target of one, and shows that one's options."""

    target_command: str
    """Name of the command that a target stands for."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the command before a target."""
        if args and args[0] not in (*self.commands, "-h", "--help"):
            args = [self.target_command, *args]
        return super().parse_args(ctx, args)

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """Complete commands, targets and options."""
        found = super().shell_complete(ctx, incomplete)
        return [*found, *self.commands[self.target_command].shell_complete(ctx, incomplete)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the commands, and what a target takes."""
        self.format_commands(ctx, formatter)
        write_parameters(self.commands[self.target_command].get_params(ctx), ctx, formatter)


def write_parameters(params: Iterable[Any], ctx: Any, formatter: Any) -> None:
    """Write arguments, then options by section: the output last but for those of no section."""
    arguments: list[_Row] = []
    options: list[_Row] = []
    rest: list[_Row] = []
    for param in params:
        record = param.get_help_record(ctx)
        if record is None:
            continue
        name, text = record
        if param.param_type_name == "argument":
            arguments.append(("Arguments", name.partition(" <")[0], text))
        elif section := getattr(param, "rich_help_panel", None):
            options.append((section, name, text))
        else:
            rest.append(("Options", name, text))
    options.sort(key=lambda row: row[0] == OUTPUT)
    _write(formatter, [*arguments, *options, *rest])


def _write(formatter: Any, rows: Iterable[_Row]) -> None:
    """Write rows by section; all sections share the width of the first column."""
    sections: dict[str, list[tuple[str, str]]] = {}
    for section, name, text in rows:
        sections.setdefault(section, []).append((name, text))
    names = [name for group in sections.values() for name, _ in group if len(name) <= _WIDEST]
    width = max(map(len, names), default=0)
    for section, group in sections.items():
        with formatter.section(section):
            formatter.write_dl([(name.ljust(width), text) for name, text in group], width)


def _summary(command: Any) -> str:
    """Return the first paragraph of what a command says about itself."""
    return " ".join((command.help or "").partition("\n\n")[0].split())
