"""The body of a request, bounded in size, in time, and in what all bodies together may hold."""

import asyncio
import contextlib
import zlib
from collections.abc import AsyncIterator

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request

from microclip_deploy.server.refusal import Refusal

_BODIES = 25
"""Bodies of the largest size that may be in memory at once."""


class Bodies:
    """Reads bodies; one object a server, so that it knows what they hold together."""

    def __init__(self, limit: int, timeout_s: float) -> None:
        self._limit, self._timeout_s = limit, timeout_s
        self._held, self._room = 0, _BODIES * limit

    @contextlib.asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """Give a body, decompressed if it says so; its memory counts until the block ends.

        Raises:
            Refusal: 400 cut off or not decompressible, 408 too slow, 413 too large, 415 another
                compression, 429 too much in memory.
        """
        parts: list[bytes] = []
        try:
            await self._fill(parts, request)
            body = parts.pop() if len(parts) == 1 else b"".join(parts)
            parts[:] = [_decompressed(body, request.headers, self._limit)]
            self._held += len(parts[0]) - len(body)
            self._require_room()
            yield parts[0]
        finally:
            self._held -= sum(map(len, parts))

    async def _fill(self, parts: list[bytes], request: Request) -> None:
        """Read the parts of a body."""
        _require_small(request.headers, self._limit)
        size = 0
        try:
            async with asyncio.timeout(self._timeout_s):
                async for part in request.stream():
                    parts.append(part)
                    size += len(part)
                    self._held += len(part)
                    if size > self._limit:
                        raise _too_large(self._limit)
                    self._require_room()
        except TimeoutError:
            told = f"expected the body within {self._timeout_s:g} s; send faster"
            raise Refusal(408, told, "slow") from None
        except ClientDisconnect:
            raise Refusal(400, "the body ended early; send all of it", "gone") from None

    def _require_room(self) -> None:
        if self._held > self._room:
            raise Refusal(429, "too much is being sent; send again later", "full", 1)


def _require_small(headers: Headers, limit: int) -> None:
    """Refuse a body by what its headers say, before it is read."""
    length = headers.get("content-length", "0")
    if not (length.isascii() and length.isdigit()):
        raise Refusal(400, "expected Content-Length as a whole number; send one", "body")
    if int(length) > limit:
        raise _too_large(limit)


def _too_large(limit: int) -> Refusal:
    return Refusal(413, f"expected a body of at most {limit} bytes, found more; send less", "large")


def _decompressed(body: bytes, headers: Headers, limit: int) -> bytes:
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding == "identity":
        return body
    if encoding not in ("gzip", "deflate"):
        raise Refusal(415, "expected Content-Encoding gzip, deflate or none; send one", "body")
    unpack = zlib.decompressobj(wbits=47 if encoding == "gzip" else 15)
    try:
        out = unpack.decompress(body, limit + 1)
    except zlib.error as error:
        raise Refusal(
            400, f"expected a body in {encoding}, found other bytes; pack it", "body"
        ) from error
    if len(out) > limit:
        raise _too_large(limit)
    if not unpack.eof:
        raise Refusal(400, f"expected a body in {encoding}, found a part; send all of it", "body")
    return out
