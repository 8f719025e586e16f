"""Accuracy of any session on labelled images; labels come in here and nowhere else.

Every number is a fraction between 0 and 1. Zero-shot rows look at the model as it was before
adaptation, with the three class matrices its texts give:

    names          u: the class names alone, as plain zero-shot CLIP uses them
    descriptions   the start of the learnable head
    prior          F: the frozen head that pseudo-labels lean on

and with further ones, controls, where they are given: texts that descriptions must beat.

An export holds the adapted model alone, so that its evaluation has no such rows.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from microclip_deploy.calibration import FOLDER, is_unknown, probabilities, softmax
from microclip_deploy.data.decode import BadImage
from microclip_deploy.data.labelled import LabelledImages
from microclip_deploy.data.location import absolute
from microclip_deploy.data.photo import Remarks
from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.data.sources import (
    BadFile,
    ImageSet,
    TooManyBad,
    bad_image_limit,
    list_images,
    read_batches,
)
from microclip_deploy.errors import printable
from microclip_deploy.evaluation.answers import surest_of
from microclip_deploy.evaluation.comparison import (
    Comparison,
    Controls,
    compared,
    row_names,
    rows_of,
)
from microclip_deploy.evaluation.evaluation import EVALUATION, JOINT, Answer, Evaluation, Row
from microclip_deploy.evaluation.masks import MaskFacts, MaskTally, TrueMasks
from microclip_deploy.evaluation.reliability import Reliability, Strangers
from microclip_deploy.evaluation.scores import Scores, mean_scores, ranks_of, score, scores_of_ranks
from microclip_deploy.joint import Folder
from microclip_deploy.ncut.spec import saliency_warning
from microclip_deploy.paths import StrPath, as_path
from microclip_deploy.serving import (
    Prediction,
    RunSessions,
    Session,
    is_export,
    open_run,
    open_session,
)

__all__ = [
    "EVALUATION",
    "Answer",
    "Evaluation",
    "LabelledImages",
    "Row",
    "Scores",
    "SessionAccuracy",
    "accuracy",
    "accuracy_of_session",
    "evaluate",
    "score",
]

_SHOWN = 5  # files an error message lists


def _ignore(done: int, total: int) -> None:
    """Show no progress."""


def _no_note(session: Session) -> None:
    """Say nothing about the session."""


@dataclass(frozen=True)
class SessionAccuracy:
    """What one session scored."""

    rows: Mapping[str, Scores]
    """"fused", "cls", "fg", "joint" if that was asked for, and the names of further class matrices,
    which [CLS] is compared to."""
    masks: MaskFacts
    bad: tuple[BadFile, ...]
    """Images that could not be read and count nowhere."""
    answers: tuple[Answer, ...] = field(repr=False)
    """What the fused logits say, image by image."""
    remarks: tuple[str, ...] = ()
    """What reading the images told."""
    ranks: Mapping[str, NDArray[np.int64]] = field(default_factory=dict, repr=False)
    """(M,) for each row: how many classes an image's own was placed behind."""
    reliability: Reliability | None = None

    def beside(self, surest: NDArray[np.float64]) -> Self:
        """Return it with what tells photos of no class apart: their best probability (U,)."""
        assert self.reliability is not None, "every session that measured images has one"
        known = np.array([answer.probability for answer in self.answers])
        strangers = Strangers.of(surest, known, self.reliability.unknown_below)
        return replace(self, reliability=replace(self.reliability, unknown=strangers))


