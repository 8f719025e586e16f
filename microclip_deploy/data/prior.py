"""The class frequencies that a user expects, from a file of names and weights."""

import csv
import io
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from microclip_deploy.data.names import NameIndex
from microclip_deploy.data.text_file import read_text
from microclip_deploy.errors import DataError, printable

_SHOWN = 3  # names that an error lists
_REMEDY = "give every class a weight, a count for example"


def read_prior(path: Path, classes: tuple[str, ...]) -> NDArray[np.float64]:
    """Read the expected share of each class.

    Args:
        path: JSON, {class: weight}; or CSV with the columns class and weight, with a header or
            without. Names as for `NameIndex`.
        classes: in the order of the logits.

    Returns:
        float (C,), shares that add up to 1.

    Raises:
        DataError: it cannot be read, a class is missing, unknown or named twice, a weight is no
            number from 0 on, or all are 0.
    """
    place = printable(path)
    text = read_text(path, "class frequencies").text
    pairs = _of_json(text, place) if path.suffix.lower() == ".json" else _of_csv(text, place)
    index, weights = NameIndex(classes), np.full(len(classes), np.nan)
    for name, value in pairs:
        row = index.find(name)
        if row is None or not math.isnan(weights[row]):
            found = "which is none" if row is None else "a second time"
            raise DataError(
                f"{place}: expected each class of the model once, found {name!r} {found}; mend it"
            )
        weights[row] = _weight(value, name, place)
    missing = [classes[row] for row in np.flatnonzero(np.isnan(weights))]
    if missing:
        named = ", ".join(map(repr, missing[:_SHOWN]))
        raise DataError(
            f"{place}: expected all {len(classes)} classes of the model, found no weight for "
            f"{len(missing)}, such as {named}; {_REMEDY}"
        )
    total = weights.sum()
    if not 0 < total < math.inf:
        raise DataError(f"{place}: expected a sum above 0, found {total:g}; {_REMEDY}")
    shares: NDArray[np.float64] = weights / total
    return shares


def _weight(value: Any, name: str, place: str) -> float:
    try:
        weight = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise DataError(
            f"{place}: expected a number from 0 on as the weight of {name!r}, found {value!r}; "
            f"{_REMEDY}"
        )
    return weight


def _of_json(text: str, place: str) -> Iterable[tuple[str, Any]]:
    try:
        found = json.loads(text, object_pairs_hook=_Pairs)
    except ValueError as error:
        raise DataError(f"{place}: expected JSON, found: {error}; mend it") from error
    if not isinstance(found, _Pairs):
        raise DataError(f"{place}: expected JSON {{class: weight}}, found another; {_REMEDY}")
    return found


class _Pairs(list[tuple[str, Any]]):
    """An object of JSON, in which a name may stand twice."""


def _of_csv(text: str, place: str) -> Iterable[tuple[str, Any]]:
    try:
        rows = [row for row in csv.reader(io.StringIO(text, newline="")) if any(row)]
    except csv.Error as error:
        raise DataError(f"{place}: expected CSV, found: {error}; save it again") from error
    if rows and [cell.strip().casefold() for cell in rows[0]] == ["class", "weight"]:
        rows = rows[1:]
    wrong = next((row for row in rows if len(row) != 2), None)
    if wrong is not None or not rows:
        found = "no line" if wrong is None else f"{len(wrong)} cells: {','.join(wrong)[:80]!r}"
        raise DataError(f"{place}: expected lines of class,weight, found {found}; {_REMEDY}")
    return [(name.strip(), weight.strip()) for name, weight in rows]
