"""A latency report as one HTML file that loads nothing and runs nothing, and as files on disk."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from microclip_deploy.artifact import make_directory, write_bytes, write_json
from microclip_deploy.bench.latency.advice import advice
from microclip_deploy.bench.latency.chart import Bar, Point, bar_chart, curve_chart, legend
from microclip_deploy.bench.latency.report import Report, Row, place, stage_totals
from microclip_deploy.bench.latency.tables import (
    ADVICE,
    as_json,
    card_rows,
    markdown,
    ratio_rows,
    remarks,
    stage_rows,
    time_rows,
)
from microclip_deploy.bench.table_text import in_ms, number_columns, percent, slug
from microclip_deploy.errors import printable

_STYLE = """
:root {
  --page: #f6f7f9; --card: #fff; --ink: #17202b; --soft: #5b6776; --faint: #e3e7ec;
  --c1: #2563b8; --c2: #c2681a; --c3: #2c8a63; --c4: #7b3fa0; --c5: #8a6d1d; --c6: #b0305c;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12161c; --card: #1a2029; --ink: #e4e9f0; --soft: #97a3b3; --faint: #2b3440;
    --c1: #6ea8f2; --c2: #e49a56; --c3: #5fbf95; --c4: #c08be0; --c5: #d3b45c; --c6: #f08bb0;
  }
}
@media print {
  :root {
    --page: #fff; --card: #fff; --ink: #000; --soft: #444; --faint: #ccc;
    --c1: #2563b8; --c2: #c2681a; --c3: #2c8a63; --c4: #7b3fa0; --c5: #8a6d1d; --c6: #b0305c;
  }
  body { font-size: 11px; }
  main { max-width: none; padding: 0; }
  svg, tr { break-inside: avoid; }
  h2 { break-after: avoid; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
main { max-width: 1120px; margin: 0 auto; padding: 40px 28px 64px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 40px 0 8px; }
h3 { font-size: 14px; margin: 16px 0 4px; }
p { margin: 0 0 8px; color: var(--soft); max-width: 75ch; overflow-wrap: anywhere; }
.card {
  background: var(--card); border: 1px solid var(--faint); border-radius: 10px;
  padding: 14px 18px; overflow-x: auto;
}
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: 13px; }
th, td { padding: 5px 14px 5px 0; border-bottom: 1px solid var(--faint); vertical-align: top; }
tr:last-child > td { border-bottom: 0; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
ul { margin: 0; padding-left: 20px; }
svg { display: block; width: 100%; max-width: 820px; height: auto; }
svg text { fill: var(--soft); font-size: 12px; font-family: inherit; }
svg path { fill: none; stroke: currentColor; stroke-width: 2; }
svg circle { fill: currentColor; }
svg path.grid { stroke: var(--faint); stroke-width: 1; }
svg .column { fill: var(--c1); }
svg path.mark { stroke: var(--c2); stroke-width: 2.5; }
svg .dashed path { stroke-dasharray: 6 4; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; list-style: none; padding: 0; }
.legend li::before { content: ""; display: inline-block; width: 18px; margin-right: 6px;
  vertical-align: 4px; border-top: 3px solid; }
.legend .dashed::before { border-top-style: dashed; }
.s1 { color: var(--c1); } .s2 { color: var(--c2); } .s3 { color: var(--c3); }
.s4 { color: var(--c4); } .s5 { color: var(--c5); } .s6 { color: var(--c6); }
"""


def page(report: Report) -> str:
    """Return the report as one HTML document without scripts, links or other files."""
    title = _safe(f"{report.target}: latency on {report.device}, {report.precision}")
    others = {name: lines for name, lines in remarks(report).items() if name != ADVICE}
    timed = [f"{name}: {what}" for name, what in report.timed.items()]
    reference = f"Ratio of the medians to {report.subject}; the median itself in brackets."
    sections = [
        _section("What limits it", _items(advice(report))),
        _section("Times as long", _lead(reference), _table(ratio_rows(report))),
        _section("Milliseconds a request", _table(time_rows(report))),
        _section("Latency against throughput", *_throughput(report)),
        _section("Batch sweep", *_sweep(report)),
        _section("Stages", *_stages(report)),
        *(_section(name.capitalize(), _items(lines)) for name, lines in others.items()),
        _section("What was timed", _items(timed)),
        _section("Machine", _table(card_rows(report))),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{title}</h1>\n{_lead(_origin(report))}\n{''.join(sections)}</main>\n</body>\n</html>\n"
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


def _origin(report: Report) -> str:
    return (
        f"{report.date}, measured in {report.seconds:.0f} s; the target is the contestant "
        f"{report.subject}; artifact sha256 {report.artifact_sha256}"
    )


def _throughput(report: Report) -> list[str]:
    """Return median latency over images a second: a line goes from few images at once to many."""
    rows = sorted(report.rows, key=lambda row: (row.batch * row.concurrency, row.batch))
    lines = _lines(report, [row for row in rows if row.images_per_s > 0])
    points = {
        name: [Point(row.images_per_s, 1e3 * row.percentile(50), _told(row)) for row in line]
        for name, line in lines.items()
    }
    chart = curve_chart(points, x_label="images a second", y_label="p50, milliseconds a request")
    lead = "A line goes from few images at once, a batch times requests, to many."
    return [_lead(lead), chart, legend(list(lines))] if chart else []


def _sweep(report: Report) -> list[str]:
    """Return median latency over the batch, of the least number of requests at once."""
    least = min((row.concurrency for row in report.rows), default=1)
    rows = sorted(report.rows, key=lambda row: row.batch)
    lines = _lines(report, [row for row in rows if row.concurrency == least])
    points = {
        name: [Point(row.batch, 1e3 * row.percentile(50), _told(row)) for row in line]
        for name, line in lines.items()
    }
    batches = sorted({row.batch for line in lines.values() for row in line})
    chart = curve_chart(
        points,
        x_label="images a batch",
        y_label="p50, milliseconds a request",
        x_ticks=batches,
    )
    return [chart, legend(list(lines))] if chart else []


def _lines(report: Report, rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return contestant, with its scope -> rows; in the report's order, for colours to agree."""
    names = {_line_name(row): list[Row]() for row in report.rows}
    for row in rows:
        names[_line_name(row)].append(row)
    return names


def _line_name(row: Row) -> str:
    return f"{row.contestant}, {row.scope}"


def _told(row: Row) -> str:
    return f"{place(row)}: {row.images_per_s:.3g} images/s, p50 {in_ms(row.percentile(50))} ms"


def _stages(report: Report) -> list[str]:
    """Return one bar chart a batch, then the table."""
    parts = []
    for batch, total in stage_totals(report).items():
        bars = []
        for row in (row for row in report.stages if row.batch == batch):
            share = f", {percent(row.median() / total)}" if total else ""
            floor = "" if row.floor_s is None else f", floor {in_ms(row.floor_s)} ms"
            label = f"{in_ms(row.median())} ms{share}{floor}"
            bars.append(Bar(row.stage, row.median(), row.floor_s, label))
        parts += [f"<h3>Batch {batch}</h3>", bar_chart(bars, f"stages at batch {batch}")]
    table = stage_rows(report)
    lead = (
        "Medians, milliseconds a batch. A line across a bar is the floor: the time its arithmetic "
        "or its memory traffic needs at the ceilings of the same run."
    )
    return [_lead(lead), *parts, _table(table)] if table else []


def _section(title: str, *parts: str) -> str:
    if not any(parts):
        return ""
    return f'<h2>{_safe(title)}</h2>\n<div class="card">{"".join(parts)}</div>\n'


def _table(rows: Sequence[Sequence[str]]) -> str:
    styles = [' class="number"' if numeric else "" for numeric in number_columns(rows)]
    lines = [
        "".join(
            f"<{tag}{style}>{_safe(cell)}</{tag}>" for cell, style in zip(row, styles, strict=True)
        )
        for tag, row in zip(["th"] + ["td"] * (len(rows) - 1), rows, strict=True)
    ]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _items(texts: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{_safe(text)}</li>' for text in texts)}</ul>" if texts else ""


def _lead(text: str) -> str:
    return f"<p>{_safe(text)}</p>"


def _safe(text: str) -> str:
    return escape(printable(text))
