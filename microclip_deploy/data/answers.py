"""What a person said about photos, from a table: the class they show, or none."""

import csv
import io
import math
from pathlib import Path
from typing import NamedTuple

from microclip_deploy.data.names import NameIndex
from microclip_deploy.data.text_file import read_text
from microclip_deploy.errors import DataError, printable

NONE = "none"
"""Answer to a photo that shows no class of the model."""
NEITHER = "neither"
"""Answer to a photo that shows none of the classes that were suggested, as in an audit."""
SKIP = "skip"
"""No answer, as an empty one."""


class Answered(NamedTuple):
    """A photo and what was said about it."""

    path: Path
    row: int | None
    """Of the class; None for none of those that the model could have meant."""
    stranger: bool
    """It shows no class of the model."""
    weight: float
    """How many photos it stands for."""


def read_answers(path: Path, classes: tuple[str, ...]) -> tuple[Answered, ...]:
    """Read answers that were given.

    Args:
        path: CSV with the columns `path`, `answer` (a class, "none", or "neither" where the model
            was wrong; empty or "skip" where nobody answered), and perhaps `weight`. Relative paths
            start at its folder.
        classes: in the order of the logits.

    Raises:
        DataError: it cannot be read, a line names no path or an unknown class, or a weight is no
            number above 0.
    """
    place = printable(path)
    text = read_text(path, "answers").text
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline=""), restval=""))
    except csv.Error as error:
        raise DataError(f"{place}: expected CSV, found: {error}; save it again") from error
    if not rows or not {"path", "answer"} <= rows[0].keys():
        raise DataError(
            f"{place}: expected lines below the header path,answer, found "
            f"{', '.join(map(str, rows[0])) if rows else 'none'}; give the file of an audit"
        )
    index, answers = NameIndex(classes), []
    for number, row in enumerate(rows, start=2):
        said, where = row["answer"].strip(), f"{place}, line {number}"
        if said.casefold() in ("", SKIP):
            continue
        found = index.find(said)
        if found is None and said.casefold() not in (NONE, NEITHER):
            raise DataError(
                f"{where}: expected a class of the model, {NONE} or {NEITHER}, found {said!r}; "
                "mend it"
            )
        if not row["path"]:
            raise DataError(f"{where}: expected a path, found none; fill it in")
        weight = _weight(row.get("weight") or "1", where)
        stranger = found is None and said.casefold() == NONE
        answers.append(Answered(path.parent / row["path"], found, stranger, weight))
    return tuple(answers)


def _weight(text: str, where: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise DataError(f"{where}: expected a weight above 0, found {text!r}; mend it")
    return weight
