"""Host and device by themselves: what the benchmark asks of a session on a device.

The device is made up, so that its times are known; the real one is in tests/serving.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from microclip_deploy.bench.latency import run, stages
from microclip_deploy.bench.latency.contestants import Contestants
from microclip_deploy.bench.latency.device_time import SAMPLES, split_time
from microclip_deploy.bench.latency.report import (
    BACKBONE,
    COPY,
    D2H,
    DECODE,
    H2D,
    IMAGE_TO_LOGITS,
    K1,
    K2,
    K3_HEAD,
    POST,
    PREPROCESS,
    PRODUCT,
    Row,
)  # fmt: skip
from microclip_deploy.bench.latency.stages import StageRequest, measure_stages
from microclip_deploy.bench.photos import made_up_jpegs
from microclip_deploy.serving.cuda_session import CudaSession
from microclip_deploy.serving.exported import Export, read_export
from microclip_deploy.serving.session import Facts, Prediction

SIDE, CLASSES = 32, 3


class Timing(NamedTuple):
    host: float
    device: float


class MadeUpDevice:
    """A pipeline that answers the mean of each image, and takes the times it is told."""

    device = "cuda:0"

    def __init__(self, timing: Timing) -> None:
        self.timing = timing
        self.buffers: dict[int, NDArray[np.uint8]] = {}
        self.eager: list[int] = []
        """Buckets that were run without a graph."""

    def pixels(self, bucket: int) -> NDArray[np.uint8]:
        shape = (bucket, SIDE, SIDE, 3)
        return self.buffers.setdefault(bucket, np.zeros(shape, np.uint8))

    def run(self, bucket: int) -> Prediction:
        logits = self.buffers[bucket].mean(axis=(1, 2)).astype(np.float32)
        return Prediction._make([logits] * len(Prediction._fields))

    def run_eagerly(self, bucket: int) -> Prediction:
        self.eager.append(bucket)
        return self.run(bucket)

    def time_run(self, bucket: int) -> Timing:
        assert bucket in self.buffers
        return self.timing

    def time_stages(self, bucket: int, repeats: int) -> dict[str, list[float]]:
        assert bucket in self.buffers
        names = (H2D, BACKBONE, K1, K2, K3_HEAD, D2H)
        return {name: [1e-3] * repeats for name in names}

    def close(self) -> None:
        self.buffers.clear()


@pytest.fixture
def device() -> MadeUpDevice:
    return MadeUpDevice(Timing(host=1e-4, device=2e-3))


@pytest.fixture
def export(tiny_export: Path) -> Export:
    return read_export(tiny_export)


@pytest.fixture
def session(device: MadeUpDevice, export: Export) -> CudaSession:
    facts = Facts(("a", "b", "c"), frozenset(), export.manifest.preprocess, export.classifier)
    return CudaSession(device, facts, buckets=(1, 2, 4))


def views(count: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)


def test_host_and_device_are_told_apart(session: CudaSession) -> None:
    split = split_time(session, views(2))
    assert split is not None
    assert split == ([1e-4] * SAMPLES, [2e-3] * SAMPLES)


def test_a_batch_that_fills_no_bucket_has_no_time_of_its_own(session: CudaSession) -> None:
    assert split_time(session, views(3)) is None
    assert split_time(session, views(8)) is None


@pytest.mark.parametrize(("wall", "warned"), [(2.2e-3, False), (1e-3, True)])
def test_a_request_that_returns_too_early_is_warned_of(
    wall: float, warned: bool, session: CudaSession
) -> None:
    found = Contestants()
    found.add_session("trt", "trt", session)
    row = Row("trt", IMAGE_TO_LOGITS, 2, 1, [wall] * 3, 900.0, True, 0.01)
    run._add_split(row, found, views(2))
    assert row.device_s == [2e-3] * SAMPLES
    assert [text.startswith("a request is answered after") for text in row.warnings] == (
        [True] if warned else []
    )


def test_without_a_graph_the_answers_are_the_same(
    session: CudaSession, device: MadeUpDevice
) -> None:
    found = Contestants()
    found.add_session("trt", "trt", session)
    assert [*found.answers] == ["trt", "trt, no CUDA graph"]
    for count in (1, 3, 9):
        one, other = (answer(views(count)) for answer in found.answers.values())
        np.testing.assert_array_equal(one, other)
    assert device.eager == [1, 4, 4, 4, 1]


def test_stages_of_a_device_are_its_launches(
    session: CudaSession, tiny_export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "open_session", lambda *_: session)
    monkeypatch.setattr(stages, "_BUDGET_S", 0.01)
    photos = made_up_jpegs(3, 32)
    request = StageRequest(tiny_export, photos, (2,), "cuda", 1)
    rows = measure_stages(request, {COPY: 1e12, PRODUCT: 1e14})
    wanted = [DECODE, PREPROCESS, H2D, BACKBONE, K1, K2, K3_HEAD, D2H, POST]
    assert [row.stage for row in rows] == wanted
    counted = [row.stage for row in rows if row.floor_s is not None]
    assert counted == [BACKBONE, K1, K3_HEAD]
    rows = measure_stages(request._replace(batches=(3,)), None)
    assert [row.stage for row in rows] == [DECODE, PREPROCESS, POST]
