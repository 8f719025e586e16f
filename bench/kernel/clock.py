"""Times on a CUDA device: graphs of many launches between two events, and the card's ceilings."""

import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import cupy
import torch

from microclip_deploy.bench.card import gpu
from microclip_deploy.bench.kernel.report import NotTimed, Timing
from microclip_deploy.model.clip import exact_float32

Launch = Callable[[], object]

SAMPLES = 30
SAMPLE_US = 2000.0
"""Device time a sample shall take, so that the events' own resolution (0.5 us) vanishes."""
MAX_LAUNCHES = 2048
"""Of one graph."""

COPY_BYTES = 1 << 30
PRODUCT_SIDE = 8192
LOAD_US = 1.5e6
"""Length of the load under which clocks are read: nvidia-smi takes a part of a second."""
MOST_QUEUED = 800
"""Launches that the driver queues without waiting."""


def new_stream() -> Any:
    """Return a CuPy stream that may capture."""
    return cupy.cuda.Stream(non_blocking=True)


def torch_stream(stream: Any) -> Any:
    """Return the context in which torch launches into a CuPy stream."""
    return torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr))


def time_launches(launches: Sequence[Launch], stream: Any) -> Timing:
    """Time launches one after the other; a sample is the mean over one replay of a graph of them.

    Inside: the kernels and the gaps between dependent nodes of a graph. Outside: everything the
    host does. Every launch has its own input, and they take turns.

    Raises:
        NotTimed: a launch synchronises, or calls a library that refuses to be captured.
    """
    for launch in launches:  # loads modules, makes handles
        launch()
    once = capture(launches, stream)
    estimate_us = statistics.median(_replay_us(once, stream) for _ in range(3))
    rounds = math.ceil(SAMPLE_US / max(estimate_us, 1.0))
    rounds = max(1, min(rounds, MAX_LAUNCHES // len(launches)))
    graph = once if rounds == 1 else capture([*launches] * rounds, stream)
    _replay_us(graph, stream)
    each = rounds * len(launches)
    return Timing.of([_replay_us(graph, stream) / each for _ in range(SAMPLES)], each)


def time_replays(launches: Sequence[Launch], stream: Any) -> Timing:
    """Time graphs of a single launch, replayed back to back: what a server's request pays.

    Inside, other than in `time_launches`: the start of a graph.
    """
    for launch in launches:
        launch()
    graphs = [capture([launch], stream) for launch in launches]

    def replay() -> None:
        for graph in graphs:
            graph.launch(stream)

    samples = [time_call(replay, stream) / len(graphs) for _ in range(SAMPLES + 2)]
    return Timing.of(samples[2:], len(graphs))


def time_call(call: Launch, stream: Any) -> float:
    """Return microseconds of one call that may synchronise, between two events."""
    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    start.record(stream)
    call()
    end.record(stream)
    end.synchronize()
    return 1e3 * float(cupy.cuda.get_elapsed_time(start, end))


def capture(launches: Sequence[Launch], stream: Any) -> Any:
    """Return an uploaded CUDA graph of the launches, in their order.

    Raises:
        NotTimed: a launch cannot be captured.
    """
    stream.synchronize()
    stream.begin_capture()
    try:
        for launch in launches:
            launch()
    except (NotImplementedError, RuntimeError) as error:
        with suppress(RuntimeError):  # the capture is void; ended, the stream can be used again
            stream.end_capture()
        raise NotTimed(f"not capturable: {error}") from error
    graph = stream.end_capture()
    graph.upload(stream)
    stream.synchronize()
    return graph


def ceilings(dtype: str, stream: Any) -> dict[str, Any]:
    """Measure what this card can do at most: copied bytes and multiplied numbers a second.

    Returns:
        Both rates, and what the card says about itself while it multiplies.
    """
    with torch_stream(stream):
        copy_us = _copy_us(stream)
        product_us, under_load = _product_us(dtype, stream)
    return {
        "copy_bytes_per_s": 2 * COPY_BYTES / copy_us * 1e6,
        "product_flop_per_s": 2 * PRODUCT_SIDE**3 / product_us * 1e6,
        "product_dtype": dtype,
        "gpu_under_load": under_load,
    }


def _copy_us(stream: Any) -> float:
    source, target = (torch.full((COPY_BYTES,), 7, dtype=torch.uint8, device="cuda") for _ in "ab")
    return _median_us(lambda: target.copy_(source), stream)


@exact_float32
def _product_us(dtype: str, stream: Any) -> tuple[float, dict[str, Any] | None]:
    """Return the time of a large matrix product, and the card's state under that load."""
    shape = (PRODUCT_SIDE, PRODUCT_SIDE)
    left, right = (torch.randn(shape, device="cuda").to(getattr(torch, dtype)) for _ in "ab")
    product = torch.empty_like(left)
    product_us = _median_us(lambda: torch.matmul(left, right, out=product), stream)
    for _ in range(min(MOST_QUEUED, math.ceil(LOAD_US / product_us))):
        torch.matmul(left, right, out=product)
    under_load = gpu()
    stream.synchronize()
    return product_us, under_load


def _median_us(call: Launch, stream: Any) -> float:
    return statistics.median([time_call(call, stream) for _ in range(13)][3:])


def _replay_us(graph: Any, stream: Any) -> float:
    return time_call(lambda: graph.launch(stream), stream)
