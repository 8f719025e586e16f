"""How logits are read: a temperature, the folder's own class frequencies, and when to say unknown.

A run and its exports carry one `Calibration`. It is applied in NumPy to what a backend answers, so
that every backend reads its logits alike. docs/calibration.md holds the formulas.
"""

from collections.abc import Sequence
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

FOLDER, UNIFORM = "folder", "uniform"
"""Distributions of the classes that can be expected by name."""

LEAST_SHARE = 1e-3
"""Of the even share 1/C: no class counts as rarer. A class that the model never predicted may still
be there, and log 0 would rule it out for good; this bounds the correction to T * log 1000."""

_SUM_TOLERANCE = 1e-2
"""Of stored frequencies, which are rounded."""


class Calibration(BaseModel):
    """What a run or an export says about its logits, under the key `calibration` of its manifest.

    Artifacts without one are read at temperature 1 and never say unknown.
    """

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    temperature: float = Field(gt=0)
    """Probabilities are softmax(logits / temperature), of logits at scale 100."""
    mean_prediction: tuple[float, ...] = Field(min_length=2)
    """(C,): mean of these probabilities over a folder, in the order of the classes."""
    unknown_below: float = Field(ge=0, le=1)
    """A photo whose best class is less probable is unknown; 0 is never."""
    source: Literal["folder", "clicks"]
    """"folder": found without labels. "clicks": with the answers of a person."""
    images: int = Field(ge=1)
    """Photos that the temperature and the threshold were found on."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        total = sum(self.mean_prediction)
        if min(self.mean_prediction) < 0 or abs(total - 1) > _SUM_TOLERANCE:
            raise ValueError(f"mean_prediction: expected shares that add up to 1, found {total:g}")
        return self

    def bias(self, target: NDArray[np.floating[Any]] | None = None) -> NDArray[np.float32]:
        """Return what is added to the logits (C,) where other class frequencies are expected.

        T (log target - log mean_prediction), both at least `LEAST_SHARE` of the even share, with
        the mean over the classes subtracted: a shift of all logits changes no probability, and so
        their mean stays what the model says.

        Args:
            target: float (C,), shares that add up to 1; None for uniform.

        Source: logit adjustment, arXiv 2007.07314; Saerens, Latinne and Decaestecker 2002.
        """
        log_ratio = -np.log(floored(self.mean_prediction))
        if target is not None:
            log_ratio += np.log(floored(target))
        shift: NDArray[np.float64] = self.temperature * (log_ratio - log_ratio.mean())
        return shift.astype(np.float32)

    def with_classes_added(self, count: int) -> Self:
        """Return it for a model with further classes behind its own.

        The new ones get the geometric mean of the others' frequencies: nothing is known of them,
        and `bias` towards uniform then leaves their logits as they are.
        """
        known = floored(self.mean_prediction)
        return self._with(np.append(known, np.full(count, np.exp(np.log(known).mean()))))

    def of_classes(self, rows: Sequence[int]) -> Self:
        """Return it for a model with some of the classes only, in another order perhaps."""
        return self._with(floored(self.mean_prediction)[list(rows)])

    def _with(self, shares: NDArray[np.float64]) -> Self:
        return self.model_copy(update={"mean_prediction": rounded(shares / shares.sum())})


def require_fit(calibration: Calibration | None, classes: int) -> None:
    """Make sure that a calibration belongs to a model of so many classes.

    Raises:
        ValueError: it does not, as pydantic takes it.
    """
    if calibration is not None and len(calibration.mean_prediction) != classes:
        raise ValueError(
            f"calibration: expected the frequencies of {classes} classes, found "
            f"{len(calibration.mean_prediction)}"
        )


def floored(shares: Sequence[float] | NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Return class frequencies (C,), none below `LEAST_SHARE` of the even share."""
    return np.maximum(np.asarray(shares, np.float64), LEAST_SHARE / len(shares))


def rounded(shares: NDArray[np.float64]) -> tuple[float, ...]:
    """Return frequencies with six digits, as a manifest holds them."""
    return tuple(float(f"{share:.6g}") for share in shares)


def probabilities(
    logits: NDArray[np.float32], calibration: Calibration | None
) -> NDArray[np.float64]:
    """Return the probabilities (B, C) of float (B, C) logits; of none, at temperature 1."""
    return softmax(logits, calibration.temperature if calibration else 1.0)


def is_unknown(probability: Any, calibration: Calibration | None) -> Any:
    """Say of the best class's probability, one or an array, whether it is too low for an answer."""
    return probability < (calibration.unknown_below if calibration else 0.0)


def softmax(logits: NDArray[np.floating[Any]], temperature: float = 1.0) -> NDArray[np.float64]:
    """Return the softmax (B, C) of float (B, C) logits in float64; rows sum to 1."""
    weights = logits.astype(np.float64)
    weights -= weights.max(axis=1, keepdims=True)
    weights /= temperature
    np.exp(weights, out=weights)
    weights /= weights.sum(axis=1, keepdims=True)
    return weights
