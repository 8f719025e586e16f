"""More requests than can be answered, and many of them."""

import json
import socket
import threading
import time
from pathlib import Path
from statistics import quantiles
from typing import NamedTuple

import httpx
import numpy as np
import psutil

from tests.server.conftest import Encode
from tests.server.lasting import SECONDS, lasting
from tests.server.running import Running, running, within
from tests.server.wire import head

MAX_QUEUE = 128
IMAGES = 32
"""Of one request: enough that the model, not HTTP, is what is loaded."""

SLACK_S = 0.1 if SECONDS >= 10 else 2.0
"""A short test runs beside others, which may take the processor for a while."""


class Heard(NamedTuple):
    """An answer under load."""

    status: int
    seconds: float
    retry_after: str | None


def request(side: int = 32) -> bytes:
    """Return an inference request of random images."""
    shape = [IMAGES, side, side, 3]
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8).tobytes()
    size = {"binary_data_size": len(pixels)}
    tensor = {"name": "image", "shape": shape, "datatype": "UINT8", "parameters": size}
    text = json.dumps({"inputs": [tensor]}).encode()
    length = f"Inference-Header-Content-Length: {len(text)}"
    total = f"Content-Length: {len(text) + len(pixels)}"
    return head("POST", "/v2/models/tiny/infer", length, total) + text + pixels


class Client(threading.Thread):
    """Asks again as soon as it is answered, and sends bytes that were made before."""

    def __init__(self, server: Running, sent: bytes, until: float) -> None:
        super().__init__()
        self._port, self._sent, self._until = server.port, sent, until
        self.heard: list[Heard] = []
        self.start()

    def run(self) -> None:
        with socket.create_connection(("127.0.0.1", self._port), 60) as connection:
            stream = connection.makefile("rb")
            while time.monotonic() < self._until:
                begun = time.monotonic()
                connection.sendall(self._sent)
                status = int(stream.readline().split()[1])
                headers = dict(
                    line.decode().lower().strip().split(": ", 1)
                    for line in iter(stream.readline, b"\r\n")
                )
                stream.read(int(headers["content-length"]))
                seconds = time.monotonic() - begun
                self.heard.append(Heard(status, seconds, headers.get("retry-after")))
                if status == 429:
                    time.sleep(0.02)


def closed_loop(server: Running, clients: int, seconds: float) -> list[Heard]:
    """Return what clients hear."""
    until = time.monotonic() + seconds
    threads = [Client(server, request(), until) for _ in range(clients)]
    for thread in threads:
        thread.join()
    return [heard for thread in threads for heard in thread.heard]


def memory(server: Running) -> int:
    """Return the bytes of the server and its workers."""
    processes = [psutil.Process(server.process.pid), *server.workers()]
    return sum(each.memory_info().rss for each in processes)


def p99(heard: list[Heard]) -> float:
    return quantiles([each.seconds for each in heard if each.status == 200], n=100)[98]


def test_overload(tiny_export: Path) -> None:
    """Five times as many images as may wait: what is accepted is answered in time, the rest told.

    The limit follows from the queue: MAX_QUEUE images wait at most, a batch is computed and another
    one lies ready, so an accepted request takes at most their time and what it takes alone.
    """
    options = ("--max-queue", str(MAX_QUEUE), "--max-batch", str(IMAGES), "--threads", "1")
    with running(f"tiny={tiny_export}", *options) as server:
        closed_loop(server, 1, 0.5)
        alone = closed_loop(server, 1, 1)
        full = closed_loop(server, MAX_QUEUE // IMAGES + 2, max(1.0, SECONDS / 3))
        per_s = IMAGES * len(full) / max(1.0, SECONDS / 3)
        limit_s = (MAX_QUEUE + 2 * IMAGES) / per_s + p99(alone)
        before = memory(server)
        heard = closed_loop(server, 5 * (MAX_QUEUE // IMAGES + 2), SECONDS)
        refused = [each for each in heard if each.status != 200]
        assert {each.status for each in refused} == {429}
        assert all(int(each.retry_after or 0) >= 1 for each in refused)
        within(5, lambda: p99(closed_loop(server, 1, 0.5)) < 2 * p99(alone) + 0.05)
        grown = memory(server) / before
        print(
            f"alone p99 {1e3 * p99(alone):.1f} ms, {per_s:.0f} images/s, limit {1e3 * limit_s:.0f} "
            f"ms; overload: {len(heard) - len(refused)} accepted with p99 {1e3 * p99(heard):.0f} "
            f"ms, {len(refused)} refused; memory x {grown:.3f}"
        )
        assert p99(heard) <= 2 * limit_s + SLACK_S
        assert grown < 1.2


@lasting
def test_memory_stays(tiny_export: Path, encode: Encode) -> None:
    """Of 20,000 requests of mixed sizes: memory and open files are those after the first 2,000."""
    sizes = [(16, 16), (48, 40), (200, 300), (640, 480), (1200, 900)]
    bodies = [encode(i, ("PNG", "JPEG")[i % 2], sizes[i % 5]) for i in range(10)]
    forms = ["none", "mask", "overlay", "polygon", "tokens"]

    def some(server: Running, count: int) -> None:
        def ask(first: int) -> None:
            with httpx.Client(base_url=server.url, timeout=60) as client:
                for number in range(first, count, 4):
                    saliency = forms[number % 5] if number % 3 == 0 else "none"
                    answer = client.post(
                        "/v1/classify",
                        content=bodies[number % 10],
                        params={"saliency": saliency},
                    )
                    assert answer.status_code == 200

        threads = [threading.Thread(target=ask, args=(first,)) for first in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    with running(f"tiny={tiny_export}") as server:
        processes = [psutil.Process(server.process.pid), *server.workers()]
        some(server, 2000)
        time.sleep(6)  # connections that are idle are closed
        before = [(each.memory_info().rss, each.num_fds()) for each in processes]
        some(server, 18_000)
        time.sleep(6)
        after = [(each.memory_info().rss, each.num_fds()) for each in processes]
        print("server and worker, bytes and files:", before, after)
        for (rss, files), (later, more) in zip(before, after, strict=True):
            assert later < 1.1 * rss
            assert more <= files + 1
