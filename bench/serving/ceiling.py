"""A server that does nothing: what the clients reach against it is the most they can measure."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread

from microclip_deploy.bench.serving.connection import Endpoint
from microclip_deploy.errors import require


@contextmanager
def trivial_server(body: bytes) -> Iterator[Callable[[None], Endpoint]]:
    """Answer every request with the same body at once; for a process of its own.

    It reads and parses requests as uvicorn does, and looks at nothing. Asked, it tells where it is.
    """
    httptools = require("httptools", "bench")
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode()

    class Trivial(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            assert isinstance(transport, asyncio.Transport)
            self.transport, self.parser = transport, httptools.HttpRequestParser(self)

        def data_received(self, data: bytes) -> None:
            self.parser.feed_data(data)

        def on_message_complete(self) -> None:
            self.parser = httptools.HttpRequestParser(self)
            self.transport.write(head + body)

    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(loop.create_server(Trivial, "127.0.0.1", 0))
    thread = Thread(target=loop.run_forever, daemon=True)
    thread.start()
    host, port = server.sockets[0].getsockname()
    try:
        yield lambda _: Endpoint(host, port)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        server.close()
        loop.close()
