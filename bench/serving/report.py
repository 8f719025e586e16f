"""What `bench serve` measured, as tables and one JSON document."""

import datetime
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, Field

from microclip_deploy.bench import document
from microclip_deploy.bench.latency.windows import STABLE_WINDOWS, spread_of
from microclip_deploy.bench.serving.load import (
    LATE_S,
    NO_ANSWER,
    OK,
    WRONG,
    Closed,
    Load,
    Window,
)
from microclip_deploy.bench.table_text import digits, in_ms, percent, percentile_name, slug
from microclip_deploy.errors import EnvironmentProblem, ThresholdError

SERVER, ALONE, CEILING = "server", "session alone", "clients alone"
"""Contestants beside the peers: what was asked for, the same session without a server, and the
clients against a server that does nothing."""

PERCENTILES = (50.0, 95.0, 99.0, 100.0)
_REFUSED = "429"

MEANING = {
    "at once": "closed loop: each client sends its next request when the one before is answered",
    "offered": "open loop: requests are due at random times (Poisson) at this mean rate, whatever "
    "the server does, the same ones for everybody. A latency counts from when its request was due, "
    "not from when it was sent, so what waits behind a stall has waited (no coordinated omission). "
    f"late: sent over {1000 * LATE_S:g} ms after it was due",
    "right": "200 with the class that the same request was answered with before the measuring; "
    "latencies are of these alone. no answer: refused, closed, or over the clients' time-out",
    "beyond p99": "how many answers were slower than p99; with fewer than ten it is hardly known",
    "rates": "a second from the first request due to the last answer; over capacity a queue grows "
    "as long as it is measured, so latencies there tell the length of the window",
    "cores": "processor seconds a second of all processes of the server, and of the clients, which "
    "run in a process of their own on the same machine",
    ALONE: "the same session in a process of its own, one caller, from the same bodies; it takes "
    "turns with the servers. Peers are halted while another is measured: some wait busily",
    CEILING: "the same clients and requests against a server that only parses HTTP",
}


class Slo(NamedTuple):
    """What share of all requests must be answered right, and how soon."""

    q: float
    """Percent."""
    limit_s: float

    def __str__(self) -> str:
        """Say it as it is given."""
        return f"{percentile_name(self.q)}={in_ms(self.limit_s)}ms"


class Row(BaseModel):
    """One contestant under one load."""

    contestant: str
    batch: int
    load: str
    concurrency: int | None
    """Of a closed loop."""
    offered_per_s: float | None
    """Of an open loop."""
    requests: int
    outcomes: dict[str, int]
    """HTTP's status, "no answer" or "other class" -> requests."""
    right_per_s: float
    percentiles_s: dict[str, float]
    """Of right answers, from due to answered; empty without any."""
    within_slo: float | None
    """Share of all requests that were due."""
    good_per_s: float | None
    """Requests that were answered right within the SLO, a second."""
    late: int
    windows: int
    stable: bool
    spread: float | None
    seconds: float
    server_cores: float | None
    client_cores: float

    @property
    def right(self) -> int:
        """How many were answered right."""
        return self.outcomes.get(str(OK), 0)

    @property
    def images_per_s(self) -> float:
        """Images answered right, a second."""
        return self.batch * self.right_per_s


class Report(BaseModel):
    """Everything one run measured."""

    benchmark: Literal["serving"] = "serving"
    target: str
    """Name or address, no path."""
    body: str
    date: str = Field(
        default_factory=lambda: datetime.datetime.now(datetime.UTC).date().isoformat()
    )
    """ISO day."""
    contestants: dict[str, str] = {}
    """Who was measured -> what it is."""
    absent: dict[str, str] = {}
    """Who was not -> why."""
    slo: Slo | None = None
    rows: list[Row] = []
    idle_cores: dict[str, float] = {}
    """Who was measured -> cores that it keeps busy without any request."""
    resident_bytes: dict[int, int] = {}
    """Requests answered -> what the server then held in RAM; of a long run."""
    options: dict[str, str] = {}
    meaning: dict[str, str] = MEANING
    environment: dict[str, Any] = {}
    seconds: float = 0.0

    def reference(self, row: Row) -> Row | None:
        """Return the session alone as it was measured in turn with a row of a closed loop."""
        return self._beside(row, ALONE)

    def ceiling(self, row: Row) -> Row | None:
        """Return what the clients alone reached, likewise."""
        return self._beside(row, CEILING)

    def _beside(self, row: Row, contestant: str) -> Row | None:
        wanted = (contestant, row.batch, row.load)
        return next((r for r in self.rows if (r.contestant, r.batch, r.load) == wanted), None)


