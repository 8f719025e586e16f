"""`bench TARGET`: the latency of a model, where it goes, and what it is compared with."""

import datetime
import io
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

from microclip_deploy.bench.card import environment, gpu
from microclip_deploy.bench.latency import stages
from microclip_deploy.bench.latency.ceilings import cpu_ceilings, device_ceilings
from microclip_deploy.bench.latency.cold_start import cold_start
from microclip_deploy.bench.latency.contestants import (
    QUICK_PEERS,
    Answer,
    Contestants,
    contestants_of,
)
from microclip_deploy.bench.latency.device_time import split_time
from microclip_deploy.bench.latency.limits import require_comparable
from microclip_deploy.bench.latency.report import IMAGE_TO_LOGITS, JPEG_TO_LOGITS, Report, Row
from microclip_deploy.bench.latency.subject import Subject, subject_of
from microclip_deploy.bench.latency.windows import (
    Measured,
    Plan,
    Request,
    forgotten_synchronisation,
    measure,
)
from microclip_deploy.bench.memory import peak_rss_bytes
from microclip_deploy.bench.photos import decoded, made_up_jpegs
from microclip_deploy.bench.table_text import percent
from microclip_deploy.data.sources import check_images, list_images
from microclip_deploy.errors import MicroclipError, VerificationError, require
from microclip_deploy.serving import Session
from microclip_deploy.serving.exported import Precision

PHOTOS = 32
"""So many take part, of the user's as many as the largest batch."""

# Of logits, scale 100; int8 is held to its own proof's spirit: near, never equal.
_CLOSE: Mapping[str, float] = {"fp32": 1e-2, "fp16": 0.5, "bf16": 5.0, "int8": 5.0}

TIMED = {
    IMAGE_TO_LOGITS: "uint8 test views in an array in, logits in an array on the host out; "
    "decoding and resizing outside",
    JPEG_TO_LOGITS: "encoded photos in memory in, logits on the host out: decoding, resizing and "
    "the model, one after the other on one thread a request; a CUDA session resizes on the device",
    "cold start": "a new process: importing, opening the export on the device, its first and "
    "second request of one image",
    "host": "launching upload, encoder, kernels and download from pinned memory, without waiting",
    "device": "the same between two CUDA events, waiting for the host included",
}


@dataclass(frozen=True)
class LatencyRequest:
    """The options of `bench TARGET`."""

    target: str
    backends: tuple[str, ...] = ("onnx", "torch")
    device: str = "cpu"
    batches: tuple[int, ...] = (1, 8, 32)
    concurrency: tuple[int, ...] = (1,)
    """Requests under way at once."""
    plan: Plan = field(default_factory=Plan)
    """Its own number of clients is not used."""
    percentiles: tuple[float, ...] = (50.0, 90.0, 95.0, 99.0)
    baseline: Report | None = None
    """Of an earlier run, refused before measuring where nothing can be compared with it."""
    precision: Precision = "fp32"
    """Of the export that is written for a run or a geometry."""
    peers: tuple[str, ...] = QUICK_PEERS
    images: Path | None = None
    threads: int | None = None
    with_stages: bool = True


def run_latency_bench(request: LatencyRequest, notes: Console) -> Report:
    """Measure a target and its peers, taking turns.

    Raises:
        CheckpointError, DataError: the target or the images cannot be used.
        EnvironmentProblem: no backend works here.
        UsageError: the target is nothing that can be measured, or the baseline of another.
        VerificationError: a contestant gives other answers than the target.
    """
    start = time.perf_counter()
    machine = environment(_number(request.device))  # first: its load is that of others
    with subject_of(request.target, request.precision) as subject:
        photos = _photos(request, subject, notes)
        views = _views(subject, photos, max(request.batches))
        notes.print("opening the contestants")
        with contestants_of(
            subject, request.backends, request.peers, request.device, request.threads
        ) as found:
            _require_alike(found, views[: min(8, len(views))], subject)
            report = _report(request, subject, found, photos, machine)
            if request.baseline is not None:
                cases = set(product(request.batches, request.concurrency))
                require_comparable(report, request.baseline, cases)
            for batch in request.batches:
                report.rows += _rows(request, subject, found, views[:batch], photos, notes)
            with _or_absent(report, "memory"):
                report.memory |= _memory(report.device)
        if request.with_stages:
            notes.print("timing stages")
            with _or_absent(report, "stages"):
                _add_stages(report, request, subject, photos)
        notes.print("starting cold")
        with _or_absent(report, "cold start"):
            told = cold_start(subject.export, request.device, 1)
            report.memory["resident, fresh process, peak"] = int(told.pop("peak_rss_bytes"))
            report.cold_start = told
    report.environment_after = gpu(_number(request.device))
    report.seconds = time.perf_counter() - start
    return report


