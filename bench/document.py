"""A report's tables and remarks, in columns for the terminal and in Markdown, and as files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from microclip_deploy.artifact import make_directory, write_bytes, write_json
from microclip_deploy.bench.table_text import columns, flat, inline, markdown_table

Tables = Mapping[str, Sequence[Sequence[str]]]
"""Title -> rows of cells, headers first."""
Remarks = Mapping[str, Sequence[str]]
"""Title -> one line each; a title without lines is left out."""


def plain(tables: Tables, remarks: Remarks) -> str:
    """Return everything for a terminal."""
    blocks = [[title, *columns(rows)] for title, rows in tables.items()]
    blocks += [
        [title, *(f"  {line}" for line in lines)] for title, lines in remarks.items() if lines
    ]
    return "\n\n".join("\n".join(block) for block in blocks)


def markdown(title: str, tables: Tables, remarks: Remarks, machine: Mapping[str, Any]) -> str:
    """Return everything as Markdown, the environment card as its last table."""
    card = [["machine", ""], *([name, value] for name, value in flat(machine).items())]
    lines = [f"# {inline(title)}", ""]
    for heading, rows in tables.items():
        lines += [f"## {inline(heading)}", "", *markdown_table(rows), ""]
    for heading, remark in remarks.items():
        if remark:
            lines += [f"## {heading}", "", *(f"* {inline(text)}" for text in remark), ""]
    return "\n".join([*lines, *markdown_table(card), ""])


def write_files(directory: Path, name: str, value: Any, texts: Mapping[str, str]) -> Path:
    """Write NAME.json and a text for each suffix; return the JSON's path.

    Args:
        directory: made if it is not there.
        name: of the files, without a suffix.
        value: plain values.
        texts: suffix such as ".md" -> content.

    Raises:
        EnvironmentProblem: the disk is full or the directory cannot be written.
    """
    make_directory(directory)
    path = directory / f"{name}.json"
    write_json(path, value)
    for suffix, text in texts.items():
        write_bytes(path.with_suffix(suffix), text.encode())
    return path
