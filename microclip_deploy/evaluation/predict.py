"""Images in, named predictions out.

Probabilities are the softmax of the fused logits, which are cosines times 100. They rank the
classes of one image; they are not calibrated: 0.9 does not mean right nine times out of ten.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from microclip_deploy.data.decode import BadImage
from microclip_deploy.data.sources import ImageBatch, list_images, read_batches
from microclip_deploy.errors import DataError, UsageError, printable
from microclip_deploy.serving import Prediction, Session

_SHOWN = 5  # bad files the error message lists


class Guess(NamedTuple):
    """One class an image may show."""

    name: str
    probability: float
    """Softmax of the fused logits over all classes; not calibrated."""
    logit: float
    adapted: bool = True
    """False for a class that was added after the adaptation: its accuracy is zero-shot."""


@dataclass(frozen=True, eq=False)
class ImagePrediction:
    """What the model says about one image."""

    index: int
    """Position among all files given."""
    path: Path
    top: tuple[Guess, ...]
    """Most probable first."""
    cls_top1: str
    """The best class by [CLS] alone."""
    fg_top1: str
    """The best class by [FG] alone; where it differs from `cls_top1` the two tokens disagree."""
    mask: NDArray[np.bool_]
    """(N,), row-major token grid."""
    attention: NDArray[np.float32]
    """(N+1,); the last entry is the zero token's."""
    complete: bool
    """The saliency graph joins every pair of tokens: the mask says nothing."""
    view: NDArray[np.uint8]
    """(S, S, 3): the pixels the model saw, before normalisation."""
    overlay: Path | None = None
    """Picture of the mask and the attention, if one was written."""


@dataclass(frozen=True)
class FailedImage:
    """A file that could not be read as an image."""

    index: int
    path: Path
    reason: str


Result = ImagePrediction | FailedImage


def _ignore(done: int, total: int) -> None:
    """Show no progress."""


def predict(
    session: Session,
    sources: Sequence[Path],
    top_k: int = 5,
    *,
    batch_size: int = 64,
    progress: Callable[[int, int], None] = _ignore,
) -> Iterator[Result]:
    """Classify images one batch at a time, in the order of the sources.

    Args:
        session: an open model; stays open.
        sources: images, folders or lists, as for `sources.list_images`.
        top_k: how many classes an image; all of them if there are fewer.
        batch_size: images a batch.
        progress: called with (done, total) after each result was taken.

    Returns:
        One result a file; unreadable files are results too.

    Raises:
        DataError: a source holds nothing (at once), or no file at all could be read (at the end).
        UsageError: `top_k` or `batch_size` below 1.
    """
    if top_k < 1 or batch_size < 1:
        raise UsageError(
            f"--top-k and --batch-size: expected at least 1, found {top_k} and {batch_size}; "
            "give others"
        )
    paths = [path for source in sources for path in list_images(source).paths]
    if not paths:
        raise UsageError("predict: expected images, folders or lists, found none; name some")
    return _counted(_results(session, paths, top_k, batch_size), len(paths), progress)


def _counted(
    results: Iterator[Result], total: int, progress: Callable[[int, int], None]
) -> Iterator[Result]:
    """Yield the results, and tell after each how many files are behind us."""
    for result in results:
        yield result
        progress(result.index + 1, total)


def _results(
    session: Session, paths: Sequence[Path], top_k: int, batch_size: int
) -> Iterator[Result]:
    """Yield results in order; bad images are told between the good ones they lie between."""
    bad: list[FailedImage] = []
    told = 0

    def failed(index: int, error: BadImage) -> None:
        bad.append(FailedImage(index, error.path, error.reason))

    for batch in read_batches(paths, session.preprocess, batch_size, on_bad=failed):
        for result in _predictions(session, paths, batch, top_k):
            while told < len(bad) and bad[told].index < result.index:
                yield bad[told]
                told += 1
            yield result
    yield from bad[told:]
    if len(bad) == len(paths):
        shown = "; ".join(f"{printable(file.path)} ({file.reason})" for file in bad[:_SHOWN])
        raise DataError(
            f"predict: expected readable images, found none in {len(paths)} files: {shown}; "
            "repair them or name others"
        )


def _predictions(
    session: Session, paths: Sequence[Path], batch: ImageBatch, top_k: int
) -> Iterator[ImagePrediction]:
    found = session.predict(batch.images)
    probabilities = softmax(found.logits)
    order = np.argsort(-found.logits, axis=1, kind="stable")[:, :top_k]
    cls_best, fg_best = _best_of_tokens(session, found)
    names = session.classes
    for row, index in enumerate(batch.indices.tolist()):
        yield ImagePrediction(
            index=index,
            path=paths[index],
            top=tuple(
                Guess(
                    names[c],
                    float(probabilities[row, c]),
                    float(found.logits[row, c]),
                    adapted=names[c] not in session.unadapted,
                )
                for c in order[row]
            ),
            cls_top1=names[cls_best[row]],
            fg_top1=names[fg_best[row]],
            mask=found.mask[row],
            attention=found.attention[row],
            complete=bool(found.complete[row]),
            view=batch.images[row],
        )


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the softmax (B, C) of float (B, C) logits in float64; rows sum to 1."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    weights = np.exp(shifted)
    shares: NDArray[np.float64] = weights / weights.sum(axis=1, keepdims=True)
    return shares


def _best_of_tokens(
    session: Session, found: Prediction
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    classifier = session.classifier()
    return (found.cls @ classifier.T).argmax(axis=1), (found.fg @ classifier.T).argmax(axis=1)
