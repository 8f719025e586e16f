"""`bench serve`: a server under load, beside the session alone and other servers, taking turns."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ImageOps
from rich.console import Console

from microclip_deploy.bench.card import environment
from microclip_deploy.bench.latency.subject import subject_of
from microclip_deploy.bench.latency.windows import STABLE_WINDOWS, Plan, in_turns
from microclip_deploy.bench.photos import decoded, described, encoded_photos
from microclip_deploy.bench.serving import bodies
from microclip_deploy.bench.serving.connection import Endpoint, endpoint_of
from microclip_deploy.bench.serving.contestants import Contestant, Held, Server, contestants_of
from microclip_deploy.bench.serving.load import Closed, Load, Open, Until
from microclip_deploy.bench.serving.processes import Watched, free_port, listener, module, running
from microclip_deploy.bench.serving.report import SERVER, Report, Row, Slo, is_stable, row_of
from microclip_deploy.bench.table_text import percent
from microclip_deploy.data.photo import USUAL
from microclip_deploy.errors import UsageError
from microclip_deploy.serving.exported import Precision, read_export

PHOTOS = 32
"""So many take part."""

REQUESTS = 8
"""So many requests of pixels lie ready; each holds other images."""

EARLY = 5_000
"""After so many requests of a long run its memory is looked at first."""

_NAME = "bench"
"""Of the model, where the server is started here."""


class Loads(NamedTuple):
    """How a server is loaded, one after the other."""

    concurrency: Sequence[int] = (1, 4, 16)
    """Clients of closed loops."""
    rates: Sequence[float] = ()
    """Of open loops, requests a second."""
    shares: Sequence[float] = ()
    """Of open loops too: times as much as the best closed loop of the server reached."""


class Where(NamedTuple):
    """Where the server is, and how it runs where it is started here."""

    target: str
    """http://..., or what `bench TARGET` takes: then a server of it is started."""
    against: Path | None = None
    """Export that a server at an address is held against."""
    model: str | None = None
    """Of a server at an address that has several."""
    api_key: str | None = None
    pid: int | None = None
    """Of a server at an address; None to look for it."""
    device: str = "cpu"
    precision: Precision = "fp32"
    threads: int | None = None


def run_serving_bench(
    where: Where,
    notes: Console,
    *,
    body: str,
    batches: Sequence[int],
    loads: Loads,
    plan: Plan,
    peers: Sequence[str] = (),
    images: Path | None = None,
    slo: Slo | None = None,
    requests: int | None = None,
) -> Report:
    """Measure a server.

    Args:
        where: the server.
        notes: where progress is told.
        body: "photo" or "pixels".
        batches: images a request of pixels; a photo is one.
        loads: how it is loaded.
        plan: how long each load, and how steady a closed loop must be.
        peers: of `peers.PEERS`; they need an export.
        images: folder or list of photos; None for made-up ones.
        slo: what counts as good.
        requests: a long run instead: so many requests by the most clients, and memory over them.

    Raises:
        CheckpointError, DataError: the target or the images cannot be used.
        EnvironmentProblem: the server does not answer or start.
        UsageError: the target is nothing that can be measured.
        VerificationError: somebody answers otherwise than the session.
    """
    start, machine = time.perf_counter(), environment()  # its load is of others
    with _server(where, notes) as (server, held):
        if peers and held is None:
            raise UsageError("--peers: expected an export that they serve too; give --against DIR")
        photos, about = _photos(images, server.model.size, notes)
        options = _options(where, plan, about)
        report = Report(
            target=server.name, body=body, slo=slo, options=options, environment=machine
        )
        for batch in batches if body == "pixels" else (1,):
            given = photos if body == "photo" else _views(photos, server.model.size, batch)
            with contestants_of(server, held, given, peers, report.absent) as contestants:
                if requests is not None:
                    _introduce(report, {SERVER: contestants[SERVER]})
                    most = Closed(max(loads.concurrency))
                    notes.print(f"batch {batch}, {most}, {requests} requests")
                    _long_run(report, contestants[SERVER], server.process, batch, most, requests)
                    break
                _introduce(report, contestants)
                for load in _loads(loads, report, batch):
                    notes.print(f"batch {batch}, {load}")
                    report.rows += _turns(contestants, batch, plan, slo, load)
    report.seconds = time.perf_counter() - start
    return report


def _introduce(report: Report, contestants: Mapping[str, Contestant]) -> None:
    for name, one in contestants.items():
        report.contestants[name] = one.what
        if one.idle_cores is not None:
            report.idle_cores[name] = one.idle_cores


def _loads(loads: Loads, report: Report, batch: int) -> Iterator[Load]:
    """Give closed loops, then open ones; what shares are of is known once the former are done."""
    yield from map(Closed, loads.concurrency)
    closed = [r for r in report.rows if (r.contestant, r.batch) == (SERVER, batch)]
    capacity = max((row.right_per_s for row in closed), default=0.0)
    rates = [*loads.rates, *(share * capacity for share in loads.shares if capacity)]
    yield from (Open(rate, seed) for seed, rate in enumerate(rates))


