"""What the answers so far say, as numbers; `wording` says it in sentences.

A photo that was skipped tells nothing and is taken to be like the others of its kind; how much that
could matter is told. Estimates are of the photos of the plan, not of any others.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from microclip_deploy.audit.clicks import Click, handled
from microclip_deploy.audit.estimate import LOOKS, Interval, Tally, accuracy, difference, verdict
from microclip_deploy.audit.plan import SKIP, Plan
from microclip_deploy.audit.sample import CYCLE, drawn

CLASS_ANSWERS = 10
"""Answers from which on the accuracy of a predicted class is told."""

Verdict = Literal["a", "b", "same", "open"]


class _Rows(NamedTuple):
    """The drawn photos up to the last answer."""

    differ: NDArray[np.bool_]
    """(n,)."""
    classes: NDArray[np.int64]
    """(n, 2): what A and B say."""
    right: NDArray[np.bool_]
    """(n, 2)."""
    answered: NDArray[np.bool_]
    """(n,): neither skipped nor left empty."""


class ClassResult(NamedTuple):
    """How often a model is right where it says a class."""

    model: int
    """0 for A, 1 for B."""
    name: str
    answered: int
    photos: int
    found: Interval


@dataclass(frozen=True)
class Result:
    """The state of an audit."""

    plan: Plan
    clicks: Sequence[Click]

    @property
    def handled(self) -> int:
        """Return how far the answers reach."""
        return handled(self.clicks)

    @property
    def complete(self) -> bool:
        """Say whether there is nothing left to ask."""
        return self.handled == len(self.plan.drawn)

    @property
    def skipped(self) -> int:
        """Return how many photos have no answer before the last that has one."""
        return int((~self._rows.answered).sum())

    @cached_property
    def _rows(self) -> _Rows:
        taken = self.plan.drawn[: self.handled]
        said = [click.answer for click in self.clicks[: len(taken)]]
        classes = np.array([row.classes for row in taken], np.int64).reshape(-1, 2)
        names = np.array(self.plan.classes, object)[classes]
        return _Rows(
            np.array([row.differ for row in taken], bool),
            classes,
            names == np.array(said, object)[:, None],
            np.array([text not in ("", SKIP) for text in said], bool),
        )

    def tallies(
        self, first: int | None = None, said: tuple[int, int] | None = None
    ) -> tuple[Tally, Tally]:
        """Return what is known where the models differ, and where they agree.

        Args:
            first: count so many drawn photos only.
            said: (model, class): count the photos only of which that model says so.
        """
        rows = self._rows
        totals = self.plan.differ, self.plan.agree
        counts = rows.answered & (np.arange(len(rows.answered)) < (first or self.handled))
        if said is not None:
            model, row = said
            counts = counts & (rows.classes[:, model] == row)
            totals = self.plan.predicted[row][model]
        kinds = counts & rows.differ, counts & ~rows.differ
        differ, agree = (
            Tally(total, int(kind.sum()), *(int(n) for n in rows.right[kind].sum(axis=0)))
            for total, kind in zip(totals, kinds, strict=True)
        )
        return differ, agree

    def accuracies(self) -> tuple[Interval, Interval] | None:
        """Return those of A and B; None until there is an answer of each kind."""
        a, b = (_accuracy(self.tallies(), model) for model in (0, 1))
        return (a, b) if a is not None and b is not None else None

    def difference(self) -> Interval | None:
        """Return the accuracy of A minus that of B; None until there is an answer that tells."""
        differ, agree = self.tallies()
        return difference(differ, agree.photos) if differ.answered or not differ.photos else None

    @property
    def verdict(self) -> Verdict:
        """Say which model is better.

        What leaves no doubt, because too few photos are left, is told at once; the rest at planned
        looks only, which keeps the error below 5 % whenever one stops.
        """
        differ, agree = self.tallies()
        lead, rest = differ.a_right - differ.b_right, differ.photos - differ.answered
        if abs(lead) > rest:
            return "a" if lead > 0 else "b"
        if rest == 0:
            return "same"
        for clicks in self.plan.planned:
            planned = drawn(clicks, differ.photos, agree.photos)[0]
            for look in looks(clicks):
                said = verdict(self.tallies(look)[0], planned) if look <= self.handled else 0
                if said:
                    return "a" if said > 0 else "b"
        return "open"

    @property
    def may_stop(self) -> bool:
        """Say whether further answers would decide nothing."""
        return self.complete or self.verdict != "open"

    def skip_bounds(self) -> tuple[float, float] | None:
        """Return the difference if B, and if A, were right on all photos that were skipped."""
        skipped = int((self._rows.differ & ~self._rows.answered).sum())
        (photos, answered, a, b), agree = self.tallies()
        if not skipped:
            return None
        all_b = Tally(photos, answered + skipped, a, b + skipped)
        all_a = Tally(photos, answered + skipped, a + skipped, b)
        low, high = (difference(each, agree.photos).estimate for each in (all_b, all_a))
        return float(low), float(high)

    def classes(self) -> list[ClassResult]:
        """Return the accuracy of the predicted classes that were asked about often enough."""
        told = []
        for model, row in self._asked():
            tallies = self.tallies(said=(model, row))
            answered, photos = (sum(part) for part in list(zip(*tallies, strict=True))[1::-1])
            found = _accuracy(tallies, model)
            if found is not None and answered >= min(CLASS_ANSWERS, photos):
                told.append(ClassResult(model, self.plan.classes[row], answered, photos, found))
        return told

    def _asked(self) -> list[tuple[int, int]]:
        """Return (model, class) of all drawn photos."""
        return sorted({(m, row.classes[m]) for row in self.plan.drawn for m in (0, 1)})

    def class_clicks(self) -> int | None:
        """Return about how many more clicks tell another class; None where all are told."""
        told = {(each.model, each.name) for each in self.classes()}
        totals, asked = (self.plan.differ, self.plan.agree), set(self._asked())
        shares = [CYCLE.count(kind) / len(CYCLE) for kind in (True, False)]
        needed = []
        for row, counts in self.plan.predicted.items():
            for model in (0, 1):
                parts = zip(shares, counts[model], totals, strict=True)
                rate = sum(share * n / total for share, n, total in parts if total)
                if rate and (model, self.plan.classes[row]) not in told:
                    known = self.tallies(said=(model, row)) if (model, row) in asked else ()
                    missing = CLASS_ANSWERS - sum(tally.answered for tally in known)
                    needed.append(max(1, math.ceil(missing / rate)))
        left = self.plan.photos - self.handled
        return min((clicks for clicks in needed if clicks <= left), default=None)

    def to_json(self) -> dict[str, Any]:
        """Return the numbers and every answer for other programs."""
        plan = self.plan
        a, b = self.accuracies() or (None, None)
        asked = drawn(self.handled, plan.differ, plan.agree)
        totals = (plan.differ, plan.agree)
        kinds = dict(zip(("differ", "agree"), zip(self.tallies(), asked, strict=True), strict=True))
        return {
            "models": dict(zip("ab", plan.models, strict=True)),
            "photos": plan.photos,
            "seed": plan.seed,
            "planned": list(plan.planned),
            "handled": self.handled,
            "skipped": self.skipped,
            "kinds": {name: tally._asdict() | {"asked": n} for name, (tally, n) in kinds.items()},
            "a": _plain(a),
            "b": _plain(b),
            "difference": _plain(self.difference()),
            "difference_if_skipped": self.skip_bounds(),
            "verdict": self.verdict,
            "may_stop": self.may_stop,
            "classes": [
                each._asdict() | {"model": "ab"[each.model], "found": _plain(each.found)}
                for each in self.classes()
            ],
            "clicks": [
                {
                    "path": row.path,
                    "differ": row.differ,
                    "inclusion": asked[not row.differ] / totals[not row.differ],
                    "a": plan.classes[row.classes[0]],
                    "b": plan.classes[row.classes[1]],
                    "confidence": list(row.confidence),
                    "answer": click.answer or SKIP,
                    "when": click.when,
                }
                for row, click in zip(plan.drawn[: self.handled], self.clicks, strict=False)
            ],
        }


def looks(clicks: int) -> list[int]:
    """Return after how many answers of a plan a verdict may be given."""
    return [max(1, round(share * clicks)) for share in LOOKS]


def _accuracy(tallies: tuple[Tally, Tally], model: int) -> Interval | None:
    """Return the accuracy of a model; None where a kind of photos has no answer yet."""
    if any(tally.photos and not tally.answered for tally in tallies):
        return None
    return accuracy(*((tally[2 + model], tally.answered, tally.photos) for tally in tallies))


def _plain(found: Interval | None) -> dict[str, float] | None:
    return None if found is None else {name: float(part) for name, part in found._asdict().items()}
