"""Batches of any size through buckets: filled, split, cut back, and never an older image."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.errors import DataError, EnvironmentProblem, UsageError
from microclip_deploy.serving import Prediction, Session
from microclip_deploy.serving.answer_block import Sizes, block_bytes, block_views
from microclip_deploy.serving.cuda_session import BUCKETS, CudaSession, bucket_of
from microclip_deploy.serving.session import Facts

SIDE = 8
SIZES = Sizes(tokens=4, joint=3, classes=3)


class NumpyPipeline:
    """Keeps buffers between calls as a device's does; cls is the mean colour of an image."""

    device = "cuda:0"

    def __init__(self) -> None:
        self.buffers: dict[int, tuple[NDArray[np.uint8], NDArray[np.uint8]]] = {}
        self.seen: list[NDArray[np.uint8]] = []
        self.closed = 0
        self.busy = threading.Lock()
        self.memory = 1 << 30

    def pixels(self, bucket: int) -> NDArray[np.uint8]:
        if bucket > self.memory:
            raise EnvironmentProblem("out of memory; lower --batch-size")
        if bucket not in self.buffers:
            pixels = np.full((bucket, SIDE, SIDE, 3), 99, np.uint8)
            self.buffers[bucket] = pixels, np.zeros(block_bytes(bucket, SIZES), np.uint8)
        return self.buffers[bucket][0]

    def run(self, bucket: int) -> Prediction:
        assert self.busy.acquire(blocking=False), "expected one call at a time"
        pixels, block = self.buffers[bucket]
        self.seen.append(pixels.copy())
        answers = block_views(block, bucket, SIZES)
        answers.cls[:] = pixels.mean(axis=(1, 2))
        answers.logits[:] = 2 * answers.cls
        answers.mask[:] = pixels[:, 0, :4, 0] > 127
        answers.complete[:] = pixels[:, 0, 0, 1] > 127
        self.busy.release()
        return answers

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def pipeline() -> NumpyPipeline:
    return NumpyPipeline()


@pytest.fixture
def make(pipeline: NumpyPipeline) -> Callable[..., CudaSession]:
    """Return what opens a session on the pipeline."""
    preprocess = Preprocess(size=SIDE, mean=(0.5,) * 3, std=(0.5,) * 3)
    facts = Facts(("a", "b", "c"), frozenset({"c"}), preprocess, np.eye(3, dtype=np.float32))
    return lambda **options: CudaSession(pipeline, facts, **options)


def images(count: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)


def assert_right(found: Prediction, pixels: NDArray[np.uint8]) -> None:
    assert [len(field) for field in found] == [len(pixels)] * 6
    np.testing.assert_allclose(found.cls, pixels.mean(axis=(1, 2)), rtol=1e-6)
    np.testing.assert_array_equal(found.logits, 2 * found.cls)
    np.testing.assert_array_equal(found.mask, pixels[:, 0, :4, 0] > 127)
    np.testing.assert_array_equal(found.complete, pixels[:, 0, 0, 1] > 127)


@pytest.mark.parametrize(
    ("count", "buckets", "bucket"),
    [(1, BUCKETS, 1), (2, BUCKETS, 2), (3, BUCKETS, 4), (8, BUCKETS, 8), (33, BUCKETS, 64),
     (3, (1, 3), 3), (2, (1, 4, 6), 4), (5, (1, 4, 6), 6)],
)  # fmt: skip
def test_a_bucket_is_the_smallest_that_holds_the_batch(
    count: int, buckets: tuple[int, ...], bucket: int
) -> None:
    assert bucket_of(count, buckets) == bucket


@pytest.mark.parametrize(
    ("count", "buckets"),
    [(1, [1]), (3, [4]), (8, [8]), (64, [64]), (70, [64, 8]), (130, [64, 64, 2])],
)
def test_every_image_gets_its_answer(
    make: Callable[..., CudaSession], pipeline: NumpyPipeline, count: int, buckets: list[int]
) -> None:
    session: Session
    with make() as session:
        assert_right(session.predict(images(count)), images(count))
    assert [len(batch) for batch in pipeline.seen] == buckets


