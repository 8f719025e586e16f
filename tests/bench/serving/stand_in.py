"""A server in a thread that answers as a test says; while it thinks, everybody waits."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread

import httptools

from microclip_deploy.bench.serving.connection import Endpoint

Answers = Callable[[str, bytes], tuple[int, bytes] | None]
"""Path and body of a request -> status and body; None closes the connection."""


@contextmanager
def stand_in(answers: Answers) -> Iterator[Endpoint]:
    opened: list[asyncio.Transport] = []

    class Protocol(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            assert isinstance(transport, asyncio.Transport)
            self.transport = transport
            opened.append(transport)
            self.begin()

        def begin(self) -> None:
            self.parser, self.path, self.body = httptools.HttpRequestParser(self), "", b""

        def data_received(self, data: bytes) -> None:
            self.parser.feed_data(data)

        def on_url(self, url: bytes) -> None:
            self.path = url.decode()

        def on_body(self, part: bytes) -> None:
            self.body += part

        def on_message_complete(self) -> None:
            answer = answers(self.path, self.body)
            self.begin()
            if answer is None:
                self.transport.abort()
                return
            status, body = answer
            head = f"HTTP/1.1 {status} said\r\nContent-Length: {len(body)}\r\n\r\n"
            self.transport.write(head.encode() + body)

    async def close() -> None:  # an open transport warns when it is collected, in another test
        server.close()
        for transport in opened:
            transport.abort()
        await asyncio.sleep(0)

    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(loop.create_server(Protocol, "127.0.0.1", 0, backlog=500))
    thread = Thread(target=loop.run_forever)
    thread.start()
    try:
        yield Endpoint(*server.sockets[0].getsockname())
    finally:
        asyncio.run_coroutine_threadsafe(close(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
