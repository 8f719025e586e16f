"""What `bench TARGET` measured: raw samples, and the numbers that are derived from them.

A report outlives the run: it is read back to compare with another.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np

from microclip_deploy.artifact import read_json
from microclip_deploy.errors import DataError

BENCHMARK, SCHEMA = "latency", "microclip.bench/1"
IMAGE_TO_LOGITS, JPEG_TO_LOGITS = "image -> logits", "JPEG -> logits"
COPY, PRODUCT = "copy_bytes_per_s", "product_flop_per_s"
"""Keys of the ceilings."""

DECODE, PREPROCESS, H2D, BACKBONE = "decode", "preprocess", "H2D", "backbone"
K1, K2, SALIENCY, K3_HEAD, D2H, POST = "K1", "K2", "K1+K2", "K3/head", "D2H", "post"
_FROM_VIEWS = (H2D, BACKBONE, K1, K2, SALIENCY, K3_HEAD, D2H)
"""What lies between views and logits."""
_MISSING = object()


@dataclass
class Row:
    """One contestant at one batch size."""

    contestant: str
    scope: str
    """What a request holds, such as "image -> logits"."""
    batch: int
    concurrency: int
    """Requests under way at once."""
    samples_s: list[float]
    """Raw, seconds a request."""
    images_per_s: float
    stable: bool
    spread: float
    """Share by which repeated measurements differ."""
    host_s: list[float] | None = None
    """Seconds until everything is launched, where there is a device; other requests."""
    device_s: list[float] | None = None
    """Seconds between CUDA events around the same work."""
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        where = f"{self.contestant}, batch {self.batch}"
        _require(self.batch >= 1 and self.concurrency >= 1, where, "batch and concurrency of 1 up")
        _require(bool(self.samples_s) and min(self.samples_s) > 0, where, "samples, all above 0 s")
        _require([] not in (self.host_s, self.device_s), where, "device samples, or None")

    def percentile(self, q: float) -> float:
        """Return the q-th percentile of the samples in seconds, linear between two samples."""
        return float(np.percentile(self.samples_s, q))

    def mean(self) -> float:
        """Return the mean of the samples in seconds."""
        return float(np.mean(self.samples_s))


@dataclass
class StageRow:
    """One stage of a request at one batch size."""

    stage: str
    batch: int
    samples_s: list[float]
    """Raw, seconds a batch; what is a difference of two times is cut off at 0."""
    flop: int | None = None
    """Counted, a batch; None where it makes no sense."""
    bytes: int | None = None
    floor_s: float | None = None
    """Seconds a batch needs at least, at the ceilings of the same run."""

    def __post_init__(self) -> None:
        where = f"{self.stage}, batch {self.batch}"
        _require(self.batch >= 1, where, "a batch of 1 up")
        _require(bool(self.samples_s) and min(self.samples_s) >= 0, where, "samples, none negative")

    def percentile(self, q: float) -> float:
        """Return the q-th percentile of the samples in seconds, linear between two samples."""
        return float(np.percentile(self.samples_s, q))

    def median(self) -> float:
        """Return the median of the samples in seconds."""
        return self.percentile(50)

    def share_of_floor(self) -> float | None:
        """Return the floor's share in the median: 1 is perfect; None where either is not known."""
        return None if self.floor_s is None or not self.median() else self.floor_s / self.median()


@dataclass(kw_only=True)
class Report:
    """Everything one run measured."""

    target: str
    """Name only, no path."""
    artifact_sha256: str
    precision: str
    device: str
    date: str
    """ISO day."""
    subject: str
    """The contestant that is the target itself; all ratios refer to it."""
    rows: list[Row]
    stages: list[StageRow] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    """Peer -> why it is not there."""
    cold_start: dict[str, float] | None = None
    """Step -> seconds."""
    memory: dict[str, int] = field(default_factory=dict)
    """What -> bytes."""
    ceilings: dict[str, float] | None = None
    """`COPY` and `PRODUCT` -> rate a second, measured in the same run."""
    timed: dict[str, str] = field(default_factory=dict)
    """Contestant, stage or scope -> what is inside the timed region."""
    percentiles: list[float] = field(default_factory=lambda: [50.0, 90.0, 95.0, 99.0])
    options: dict[str, str] = field(default_factory=dict)
    """How it was measured."""
    environment: dict[str, Any] = field(default_factory=dict)
    """As `card.environment` returns it."""
    environment_after: dict[str, Any] | None = None
    """As `card.gpu` returns it at the end."""
    seconds: float = 0.0
    """The run itself took."""

    @classmethod
    def from_json(cls, value: object) -> "Report":
        """Read what `latency_tables.as_json` returned, raw samples included.

        Raises:
            DataError: it is no such report, it lacks something, or a value cannot be.
        """
        found = value if isinstance(value, dict) else {}
        kind = (found.get("benchmark"), found.get("schema"))
        _require(kind == (BENCHMARK, SCHEMA), "results", f"{BENCHMARK}, {SCHEMA}", kind)
        report: Report = _read(value, cls, "results")
        names = {row.contestant for row in report.rows}
        ours = report.subject
        _require(ours in names, "results.rows", f"a row of '{ours}'", sorted(names))
        inside = [0 <= q <= 100 for q in report.percentiles]
        _require(all(inside), "results.percentiles", "0 to 100", report.percentiles)
        return report


