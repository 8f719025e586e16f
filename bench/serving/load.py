"""Requests against a server, and what became of each.

In a closed loop each of so many clients sends its next request when the one before is answered. A
slow server so gets fewer requests, and a stall is seen by the few that happen to be under way.

In an open loop requests are due at times that the server has no influence on, and a latency counts
from the moment when its request was DUE. What waits because a server has stalled, or because the
client itself was not ready, has waited; counting from when it was sent would leave that out
(coordinated omission).
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from microclip_deploy.bench.serving.arrivals import poisson
from microclip_deploy.bench.serving.connection import Answer, Connections, Endpoint, connections

OK, NO_ANSWER, WRONG = 200, 0, 1
"""Outcomes: HTTP's status, or that there was none, or that a 200 named another class."""

LATE_S = 0.005
"""A request of an open loop that is sent so much after it was due is counted as late."""

MOST_CONNECTIONS = 512
"""Open at once; a request that is due beyond that waits, and is late."""

Read = Callable[[bytes], Hashable]
"""Body of an answer -> what must be the same whenever the same request is answered."""


class Request(NamedTuple):
    """A request that lies ready."""

    raw: bytes
    expected: Hashable = None
    """What `Target.read` makes of a right answer; None takes any."""


class Target(NamedTuple):
    """A server, and what is sent to it in turn."""

    endpoint: Endpoint
    requests: Sequence[Request]
    read: Read

    def outcome(self, request: Request, answer: Answer) -> int:
        """Return what an answer is worth: its status, or `WRONG`."""
        if answer.status != OK or request.expected is None:
            return answer.status
        try:
            right = self.read(answer.body) == request.expected
        except (ValueError, KeyError, IndexError, TypeError):  # no such answer at all
            right = False
        return OK if right else WRONG


class Closed(NamedTuple):
    """So many clients, each with one request under way."""

    concurrency: int

    def __str__(self) -> str:
        """Say it in a table."""
        return f"{self.concurrency} at once"


class Open(NamedTuple):
    """Poisson arrivals, whatever the server does."""

    rate: float
    """Requests a second."""
    seed: int = 0

    def __str__(self) -> str:
        """Say it in a table."""
        return f"{self.rate:.3g}/s offered"


Load = Closed | Open


class Until(NamedTuple):
    """When no more requests are begun; those under way are waited for."""

    seconds: float
    requests: int | None = None
    """Of all clients together, in a closed loop; then `seconds` says nothing."""


class Window(NamedTuple):
    """What became of the requests of one window, in the order in which they were due."""

    due_s: NDArray[np.float64]
    """(n,), on one clock: when each was due; in a closed loop when it was sent."""
    sent_s: NDArray[np.float64]
    ended_s: NDArray[np.float64]
    outcomes: NDArray[np.int64]
    """(n,): HTTP's status, `NO_ANSWER` or `WRONG`."""
    client_cpu_s: float
    """Processor seconds of the client's process; of the session's own for one without a server."""
    server_cpu_s: float | None = None
    """Processor seconds of the server's processes, where it runs here."""

    @property
    def seconds(self) -> float:
        """From the first that was due to the last that ended."""
        return float(self.ended_s.max() - self.due_s.min())

    @property
    def latencies_s(self) -> NDArray[np.float64]:
        """Seconds from due to answered, of those answered right; a fast refusal is no latency."""
        latencies_s: NDArray[np.float64] = (self.ended_s - self.due_s)[self.outcomes == OK]
        return latencies_s

    @property
    def late(self) -> int:
        """How many were sent over `LATE_S` after they were due."""
        return int((self.sent_s - self.due_s > LATE_S).sum())

    def counted(self) -> Counter[int]:
        """Return outcome -> requests."""
        return Counter(self.outcomes.tolist())


Loader = Callable[[tuple[str, Load, Until]], Window]
"""What a process of clients answers: name of a target, how it is loaded, how long -> a window."""


@contextmanager
def clients(targets: dict[str, Target]) -> Iterator[Loader]:
    """Give what sends requests to targets by name; for a process of its own."""

    def load(asked: tuple[str, Load, Until]) -> Window:
        name, load, until = asked
        return run_window(targets[name], load, until)

    yield load


def run_window(target: Target, load: Load, until: Until) -> Window:
    """Send requests to a server for a while; a server that refuses them all is an outcome, too."""
    return asyncio.run(_window(target, load, until))


async def _window(target: Target, load: Load, until: Until) -> Window:
    async with connections(target.endpoint) as opened:
        log = _Log(target, opened)
        await log.connect(load.concurrency if isinstance(load, Closed) else 1)
        start = time.process_time()
        if isinstance(load, Closed):
            await _closed(log, load, until)
        else:
            await _open(log, poisson(load.rate, until.seconds, load.seed))
        return log.window(time.process_time() - start)


async def _closed(log: "_Log", load: Closed, until: Until) -> None:
    numbers = count()
    first = time.perf_counter()

    def goes_on(number: int) -> bool:
        if until.requests is not None:
            return number < until.requests
        return number < load.concurrency or time.perf_counter() - first < until.seconds

    async def client() -> None:
        while goes_on(number := next(numbers)):
            await log.send(number, time.perf_counter())

    await asyncio.gather(*(client() for _ in range(load.concurrency)))


async def _open(log: "_Log", due_s: NDArray[np.float64]) -> None:
    free = asyncio.Semaphore(MOST_CONNECTIONS)
    start = time.perf_counter()

    async def send(number: int, due: float) -> None:
        async with free:
            await log.send(number, due)

    async with asyncio.TaskGroup() as under_way:
        for number, due in enumerate(start + due_s):
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            under_way.create_task(send(number, due))


class _Log:
    """Sends requests, and writes down what became of them."""

    def __init__(self, target: Target, opened: Connections) -> None:
        self._target, self._opened = target, opened
        self._rows: list[tuple[float, float, float, int]] = []

    async def connect(self, count: int) -> None:
        with suppress(OSError, TimeoutError):  # each request tries again, and may have no answer
            await self._opened.open(count)

    async def send(self, number: int, due: float) -> None:
        request = self._target.requests[number % len(self._target.requests)]
        sent = time.perf_counter()
        try:
            answer = await self._opened.send(request.raw)
            ended = time.perf_counter()
            outcome = self._target.outcome(request, answer)
        except (OSError, TimeoutError):
            ended, outcome = time.perf_counter(), NO_ANSWER
            await asyncio.sleep(0.01)  # a closed loop must not spin where nobody listens
        self._rows.append((due, sent, ended, outcome))

    def window(self, client_cpu_s: float) -> Window:
        rows = zip(*sorted(self._rows), strict=True)
        due, sent, ended, outcomes = (np.array(column) for column in rows)
        return Window(due, sent, ended, outcomes, client_cpu_s)
