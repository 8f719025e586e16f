"""`bench TARGET`: the latency of a model, where it goes, and what it is compared with."""

import datetime
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
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
from microclip_deploy.bench.latency.contestants import Contestants, contestants_of, require_alike
from microclip_deploy.bench.latency.device_time import with_split
from microclip_deploy.bench.latency.limits import require_comparable
from microclip_deploy.bench.latency.report import (
    IMAGE_TO_LOGITS,
    JPEG_TO_LOGITS,
    Case,
    Report,
    Row,
)
from microclip_deploy.bench.latency.subject import Subject, subject_of
from microclip_deploy.bench.latency.windows import Measured, Plan, Request, measure
from microclip_deploy.bench.memory import peak_rss_bytes
from microclip_deploy.bench.photos import decoded, described, encoded_photos
from microclip_deploy.bench.table_text import percent
from microclip_deploy.data.photo import PhotoConfig
from microclip_deploy.errors import MicroclipError, require
from microclip_deploy.serving import Session
from microclip_deploy.serving.exported import Precision

PHOTOS = 32
"""So many take part, of the user's as many as the largest batch."""

TIMED = {
    IMAGE_TO_LOGITS: "uint8 test views in an array in, logits in an array on the host out; "
    "decoding and resizing outside",
    JPEG_TO_LOGITS: "encoded photos in memory in, logits on the host out: decoding, resizing and "
    "the model, one after the other on one thread a request; a CUDA session resizes on the device",
    "cold start": "a new process: importing, opening the export on the device, its first and "
    "second request of one image",
    "host": "launching upload, encoder, kernels and download from pinned memory, without waiting; "
    "ONNX Runtime waits for its encoder",
    "device": "the same between two CUDA events, waiting for the host included",
}


def run_latency_bench(
    target: str,
    notes: Console,
    *,
    backends: Sequence[str],
    peers: Sequence[str],
    batches: Sequence[int],
    concurrency: Sequence[int],
    plan: Plan,
    device: str = "cpu",
    precision: Precision = "fp32",
    threads: int | None = None,
    images: Path | None = None,
    max_pixels: int | None = None,
    bit_depth: int | None = None,
    with_stages: bool = True,
    baseline: Report | None = None,
) -> Report:
    """Measure a target and its peers, taking turns.

    Args:
        target: directory of a run or an export, or an open_clip model name for random weights.
        notes: where progress is told.
        backends: of `contestants.BACKENDS`.
        peers: of `contestants.PEERS`.
        batches: images a request.
        concurrency: requests under way at once.
        plan: how long, and how steady.
        device: "cpu", "cuda" or "cuda:N".
        precision: of the export that is written for a run or a model name.
        threads: of one operator on a CPU; None for one a core.
        images: folder or list of photos; None for made-up ones.
        max_pixels: as in `PhotoConfig`, in place of the run's.
        bit_depth: likewise.
        with_stages: time each stage by itself too.
        baseline: an earlier report, refused before measuring where nothing can be compared with it.

    Raises:
        CheckpointError, DataError: the target or the images cannot be used.
        EnvironmentProblem: no backend works here.
        UsageError: the target is nothing that can be measured, or the baseline of another.
        VerificationError: a contestant gives other answers than the target.
    """
    start, machine = time.perf_counter(), environment(_number(device))  # its load is of others
    with subject_of(target, precision) as opened:
        reading = opened.preprocess.reading(max_pixels=max_pixels, bit_depth=bit_depth)
        subject = opened._replace(preprocess=reading)
        most, side = max(PHOTOS, *batches), reading.size
        photos, source = encoded_photos(images, side, PHOTOS, most, reading.photos, notes)
        options = _options(plan, threads, decoded(photos, reading.photos), photos, source)
        notes.print("opening the contestants")
        with contestants_of(subject, backends, peers, device, threads) as contestants:
            if baseline is not None:
                cases, ours = set(product(batches, concurrency)), contestants.ours
                require_comparable(baseline, subject.name, subject.precision, ours, cases)
            rows = _rows(contestants, photos, batches, concurrency, plan, notes)
            report = _report(contestants, rows, machine, options)
            report = _or_absent(report, "memory", partial(_with_memory, report))
        if with_stages:
            notes.print("timing stages")
            add = partial(_with_stages, report, subject, photos, batches, threads)
            report = _or_absent(report, "stages", add)
        notes.print("starting cold")
        report = _or_absent(report, "cold start", partial(_with_cold_start, report, subject))
    seconds = time.perf_counter() - start
    return replace(report, environment_after=gpu(_number(device)), seconds=seconds)


