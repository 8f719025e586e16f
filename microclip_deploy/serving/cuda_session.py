"""CUDA session: batches of any size through a pipeline that knows a few sizes only.

A pipeline holds static buffers and a captured graph for each bucket, one of a few batch sizes. A
batch is filled up to the next bucket with its last image, a larger one is split, and
what was answered to the filling is cut off. Needs NumPy alone; the device's part is in
`cuda_pipeline`.
"""

import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.errors import DataError
from microclip_deploy.serving.session import Prediction, checked_images, closed_session

BUCKETS = (1, 2, 4, 8, 16, 32, 64)
"""Batch sizes by default: the GPU is full well before the last, and buffers grow with it."""


class Pipeline(Protocol):
    """A model with static buffers on a device."""

    device: str
    """"cuda:N"."""

    def pixels(self, bucket: int) -> NDArray[np.uint8]:
        """Return the buffer (bucket, S, S, 3) that `run` reads; it may hold older images."""

    def run(self, bucket: int) -> Prediction:
        """Classify what is in the buffer; the answers are valid until the next call."""

    def run_photos(self, bucket: int, photos: Sequence[NDArray[np.uint8]]) -> Prediction:
        """Resize photos on the device and classify them in place of the buffer's first rows."""

    def close(self) -> None:
        """Release the device's memory."""


class Facts(NamedTuple):
    """What a session says of its model."""

    classes: tuple[str, ...]
    unadapted: frozenset[str]
    preprocess: Preprocess
    classifier: NDArray[np.float32]
    """(C, E), unit rows."""


class CudaSession:
    """A pipeline behind the Session protocol; `predict` may be called from several threads."""

    def __init__(
        self, pipeline: Pipeline, facts: Facts, *, buckets: Sequence[int] = BUCKETS
    ) -> None:
        """Take over the pipeline.

        Args:
            pipeline: for the buckets.
            facts: of its model.
            buckets: batch sizes that the pipeline takes, rising.
        """
        self.classes = facts.classes
        self.unadapted = facts.unadapted
        self.preprocess = facts.preprocess
        self.device = pipeline.device
        self._pipeline: Pipeline | None = pipeline
        self._classifier = facts.classifier
        self._classifier.flags.writeable = False
        self.buckets = tuple(buckets)
        self._lock = threading.Lock()

    def predict(self, images: NDArray[np.uint8]) -> Prediction:
        """Classify uint8 (B, S, S, 3) images that `preprocess.test_view` made.

        Raises:
            DataError: another dtype, size or layout, or no image.
            EnvironmentProblem: the device fails, or is out of memory; smaller batches may still
                be answered.
            UsageError: the session is closed.
        """
        return self.in_parts(checked_images(images, self.preprocess.size), _run_views)

    def predict_photos(self, photos: Sequence[NDArray[np.uint8]]) -> Prediction:
        """Classify decoded uint8 (H, W, 3) RGB photos of any sizes, resized on the device.

        The answers are those of `predict` to `preprocess.test_view` of each photo: the device makes
        the same bytes.

        Raises:
            DataError: no photo, another dtype or shape, or a size that `read_image` refuses.
            EnvironmentProblem, UsageError: as `predict`.
        """
        if len(photos) == 0:
            raise DataError("photos: expected at least one, found none; give decoded photos")
        return self.in_parts(photos, _run_photos)

    def in_parts(self, images: Any, run: Callable[[Pipeline, int, Any], Prediction]) -> Prediction:
        """Run each part in the smallest bucket that holds it, and keep what was asked for.

        Args:
            images: views or photos.
            run: answers a part of them, which may be smaller than the bucket.
        """
        parts = []
        with self._lock:
            if self._pipeline is None:
                raise closed_session()
            largest = self.buckets[-1]
            for start in range(0, len(images), largest):
                part = images[start : start + largest]
                answers = run(self._pipeline, bucket_of(len(part), self.buckets), part)
                parts.append(Prediction._make(field[: len(part)].copy() for field in answers))
        if len(parts) == 1:
            return parts[0]
        return Prediction._make(np.concatenate(field) for field in zip(*parts, strict=True))

    @property
    def pipeline(self) -> Pipeline:
        """Return the device's part, for measurements; nobody else may run it meanwhile.

        Raises:
            UsageError: the session is closed.
        """
        if self._pipeline is None:
            raise closed_session()
        return self._pipeline

    def classifier(self) -> NDArray[np.float32]:
        """Return the class matrix, (C, E), unit rows; read-only."""
        return self._classifier

    def close(self) -> None:
        """Release graphs, buffers and weights, once the call that uses them is done."""
        with self._lock:
            if self._pipeline is not None:
                self._pipeline.close()
            self._pipeline = None

    def __enter__(self) -> Self:
        """Return the session."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the session."""
        self.close()


def _run_views(pipeline: Pipeline, bucket: int, views: Any) -> Prediction:
    fill(pipeline, bucket, views)
    return pipeline.run(bucket)


def _run_photos(pipeline: Pipeline, bucket: int, photos: Any) -> Prediction:
    pipeline.pixels(bucket)  # makes the bucket
    return pipeline.run_photos(bucket, photos)


def fill(pipeline: Pipeline, bucket: int, views: NDArray[np.uint8]) -> None:
    """Put views into a bucket's buffer, the last one again and again."""
    buffer = pipeline.pixels(bucket)
    buffer[: len(views)] = views
    buffer[len(views) :] = views[-1]


def bucket_of(count: int, buckets: Sequence[int]) -> int:
    """Return the smallest bucket that holds `count` images; they rise, and the last one does."""
    return next(bucket for bucket in buckets if bucket >= count)