def row_of(
    contestant: str,
    batch: int,
    load: Load,
    windows: Sequence[Window],
    stable: float,
    slo: Slo | None,
) -> Row:
    """Return what the last `STABLE_WINDOWS` windows say.

    Args:
        contestant: who was measured.
        batch: images a request.
        load: in every window.
        windows: of the contestant, in order; at least one.
        stable: share by which windows may depart from their mean.
        slo: None where there is none.
    """
    last = windows[-STABLE_WINDOWS:]
    seconds = sum(window.seconds for window in last)
    latencies = np.concatenate([window.latencies_s for window in last])
    outcomes = np.concatenate([window.outcomes for window in last])
    names, counts = np.unique(outcomes, return_counts=True)
    good = None if slo is None else int((latencies <= slo.limit_s).sum())
    cpu = [window.server_cpu_s for window in last if window.server_cpu_s is not None]
    times = {percentile_name(q): float(np.percentile(latencies, q)) for q in PERCENTILES
             if len(latencies)}  # fmt: skip
    return Row(
        contestant=contestant,
        batch=batch,
        load=str(load),
        concurrency=load.concurrency if isinstance(load, Closed) else None,
        offered_per_s=None if isinstance(load, Closed) else load.rate,
        requests=len(outcomes),
        outcomes={_outcome(o): int(n) for o, n in zip(names, counts, strict=True)},
        right_per_s=len(latencies) / seconds,
        percentiles_s=times,
        within_slo=None if good is None else good / len(outcomes),
        good_per_s=None if good is None else good / seconds,
        late=sum(window.late for window in last),
        windows=len(windows),
        stable=is_stable(windows, stable),
        spread=_spread(last),
        seconds=seconds,
        server_cores=sum(cpu) / seconds if cpu else None,
        client_cores=sum(window.client_cpu_s for window in last) / seconds,
    )


def is_stable(windows: Sequence[Window], stable: float) -> bool:
    """Say whether the last `STABLE_WINDOWS` windows agree within a share of their mean."""
    spread = _spread(windows[-STABLE_WINDOWS:])
    return len(windows) >= STABLE_WINDOWS and spread is not None and spread <= stable


def require_answers(report: Report) -> None:
    """Insist that the server answered under every load.

    Raises:
        EnvironmentProblem: names the loads under which no answer was right.
    """
    silent = [
        f"batch {row.batch}, {row.load}: {row.outcomes}"
        for row in report.rows
        if row.contestant == SERVER and not row.right
    ]
    if silent:
        raise EnvironmentProblem(
            f"{report.target}: expected right answers under every load, found none with "
            f"{'; '.join(silent)}; see whether the server is still there, and what it has logged"
        )


def require_slo(report: Report) -> None:
    """Insist on the SLO in every row of the server.

    Raises:
        ThresholdError: names every miss.
    """
    slo = report.slo
    missed = [
        f"batch {row.batch}, {row.load}: expected {slo.q:g} % of requests to be answered right "
        f"within {in_ms(slo.limit_s)} ms, found {percent(row.within_slo)}"
        for row in report.rows
        if slo and row.contestant == SERVER and row.within_slo is not None
        if row.within_slo < slo.q / 100
    ]
    if missed:
        raise ThresholdError(
            f"--slo: {'; '.join(missed)}; offer less, or let the server refuse sooner with a "
            "smaller --max-queue"
        )


def plain(report: Report) -> str:
    """Return tables and remarks for the terminal."""
    return document.plain(_tables(report), _remarks(report))


def markdown(report: Report) -> str:
    """Return tables, remarks, what they mean, and the machine."""
    title = f"Serving {report.target}, {report.body}, {report.date}"
    meaning = [f"{name}: {text}" for name, text in report.meaning.items()]
    remarks = {**_remarks(report), "what is measured": meaning}
    return document.markdown(title, _tables(report), remarks, report.environment)


def write_report(report: Report, directory: Path) -> Path:
    """Write DATE-serving-TARGET-BODY.json and .md; return the JSON's path."""
    name = f"{report.date}-serving-{slug(report.target)}-{report.body}"
    texts = {".md": markdown(report)}
    return document.write_files(directory, name, report.model_dump(), texts)


def _tables(report: Report) -> dict[str, list[list[str]]]:
    titled = {
        "latency in milliseconds, of right answers from when they were due": _latencies(report),
        "what became of requests": _outcomes(report),
        "what serving costs, beside the session alone": _costs(report),
    }
    return {title: rows for title, rows in titled.items() if len(rows) > 1}


