"""`microclip-deploy bench adapt`: what an adaptation waits for, against the plain algorithm.

One run measures, at the geometry of well-known models with random weights, a training step of the
product and of the plain specified algorithm (step.py), and the data pipeline alone with
adaptation's own loader. Both together say which of decoding, augmentation and the model limits an
adaptation on this machine.
"""

import gc
import multiprocessing
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import cycle, islice, pairwise
from pathlib import Path
from statistics import median
from typing import Any

import open_clip
import torch
from rich.console import Console
from torch.utils.data import DataLoader

from microclip_deploy.adapt.loader import AdaptImages
from microclip_deploy.adapt.views import ViewConfig
from microclip_deploy.bench.card import environment
from microclip_deploy.bench.geometry import TINY, random_geometry
from microclip_deploy.bench.photos import SIDE, encoded, made_up_jpegs
from microclip_deploy.bench.training.report import (
    PLAIN,
    PRODUCT,
    AdaptationReport,
    Case,
    Pipeline,
)
from microclip_deploy.bench.training.step import (
    Work,
    measure_before,
    measure_steps,
    peak_memory_mib,
)
from microclip_deploy.console import tell_left_out, tell_skipped, tell_warnings
from microclip_deploy.data.decode import read_photo
from microclip_deploy.data.photo import PhotoConfig
from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.data.sources import check_images, list_images
from microclip_deploy.errors import EnvironmentProblem, UsageError, printable
from microclip_deploy.serving.torch_session import resolve_device

MADE_UP = 32
MOST_PHOTOS = 64
"""Of the user's photos, spread over all of them."""


def run_adaptation_bench(
    geometries: Sequence[str],
    notes: Console,
    *,
    batch: int,
    crops: int,
    repeats: int,
    workers: int,
    device: str,
    plain: bool,
    images: Path | None,
    max_pixels: int | None = None,
    bit_depth: int | None = None,
    views_there: bool = False,
) -> AdaptationReport:
    """Measure everything that was asked for.

    Args:
        geometries: open_clip model names, or "tiny".
        notes: gets a line a measurement.
        batch: images a step.
        crops: of each image, for the multi-view prior.
        repeats: timed steps a side, and timed rounds of the pipeline.
        workers: image loading processes; 0 loads in this one.
        device: "cpu", "cuda" or "auto".
        plain: measure the plain algorithm too.
        images: a folder, a list or an image; None: made-up JPEG photos.
        max_pixels: as in `PhotoConfig`.
        bit_depth: likewise.
        views_there: cut views on the device; False: in the loading processes.

    Raises:
        DataError: none of the photos can be used.
        EnvironmentProblem: no such device, or its memory does not suffice.
        UsageError: a device or model that cannot be measured.
        VerificationError: product and plain algorithm compute different losses.
    """
    if device not in ("cpu", "cuda", "auto"):
        raise UsageError(f"--device: expected cpu, cuda or auto, found '{device}'")
    views = ViewConfig(crops=crops, device="model" if views_there else "cpu")
    known = {TINY, *open_clip.list_models()}
    unknown = [printable(name) for name in geometries if name not in known]
    if unknown:
        raise UsageError(
            f"--geometry: expected open_clip model names such as ViT-B-32, found "
            f"{', '.join(unknown)}"
        )
    machine = environment()  # first: its load is that of others
    device, start = resolve_device(device), time.monotonic()
    sides = [PRODUCT, PLAIN] if plain else [PRODUCT]
    config = PhotoConfig.of(max_pixels=max_pixels, bit_depth=bit_depth)
    with _photos(images, config, notes) as (photos, left_out):
        facts = {**_photo_facts(images, photos, config), "left_out": left_out or "nothing"}
        cases = [
            _measure_case(
                Work(name, batch, crops, device),
                photos,
                config,
                views,
                notes,
                sides,
                repeats,
                workers,
            )
            for name in geometries
        ]
    return AdaptationReport(
        date=time.strftime("%Y-%m-%d"),
        device=torch.cuda.get_device_name() if device == "cuda" else device,
        precision="fp32",
        batch=batch,
        crops=crops,
        workers=workers,
        threads=torch.get_num_threads(),
        photos=facts,
        seconds=round(time.monotonic() - start, 1),
        environment=machine,
        cases=cases,
    )