def _turns(
    contestants: Mapping[str, Contestant], batch: int, plan: Plan, slo: Slo | None, load: Load
) -> list[Row]:
    """Measure everybody who can bear a load, taking turns window by window."""
    if isinstance(load, Closed):
        taking = contestants
    else:
        taking = {name: one for name, one in contestants.items() if one.waits}
        plan = plan._replace(most_windows=STABLE_WINDOWS)  # chance alone keeps them from agreeing
    runs = {
        name: lambda seconds, one=one: one.run(load, Until(seconds)) for name, one in taking.items()
    }
    windows = in_turns(runs, plan, lambda taken: is_stable(taken, plan.stable))
    return [row_of(name, batch, load, taken, plan.stable, slo) for name, taken in windows.items()]


def _long_run(
    report: Report,
    contestant: Contestant,
    process: Watched | None,
    batch: int,
    load: Closed,
    requests: int,
) -> None:
    """Send so many requests, and look at the server's memory early and at the end."""
    early, windows = min(EARLY, requests // 2), []
    for count, answered in ((early, early), (requests - early, requests)):
        windows.append(contestant.run(load, Until(0.0, count)))
        if process is None:
            report.absent["memory"] = "the server's process is not known; give its --pid"
        else:
            report.resident_bytes[answered] = process.resident_bytes()
    report.rows.append(row_of(SERVER, batch, load, windows, 1.0, report.slo))


@contextmanager
def _server(where: Where, notes: Console) -> Iterator[tuple[Server, Held | None]]:
    """Find the server, or start it; and what it is held against."""
    headers = {"Authorization": f"Bearer {where.api_key}"} if where.api_key else {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="microclip-bench-")))
        if where.target.partition("://")[0] in ("http", "https"):
            endpoint = endpoint_of(where.target)
            model = bodies.model_of(endpoint, where.model, headers)
            process = listener(endpoint) if where.pid is None else Watched(where.pid)
            held = None if where.against is None else _held(where.against, where, folder)
            name = model.name
        else:
            if where.against or where.model or where.pid:
                raise UsageError(
                    f"{where.target}: expected no --against, --model or --pid with a server that "
                    "is started here; give them with the address of one that runs"
                )
            subject = stack.enter_context(subject_of(where.target, where.precision))
            notes.print("starting the server")
            endpoint, process = stack.enter_context(_started(subject.export, where, folder))
            model = bodies.model_of(endpoint, _NAME, headers)
            held, name = _held(subject.export, where, folder), subject.name
        what = bodies.told(endpoint, "GET", "/v2", headers)
        served = f"{what['name']} {what['version']}, {endpoint.url}"
        yield Server(name, served, endpoint, model, headers, process), held


@contextmanager
def _started(export: Path, where: Where, folder: Path) -> Iterator[tuple[Endpoint, Watched]]:
    """Start this package's server; MICROCLIP_* of the environment are its other options."""
    endpoint = free_port()
    options = ["--host", endpoint.host, "--port", str(endpoint.port), "--device", where.device]
    if where.threads is not None:
        options += ["--threads", str(where.threads)]
    command = module("microclip_deploy", "serve", f"{_NAME}={export.resolve()}", *options)
    log = folder / "server.log"
    with running("serve", command, endpoint, "/v2/health/ready", log) as process:
        yield endpoint, process


def _held(directory: Path, where: Where, folder: Path) -> Held:
    manifest = read_export(directory).manifest
    classes = tuple(manifest.classes)
    return Held(directory, manifest.precision, classes, where.device, where.threads, folder)


def _photos(images: Path | None, size: int, notes: Console) -> tuple[list[bytes], str]:
    photos, source = encoded_photos(images, size, PHOTOS, PHOTOS, USUAL, notes)
    return photos, described(photos, [min(each.size) for each in decoded(photos)], source)


def _views(photos: Sequence[bytes], size: int, batch: int) -> list[NDArray[np.uint8]]:
    """Return uint8 (batch, S, S, 3) for each request; photos come again where there are too few."""
    made = np.stack([np.asarray(ImageOps.fit(each, (size, size))) for each in decoded(photos)])
    numbers = np.arange(REQUESTS * batch).reshape(REQUESTS, batch) % len(made)
    return [made[row] for row in numbers]


def _options(where: Where, plan: Plan, photos: str) -> dict[str, str]:
    return {
        "threads": "one a core" if where.threads is None else str(where.threads),
        "warmup": f"{plan.warmup_s:g} s",
        "duration": f"{plan.duration_s:g} s in {STABLE_WINDOWS} windows",
        "until stable": f"{percent(plan.stable)}, closed loops",
        "photos": photos,
    }
