"""What a user will not put up with: limits on latency, and on being slower than before."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from microclip_deploy.bench.latency.report import (
    IMAGE_TO_LOGITS,
    Report,
    Row,
    place,
)
from microclip_deploy.bench.table_text import columns, digits, flat, in_ms, percentile_name
from microclip_deploy.errors import ThresholdError, UsageError

_COMPARED = (50.0, 99.0)
_OF_THE_MOMENT = ("load", "gpu.clock_sm", "gpu.clock_memory", "gpu.power", "gpu.temperature_c")
"""What two runs on one machine never share."""


class _Key(NamedTuple):
    """What makes rows of two reports the same measurement."""

    contestant: str
    scope: str
    batch: int
    concurrency: int


def require_slo(report: Report, limits: Mapping[float, float]) -> None:
    """Insist on limits for every row of the target from pixels to logits.

    Args:
        report: of this run.
        limits: percentile -> seconds a request.

    Raises:
        ThresholdError: names every miss.
    """
    missed = [
        f"{place(row)}: {percentile_name(q)} expected at most {in_ms(limit)} ms, found "
        f"{_found(row, q)}"
        for row in report.rows
        if row.contestant == report.subject and row.scope == IMAGE_TO_LOGITS
        for q, limit in limits.items()
        if not row.percentile(q) <= limit
    ]
    if missed:
        raise ThresholdError(
            f"--slo: {'; '.join(missed)}; try smaller batches, --dtype int8 on a CPU, fewer "
            "requests at once, or a smaller model"
        )


def require_comparable(
    report: Report, baseline: Report, cases: Collection[tuple[int, int]]
) -> None:
    """Insist that an earlier report holds what this one will be compared with.

    Args:
        report: of this run; its rows may still be missing.
        baseline: of an earlier one.
        cases: (batch, requests at once) that this run measures.

    Raises:
        UsageError: another target or precision, or no row of the target in such a case.
    """
    kinds = [(each.target, each.precision) for each in (report, baseline)]
    if kinds[0] != kinds[1]:
        raise UsageError(
            f"--baseline: expected a report of {' in '.join(kinds[0])}, found one of "
            f"{' in '.join(kinds[1])}; give a report of the same target"
        )
    earlier = {(key.batch, key.concurrency) for key in _rows(baseline, report.subject)}
    if earlier.isdisjoint(cases):
        raise UsageError(
            f"--baseline: expected '{report.subject}' at {_cases(cases)}, found "
            f"{_cases(earlier) or 'none of it'}; measure the baseline with the same options"
        )


def require_no_regression(report: Report, baseline: Report, most: float) -> list[str]:
    """Insist that the target is not slower than it was.

    Args:
        report: of this run.
        baseline: of an earlier one.
        most: share by which a median may be longer.

    Returns:
        Notes on what stands in only one of both.

    Raises:
        ThresholdError: names every row that is slower.
        UsageError: they cannot be compared.
    """
    now, before = (_rows(each, report.subject) for each in (report, baseline))
    require_comparable(report, baseline, {(key.batch, key.concurrency) for key in now})
    slower = [
        f"{place(now[key])}: expected at most {in_ms((1 + most) * before[key].percentile(50))} ms, "
        f"found {_found(now[key], 50)}"
        for key in now
        if key in before and not now[key].percentile(50) <= (1 + most) * before[key].percentile(50)
    ]
    if slower:
        raise ThresholdError(
            f"--max-regression: {'; '.join(slower)}; compare the environments with `bench "
            "compare`, or take a new baseline"
        )
    alone = [key for key in {**now, **before} if (key in now) != (key in before)]
    return [f"not compared: {key.scope}, batch {key.batch}, {key.contestant}" for key in alone]


def comparison(before: Report, after: Report) -> str:
    """Return how two reports differ: machines first, then ratios, then times in milliseconds."""
    differences = list(_differences(_origin(before), _origin(after)))
    rows = [["scope", "contestant", "batch", "at once", *_headings()]]
    old, new = _rows(before), _rows(after)
    rows += [_compared(key, old[key], new[key]) for key in old if key in new]
    told = [
        "the same target, options, machine and packages" if not differences else "what differs:"
    ]
    told += [f"  {name}: {one} -> {other}" for name, one, other in differences]
    table = columns(rows) if len(rows) > 1 else ["no row stands in both"]
    return "\n".join([*told, "", *table])


def _origin(report: Report) -> dict[str, Any]:
    """Return what makes two reports comparable."""
    facts = {
        "target": report.target,
        "artifact": report.artifact_sha256,
        "precision": report.precision,
        "device": report.device,
    }
    return {**facts, **report.options, **report.environment}


def _headings() -> list[str]:
    names = [percentile_name(q) for q in _COMPARED]
    times = [f"{name} {when}" for name in names for when in ("before", "after")]
    return [f"{name} ratio" for name in names] + times


def _compared(key: _Key, before: Row, after: Row) -> list[str]:
    pairs = [(before.percentile(q), after.percentile(q)) for q in _COMPARED]
    ratios = [f"{digits(new / old)}x" for old, new in pairs]
    times = [in_ms(value) for pair in pairs for value in pair]
    unsure = "" if before.stable and after.stable else " unstable"
    what = (key.scope, f"{key.contestant}{unsure}", str(key.batch), str(key.concurrency))
    return [*what, *ratios, *times]


def _rows(report: Report, contestant: str | None = None) -> dict[_Key, Row]:
    return {
        _Key(row.contestant, row.scope, row.batch, row.concurrency): row
        for row in report.rows
        if contestant in (None, row.contestant)
    }


def _found(row: Row, q: float) -> str:
    unsure = "" if row.stable else " (its windows disagree; a longer --duration may settle it)"
    return f"{in_ms(row.percentile(q))} ms{unsure}"


def _cases(cases: Collection[tuple[int, int]]) -> str:
    told = [f"batch {batch} with {clients} at once" for batch, clients in sorted(cases)]
    return ", ".join(told)


def _differences(
    before: Mapping[str, Any], after: Mapping[str, Any]
) -> Iterator[tuple[str, str, str]]:
    one, other = flat(before), flat(after)
    for name in {**one, **other}:
        if name not in _OF_THE_MOMENT and one.get(name) != other.get(name):
            yield name, one.get(name, "–"), other.get(name, "–")
