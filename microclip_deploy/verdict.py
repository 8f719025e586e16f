"""Whether adaptation helped, told without labels, and how sure that is.

    nn(i)      the five photos nearest to photo i in the adapted [CLS] space
    a_i(l)     share of nn(i) that the labelling l gives the class of photo i
    k(l)       (mean_i a_i(l) - sum_c q_c^2) / (1 - sum_c q_c^2), q the class frequencies of l:
               the neighbours' agreement, corrected for chance (Cohen's kappa of neighbours)

A labelling that is right gives neighbours the same class; one that pushes photos into classes
where they do not belong tears neighbours apart. So the accuracy that adaptation gained follows
k(adapted) - k(zero-shot), both on the same neighbours. The line and the width of the interval are
fitted on runs of the letters benchmark whose truth is known, harmful ones among them;
docs/verdict.md says how often the verdict was right there. On other photos it is a conjecture,
which `audit` settles.
"""

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from microclip_deploy.errors import DataError
from microclip_deploy.joint.neighbours import nearest

Decision = Literal["adapted", "keep zero-shot", "cannot tell"]

NEIGHBOURS = 5
OFFSET, SLOPE = 0.8, 0.94
"""Accuracy gained, in points, over the change of the neighbours' agreement, in points."""
MARGIN = 6.5
"""Half width of the 90 % interval, points."""
HARMED = -0.1
"""Change of a class's neighbours' agreement from which on its row is rolled back."""
COLLAPSED = 0.5
"""Effective number of classes after adaptation over that before, below which it collapsed."""
DRIFTED = 0.5
"""Share of photos with another class than before, above which little of zero-shot is left."""
FEWEST = 100
"""Photos below which nothing is predicted."""

_MOST = 20_000
"""Photos that are looked at; evenly spread over a larger folder."""
_SHOWN = 5
_EXAMPLES = 4


class Move(NamedTuple):
    """Photos that adaptation gave another class."""

    before: int
    after: int
    photos: int
    examples: tuple[int, ...]
    """Positions of some of them."""


class Verdict(BaseModel):
    """What is believed of an adaptation, as it stands in the manifest."""

    model_config = ConfigDict(frozen=True)

    decision: Decision
    change: float | None
    """Predicted accuracy on the folder less zero-shot's, points; None where nothing can be said."""
    low: float | None = None
    high: float | None = None
    """90 % interval, points."""
    reasons: tuple[str, ...] = ()
    photos: int
    agreement: tuple[float, float]
    """k(zero-shot) and k(adapted)."""
    changed: float
    """Share of photos whose class changed."""
    moves: tuple[Move, ...] = ()
    """The most frequent changes of class."""
    effective: tuple[float, float]
    """Effective number of classes before and after: exp of the entropy of the labels."""
    missing: int
    """Classes that no photo is given."""
    harmed: tuple[int, ...] = ()
    """Classes whose photos agree less with their neighbours than before."""

    def sentence(self) -> str:
        """Tell it in one sentence."""
        if self.change is None or self.low is None or self.high is None:
            return f"{self.decision}: {'; '.join(self.reasons)}"
        return (
            f"{self.decision}: predicted accuracy change {self.change:+.1f} points "
            f"(90 %: {self.low:+.1f} to {self.high:+.1f}); {'; '.join(self.reasons)}"
        )


def verdict(
    vectors: NDArray[np.float32],
    before: NDArray[np.int64],
    after: NDArray[np.int64],
    classes: int,
    positions: NDArray[np.int64] | None = None,
) -> Verdict:
    """Judge an adaptation by the photos it was made with.

    Args:
        vectors: (N, E), unit rows: adapted [CLS] of the photos.
        before: (N,), zero-shot's class of each.
        after: (N,), the adapted model's.
        classes: C.
        positions: (N,), of the photos in their folder, for examples; None if these are all.

    Raises:
        DataError: vectors that are no finite numbers.
    """
    if not np.isfinite(vectors).all():
        raise DataError("verdict: expected finite embeddings, found NaN or Inf; adapt again")
    chosen = np.linspace(0, len(vectors) - 1, min(len(vectors), _MOST)).astype(np.int64)
    before, after = before[chosen], after[chosen]
    places = chosen if positions is None else positions[chosen]
    near, _ = nearest(vectors[chosen], min(NEIGHBOURS, len(chosen) - 1))
    agreed = [_agreement(labels, near) for labels in (before, after)]
    kappas = (
        _beyond_chance(float(agreed[0].mean()), before),
        _beyond_chance(float(agreed[1].mean()), after),
    )
    shares = [np.bincount(labels) / len(labels) for labels in (before, after)]
    effective = (effective_classes(shares[0]), effective_classes(shares[1]))
    changed = float((before != after).mean())
    change = OFFSET + 100 * SLOPE * (kappas[1] - kappas[0])
    alarms = _alarms(effective, changed, len(chosen))
    # A collapse makes neighbours agree: the line does not hold for it, and it needs no line.
    collapsed = effective[1] < COLLAPSED * effective[0]
    enough = len(chosen) >= FEWEST and effective[0] > 1
    known = enough and not collapsed
    low, high = change - MARGIN, change + MARGIN
    decision: Decision = "keep zero-shot" if enough else "cannot tell"
    if known:
        decision = _decision(low, high)
    return Verdict(
        decision=decision,
        change=change if known else None,
        low=low if known else None,
        high=high if known else None,
        reasons=(*([_because(kappas)] if known else []), *alarms),
        photos=len(chosen),
        agreement=kappas,
        changed=changed,
        moves=_moves(before, after, places),
        effective=effective,
        missing=classes - len(np.unique(after)),
        harmed=harmed(agreed[0], agreed[1], before, after, classes),
    )


