"""What `bench ncut` measured, as a table, Markdown, a chart and one JSON document."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from microclip_deploy.artifact import make_directory, write_bytes, write_json
from microclip_deploy.bench.kernel.chart import log_chart
from microclip_deploy.bench.table_text import columns, digits, markdown_table, slug
from microclip_deploy.errors import VerificationError

AFFINITY, SOLVE, FUSION = "K1 affinity", "K2 solve", "K3 fusion"
SUM, WHOLE, REPLAY = "sum", "whole", "replay"
ITERATIVE, TORCH_EIGH, CUPY_EIGH = "iterative", "torch eigh", "cupy eigh"
EXACT_CPU, ITERATIVE_CPU = "exact, CPU", "iterative, CPU"
STAGES = (AFFINITY, SOLVE, FUSION)
CONTESTANTS = (
    *STAGES, SUM, WHOLE, REPLAY, ITERATIVE, TORCH_EIGH, CUPY_EIGH, EXACT_CPU, ITERATIVE_CPU
)  # fmt: skip
"""In the order of columns."""

TIMED = {
    AFFINITY: "tokens -> one bit a pair; every launch has its own tokens",
    SOLVE: "bits -> mask and vector",
    FUSION: "tokens and mask -> pooled token, [FG] embedding, fused logits",
    SUM: "medians of K1, K2 and K3 added",
    WHOLE: "K1, K2, K3 in turn, many times in one CUDA graph",
    REPLAY: "a CUDA graph of K1, K2, K3 once, replayed back to back: with the start of the graph",
    ITERATIVE: "tokens -> mask by our array-API path on torch CUDA, launched from Python",
    TORCH_EIGH: "torch.linalg.eigh of the batch in float32, matrices already built: no mask yet",
    CUPY_EIGH: "cupy.linalg.eigh, the same",
    EXACT_CPU: "tokens -> mask, float64 eigh of NumPy",
    ITERATIVE_CPU: "tokens -> mask, array-API path on torch CPU",
}
"""What is inside the timed region of each contestant."""

METHOD = (
    "A sample of K1, K2, K3 and whole is the mean over one replay of a CUDA graph of many "
    "launches, between two events: kernels and the gaps between dependent nodes are inside, the "
    "host is not. "
    "Input sets take turns; where they are larger than the L2 cache, tokens come from memory. A "
    "sample of a peer is one call between two events, the host's part included; on a CPU it is the "
    "wall clock."
)


class Timing(NamedTuple):
    """Microseconds a batch."""

    median_us: float
    p95_us: float
    min_us: float
    samples: int
    launches: int
    """Batches of which one sample is the mean."""


class Roofline(NamedTuple):
    """What K1 must do at least, and the time that takes at the rates measured in the same run."""

    bytes: int
    """Tokens read once, bits written once."""
    flop: int
    """Tiles of 64 x 64 pairs on and above the diagonal."""
    memory_us: float
    arithmetic_us: float
    share: float
    """Of the floor, the larger of both, in the measured median: 1 is perfect."""


@dataclass
class Case:
    """One number of tokens at one batch size."""

    tokens: int
    width: int
    batch: int
    input_sets: int = 1
    input_mib: float = 0.0
    """All tokens that take turns, together."""
    times: dict[str, Timing] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    """Contestant -> why it has no time."""
    roofline: Roofline | None = None

    def add_sum(self) -> None:
        """Add the stages up, where all were measured."""
        parts = [self.times[stage] for stage in STAGES if stage in self.times]
        if len(parts) == len(STAGES):
            median, p95, least = (
                sum(values) for values in zip(*(part[:3] for part in parts), strict=True)
            )
            self.times[SUM] = Timing(median, p95, least, 0, 0)

    def eigh_over_cut(self) -> float | None:
        """Return how many times as long the fastest eigensolver takes as K1 and K2 together."""
        peers = [
            self.times[name].median_us for name in (TORCH_EIGH, CUPY_EIGH) if name in self.times
        ]
        if not peers or AFFINITY not in self.times or SOLVE not in self.times:
            return None
        return min(peers) / (self.times[AFFINITY].median_us + self.times[SOLVE].median_us)


@dataclass
class TokenFacts:
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
    steps: dict[str, int] | None
    """Lanczos steps of K2: p50, p90, max."""
    compared: int
    """Images compared with exact float64 on the CPU."""
    binding: int
    """Of these, graphs whose mask no rounding in float32 can change; the others are not counted."""
    wrong: dict[str, int]
    """Contestant -> binding graphs with another mask."""


@dataclass
class Report:
    """Everything one run measured."""

    dtype: str
    device: str
    date: str
    cases: list[Case]
    facts: list[TokenFacts]
    ceilings: dict[str, Any] | None
    seconds: float
    environment: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return plain values, the timed regions in words among them."""
        shown = [name for name in CONTESTANTS if any(name in case.times for case in self.cases)]
        cases = [{**asdict(case), "eigh_over_cut": case.eigh_over_cut()} for case in self.cases]
        for plain, case in zip(cases, self.cases, strict=True):
            plain["times"] = {name: timing._asdict() for name, timing in case.times.items()}
            plain["roofline"] = case.roofline and case.roofline._asdict()
        return {
            "benchmark": "ncut kernel",
            **{name: value for name, value in vars(self).items() if name not in ("cases", "facts")},
            "method": METHOD,
            "timed": {name: TIMED[name] for name in shown},
            "cases": cases,
            "tokens": [asdict(facts) for facts in self.facts],
        }


