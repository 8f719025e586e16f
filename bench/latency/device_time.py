"""What a request costs on a CUDA device: host and device by themselves, and without a graph."""

from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from microclip_deploy.bench.latency.report import Row
from microclip_deploy.serving import Prediction, Session
from microclip_deploy.serving.cuda_session import CudaSession, fill

SAMPLES = 30

SYNCHRONISATION_SLACK = 0.05
"""Share by which a device's time may exceed the wall clock: both are from different repeats."""


def with_split(row: Row, session: Session | None, views: NDArray[np.uint8]) -> Row:
    """Add the times of host and device by themselves, and a warning where they are impossible.

    Measured from the pinned buffer on: the host's copy into that buffer, and out of that of the
    answers, is outside. The row stays as it is without a session that has a device of its own kind,
    and for a batch that the session splits.

    Args:
        row: of a contestant.
        session: that of the contestant; None where it has none.
        views: uint8 (B, S, S, 3), those of the row.
    """
    if not isinstance(session, CudaSession) or len(views) not in session.buckets:
        return row
    pipeline: Any = session.pipeline
    pipeline.pixels(len(views))[:] = views
    pipeline.run(len(views))
    samples = [pipeline.time_run(len(views)) for _ in range(SAMPLES)]
    host_s, device_s = [each.host for each in samples], [each.device for each in samples]
    warnings = _impossible(row.median_s, median(device_s))
    return replace(row, host_s=host_s, device_s=device_s, warnings=warnings)


def _impossible(wall_s: float, device_s: float) -> list[str]:
    """Warn of a request that returns before the device is done with it.

    Then the clock saw how long it takes to ask for the work, not to do it.
    """
    if device_s <= wall_s * (1 + SYNCHRONISATION_SLACK):
        return []
    return [
        f"a request is answered after {1e3 * wall_s:.3g} ms while the device works on it for "
        f"{1e3 * device_s:.3g} ms: it returns before the device is done, and its times are not to "
        "be used; synchronise, or copy the answer to the host, before it returns"
    ]


def answer_eagerly(session: CudaSession, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return logits (B, C) of views without the session's CUDA graph, operator by operator."""

    def run(pipeline: Any, bucket: int, views: NDArray[np.uint8]) -> Prediction:
        fill(pipeline, bucket, views)
        answers: Prediction = pipeline.run_eagerly(bucket)
        return answers

    return session.in_parts(images, run).logits
