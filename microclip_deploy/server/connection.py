"""Connections whose clients must make progress.

uvicorn closes connections that are idle after an answer. These bounds also close those that never
send a request, send one byte by byte, send bytes that belong to nothing, or do not take an answer.
"""

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_WITHIN_S = 10.0
"""From the connection, or from the first byte after an answer, to the end of a request's head."""

TAKEN_WITHIN_S = 30.0
"""From the end of an answer until the client has taken it."""

MOST_HEAD_BYTES = 65_536
"""Of a head; also of trailers and of whatever else is sent between the bytes of a body."""


class Connection(HttpToolsProtocol):
    """uvicorn's connection, bounded in all but the body, which has bounds of its own."""

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._progress, self._fruitless_bytes = False, 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._stop_waiting()
        super().connection_lost(exc)

    def on_headers_complete(self) -> None:
        """Stop waiting for a head."""
        self._progress = True
        self._stop_waiting()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Take a part of a body."""
        self._progress = True
        super().on_body(body)

    def data_received(self, data: bytes) -> None:
        """Take bytes; too many that bring nothing end the connection."""
        if self._head_timer is None and self.cycle.response_complete:
            self._wait_for_head()
        self._progress = False
        super().data_received(data)
        self._fruitless_bytes = 0 if self._progress else self._fruitless_bytes + len(data)
        if self._fruitless_bytes > MOST_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("Request head too large.")

    def send_400_response(self, msg: str) -> None:
        """Answer in JSON what is no request."""
        told = json.dumps({"error": f"expected an HTTP/1.1 request; {msg}"})
        head = (
            "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
            f"content-length: {len(told)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write((head + told).encode("ascii"))
        self.transport.close()

    def on_response_complete(self) -> None:
        """Give the client time to take its answer."""
        super().on_response_complete()
        if self.transport.get_write_buffer_size():
            self.loop.call_later(TAKEN_WITHIN_S, self._require_taken, self.cycle)

    def _require_taken(self, cycle: object) -> None:
        if self.cycle is cycle and self.transport.get_write_buffer_size():
            self.transport.abort()

    def _wait_for_head(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_WITHIN_S, self._give_up)

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()