def percentile(samples: Sequence[float], share: float) -> float:
    """Return the smallest sample that at least `share` percent do not exceed."""
    return sorted(samples)[max(math.ceil(len(samples) * share / 100) - 1, 0)]


def affinity_work(batch: int, tokens: int, width: int, item_bytes: int) -> tuple[int, int]:
    """Return the operations of K1, and its bytes: tokens read once, a bit a pair written."""
    tiles = math.ceil(tokens / 64)
    words = math.ceil(tokens / 32)
    moved = batch * tokens * (width * item_bytes + 4 * words)
    return batch * tiles * (tiles + 1) // 2 * 64 * 64 * 2 * width, moved


def roofline(case: Case, item_bytes: int, ceilings: dict[str, Any]) -> Roofline:
    """Return the floor under K1 and how near its median comes."""
    flop, moved = affinity_work(case.batch, case.tokens, case.width, item_bytes)
    memory_us = moved / ceilings["copy_bytes_per_s"] * 1e6
    arithmetic_us = flop / ceilings["product_flop_per_s"] * 1e6
    share = max(memory_us, arithmetic_us) / case.times[AFFINITY].median_us
    return Roofline(moved, flop, memory_us, arithmetic_us, share)


def time_rows(report: Report) -> list[list[str]]:
    """Return the table of times, headers first: microseconds a batch, median / p95."""
    shown = [name for name in CONTESTANTS if any(name in case.times for case in report.cases)]
    on_device = any(case.roofline for case in report.cases)
    extra = ["eigh / (K1+K2)", "K1 of floor"] if on_device else []
    rows = [["N", "D", "B", *shown, *extra]]
    for case in report.cases:
        cells = [str(case.tokens), str(case.width), str(case.batch)]
        cells += [_time(case.times.get(name)) for name in shown]
        if on_device:
            ratio = case.eigh_over_cut()
            cells += [
                "–" if ratio is None else f"{ratio:.3g}x",
                "–" if case.roofline is None else f"{100 * case.roofline.share:.0f} %",
            ]
        rows.append(cells)
    return rows


def fact_rows(report: Report) -> list[list[str]]:
    """Return the table of the tokens used, headers first."""
    rows = [
        [
            "N", "images", "pairs joined", "in parts", "degenerate", "complete",
            "steps p50 / p90 / max", "compared", "binding", "wrong masks",
        ]
    ]  # fmt: skip
    for facts in report.facts:
        shares = (facts.edge_share, facts.apart, facts.degenerate, facts.complete)
        steps = facts.steps
        rows.append(
            [
                str(facts.tokens),
                str(facts.images),
                *(f"{100 * share:.0f} %" for share in shares),
                "–" if steps is None else " / ".join(str(steps[k]) for k in ("p50", "p90", "max")),
                str(facts.compared),
                str(facts.binding),
                ", ".join(f"{name} {count}" for name, count in facts.wrong.items()),
            ]
        )
    return rows


