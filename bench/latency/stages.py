"""Where the time of a request goes: each stage by itself, and the floor under it.

On a CPU the stages are graphs of their own, which run on what the stage before them answered. On a
CUDA device they are the launches of the session, each between two events. Stages that are timed
alone add up to a little more or less than the whole; the report says how much. Work is counted in
the exported graphs, but for K1 on a device, whose kernel does half of it.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from microclip_deploy.bench.kernel.report import affinity_work
from microclip_deploy.bench.latency.graph_parts import PATCHES, Part, Work, open_parts
from microclip_deploy.bench.latency.report import (
    BACKBONE,
    D2H,
    DECODE,
    H2D,
    K1,
    K2,
    K3_HEAD,
    POST,
    PREPROCESS,
    SALIENCY,
    StageRow,
    floor_s,
)
from microclip_deploy.bench.latency.windows import PAUSE_S
from microclip_deploy.bench.photos import decoded
from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.evaluation.predict import softmax
from microclip_deploy.serving import open_session
from microclip_deploy.serving.exported import read_export

TIMED: Mapping[str, str] = {
    DECODE: "encoded photos in memory -> RGB images, one after the other",
    PREPROCESS: "images -> test views: resizing and cropping in Pillow, one after the other; on a "
    "CUDA device with the upload of the images",
    H2D: "views from pinned memory to the device",
    BACKBONE: "views -> [CLS] embedding and patch tokens",
    K1: "tokens -> edges of the graph",
    K2: "edges -> mask: the normalised cut",
    SALIENCY: "tokens -> mask, where the graph does not tell K1 from K2",
    K3_HEAD: "tokens and mask -> [FG], fused logits, attention",
    D2H: "answers from the device to pinned memory",
    POST: "logits -> probabilities and the best five classes",
}

_BEST = 5
_BUDGET_S, _FEWEST, _MOST = 1.0, 9, 200
"""Of a stage: seconds, and samples whatever they take."""

Run = Callable[[], object]


class StageRequest(NamedTuple):
    """What to measure."""

    export: Path
    photos: Sequence[bytes]
    """Encoded."""
    batches: Sequence[int]
    device: str
    """"cpu", "cuda" or "cuda:N"."""
    threads: int | None


class _Stage(NamedTuple):
    """A stage on the CPU and what is known of it."""

    run: Run
    work: Work | None = None


def measure_stages(request: StageRequest, ceilings: Mapping[str, float] | None) -> list[StageRow]:
    """Time every stage at every batch size, one after the other.

    Raises:
        CheckpointError: the export cannot be used.
        EnvironmentProblem: the device or a package is missing.
    """
    export = read_export(request.export)
    rows = []
    with TemporaryDirectory(prefix="microclip-bench-") as folder:
        parts = open_parts(request.export, Path(folder), request.threads)
        for batch in request.batches:
            photos = _Photos(request.photos, batch, export.manifest.preprocess)
            if request.device == "cpu":
                stages = _on_cpu(photos, parts, export.classifier)
                samples = {name: _samples(stage.run) for name, stage in stages.items()}
                work = {name: stage.work for name, stage in stages.items() if stage.work}
            else:
                samples = _on_device(request, photos, len(export.classifier))
                work = _device_work(parts, batch, export.classifier)
            rows += [
                _row(name, batch, taken, work.get(name), ceilings)
                for name in TIMED
                if (taken := samples.get(name))
            ]
    return rows


class _Photos:
    """Photos of a batch in every state before the model."""

    def __init__(self, encoded: Sequence[bytes], batch: int, preprocess: Preprocess) -> None:
        self.encoded = [encoded[number % len(encoded)] for number in range(batch)]
        self.decoded = self.decode()
        self._preprocess = preprocess

    def decode(self) -> list[Image.Image]:
        return decoded(self.encoded)

    def views(self) -> NDArray[np.uint8]:
        return np.stack([self._preprocess.test_view(image) for image in self.decoded])


def _on_cpu(
    photos: _Photos, parts: Sequence[Part], classifier: NDArray[np.float32]
) -> dict[str, _Stage]:
    """Return all stages; each graph runs on what those before it answered."""
    values: dict[str, NDArray[Any]] = {"image": photos.views(), "classifier": classifier}
    stages = {DECODE: _Stage(photos.decode), PREPROCESS: _Stage(photos.views)}
    for part in parts:
        work = part.work(len(photos.encoded), classifier.shape)
        values |= part.run(values)
        stages[part.stage] = _Stage(partial(part.run, values), work)
    stages[POST] = _Stage(partial(_best, values["logits"]))
    return stages


def _on_device(request: StageRequest, photos: _Photos, classes: int) -> dict[str, list[float]]:
    """Return seconds of each stage: launches of the session, and what the host does around them."""
    batch = len(photos.encoded)
    logits = np.zeros((batch, classes), np.float32)
    on_host: dict[str, Callable[[], object]] = {
        DECODE: photos.decode,
        PREPROCESS: photos.views,
        POST: partial(_best, logits),
    }
    samples = {name: _samples(run) for name, run in on_host.items()}
    with open_session(request.export, request.device) as session:
        if batch not in session.buckets:  # type: ignore[attr-defined]  # of CUDA sessions
            return samples  # a request of this size is padded or split: there is no such launch
        views = photos.views()
        session.predict(views)
        pipeline: Any = session.pipeline  # type: ignore[attr-defined]  # of CUDA sessions
        pipeline.pixels(batch)[:] = views
        return {**samples, **pipeline.time_stages(batch, _MOST)}


def _device_work(
    parts: Sequence[Part], batch: int, classifier: NDArray[np.float32]
) -> dict[str, Work]:
    """Return what the device does at least, of the stages that its kernels share with the graphs.

    K1 reads float32 tokens and does one triangle of the products; K2 has none to count.
    """
    work = {part.stage: part.work(batch, classifier.shape) for part in parts}
    backbone = next(part for part in parts if part.stage == BACKBONE)
    _, tokens, width = backbone.shape(PATCHES, batch)
    return {
        BACKBONE: work[BACKBONE],
        K1: Work(*affinity_work(batch, tokens, width, item_bytes=4)),
        K3_HEAD: work[K3_HEAD],
    }


def _best(logits: NDArray[np.float32]) -> NDArray[np.intp]:
    best: NDArray[np.intp] = np.argsort(-softmax(logits), axis=1)[:, :_BEST]
    return best


def _samples(run: Run) -> list[float]:
    """Return seconds of each run, after one that warms up and a pause before it."""
    time.sleep(PAUSE_S)
    run()
    samples: list[float] = []
    while len(samples) < _FEWEST or (sum(samples) < _BUDGET_S and len(samples) < _MOST):
        start = time.perf_counter()
        run()
        samples.append(time.perf_counter() - start)
    return samples


def _row(
    name: str,
    batch: int,
    samples: list[float],
    work: Work | None,
    ceilings: Mapping[str, float] | None,
) -> StageRow:
    flop, moved = work or (None, None)
    floor = floor_s(flop, moved, ceilings)
    return StageRow(name, batch, samples, flop=flop, bytes=moved, floor_s=floor)
