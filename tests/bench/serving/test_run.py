"""`bench serve`: a server against the session, and what is refused."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from rich.console import Console

from microclip_deploy.bench.latency import windows
from microclip_deploy.bench.latency.windows import Plan
from microclip_deploy.bench.photos import decoded
from microclip_deploy.bench.serving import processes, run
from microclip_deploy.bench.serving.report import ALONE, CEILING, SERVER, Report
from microclip_deploy.bench.serving.run import Loads, Where, run_serving_bench
from microclip_deploy.cli.main import main
from microclip_deploy.errors import UsageError, VerificationError
from microclip_deploy.serving import Session, open_session
from tests.bench.serving.stand_in import stand_in

QUIET = Console(quiet=True)
SHORT = Plan(warmup_s=0.0, duration_s=0.0, stable=1.0, most_windows=3)


@dataclass
class Server:
    """Speaks what `serve` speaks, as far as the benchmark asks."""

    session: Session
    off: float = 0.0
    """Added to the logits of photos."""
    models: tuple[str, ...] = ("birds",)

    def __call__(self, path: str, body: bytes) -> tuple[int, bytes]:
        parts = urlsplit(path)
        if parts.path.endswith("/infer"):
            views = np.frombuffer(body[body.index(b"}]}") + 3 :], np.uint8).reshape(-1, 32, 32, 3)
            return 200, b'{"outputs": []}' + self.session.predict(views).logits.tobytes()
        return 200, json.dumps(self.told(parts.path, parse_qs(parts.query), body)).encode()

    def told(self, path: str, query: dict[str, list[str]], body: bytes) -> object:
        if path == "/v2":
            return {"name": "stand-in", "version": "1"}
        if path == "/v2/repository/index":
            return [{"name": name} for name in self.models]
        if path == "/v1/classify":
            [logits] = self.session.predict_photos(decoded([body])).logits.tolist()
            order = np.argsort(logits)[::-1][: int(query["top_k"][0])]
            named = [
                {"name": self.session.classes[k], "logit": logits[k] + self.off} for k in order
            ]
            return {"classes": named}
        inputs = [{"name": "image", "shape": [-1, 32, 32, 3]}]
        return {"inputs": inputs, "outputs": [{"name": "logits", "shape": [-1, 3]}]}


@pytest.fixture(scope="module")
def server(tiny_export: Path) -> Iterator[Server]:
    with open_session(tiny_export, threads=1) as session:
        yield Server(session)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "PAUSE_S", 0.0)
    monkeypatch.setattr(processes, "IDLE_S", 0.01)
    monkeypatch.setattr(run, "PHOTOS", 2)
    monkeypatch.setattr(run, "REQUESTS", 2)
    monkeypatch.setattr(run, "environment", lambda: {"cpu": "quick"})


def measured(
    server: Server,
    against: Path | None = None,
    *,
    body: str = "pixels",
    loads: Loads = Loads((2,)),  # noqa: B008  # immutable
    peers: tuple[str, ...] = (),
    requests: int | None = None,
) -> Report:
    with stand_in(server) as endpoint:
        return run_serving_bench(
            Where(endpoint.url, against, threads=1), QUIET, body=body, batches=(2,), loads=loads,
            plan=SHORT, peers=peers, requests=requests,
        )  # fmt: skip


def test_a_server_is_measured_beside_the_session(
    server: Server, tiny_export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    report = measured(server, tiny_export, loads=Loads((1,), shares=(0.5,)), peers=("triton",))
    everyone = {SERVER, ALONE, CEILING}
    closed, opened = report.rows[:3], report.rows[3:]
    assert {row.contestant for row in closed} == everyone == report.contestants.keys()
    assert [row.contestant for row in opened] == [SERVER]
    assert opened[0].offered_per_s == pytest.approx(closed[0].right_per_s / 2)
    assert all(row.outcomes.keys() == {"200"} and row.batch == 2 for row in report.rows)
    assert report.contestants[SERVER].startswith("stand-in 1, http://127.0.0.1:")
    assert "'tritonserver' on the PATH" in report.absent["triton"]
    assert report.reference(closed[0]) == closed[1]


def test_photos_are_sent_as_files_and_memory_is_watched(server: Server) -> None:
    report = measured(server, body="photo", requests=6)
    [row] = report.rows
    assert (row.batch, row.outcomes, row.load) == (1, {"200": 6}, "2 at once")
    assert report.resident_bytes.keys() == {3, 6}
    assert min(report.resident_bytes.values()) > 1 << 20


def test_other_answers_are_not_timed(server: Server, tiny_export: Path) -> None:
    other = Server(server.session, off=1.0)
    with pytest.raises(VerificationError, match=r"server: expected logits within 0.01 .* found 1"):
        measured(other, tiny_export, body="photo")


@pytest.mark.slow
@pytest.mark.parametrize("peer", ["litserve", "triton"])
def test_peers_answer_as_the_session(server: Server, tiny_export: Path, peer: str) -> None:
    there = {"litserve": find_spec("litserve"), "triton": shutil.which("tritonserver")}
    if not there[peer]:
        pytest.skip(f"no {peer}; docs/benchmarks.md says where it comes from")
    report = measured(server, tiny_export, peers=(peer,))
    [row] = [row for row in report.rows if row.contestant == peer]
    assert row.outcomes == {"200": row.requests}
    assert row.server_cores is not None
    assert report.idle_cores.keys() == {SERVER, peer}


def test_what_cannot_be_measured_is_refused(
    server: Server, tiny_export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match="--peers: expected an export"):
        measured(server, peers=("litserve",))
    with pytest.raises(UsageError, match="expected one of a, b of http"):
        measured(Server(server.session, models=("a", "b")))
    assert main(["bench", "serve", str(tiny_export), "--against", str(tiny_export)]) == 2
    assert main(["bench", "serve", "http://127.0.0.1:9", "--body", "text"]) == 2
    assert "expected photo or pixels, found 'text'" in capsys.readouterr().err
