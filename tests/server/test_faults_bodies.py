"""Requests that are too large, too slow, cut off, or no HTTP at all."""

import contextlib
import gzip
import json
import os
import re
import resource
import socket
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.server.conftest import Encode
from tests.server.lasting import lasting
from tests.server.running import Running, running, within
from tests.server.wire import answers, ask, connect, head

CLASSIFY = "/v1/classify"
LIMIT = 3_200_000
"""--max-body of this server."""


@pytest.fixture(scope="module")
def server(tiny_export: Path) -> Iterator[Running]:
    with running(
        f"tiny={tiny_export}",
        *("--max-batch", "4", "--max-body", str(LIMIT), "--body-timeout", "1.5"),
    ) as started:
        yield started


def post(*headers: str) -> bytes:
    return head("POST", CLASSIFY, *headers)


def chunked(body: bytes, size: int) -> bytes:
    parts = (body[i : i + size] for i in range(0, len(body), size))
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


CHUNKED = "Transfer-Encoding: chunked"
CLOSE = "Connection: close"

WRONG = {
    "too long by its header": (400, 413, [post(f"Content-Length: {10 * LIMIT}")]),
    "too long, sent whole": (413, 413, [post(f"Content-Length: {10 * LIMIT}"), b"x" * 10 * LIMIT]),
    "too long by its chunks": (413, 413, [post(CHUNKED), chunked(b"x" * 2 * LIMIT, 60_000)]),
    "gzip bomb": (413, 413, [b"gzip", gzip.compress(bytes(200_000_000))]),
    "deflate bomb": (413, 413, [b"deflate", zlib.compress(bytes(200_000_000))]),
    "gzip cut off": (400, 400, [b"gzip", gzip.compress(os.urandom(5000))[:-100]]),
    "gzip of nothing": (400, 400, [b"gzip", gzip.compress(b"")]),
    "no gzip": (400, 400, [b"gzip", b"hello"]),
    "another compression": (415, 415, [b"br", b"hello"]),
    "twice compressed": (415, 415, [b"gzip, gzip", gzip.compress(gzip.compress(b"x"))]),
    "another type": (
        415,
        415,
        [post("Content-Type: text/html", "Content-Length: 5", CLOSE), b"hello"],
    ),
    "negative length": (400, 400, [post("Content-Length: -5"), b"hello"]),
    "no number": (400, 400, [post("Content-Length: five"), b"hello"]),
    "a list of lengths": (400, 400, [post("Content-Length: 5, 5"), b"hello"]),
    "endless number": (400, 413, [post(f"Content-Length: {'9' * 5000}"), b"hello"]),
    "two lengths": (400, 400, [post("Content-Length: 5", "Content-Length: 6"), b"hello1"]),
    "length and chunks": (400, 400, [post("Content-Length: 5", CHUNKED), b"0\r\n\r\n"]),
    "chunks not last": (400, 400, [post("Transfer-Encoding: chunked, gzip"), b"0\r\n\r\n"]),
    "unknown transfer": (400, 400, [post("Transfer-Encoding: xchunked"), b"0\r\n\r\n"]),
    "spaced transfer": (400, 400, [post("Transfer-Encoding : chunked"), b"0\r\n\r\n"]),
    "bad chunk size": (400, 400, [post(CHUNKED), b"zz\r\nhello\r\n0\r\n\r\n"]),
    "negative chunk": (400, 400, [post(CHUNKED), b"-5\r\nhello\r\n0\r\n\r\n"]),
    "huge chunk": (400, 413, [post(CHUNKED), b"ffffffffffffffff1\r\nhello\r\n"]),
    "many headers": (400, 431, [post(*(f"X-{i}: {i}" for i in range(20_000)))]),
    "one long header": (400, 431, [post("X: " + "x" * 3_000_000)]),
    "a header that never ends": (400, 431, [b"GET / HTTP/1.1\r\nX: " + b"x" * 3_000_000]),
    "a long address": (400, 431, [head("GET", "/" + "x" * 3_000_000)]),
    "trailers": (400, 431, [post(CHUNKED), b"1\r\nx\r\n0\r\n" + b"X: x\r\n" * 300_000]),
    "chunk extensions": (400, 431, [post(CHUNKED), b"1;" + b"x" * 3_000_000 + b"\r\nx\r\n"]),
    "no HTTP": (400, 400, [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 10]),
    "HTTP/2": (400, 400, [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"]),
    "bytes in the address": (400, 400, [b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n"]),
    "a star": (400, 404, [b"OPTIONS * HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"]),
    "connect": (400, 405, [b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"]),
    "a long number": (400, 400, [head("POST", f"{CLASSIFY}?top_k={'1' * 5000}", CLOSE)]),
    "a length of JSON": (
        400,
        400,
        [
            head(
                "POST",
                "/v2/models/tiny/infer",
                f"Inference-Header-Content-Length: {'1' * 5000}",
                CLOSE,
            )
        ],
    ),
}


@pytest.mark.parametrize(("least", "most", "sent"), WRONG.values(), ids=WRONG)
def test_wrong_requests_are_refused(
    server: Running, least: int, most: int, sent: list[bytes]
) -> None:
    """In JSON, at once, and without an end of the server."""
    if len(sent) == 2 and not sent[0].startswith(b"POST"):
        encoding, body = sent
        length = f"Content-Length: {len(body)}"
        sent = [post(f"Content-Encoding: {encoding.decode()}", length, CLOSE), body]
    said = ask(server, *sent)
    assert least <= said.status <= most
    assert re.search("expected|too much|no such", said.json()["error"])
    assert server.process.poll() is None


def test_a_body_that_ends_early(server: Running) -> None:
    """The client is gone; nothing is left of its request."""
    with connect(server) as connection:
        connection.sendall(post("Content-Length: 100000") + b"half")
    within(5, lambda: any(entry["status"] == 400 for entry in server.logged()))
    assert server.is_ready()


def test_small_chunks(server: Running, encode: Encode) -> None:
    """A photo in pieces of 6 bytes, 3 MB of them."""
    photo = encode() + bytes(3_000_000)
    said = ask(server, post(CHUNKED, CLOSE), chunked(photo, 6))
    assert said.status == 200
    assert said.json()["photo"] == {"width": 48, "height": 40}


def test_memory_stays_bounded(server: Running) -> None:
    """After all of the above, with 200 MB in bombs and floods of 3 MB."""
    assert psutil.Process(server.process.pid).memory_info().rss < 400e6


SLOW = {
    "a body": (post("Content-Length: 100000"), b"x", b" 408 "),
    "a head": (head("GET", "/v2")[:-2], b"X", b""),
    "a body after its answer": (head("POST", "/x", "Content-Length: 100000"), b"x", b" 404 "),
    "empty lines after an answer": (head("GET", "/v2/health/live"), b"\r\n", b" 200 "),
}
AT_ONCE = "a body"
"""The others take 10 s."""


@pytest.mark.parametrize(
    ("begin", "drip", "told"),
    [
        pytest.param(*given, id=name, marks=() if name == AT_ONCE else lasting)
        for name, given in SLOW.items()
    ],
)
def test_slow_requests_do_not_stay(
    server: Running, encode: Encode, begin: bytes, drip: bytes, told: bytes
) -> None:
    """What arrives byte by byte is given up; others are answered meanwhile."""
    heard, end = b"", time.monotonic() + 25
    with connect(server) as slow:
        slow.sendall(begin)
        slow.settimeout(0.05)
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < end:
                slow.sendall(drip)
                with contextlib.suppress(TimeoutError):
                    part = slow.recv(65536)
                    heard += part
                    if not part:
                        break
                assert server.classify(encode()).status_code == 200
    assert time.monotonic() < end
    assert told in heard


@lasting
def test_answers_that_nobody_takes(server: Running) -> None:
    """They hold neither their connection for ever nor others."""
    process = psutil.Process(server.process.pid)
    within(20, lambda: process.num_fds() < 40)
    before = process.num_fds()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                connection.send(head("GET", "/openapi.json") * 1000)
        assert server.is_ready()
        within(60, lambda: process.num_fds() <= before)


def test_idle_connections(server: Running, encode: Encode) -> None:
    """Many connections that send nothing delay nobody, and are given back."""
    wanted = int(os.environ.get("MICROCLIP_FAULT_SOCKETS", "500"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < wanted + 100:
        pytest.skip(f"{hard} open files are allowed here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted + 100), hard))
    process = psutil.Process(server.process.pid)
    within(20, lambda: process.num_fds() < 40)
    before = process.num_fds()
    idle = [connect(server) for _ in range(wanted)]
    try:
        within(20, lambda: process.num_fds() >= before + wanted)
        assert all(server.classify(encode(i)).status_code == 200 for i in range(10))
    finally:
        for connection in idle:
            connection.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    within(20, lambda: process.num_fds() <= before + 3)


def test_what_http_allows(server: Running, encode: Encode) -> None:
    """HEAD, OPTIONS, HTTP/1.0, pipelining, 100-continue, a body where none is expected."""
    photo = encode()
    length = f"Content-Length: {len(photo)}"
    said = ask(server, head("HEAD", "/v1/models", CLOSE))
    assert said.status == 200
    assert not said.body
    said = ask(server, head("OPTIONS", CLASSIFY, CLOSE))
    assert said.status == 405
    assert said.headers["allow"] == "POST"
    said = ask(server, f"POST {CLASSIFY} HTTP/1.0\r\n{length}\r\n\r\n".encode() + photo)
    assert said.status == 200
    assert ask(server, head("GET", "/v2", "Content-Length: 3", CLOSE) + b"abc").status == 200
    page = ask(server, head("GET", "/page.js", "Content-Length: 3", CLOSE), b"abc")
    assert len(page.body) == int(page.headers["content-length"])
    with connect(server) as connection:
        connection.sendall((post(length) + photo) * 20 + post(length, CLOSE) + photo)
        found = answers(connection)
    assert [each.status for each in found] == [200] * 21
    with connect(server) as connection:
        connection.sendall(post(length, "Expect: 100-continue", CLOSE))
        assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(photo)
        assert answers(connection)[0].status == 200
    large = post(f"Content-Length: {2 * LIMIT}", "Expect: 100-continue")
    assert ask(server, large).status == 413


HOSTILE = {
    "a long string beside short ones": {"data": ["x" * 1_000_000] + ["y"] * 100_000},
    "many empty photos": {"name": "photo", "datatype": "BYTES", "data": [""] * 500_000},
    "no shape": {"name": "photo", "datatype": "BYTES", "shape": [], "data": [""]},
    "ragged": {"data": [[1, 2], [3]]},
    "a table": {"data": [{"1": 1}]},
    "flags": {"data": [True] * 10},
    "fractions": {"data": [0.5] * 3072},
    "large shape": {"shape": [10**400, 32, 32, 3], "data": []},
}


@pytest.mark.parametrize("tensor", HOSTILE.values(), ids=HOSTILE)
def test_hostile_tensors(server: Running, tensor: dict[str, object]) -> None:
    usual = {"name": "image", "datatype": "UINT8", "shape": [1, 32, 32, 3]}
    body = json.dumps({"inputs": [{**usual, **tensor}]})
    answer = httpx.post(f"{server.url}/v2/models/tiny/infer", content=body, timeout=30)
    assert answer.status_code == 400
    assert "expected" in answer.json()["error"]


@pytest.mark.parametrize("limit", [10**400, 1e300, -1, 0, True, "x", None])
def test_time_limits_of_any_size(server: Running, limit: object) -> None:
    images = {"name": "image", "datatype": "UINT8", "shape": [1, 32, 32, 3], "data": [0] * 3072}
    body = json.dumps({"inputs": [images], "parameters": {"timeout": limit}})
    answer = httpx.post(f"{server.url}/v2/models/tiny/infer", content=body, timeout=30)
    assert answer.status_code == (504 if limit is True else 200)
