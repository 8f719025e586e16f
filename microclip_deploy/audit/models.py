"""The two models that are compared, and what they say about every photo."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from microclip_deploy import artifact
from microclip_deploy.calibration import softmax
from microclip_deploy.data.decode import BadImage
from microclip_deploy.data.photo import Remarks
from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.data.sources import BadFile, read_batches
from microclip_deploy.errors import DataError, UsageError, printable
from microclip_deploy.head import LOGIT_SCALE
from microclip_deploy.serving import Session, is_export, open_run, open_session

ADAPTED, ZERO_SHOT = "adapted", "zero-shot"

Facts = dict[str, str]
"""What knows a model again: `title`, `directory`, and `sha256` of its manifest."""


def model_facts(directory: Path, against: Path | None) -> tuple[Facts, Facts]:
    """Return what knows both models again; neither is opened.

    Args:
        directory: run or export.
        against: another one; None for the run's own zero-shot model with the class names.

    Raises:
        UsageError: an export without `against`.
    """
    if against is None and is_export(directory):
        raise UsageError(
            f"{printable(directory)}: expected a run, found an export, which holds no zero-shot "
            "model; give the run, or another model with --against"
        )
    places = (directory, against or directory)
    titles = [place.absolute().name for place in places]
    if against is None:
        titles = [ADAPTED, ZERO_SHOT]
    elif titles[0] == titles[1]:
        titles = [printable(place) for place in places]
    first, second = (
        {
            "title": title,
            "directory": printable(place),
            "sha256": str(artifact.read_json(place / artifact.MANIFEST).get("sha256")),
        }
        for title, place in zip(titles, places, strict=True)
    )
    return first, second


@dataclass(frozen=True)
class Model:
    """One of the two models."""

    session: Session
    names: NDArray[np.float32] | None = None
    """(C, E), unit rows, that [CLS] is compared to; None for the model's own fused answer."""

    def say(self, pixels: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return the best classes (B,) of its list and their probabilities (B,), uncalibrated."""
        found = self.session.predict(pixels)
        logits = found.logits
        if self.names is not None:
            logits = (LOGIT_SCALE * found.cls @ self.names.T).astype(np.float32)
        return logits.argmax(axis=1), softmax(logits).max(axis=1)


@contextmanager
def open_models(
    directory: Path,
    against: Path | None,
    device: str,
    *,
    threads: int | None = None,
    max_pixels: int | None = None,
    bit_depth: int | None = None,
) -> Iterator[tuple[Model, Model]]:
    """Open a model and its rival.

    Args:
        directory: as for `model_facts`.
        against: likewise.
        device: as for `open_session`.
        threads: as for `open_session`.
        max_pixels: likewise.
        bit_depth: likewise.

    Raises:
        UsageError: models of other classes.
    """
    with ExitStack() as stack:
        if against is None:
            run = stack.enter_context(open_run(directory, device, threads=threads))
            for session in run[:2]:
                read = session.preprocess.reading(max_pixels=max_pixels, bit_depth=bit_depth)
                session.preprocess = read
            yield Model(run.adapted), Model(run.initial, run.names)
            return
        first, second = (
            stack.enter_context(
                open_session(
                    place, device, max_pixels=max_pixels, bit_depth=bit_depth, threads=threads
                )
            )
            for place in (directory, against)
        )
        _require_same_classes(first, second)
        yield Model(first), Model(second)


def _require_same_classes(first: Session, second: Session) -> None:
    only = sorted(set(first.classes) ^ set(second.classes))
    if only:
        raise UsageError(
            f"--against: expected models of the same classes, found {len(only)} that one model has "
            f"alone, such as '{only[0]}'; compare models of one class list, or let `classes add` "
            "and `classes remove` make them so"
        )


class Opinions(NamedTuple):
    """What both models say about M photos that can be read."""

    rows: NDArray[np.int64]
    """(M,) positions among the photos given."""
    best: NDArray[np.int64]
    """(2, M) classes of A's list."""
    confidence: NDArray[np.float64]
    """(2, M) largest softmax probabilities, not calibrated."""
    bad: tuple[BadFile, ...]


def opinions(
    models: tuple[Model, Model],
    paths: Sequence[Path],
    *,
    batch_size: int,
    remarks: Remarks,
    progress: Callable[[int, int], None],
) -> Opinions:
    """Let both models classify all photos; they are read once if both see them alike.

    Raises:
        DataError: none can be read.
    """
    alike = models[0].session.preprocess == models[1].session.preprocess
    groups = [models] if alike else [(model,) for model in models]
    said = [_Said(len(paths)) for _ in models]
    bad: dict[int, BadFile] = {}
    for turn, group in enumerate(groups):
        done = turn * len(paths)

        def tell(count: int, done: int = done) -> None:
            progress(done + count, len(groups) * len(paths))

        _classify(group, said[turn : turn + len(group)], paths, bad, batch_size, remarks, tell)
    good = np.array([row for row in range(len(paths)) if row not in bad], np.int64)
    if not len(good):
        first = next(iter(bad.values()))
        raise DataError(
            f"audit: expected readable photos, found none in {len(paths)} files, such as "
            f"{printable(first.path)} ({first.reason}); repair them or name others"
        )
    row_of = {name: row for row, name in enumerate(models[0].session.classes)}
    to_first = np.array([row_of[name] for name in models[1].session.classes])
    best = np.stack([said[0].best[good], to_first[said[1].best[good]]])
    confidence = np.stack([each.confidence[good] for each in said])
    return Opinions(good, best, confidence, tuple(bad[row] for row in sorted(bad)))


@dataclass
class _Said:
    """What one model says about each of N photos."""

    count: int
    best: NDArray[np.int64] = field(init=False)
    confidence: NDArray[np.float64] = field(init=False)

    def __post_init__(self) -> None:
        """Make room."""
        self.best, self.confidence = np.zeros(self.count, np.int64), np.zeros(self.count)


def _classify(
    models: Sequence[Model],
    said: Sequence[_Said],
    paths: Sequence[Path],
    bad: dict[int, BadFile],
    batch_size: int,
    remarks: Remarks,
    tell: Callable[[int], None],
) -> None:
    preprocess: Preprocess = models[0].session.preprocess

    def failed(index: int, error: BadImage) -> None:
        bad[index] = BadFile(paths[index], error.reason)

    for batch in read_batches(paths, preprocess, batch_size, on_bad=failed, remarks=remarks):
        for model, opinion in zip(models, said, strict=True):
            best, confidence = model.say(batch.images)
            opinion.best[batch.indices], opinion.confidence[batch.indices] = best, confidence
        tell(int(batch.indices[-1]) + 1)
    tell(len(paths))
