"""Find how the logits of a run or an export are read on a folder, and store it there."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from microclip_deploy import artifact
from microclip_deploy.artifact import exclusive
from microclip_deploy.calibrating import (
    calibrate,
    calibrate_with_answers,
    share_with_doubt,
)
from microclip_deploy.calibration import Calibration
from microclip_deploy.data.answers import Answered
from microclip_deploy.data.decode import BadImage
from microclip_deploy.data.sources import BadFile
from microclip_deploy.errors import UsageError
from microclip_deploy.evaluation.answers import FolderAnswers, answers_of
from microclip_deploy.serving import Session


class Calibrated(NamedTuple):
    """A calibration, and the photos that could not be read for it."""

    calibration: Calibration
    bad: tuple[BadFile, ...]


def calibration_of(
    session: Session,
    paths: Sequence[Path],
    answered: Sequence[Answered] | None = None,
    *,
    batch_size: int = 64,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Calibrated:
    """Calibrate an open model on a folder.

    Args:
        session: which expects the folder's class frequencies, as it does when it is opened.
        paths: of the folder's photos.
        answered: what a person said about photos, these or others; None for no answers.
        batch_size: images a batch.
        progress: called with (done, total).

    Raises:
        DataError: no photo can be read, or there are too few answers.
        VerificationError: the model's logits are no finite numbers.
    """
    bad: list[BadFile] = []

    def skip(index: int, error: BadImage) -> None:
        bad.append(BadFile(error.path, error.reason))

    ask = partial(answers_of, session, batch_size=batch_size, on_bad=skip)
    folder = ask(paths, progress=progress)
    if answered is None:
        return Calibrated(calibrate(folder.logits, expected_accuracy(folder)), tuple(bad))
    told = ask([each.path for each in answered])
    given = [answered[row] for row in told.rows]
    best = told.logits.argmax(axis=1).tolist()
    right = np.array([each.row == row for each, row in zip(given, best, strict=True)])
    shown = np.array([not each.stranger for each in given])
    weights = np.array([each.weight for each in given])
    found = calibrate_with_answers(folder.logits, told.logits, right, shown, weights)
    return Calibrated(found, tuple(bad))


def expected_accuracy(folder: FolderAnswers) -> float:
    """Estimate accuracy without labels: the share for which [CLS] and [FG] name the same class.

    Two opinions of one model agree too often, so the estimate is rather too high; how good it was
    where the truth is known docs/calibration.md tells.
    """
    return share_with_doubt(folder.agree[~folder.complete])


def store(directory: Path, calibration: Calibration, classes: tuple[str, ...]) -> None:
    """Put a calibration into the manifest of a run or an export; its other files stay.

    Args:
        directory: the run or export.
        calibration: of its model.
        classes: of which it was found.

    Raises:
        UsageError: its classes have changed meanwhile, or another process is changing it.
        CheckpointError: it is damaged.
        EnvironmentProblem: it cannot be written.
    """
    with exclusive(directory, "another process is changing it; wait for it and run again"):
        stored = artifact.read_manifest(directory, artifact.read_schema(directory))
        if tuple(stored["classes"]) != classes:
            raise UsageError(
                f"{directory}: expected the classes that were calibrated, found others: they were "
                "changed meanwhile; run again"
            )
        fields = {"calibration": calibration.model_dump(mode="json")}
        artifact.rewrite_manifest(directory, {**stored, **fields}, [])
