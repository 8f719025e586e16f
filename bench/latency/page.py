"""A latency report as one HTML file that loads nothing and runs nothing, and as files on disk."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from microclip_deploy.artifact import make_directory, write_bytes, write_json
from microclip_deploy.bench.latency.report import Report, Row
from microclip_deploy.bench.latency.tables import (
    ADVICE,
    as_json,
    card_rows,
    markdown,
    remarks,
    tables,
)
from microclip_deploy.bench.table_text import in_ms, number_columns, percent, slug
from microclip_deploy.evaluation.chart import Drawing, bar_chart, drawing, log_chart
from microclip_deploy.evaluation.page import render


def page(report: Report) -> str:
    """Return the report as one HTML document without scripts, links or other files."""
    timed = [f"{name}: {what}" for name, what in report.timed.items()]
    lists = {**remarks(report), "what was timed": timed}
    return render(
        "bench/latency/page.html.j2",
        report=report,
        advice=lists.pop(ADVICE, []),
        tables=tables(report),
        machine=card_rows(report),
        charts=[*_curves(report), *_stages(report)],
        remarks=lists,
        number_columns=number_columns,
    )


def write_report(report: Report, directory: Path) -> Path:
    """Write DATE-DEVICE-latency-TARGET-PRECISION.json, .md and .html; return the JSON's path.

    Raises:
        EnvironmentProblem: the disk is full or the directory cannot be written.
    """
    make_directory(directory)
    parts = (report.date, report.device, "latency", report.target, report.precision)
    path = directory / f"{'-'.join(map(slug, parts))}.json"
    write_json(path, as_json(report))
    write_bytes(path.with_suffix(".md"), markdown(report).encode())
    write_bytes(path.with_suffix(".html"), page(report).encode())
    return path


def _curves(report: Report) -> Iterator[tuple[str, str, Drawing]]:
    """Yield title, lead and chart of median latencies."""
    few_to_many = sorted(report.rows, key=lambda row: (row.batch * row.concurrency, row.batch))
    yield (
        "latency against throughput",
        "A line goes from few images at once, a batch times requests, to many.",
        _chart(report, few_to_many, "images a second", lambda row: row.images_per_s),
    )
    least = min(row.concurrency for row in report.rows)
    rows = sorted((r for r in report.rows if r.concurrency == least), key=lambda row: row.batch)
    lead = f"Requests at once: {least}."
    yield "batch sweep", lead, _chart(report, rows, "images a batch", lambda row: row.batch)


def _chart(report: Report, rows: Iterable[Row], label: str, x: Callable[[Row], float]) -> Drawing:
    """Draw a line a contestant and scope; contestants have the colours of the report's order."""
    groups: dict[str, dict[str, list[tuple[float, float]]]] = {
        row.contestant: {} for row in report.rows
    }
    for row in rows:
        if x(row) > 0:  # both axes are logarithmic
            line = groups[row.contestant].setdefault(row.scope, [])
            line.append((x(row), 1e3 * row.median_s))
    return drawing(partial(log_chart, groups, x_label=label, y_label="p50, milliseconds a request"))


def _stages(report: Report) -> Iterator[tuple[str, str, Drawing]]:
    """Yield title, lead and chart of the stages of each batch."""
    lead = (
        "Medians, milliseconds a batch. A line across a bar is the floor: the time its arithmetic "
        "or its memory traffic needs at the ceilings of the same run."
    )
    for batch, total in report.stage_totals().items():
        bars = {}
        for row in (row for row in report.stages if row.batch == batch):
            share = f", {percent(row.median_s / total)}" if total else ""
            floor = "" if row.floor_s is None else f", floor {in_ms(row.floor_s)} ms"
            text = f"{in_ms(row.median_s)} ms{share}{floor}"
            bars[row.stage] = (row.median_s, row.floor_s, text)
        yield f"stages, batch {batch}", lead, drawing(partial(bar_chart, bars))
