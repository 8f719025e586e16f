"""What `bench adapt` measured: the data, its tables, and what limits an adaptation."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, Literal

from pydantic import BaseModel

from microclip_deploy.bench import document
from microclip_deploy.bench.table_text import digits, in_ms, percent, slug

PRODUCT, PLAIN = "product", "plain"
WEAK, CROPS = "labels: weak view", "labels: crops"
FORWARD, BACKWARD, OPTIMISER = "strong view forward", "loss and backward", "optimiser"
LABELLING = (WEAK, CROPS, "labelling")
"""The last in reports from before both were told apart."""
UPLOAD, CUT = "upload", "views on the device"
DECODE, VIEWS = "decode", "decode + views"
REDUCED = "decode + reducing"
AUGMENTATION, MODEL = "augmentation", "the model"

TIMED = {
    "step": "labelling, the strong view forward and backward, and AdamW, from normalised tensors "
    "on the device on; decoding, augmentation, upload, normalising and saving are outside. After a "
    "warm-up; median of the samples, fastest to slowest in brackets; the sides take turns",
    WEAK: "the weak view through the encoder, cut and pooling, without gradient",
    CROPS: "the crops through the encoder, without gradient, and the pseudo-labels",
    FORWARD: "the strong view through the encoder, cut and pooling",
    BACKWARD: "the loss and its gradients",
    OPTIMISER: "AdamW over LayerNorms, the pooling's maps and the class matrix",
    UPLOAD: "all views of a batch, uint8, to the device (on a CPU they stay), and normalised there",
    CUT: "with --views-there: all views of a batch, cut and normalised; upload is then that of its "
    "photos",
    DECODE: "files -> RGB pixels by adaptation's reader, in the loader's processes; files come "
    "from the page cache; the start of processes is outside. Images of all rounds over their "
    "seconds",
    VIEWS: "files -> uint8 batches of weak, strong and crop views by adaptation's own loader, the "
    "rest as above",
    REDUCED: "in its place with --views-there: files -> batches of photos as they are sent",
    "peak memory": "two steps in a fresh process: resident size on a CPU, Python and libraries "
    "included; what torch allocated on CUDA",
}
"""What is inside the timed region of each number."""


GPUS = (1, 4, 8)
"""For how many it is computed what would limit."""


class Pipeline(BaseModel):
    """Loading alone, in rounds of one batch a process."""

    images: int
    """Of one round."""
    samples_s: list[float]
    """Seconds of each round, one after the other without a break."""
    images_per_s: float = 0.0
    """Follows from these, all rounds together: single rounds come in bursts."""

    def model_post_init(self, context: Any) -> None:
        """Fill in what follows from the samples."""
        self.images_per_s = self.images * len(self.samples_s) / sum(self.samples_s)


class Steps(BaseModel):
    """Training steps that took turns, but for the first of each side."""

    batch: int
    samples_s: dict[str, list[float]]
    """Side, PRODUCT or PLAIN -> seconds a step, raw."""
    parts_s: dict[str, list[float]]
    """Part -> seconds of it in each of the product's steps."""
    losses: dict[str, float]
    """Side -> loss of its first step; they must agree."""
    median_s: dict[str, float] = {}
    """This and what is below follows from the samples."""
    images_per_s: dict[str, float] = {}
    """Side -> images that its steps take in a second, by their median."""
    ratio: float | None = None
    """How many times as long as the product a plain step takes; None without it."""
    shares: dict[str, float] = {}
    """Part -> its share in the product's steps; they add up to 1."""

    def model_post_init(self, context: Any) -> None:
        """Fill in what follows from the samples."""
        self.median_s = {side: median(seconds) for side, seconds in self.samples_s.items()}
        self.images_per_s = {side: self.batch / taken for side, taken in self.median_s.items()}
        if PLAIN in self.median_s:
            self.ratio = self.median_s[PLAIN] / self.median_s[PRODUCT]
        total = sum(map(sum, self.parts_s.values()))
        self.shares = {part: sum(seconds) / total for part, seconds in self.parts_s.items()}


class Case(Steps):
    """One geometry."""

    geometry: str
    side: int
    """S of the network input, pixels."""
    peak_mib: dict[str, float]
    upload_s: list[float] = []
    """Seconds of a batch, raw; none in reports from before it was measured."""
    cut_s: list[float] = []
    """Likewise; none where the loading processes cut the views."""
    decode: Pipeline
    views: Pipeline
    """Loading as adaptation does it, but for views that are cut on the model's device."""