def read_report(path: Path) -> Report:
    """Read a JSON file that `write_report` wrote.

    Raises:
        DataError: the file is missing, foreign or damaged.
    """
    try:
        return Report.from_json(read_json(path))
    except DataError as error:
        named = str(error) if str(error).startswith(str(path)) else f"{path}: {error}"
        raise DataError(named) from error


def floor_s(
    flop: int | None, moved_bytes: int | None, ceilings: Mapping[str, float] | None
) -> float | None:
    """Return the seconds that work needs at least: the longer of arithmetic and memory traffic.

    None where one of them is not known.
    """
    known = floors(flop, moved_bytes, ceilings)
    return max(known.values()) if len(known) == 2 else None


def ratios(report: Report, batch: int, scope: str, concurrency: int = 1) -> dict[str, float]:
    """Return how many times as long as the target each contestant takes, by the medians.

    Empty where the target was not measured so.
    """
    medians = {
        row.contestant: row.percentile(50)
        for row in report.rows
        if (row.batch, row.scope, row.concurrency) == (batch, scope, concurrency)
    }
    reference = medians.get(report.subject)
    return {} if reference is None else {name: p50 / reference for name, p50 in medians.items()}


def stage_totals(report: Report) -> dict[int, float]:
    """Return batch -> the medians of all its stages added, in seconds."""
    totals: dict[int, float] = {}
    for row in report.stages:
        totals[row.batch] = totals.get(row.batch, 0.0) + row.median()
    return dict(sorted(totals.items()))


def explained(report: Report) -> dict[int, float]:
    """Return batch -> the model's stages added, as a share of the target's median from pixels.

    Above 1 where they take longer alone, as each call has a cost of its own. Empty where the target
    is measured in PyTorch: stages are those of the export.
    """
    if report.subject.startswith("torch"):
        return {}
    whole = {
        row.batch: row.percentile(50)
        for row in report.rows
        if (row.contestant, row.scope, row.concurrency) == (report.subject, IMAGE_TO_LOGITS, 1)
    }
    parts = dict.fromkeys(whole, 0.0)
    for row in report.stages:
        if row.stage in _FROM_VIEWS and row.batch in parts:
            parts[row.batch] += row.median()
    return {batch: part / whole[batch] for batch, part in parts.items() if part}


def floors(
    flop: int | None, moved_bytes: int | None, ceilings: Mapping[str, float] | None
) -> dict[str, float]:
    """Return "arithmetic" and "memory" -> seconds that work needs at least; only what is known."""
    rates = ceilings or {}
    work = (("arithmetic", flop, PRODUCT), ("memory", moved_bytes, COPY))
    return {
        name: amount / rates[rate]
        for name, amount, rate in work
        if amount is not None and rates.get(rate)
    }


def place(row: Row) -> str:
    """Name a row in a sentence."""
    return f"{row.contestant}, {row.scope}, batch {row.batch}, {row.concurrency} at once"


def _read(value: Any, hint: Any, where: str) -> Any:
    """Return a JSON value as the type that a field declares."""
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind is Any:
        return value
    if kind is UnionType:  # X | None
        return None if value is None else _read(value, parts[0], where)
    if kind is list and isinstance(value, list):
        return [_read(item, parts[0], f"{where}[{i}]") for i, item in enumerate(value)]
    if kind is dict and isinstance(value, dict):
        return {key: _read(item, parts[1], f"{where}.{key}") for key, item in value.items()}
    if is_dataclass(kind) and isinstance(kind, type) and isinstance(value, dict):
        hints = get_type_hints(kind)
        return kind(
            **{k: _read(value.get(k, _MISSING), h, f"{where}.{k}") for k, h in hints.items()}
        )
    if kind is float and type(value) in (int, float) and abs(value) < sys.float_info.max:
        return float(value)
    found = "nothing" if value is _MISSING else repr(value)
    _require(kind in (str, int, bool) and type(value) is kind, where, kind.__name__, found)
    return value


def _require(holds: bool, where: str, expected: str, found: object = "others") -> None:
    if not holds:
        raise DataError(
            f"{where}: expected {expected}, found {str(found)[:80]}; give a whole JSON file that "
            "`microclip-deploy bench` wrote"
        )
