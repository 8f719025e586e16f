"""What `bench TARGET` measured, as tables and remarks, in columns and in Markdown.

Where something costs time, its ratio stands before its milliseconds.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from microclip_deploy.bench.latency.advice import advice
from microclip_deploy.bench.latency.report import (
    BENCHMARK,
    COPY,
    PRODUCT,
    SCHEMA,
    Report,
    Row,
    explained,
    place,
    ratios,
    stage_totals,
)
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


def as_json(report: Report, samples: bool = True) -> dict[str, Any]:
    """Return plain values, the numbers derived from the samples among them.

    Args:
        report: what was measured.
        samples: keep the raw samples; without them it cannot be read back.
    """
    rows = [{**asdict(row), **_derived(report, row)} for row in report.rows]
    stages = [
        {**asdict(stage), "median_s": stage.median(), "of_floor": stage.share_of_floor()}
        for stage in report.stages
    ]
    dropped = () if samples else ("samples_s", "host_s", "device_s")
    return {
        "benchmark": BENCHMARK,
        "schema": SCHEMA,
        **vars(report),
        "rows": [_without(row, dropped) for row in rows],
        "stages": [_without(stage, dropped) for stage in stages],
        "advice": advice(report),
    }


def _derived(report: Report, row: Row) -> dict[str, Any]:
    times = {percentile_name(q): row.percentile(q) for q in report.percentiles}
    ratio = ratios(report, row.batch, row.scope, row.concurrency).get(row.contestant)
    return {"percentiles_s": times, "mean_s": row.mean(), "ratio": ratio}


def ratio_rows(report: Report) -> list[list[str]]:
    """Return the table of ratios, headers first: times as long, then the median itself."""
    batches = sorted({row.batch for row in report.rows})
    rows = [["scope", "contestant", "at once", *(f"batch {batch}" for batch in batches)]]
    lines: dict[tuple[str, str, int], dict[int, str]] = {}
    for row in report.rows:
        ratio = ratios(report, row.batch, row.scope, row.concurrency).get(row.contestant)
        times = "–" if ratio is None else f"{digits(ratio)}x"
        line = lines.setdefault((row.scope, row.contestant, row.concurrency), {})
        doubt = "" if row.stable else " unstable"
        line[row.batch] = f"{times} ({in_ms(row.percentile(50))} ms){doubt}"
    for (scope, contestant, concurrency), cells in lines.items():
        numbers = [cells.get(batch, "–") for batch in batches]
        rows.append([scope, contestant, str(concurrency), *numbers])
    return rows


def time_rows(report: Report) -> list[list[str]]:
    """Return the table of times, headers first: milliseconds a request."""
    on_device = any(row.device_s for row in report.rows)
    alone = ["host p50", "device p50"] if on_device else []
    head = ["scope", "contestant", "batch", "at once", *map(percentile_name, report.percentiles)]
    head += ["mean", *alone, "requests", "images/s", "spread", "use"]
    rows = [head]
    for row in report.rows:
        cells = [row.scope, row.contestant, str(row.batch), str(row.concurrency)]
        cells += [in_ms(row.percentile(q)) for q in report.percentiles]
        cells.append(in_ms(row.mean()))
        if on_device:
            parts = (row.host_s, row.device_s)
            cells += ["–" if part is None else in_ms(float(np.median(part))) for part in parts]
        cells += [str(len(row.samples_s)), digits(row.images_per_s), percent(row.spread)]
        rows.append([*cells, "yes" if row.stable else "no: unstable"])
    return rows


def stage_rows(report: Report) -> list[list[str]]:
    """Return the table of stages, headers first: milliseconds a batch; empty without stages."""
    if not report.stages:
        return []
    times = [*map(percentile_name, _STAGE_PERCENTILES)]
    rows = [["stage", "batch", "share", *times, "floor", "of floor", "GFLOP", "MB"]]
    totals = stage_totals(report)
    for row in report.stages:
        nearness = row.share_of_floor()
        rows.append(
            [
                row.stage,
                str(row.batch),
                percent(row.median() / totals[row.batch]) if totals[row.batch] else "–",
                *(in_ms(row.percentile(q)) for q in _STAGE_PERCENTILES),
                "–" if row.floor_s is None else in_ms(row.floor_s),
                "–" if nearness is None else percent(nearness),
                "–" if row.flop is None else digits(row.flop / 1e9),
                "–" if row.bytes is None else digits(row.bytes / 1e6),
            ]
        )
    return rows


def remarks(report: Report) -> dict[str, list[str]]:
    """Return title -> lines of all that stands below the tables; only what there is."""
    units = {
        COPY: "GB/s copied in memory, read plus written; what stays in a cache is faster",
        PRODUCT: "GFLOP/s in a large product",
    }
    rates = [(units.get(key, key), rate) for key, rate in (report.ceilings or {}).items()]
    found = {
        "cold start": [f"{step}: {in_ms(s)} ms" for step, s in (report.cold_start or {}).items()],
        "the model's stages, added, of the whole request": [
            f"batch {batch}: {percent(share)}" for batch, share in explained(report).items()
        ],
        "memory": [f"{what}: {size / 2**20:.0f} MiB" for what, size in report.memory.items()],
        "ceilings of the same run": [f"{digits(rate / 1e9)} {unit}" for unit, rate in rates],
        "options": [f"{name}: {value}" for name, value in report.options.items()],
        "not measured": [f"{peer}: {why}" for peer, why in report.absent.items()],
        "warnings": [f"{place(row)}: {text}" for row in report.rows for text in row.warnings],
        ADVICE: advice(report),
    }
    return {title: lines for title, lines in found.items() if lines}


def table_titles(report: Report) -> dict[str, list[list[str]]]:
    """Return title -> table of every table that has rows."""
    found = {
        f"times as long as {report.subject}, p50 in brackets": ratio_rows(report),
        "milliseconds a request": time_rows(report),
        "milliseconds a batch, by stage of the export": stage_rows(report),
    }
    return {title: rows for title, rows in found.items() if rows}


def plain(report: Report) -> str:
    """Return tables and remarks for the terminal, in columns."""
    blocks = [[title, *columns(rows)] for title, rows in table_titles(report).items()]
    blocks += [[title, *(f"  {x}" for x in lines)] for title, lines in remarks(report).items()]
    return "\n\n".join("\n".join(map(printable, block)) for block in blocks)


def markdown(report: Report) -> str:
    """Return tables, remarks, what was timed, and the machine."""
    head = f"# {report.target}: latency on {report.device}, {report.precision}, {report.date}"
    lines = [inline(head), "", f"Artifact sha256 {inline(report.artifact_sha256)}.", ""]
    for title, rows in table_titles(report).items():
        lines += [f"## {inline(title)}", "", *markdown_table(rows), ""]
    timed = [f"{name}: {what}" for name, what in report.timed.items()]
    for title, remark in {**remarks(report), "what was timed": timed}.items():
        lines += [f"## {title}", "", *(f"* {inline(text)}" for text in remark), ""]
    lines += ["## machine", "", *markdown_table(card_rows(report)), ""]
    return "\n".join(lines)


def card_rows(report: Report) -> list[list[str]]:
    """Return the machine as a table, headers first, the end of the run beside its start."""
    after = flat(report.environment_after, "gpu")
    start = flat(report.environment)
    rows = [[name, start.get(name, "–"), after.get(name, "")] for name in {**start, **after}]
    return [["machine", "at the start", "at the end"], *rows]


def _without(values: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}