def plain(report: Report) -> str:
    """Return both tables for the terminal, in columns."""
    times = f"microseconds a batch, {report.dtype}, {report.device}: median / p95"
    blocks = ((times, time_rows(report)), ("the tokens used", fact_rows(report)))
    return "\n\n".join("\n".join([title, *columns(rows)]) for title, rows in blocks)


def markdown(report: Report) -> str:
    """Return both tables, what was timed, what was left out, and the machine."""
    card = report.environment
    gpu = card.get("gpu") or {}
    machine = ", ".join(f"{key} {value}" for key, value in gpu.items() if value is not None)
    lines = [
        f"# The normalised cut on {report.device}, {report.dtype}, {report.date}",
        "",
        "Microseconds a batch, median / p95.",
        "",
        *markdown_table(time_rows(report)),
        "",
        METHOD,
        "",
        *(f"* {name}: {text}" for name, text in report.to_json()["timed"].items()),
        "",
        *markdown_table(fact_rows(report)),
        "",
        "A mask is wrong where it differs from exact float64 on the CPU, solved from the very "
        "tokens, on a graph whose mask rounding in float32 cannot change.",
        "",
    ]
    skipped = [
        f"* N {case.tokens}, B {case.batch}, {name}: {why}"
        for case in report.cases
        for name, why in case.skipped.items()
    ]
    if skipped:
        lines += ["Not measured:", "", *skipped, ""]
    if report.ceilings is not None:
        copied = report.ceilings["copy_bytes_per_s"] / 1e12
        product = report.ceilings["product_flop_per_s"] / 1e12
        lines += [
            f"Ceilings of the same run: a copy moves {copied:.2f} TB/s (read plus written), a "
            f"{report.ceilings['product_dtype']} product runs at {product:.0f} TFLOP/s.",
            "",
        ]
    packages = ", ".join(f"{name} {number}" for name, number in card.get("packages", {}).items())
    lines += [f"{card.get('cpu')}; {machine or 'no GPU'}; {packages}; commit {card.get('commit')}."]
    return "\n".join([*lines, ""])


def chart(report: Report) -> str:
    """Draw the time over the batch, one colour a number of tokens."""
    wanted = (WHOLE, TORCH_EIGH, CUPY_EIGH, ITERATIVE, EXACT_CPU, ITERATIVE_CPU)
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for case in report.cases:
        group = panels.setdefault(f"N={case.tokens}", {})
        for name in wanted:
            if name in case.times:
                point = (float(case.batch), case.times[name].median_us)
                group.setdefault(name, []).append(point)
    return log_chart(
        panels,
        title=f"normalised cut, {report.dtype}, {report.device}",
        x_label="images a batch",
        y_label="microseconds a batch",
    )


def write_report(report: Report, directory: Path) -> Path:
    """Write DATE-GPU-kernel.json, .md and .svg; return the JSON's path."""
    make_directory(directory)
    path = directory / f"{report.date}-{slug(report.device)}-kernel.json"
    write_json(path, report.to_json())
    write_bytes(path.with_suffix(".md"), markdown(report).encode())
    write_bytes(path.with_suffix(".svg"), chart(report).encode())
    return path


def require_right(report: Report) -> None:
    """Accept no number from a contestant that gets masks wrong.

    Raises:
        VerificationError: some mask is not the exact one.
    """
    wrong = [
        f"{name} {count} of {facts.binding} at N {facts.tokens}"
        for facts in report.facts
        for name, count in facts.wrong.items()
        if count
    ]
    if wrong:
        raise VerificationError(
            f"masks: expected those of exact float64 on every binding graph, found others from "
            f"{', '.join(wrong)}; the times above are not to be used"
        )


def _time(timing: Timing | None) -> str:
    return "–" if timing is None else f"{digits(timing.median_us)} / {digits(timing.p95_us)}"
