"""What `bench ncut` measured, as a table, Markdown, a chart and one JSON document."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel

from microclip_deploy.bench import document
from microclip_deploy.bench.table_text import digits, slug
from microclip_deploy.errors import VerificationError
from microclip_deploy.evaluation.chart import log_chart

AFFINITY, SOLVE, FUSION = "K1 affinity", "K2 solve", "K3 fusion"
SUM, WHOLE, REPLAY = "sum", "whole", "replay"
STAGES = (AFFINITY, SOLVE, FUSION)
ITERATIVE, TORCH_EIGH, CUPY_EIGH = "iterative", "torch eigh", "cupy eigh"
BATCHED_EIGH = "batched eigh"
EIGENSOLVERS = (BATCHED_EIGH, TORCH_EIGH, CUPY_EIGH)
EXACT_CPU, ITERATIVE_CPU = "exact, CPU", "iterative, CPU"

TIMED = {
    AFFINITY: "tokens -> one bit a pair; every launch has its own tokens",
    SOLVE: "bits -> mask and vector",
    FUSION: "tokens and mask -> pooled token, [FG] embedding, fused logits",
    SUM: "medians of K1, K2 and K3 added",
    WHOLE: "K1, K2, K3 in turn, many times in one CUDA graph",
    REPLAY: "a CUDA graph of K1, K2, K3 once, replayed back to back: with the start of the graph",
    ITERATIVE: "tokens -> mask by our array-API path on torch CUDA, launched from Python",
    BATCHED_EIGH: "one cusolverDnXsyevBatched of the batch in float32, which torch.linalg.eigh is "
    "from PyTorch 2.12 on: a copy of the matrices and working memory inside; matrices already "
    "built: no mask yet",
    TORCH_EIGH: "torch.linalg.eigh of the batch in float32, matrices already built: no mask yet",
    CUPY_EIGH: "cupy.linalg.eigh, the same",
    EXACT_CPU: "tokens -> mask, float64 eigh of NumPy",
    ITERATIVE_CPU: "tokens -> mask, array-API path on torch CPU",
}
"""Contestant -> what is inside its timed region, in the order of columns."""

METHOD = (
    "A sample of K1, K2, K3 and whole is the mean over one replay of a CUDA graph of many "
    "launches, between two events: kernels and the gaps between dependent nodes are inside, the "
    "host is not. Input sets take turns; where they are larger than the L2 cache, tokens come from "
    "memory. A sample of a peer is one call between two events, the host's part included; on a CPU "
    "it is the wall clock."
)


class NotTimed(Exception):
    """A contestant is left out; the message says why."""


class Timing(BaseModel):
    """Microseconds a batch."""

    median_us: float
    p95_us: float
    min_us: float
    samples: int
    launches: int
    """Batches of which one sample is the mean."""

    @classmethod
    def of(cls, samples_us: Sequence[float], launches: int) -> "Timing":
        """Sum samples up."""
        return cls(
            median_us=statistics.median(samples_us),
            p95_us=percentile(samples_us, 95),
            min_us=min(samples_us),
            samples=len(samples_us),
            launches=launches,
        )


class Roofline(BaseModel):
    """What K1 must do at least, and the time that takes at the rates measured in the same run."""

    bytes: int
    """Tokens read once, bits written once."""
    flop: int
    """Tiles of 64 x 64 pairs on and above the diagonal."""
    memory_us: float
    arithmetic_us: float
    share: float
    """Of the floor, the larger of both, in the measured median: 1 is perfect."""


class Case(BaseModel):
    """One number of tokens at one batch size."""

    tokens: int
    width: int
    batch: int
    input_sets: int = 1
    input_mib: float = 0.0
    """All tokens that take turns, together."""
    times: dict[str, Timing] = {}
    skipped: dict[str, str] = {}
    """Contestant -> why it has no time."""
    roofline: Roofline | None = None
    eigh_over_cut: float | None = None
    """How many times as long the fastest eigensolver takes as K1 and K2 together."""

    def time(self, name: str, measure: Callable[[], Timing]) -> None:
        """Measure a contestant, or keep the reason why it has no time."""
        try:
            self.times[name] = measure()
        except NotTimed as reason:
            self.skipped[name] = str(reason)

    def derive(self, item_bytes: int, ceilings: Mapping[str, Any]) -> None:
        """Add what follows from the kernels' times: their sum, the ratio and the floor of K1.

        Args:
            item_bytes: of one number of a token.
            ceilings: as `clock.ceilings` measured them.
        """
        times = self.times
        if all(name in times for name in STAGES):
            parts = [times[name] for name in STAGES]
            times[SUM] = Timing(
                median_us=sum(part.median_us for part in parts),
                p95_us=sum(part.p95_us for part in parts),
                min_us=sum(part.min_us for part in parts),
                samples=0,
                launches=0,
            )
        peers = [times[name].median_us for name in EIGENSOLVERS if name in times]
        if peers and AFFINITY in times and SOLVE in times:
            self.eigh_over_cut = min(peers) / (times[AFFINITY].median_us + times[SOLVE].median_us)
        if AFFINITY in times:
            flop, moved = affinity_work(self.batch, self.tokens, self.width, item_bytes)
            memory_us = moved / ceilings["copy_bytes_per_s"] * 1e6
            arithmetic_us = flop / ceilings["product_flop_per_s"] * 1e6
            self.roofline = Roofline(
                bytes=moved,
                flop=flop,
                memory_us=memory_us,
                arithmetic_us=arithmetic_us,
                share=max(memory_us, arithmetic_us) / times[AFFINITY].median_us,
            )


class TokenFacts(BaseModel):
    """The graphs of the tokens that were used, and who got their masks right."""

    tokens: int
    images: int
    """Images behind the shares."""
    edge_share: float
    """Mean share of pairs that are joined."""
    apart: float
    """Share of graphs that are not connected."""
    degenerate: float
    complete: float
    steps: dict[str, int] | None = None
    """Lanczos steps of K2: p50, p90, max."""
    compared: int
    """Images compared with exact float64 on the CPU."""
    binding: int
    """Of these, graphs whose mask no rounding in float32 can change; the others are not counted."""
    wrong: dict[str, int]
    """Contestant -> binding graphs with another mask."""


class Report(BaseModel):
    """Everything one run measured."""

    benchmark: Literal["ncut kernel"] = "ncut kernel"
    dtype: str
    device: str
    date: str
    ceilings: dict[str, Any] | None = None
    seconds: float = 0.0
    environment: dict[str, Any] = {}
    method: str = METHOD
    timed: dict[str, str] = {}
    """The part of `TIMED` that was measured."""
    cases: list[Case] = []
    tokens: list[TokenFacts] = []


def affinity_work(batch: int, tokens: int, width: int, item_bytes: int) -> tuple[int, int]:
    """Return the operations of K1, and its bytes: tokens read once, a bit a pair written."""
    tiles, words = math.ceil(tokens / 64), math.ceil(tokens / 32)
    moved = batch * tokens * (width * item_bytes + 4 * words)
    return batch * tiles * (tiles + 1) // 2 * 64 * 64 * 2 * width, moved


def percentile(samples: Sequence[float], share: float) -> float:
    """Return the smallest sample that at least `share` percent do not exceed."""
    return float(np.percentile(samples, share, method="inverted_cdf"))


def plain(report: Report) -> str:
    """Return both tables for the terminal, in columns."""
    return document.plain(_tables(report), {})


def markdown(report: Report) -> str:
    """Return both tables, what was timed, what was left out, and the machine."""
    skipped = [
        f"N {case.tokens}, B {case.batch}, {name}: {why}"
        for case in report.cases
        for name, why in case.skipped.items()
    ]
    remarks = {
        "what was timed": [METHOD, *(f"{name}: {what}" for name, what in report.timed.items())],
        "what a wrong mask is": [
            "A mask that differs from exact float64 on the CPU, solved from the very tokens, on a "
            "graph whose mask rounding in float32 cannot change."
        ],
        "not measured": skipped,
        "ceilings of the same run": _ceilings(report),
    }
    title = f"The normalised cut on {report.device}, {report.dtype}, {report.date}"
    return document.markdown(title, _tables(report), remarks, report.environment)


def chart(report: Report) -> str:
    """Draw the time over the batch, one colour a number of tokens; SVG."""
    wanted = (WHOLE, *EIGENSOLVERS, ITERATIVE, EXACT_CPU, ITERATIVE_CPU)
    groups: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for case in report.cases:
        lines = groups.setdefault(f"N={case.tokens}", {})
        for name in wanted:
            if name in case.times:
                lines.setdefault(name, []).append((case.batch, case.times[name].median_us))
    y_label = f"microseconds a batch, {report.dtype}, {report.device}"
    return log_chart(groups, x_label="images a batch", y_label=y_label)


def write_report(report: Report, directory: Path) -> Path:
    """Write DATE-GPU-kernel.json, .md and .svg; return the JSON's path."""
    name = f"{report.date}-{slug(report.device)}-kernel"
    texts = {".md": markdown(report), ".svg": chart(report)}
    return document.write_files(directory, name, report.model_dump(), texts)


