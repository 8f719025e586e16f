"""What a request costs on a CUDA device: host and device by themselves, and without a graph."""

import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from microclip_deploy.bench.latency.report import Row, Stage
from microclip_deploy.serving import Prediction, Session
from microclip_deploy.serving.cuda_session import CudaSession, fill

SAMPLES = 30

SYNCHRONISATION_SLACK = 0.05
"""Share by which a device's time may exceed the wall clock: both are from different repeats."""


class Timing(NamedTuple):
    """Seconds of one request, uint8 views in the pinned buffer to answers in another."""

    host: float
    """Until everything is launched: what the host does itself."""
    device: float
    """Upload, encoder, kernels and download, between two events."""


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
    session.pipeline.pixels(len(views))[:] = views
    session.pipeline.run(len(views))
    samples = [time_run(session.pipeline, len(views)) for _ in range(SAMPLES)]
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
        return run_eagerly(pipeline, bucket)

    return session.in_parts(images, run).logits


def run_eagerly(pipeline: Any, bucket: int) -> Prediction:
    """Do what the pipeline's `run` does without a CUDA graph."""
    work = pipeline.bucket(bucket)
    with pipeline.current():
        pipeline.launch(work, work.launches.eager)
        pipeline.stream.synchronize()
    answers: Prediction = work.answers
    return answers


def time_run(pipeline: Any, bucket: int) -> Timing:
    """Do what the pipeline's `run` does and return how long host and device took."""
    work = pipeline.bucket(bucket)
    with pipeline.current():
        return _timed(pipeline.stream, lambda: pipeline.launch(work, work.launches.replay))


def time_stages(pipeline: Any, bucket: int, repeats: int) -> dict[Stage, list[float]]:
    """Return the seconds of each stage by itself, between two events.

    The pixels must be in the buffer, and the bucket have been run, so that each stage finds
    what those before it wrote. Encoder and kernels are captured once more, each in a graph of
    its own: launched one by one, the gaps between launches would be counted.

    Args:
        pipeline: of a CUDA session.
        bucket: batch size.
        repeats: samples a stage.
    """
    from microclip_deploy.serving.cuda_pipeline import CAPTURE, captured

    work, stream = pipeline.bucket(bucket), pipeline.stream
    with CAPTURE, pipeline.current():
        encode = pipeline.encoder.capture(work.pixels, work.tokens, lambda: None)
        edges, cut, fuse = (captured(each, stream).replay for each in work.kernels)
    launches: dict[Stage, Callable[[], object]] = {
        Stage.H2D: lambda: work.pixels.set(work.host_pixels, stream=stream),
        Stage.BACKBONE: encode.replay,
        Stage.K1: edges,
        Stage.K2: cut,
        Stage.HEAD: fuse,
        Stage.D2H: lambda: work.block.get(stream=stream, out=work.host_block, blocking=False),
    }
    with pipeline.current():
        return {
            stage: [_timed(stream, launch).device for _ in range(repeats)]
            for stage, launch in launches.items()
        }


def _timed(stream: Any, launch: Callable[[], object]) -> Timing:
    """Launch work on the idle stream between two events."""
    import cupy

    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    stream.synchronize()
    start.record(stream)
    asked = time.perf_counter()
    launch()
    host = time.perf_counter() - asked
    end.record(stream)
    end.synchronize()
    return Timing(host, 1e-3 * float(cupy.cuda.get_elapsed_time(start, end)))