def measure_loading(images: AdaptImages, batch: int, *, workers: int) -> tuple[Pipeline, Pipeline]:
    """Measure loading with nobody else at work: decoding alone, and what adaptation's own does."""
    at_once = max(workers, 1)
    order = images.order(0).tolist()
    batches = [order[begin : begin + batch] for begin in range(0, len(order), batch)]
    views = _rounds(images.loaded(0, batches, workers), at_once)
    # Started as adaptation starts its own: from the clean server process that is there by now.
    known = "forkserver" in multiprocessing.get_all_start_methods()
    only_decoded: DataLoader[str] = DataLoader(
        [str(path) for path in images.paths],  # type: ignore[arg-type]  # all a Dataset needs
        batch_size=batch,
        num_workers=workers,
        collate_fn=partial(_decode, images.preprocess),
        multiprocessing_context=("forkserver" if known else "spawn") if workers else None,
        generator=torch.Generator(),  # leaves the global one alone
    )
    decoded, size = _rounds(only_decoded, at_once), batch * at_once
    return Pipeline(images=size, samples_s=decoded), Pipeline(images=size, samples_s=views)


def _decode(preprocess: Preprocess, files: Sequence[str]) -> int:
    """Decode images and drop them: pixels are not sent between processes."""
    return sum(preprocess.read(file).width for file in files)


def _rounds(batches: Iterable[object], at_once: int) -> list[float]:
    """Return seconds of each round of `at_once` batches, but for the first."""
    ends = [time.perf_counter() for number, _ in enumerate(batches, 1) if number % at_once == 0]
    return [end - start for start, end in pairwise(ends)]


def _measure_case(
    work: Work,
    photos: Sequence[Path],
    config: PhotoConfig,
    views: ViewConfig,
    notes: Console,
    sides: Sequence[str],
    repeats: int,
    workers: int,
) -> Case:
    name, geometry = work.geometry, random_geometry(work.geometry)
    preprocess = geometry.preprocess.model_copy(update={"photos": config})
    count = work.batch * max(workers, 1) * (repeats + 1)  # the first round starts processes
    images = AdaptImages(list(islice(cycle(photos), count)), preprocess, views, seed=0)
    notes.print(f"{name}: training steps")
    try:
        steps = measure_steps(geometry, work, sides, repeats)
        upload_s, cut_s = measure_before(work, images, repeats)
    except torch.cuda.OutOfMemoryError as error:
        raise EnvironmentProblem(
            f"{name}: the GPU is out of memory; use a smaller --batch-size or fewer --crops"
        ) from error
    if work.device == "cuda":  # the next fresh process needs the memory
        gc.collect()
        torch.cuda.empty_cache()
    notes.print(f"{name}: peak memory, in fresh processes")
    peaks = {side: peak_memory_mib(work, side) for side in sides}
    notes.print(f"{name}: loading, {workers} workers")
    decode, loaded = measure_loading(images, work.batch, workers=workers)
    return Case(
        geometry=name,
        side=preprocess.size,
        **steps.model_dump(),
        peak_mib=peaks,
        upload_s=upload_s,
        cut_s=cut_s,
        decode=decode,
        views=loaded,
    )


@contextmanager
def _photos(
    source: Path | None, config: PhotoConfig, notes: Console
) -> Iterator[tuple[Sequence[Path], str]]:
    """Yield the files of photos that can be read, and what a search left out."""
    if source is not None:
        found = list_images(source)
        listed, left_out = found.paths, found.left_out.summary()
        tell_left_out(left_out, notes)
        chosen = listed[:: -(-len(listed) // MOST_PHOTOS)]
        checked = check_images(chosen, config, max_bad=len(chosen))
        tell_skipped(checked.bad, notes)
        tell_warnings(checked.remarks, notes)
        yield checked.good, left_out
        return
    with tempfile.TemporaryDirectory(prefix="microclip-bench-") as folder:
        paths = tuple(Path(folder) / f"{number:02}.jpg" for number in range(MADE_UP))
        for path, photo in zip(paths, made_up_jpegs(MADE_UP, SIDE), strict=True):
            path.write_bytes(photo)
        yield paths, ""


def _photo_facts(
    source: Path | None, photos: Sequence[Path], config: PhotoConfig
) -> dict[str, Any]:
    return {
        "source": printable(source.resolve().name) if source else "made-up JPEG photos",
        "count": len(photos),
        "median_short_side_px": median(min(read_photo(path, config).image.size) for path in photos),
        "median_kib": round(median(len(encoded(path, config)) for path in photos) / 1024, 1),
    }
