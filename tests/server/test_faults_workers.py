"""Workers that die or hang, and clients that go."""

import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.server.conftest import Encode
from tests.server.lasting import lasting
from tests.server.running import Running, running, within
from tests.server.wire import connect, head

NOTICED_S = 2.5
"""Promised are 2 s; reading readiness takes a moment, too."""

RESTART_S = 30.0


@pytest.fixture(scope="module")
def server(tiny_export: Path) -> Iterator[Running]:
    """Return a server whose batches wait for each other, so that several requests share one."""
    with running(f"tiny={tiny_export}", "--max-delay", "400", "--max-batch", "8") as started:
        yield started


@contextmanager
def asked(server: Running, bodies: list[bytes]) -> Iterator[list[Future[httpx.Response]]]:
    """Send photos at once."""
    with ThreadPoolExecutor(len(bodies)) as threads:
        yield [threads.submit(server.classify, body) for body in bodies]


def kill(server: Running) -> None:
    server.workers()[0].kill()


def stop(server: Running) -> None:
    server.workers()[0].suspend()


@pytest.mark.parametrize(
    "end", [kill, pytest.param(stop, marks=lasting)], ids=["killed", "stopped"]
)
def test_an_idle_worker_is_replaced(
    server: Running, encode: Encode, end: Callable[[Running], None]
) -> None:
    [before] = server.workers()
    end(server)
    begun = time.monotonic()
    within(NOTICED_S, lambda: not server.is_ready())
    assert time.monotonic() - begun < NOTICED_S
    within(RESTART_S, server.is_ready)
    [after] = server.workers()
    assert after.pid != before.pid
    assert not before.is_running()
    assert server.classify(encode()).status_code == 200


@pytest.mark.parametrize(
    "end", [kill, pytest.param(lambda server: None, marks=lasting)], ids=["killed", "hung"]
)
def test_a_batch_that_is_lost_is_asked_again(
    server: Running, encode: Encode, end: Callable[[Running], None]
) -> None:
    """Each image alone, so that none fails for another."""
    within(RESTART_S, server.is_ready)
    before = server.metric("microclip_worker_restarts")
    batches = server.metric("microclip_batch_images_count")
    stop(server)
    with asked(server, [encode(i) for i in range(6)]) as answers:
        within(5, lambda: server.metric("microclip_batch_images_count") > batches)
        end(server)
        assert [each.result().status_code for each in answers] == [200] * 6
    assert server.metric("microclip_worker_restarts") == before + 1
    assert server.metric("microclip_queue_images") == 0
    assert server.metric("microclip_batch_images_count") == batches + 7


@lasting
def test_a_worker_without_a_processor_is_not_replaced(server: Running, encode: Encode) -> None:
    """It stands still for a moment, as on a machine that has too much to do."""
    within(RESTART_S, server.is_ready)
    [worker] = server.workers()
    worker.suspend()
    within(NOTICED_S, lambda: not server.is_ready())
    worker.resume()
    within(2, server.is_ready)
    assert server.workers() == [worker]
    assert server.classify(encode()).status_code == 200


def test_workers_end_with_their_server(tiny_export: Path, encode: Encode) -> None:
    """Also one that is computing."""
    with running(f"tiny={tiny_export}", "--threads", "1", "--max-batch", "512") as server:
        [worker] = server.workers()
        side = {"name": "image", "shape": [1, 32, 32, 3], "datatype": "UINT8", "data": [0] * 3072}
        httpx.post(f"{server.url}/v2/models/tiny/infer", json={"inputs": [side]}, timeout=30)
        server.process.send_signal(signal.SIGKILL)
        server.process.wait(5)
        worker.wait(5)


@pytest.fixture(scope="module")
def patient(tiny_export: Path) -> Iterator[Running]:
    """Return a server that waits long for its worker."""
    with running(f"tiny={tiny_export}", "--hang-timeout", "25", "--max-queue", "8") as started:
        yield started


@pytest.fixture
def stopped(patient: Running, encode: Encode) -> Iterator[Running]:
    """Return a server whose worker stands still with one image."""
    [worker] = patient.workers()
    batches = patient.metric("microclip_batch_images_count")
    worker.suspend()
    with asked(patient, [encode()]) as [first]:
        within(5, lambda: patient.metric("microclip_batch_images_count") > batches)
        yield patient
        worker.resume()
        assert first.result().status_code == 200


def upload(body: bytes) -> bytes:
    return head("POST", "/v1/classify", f"Content-Length: {len(body)}") + body


def test_clients_that_go_leave_the_queue(stopped: Running, encode: Encode) -> None:
    """At once, not when a worker is free; nothing of them is computed."""
    process = psutil.Process(stopped.process.pid)
    open_before, computed = process.num_fds(), stopped.metric("microclip_batch_images_sum")
    for _ in range(3):  # more than the queue holds, one after the other
        waiting = [connect(stopped) for _ in range(6)]
        for connection in waiting:
            connection.sendall(upload(encode()))
        within(5, lambda: stopped.metric("microclip_queue_images") == 6)
        for connection in waiting:
            connection.close()
        within(5, lambda: stopped.metric("microclip_queue_images") == 0)
    within(5, lambda: process.num_fds() <= open_before + 2)
    assert stopped.metric("microclip_requests_total", status="499") >= 18
    assert stopped.metric("microclip_batch_images_sum") == computed


def test_a_full_queue_refuses(stopped: Running, encode: Encode) -> None:
    waiting = [connect(stopped) for _ in range(8)]
    for connection in waiting:
        connection.sendall(upload(encode()))
    within(5, lambda: stopped.metric("microclip_queue_images") == 8)
    answer = stopped.classify(encode())
    assert answer.status_code == 429
    assert int(answer.headers["Retry-After"]) >= 1
    for connection in waiting:
        connection.close()


def test_what_is_too_late_is_not_computed(stopped: Running) -> None:
    computed = stopped.metric("microclip_batch_images_sum")
    images = {"name": "image", "datatype": "UINT8", "shape": [1, 32, 32, 3], "data": [0] * 3072}
    body: dict[str, Any] = {"inputs": [images], "parameters": {"timeout": 100_000}}
    address = f"{stopped.url}/v2/models/tiny/infer"
    for _ in range(12):
        assert httpx.post(address, json=body, timeout=30).status_code == 504
    assert stopped.metric("microclip_queue_images") == 0
    assert stopped.metric("microclip_batch_images_sum") == computed


@lasting
def test_a_worker_that_cannot_start(tiny_export: Path, tmp_path: Path, encode: Encode) -> None:
    """It is tried again, less and less often; requests learn at once that it is in vain."""
    export = shutil.copytree(tiny_export, tmp_path / "export")
    graph = (export / "full.onnx").read_bytes()
    with running(f"tiny={export}") as server:
        (export / "full.onnx").write_bytes(graph[: len(graph) // 2])
        kill(server)
        within(15, lambda: "cannot start" in server.output.read_text())
        begun = time.monotonic()
        answer = server.classify(encode())
        assert answer.status_code == 503
        assert int(answer.headers["Retry-After"]) >= 1
        assert time.monotonic() - begun < 5
        assert not server.is_ready()
        time.sleep(8)
        assert 2 <= server.metric("microclip_worker_restarts") <= 6
        assert psutil.Process(server.process.pid).cpu_percent(1) < 50
        (export / "full.onnx").write_bytes(graph)
        within(40, server.is_ready)
        assert server.classify(encode()).status_code == 200
        assert "Traceback" not in server.output.read_text()
