"""Host and device by themselves: what the benchmark asks of a session on a device.

The device is made up, so that its times are known; the real one is in tests/serving.
"""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from microclip_deploy.bench.latency import device_time, stages
from microclip_deploy.bench.latency.device_time import SAMPLES, answer_eagerly, with_split
from microclip_deploy.bench.latency.report import COPY, IMAGE_TO_LOGITS, PRODUCT, Row, Stage
from microclip_deploy.bench.photos import made_up_jpegs
from microclip_deploy.serving.cuda_session import CudaSession
from microclip_deploy.serving.exported import read_export
from microclip_deploy.serving.session import Facts, Prediction

SIDE = 32
ON_DEVICE = [Stage.H2D, Stage.BACKBONE, Stage.K1, Stage.K2, Stage.HEAD, Stage.D2H]


class MadeUpDevice:
    """A pipeline that answers the mean of each image, and takes the times it is told."""

    device = "cuda:0"

    def __init__(self) -> None:
        self.buffers: dict[int, NDArray[np.uint8]] = {}

    def pixels(self, bucket: int) -> NDArray[np.uint8]:
        shape = (bucket, SIDE, SIDE, 3)
        return self.buffers.setdefault(bucket, np.zeros(shape, np.uint8))

    def run(self, bucket: int) -> Prediction:
        logits = self.buffers[bucket].mean(axis=(1, 2)).astype(np.float32)
        return Prediction._make([logits] * len(Prediction._fields))

    def close(self) -> None:
        self.buffers.clear()


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Stand for what needs a device; return the buckets that are run without a graph."""
    buckets: list[int] = []

    def run_eagerly(pipeline: MadeUpDevice, bucket: int) -> Prediction:
        buckets.append(bucket)
        return pipeline.run(bucket)

    def time_stages(_pipeline: object, _bucket: int, repeats: int) -> dict[Stage, list[float]]:
        return {name: [1e-3] * repeats for name in ON_DEVICE}

    timing = device_time.Timing(host=1e-4, device=2e-3)
    monkeypatch.setattr(device_time, "run_eagerly", run_eagerly)
    monkeypatch.setattr(device_time, "time_run", lambda *_: timing)
    monkeypatch.setattr(stages, "time_stages", time_stages)
    return buckets


def made_up_session(directory: Path) -> CudaSession:
    export = read_export(directory)
    facts = Facts(("a", "b", "c"), frozenset(), export.manifest.preprocess, export.classifier)
    return CudaSession(MadeUpDevice(), facts, buckets=(1, 2, 4))


@pytest.fixture
def session(tiny_export: Path) -> CudaSession:
    return made_up_session(tiny_export)


def views(count: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)


def row(wall_s: float) -> Row:
    return Row(
        contestant="trt", scope=IMAGE_TO_LOGITS, batch=2, concurrency=1, samples_s=[wall_s] * 3,
        images_per_s=900.0, stable=True, spread=0.01,
    )  # fmt: skip


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(("wall_s", "warnings"), [(2.2e-3, 0), (1.95e-3, 0), (1e-3, 1)])
def test_host_and_device_are_told_apart(wall_s: float, warnings: int, session: CudaSession) -> None:
    found = with_split(row(wall_s), session, views(2))
    assert (found.host_s, found.device_s) == ([1e-4] * SAMPLES, [2e-3] * SAMPLES)
    assert len(found.warnings) == warnings
    for text in found.warnings:
        assert "answered after 1 ms while the device works on it for 2 ms" in text


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("batch", [3, 8])
def test_a_batch_that_fills_no_bucket_has_no_time_of_its_own(
    batch: int, session: CudaSession
) -> None:
    assert with_split(row(1e-3), session, views(batch)) == row(1e-3)
    assert with_split(row(1e-3), None, views(2)) == row(1e-3)


def test_without_a_graph_the_answers_are_the_same(session: CudaSession, eager: list[int]) -> None:
    for count in (1, 3, 9):
        images = views(count)
        np.testing.assert_array_equal(
            answer_eagerly(session, images), session.predict(images).logits
        )
    assert eager == [1, 4, 4, 4, 1]


@pytest.mark.usefixtures("eager")
def test_stages_of_a_device_are_its_launches(
    tiny_export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "open_session", lambda *_: made_up_session(tiny_export))
    monkeypatch.setattr(stages, "BUDGET_S", 0.01)
    rows = stages.measure_stages(
        tiny_export, made_up_jpegs(3, 32), (2, 3), {COPY: 1e12, PRODUCT: 1e14}, device="cuda",
        threads=1,
    )  # fmt: skip
    whole = [Stage.DECODE, Stage.PREPROCESS, *ON_DEVICE, Stage.POST]
    split = [Stage.DECODE, Stage.PREPROCESS, Stage.POST]  # there is no launch of three images
    assert [(row.batch, row.stage) for row in rows] == [
        *((2, stage) for stage in whole),
        *((3, stage) for stage in split),
    ]
    counted = [row.stage for row in rows if row.floor_s is not None]
    assert counted == [Stage.BACKBONE, Stage.K1, Stage.HEAD]