def harmed(
    agreed_before: NDArray[np.float64],
    agreed_after: NDArray[np.float64],
    before: NDArray[np.int64],
    after: NDArray[np.int64],
    classes: int,
) -> tuple[int, ...]:
    """Return the classes whose photos agree less with their neighbours than before, by `HARMED`.

    A class's photos are those that either labelling gives it.
    """
    lost = agreed_after - agreed_before
    sums, counts = np.zeros(classes), np.zeros(classes)
    moved = before != after
    for labels, some in ((before, slice(None)), (after[moved], moved)):
        np.add.at(sums, labels, lost[some])
        np.add.at(counts, labels, 1)
    return tuple(np.flatnonzero(sums < HARMED * counts).tolist())


def _agreement(labels: NDArray[np.int64], near: NDArray[np.int32]) -> NDArray[np.float64]:
    """Return a_i, float64 (N,): the share of a photo's neighbours with its class."""
    same = labels[near] == labels[:, None]
    return np.asarray(same.sum(axis=1) / max(1, near.shape[1]))


def _beyond_chance(agreement: float, labels: NDArray[np.int64]) -> float:
    """Return the agreement corrected for chance; 0 where all photos have one class."""
    chance = float(((np.bincount(labels) / len(labels)) ** 2).sum())
    return (agreement - chance) / (1 - chance) if chance < 1 else 0.0


def effective_classes(frequencies: NDArray[np.float64]) -> float:
    """Return how many equally frequent classes have the same entropy: 1 to C."""
    present = frequencies[frequencies > 0]
    return float(np.exp(-(present * np.log(present)).sum()))


def _decision(low: float, high: float) -> Decision:
    return "adapted" if low > 0 else "keep zero-shot" if high < 0 else "cannot tell"


def _because(agreement: tuple[float, float]) -> str:
    before, after = agreement
    how = "no more" if after == before else "more" if after > before else "less"
    return (
        f"photos that look alike agree {how} on their class than with zero-shot "
        f"({before:.2f} -> {after:.2f})"
    )


def _alarms(effective: tuple[float, float], changed: float, photos: int) -> list[str]:
    """Return what is suspicious whatever the agreement."""
    before, after = effective
    found = []
    if after < COLLAPSED * before:
        found.append(
            f"the predictions collapsed: as uneven as {after:.0f} equally frequent classes, where "
            f"zero-shot has {before:.0f}"
        )
    if changed > DRIFTED:
        found.append(f"{changed:.0%} of the photos have another class than with zero-shot")
    if photos < FEWEST:
        found.append(f"{photos} photos are too few for a prediction (at least {FEWEST})")
    if before == 1:
        found.append("zero-shot gives all photos one class")
    return found


def _moves(
    before: NDArray[np.int64], after: NDArray[np.int64], positions: NDArray[np.int64]
) -> tuple[Move, ...]:
    """Return the most frequent changes of class; `positions` are those of the photos, (N,)."""
    moved = before != after
    pairs = np.stack([before[moved], after[moved]], axis=1)
    found, counts = np.unique(pairs, axis=0, return_counts=True)
    most = np.argsort(-counts, kind="stable")[:_SHOWN]
    moves = []
    for (old, new), count in zip(found[most].tolist(), counts[most].tolist(), strict=True):
        these = positions[(before == old) & (after == new)][:_EXAMPLES]
        moves.append(Move(old, new, count, tuple(these.tolist())))
    return tuple(moves)
