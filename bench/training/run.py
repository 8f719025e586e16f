"""`microclip-deploy bench adapt`: what an adaptation waits for, against the plain algorithm.

One run measures, at the geometry of well-known models with random weights, a training step of the
product and of the plain specified algorithm (training_step.py), and the data pipeline alone with
adaptation's own loader. Both together say which of decoding, augmentation and the model limits an
adaptation on this machine.
"""

import gc
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle, islice, pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import open_clip
import torch
from rich.console import Console
from torch.utils.data import DataLoader, Dataset

from microclip_deploy.adapt.loader import AdaptImages
from microclip_deploy.adapt.views import ViewConfig
from microclip_deploy.bench.card import environment
from microclip_deploy.bench.geometry import TINY
from microclip_deploy.bench.photos import SIDE, made_up_jpegs
from microclip_deploy.bench.training.report import AdaptationReport, Case, Pipeline
from microclip_deploy.bench.training.step import (
    PLAIN,
    PRODUCT,
    StepTimes,
    Work,
    measure_steps,
    peak_memory_mib,
)
from microclip_deploy.data.decode import read_image
from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.data.sources import check_images, list_images
from microclip_deploy.errors import EnvironmentProblem, UsageError, printable
from microclip_deploy.serving.torch_session import resolve_device

MADE_UP = 32
MOST_PHOTOS = 64
"""Of the user's photos, spread over all of them."""


class AdaptationRequest(NamedTuple):
    """What is measured."""

    geometries: tuple[str, ...] = ("ViT-B-32",)
    """open_clip model names, or "tiny"."""
    batch: int = 16
    crops: int = 8
    repeats: int = 5
    """Timed steps a side, and timed rounds of the pipeline."""
    workers: int = 0
    """Image loading processes; 0 loads in this one."""
    device: str = "cpu"
    """"cpu", "cuda" or "auto"."""
    plain: bool = True
    """Measure the plain algorithm too."""
    photos: Path | None = None
    """A folder, a list or an image; None: made-up JPEG photos."""


def run_adaptation_bench(request: AdaptationRequest, notes: Console) -> AdaptationReport:
    """Measure everything that was asked for.

    Raises:
        DataError: none of the photos can be used.
        EnvironmentProblem: no such device, or its memory does not suffice.
        UsageError: a number or model that cannot be measured.
        VerificationError: product and plain algorithm compute different losses.
    """
    _require_possible(request)
    machine = environment()  # first: its load is that of others
    device, start = resolve_device(request.device), time.monotonic()
    with _photos(request.photos) as (source, photos):
        facts = _photo_facts(source, photos)
        cases = [_measure_case(name, request, device, photos, notes) for name in request.geometries]
    return AdaptationReport(
        date=time.strftime("%Y-%m-%d"),
        device=torch.cuda.get_device_name() if device == "cuda" else device,
        precision="fp32",
        batch=request.batch,
        crops=request.crops,
        workers=request.workers,
        threads=torch.get_num_threads(),
        photos=facts,
        cases=cases,
        seconds=round(time.monotonic() - start, 1),
        environment=machine,
    )


def measure_pipeline(
    request: AdaptationRequest, photos: Sequence[Path], preprocess: Preprocess
) -> tuple[Pipeline, Pipeline]:
    """Measure loading with nobody else at work: decoding alone, and decoding with all views."""
    at_once = max(request.workers, 1)
    count = request.batch * at_once * (request.repeats + 1)  # the first round starts processes
    paths = list(islice(cycle(photos), count))
    images = AdaptImages(paths, preprocess, ViewConfig(crops=request.crops), seed=0)
    batches = images.epoch(0, request.batch, workers=request.workers)
    views = _rounds(batches, at_once)
    decoded = _rounds(_decoded(paths, request.batch, request.workers), at_once)
    size = request.batch * at_once
    return Pipeline(size, decoded), Pipeline(size, views)


