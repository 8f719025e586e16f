"""What every request passes: its id, the API key, errors as JSON, metrics and the access log."""

import asyncio
import contextlib
import hmac
import logging
import re
import time
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from microclip_deploy.server.access_log import AccessLog
from microclip_deploy.server.catalog import Catalog
from microclip_deploy.server.metrics import Metrics
from microclip_deploy.server.refusal import Refusal

REQUEST_ID = "X-Request-Id"
_KEPT_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")

_PROTECTED = re.compile(r"/(v1/|v2/models/|v2/repository/)")
"""Paths that need the API key; health, metrics and the page do not."""

_LINGER_S = 1.0
"""An early answer is followed by listening to the rest of the body for so long: a connection that
is closed under a client that still sends may take the answer with it."""

_log = logging.getLogger(__name__)


def refused(refusal: Refusal) -> Response:
    """Return the answer that tells a client of a refusal."""
    headers = dict(refusal.headers)
    if refusal.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if refusal.retry_after_s is not None:
        headers["Retry-After"] = str(refusal.retry_after_s)
    return JSONResponse({"error": str(refusal)}, refusal.status, headers)


class Gate:
    """The application behind it, with what belongs to every answer."""

    def __init__(
        self, app: ASGIApp, catalog: Catalog, metrics: Metrics, access_log: AccessLog
    ) -> None:
        self._app, self._catalog = app, catalog
        self._metrics, self._access_log = metrics, access_log
        key = catalog.settings.api_key
        self._key = key.encode() if key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, headers = time.perf_counter(), Headers(scope=scope)
        given = headers.get(REQUEST_ID, "")
        identity = given if _KEPT_ID.fullmatch(given) else uuid.uuid4().hex
        scope["state"] = {**scope.get("state", {}), "id": identity, "begun": begun}
        status, more = 0, _has_body(headers)

        async def hear() -> Message:
            nonlocal more
            message = await receive()
            more = more and message["type"] == "http.request" and message["more_body"]
            return message

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                told = MutableHeaders(scope=message)
                told[REQUEST_ID] = identity
                told["X-Content-Type-Options"] = "nosniff"
                if more or self._catalog.draining:
                    told["Connection"] = "close"
            elif more and not message.get("more_body", False):
                await send({**message, "more_body": True})
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_LINGER_S):
                        while more:
                            await hear()
                message = {"type": "http.response.body"}
            await send(message)

        try:
            if self._lacks_key(scope["path"], headers):
                told = "expected the API key as X-API-Key or Bearer token; send it"
                await refused(Refusal(401, told, "key"))(scope, hear, tell)
            else:
                await self._app(scope, hear, tell)
        except Exception:  # its answer has been sent
            _log.exception("error: request %s failed; please report it", identity)
        finally:
            self._note(scope, status, time.perf_counter() - begun, identity)

    def _lacks_key(self, path: str, headers: Headers) -> bool:
        if self._key is None or not _PROTECTED.match(path):
            return False
        given = headers.get("x-api-key") or headers.get("authorization", "").removeprefix("Bearer ")
        return not hmac.compare_digest(given.encode("latin-1"), self._key)

    def _note(self, scope: Scope, status: int, seconds: float, identity: str) -> None:
        """Count and log an answer; a status of 0: the client went first."""
        route = getattr(scope.get("endpoint"), "__name__", "other")
        self._metrics.answered(route, status, seconds)
        entry: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "id": identity,
            "client": (scope.get("client") or ("",))[0],
            "method": scope["method"],
            "route": route,
            "status": status,
            "ms": round(1e3 * seconds, 3),
            **scope["state"].get("log", {}),
        }
        self._access_log.write(entry)


def _has_body(headers: Headers) -> bool:
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
