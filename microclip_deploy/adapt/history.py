"""Logs of one JSON object a line, such as history.jsonl, read back."""

import json
from pathlib import Path
from typing import Any

from microclip_deploy.errors import CheckpointError


def read_history(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a log, oldest first; none where there is no file.

    A last line without its line break was cut short by a kill while it was written, and is left
    out.

    Raises:
        CheckpointError: the file cannot be read, or a line is no JSON object; names the line.
    """
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path}: expected one JSON object a line in UTF-8, found: {error}; restore the file"
        ) from error
    complete = text.split("\n")[:-1]
    return [
        _object(path, number, line) for number, line in enumerate(complete, start=1) if line.strip()
    ]


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise _damaged(path, number, str(error)) from error
    if not isinstance(value, dict):
        raise _damaged(path, number, type(value).__name__)
    return value


def _damaged(path: Path, number: int, found: str) -> CheckpointError:
    return CheckpointError(
        f"{path}, line {number}: expected a JSON object, found: {found}; repair the line, or "
        "restore the file"
    )
