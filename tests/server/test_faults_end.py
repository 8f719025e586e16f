"""How a server starts, ends, and tells what happened."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from tests.server.conftest import Encode
from tests.server.lasting import lasting
from tests.server.running import Running, running, within
from tests.server.wire import ask, connect, head

SERVE = (sys.executable, "-m", "microclip_deploy.cli", "serve")


def kept(server: Running, photo: bytes, answered: list[str], failed: list[str]) -> None:
    """Ask over one connection as long as it is kept, then over the next, until none is taken."""
    while True:
        try:
            with httpx.Client(base_url=server.url, timeout=30) as client:
                while True:
                    identity = f"{threading.get_ident()}-{len(answered)}-{time.monotonic_ns()}"
                    answer = client.post(
                        "/v1/classify", content=photo, headers={"X-Request-Id": identity}
                    )
                    (answered if answer.status_code == 200 else failed).append(identity)
        except httpx.ConnectError:
            return
        except httpx.TransportError:
            pass  # closed before the request was taken: the log does not know it


def single(server: Running, photo: bytes, answered: list[str], failed: list[str]) -> None:
    """Ask over a new connection each time until none is taken."""
    while True:
        identity = f"{threading.get_ident()}-{time.monotonic_ns()}"
        headers = {"X-Request-Id": identity, "Connection": "close"}
        try:
            answer = httpx.post(
                f"{server.url}/v1/classify", content=photo, headers=headers, timeout=30
            )
            (answered if answer.status_code == 200 else failed).append(identity)
        except httpx.ConnectError:
            return
        except httpx.TransportError:
            pass


@pytest.mark.parametrize(
    ("signum", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=lasting)],
)
def test_requests_that_were_taken_are_answered(
    tiny_export: Path, encode: Encode, signum: int, code: int
) -> None:
    """What the log says was answered has reached its client."""
    answered: list[str] = []
    failed: list[str] = []
    photo = encode()
    with running(f"tiny={tiny_export}") as server, ThreadPoolExecutor(8) as threads:
        workers = server.workers()
        clients = [
            threads.submit(how, server, photo, answered, failed)
            for how in (kept, single)
            for _ in range(4)
        ]
        within(20, lambda: len(answered) > 40)
        server.process.send_signal(signum)
        within(2, lambda: not server.is_ready())  # still answers
        assert server.process.wait(30) == code
        for client in clients:
            client.result()
        with pytest.raises(OSError, match="refused"):
            connect(server)
        for worker in workers:
            worker.wait(5)
        logged = [entry["id"] for entry in server.logged() if entry["route"] == "classify"]
        assert not failed
        assert sorted(logged) == sorted(answered)
        assert "Traceback" not in server.output.read_text()


def test_a_second_signal_ends_at_once(tiny_export: Path, encode: Encode) -> None:
    """Also while requests wait for a worker that stands still."""
    with running(f"tiny={tiny_export}", "--hang-timeout", "25") as server:
        [worker] = server.workers()
        worker.suspend()
        waiting = connect(server)
        waiting.sendall(head("POST", "/v1/classify", "Content-Length: 1000"))
        server.process.send_signal(signal.SIGTERM)
        within(5, lambda: not server.is_ready())
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(3) == 143
        worker.resume()
        worker.wait(5)
        waiting.close()


@lasting
def test_a_signal_while_it_starts(tiny_export: Path) -> None:
    with running(f"tiny={tiny_export}", wait=False) as server:
        children = within(20, psutil.Process(server.process.pid).children)
        server.process.terminate()
        assert server.process.wait(3) == 143
        for child in children:
            child.wait(5)
        assert "Traceback" not in server.output.read_text()


@pytest.fixture(scope="module")
def places(tiny_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Return words that stand for what exists when the tests run."""
    folder = tmp_path_factory.mktemp("places")
    damaged = shutil.copytree(tiny_export, folder / "damaged")
    (damaged / "full.onnx").write_bytes(b"no graph")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        yield {
            "GOOD": str(tiny_export),
            "DAMAGED": str(damaged),
            "NONE": f"{folder}/x",
            "PORT": port,
        }


PROBLEMS = {
    "no directory": (2, "NONE"),
    "a key of nothing": (2, "GOOD --api-key="),
    "a port in use": (4, "GOOD --port PORT"),
}
MORE_PROBLEMS = {
    "a name with a slash": (2, "a/b=GOOD"),
    "contrary times": (2, "GOOD --hang-timeout 31"),
    "a damaged export": (3, "DAMAGED --port 0"),
    "no host": (4, "GOOD --host no-such-host.invalid"),
    "no log": (4, "GOOD --access-log NONE/log --port 0"),
    "no device": (4, "GOOD --device cuda:77 --port 0"),
}


@pytest.mark.parametrize(
    ("code", "words"),
    [
        *(pytest.param(*given, id=name) for name, given in PROBLEMS.items()),
        *(pytest.param(*given, id=name, marks=lasting) for name, given in MORE_PROBLEMS.items()),
    ],
)
def test_problems_at_the_start(places: dict[str, str], code: int, words: str) -> None:
    """One line, the documented exit code, no traceback."""
    for name, place in places.items():
        words = words.replace(name, place)
    ended = subprocess.run([*SERVE, *words.split()], capture_output=True, text=True, timeout=60)
    assert ended.returncode == code, ended.stderr
    assert "error" in ended.stderr.lower()
    assert "Traceback" not in ended.stderr