def require_right(report: Report) -> None:
    """Accept no number from a contestant that gets masks wrong.

    Raises:
        VerificationError: some mask is not the exact one.
    """
    wrong = [
        f"{name} {count} of {facts.binding} at N {facts.tokens}"
        for facts in report.tokens
        for name, count in facts.wrong.items()
        if count
    ]
    if wrong:
        raise VerificationError(
            f"masks: expected those of exact float64 on every binding graph, found others from "
            f"{', '.join(wrong)}; the times above are not to be used"
        )


def _tables(report: Report) -> dict[str, list[list[str]]]:
    times = f"microseconds a batch, {report.dtype}, {report.device}: median / p95"
    return {times: _time_rows(report), "the tokens used": _fact_rows(report)}


def _time_rows(report: Report) -> list[list[str]]:
    on_device = report.ceilings is not None
    extra = ["eigh / (K1+K2)", "K1 of floor"] if on_device else []
    rows = [["N", "D", "B", *report.timed, *extra]]
    for case in report.cases:
        cells = [str(case.tokens), str(case.width), str(case.batch)]
        cells += [_time(case.times.get(name)) for name in report.timed]
        if on_device:
            cells.append(f"{case.eigh_over_cut:.3g}x" if case.eigh_over_cut else "–")
            cells.append(f"{100 * case.roofline.share:.0f} %" if case.roofline else "–")
        rows.append(cells)
    return rows