@contextmanager
def _or_absent(report: Report, name: str) -> Iterator[None]:
    """Keep what was measured before where one part cannot be."""
    try:
        yield
    except MicroclipError as problem:
        report.absent[name] = str(problem)


def _report(
    request: LatencyRequest,
    subject: Subject,
    found: Contestants,
    photos: Sequence[bytes],
    machine: dict[str, Any],
) -> Report:
    return Report(
        target=subject.name,
        artifact_sha256=subject.sha256,
        precision=subject.precision,
        device=request.device,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        subject=next(iter(found.answers)),
        rows=[],
        absent=found.absent,
        timed={**TIMED, **found.timed, **stages.TIMED},
        percentiles=list(request.percentiles),
        options={
            "threads": "one a core" if request.threads is None else str(request.threads),
            "warmup": f"{request.plan.warmup_s:g} s",
            "duration": f"{request.plan.duration_s:g} s",
            "until stable": percent(request.plan.stable),
            "photos": _told(photos, "made up" if request.images is None else "the user's"),
        },
        environment=machine,
    )


def _photos(request: LatencyRequest, subject: Subject, notes: Console) -> list[bytes]:
    """Return encoded photos: the user's files as they are, or made-up ones as JPEG."""
    if request.images is None:
        return made_up_jpegs(PHOTOS, subject.preprocess.size)
    listed = list_images(request.images)
    few = listed.paths[: max(PHOTOS, *request.batches)]
    checked = check_images(few, max_bad="100%")
    for path, why in checked.bad:
        notes.print(f"skipped {path}: {why}", markup=False)
    return [path.read_bytes() for path in checked.good]


def _told(photos: Sequence[bytes], source: str) -> str:
    """Say how large the photos are, which decides what decoding costs."""
    sides = [min(Image.open(io.BytesIO(photo)).size) for photo in photos]
    kib = float(np.median([len(photo) for photo in photos])) / 1024
    return (
        f"{len(photos)} {source}, median short side {np.median(sides):.0f} px, median {kib:.0f} KiB"
    )


def _views(subject: Subject, photos: Sequence[bytes], largest: int) -> NDArray[np.uint8]:
    """Return test views for the largest batch; photos come again where there are too few."""
    made = np.stack([subject.preprocess.test_view(photo) for photo in decoded(photos)])
    return made[np.arange(largest) % len(made)]


def _require_alike(found: Contestants, views: NDArray[np.uint8], subject: Subject) -> None:
    """Time nobody who answers something else: the median image's logits must be the target's.

    Those of plain CLIP, which are others by nature, must be those of the model's [CLS] alone.
    """
    answers = {name: answer(views) for name, answer in found.answers.items()}
    ours = next(iter(answers.values()))
    clips = _cls_logits(subject, views) if any(map(_is_plain_clip, answers)) else ours
    for name, logits in answers.items():
        plain_clip = _is_plain_clip(name)
        whose = "[CLS] alone" if plain_clip else "the target"
        expected = clips if plain_clip else ours
        precision = "fp32" if plain_clip else "int8" if "int8" in name else subject.precision
        limit = _CLOSE[precision]
        # The median: a mask near a threshold may move the logits of single images.
        apart = float(np.median(np.abs(logits - expected).max(axis=1)))
        if not apart <= limit:
            raise VerificationError(
                f"{name}: expected logits within {limit} of those of {whose}, found {apart:.3g}; "
                "its time would compare different things"
            )