def _require_possible(request: AdaptationRequest) -> None:
    if request.device not in ("cpu", "cuda", "auto"):
        raise UsageError(f"--device: expected cpu, cuda or auto, found '{request.device}'")
    least = {"batch": 1, "crops": 1, "repeats": 1, "workers": 0}
    for name, value in request._asdict().items():
        if name in least and value < least[name]:
            raise UsageError(f"--{name}: expected {least[name]} or more, found {value}")
    if request.crops > 64:
        raise UsageError(f"--crops: expected at most 64, found {request.crops}")
    unknown = [name for name in request.geometries if name not in (TINY, *open_clip.list_models())]
    if unknown or not request.geometries:
        raise UsageError(
            f"--geometry: expected open_clip model names such as ViT-B-32, found "
            f"{', '.join(map(printable, unknown)) or 'none'}"
        )


def _measure_case(
    name: str, request: AdaptationRequest, device: str, photos: Sequence[Path], notes: Console
) -> Case:
    work = Work(name, request.batch, request.crops, device)
    sides = [PRODUCT, PLAIN] if request.plain else [PRODUCT]
    notes.print(f"{name}: training steps")
    times = _steps(work, sides, request.repeats)
    notes.print(f"{name}: peak memory, in fresh processes")
    peaks = {side: peak_memory_mib(work, side) for side in sides}
    notes.print(f"{name}: loading, {request.workers} workers")
    decode, views = measure_pipeline(request, photos, times.preprocess)
    return Case(
        geometry=name,
        side=times.preprocess.size,
        batch=request.batch,
        samples_s=times.samples_s,
        parts_s=times.parts_s,
        losses=times.losses,
        peak_mib=peaks,
        decode=decode,
        views=views,
    )


def _steps(work: Work, sides: Sequence[str], repeats: int) -> StepTimes:
    try:
        return measure_steps(work, sides, repeats)
    except torch.cuda.OutOfMemoryError as error:
        raise EnvironmentProblem(
            f"{work.geometry}: the GPU is out of memory; use a smaller --batch-size or fewer "
            "--crops"
        ) from error
    finally:
        if work.device == "cuda":  # the next fresh process needs the memory
            gc.collect()
            torch.cuda.empty_cache()


@contextmanager
def _photos(source: Path | None) -> Iterator[tuple[str, tuple[Path, ...]]]:
    """Yield a name and the files of photos that can be read."""
    if source is not None:
        listed = list_images(source).paths
        chosen = listed[:: -(-len(listed) // MOST_PHOTOS)]
        yield printable(source.resolve().name), check_images(chosen, max_bad=len(chosen)).good
        return
    with tempfile.TemporaryDirectory(prefix="microclip-bench-") as folder:
        paths = tuple(Path(folder) / f"{number:02}.jpg" for number in range(MADE_UP))
        for path, photo in zip(paths, made_up_jpegs(MADE_UP, SIDE), strict=True):
            path.write_bytes(photo)
        yield "made-up JPEG photos", paths


def _photo_facts(source: str, photos: Sequence[Path]) -> dict[str, Any]:
    return {
        "source": source,
        "count": len(photos),
        "median_short_side_px": median(min(read_image(path).size) for path in photos),
        "median_kib": round(median(os.path.getsize(path) for path in photos) / 1024, 1),
    }


def _rounds(batches: Iterable[object], at_once: int) -> list[float]:
    """Return seconds of each round of `at_once` batches, but for the first."""
    ends = [time.perf_counter() for number, _ in enumerate(batches, 1) if number % at_once == 0]
    return [end - start for start, end in pairwise(ends)]


class _Decoded(Dataset[int]):
    """Images that are decoded and dropped: pixels are not sent between processes."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._files = [str(path) for path in paths]

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> int:
        return read_image(self._files[index]).width


def _decoded(paths: Sequence[Path], batch: int, workers: int) -> Iterable[int]:
    """Return a loader of adaptation's kind that only decodes."""
    # Started as adaptation starts its own: from the clean server process that is there by now.
    known = "forkserver" in multiprocessing.get_all_start_methods()
    return DataLoader(
        _Decoded(paths),
        batch_size=batch,
        num_workers=workers,
        collate_fn=len,
        multiprocessing_context=("forkserver" if known else "spawn") if workers else None,
        generator=torch.Generator(),  # leaves the global one alone
    )
