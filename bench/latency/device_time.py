"""What a request costs on a CUDA device: host and device by themselves, and without a graph."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from microclip_deploy.serving import Prediction, Session
from microclip_deploy.serving.cuda_session import CudaSession, fill

SAMPLES = 30


class Split(NamedTuple):
    """Seconds of the same requests, one each."""

    host: list[float]
    """Until upload, graph and download are launched."""
    device: list[float]
    """From the start of the upload to the end of the download."""


def split_time(session: Session, views: NDArray[np.uint8]) -> Split | None:
    """Measure requests of a batch from the pinned buffer on.

    The host's copy into that buffer, and out of that of the answers, is outside.

    Returns:
        Samples; None for a session without a device of its own kind, or a batch that it splits.
    """
    if not isinstance(session, CudaSession) or len(views) not in session.buckets:
        return None
    pipeline: Any = session.pipeline
    pipeline.pixels(len(views))[:] = views
    pipeline.run(len(views))
    samples = [pipeline.time_run(len(views)) for _ in range(SAMPLES)]
    return Split([each.host for each in samples], [each.device for each in samples])


def answer_eagerly(session: CudaSession, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return logits (B, C) of views without the session's CUDA graph, operator by operator."""

    def run(pipeline: Any, bucket: int, views: NDArray[np.uint8]) -> Prediction:
        fill(pipeline, bucket, views)
        answers: Prediction = pipeline.run_eagerly(bucket)
        return answers

    return session.in_parts(images, run).logits
