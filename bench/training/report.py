"""What `bench adapt` measured: the data, its tables, and what limits an adaptation."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from microclip_deploy.artifact import make_directory, write_bytes, write_json
from microclip_deploy.bench.table_text import (
    columns,
    digits,
    flat,
    in_ms,
    markdown_table,
    percent,
    slug,
)
from microclip_deploy.bench.training.step import LABELLING, OPTIMISER, PLAIN, PRODUCT, STRONG

DECODE, VIEWS = "decode", "decode + views"
AUGMENTATION, MODEL = "augmentation", "the model"

TIMED = {
    "step": "labelling, the strong view forward and backward, and AdamW, from normalised tensors "
    "on the device on; decoding, augmentation, upload, normalising and saving are outside. After a "
    "warm-up; median of the samples, fastest to slowest in brackets; the sides take turns",
    LABELLING: "weak view and crops through the encoder, cut and pooling, without gradient",
    STRONG: "strong view forward, loss and backward",
    OPTIMISER: "AdamW over LayerNorms, the pooling's maps and the class matrix",
    DECODE: "files -> RGB pixels by adaptation's reader, in the loader's processes; files come "
    "from the page cache; the start of processes is outside. Images of all rounds over their "
    "seconds",
    VIEWS: "files -> uint8 batches of weak, strong and crop views by adaptation's own loader, the "
    "rest as above",
    "peak memory": "two steps in a fresh process: resident size on a CPU, Python and libraries "
    "included; what torch allocated on CUDA",
}
"""What is inside the timed region of each number."""


@dataclass
class Pipeline:
    """Loading alone, in rounds of one batch a process."""

    images: int
    """Of one round."""
    samples_s: list[float]
    """Seconds of each round, one after the other without a break."""

    @property
    def images_per_s(self) -> float:
        """Throughput of all rounds together: single rounds come in bursts."""
        return self.images * len(self.samples_s) / sum(self.samples_s)


@dataclass
class Case:
    """One geometry."""

    geometry: str
    side: int
    """S of the network input, pixels."""
    batch: int
    samples_s: dict[str, list[float]]
    """"product" and "plain" -> seconds a step, raw, taking turns."""
    parts_s: dict[str, list[float]]
    """Part -> seconds of it in each of the product's steps."""
    losses: dict[str, float]
    """Of the first steps, which must agree."""
    peak_mib: dict[str, float]
    decode: Pipeline
    views: Pipeline

    def images_per_s(self, side: str) -> float:
        """Return the images that a side's steps take in a second, by their median."""
        return self.batch / median(self.samples_s[side])

    def ratio(self) -> float | None:
        """Return how many times as long as the product a plain step takes; None without it."""
        if PLAIN not in self.samples_s:
            return None
        return median(self.samples_s[PLAIN]) / median(self.samples_s[PRODUCT])

    def shares(self) -> dict[str, float]:
        """Return the share of each part in the product's step; they add up to 1."""
        total = sum(map(sum, self.parts_s.values()))
        return {part: sum(seconds) / total for part, seconds in self.parts_s.items()}

    def to_json(self) -> dict[str, Any]:
        """Return plain values, the ratio first."""
        return {
            "ratio": self.ratio(),
            "images_per_s": {side: self.images_per_s(side) for side in self.samples_s},
            "median_s": {side: median(seconds) for side, seconds in self.samples_s.items()},
            "shares": self.shares(),
            **asdict(self),
            "decode": {"images_per_s": self.decode.images_per_s, **asdict(self.decode)},
            "views": {"images_per_s": self.views.images_per_s, **asdict(self.views)},
        }


@dataclass
class AdaptationReport:
    """Everything one run measured."""

    date: str
    device: str
    """"cpu", or the name of the GPU."""
    precision: str
    batch: int
    crops: int
    workers: int
    threads: int
    """Of torch on the CPU."""
    photos: dict[str, Any]
    """Source, count, median short side in pixels and size in KiB of the photos."""
    cases: list[Case]
    seconds: float
    environment: dict[str, Any]

    @property
    def limits(self) -> str:
        """Say of each geometry, a line each, what limits an adaptation, and the lever."""
        return "\n".join(_limit_text(self, case) for case in self.cases)

    def to_json(self) -> dict[str, Any]:
        """Return plain values, the timed regions in words among them."""
        return {
            "benchmark": "adaptation",
            **{name: value for name, value in vars(self).items() if name != "cases"},
            "timed": dict(TIMED),
            "limits": self.limits,
            "cases": [case.to_json() for case in self.cases],
        }


def step_rows(report: AdaptationReport) -> list[list[str]]:
    """Return the table of training steps, headers first, the ratio before the numbers.

    Times are medians, with the fastest and the slowest step in brackets.
    """
    sides = [side for side in (PRODUCT, PLAIN) if side in report.cases[0].samples_s]
    units = ("images/s", "ms a step", "peak MiB")
    rows = [
        ["geometry", "plain / product", *(f"{side} {unit}" for unit in units for side in sides)]
    ]
    for case in report.cases:
        ratio = case.ratio()
        cells = [case.geometry, "–" if ratio is None else f"{digits(ratio)}x"]
        cells += [digits(case.images_per_s(side)) for side in sides]
        cells += [_range(case.samples_s[side]) for side in sides]
        rows.append([*cells, *(f"{case.peak_mib[side]:.0f}" for side in sides)])
    return rows


