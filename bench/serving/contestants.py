"""Who is measured: the server, the session without one, other servers, and the clients alone.

Whoever gives other answers than the session is not timed, and a peer that cannot be had says why.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from microclip_deploy.bench.latency.contestants import CLOSE
from microclip_deploy.bench.serving import bodies
from microclip_deploy.bench.serving.alone import Logits, alone
from microclip_deploy.bench.serving.ceiling import trivial_server
from microclip_deploy.bench.serving.connection import Endpoint, ask_raw
from microclip_deploy.bench.serving.load import Load, Read, Request, Target, Until, Window, clients
from microclip_deploy.bench.serving.peers import PEERS, Served
from microclip_deploy.bench.serving.processes import Watched
from microclip_deploy.bench.serving.report import ALONE, CEILING, SERVER
from microclip_deploy.bench.serving.worker import Worker, worker
from microclip_deploy.errors import EnvironmentProblem, VerificationError

CHECKED = 8
"""So many requests' answers are compared with the session's."""


class Server(NamedTuple):
    """The server that is measured."""

    name: str
    """Of what it serves, for people; no path."""
    what: str
    endpoint: Endpoint
    model: bodies.Model
    headers: Mapping[str, str]
    process: Watched | None
    """None where it does not run here, or its process cannot be told."""


class Held(NamedTuple):
    """The export that servers are held against."""

    export: Path
    precision: str
    classes: tuple[str, ...]
    device: str
    threads: int | None
    folder: Path
    """For what peers write."""


class Contestant(NamedTuple):
    """One that can be measured."""

    what: str
    run: Callable[[Load, Until], Window]
    waits: bool
    """Whether it can have several requests under way, as in an open loop."""
    idle_cores: float | None = None
    """Those that it keeps busy without any request, where that can be told."""


class _Host(NamedTuple):
    """A server to send requests to."""

    what: str
    endpoint: Endpoint
    process: Watched | None
    requests: list[bytes]
    read: Read
    """What must be the same whenever a request is answered."""
    logits: Callable[[int], NDArray[np.float32]]
    """Number of a request -> its answer, asked for once."""
    pauses: bool = False
    """Whether it was started for the measurement and may not run while others are measured."""


@contextmanager
def contestants_of(
    server: Server,
    held: Held | None,
    given: Sequence[bytes] | Sequence[NDArray[np.uint8]],
    peers: Sequence[str],
    absent: dict[str, str],
) -> Iterator[dict[str, Contestant]]:
    """Open everyone for requests of one kind; close them at the end.

    Args:
        server: first of them.
        held: what answers must equal; None where there is none, and then no peers.
        given: what requests hold: a photo's file each, or uint8 views (B, S, S, 3).
        peers: of `peers.PEERS`; they take pixels alone.
        absent: where it is written who cannot take part, and why.

    Raises:
        EnvironmentProblem: the server does not answer.
        VerificationError: somebody answers otherwise than the session.
    """
    with ExitStack() as stack:
        session = None if held is None else stack.enter_context(_session(held, given))
        hosts = {SERVER: _host(server, held, given)}
        for name in peers:
            assert held is not None
            try:
                hosts[name] = stack.enter_context(_peer(name, server.model, held, given))
            except EnvironmentProblem as problem:
                absent[name] = str(problem)
        if held and session:
            _require_alike(hosts, session.ask(None), held.precision)
        targets = {name: _target(host) for name, host in hosts.items()}
        targets[CEILING] = stack.enter_context(_trivial(hosts[SERVER]))
        loader = stack.enter_context(worker("clients", clients, targets))
        contestants = {name: _contestant(name, host, loader) for name, host in hosts.items()}
        if session:
            contestants[ALONE] = _alone(session)
        trivial = partial(_send, loader, CEILING)
        contestants[CEILING] = Contestant("no model, no work: only HTTP", trivial, False)
        yield contestants


_Loader = Worker[tuple[str, Load, Until], Window]


def _send(loader: _Loader, name: str, load: Load, until: Until) -> Window:
    """Let the clients measure a window."""
    return loader.ask((name, load, until))


def _contestant(name: str, host: _Host, loader: _Loader) -> Contestant:
    """Return a server, whose processor time is read around each window."""
    send, process = partial(_send, loader, name), host.process
    if process is None:
        return Contestant(host.what, send, True)

    def run(load: Load, until: Until) -> Window:
        if host.pauses:
            process.resume()
        before = process.cpu_s()
        window = send(load, until)
        cpu_s = max(0.0, process.cpu_s() - before)
        if host.pauses:
            process.pause()
        return window._replace(server_cpu_s=cpu_s)

    idle_cores = process.idle_cores()
    if host.pauses:
        process.pause()
    return Contestant(host.what, run, True, idle_cores)


def _session(held: Held, given: Sequence[Any]) -> Any:
    return worker(ALONE, alone, held.export, held.device, held.threads, given)


def _alone(session: Worker[Any, Any]) -> Contestant:
    def run(load: Load, until: Until) -> Window:
        window: Window = session.ask((ALONE, load, until))
        return window

    return Contestant("the same session in a process, one caller, no server", run, False)


def _host(server: Server, held: Held | None, given: Sequence[Any]) -> _Host:
    """Return the server with photos or pixels to send."""
    endpoint, model, headers = server.endpoint, server.model, server.headers
    if not isinstance(given[0], bytes):
        make = partial(bodies.pixel_request, endpoint, model.name, headers=headers)
        shape = len(given[0]), model.classes
        return _pixel_host(server.what, endpoint, server.process, [*map(make, given)], shape)
    send = partial(bodies.photo_request, endpoint, model.name, headers=headers)

    def logits(number: int) -> NDArray[np.float32]:
        assert held is not None
        body = _answer(endpoint, send(given[number], top_k=bodies.EVERY_CLASS))
        return bodies.read_class_logits(body, held.classes)

    requests = [send(photo) for photo in given]
    return _Host(server.what, endpoint, server.process, requests, bodies.read_class, logits)


@contextmanager
def _peer(name: str, model: bodies.Model, held: Held, given: Sequence[Any]) -> Iterator[_Host]:
    if isinstance(given[0], bytes):
        raise EnvironmentProblem("it takes pixels here; give --body pixels")
    served = Served(held.export, held.device, held.threads, model.size, model.classes, held.folder)
    images = len(given[0])
    with PEERS[name](served, images) as peer:
        requests = [peer.request(views) for views in given]
        shape = images, model.classes
        host = _pixel_host(peer.what, peer.endpoint, peer.process, requests, shape)
        yield host._replace(pauses=True)


def _pixel_host(
    what: str,
    endpoint: Endpoint,
    process: Watched | None,
    requests: list[bytes],
    shape: tuple[int, int],
) -> _Host:
    """Return a server whose answers end with float32 logits of a shape (B, C)."""

    def logits(number: int) -> NDArray[np.float32]:
        return bodies.read_logits(_answer(endpoint, requests[number]), *shape)

    return _Host(what, endpoint, process, requests, bodies.reading_tops(*shape), logits)


def _target(host: _Host) -> Target:
    """Ask for everything once; from now on answers must stay what they are."""
    answers = [host.read(_answer(host.endpoint, request)) for request in host.requests]
    requests = [Request(*each) for each in zip(host.requests, answers, strict=True)]
    return Target(host.endpoint, requests, host.read)


@contextmanager
def _trivial(host: _Host) -> Iterator[Target]:
    """Start the server that does nothing; its answer is as long as the server's."""
    body = _answer(host.endpoint, host.requests[0])
    opening: Any = worker(CEILING, trivial_server, body)
    with opening as server:
        yield Target(server.ask(None), [Request(raw) for raw in host.requests], host.read)


def _answer(endpoint: Endpoint, request: bytes) -> bytes:
    answer = ask_raw(endpoint, request)
    if answer.status != 200:
        raise bodies.refused(endpoint.url, answer)
    return answer.body


def _require_alike(hosts: Mapping[str, _Host], expected: Logits, precision: str) -> None:
    """Let nobody be timed whose logits are not the session's; the median image counts.

    Raises:
        VerificationError: names who answers something else, and how far it is.
    """
    limit = CLOSE[precision]
    for name, host in hosts.items():
        found = np.concatenate([host.logits(number) for number in range(len(expected[:CHECKED]))])
        wanted = np.concatenate(expected[:CHECKED])
        apart = float(np.median(np.abs(found - wanted).max(axis=1)))
        if not apart <= limit:
            raise VerificationError(
                f"{name}: expected logits within {limit} of those of the session, found "
                f"{apart:.3g}; its time would compare different things"
            )
