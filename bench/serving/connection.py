"""HTTP/1.1 as the load clients speak it: ready requests over connections that stay open.

The client must not be what is measured. httptools parses answers in C, as uvicorn parses requests;
whatever else a client library does with every request (headers in dictionaries, cookies, redirects,
a task for each time-out) is left out. `ceiling` measures what this takes.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import NamedTuple
from urllib.parse import urlsplit

from microclip_deploy.errors import EnvironmentProblem, UsageError, require

TIMEOUT_S = 120.0
"""A request that takes longer has no answer."""


class Endpoint(NamedTuple):
    """Where a server listens."""

    host: str
    port: int
    tls: bool = False

    @property
    def url(self) -> str:
        """Return it as a user writes it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'s' if self.tls else ''}://{host}:{self.port}"


class Answer(NamedTuple):
    """What a server said."""

    status: int
    body: bytes


def endpoint_of(url: str) -> Endpoint:
    """Read http://HOST[:PORT] or https://HOST[:PORT].

    Raises:
        UsageError: anything else, such as a path behind it.
    """
    try:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        parts, port = urlsplit(""), 0
    rest = parts.path.strip("/") + parts.query + parts.fragment + (parts.username or "")
    if parts.scheme not in ("http", "https") or not parts.hostname or rest:
        raise UsageError(f"{url}: expected an address such as http://127.0.0.1:8000")
    return Endpoint(parts.hostname, port, parts.scheme == "https")


def request_bytes(
    endpoint: Endpoint, method: str, path: str, headers: Mapping[str, str], body: bytes = b""
) -> bytes:
    """Return a whole request as it goes over the wire."""
    host = endpoint.url.partition("//")[2]
    lines = {"Host": host, **headers, "Content-Length": str(len(body))}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + body


def ask(
    endpoint: Endpoint,
    method: str,
    path: str,
    headers: Mapping[str, str] | None = None,
    body: bytes = b"",
) -> Answer:
    """Send one request over a connection of its own.

    Raises:
        EnvironmentProblem: nobody answers there.
    """
    return ask_raw(endpoint, request_bytes(endpoint, method, path, headers or {}, body))


def ask_raw(endpoint: Endpoint, request: bytes) -> Answer:
    """Send one request that lies ready; as `ask`."""

    async def once() -> Answer:
        async with connections(endpoint) as opened:
            return await opened.send(request)

    try:
        return asyncio.run(once())
    except (OSError, TimeoutError) as error:
        raise EnvironmentProblem(
            f"{endpoint.url}: expected a server that answers, found {error or 'none'}; start it "
            "with `microclip-deploy serve`"
        ) from error


class Connections:
    """Open connections to one server: as many as there are requests under way."""

    def __init__(self, endpoint: Endpoint) -> None:
        """Open none yet."""
        self._endpoint = endpoint
        self._idle: list[_Connection] = []

    async def open(self, count: int) -> None:
        """Open so many beforehand, outside of what is timed."""
        self._idle += [await self._opened() for _ in range(count - len(self._idle))]

    async def send(self, request: bytes) -> Answer:
        """Send a request over a connection that nobody uses and return the answer.

        Raises:
            OSError: the server refuses the connection, or closes it before it has answered.
            TimeoutError: no answer within `TIMEOUT_S`.
        """
        connection = next((c for c in iter(self._take, None) if c.usable), None)
        connection = connection or await self._opened()
        try:
            async with asyncio.timeout(TIMEOUT_S):
                answer = await connection.send(request)
        except BaseException:
            connection.close()
            raise
        self._idle.append(connection)
        return answer

    def close(self) -> None:
        """Close all that are not in use."""
        while connection := self._take():
            connection.close()

    def _take(self) -> "_Connection | None":
        return self._idle.pop() if self._idle else None

    async def _opened(self) -> "_Connection":
        host, port, tls = self._endpoint
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(TIMEOUT_S):
            _, connection = await loop.create_connection(_Connection, host, port, ssl=tls or None)
        return connection


@asynccontextmanager
async def connections(endpoint: Endpoint) -> AsyncIterator[Connections]:
    """Give connections, and close them at the end."""
    opened = Connections(endpoint)
    try:
        yield opened
    finally:
        opened.close()


class _Connection(asyncio.Protocol):
    """One connection with at most one request under way."""

    def __init__(self) -> None:
        self.usable = True
        self._answer: asyncio.Future[Answer] | None = None
        self._body: list[bytes] = []
        self._httptools = require("httptools", "bench")
        self._parser = self._httptools.HttpResponseParser(self)

    async def send(self, request: bytes) -> Answer:
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._answer

    def close(self) -> None:
        self.usable = False
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self.usable = False
        self._fail(error or ConnectionResetError("the server closed the connection"))

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except self._httptools.HttpParserError as error:
            self._fail(ConnectionError(f"no HTTP: {error}"))
            self.close()

    def on_body(self, part: bytes) -> None:
        self._body.append(part)

    def on_message_complete(self) -> None:
        answer = Answer(self._parser.get_status_code(), b"".join(self._body))
        if not self._parser.should_keep_alive():
            self.close()
        self._body = []
        self._parser = self._httptools.HttpResponseParser(self)
        if self._answer and not self._answer.done():
            self._answer.set_result(answer)

    def _fail(self, error: Exception) -> None:
        if self._answer and not self._answer.done():
            self._answer.set_exception(error)