def evaluate(
    directory: StrPath,
    data: StrPath,
    *,
    device: str = "cpu",
    batch_size: int = 64,
    zero_shot: bool = True,
    limit: int | None = None,
    max_bad: str = "1%",
    threads: int | None = None,
    sessions: RunSessions | None = None,
    progress: Callable[[int, int], None] = _ignore,
    on_open: Callable[[Session], None] = _no_note,
    listed: ImageSet | None = None,
    max_pixels: int | None = None,
    bit_depth: int | None = None,
    masks: StrPath | None = None,
    controls: Controls | None = None,
    prior: StrPath = FOLDER,
    unknown: StrPath | None = None,
    joint: bool = False,
) -> Evaluation:
    """Measure a run or an export on labelled images; a run beside the model before adaptation.

    Args:
        directory: what `adapt` or `export` wrote.
        data: as for `LabelledImages.read`.
        device: as for `open_session`.
        batch_size: images a batch.
        zero_shot: also measure the model before adaptation, in the same pass over the images;
            without effect on an export, which does not hold it.
        limit: measure so many images only, spread evenly over all.
        max_bad: how many images may be unreadable, as for `sources.bad_image_limit`; they are left
            out, and named in `Evaluation.bad`.
        threads: as for `open_session`.
        sessions: of the run, if they are open; they stay so, and expect the prior from then on.
        progress: called with (done, total) after each batch.
        on_open: called with the open session before the first image.
        listed: as for `LabelledImages.read`.
        max_pixels: as in `PhotoConfig`, in place of the run's.
        bit_depth: likewise.
        masks: folder of true masks, as for `TrueMasks.find`.
        controls: further class matrices for [CLS] before adaptation, measured with zero-shot.
            With those of which there is more than one draw the descriptions are compared.
        prior: how frequent the classes are, as for `Session.expect`; counts for the adapted
            model's fused logits.
        unknown: photos of no class, as for `list_images`: how many of them are called unknown.
        joint: also measure the adapted model where all images together say what each shows.

    Raises:
        DataError: the data, or the checkpoint (CheckpointError), cannot be used, or more images
            than allowed are unreadable (TooManyBad).
        EnvironmentProblem: the device, or a package of the backend, is missing.
        UsageError: `max_bad`, `threads` or `device` is malformed.
    """
    directory, data = as_path(directory, "directory"), as_path(data, "labelled images")
    with ExitStack() as stack:
        if sessions is None and zero_shot and not is_export(directory):
            sessions = stack.enter_context(open_run(directory, device, threads=threads))
        if sessions:
            adapted = sessions.adapted
        else:
            adapted = stack.enter_context(open_session(directory, device, threads=threads))
        adapted.expect(prior)
        on_open(adapted)
        images = _spread(LabelledImages.read(data, adapted.classes, listed), limit)
        allowed = bad_image_limit(max_bad, len(images.paths))
        known = TrueMasks.find(as_path(masks, "masks"), images.paths) if masks else None
        folder = Folder(adapted.classifier()) if joint else None
        probes = [_Probe(adapted, true_masks=known, folder=folder)]
        if zero_shot and sessions:
            heads = {"names": sessions.names, "prior": sessions.prior}
            probes.append(_Probe(sessions.initial, heads | rows_of(controls or {})))
        preprocess = adapted.preprocess.reading(max_pixels=max_pixels, bit_depth=bit_depth)
        strange = list_images(unknown).paths if unknown else ()
        measured = _measure(probes, images, preprocess, batch_size, progress)
        if strange:
            others = surest_of(adapted, strange, preprocess, batch_size)
            measured[0] = measured[0].beside(others)
    bad = measured[0].bad
    if len(bad) > allowed:
        raise TooManyBad(
            f"evaluation images: expected at most {allowed} unreadable ones (--max-bad-images "
            f"{max_bad}), found {len(bad)} of {len(images.paths)}: {_first(bad)}; repair or remove "
            "them, or raise --max-bad-images",
            bad,
        )
    return _evaluation(adapted, measured, absolute(data), images.left_out.to_json(), controls)


def _comparisons(before: SessionAccuracy, controls: Controls) -> tuple[Comparison, ...]:
    """Compare the descriptions with every control that was drawn, and then with the names."""
    right = before.ranks["cls"] == 0
    drawn = {
        control: row_names(control, len(draws))
        for control, draws in controls.items()
        if len(draws) > 1
    }
    against = {**drawn, "names": ["names"]} if drawn else {}
    return tuple(
        compared(control, right, np.stack([before.ranks[row] == 0 for row in rows]))
        for control, rows in against.items()
    )


