"""CUDA session: batches of any size through a pipeline that knows a few sizes only.

A pipeline holds static buffers and a captured graph for each bucket, one of a few batch sizes. A
batch is filled up to the next bucket with its last image, a larger one is split, and
what was answered to the filling is cut off. Needs NumPy alone; the device's part is in
`cuda_pipeline`.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from microclip_deploy.serving.session import (
    Facts,
    Prediction,
    Session,
    closed_session,
)

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

    def close(self) -> None:
        """Release the device's memory."""


class CudaSession(Session):
    """A pipeline as a session; threads take turns."""

    def __init__(
        self, pipeline: Pipeline, facts: Facts, *, buckets: Sequence[int] = BUCKETS
    ) -> None:
        """Take over the pipeline.

        Args:
            pipeline: for the buckets.
            facts: of its model.
            buckets: batch sizes that the pipeline takes, rising.
        """
        super().__init__(facts, pipeline.device)
        self._pipeline: Pipeline | None = pipeline
        self.buckets = tuple(buckets)
        self._lock = threading.Lock()

    def _answer(self, pixels: NDArray[np.uint8]) -> Prediction:
        return self.in_parts(pixels, _run)

    def in_parts(
        self,
        images: NDArray[np.uint8],
        run: Callable[[Pipeline, int, NDArray[np.uint8]], Prediction],
    ) -> Prediction:
        """Run each part in the smallest bucket that holds it, and keep what was asked for.

        Args:
            images: uint8 (B, S, S, 3).
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

    def _release(self) -> None:
        with self._lock:
            if self._pipeline is not None:
                self._pipeline.close()
            self._pipeline = None


def _run(pipeline: Pipeline, bucket: int, views: NDArray[np.uint8]) -> Prediction:
    fill(pipeline, bucket, views)
    return pipeline.run(bucket)


def fill(pipeline: Pipeline, bucket: int, views: NDArray[np.uint8]) -> None:
    """Put views into a bucket's buffer, the last one again and again."""
    buffer = pipeline.pixels(bucket)
    buffer[: len(views)] = views
    buffer[len(views) :] = views[-1]


def bucket_of(count: int, buckets: Sequence[int]) -> int:
    """Return the smallest bucket that holds `count` images; they rise, and the last one does."""
    return next(bucket for bucket in buckets if bucket >= count)
