"""What a session says about the photos of a folder, as arrays."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from microclip_deploy.calibrating import sample
from microclip_deploy.calibration import probabilities
from microclip_deploy.data.decode import BadImage
from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.data.sources import read_batches
from microclip_deploy.errors import DataError
from microclip_deploy.serving import Session


class FolderAnswers(NamedTuple):
    """What is said about some of the photos of a folder."""

    rows: NDArray[np.int64]
    """(N,) positions among the paths: those that were sampled and could be read."""
    logits: NDArray[np.float32]
    """(N, C)."""
    agree: NDArray[np.bool_]
    """(N,) [CLS] and [FG] alone name the same class."""
    complete: NDArray[np.bool_]
    """(N,) the saliency says nothing, so that [FG] may be no second opinion."""


def answers_of(
    session: Session,
    paths: Sequence[Path],
    *,
    preprocess: Preprocess | None = None,
    batch_size: int = 64,
    progress: Callable[[int, int], None] = lambda done, total: None,
    on_bad: Callable[[int, BadImage], None] = lambda index, error: None,
) -> FolderAnswers:
    """Ask a session about photos, of very many about a sample that fits into memory.

    Args:
        session: stays open.
        paths: of the photos.
        preprocess: in place of the session's.
        batch_size: images a batch.
        progress: called with (done, total) after each batch.
        on_bad: called with a number and the error for a photo that cannot be read, and is left out.

    Raises:
        DataError: none can be read.
    """
    chosen, classifier = sample(len(paths), len(session.classes)), session.classifier()
    given, parts = [paths[row] for row in chosen], list[FolderAnswers]()
    view = preprocess or session.preprocess
    for batch in read_batches(given, view, batch_size, on_bad=on_bad):
        found = session.predict(batch.images)
        cls_best, fg_best = ((t @ classifier.T).argmax(axis=1) for t in (found.cls, found.fg))
        agree, rows = cls_best == fg_best, chosen[batch.indices]
        parts.append(FolderAnswers(rows, found.logits, agree, found.complete))
        done = int(batch.indices[-1]) + 1
        if done < len(given):
            progress(done, len(given))
    if not parts:
        raise DataError(
            f"photos: expected readable ones, found none among {len(given)}; `predict` tells why"
        )
    progress(len(given), len(given))
    return FolderAnswers(*(np.concatenate(each) for each in zip(*parts, strict=True)))


def surest_of(
    session: Session, paths: Sequence[Path], preprocess: Preprocess, batch_size: int
) -> NDArray[np.float64]:
    """Return the probability of the best class (N,) of photos; raises as `answers_of`."""
    found = answers_of(session, paths, preprocess=preprocess, batch_size=batch_size)
    best: NDArray[np.float64] = probabilities(found.logits, session.calibration).max(axis=1)
    return best