def test_a_bucket_is_filled_with_the_last_image(
    make: Callable[..., CudaSession], pipeline: NumpyPipeline
) -> None:
    with make() as session:
        session.predict(images(8))
        session.predict(images(5, seed=1))
    np.testing.assert_array_equal(pipeline.seen[1][:5], images(5, seed=1))
    assert (pipeline.seen[1][5:] == images(5, seed=1)[-1]).all()


def test_answers_stay_when_the_next_batch_comes(make: Callable[..., CudaSession]) -> None:
    with make() as session:
        first = session.predict(images(4))
        session.predict(images(4, seed=1))
    assert_right(first, images(4))


def test_the_largest_batch_can_be_chosen(
    make: Callable[..., CudaSession], pipeline: NumpyPipeline
) -> None:
    with make(buckets=(1, 2, 3)) as session:
        assert_right(session.predict(images(8)), images(8))
    assert [len(batch) for batch in pipeline.seen] == [3, 3, 2]


def test_views_into_larger_arrays_are_taken_as_they_look(make: Callable[..., CudaSession]) -> None:
    with make() as session:
        assert_right(session.predict(images(3)[:, :, ::-1]), images(3)[:, :, ::-1])


@pytest.mark.parametrize(
    "wrong", [images(3).astype(np.float32), images(3)[:, :4], images(3)[0], images(3)[:0], [],
              images(3).transpose(0, 3, 1, 2)],
)  # fmt: skip
def test_other_images_are_refused_before_they_reach_the_device(
    make: Callable[..., CudaSession], pipeline: NumpyPipeline, wrong: Any
) -> None:
    with (
        make() as session,
        pytest.raises(DataError, match=r"expected uint8 \(B, 8, 8, 3\).*found.*test_view"),
    ):
        session.predict(wrong)
    assert not pipeline.seen


def test_a_session_out_of_memory_answers_smaller_batches(
    make: Callable[..., CudaSession], pipeline: NumpyPipeline
) -> None:
    pipeline.memory = 4
    with make() as session:
        with pytest.raises(EnvironmentProblem, match="lower --batch-size"):
            session.predict(images(5))
        assert_right(session.predict(images(4)), images(4))


def test_one_session_serves_several_threads(make: Callable[..., CudaSession]) -> None:
    batches = [images(1 + seed % 5, seed) for seed in range(48)]
    with make(buckets=(1, 2, 4)) as session, ThreadPoolExecutor(4) as pool:
        for found, batch in zip(pool.map(session.predict, batches), batches, strict=True):
            assert_right(found, batch)


def test_a_closed_session_says_so(
    make: Callable[..., CudaSession], pipeline: NumpyPipeline
) -> None:
    session = make()
    session.close()
    session.close()
    assert pipeline.closed == 1
    with pytest.raises(UsageError, match="found it closed"):
        session.predict(images(1))


def test_a_session_tells_about_its_model(make: Callable[..., CudaSession]) -> None:
    with make() as session:
        assert session.classes == ("a", "b", "c")
        assert session.unadapted == {"c"}
        assert (session.device, session.preprocess.size) == ("cuda:0", SIDE)
        with pytest.raises(ValueError, match="read-only"):
            session.classifier()[0] = 0


def test_photos_of_any_size_are_answered_in_order(make: Callable[..., CudaSession]) -> None:
    photos = [Image.new("RGB", (SIDE + 2, SIDE + i), (10 * i,) * 3) for i in range(7)]
    with make(buckets=(1, 2, 4)) as session:
        found = session.predict_photos(photos)
    np.testing.assert_array_equal(found.cls[:, 0], [10 * i for i in range(7)])


def test_no_photo_is_refused(make: Callable[..., CudaSession]) -> None:
    with make() as session, pytest.raises(DataError, match="at least one"):
        session.predict_photos([])
