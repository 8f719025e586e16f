"""Top-1, top-5 and mean-per-class accuracy of logits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from microclip_deploy.errors import DataError, VerificationError

TOP = 5
"""The k of top-k accuracy."""


@dataclass(frozen=True)
class Scores:
    """How well one set of logits names the images; classes without images count nowhere."""

    images: int
    top1: float
    top5: float
    mean_per_class: float
    """Mean over classes of their top-1 accuracy: every class weighs the same."""
    class_images: tuple[int, ...]
    """(C,) images of each class."""
    class_correct: tuple[int, ...]
    """(C,) of these, how many are named right."""

    def summary(self) -> dict[str, float]:
        """Return the three accuracies by name."""
        return {"top1": self.top1, "top5": self.top5, "mean_per_class": self.mean_per_class}


def score(logits: NDArray[np.floating[Any]], labels: NDArray[np.integer[Any]]) -> Scores:
    """Score logits against labels; of equal logits the one of the lower class index ranks first.

    Args:
        logits: float (M, C), M >= 1.
        labels: integer (M,), 0 <= label < C.

    Raises:
        DataError: other shapes, or a label that is no class.
        VerificationError: a logit is NaN or infinite.
    """
    return scores_of_ranks(ranks_of(logits, labels), labels, logits.shape[1])


def mean_scores(scores: Sequence[Scores]) -> Scores:
    """Return the mean of what several sets of logits score on the same images; counts rounded."""
    summaries = [each.summary() for each in scores]
    means = {name: float(np.mean([each[name] for each in summaries])) for name in summaries[0]}
    correct = np.mean([each.class_correct for each in scores], axis=0).round().astype(int)
    first = scores[0]
    return Scores(
        first.images,
        **means,
        class_images=first.class_images,
        class_correct=tuple(correct.tolist()),
    )


def ranks_of(
    logits: NDArray[np.floating[Any]], labels: NDArray[np.integer[Any]]
) -> NDArray[np.int64]:
    """Return (M,): how many classes are placed before the right one."""
    fits = logits.ndim == 2 and labels.shape == logits.shape[:1] and len(labels) > 0
    if not fits or labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise DataError(
            f"score: expected logits (M, C) with M labels below C, found logits {logits.shape} and "
            f"labels {labels.shape}; use the session's own class list"
        )
    if not np.isfinite(logits).all():
        raise VerificationError(
            "score: expected finite logits, found NaN or infinity; the model is damaged or its "
            "precision too low; adapt again, or evaluate on --device cpu"
        )
    right = np.take_along_axis(logits, labels[:, None], axis=1)
    before = np.arange(logits.shape[1]) < labels[:, None]
    placed: NDArray[np.int64] = ((logits > right) | ((logits == right) & before)).sum(axis=1)
    return placed


def scores_of_ranks(
    ranks: NDArray[np.int64], labels: NDArray[np.integer[Any]], classes: int
) -> Scores:
    """Return the scores of images whose right classes (M,) were placed at `ranks` (M,)."""
    images = np.bincount(labels, minlength=classes)
    correct = np.bincount(labels[ranks == 0], minlength=classes)
    present = images > 0
    return Scores(
        images=len(ranks),
        top1=float((ranks == 0).mean()),
        top5=float((ranks < TOP).mean()),
        mean_per_class=float((correct[present] / images[present]).mean()),
        class_images=tuple(images.tolist()),
        class_correct=tuple(correct.tolist()),
    )