def _spread(images: LabelledImages, limit: int | None) -> LabelledImages:
    """Return `limit` of the images, evenly spread so that every class keeps its share."""
    total = len(images.paths)
    if limit is None or limit >= total:
        return images
    chosen = [i * total // limit for i in range(limit)]
    paths = tuple(images.paths[i] for i in chosen)
    return LabelledImages(paths, images.labels[chosen], images.left_out)


def accuracy(session: Session, images: LabelledImages, *, batch_size: int = 64) -> dict[str, float]:
    """Measure a session and return the numbers a training log keeps for each epoch.

    Returns:
        "top1", "top5" and "mean_per_class" of the fused logits, "cls_top1" and "fg_top1".

    Raises:
        DataError: no image can be read.
    """
    rows = accuracy_of_session(session, images, batch_size=batch_size).rows
    branches = {"cls_top1": rows["cls"].top1, "fg_top1": rows["fg"].top1}
    return {**rows["fused"].summary(), **branches}


def accuracy_of_session(
    session: Session,
    images: LabelledImages,
    *,
    batch_size: int = 64,
    progress: Callable[[int, int], None] = _ignore,
) -> SessionAccuracy:
    """Measure any open session, such as one built from a model that is being trained.

    Raises:
        DataError: no image can be read, or a label is outside the session's classes.
    """
    return _measure([_Probe(session)], images, session.preprocess, batch_size, progress)[0]


@dataclass
class _Probe:
    """A session being measured, and what it has said so far: ranks and best classes, no logits."""

    session: Session
    heads: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    """Further class matrices (C, E) for [CLS]."""
    ranks: dict[str, list[NDArray[np.int64]]] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)
    masks: MaskTally = field(default_factory=MaskTally)
    true_masks: TrueMasks | None = None
    uncalibrated: list[NDArray[np.float64]] = field(default_factory=list)
    """Probability of the best class at temperature 1."""
    folder: Folder | None = None
    """For a joint reading."""

    def add(
        self, images: NDArray[np.uint8], labels: NDArray[np.int64], paths: Sequence[Path]
    ) -> None:
        """Let the session classify a batch and tally it."""
        found = self.session.predict(images)
        if self.folder is not None:
            self.folder.add(found.cls, found.logits)
        by_token = self._logits(found)
        for name, logits in by_token.items():
            self.ranks.setdefault(name, []).append(ranks_of(logits, labels))
        best = found.logits.argmax(axis=1).tolist()
        known = self.session.calibration
        sure = probabilities(found.logits, known).max(axis=1)
        unknown = is_unknown(sure, known).tolist()
        self.answers += map(Answer, paths, labels.tolist(), best, sure.tolist(), unknown)
        self.uncalibrated.append(softmax(found.logits).max(axis=1))
        cls_best, fg_best = (by_token[token].argmax(axis=1) for token in ("cls", "fg"))
        self.masks.add(found.mask, found.complete, cls_best == fg_best)
        if self.true_masks is not None:
            self._compare(found.mask, paths, self.true_masks)

    def _compare(self, mask: NDArray[np.bool_], paths: Sequence[Path], true: TrueMasks) -> None:
        """Hold masks against those true ones that are known."""
        for row, path in zip(mask, paths, strict=True):
            truth = true.read(path, self.session.preprocess, len(row))
            if truth is not None:
                self.masks.compare(row[None], truth[None])

    def result(
        self, labels: NDArray[np.int64], bad: tuple[BadFile, ...], remarks: tuple[str, ...]
    ) -> SessionAccuracy:
        """Return the scores over all batches; `labels` are those of the readable images."""
        classes = len(self.session.classes)
        ranks = {name: np.concatenate(parts) for name, parts in self.ranks.items()}
        if self.folder is not None:
            ranks[JOINT] = self.folder.read().ranks(labels)
        rows = {name: scores_of_ranks(placed, labels, classes) for name, placed in ranks.items()}
        known = self.session.calibration
        reliability = Reliability.of(
            np.array([answer.probability for answer in self.answers]),
            np.concatenate(self.uncalibrated),
            ranks["fused"] == 0,
            known.temperature if known else None,
            known.unknown_below if known else 0.0,
        )
        return SessionAccuracy(
            rows, self.masks.result(), bad, tuple(self.answers), remarks, ranks, reliability
        )

    def _logits(self, found: Prediction) -> dict[str, NDArray[np.float32]]:
        classifier = self.session.classifier()
        further = {name: found.cls @ head.T for name, head in self.heads.items()}
        return {
            "fused": found.logits,
            "cls": found.cls @ classifier.T,
            "fg": found.fg @ classifier.T,
            **further,
        }