class Scaled(BaseModel):
    """What so many devices like this one would reach, by arithmetic from the measured stages.

    Each takes its share of the same batch; all but the optimiser shrinks with it. What sums up
    gradients is left out.
    """

    geometry: str
    gpus: int
    images_per_s: float
    """What the devices would learn from."""
    workers: int
    """Loading processes a device that would keep up, each at the measured speed."""
    reached: float
    """Images a second, with no more loading processes than this machine has cores."""
    limited_by: str


class AdaptationReport(BaseModel):
    """Everything one run measured."""

    benchmark: Literal["adaptation"] = "adaptation"
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
    seconds: float
    environment: dict[str, Any]
    timed: dict[str, str] = TIMED
    cases: list[Case]
    limits: str = ""
    """What limits an adaptation, and the lever, a line a geometry; follows from the cases."""
    scaling: list[Scaled] = []
    """Likewise."""

    def model_post_init(self, context: Any) -> None:
        """Fill in what follows from the cases."""
        self.limits = "\n".join(_limit(self, case) for case in self.cases)
        self.scaling = [_scaled(self, case, gpus) for case in self.cases for gpus in GPUS]


def plain(report: AdaptationReport) -> str:
    """Return tables and limits for the terminal, in columns."""
    return document.plain(_tables(report), {"what limits it": report.limits.splitlines()})


def markdown(report: AdaptationReport) -> str:
    """Return tables, limits, what was timed, and the machine."""
    remarks = {
        "what limits it": report.limits.splitlines(),
        "what was timed": [f"{name}: {text}" for name, text in TIMED.items()],
        "the photos": [f"{name}: {value}" for name, value in report.photos.items()],
    }
    title = f"Adaptation on {report.device}, {report.precision}, {report.date}"
    machine = {"threads": report.threads, **report.environment}
    return document.markdown(title, _tables(report), remarks, machine)


def write_report(report: AdaptationReport, directory: Path) -> Path:
    """Write DATE-DEVICE-adapt-GEOMETRIES.json and .md; return the JSON's path."""
    geometries = slug(" ".join(case.geometry for case in report.cases))
    name = f"{report.date}-{slug(report.device)}-adapt-{geometries}"
    return document.write_files(directory, name, report.model_dump(), {".md": markdown(report)})


def limited_by(case: Case, workers: int) -> str:
    """Return what an adaptation waits for: DECODE, AUGMENTATION or MODEL.

    Processes load while the model learns, so the slower of both decides; without them the times of
    an image add up, and the longest decides.
    """
    load_s, model_s = 1 / case.views.images_per_s, 1 / _learnt(case)
    decode_s = 1 / case.decode.images_per_s
    data = {DECODE: decode_s, AUGMENTATION: load_s - decode_s}
    slowest = max(data, key=lambda name: data[name])
    return slowest if (load_s if workers else data[slowest]) > model_s else MODEL


def _learnt(case: Case, gpus: int = 1) -> float:
    """Return how many images a second devices learn from, with what they do before a step."""
    before_s = sum(median(taken) for taken in (case.upload_s, case.cut_s) if taken)
    alone_s = case.median_s[PRODUCT] * case.shares[OPTIMISER]
    return case.batch / (alone_s + (case.median_s[PRODUCT] - alone_s + before_s) / gpus)


def _scaled(report: AdaptationReport, case: Case, gpus: int) -> Scaled:
    learnt = _learnt(case, gpus)
    each = case.views.images_per_s / max(report.workers, 1)
    workers = math.ceil(learnt / each / gpus)
    loaded = each * report.environment.get("cores", 1)
    return Scaled(
        geometry=case.geometry,
        gpus=gpus,
        images_per_s=learnt,
        workers=workers,
        reached=min(learnt, loaded),
        limited_by="loading" if loaded < learnt else MODEL,
    )


def _limit(report: AdaptationReport, case: Case) -> str:
    limit, workers = limited_by(case, report.workers), report.workers
    loaded, learnt = case.views.images_per_s, _learnt(case)
    reached = min(loaded, learnt) if workers else 1 / (1 / loaded + 1 / learnt)
    return (
        f"{case.geometry}: {limit} limits an adaptation with --workers {workers}, which reaches at "
        f"most {digits(reached)} images a second. Lever: {_lever(report, case, limit)}"
    )