@lasting
def test_a_full_disk_and_a_closed_stdout_lose_lines(tiny_export: Path, encode: Encode) -> None:
    """The lines are counted, and answers go on."""
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    with running(f"tiny={tiny_export}", "--access-log", "/dev/full") as server:
        assert [server.classify(encode()).status_code for _ in range(5)] == [200] * 5
        within(5, lambda: server.metric("microclip_access_log_lost_total") >= 5)
        assert server.stop() == 143


@pytest.mark.parametrize("redirection", [">&-", "| true", "| sleep 60"])
@lasting
def test_a_stdout_that_nobody_reads(
    tiny_export: Path, tmp_path: Path, encode: Encode, redirection: str
) -> None:
    """Closed, its reader gone, or its reader asleep: answers go on, and it ends when told."""
    output = tmp_path / "stderr"
    output.touch()
    command = f'"$0" "$@" 2>{output} {redirection}'
    words = ["bash", "-c", command, *SERVE, f"tiny={tiny_export}", "--port", "0"]
    shell = subprocess.Popen(words, start_new_session=True)
    try:
        [url] = within(30, lambda: re.findall(r"on (http://\S+)", output.read_text()))
        server = Running(shell, url, output, output)
        children = psutil.Process(shell.pid).children(recursive=True)
        serving = next(
            (each for each in children if "--port" in each.cmdline()), psutil.Process(shell.pid)
        )
        with httpx.Client(base_url=server.url, timeout=30) as client:
            for _ in range(800):  # more than a pipe holds
                assert client.get("/v2/health/live").status_code == 200
        if redirection != "| sleep 60":
            within(5, lambda: server.metric("microclip_access_log_lost_total") >= 700)
        serving.terminate()
        serving.wait(20)
        assert "Traceback" not in output.read_text()
        assert "Fatal" not in output.read_text()
    finally:
        os.killpg(shell.pid, signal.SIGKILL)
        shell.wait()


@pytest.fixture(scope="module")
def counted(tiny_export: Path) -> Iterator[Running]:
    with running(f"tiny={tiny_export}") as started:
        yield started


HOSTILE_IDS = ("\x1b[31mred", "a b", "x" * 129, "{}", 'a"b', "ü")


def test_metrics_and_log_are_what_clients_saw(counted: Running, encode: Encode) -> None:
    """Also when a worker was replaced meanwhile; nothing hostile stands raw in the log."""
    seen: Counter[str] = Counter()
    identities = []
    rng_status = {0: encode(), 1: b"no photo"}
    for number in range(40):
        if number == 20:
            counted.workers()[0].kill()
        answer = counted.classify(rng_status[number % 3 == 0])
        seen[str(answer.status_code)] += 1
        identities.append(answer.headers["X-Request-Id"])
    for identity in HOSTILE_IDS:
        said = ask(
            counted,
            f"POST /v1/classify?model=%1b%5b31m{identity[:1]!r} HTTP/1.1\r\nHost: x\r\n".replace(
                "'", ""
            )
            .encode("unicode_escape")
            .replace(b"\\r\\n", b"\r\n")
            + b"X-Request-Id: "
            + identity.encode()
            + b"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
        )
        if said.status == 404:
            seen["404"] += 1
            identities.append(said.headers["x-request-id"])
            assert said.headers["x-request-id"] != identity
        else:
            assert said.status == 400  # no HTTP
    for status in ("200", "400", "404"):
        counted_now = counted.metric("microclip_requests_total", route="classify", status=status)
        assert counted_now == seen[status]
    within(5, lambda: any(entry["id"] == identities[-1] for entry in counted.logged()))
    text = counted.log.read_text()
    logged = [json.loads(line) for line in text.splitlines()]
    found = {each["id"]: each["status"] for each in logged if each["route"] == "classify"}
    assert list(found) == identities
    assert Counter(map(str, found.values())) == seen
    assert text.isascii()
    assert "\x1b" not in text + counted.output.read_text()


@lasting
def test_asyncio_has_nothing_to_say(tiny_export: Path, encode: Encode) -> None:
    """In its debug mode, with warnings as errors."""
    place = f"tiny={tiny_export}"
    with running(place, PYTHONASYNCIODEBUG="1", PYTHONWARNINGS="error") as server:
        assert server.classify(encode()).status_code == 200
        assert server.classify(b"").status_code == 400
        with connect(server) as connection:
            connection.sendall(head("POST", "/v1/classify", "Content-Length: 100"))
        server.workers()[0].kill()
        assert server.classify(encode()).status_code == 200
        assert server.stop() == 143
        told = server.output.read_text()
        assert not re.search("Warning|Traceback|never (retrieved|awaited)|Exception", told), told


@lasting
def test_ipv6(tiny_export: Path, encode: Encode) -> None:
    with running(f"tiny={tiny_export}", "--host", "::1") as server:
        assert server.url.startswith("http://[::1]:")
        assert server.classify(encode()).status_code == 200
