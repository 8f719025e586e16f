"""How long requests take: windows are repeated until they agree, contestants taking turns.

Every contestant is warmed up; then each measures one window after the other in turn, so that
whatever else the machine does hits all of them. A pause comes before each window: the threads of
the last contestant wait busily for a moment, and would take the cores from the next one's first
requests. A contestant whose last three windows agree is
stable and takes part no longer; the others go on until they are stable too, or have had as many
windows as the plan allows. What is reported is taken from the last three windows alone.

Several requests at once are a closed loop: each client sends its next request when the one before
is answered. A window ends with the last answer, so at its end some clients have nothing left to do;
throughput is too low by at most the share that one request has in the window.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from threading import Barrier, Event
from time import perf_counter, sleep
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from microclip_deploy.errors import UsageError

Request = Callable[[], object]
"""One request; returns when its answer is on the host."""

STABLE_WINDOWS = 3
"""So many windows must agree."""

PAUSE_S = 0.1
"""Before whoever comes next: after 0.05 s a first request was as fast as any other."""

SYNCHRONISATION_SLACK = 0.05
"""Share by which a device's time may exceed the wall clock: both are from different repeats."""


class Plan(NamedTuple):
    """How to measure."""

    warmup_s: float = 2.0
    """Seconds, at least one request a client, before the first window."""
    duration_s: float = 10.0
    """Seconds in `STABLE_WINDOWS` windows; a request that is under way is waited for."""
    stable: float = 0.05
    """Share by which each of these windows may depart from their mean."""
    concurrency: int = 1
    """Clients, each with one request under way."""
    most_windows: int = 10
    """Of one contestant."""


class Window(NamedTuple):
    """Requests of one contestant without a break."""

    seconds: float
    """Wall clock from the first start to the last end."""
    latencies_s: NDArray[np.float64]
    """(requests,), client after client."""

    @property
    def requests_per_s(self) -> float:
        """Throughput of all clients together."""
        return len(self.latencies_s) / self.seconds

    @property
    def mean_s(self) -> float:
        """Mean latency, seconds."""
        return float(self.latencies_s.mean())


class Measured(NamedTuple):
    """What one contestant took."""

    windows: tuple[Window, ...]
    """All, in order; the last `STABLE_WINDOWS` are what the numbers below are taken from."""
    stable: bool
    """Whether they agree, as far as the plan asks."""

    @property
    def samples_s(self) -> NDArray[np.float64]:
        """Latencies, float64 (requests,), seconds."""
        return np.concatenate([window.latencies_s for window in self._last])

    @property
    def requests_per_s(self) -> float:
        """Throughput of all clients together."""
        return len(self.samples_s) / sum(window.seconds for window in self._last)

    @property
    def spread(self) -> float:
        """Largest share by which throughput or mean latency of a window departs from their mean."""
        return _departure(self._last)

    @property
    def _last(self) -> tuple[Window, ...]:
        return self.windows[-STABLE_WINDOWS:]


def measure(contestants: Mapping[str, Request], plan: Plan) -> dict[str, Measured]:
    """Measure all contestants, taking turns window by window.

    A single client runs in the calling thread. Several have a thread each, started for the window
    and let go together. What a request raises stops all clients and is raised here.

    Args:
        contestants: requests by name; with several clients they must bear being called at once.
        plan: how long, how steady, how many at once.

    Returns:
        Results by name, in the order of the contestants.

    Raises:
        UsageError: the plan has no client, or too few windows to compare.

    Source: perf_analyzer of the Triton Inference Server: throughput and mean latency of the last
    three windows each within a share of their mean. Its later releases compare the largest with
    the smallest instead.
    """
    _require_possible(plan)
    for request in contestants.values():
        _run_window(request, plan.warmup_s, plan.concurrency)
    windows: dict[str, list[Window]] = {name: [] for name in contestants}
    unstable = list(contestants)
    for _ in range(plan.most_windows):
        for name in unstable:
            sleep(PAUSE_S)
            seconds = plan.duration_s / STABLE_WINDOWS
            windows[name].append(_run_window(contestants[name], seconds, plan.concurrency))
        unstable = [name for name in unstable if not _agree(windows[name], plan.stable)]
    return {
        name: Measured(tuple(taken), stable=name not in unstable) for name, taken in windows.items()
    }


def forgotten_synchronisation(wall_s: float, device_s: float) -> str | None:
    """Warn of a request that returns before the device is done with it.

    Then the clock saw how long it takes to ask for the work, not to do it. The device's time of a
    request cannot exceed the wall clock of the same request; beyond `SYNCHRONISATION_SLACK` that
    is not chance.

    Args:
        wall_s: seconds of a request on the host's clock.
        device_s: seconds between the CUDA events around the work of one, also measured in others.

    Returns:
        The warning; None where the times are possible.
    """
    if device_s <= wall_s * (1 + SYNCHRONISATION_SLACK):
        return None
    return (
        f"a request is answered after {1e3 * wall_s:.3g} ms while the device works on it for "
        f"{1e3 * device_s:.3g} ms: it returns before the device is done, and its times are not to "
        "be used; synchronise, or copy the answer to the host, before it returns"
    )


def _require_possible(plan: Plan) -> None:
    if plan.concurrency < 1:
        raise UsageError(f"concurrency: expected 1 or more clients, found {plan.concurrency}")
    if plan.most_windows < STABLE_WINDOWS:
        raise UsageError(
            f"windows: expected {STABLE_WINDOWS} or more, as so many are compared, found "
            f"{plan.most_windows}"
        )


def _agree(windows: Sequence[Window], share: float) -> bool:
    last = windows[-STABLE_WINDOWS:]
    return len(last) == STABLE_WINDOWS and _departure(last) <= share


def _departure(windows: Sequence[Window]) -> float:
    values = np.array([(window.requests_per_s, window.mean_s) for window in windows])
    return float(np.abs(values / values.mean(axis=0) - 1).max())


class _Served(NamedTuple):
    """What one client saw; times of the clock, seconds."""

    first_start: float
    last_end: float
    latencies_s: list[float]


def _run_window(request: Request, seconds: float, concurrency: int) -> Window:
    """Send requests for so many seconds, at least one a client; all that start are counted."""
    if concurrency == 1:  # no thread: libraries keep warm state for the one they are used from
        served = [_serve(request, seconds, Event())]
    else:
        served = _serve_at_once(request, seconds, concurrency)
    return Window(
        max(client.last_end for client in served) - min(client.first_start for client in served),
        np.concatenate([client.latencies_s for client in served]),
    )


def _serve_at_once(request: Request, seconds: float, concurrency: int) -> list[_Served]:
    together, stop = Barrier(concurrency), Event()

    def client() -> _Served:
        together.wait()
        return _serve(request, seconds, stop)

    with ThreadPoolExecutor(concurrency) as threads:
        try:
            clients = [threads.submit(client) for _ in range(concurrency)]
            # All of them, or those that ended up to the first error, which `result` raises.
            ended, _ = wait(clients, return_when=FIRST_EXCEPTION)
            return [each.result() for each in ended]
        finally:  # after an error or an interrupt the others end with the request they are in
            stop.set()
            together.abort()


def _serve(request: Request, seconds: float, stop: Event) -> _Served:
    """Run the closed loop of one client."""
    latencies_s: list[float] = []
    first = start = perf_counter()
    while True:
        request()
        end = perf_counter()
        latencies_s.append(end - start)
        if end - first >= seconds or stop.is_set():
            return _Served(first, end, latencies_s)
        start = perf_counter()