def _measure(
    probes: Sequence[_Probe],
    images: LabelledImages,
    preprocess: Preprocess,
    batch_size: int,
    progress: Callable[[int, int], None],
) -> list[SessionAccuracy]:
    """Show every image to every probe, decoding each file once."""
    bad: list[BadFile] = []
    seen: list[NDArray[np.int64]] = []

    def skip(index: int, error: BadImage) -> None:
        bad.append(BadFile(error.path, error.reason))

    remarks = Remarks()
    for batch in read_batches(images.paths, preprocess, batch_size, on_bad=skip, remarks=remarks):
        labels = images.labels[batch.indices]
        paths = [images.paths[index] for index in batch.indices.tolist()]
        for probe in probes:
            probe.add(batch.images, labels, paths)
        seen.append(labels)
        done = int(batch.indices[-1]) + 1
        if done < len(images.paths):
            progress(done, len(images.paths))
    if not seen:
        raise TooManyBad(
            f"evaluation images: expected readable ones, found none: {_first(bad)}; repair them "
            "or give others",
            bad,
        )
    progress(len(images.paths), len(images.paths))
    told = tuple(remarks.lines())
    return [probe.result(np.concatenate(seen), tuple(bad), told) for probe in probes]


def _first(bad: Sequence[BadFile]) -> str:
    """Name the first bad files."""
    shown = "; ".join(f"{printable(file.path)} ({file.reason})" for file in bad[:_SHOWN])
    return f"{shown}; and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else shown


def _evaluation(
    session: Session,
    measured: Sequence[SessionAccuracy],
    data: str,
    left_out: Mapping[str, Any],
    controls: Controls | None,
) -> Evaluation:
    adapted = measured[0]
    tokens = ("fused", "cls", "fg", *(token for token in adapted.rows if token == JOINT))
    rows = [Row("adapted", token, "adapted", adapted.rows[token]) for token in tokens]
    for before in measured[1:]:
        rows += [Row("zero-shot", "cls", texts, before.rows[texts]) for texts in ("names", "prior")]
        rows += [
            Row("zero-shot", token, "descriptions", before.rows[token])
            for token in ("cls", "fg", "fused")
        ]
        for control, draws in (controls or {}).items():
            drawn = [before.rows[name] for name in row_names(control, len(draws))]
            rows.append(Row("zero-shot", "cls", control, mean_scores(drawn)))
    comparisons = _comparisons(measured[-1], controls or {}) if len(measured) > 1 else ()
    return Evaluation(
        classes=session.classes,
        images=adapted.rows["fused"].images,
        bad=adapted.bad,
        rows=tuple(rows),
        masks=adapted.masks,
        answers=adapted.answers,
        data=data,
        warnings=(
            *_warnings(session, adapted),
            *(each.sentence() for each in comparisons if not each.beaten),
        ),
        left_out=left_out,
        controls=comparisons,
        reliability=adapted.reliability,
        prior=session.prior,
    )


def _warnings(session: Session, adapted: SessionAccuracy) -> tuple[str, ...]:
    masks = adapted.masks
    found = [each for each in (saliency_warning(masks.complete), masks.warning()) if each]
    found += adapted.remarks
    if adapted.bad:
        found.append(f"images left out because they could not be read: {len(adapted.bad)}")
    if session.unadapted:
        # Their images count like all others, in rows that say "adapted".
        names = ", ".join(printable(name) for name in sorted(session.unadapted)[:_SHOWN])
        found.append(
            f"classes added after adaptation, recognised zero-shot: {len(session.unadapted)}, "
            f"such as {names}"
        )
    return tuple(found)
