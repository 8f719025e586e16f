"""What `bench TARGET` measured, as tables and remarks, in columns and in Markdown.

Where something costs time, its ratio stands before its milliseconds.
"""

from dataclasses import asdict
from statistics import median
from typing import Any

from microclip_deploy.bench.latency.advice import advice
from microclip_deploy.bench.latency.report import COPY, PRODUCT, Report
from microclip_deploy.bench.table_text import (
    columns,
    digits,
    flat,
    in_ms,
    inline,
    markdown_table,
    percent,
    percentile_name,
)
from microclip_deploy.errors import printable

ADVICE = "what limits it"
_STAGE_PERCENTILES = (50.0, 95.0, 99.0)
_RAW = ("samples_s", "host_s", "device_s")


def as_json(report: Report, samples: bool = True) -> dict[str, Any]:
    """Return plain values, the numbers derived from the samples among them.

    Args:
        report: what was measured.
        samples: keep the raw samples; without them it cannot be read back.
    """
    values = asdict(report)
    for stored, row in zip(values["rows"], report.rows, strict=True):
        times = {percentile_name(q): row.percentile(q) for q in report.percentiles}
        stored |= {"percentiles_s": times, "mean_s": row.mean_s, "ratio": report.ratio(row)}
    for stored, stage in zip(values["stages"], report.stages, strict=True):
        stored |= {"median_s": stage.median_s, "of_floor": stage.of_floor}
    if not samples:
        for stored in (*values["rows"], *values["stages"]):
            for name in _RAW:
                stored.pop(name, None)
    return {**values, "advice": advice(report)}


def tables(report: Report) -> dict[str, list[list[str]]]:
    """Return title -> table, headers first, of every table that has rows."""
    titled = {
        f"times as long as {report.subject}, p50 in brackets": _ratio_rows(report),
        "milliseconds a request": _time_rows(report),
        "milliseconds a batch, by stage of the export": _stage_rows(report),
    }
    return {title: rows for title, rows in titled.items() if rows}


def _ratio_rows(report: Report) -> list[list[str]]:
    batches = sorted({row.batch for row in report.rows})
    lines: dict[tuple[str, str, int], dict[int, str]] = {}
    for row in report.rows:
        ratio = report.ratio(row)
        times = "–" if ratio is None else f"{digits(ratio)}x"
        line = lines.setdefault((row.scope, row.contestant, row.concurrency), {})
        line[row.batch] = f"{times} ({in_ms(row.median_s)} ms){'' if row.stable else ' unstable'}"
    return [
        ["scope", "contestant", "at once", *(f"batch {batch}" for batch in batches)],
        *([*map(str, what), *(line.get(b, "–") for b in batches)] for what, line in lines.items()),
    ]


def _time_rows(report: Report) -> list[list[str]]:
    on_device = any(row.device_s for row in report.rows)
    head = ["scope", "contestant", "batch", "at once", *map(percentile_name, report.percentiles)]
    head += ["mean", *(["host p50", "device p50"] if on_device else [])]
    rows = [[*head, "requests", "images/s", "spread", "use"]]
    for row in report.rows:
        cells = [row.scope, row.contestant, str(row.batch), str(row.concurrency)]
        cells += [in_ms(row.percentile(q)) for q in report.percentiles]
        cells.append(in_ms(row.mean_s))
        if on_device:
            parts = (row.host_s, row.device_s)
            cells += [_ms(None if part is None else median(part)) for part in parts]
        cells += [str(len(row.samples_s)), digits(row.images_per_s), percent(row.spread)]
        rows.append([*cells, "yes" if row.stable else "no: unstable"])
    return rows


def _stage_rows(report: Report) -> list[list[str]]:
    if not report.stages:
        return []
    times = [*map(percentile_name, _STAGE_PERCENTILES)]
    rows = [["stage", "batch", "share", *times, "floor", "of floor", "GFLOP", "MB"]]
    totals = report.stage_totals()
    for row in report.stages:
        total = totals[row.batch]
        rows.append(
            [
                row.stage,
                str(row.batch),
                percent(row.median_s / total) if total else "–",
                *(in_ms(row.percentile(q)) for q in _STAGE_PERCENTILES),
                _ms(row.floor_s),
                "–" if row.of_floor is None else percent(row.of_floor),
                "–" if row.flop is None else digits(row.flop / 1e9),
                "–" if row.bytes is None else digits(row.bytes / 1e6),
            ]
        )
    return rows


def _ms(seconds: float | None) -> str:
    return "–" if seconds is None else in_ms(seconds)


def remarks(report: Report) -> dict[str, list[str]]:
    """Return title -> lines of all that stands below the tables; only what there is."""
    units = {
        COPY: "GB/s copied in memory, read plus written; what stays in a cache is faster",
        PRODUCT: "GFLOP/s in a large product",
    }
    rates = [(units.get(key, key), rate) for key, rate in (report.ceilings or {}).items()]
    titled = {
        "cold start": [f"{step}: {in_ms(s)} ms" for step, s in (report.cold_start or {}).items()],
        "the model's stages, added, of the whole request": [
            f"batch {batch}: {percent(share)}" for batch, share in report.explained().items()
        ],
        "memory": [f"{what}: {size / 2**20:.0f} MiB" for what, size in report.memory.items()],
        "ceilings of the same run": [f"{digits(rate / 1e9)} {unit}" for unit, rate in rates],
        "options": [f"{name}: {value}" for name, value in report.options.items()],
        "not measured": [f"{peer}: {why}" for peer, why in report.absent.items()],
        "warnings": [f"{row}: {text}" for row in report.rows for text in row.warnings],
        ADVICE: advice(report),
    }
    return {title: lines for title, lines in titled.items() if lines}


def plain(report: Report) -> str:
    """Return tables and remarks for the terminal, in columns."""
    blocks = [[title, *columns(rows)] for title, rows in tables(report).items()]
    blocks += [[title, *(f"  {x}" for x in lines)] for title, lines in remarks(report).items()]
    return "\n\n".join("\n".join(map(printable, block)) for block in blocks)


def markdown(report: Report) -> str:
    """Return tables, remarks, what was timed, and the machine."""
    head = f"# {report.target}: latency on {report.device}, {report.precision}, {report.date}"
    lines = [inline(head), "", f"Artifact sha256 {inline(report.artifact_sha256)}.", ""]
    for title, rows in tables(report).items():
        lines += [f"## {inline(title)}", "", *markdown_table(rows), ""]
    timed = [f"{name}: {what}" for name, what in report.timed.items()]
    for title, remark in {**remarks(report), "what was timed": timed}.items():
        lines += [f"## {title}", "", *(f"* {inline(text)}" for text in remark), ""]
    lines += ["## machine", "", *markdown_table(card_rows(report)), ""]
    return "\n".join(lines)


def card_rows(report: Report) -> list[list[str]]:
    """Return the machine as a table, headers first, the end of the run beside its start."""
    start, after = flat(report.environment), flat(report.environment_after, "gpu")
    rows = [[name, start.get(name, "–"), after.get(name, "")] for name in {**start, **after}]
    return [["machine", "at the start", "at the end"], *rows]