def _or_absent(report: Report, name: str, add: Callable[[], Report]) -> Report:
    """Add a part to what was measured before, or say why it cannot be."""
    try:
        return add()
    except MicroclipError as problem:
        return replace(report, absent={**report.absent, name: str(problem)})


def _report(
    contestants: Contestants, rows: list[Row], machine: dict[str, Any], options: dict[str, str]
) -> Report:
    subject = contestants.subject
    return Report(
        target=subject.name,
        artifact_sha256=subject.sha256,
        precision=subject.precision,
        device=contestants.device,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        subject=contestants.ours,
        rows=rows,
        absent=contestants.absent,
        timed={**TIMED, **contestants.timed, **stages.TIMED},
        options=options,
        environment=machine,
    )


def _options(
    plan: Plan,
    threads: int | None,
    photos: Sequence[Image.Image],
    encoded: Sequence[bytes],
    source: str,
) -> dict[str, str]:
    """Say how it was measured."""
    return {
        "threads": "one a core" if threads is None else str(threads),
        "warmup": f"{plan.warmup_s:g} s",
        "duration": f"{plan.duration_s:g} s",
        "until stable": percent(plan.stable),
        "photos": described(encoded, [min(photo.size) for photo in photos], source),
    }


def _views(subject: Subject, photos: Sequence[bytes], count: int) -> NDArray[np.uint8]:
    """Return test views; photos come again where there are too few."""
    preprocess = subject.preprocess
    made = np.stack([preprocess.test_view(each) for each in decoded(photos, preprocess.photos)])
    return made[np.arange(count) % len(made)]


def _rows(
    contestants: Contestants,
    photos: Sequence[bytes],
    batches: Sequence[int],
    concurrency: Sequence[int],
    plan: Plan,
    notes: Console,
) -> list[Row]:
    """Measure everyone, once all give the right answers, and the target from encoded photos too."""
    views = _views(contestants.subject, photos, max(batches))
    require_alike(contestants, views[:8])
    ours, rows = contestants.ours, []
    reading = contestants.subject.preprocess.photos
    for batch in batches:
        notes.print(f"batch {batch}: {', '.join(contestants.answers)}")
        encoded = [photos[number % len(photos)] for number in range(batch)]
        requests: dict[str, dict[str, Request]] = {
            IMAGE_TO_LOGITS: {
                name: partial(answer, views[:batch]) for name, answer in contestants.answers.items()
            },
            JPEG_TO_LOGITS: {ours: _from_photos(contestants.sessions[ours], encoded, reading)},
        }
        for clients, scope in product(concurrency, requests):
            for name, measured in measure(requests[scope], plan, clients).items():
                row = _row(name, Case(scope, batch, clients), measured)
                if scope == IMAGE_TO_LOGITS and clients == concurrency[0]:
                    row = with_split(row, contestants.sessions.get(name), views[:batch])
                rows.append(row)
    return rows


def _from_photos(session: Session, encoded: Sequence[bytes], config: PhotoConfig) -> Request:
    """Return a request as a server takes it."""
    return lambda: session.predict_photos(decoded(encoded, config))


def _row(name: str, case: Case, measured: Measured) -> Row:
    return Row(
        contestant=name,
        **case._asdict(),
        samples_s=measured.samples_s.tolist(),
        images_per_s=case.batch * measured.requests_per_s,
        stable=measured.stable,
        spread=measured.spread,
    )


def _with_memory(report: Report) -> Report:
    """Add the most memory of this process, which holds all contestants, and of the device."""
    memory = {"resident, this process with all contestants, peak": peak_rss_bytes()}
    if report.device.startswith("cuda"):
        cupy = require("cupy", "gpu")
        with cupy.cuda.Device(_number(report.device)):
            free, total = cupy.cuda.runtime.memGetInfo()
        memory["device, all that is in use"] = total - free
    return replace(report, memory=memory)


def _with_stages(
    report: Report,
    subject: Subject,
    photos: Sequence[bytes],
    batches: Sequence[int],
    threads: int | None,
) -> Report:
    cpu = report.device == "cpu"
    rates = cpu_ceilings(threads) if cpu else device_ceilings(subject.precision, report.device)
    rows = stages.measure_stages(
        subject.export,
        photos,
        batches,
        rates,
        device=report.device,
        threads=threads,
        config=subject.preprocess.photos,
    )
    return replace(report, ceilings=rates, stages=rows)


def _with_cold_start(report: Report, subject: Subject) -> Report:
    times = cold_start(subject.export, report.device, 1)
    resident = {"resident, fresh process, peak": int(times.pop("peak_rss_bytes"))}
    return replace(report, cold_start=times, memory=report.memory | resident)


def _number(device: str) -> int:
    """Return N of "cuda:N", 0 without it."""
    return int(device.partition(":")[2] or 0)
