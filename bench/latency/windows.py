"""How long requests take: windows are repeated until they agree, contestants taking turns.

Every contestant is warmed up; then each measures one window after the other in turn, so that
whatever else the machine does hits all of them. A pause comes before each window: the threads of
the last contestant wait busily for a moment, and would take the cores from the next one's first
requests. A contestant whose last three windows agree is stable and takes part no longer; the others
go on until they are stable too, or have had as many windows as the plan allows. What is reported is
taken from the last three windows alone.

Several requests at once are a closed loop: each client sends its next request when the one before
is answered. A window ends with the last answer, so at its end some clients have nothing left to do;
throughput is too low by at most the share that one request has in the window.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import partial
from threading import Barrier, Event
from time import perf_counter, sleep
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

Request = Callable[[], object]
"""One request; returns when its answer is on the host."""

Taken = TypeVar("Taken")
"""What a contestant measured in one window."""

_Spans = NDArray[np.float64]
"""(requests, 2): start and end of each on the clock, seconds."""

STABLE_WINDOWS = 3
"""So many windows must agree."""

PAUSE_S = 0.1
"""Before whoever comes next: after 0.05 s a first request was as fast as any other."""


class Plan(NamedTuple):
    """How to measure."""

    warmup_s: float = 2.0
    """Seconds, at least one request a client, before the first window."""
    duration_s: float = 10.0
    """Seconds in `STABLE_WINDOWS` windows; a request that is under way is waited for."""
    stable: float = 0.05
    """Share by which each of these windows may depart from their mean."""
    most_windows: int = 10
    """Of one contestant; at least `STABLE_WINDOWS`."""


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


class Measured(NamedTuple):
    """What one contestant took, in the last `STABLE_WINDOWS` windows."""

    windows: int
    """So many were measured."""
    stable: bool
    """Whether the last ones agree, as far as the plan asks."""
    spread: float
    """Largest share by which throughput or mean latency of a window departs from their mean."""
    samples_s: NDArray[np.float64]
    """Latencies, (requests,), seconds."""
    requests_per_s: float
    """Throughput of all clients together."""


def measure(
    contestants: Mapping[str, Request], plan: Plan, clients: int = 1
) -> dict[str, Measured]:
    """Measure all contestants, taking turns window by window.

    A single client runs in the calling thread. Several have a thread each, started for the window
    and let go together. What a request raises stops all clients and is raised here.

    Args:
        contestants: requests by name; with several clients they must bear being called at once.
        plan: how long, and how steady.
        clients: each with one request under way; at least 1.

    Returns:
        Results by name, in the order of the contestants.

    Source: perf_analyzer of the Triton Inference Server: throughput and mean latency of the last
    three windows each within a share of their mean. Its later releases compare the largest with
    the smallest instead.
    """
    run = {name: partial(_run_window, call, clients=clients) for name, call in contestants.items()}
    windows = in_turns(run, plan, lambda taken: summary(taken, plan.stable).stable)
    return {name: summary(taken, plan.stable) for name, taken in windows.items()}


def in_turns(
    contestants: Mapping[str, Callable[[float], Taken]],
    plan: Plan,
    stable: Callable[[Sequence[Taken]], bool],
) -> dict[str, list[Taken]]:
    """Let everyone measure one window after the other in turn.

    Args:
        contestants: by name; each measures for so many seconds and returns a window.
        plan: how long, and how often.
        stable: whether whoever took these windows is done.
    """
    for run in contestants.values():
        run(plan.warmup_s)
    windows: dict[str, list[Taken]] = {name: [] for name in contestants}
    unstable = list(contestants)
    for _ in range(plan.most_windows):
        for name in unstable:
            sleep(PAUSE_S)
            windows[name].append(contestants[name](plan.duration_s / STABLE_WINDOWS))
        unstable = [name for name in unstable if not stable(windows[name])]
    return windows


def summary(windows: Sequence[Window], stable: float) -> Measured:
    """Return what one contestant took.

    Args:
        windows: of the contestant, in order; at least one.
        stable: share by which each of the last `STABLE_WINDOWS` may depart from their mean.
    """
    last = windows[-STABLE_WINDOWS:]
    spread = spread_of([(window.requests_per_s, window.latencies_s.mean()) for window in last])
    samples_s = np.concatenate([window.latencies_s for window in last])
    return Measured(
        windows=len(windows),
        stable=len(last) == STABLE_WINDOWS and spread <= stable,
        spread=spread,
        samples_s=samples_s,
        requests_per_s=len(samples_s) / sum(window.seconds for window in last),
    )


def spread_of(rates: Sequence[tuple[float, float]]) -> float:
    """Return the largest share by which a window departs from the mean of them all.

    Args:
        rates: throughput and mean latency of each window.
    """
    values = np.array(rates)
    return float(np.abs(values / values.mean(axis=0) - 1).max())


def repeated(call: Request, *, budget_s: float, fewest: int, most: int) -> list[float]:
    """Return seconds of each call by itself, after one that warms up and a pause before it.

    Args:
        call: what to time.
        budget_s: seconds of all calls together, as far as the next two allow.
        fewest: calls, whatever they take.
        most: calls, however short they are.
    """
    sleep(PAUSE_S)
    call()
    samples: list[float] = []
    while len(samples) < fewest or (sum(samples) < budget_s and len(samples) < most):
        start = perf_counter()
        call()
        samples.append(perf_counter() - start)
    return samples


def _run_window(request: Request, seconds: float, clients: int) -> Window:
    """Send requests for so many seconds, at least one a client; all that start are counted."""
    if clients == 1:  # no thread: libraries keep warm state for the one they are used from
        served = [_serve(request, seconds, Event())]
    else:
        served = _serve_at_once(request, seconds, clients)
    starts, ends = np.concatenate(served).T
    return Window(float(ends.max() - starts.min()), ends - starts)


def _serve_at_once(request: Request, seconds: float, clients: int) -> list[_Spans]:
    together, stop = Barrier(clients), Event()

    def client() -> _Spans:
        together.wait()
        return _serve(request, seconds, stop)

    with ThreadPoolExecutor(clients) as threads:
        try:
            served = [threads.submit(client) for _ in range(clients)]
            # All of them, or those that ended up to the first error, which `result` raises.
            ended, _ = wait(served, return_when=FIRST_EXCEPTION)
            return [each.result() for each in ended]
        finally:  # after an error or an interrupt the others end with the request they are in
            stop.set()
            together.abort()


def _serve(request: Request, seconds: float, stop: Event) -> _Spans:
    """Run the closed loop of one client."""
    spans = []
    first = start = perf_counter()
    while True:
        request()
        end = perf_counter()
        spans.append((start, end))
        if end - first >= seconds or stop.is_set():
            return np.array(spans)
        start = perf_counter()
