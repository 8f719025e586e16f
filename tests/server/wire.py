"""Bytes on a connection, as no well-behaved client sends them."""

import json
import socket
from typing import Any, NamedTuple

from tests.server.running import Running


class Said(NamedTuple):
    """An answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """Return the body's value."""
        return json.loads(self.body)


def connect(server: Running, timeout_s: float = 30) -> socket.socket:
    """Return a new connection."""
    host, _, port = server.address.rpartition(":")
    return socket.create_connection((host.strip("[]"), int(port)), timeout_s)


def head(method: str, path: str, *headers: str) -> bytes:
    """Return the head of a request."""
    return "\r\n".join((f"{method} {path} HTTP/1.1", "Host: x", *headers, "", "")).encode("latin-1")


def answers(connection: socket.socket) -> list[Said]:
    """Return all answers until the server closes."""
    data = b""
    try:
        while part := connection.recv(1 << 20):
            data += part
    except ConnectionResetError:
        pass
    found = []
    while data:
        begin, _, data = data.partition(b"\r\n\r\n")
        first, *lines = begin.decode("latin-1").split("\r\n")
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
        length = int(headers.get("content-length", "0"))
        found.append(Said(int(first.split()[1]), headers, data[:length]))
        data = data[length:]
    return found


def ask(server: Running, *sent: bytes) -> Said:
    """Return the only answer to bytes; the server must close, or be asked to."""
    with connect(server) as connection:
        try:
            for part in sent:
                connection.sendall(part)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has heard enough
        [said] = answers(connection)
        return said
