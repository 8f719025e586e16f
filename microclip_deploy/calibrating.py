"""Find a calibration: from what a model says about a folder, with or without a person's answers."""

from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from microclip_deploy.calibration import Calibration, floored, rounded, softmax
from microclip_deploy.errors import DataError, VerificationError

MOST_LOGITS = 25_000_000
"""That are looked at: 100 MB. A folder of more is represented by photos spread evenly over it."""

MOST_PHOTOS = 50_000
"""Likewise: 200 MB for both tokens of a ViT-B."""

UNKNOWN_SHARE = 0.05
"""Without labels: at most so many of the folder's own photos are called unknown."""

_LEAST_PROBABILITY = 1e-6
"""Of an answer that was given; one surprise must not decide the temperature."""

LEAST_ANSWERS = 20
"""Fewer decide neither a temperature nor a threshold."""

_LOG_TEMPERATURES = (np.log(1 / 16), np.log(16))
"""Where it is looked for: CLIP's own is between 0.5 and 5. A folder on which all is right, or all
looks the same, has none, and gets the end of this range."""

_STEPS = 30
"""Of a bisection or a golden section: 1e-6 of the range, and 2e-8 of it."""

_DECIMALS = 1e4
"""The threshold is rounded down, so that a backend's own rounding does not decide a photo."""


def sample(images: int, classes: int) -> NDArray[np.int64]:
    """Return the positions of the photos that are looked at: all, or so many spread evenly."""
    wanted = max(1, min(images, MOST_LOGITS // classes, MOST_PHOTOS))
    return np.arange(wanted) * images // wanted


def share_with_doubt(right: NDArray[np.bool_]) -> float:
    """Return the share of (N,) that is right, by Laplace's rule: never 0 or 1, of few near 1/2."""
    return float((right.sum() + 1) / (len(right) + 2))


def calibrate(logits: NDArray[np.float32], expected_accuracy: float) -> Calibration:
    """Find a calibration without labels.

    The temperature is that at which the mean probability of the best class is the accuracy that is
    expected; the threshold leaves `UNKNOWN_SHARE` of these photos unknown.

    Args:
        logits: float (N, C), scale 100, without a prior: what the model says about a folder.
        expected_accuracy: an estimate, 0 to 1.

    Raises:
        DataError: no photo, or one class.
        VerificationError: a logit is NaN or infinite.
    """
    _require_logits(logits)

    def too_sharp(log_temperature: float) -> bool:
        best = softmax(logits, np.exp(log_temperature)).max(axis=1)
        return bool(best.mean() > expected_accuracy)

    low, high = _LOG_TEMPERATURES
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if too_sharp(middle) else (low, middle)
    temperature = float(np.exp((low + high) / 2))
    surest = softmax(logits, temperature).max(axis=1)
    threshold = float(np.quantile(surest, UNKNOWN_SHARE, method="lower"))
    return _calibration(logits, temperature, threshold, "folder", len(logits))


def calibrate_with_answers(
    logits: NDArray[np.float32],
    told: NDArray[np.float32],
    right: NDArray[np.bool_],
    shown: NDArray[np.bool_],
    weights: NDArray[np.float64] | None = None,
) -> Calibration:
    """Find a calibration with a person's answers to some photos.

    The temperature has the least negative log-likelihood of being right or wrong, with the best
    class's probability as that of being right; photos of no class do not count for it. That needs
    no more than whether the model was right. The threshold is Youden's point: it keeps the most
    right answers less the share of wrong ones, and needs no target that a user would choose.

    Args:
        logits: float (N, C), as for `calibrate`: the mean prediction is of these.
        told: float (M, C), likewise, of the photos that were answered.
        right: (M,) whether the best class is what the photo shows.
        shown: (M,) whether it shows any of the classes.
        weights: (M,) how many photos each stands for; None for one each.

    Raises:
        DataError: fewer than `LEAST_ANSWERS`, or as `calibrate`.
        VerificationError: as `calibrate`.
    """
    _require_logits(logits)
    _require_logits(told)
    if shown.sum() < LEAST_ANSWERS:
        raise DataError(
            f"answers: expected at least {LEAST_ANSWERS} about photos of the classes, found "
            f"{shown.sum()}; answer more photos, or calibrate without answers"
        )
    given = np.ones(len(told)) if weights is None else weights

    def loss(log_temperature: float) -> float:
        sure = softmax(told[shown], np.exp(log_temperature)).max(axis=1)
        shares = np.where(right[shown], sure, 1 - sure)
        return float(given[shown] @ -np.log(np.maximum(shares, _LEAST_PROBABILITY)))

    temperature = float(np.exp(_least(loss, *_LOG_TEMPERATURES)))
    surest = softmax(told, temperature).max(axis=1)
    threshold = _youden(surest, right, given)
    return _calibration(logits, temperature, threshold, "clicks", len(told))


def _least(function: Callable[[float], float], low: float, high: float) -> float:
    """Return where a function with one valley is least, by the golden section."""
    section = (np.sqrt(5) - 1) / 2
    left, right = high - section * (high - low), low + section * (high - low)
    at_left, at_right = function(left), function(right)
    for _ in range(_STEPS):
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - section * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + section * (high - low)
            at_right = function(right)
    return (low + high) / 2


def _youden(
    surest: NDArray[np.float64], right: NDArray[np.bool_], weights: NDArray[np.float64]
) -> float:
    """Return the threshold that keeps the most of the right ones, and the least of the others.

    0 where there is only one kind.
    """
    if right.all() or not right.any():
        return 0.0
    order = np.argsort(surest, kind="stable")
    ordered, mass = surest[order], weights[order]
    lost_right = np.cumsum(mass * right[order]) / (mass @ right[order])
    lost_wrong = np.cumsum(mass * ~right[order]) / (mass @ ~right[order])
    gain = lost_wrong - lost_right
    gain[:-1][ordered[1:] == ordered[:-1]] = -1  # equal ones are lost together
    best = int(gain[:-1].argmax()) if len(gain) > 1 else 0
    return float(ordered[best + 1]) if gain[best] > 0 else 0.0


def _calibration(
    logits: NDArray[np.float32],
    temperature: float,
    threshold: float,
    source: Literal["folder", "clicks"],
    images: int,
) -> Calibration:
    mean = floored(softmax(logits, temperature).mean(axis=0))
    return Calibration(
        temperature=float(f"{temperature:.6g}"),
        mean_prediction=rounded(mean / mean.sum()),
        unknown_below=float(np.floor(threshold * _DECIMALS) / _DECIMALS),
        source=source,
        images=images,
    )


def _require_logits(logits: NDArray[np.float32]) -> None:
    if logits.ndim != 2 or len(logits) < 1 or logits.shape[1] < 2:
        raise DataError(
            f"calibration: expected logits of photos for at least 2 classes, found {logits.shape}; "
            "give photos that can be read"
        )
    if not np.isfinite(logits).all():
        raise VerificationError(
            "calibration: expected finite logits, found NaN or infinity; the model is damaged or "
            "its precision too low; adapt again, or calibrate on --device cpu"
        )