def _range(samples_s: Sequence[float]) -> str:
    least, most = min(samples_s), max(samples_s)
    return f"{in_ms(median(samples_s))} ({in_ms(least)} to {in_ms(most)})"


def part_rows(report: AdaptationReport) -> list[list[str]]:
    """Return the table of the product's step by part, headers first: share, median in ms."""
    rows = [["geometry", *report.cases[0].parts_s]]
    for case in report.cases:
        shares = case.shares()
        cells = [f"{percent(shares[p])} ({in_ms(median(s))} ms)" for p, s in case.parts_s.items()]
        rows.append([case.geometry, *cells])
    return rows


def pipeline_rows(report: AdaptationReport) -> list[list[str]]:
    """Return the table of images a second, headers first: loading beside the product's step."""
    rows = [["geometry", DECODE, VIEWS, "product step", "limited by"]]
    for case in report.cases:
        speeds = (case.decode.images_per_s, case.views.images_per_s, case.images_per_s(PRODUCT))
        rows.append([case.geometry, *map(digits, speeds), limited_by(case, report.workers)])
    return rows


def plain(report: AdaptationReport) -> str:
    """Return tables and limits for the terminal, in columns."""
    blocks = [[title, *columns(rows)] for title, rows in _tables(report).items()]
    blocks.append(["what limits it", *(f"  {line}" for line in report.limits.splitlines())])
    return "\n\n".join("\n".join(block) for block in blocks)


def markdown(report: AdaptationReport) -> str:
    """Return tables, limits, what was timed, and the machine."""
    lines = [f"# Adaptation on {report.device}, {report.precision}, {report.date}", ""]
    for title, rows in _tables(report).items():
        lines += [f"## {title}", "", *markdown_table(rows), ""]
    timed = [f"{name}: {text}" for name, text in TIMED.items()]
    photos = [f"{name}: {value}" for name, value in report.photos.items()]
    remarks = {"what limits it": report.limits.splitlines(), "what was timed": timed}
    for title, remark in {**remarks, "the photos": photos}.items():
        lines += [f"## {title}", "", *(f"* {text}" for text in remark), ""]
    machine = {"threads": str(report.threads), **flat(report.environment)}
    rows = [["machine", ""], *([name, value] for name, value in machine.items())]
    return "\n".join([*lines, *markdown_table(rows), ""])


def write_report(report: AdaptationReport, directory: Path) -> Path:
    """Write DATE-DEVICE-adapt-GEOMETRIES.json and .md; return the JSON's path."""
    make_directory(directory)
    names = slug(" ".join(case.geometry for case in report.cases))
    path = directory / f"{report.date}-{slug(report.device)}-adapt-{names}.json"
    write_json(path, report.to_json())
    write_bytes(path.with_suffix(".md"), markdown(report).encode())
    return path


def limited_by(case: Case, workers: int) -> str:
    """Return what an adaptation waits for: DECODE, AUGMENTATION or MODEL.

    Processes load while the model learns, so the slower of both decides; without them the times of
    an image add up, and the longest decides.
    """
    load_s, model_s = 1 / case.views.images_per_s, 1 / case.images_per_s(PRODUCT)
    decode_s = 1 / case.decode.images_per_s
    data = {DECODE: decode_s, AUGMENTATION: load_s - decode_s}
    slowest = max(data, key=lambda name: data[name])
    loading_s = load_s if workers else data[slowest]
    return slowest if loading_s > model_s else MODEL


def _limit_text(report: AdaptationReport, case: Case) -> str:
    limit, speed = limited_by(case, report.workers), case.images_per_s(PRODUCT)
    loaded = case.views.images_per_s
    if report.workers:
        together = f"both at once reach at most {digits(min(loaded, speed))}"
    else:
        together = f"one after the other they reach {digits(1 / (1 / loaded + 1 / speed))}"
    return (
        f"{case.geometry}: {limit} limits an adaptation with --workers {report.workers}. "
        f"Images a second, each measured alone: decoding {digits(case.decode.images_per_s)}, "
        f"decoding with all views {digits(loaded)}, the training step {digits(speed)}; {together}. "
        f"Lever: {_lever(report, case, limit)}"
    )


def _lever(report: AdaptationReport, case: Case, limit: str) -> str:
    if limit == MODEL:
        first = "a GPU" if report.device == "cpu" else "--set adapt.precision=bf16"
        share = percent(case.shares()[LABELLING])
        return f"{first}, a smaller backbone, or fewer crops (labelling takes {share} of the step)"
    needed = max(report.workers, 1) * case.images_per_s(PRODUCT) / case.views.images_per_s
    cores = report.environment.get("cores")
    workers = (
        f"--workers {max(math.ceil(needed), report.workers + 1)}, which keeps up with the model if "
        f"as many cores are free (there are {cores})"
    )
    if limit == DECODE:  # crops take half of the short side and more: no pixel is made up
        return f"{workers}, or photos shrunk once to a short side of about {2 * case.side} px"
    return f"{workers}, or fewer crops (--set views.crops=N)"


def _tables(report: AdaptationReport) -> dict[str, list[list[str]]]:
    steps = len(report.cases[0].samples_s[PRODUCT])
    what = (
        f"batch {report.batch}, {report.crops} crops, {report.precision}, {report.device}, "
        f"{'a step' if steps == 1 else f'{steps} steps'} a side"
    )
    return {
        f"training step: {what}": step_rows(report),
        "the product's step, by part": part_rows(report),
        f"images a second, loading with --workers {report.workers}": pipeline_rows(report),
    }
