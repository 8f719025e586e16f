"""Images in, named predictions out.

`serving.classification` says what the probabilities are.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from microclip_deploy.calibration import is_unknown
from microclip_deploy.data.decode import BadImage
from microclip_deploy.data.photo import Remarks
from microclip_deploy.data.sources import ImageBatch, ImageSet, list_sources, read_batches
from microclip_deploy.errors import DataError, UsageError, printable
from microclip_deploy.joint import Folder
from microclip_deploy.serving import Prediction, Session
from microclip_deploy.serving.classification import Guess, guesses

_SHOWN = 5  # bad files the error message lists


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
    unknown: bool = False
    """The best class is less probable than the model's threshold."""
    overlay: Path | None = None
    """Picture of the mask and the attention, if one was written."""
    alone: str | None = None
    """The best class of the photo alone, where `top` is read jointly from all photos: its
    probabilities are joint ones, the logits still those of the photo."""


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
    sources: Sequence[Path] | ImageSet,
    top_k: int = 5,
    *,
    batch_size: int = 64,
    remarks: Remarks | None = None,
    progress: Callable[[int, int], None] = _ignore,
    folder: Folder | None = None,
) -> Iterator[Result]:
    """Classify images one batch at a time, in the order of the sources.

    Args:
        session: an open model; stays open.
        sources: images, folders or lists, as for `sources.list_sources`, or what it returned.
        top_k: how many classes an image; all of them if there are fewer.
        batch_size: images a batch.
        remarks: gets what reading the images tells.
        progress: called with (done, total) after each result was taken.
        folder: gets each image's [CLS] embedding and logits.

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
    listed = sources if isinstance(sources, ImageSet) else list_sources(sources)
    if not listed.paths:
        raise UsageError("predict: expected images, folders or lists, found none; name some")
    results = _results(session, listed.paths, top_k, batch_size, remarks, folder)
    return _counted(results, len(listed.paths), progress)


def _counted(
    results: Iterator[Result], total: int, progress: Callable[[int, int], None]
) -> Iterator[Result]:
    """Yield the results, and tell after each how many files are behind us."""
    for result in results:
        yield result
        progress(result.index + 1, total)


def _results(
    session: Session,
    paths: Sequence[Path],
    top_k: int,
    batch_size: int,
    remarks: Remarks | None,
    folder: Folder | None,
) -> Iterator[Result]:
    """Yield results in order; bad images are told between the good ones they lie between."""
    bad: list[FailedImage] = []
    told = 0

    def failed(index: int, error: BadImage) -> None:
        bad.append(FailedImage(index, error.path, error.reason))

    batches = read_batches(paths, session.preprocess, batch_size, on_bad=failed, remarks=remarks)
    for batch in batches:
        for result in _predictions(session, paths, batch, top_k, folder):
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
    session: Session, paths: Sequence[Path], batch: ImageBatch, top_k: int, folder: Folder | None
) -> Iterator[ImagePrediction]:
    found = session.predict(batch.images)
    if folder is not None:
        folder.add(found.cls, found.logits)
    ranked = guesses(session, found.logits, top_k)
    cls_best, fg_best = _best_of_tokens(session, found)
    names = session.classes
    for row, (index, top) in enumerate(zip(batch.indices.tolist(), ranked, strict=True)):
        yield ImagePrediction(
            index=index,
            path=paths[index],
            top=top,
            cls_top1=names[cls_best[row]],
            fg_top1=names[fg_best[row]],
            mask=found.mask[row],
            attention=found.attention[row],
            complete=bool(found.complete[row]),
            view=batch.images[row],
            unknown=is_unknown(top[0].probability, session.calibration),
        )


def _best_of_tokens(
    session: Session, found: Prediction
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    classifier = session.classifier()
    return (found.cls @ classifier.T).argmax(axis=1), (found.fg @ classifier.T).argmax(axis=1)


def predict_jointly(
    session: Session,
    sources: Sequence[Path] | ImageSet,
    top_k: int = 5,
    *,
    batch_size: int = 64,
    remarks: Remarks | None = None,
    progress: Callable[[int, int], None] = _ignore,
) -> Iterator[Result]:
    """Classify images together: after the last is read, yield results in the order of the sources.

    Arguments and results are those of `predict`, but that no more than `shortlist.LONGEST` classes
    an image are named, and `view` is empty: pixels are not kept until then, only each image's
    mask, attention, [CLS] embedding and shortlist.

    Raises:
        DataError: as `predict`; after the unreadable files were told.
        UsageError: as `predict`.
        VerificationError: the model says NaN or infinity.
    """
    folder = Folder(session.classifier())
    results = predict(
        session,
        sources,
        1,
        batch_size=batch_size,
        remarks=remarks,
        progress=progress,
        folder=folder,
    )
    if top_k < 1:
        raise UsageError(f"--top-k: expected at least 1, found {top_k}; give another")
    return _jointly(session, results, folder, top_k)


def _jointly(
    session: Session, results: Iterable[Result], folder: Folder, top_k: int
) -> Iterator[Result]:
    gone = np.empty((0, 0, 3), np.uint8)
    kept: list[Result] = []
    try:
        for result in results:
            kept.append(result if isinstance(result, FailedImage) else replace(result, view=gone))
    except DataError:
        yield from (result for result in kept if isinstance(result, FailedImage))
        raise
    ranked = _joint_guesses(session, folder, top_k)
    for result in kept:
        if isinstance(result, FailedImage):
            yield result
        else:
            yield replace(result, top=next(ranked), alone=result.top[0].name)


def _joint_guesses(session: Session, folder: Folder, top_k: int) -> Iterator[tuple[Guess, ...]]:
    """Yield the best classes of each image, with joint probabilities and the image's own logits."""
    read, scores = folder.read(), folder.scores()
    order = np.argsort(-read.values, axis=1, kind="stable")[:, :top_k]
    parts = (read.classes, read.values, scores.values)
    ranked = (np.take_along_axis(part, order, axis=1) for part in parts)
    for classes, shares, logits in zip(*ranked, strict=True):
        names = [session.classes[c] for c in classes.tolist()]
        yield tuple(
            Guess(name, share, logit, adapted=name not in session.unadapted)
            for name, share, logit in zip(names, shares.tolist(), logits.tolist(), strict=True)
        )