def _time(timing: Timing | None) -> str:
    return "–" if timing is None else f"{digits(timing.median_us)} / {digits(timing.p95_us)}"


def _fact_rows(report: Report) -> list[list[str]]:
    rows = [
        [
            "N", "images", "pairs joined", "in parts", "degenerate", "complete",
            "steps p50 / p90 / max", "compared", "binding", "wrong masks",
        ]
    ]  # fmt: skip
    for facts in report.tokens:
        shares = (facts.edge_share, facts.apart, facts.degenerate, facts.complete)
        steps = " / ".join(map(str, facts.steps.values())) if facts.steps else "–"
        wrong = ", ".join(f"{name} {count}" for name, count in facts.wrong.items())
        cells = [str(facts.tokens), str(facts.images), *(f"{100 * s:.0f} %" for s in shares)]
        rows.append([*cells, steps, str(facts.compared), str(facts.binding), wrong])
    return rows


def _ceilings(report: Report) -> list[str]:
    if report.ceilings is None:
        return []
    copied = report.ceilings["copy_bytes_per_s"] / 1e12
    product = report.ceilings["product_flop_per_s"] / 1e12
    return [
        f"a copy moves {copied:.2f} TB/s, read plus written",
        f"a {report.ceilings['product_dtype']} product runs at {product:.0f} TFLOP/s",
    ]