def _lever(report: AdaptationReport, case: Case, limit: str) -> str:
    if limit == MODEL:
        first = "a GPU" if report.device == "cpu" else "--set adapt.precision=bf16"
        share = percent(sum(case.shares.get(part, 0) for part in LABELLING))
        return f"{first}, a smaller backbone, or fewer crops (labelling takes {share} of the step)"
    needed = max(report.workers, 1) * _learnt(case) / case.views.images_per_s
    workers = (
        f"--workers {max(math.ceil(needed), report.workers + 1)}, which keeps up with the model if "
        f"as many cores are free (there are {report.environment.get('cores')})"
    )
    if limit == DECODE:  # crops take half of the short side and more: no pixel is made up
        return f"{workers}, or photos shrunk once to a short side of about {2 * case.side} px"
    if case.cut_s:
        return f"{workers}, or a pack, whose photos are reduced once"
    return f"{workers}, or fewer crops (--set views.crops=N)"


def _tables(report: AdaptationReport) -> dict[str, list[list[str]]]:
    steps = len(report.cases[0].samples_s[PRODUCT])
    what = (
        f"batch {report.batch}, {report.crops} crops, {report.precision}, {report.device}, "
        f"{'a step' if steps == 1 else f'{steps} steps'} a side"
    )
    return {
        f"training step: {what}": _step_rows(report),
        "the product's step, by part": _part_rows(report),
        f"images a second, loading with --workers {report.workers}": _pipeline_rows(report),
        f"by arithmetic, on several such devices and {report.environment.get('cores')} cores": (
            _scaling_rows(report)
        ),
    }


def _step_rows(report: AdaptationReport) -> list[list[str]]:
    """Return the ratio before the numbers; times are medians, fastest to slowest in brackets."""
    sides = list(report.cases[0].samples_s)
    units = ("images/s", "ms a step", "peak MiB")
    names = [f"{side} {unit}" for unit in units for side in sides]
    rows = [["geometry", "plain / product", *names]]
    for case in report.cases:
        cells = [case.geometry, "–" if case.ratio is None else f"{digits(case.ratio)}x"]
        cells += [digits(case.images_per_s[side]) for side in sides]
        cells += [_range(case.samples_s[side]) for side in sides]
        rows.append([*cells, *(f"{case.peak_mib[side]:.0f}" for side in sides)])
    return rows


def _range(samples_s: Sequence[float]) -> str:
    least, most = min(samples_s), max(samples_s)
    return f"{in_ms(median(samples_s))} ({in_ms(least)} to {in_ms(most)})"


def _part_rows(report: AdaptationReport) -> list[list[str]]:
    before = {UPLOAD: "upload_s", CUT: "cut_s"}
    rows = [["geometry", *report.cases[0].parts_s, *(f"{name}, before it" for name in before)]]
    for case in report.cases:
        cells = [
            f"{percent(case.shares[p])} ({in_ms(median(s))} ms)" for p, s in case.parts_s.items()
        ]
        taken = [getattr(case, samples) for samples in before.values()]
        others = [f"{in_ms(median(some))} ms" if some else "–" for some in taken]
        rows.append([case.geometry, *cells, *others])
    return rows


def _scaling_rows(report: AdaptationReport) -> list[list[str]]:
    names = ("GPUs", "images/s learnt", "--workers needed, each", "images/s reached", "limited by")
    rows = [["geometry", *names]]
    for scaled in report.scaling:
        numbers = (digits(scaled.images_per_s), str(scaled.workers), digits(scaled.reached))
        rows.append([scaled.geometry, str(scaled.gpus), *numbers, scaled.limited_by])
    return rows


def _pipeline_rows(report: AdaptationReport) -> list[list[str]]:
    loading = REDUCED if report.cases[0].cut_s else VIEWS
    rows = [["geometry", DECODE, loading, "product step", "limited by"]]
    for case in report.cases:
        speeds = (case.decode.images_per_s, case.views.images_per_s, case.images_per_s[PRODUCT])
        rows.append([case.geometry, *map(digits, speeds), limited_by(case, report.workers)])
    return rows