def _is_plain_clip(name: str) -> bool:
    return name.startswith("CLIP ")


def _cls_logits(subject: Subject, views: NDArray[np.uint8]) -> NDArray[np.float32]:
    import torch

    from microclip_deploy.head import LOGIT_SCALE

    model = subject.model
    assert model is not None  # plain CLIP is made of it
    with torch.inference_mode():
        cls = model.encode_cls(subject.preprocess.normalize(torch.from_numpy(views)))
        logits: NDArray[np.float32] = (LOGIT_SCALE * cls @ model.class_matrix().T).numpy()
    return logits


def _rows(
    request: LatencyRequest,
    subject: Subject,
    found: Contestants,
    views: NDArray[np.uint8],
    photos: Sequence[bytes],
    notes: Console,
) -> list[Row]:
    """Measure everyone at one batch size, and the target from encoded photos."""
    batch = len(views)
    notes.print(f"batch {batch}: {', '.join(found.answers)}")
    name, session = next(iter(found.sessions.items()))
    requests = {each: _bound(run, views) for each, run in found.answers.items()}
    encoded = [photos[number % len(photos)] for number in range(batch)]
    whole = {name: _from_photos(session, encoded)}
    rows = []
    for clients in request.concurrency:
        plan = request.plan._replace(concurrency=clients)
        for scope, asked in ((IMAGE_TO_LOGITS, requests), (JPEG_TO_LOGITS, whole)):
            measured = measure(asked, plan)
            rows += [_row(each, scope, batch, clients, taken) for each, taken in measured.items()]
    for row in rows:
        if row.scope == IMAGE_TO_LOGITS and row.concurrency == request.concurrency[0]:
            _add_split(row, found, views)
    return rows


def _add_split(row: Row, found: Contestants, views: NDArray[np.uint8]) -> None:
    """Measure host and device by themselves, and warn where they contradict the wall clock."""
    session = found.sessions.get(row.contestant)
    split = None if session is None else split_time(session, views)
    if split is not None:
        row.host_s, row.device_s = split
        told = forgotten_synchronisation(row.percentile(50), float(np.median(split.device)))
        row.warnings += [told] if told else []


def _bound(run: Answer, views: NDArray[np.uint8]) -> Request:
    return lambda: run(views)


def _from_photos(session: Session, encoded: Sequence[bytes]) -> Request:
    """Return a request as a server takes it."""
    return lambda: session.predict_photos(decoded(encoded))


def _row(name: str, scope: str, batch: int, clients: int, measured: Measured) -> Row:
    return Row(
        contestant=name,
        scope=scope,
        batch=batch,
        concurrency=clients,
        samples_s=measured.samples_s.tolist(),
        images_per_s=batch * measured.requests_per_s,
        stable=measured.stable,
        spread=measured.spread,
    )


def _add_stages(
    report: Report, request: LatencyRequest, subject: Subject, photos: Sequence[bytes]
) -> None:
    if request.device == "cpu":
        report.ceilings = cpu_ceilings(request.threads)
    else:
        report.ceilings = device_ceilings(subject.precision, request.device)
    report.stages = stages.measure_stages(
        stages.StageRequest(
            export=subject.export,
            photos=photos,
            batches=request.batches,
            device=request.device,
            threads=request.threads,
        ),
        report.ceilings,
    )


def _memory(device: str) -> dict[str, int]:
    """Return the most memory of this process, which holds all contestants, and of the device."""
    peak = {"resident, this process with all contestants, peak": peak_rss_bytes()}
    if device.startswith("cuda"):
        require("cupy", "gpu")
        import cupy

        with cupy.cuda.Device(_number(device)):
            free, total = cupy.cuda.runtime.memGetInfo()
        peak["device, all that is in use"] = total - free
    return peak


def _number(device: str) -> int:
    """Return N of "cuda:N", 0 without it."""
    return int(device.partition(":")[2] or 0)
