"""The answers of an audit as arrays, for estimates of other kinds, such as calibration."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from microclip_deploy import artifact
from microclip_deploy.audit.plan import SKIP
from microclip_deploy.audit.wording import AUDIT, FORMAT
from microclip_deploy.data.answers import Answered
from microclip_deploy.errors import CheckpointError, printable


class Answers(NamedTuple):
    """The answered photos of an audit, for estimates of other kinds: (n,) or (2, n), A before B."""

    paths: tuple[str, ...]
    """Relative to the folder of the photos."""
    said: tuple[tuple[str, ...], tuple[str, ...]]
    """Class names."""
    truth: tuple[str, ...]
    """A class name, or "neither": some other class."""
    confidence: NDArray[np.float64]
    """(2, n): largest softmax probability, not calibrated."""
    right: NDArray[np.bool_]
    """(2, n)."""
    inclusion: NDArray[np.float64]
    """(n,): probability with which a photo was asked about; its inverse is its weight."""


def read_clicks(path: Path) -> Answers:
    """Read what was answered; photos that were skipped are left out.

    The inclusion probability counts skipped photos as not asked about.

    Args:
        path: `audit.json`, or the folder that holds it.

    Raises:
        CheckpointError: missing, damaged, or of another format.
    """
    file = path / AUDIT if path.is_dir() else path
    stored = artifact.read_json(file)
    found = stored.get("format") if isinstance(stored, dict) else None
    if found != FORMAT:
        raise CheckpointError(
            f"{printable(file)}: expected {FORMAT}, found {found}; give what `audit` wrote"
        )
    rows = [row for row in stored["clicks"] if row["answer"] != SKIP]
    chance = {
        name: kind["answered"] / max(kind["photos"], 1) for name, kind in stored["kinds"].items()
    }
    truth = tuple(row["answer"] for row in rows)
    said = tuple(row["a"] for row in rows), tuple(row["b"] for row in rows)
    return Answers(
        tuple(row["path"] for row in rows),
        said,
        truth,
        np.array([row["confidence"] for row in rows], np.float64).reshape(-1, 2).T,
        np.array([[a == b for a, b in zip(each, truth, strict=True)] for each in said], bool),
        np.array([chance["differ" if row["differ"] else "agree"] for row in rows], np.float64),
    )


def answered(path: Path, photos: Path, classes: Sequence[str]) -> tuple[Answered, ...]:
    """Return an audit's answers as `calibrate` takes them, each with the photos it stands for.

    Args:
        path: as for `read_clicks`.
        photos: the folder that was audited.
        classes: of the model.

    Raises:
        CheckpointError: as `read_clicks`.
    """
    told, rows = read_clicks(path), {name: row for row, name in enumerate(classes)}
    each = zip(told.paths, told.truth, told.inclusion.tolist(), strict=True)
    return tuple(
        Answered(photos / name, rows.get(truth), False, 1 / chance) for name, truth, chance in each
    )
