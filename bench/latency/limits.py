"""What a user will not put up with: limits on latency, and on being slower than before."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from microclip_deploy.bench.latency.report import IMAGE_TO_LOGITS, Case, Report, Row
from microclip_deploy.bench.table_text import columns, digits, flat, in_ms, percentile_name
from microclip_deploy.errors import ThresholdError, UsageError

_COMPARED = (50.0, 99.0)
_OF_THE_MOMENT = ("load", "gpu.clock_sm", "gpu.clock_memory", "gpu.power", "gpu.temperature_c")
"""What two runs on one machine never share."""


def require_slo(report: Report, limits: Mapping[float, float]) -> None:
    """Insist on limits for every row of the target from pixels to logits.

    Args:
        report: of this run.
        limits: percentile -> seconds a request.

    Raises:
        ThresholdError: names every miss.
    """
    missed = [
        f"{row}: {percentile_name(q)} expected at most {in_ms(limit)} ms, found {_time(row, q)}"
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
    baseline: Report,
    target: str,
    precision: str,
    subject: str,
    cases: Collection[tuple[int, int]],
) -> None:
    """Insist that an earlier report holds what a run will be compared with.

    Args:
        baseline: the earlier report.
        target: what the run measures.
        precision: of the target.
        subject: the contestant that is the target.
        cases: (batch, requests at once) that the run measures.

    Raises:
        UsageError: another target or precision, or no row of the target in such a case.
    """
    if (target, precision) != (baseline.target, baseline.precision):
        raise UsageError(
            f"--baseline: expected a report of {target} in {precision}, found one of "
            f"{baseline.target} in {baseline.precision}; give a report of the same target"
        )
    earlier = {(c.batch, c.concurrency) for c in _rows_of(baseline, subject)}
    if earlier.isdisjoint(cases):
        raise UsageError(
            f"--baseline: expected '{subject}' at {_listed(cases)}, found "
            f"{_listed(earlier) or 'none of it'}; measure the baseline with the same options"
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
    now, before = (_rows_of(each, report.subject) for each in (report, baseline))
    cases = {(case.batch, case.concurrency) for case in now}
    require_comparable(baseline, report.target, report.precision, report.subject, cases)
    allowed = {case: (1 + most) * row.median_s for case, row in before.items()}
    slower = [
        f"{row}: expected at most {in_ms(allowed[case])} ms, found {_time(row, 50)}"
        for case, row in now.items()
        if case in allowed and not row.median_s <= allowed[case]
    ]
    if slower:
        raise ThresholdError(
            f"--max-regression: {'; '.join(slower)}; compare the environments with `bench "
            "compare`, or take a new baseline"
        )
    alone = [row for case, row in (now | before).items() if (case in now) != (case in before)]
    return [f"not compared: {row.scope}, batch {row.batch}, {row.contestant}" for row in alone]


def comparison(before: Report, after: Report) -> str:
    """Return how two reports differ: machines first, then ratios, then times in milliseconds."""
    differences = list(_differences(_origin(before), _origin(after)))
    names = [percentile_name(q) for q in _COMPARED]
    times = [f"{name} {when}" for name in names for when in ("before", "after")]
    rows = [["scope", "contestant", "batch", "at once", *(f"{n} ratio" for n in names), *times]]
    new = {(row.contestant, row.case): row for row in after.rows}
    both = ((row, new.get((row.contestant, row.case))) for row in before.rows)
    rows += [_compared(old, later) for old, later in both if later is not None]
    same = "the same target, options, machine and packages"
    head = ["what differs:", *differences] if differences else [same]
    table = columns(rows) if len(rows) > 1 else ["no row stands in both"]
    return "\n".join([*head, "", *table])


def _origin(report: Report) -> dict[str, Any]:
    """Return what makes two reports comparable."""
    facts = {
        "target": report.target,
        "artifact": report.artifact_sha256,
        "precision": report.precision,
        "device": report.device,
    }
    return {**facts, **report.options, **report.environment}


def _differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    one, other = flat(before), flat(after)
    for name in {**one, **other}:
        if name not in _OF_THE_MOMENT and one.get(name) != other.get(name):
            yield f"  {name}: {one.get(name, '–')} -> {other.get(name, '–')}"


def _compared(before: Row, after: Row) -> list[str]:
    pairs = [(before.percentile(q), after.percentile(q)) for q in _COMPARED]
    ratios = [f"{digits(new / old)}x" for old, new in pairs]
    times = [in_ms(value) for pair in pairs for value in pair]
    unsure = "" if before.stable and after.stable else " unstable"
    what = (before.scope, f"{before.contestant}{unsure}", before.batch, before.concurrency)
    return [*map(str, what), *ratios, *times]


def _rows_of(report: Report, contestant: str) -> dict[Case, Row]:
    return {row.case: row for row in report.rows if row.contestant == contestant}


def _time(row: Row, q: float) -> str:
    unsure = "" if row.stable else " (its windows disagree; a longer --duration may settle it)"
    return f"{in_ms(row.percentile(q))} ms{unsure}"


def _listed(cases: Iterable[tuple[int, int]]) -> str:
    return ", ".join(f"batch {batch} with {clients} at once" for batch, clients in sorted(cases))
