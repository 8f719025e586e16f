"""Where the time of a request goes: each stage by itself, and the floor under it.

On a CPU the stages are graphs of their own, which run on what the stage before them answered. On a
CUDA device they are the launches of the session, each between two events. Stages that are timed
alone add up to a little more or less than the whole; the report says how much. Work is counted in
the exported graphs, but for K1 on a device, whose kernel does half of it.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from microclip_deploy.bench.kernel.report import affinity_work
from microclip_deploy.bench.latency.device_time import time_stages
from microclip_deploy.bench.latency.graph_parts import Part, Work, open_parts
from microclip_deploy.bench.latency.report import COPY, PRODUCT, Stage, StageRow
from microclip_deploy.bench.latency.windows import repeated
from microclip_deploy.bench.photos import decoded
from microclip_deploy.calibration import softmax
from microclip_deploy.data.photo import USUAL, PhotoConfig
from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.serving import open_session
from microclip_deploy.serving.exported import BACKBONE as BACKBONE_FILE
from microclip_deploy.serving.exported import Export, read_export

TIMED: Mapping[str, str] = {
    Stage.DECODE: "encoded photos in memory -> RGB images, one after the other",
    Stage.PREPROCESS: "images -> test views: resizing and cropping in Pillow, one after the other; "
    "on a CUDA device with the upload of the images",
    Stage.H2D: "views from pinned memory to the device",
    Stage.BACKBONE: "views -> [CLS] embedding and patch tokens",
    Stage.K1: "tokens -> edges of the graph",
    Stage.K2: "edges -> mask: the normalised cut",
    Stage.SALIENCY: "tokens -> mask, where the graph does not tell K1 from K2",
    Stage.HEAD: "tokens and mask -> [FG], fused logits, attention",
    Stage.D2H: "answers from the device to pinned memory",
    Stage.POST: "logits -> probabilities and the best five classes",
}

_BEST = 5
BUDGET_S, FEWEST, MOST = 1.0, 9, 200
"""Of a stage: seconds, and samples whatever they take."""


def measure_stages(
    directory: Path,
    photos: Sequence[bytes],
    batches: Sequence[int],
    ceilings: Mapping[str, float] | None,
    *,
    device: str,
    threads: int | None,
    config: PhotoConfig = USUAL,
) -> list[StageRow]:
    """Time every stage at every batch size, one after the other.

    Args:
        directory: an export.
        photos: encoded; they come again where a batch holds more.
        batches: images each.
        ceilings: rates of this machine, for the floors; None for no floors.
        device: "cpu", "cuda" or "cuda:N".
        threads: of one operator on a CPU; None for one a core.
        config: how the photos are read.

    Raises:
        CheckpointError: the export cannot be used.
        EnvironmentProblem: the device or a package is missing.
    """
    export, rows = read_export(directory), []
    with TemporaryDirectory(prefix="microclip-bench-") as folder:
        parts = open_parts(directory, Path(folder), threads)
        for batch in batches:
            work: Mapping[Stage, Work] = {
                part.stage: part.work(batch, len(export.classifier)) for part in parts
            }
            encoded = [photos[number % len(photos)] for number in range(batch)]
            if device == "cpu":
                samples = _on_cpu(export, parts, encoded, config)
            else:
                samples = _on_device(export, device, encoded, config)
                work = _device_work(export, work, batch)
            for stage in (stage for stage in Stage if stage in samples):
                flop, moved = work.get(stage, (None, None))
                rows.append(
                    StageRow(
                        stage=stage,
                        batch=batch,
                        samples_s=samples[stage],
                        flop=flop,
                        bytes=moved,
                        floor_s=floor_s(flop, moved, ceilings),
                    )
                )
    return rows


def floor_s(
    flop: int | None, moved_bytes: int | None, ceilings: Mapping[str, float] | None
) -> float | None:
    """Return the seconds that work needs at least: the longer of arithmetic and memory traffic.

    None where one of them is not known.
    """
    if flop is None or moved_bytes is None or ceilings is None:
        return None
    return max(flop / ceilings[PRODUCT], moved_bytes / ceilings[COPY])


def _on_cpu(
    export: Export, parts: Sequence[Part], encoded: Sequence[bytes], config: PhotoConfig
) -> dict[Stage, list[float]]:
    """Return seconds of each stage; each graph runs on what those before it answered."""
    photos, preprocess = decoded(encoded, config), export.manifest.preprocess
    values: dict[str, NDArray[Any]] = {
        "image": _views(photos, preprocess),
        "classifier": export.classifier,
    }
    samples = {
        Stage.DECODE: _samples(partial(decoded, encoded, config)),
        Stage.PREPROCESS: _samples(partial(_views, photos, preprocess)),
    }
    for part in parts:
        samples[part.stage] = _samples(partial(part.run, values))
        values |= part.run(values)
    return {**samples, Stage.POST: _samples(partial(_best, values["logits"]))}


def _on_device(
    export: Export, device: str, encoded: Sequence[bytes], config: PhotoConfig
) -> dict[Stage, list[float]]:
    """Return seconds of each stage: launches of the session, and what the host does around them."""
    batch, photos = len(encoded), decoded(encoded, config)
    logits = np.zeros((batch, len(export.classifier)), np.float32)
    samples = {
        Stage.DECODE: _samples(partial(decoded, encoded, config)),
        Stage.PREPROCESS: _samples(partial(_views, photos, export.manifest.preprocess)),
        Stage.POST: _samples(partial(_best, logits)),
    }
    with open_session(export.directory, device) as session:
        if batch not in session.buckets:  # type: ignore[attr-defined]  # of CUDA sessions
            return samples  # a request of this size is padded or split: there is no such launch
        views = _views(photos, session.preprocess)
        session.predict(views)
        pipeline: Any = session.pipeline  # type: ignore[attr-defined]  # of CUDA sessions
        pipeline.pixels(batch)[:] = views
        return samples | time_stages(pipeline, batch, MOST)


def _device_work(export: Export, work: Mapping[Stage, Work], batch: int) -> dict[Stage, Work]:
    """Return what the device does at least, of the stages that its kernels share with the graphs.

    K1 reads float32 tokens and does one triangle of the products; K2 has none to count.
    """
    outputs = export.manifest.graphs[BACKBONE_FILE].outputs
    _, tokens, width = next(each.shape for each in outputs if each.name == "patches")
    k1 = Work(*affinity_work(batch, int(tokens), int(width), item_bytes=4))
    return {Stage.BACKBONE: work[Stage.BACKBONE], Stage.K1: k1, Stage.HEAD: work[Stage.HEAD]}


def _views(photos: Sequence[Image.Image], preprocess: Preprocess) -> NDArray[np.uint8]:
    return np.stack([preprocess.test_view(photo) for photo in photos])


def _best(logits: NDArray[np.float32]) -> NDArray[np.intp]:
    best: NDArray[np.intp] = np.argsort(-softmax(logits), axis=1)[:, :_BEST]
    return best


def _samples(run: Callable[[], object]) -> list[float]:
    return repeated(run, budget_s=BUDGET_S, fewest=FEWEST, most=MOST)
