"""The result of an audit in words, as a table, and in `audit.json`."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from microclip_deploy import artifact
from microclip_deploy.audit.estimate import Interval
from microclip_deploy.audit.result import Result, looks
from microclip_deploy.errors import printable

if TYPE_CHECKING:
    from rich.table import Table

AUDIT = "audit.json"
FORMAT = "microclip.audit/1"
_NARROWER = 1.5
"""An interval must be so much narrower than a difference that 4 of 5 audits are to find:
(2.1 + 0.84) / 1.96."""


def document(result: Result) -> dict[str, Any]:
    """Return what `audit.json` holds."""
    return {"format": FORMAT, "sentences": sentences(result), **result.to_json()}


def write_result(directory: Path, result: Result) -> None:
    """Write `audit.json` whole."""
    artifact.write_json(directory / AUDIT, document(result))


def sentences(result: Result) -> list[str]:
    """Say what is known."""
    plan, (a, b) = result.plan, result.plan.titles
    accuracies, found = result.accuracies(), result.difference()
    told = []
    if accuracies is not None and found is not None:
        told.append(
            f"{a} is right on {_percent(accuracies[0])} of these {plan.photos:,} photos, {b} on "
            f"{_percent(accuracies[1])}; difference {100 * found.estimate:+.1f} points "
            f"({_range(found, '+')})."
        )
    told.append(f"{_verdict(result, found)} {_stop(result)}")
    if result.verdict in ("a", "b") and not result.complete:
        told.append(
            "Which one is better may be trusted whenever you stop. By how much tends to be "
            "overstated by those who stop early."
        )
    if len(plan.planned) > 1:
        told.append(
            f"More clicks were asked for than the {plan.planned[0]} of the beginning: a verdict "
            "given after these errs in up to 8 % of such audits, not in 5 %."
        )
    return [*told, *_skipped(result)]


def _verdict(result: Result, found: Interval | None) -> str:
    a, b = result.plan.titles
    if not result.plan.differ:
        return f"{a} and {b} say the same of every photo."
    known = {
        "a": f"{a} is better.",
        "b": f"{b} is better.",
        "same": f"{a} and {b} are equally good.",
    }
    if result.verdict != "open":
        return known[result.verdict]
    if not result.complete or found is None:
        return "Which one is better cannot be told yet."
    most = 100 * max(abs(found.low), abs(found.high))
    return (
        f"Which one is better cannot be told; they are at most {most:.1f} points apart. "
        f"{_more(result, found)}"
    )


def _more(result: Result, found: Interval) -> str:
    """Say how many clicks would tell a difference as large as it seems."""
    asked, width = len(result.plan.drawn), (found.high - found.low) / 2
    needed = asked * (_NARROWER * width / found.estimate) ** 2 if found.estimate else math.inf
    if needed > 10 * asked:
        return "The difference seems too small for more clicks to be worthwhile."
    needed = min(result.plan.photos, max(10 * math.ceil(needed / 10), asked + 10))
    return f"If the difference is as large as it seems, --clicks {needed} would tell."


def _stop(result: Result) -> str:
    asked = len(result.plan.drawn)
    if result.complete:
        return f"All {asked} photos are answered."
    if result.may_stop:
        return "You may stop."
    following = [n for clicks in result.plan.planned for n in looks(clicks) if n > result.handled]
    return (
        f"{result.handled} of {asked} photos are answered; the next look is after "
        f"{min([*following, asked])}."
    )


def _skipped(result: Result) -> list[str]:
    if not result.skipped:
        return []
    told = [
        f"{result.skipped} of {result.handled} photos were skipped and are taken to be like the "
        "others."
    ]
    if bounds := result.skip_bounds():
        low, high = (f"{100 * bound:+.1f}" for bound in bounds)
        a, b = result.plan.titles
        told.append(
            f"Were {b} right on all of them, the difference would be {low}; were {a}, {high}."
        )
    return told


def tables(result: Result) -> "list[Table]":
    """Return what a terminal shows: the models, then predicted classes with enough answers."""
    from rich.table import Table

    differ, agree = result.tallies()
    a, b = result.accuracies() or (None, None)
    shown = Table("", "estimate", "95 % interval", "answers")
    both = differ.answered + agree.answered
    for title, found in zip(result.plan.titles, (a, b), strict=True):
        shown.add_row(printable(title), *_cells(found, "", " %"), str(both))
    shown.add_row("difference", *_cells(result.difference(), "+", " points"), str(differ.answered))
    classes = Table("predicted class", "by", "right", "95 % interval", "answers", "photos")
    for each in result.classes():
        names = printable(each.name), printable(result.plan.titles[each.model])
        counts = str(each.answered), str(each.photos)
        classes.add_row(*names, *_cells(each.found, "", " %"), *counts)
    return [shown, classes] if classes.row_count else [shown]


def _cells(found: Interval | None, sign: str, unit: str) -> tuple[str, str]:
    if found is None:
        return "-", "-"
    return f"{100 * found.estimate:{sign}.1f}{unit}", _range(found, sign)


def _percent(found: Interval) -> str:
    return f"{100 * found.estimate:.1f} % ({_range(found)})"


def _range(found: Interval, sign: str = "") -> str:
    return f"{100 * found.low:{sign}.1f} to {100 * found.high:{sign}.1f}"