def _latencies(report: Report) -> list[list[str]]:
    names = [percentile_name(q) for q in PERCENTILES[:-1]]
    rows = [["contestant", "batch", "load", *names, "most", "beyond p99", "requests/s", "images/s",
             "spread", "use"]]  # fmt: skip
    for row in report.rows:
        times = [in_ms(s) for s in row.percentiles_s.values()] or ["–"] * len(PERCENTILES)
        rates = [digits(row.right_per_s), digits(row.images_per_s)]
        use = "yes" if row.stable else "no: unstable"
        if (
            row.offered_per_s or row.windows < STABLE_WINDOWS
        ):  # nothing was repeated until it agreed
            use = "one run"
        spread = "–" if row.spread is None else percent(row.spread)
        cells = [*times, str(row.right // 100), *rates, spread, use]
        rows.append([row.contestant, str(row.batch), row.load, *cells])
    return rows


def _outcomes(report: Report) -> list[list[str]]:
    slo = [] if report.slo is None else [f"within {in_ms(report.slo.limit_s)} ms", "good/s"]
    rows = [["contestant", "batch", "load", "requests", "right", *slo, _REFUSED, "other errors",
             "late", "server cores", "client cores"]]  # fmt: skip
    for row in report.rows:
        cells = [str(row.requests), percent(row.right / row.requests)]
        if row.within_slo is not None and row.good_per_s is not None:
            cells += [percent(row.within_slo), digits(row.good_per_s)]
        errors = [f"{count} {what}" for what, count in row.outcomes.items()
                  if what not in (str(OK), _REFUSED)]  # fmt: skip
        cells += [str(row.outcomes.get(_REFUSED, 0)), ", ".join(errors) or "0"]
        cores = "–" if row.server_cores is None else f"{row.server_cores:.2f}"
        cells += [str(row.late), cores, f"{row.client_cores:.2f}"]
        rows.append([row.contestant, str(row.batch), row.load, *cells])
    return rows


def _costs(report: Report) -> list[list[str]]:
    rows = [["contestant", "batch", "load", "of its images/s", "p50 more, ms", "its p50"]]
    for row in report.rows:
        alone = report.reference(row)
        if alone is None or row.contestant in (ALONE, CEILING):
            continue
        cells = [percent(row.right_per_s / alone.right_per_s), "–", "–"]
        if row.concurrency == 1 and row.percentiles_s:
            more = row.percentiles_s["p50"] - alone.percentiles_s["p50"]
            cells[1:] = [f"{1000 * more:.2f}", in_ms(alone.percentiles_s["p50"])]
        rows.append([row.contestant, str(row.batch), row.load, *cells])
    return rows


def _remarks(report: Report) -> dict[str, list[str]]:
    resident = {count: size / 2**20 for count, size in report.resident_bytes.items()}
    memory = [f"after {count} requests: {size:.0f} MiB" for count, size in resident.items()]
    if len(resident) > 1:
        first, *_, last = resident.values()
        memory.append(f"{last / first:.3f} times as much at the end as the first time")
    return {
        "who was measured": [f"{name}: {what}" for name, what in report.contestants.items()],
        "cores kept busy without a request": [
            f"{name}: {cores:.2f}" for name, cores in report.idle_cores.items()
        ],
        "not measured": [f"{name}: {why}" for name, why in report.absent.items()],
        "the clients' part": list(_client_shares(report)),
        "the most that was offered within the SLO": list(_most_within(report)),
        "resident memory of the server": memory,
        "options": [f"{name}: {value}" for name, value in report.options.items()],
    }


def _client_shares(report: Report) -> Iterator[str]:
    """Say how much of each request's time the clients and HTTP's parsing take themselves."""
    for row in report.rows:
        most = report.ceiling(row)
        if row.contestant == SERVER and most and most.right_per_s:
            share = percent(row.right_per_s / most.right_per_s)
            yield (
                f"batch {row.batch}, {row.load}: {digits(most.right_per_s)} requests/s against a "
                f"server that does nothing; the server took {share} of that"
            )


def _most_within(report: Report) -> Iterator[str]:
    if report.slo is None:
        return
    offered = [row for row in report.rows if row.offered_per_s]
    for name, batch in dict.fromkeys((row.contestant, row.batch) for row in offered):
        kept = [
            row.offered_per_s or 0.0
            for row in offered
            if (row.contestant, row.batch) == (name, batch)
            and (row.within_slo or 0.0) >= report.slo.q / 100
        ]
        most = f"{digits(max(kept))} requests/s" if kept else "none of the offered loads"
        yield f"{name}, batch {batch}: {most} ({report.slo})"


def _outcome(code: int) -> str:
    return {NO_ANSWER: "no answer", WRONG: "other class"}.get(code, str(code))


def _spread(windows: Sequence[Window]) -> float | None:
    """Return `spread_of` right answers a second and mean latency; None where one has none."""
    latencies = [(window.latencies_s, window.seconds) for window in windows]
    if not all(len(each) for each, _ in latencies):
        return None
    return spread_of([(len(each) / seconds, each.mean()) for each, seconds in latencies])
