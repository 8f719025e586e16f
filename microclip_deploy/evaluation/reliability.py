"""How far the probability of the best class can be trusted, on labelled images and on others."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from microclip_deploy.evaluation.chart import HALF, Drawing, drawing, reliability_chart

BINS = 15
"""Of equal width, for the expected calibration error."""

_COVERAGES = tuple(step / 10 for step in range(10, 0, -1))


class Bin(NamedTuple):
    """The images whose best class has a probability in one interval."""

    images: int
    probability: float
    """Mean."""
    accuracy: float


class Covered(NamedTuple):
    """The surest images."""

    share: float
    """Of all."""
    accuracy: float
    """Of these."""


@dataclass(frozen=True)
class Strangers:
    """Photos of what is in no class, beside the labelled ones."""

    images: int
    auroc: float
    """Probability that a labelled image is surer than one of these; ties count half."""
    flagged: float
    """Share of these that is called unknown."""

    @classmethod
    def of(
        cls,
        surest: NDArray[np.float64],
        known: NDArray[np.float64],
        unknown_below: float,
    ) -> Self:
        """Compare the best class's probability on these (U,) and on labelled images (M,)."""
        ordered = np.sort(surest)
        below = np.searchsorted(ordered, known, "left") + np.searchsorted(ordered, known, "right")
        auroc = float(below.mean() / (2 * len(ordered)))
        return cls(len(surest), auroc, float((surest < unknown_below).mean()))


@dataclass(frozen=True)
class Reliability:
    """Of the fused logits, as they are shipped; every number is a fraction."""

    temperature: float | None
    """None without a calibration: read at 1."""
    unknown_below: float
    ece: float
    """Expected calibration error: mean |accuracy - probability| over `BINS`, by their images."""
    ece_uncalibrated: float
    """The same at temperature 1."""
    answered: float
    """Share of the images that is not unknown."""
    accuracy_answered: float | None
    """None where all are unknown."""
    coverage: tuple[Covered, ...]
    bins: tuple[Bin, ...]
    """Those that hold images."""
    unknown: Strangers | None = None

    @classmethod
    def of(
        cls,
        surest: NDArray[np.float64],
        uncalibrated: NDArray[np.float64],
        right: NDArray[np.bool_],
        temperature: float | None,
        unknown_below: float,
    ) -> Self:
        """Measure M images.

        Args:
            surest: (M,) probability of the best class.
            uncalibrated: (M,) the same at temperature 1.
            right: (M,) the best class is the image's.
            temperature: of the calibration, or None.
            unknown_below: its threshold; 0 without one.
        """
        bins = _bins(surest, right)
        answered = surest >= unknown_below
        best_first = np.cumsum(right[np.argsort(-surest, kind="stable")])
        counts = [max(1, round(share * len(right))) for share in _COVERAGES]
        return cls(
            temperature,
            unknown_below,
            _error(bins),
            _error(_bins(uncalibrated, right)),
            float(answered.mean()),
            float(right[answered].mean()) if answered.any() else None,
            tuple(
                Covered(share, float(best_first[count - 1] / count))
                for share, count in zip(_COVERAGES, counts, strict=True)
            ),
            bins,
        )

    def lines(self) -> list[str]:
        """Return what a terminal shows."""
        half = next(each.accuracy for each in self.coverage if each.share == 0.5)
        before = f"{100 * self.ece_uncalibrated:.1f} % at temperature 1"
        told = (
            f"calibration error {100 * self.ece:.1f} % at temperature {self.temperature:.2f}, "
            f"{before}"
            if self.temperature is not None
            else f"calibration error {before}: the model has no calibration"
        )
        found = [f"{told}; of the surest half {100 * half:.1f} % are right"]
        if self.unknown_below > 0:
            right = self.accuracy_answered
            of_these = "" if right is None else f", {100 * right:.1f} % of them right"
            found.append(
                f"unknown below {self.unknown_below:g}: {100 * self.answered:.1f} % answered"
                f"{of_these}"
            )
        if self.unknown is not None:
            found.append(
                f"{self.unknown.images} images of no class: {100 * self.unknown.flagged:.1f} % "
                f"called unknown, {100 * (1 - self.answered):.1f} % of the others; AUROC "
                f"{self.unknown.auroc:.3f}"
            )
        return found

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        lists = {
            name: [each._asdict() for each in getattr(self, name)] for name in ("coverage", "bins")
        }
        return asdict(self) | lists


def chart_of(evaluation: Mapping[str, Any] | None) -> Drawing | None:
    """Return the accuracy by probability of a stored evaluation; None of an earlier version's."""
    found = evaluation.get("reliability") if evaluation else None
    if not found:
        return None
    return drawing(partial(reliability_chart, [Bin(**each) for each in found["bins"]]), HALF)


def _bins(surest: NDArray[np.float64], right: NDArray[np.bool_]) -> tuple[Bin, ...]:
    place = np.minimum((surest * BINS).astype(int), BINS - 1)
    return tuple(
        Bin(int(inside.sum()), float(surest[inside].mean()), float(right[inside].mean()))
        for inside in (place == number for number in range(BINS))
        if inside.any()
    )


def _error(bins: Sequence[Bin]) -> float:
    total = sum(each.images for each in bins)
    return sum(each.images * abs(each.accuracy - each.probability) for each in bins) / total
