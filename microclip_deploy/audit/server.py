"""The page's server: the standard library's, for this machine alone.

Every path begins with a random token, so that other users and other sites cannot guess it. The Host
header must name this machine, against names that are made to point here. Nothing is served but the
page, drawn photos and examples, by number.
"""

import json
import re
import secrets
import threading
import webbrowser
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import parse_qs, urlsplit

from microclip_deploy.audit.desk import Desk
from microclip_deploy.data.decode import BadImage
from microclip_deploy.errors import EnvironmentProblem, MicroclipError

_PAGE = Path(__file__).parent / "page"
_FILES = {
    "": ("index.html", "text/html; charset=utf-8"),
    "page.css": ("page.css", "text/css; charset=utf-8"),
    "page.js": ("page.js", "text/javascript; charset=utf-8"),
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
_PICTURE = {"Cache-Control": "private, max-age=3600"}  # the next photo is loaded beforehand
_MAX_BODY = 10_000  # bytes
_TIMEOUT_S = 30.0  # of a connection that says nothing


class PageServer(ThreadingHTTPServer):
    """Serves an audit at `url` until `shutdown`."""

    daemon_threads = True

    def __init__(self, desk: Desk) -> None:
        """Listen on a free port of the loopback interface.

        Raises:
            EnvironmentProblem: there is none.
        """
        self.desk, self.token = desk, secrets.token_urlsafe(16)
        try:
            super().__init__(("127.0.0.1", 0), _Handler)
        except OSError as error:
            raise EnvironmentProblem(
                f"audit: expected a free port on 127.0.0.1, found: {error}; use --csv"
            ) from error
        self.hosts = {f"{name}:{self.server_port}" for name in ("127.0.0.1", "localhost")}
        self.url = f"http://127.0.0.1:{self.server_port}/{self.token}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of connections that break off."""


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "microclip-deploy", ""
    timeout = _TIMEOUT_S

    def do_GET(self) -> None:
        """Give the page, the state, names or pictures."""
        self._answered(self._get)

    def do_POST(self) -> None:
        """Take an answer, take one back, or end."""
        self._answered(self._post)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: the address holds the token."""

    def _answered(self, method: Callable[[str, str], None]) -> None:
        address = urlsplit(self.path)
        _, token, *rest = [*address.path.split("/", 2), ""]
        known = secrets.compare_digest(token.encode(), self.server.token.encode())
        if self.headers.get("Host") not in self.server.hosts or not known:
            self._send(404, b"not found", "text/plain")
            return
        try:
            method(rest[0], address.query)
        except BadImage as error:
            self._send(410, error.reason.encode(), "text/plain; charset=utf-8")
        except MicroclipError as error:
            self._json({"error": str(error)}, 400)
        except (IndexError, KeyError, TypeError, ValueError):
            self._send(404, b"not found", "text/plain")

    def _get(self, path: str, query: str) -> None:
        desk = self.server.desk
        if path in _FILES:
            name, kind = _FILES[path]
            self._send(200, (_PAGE / name).read_bytes(), kind)
        elif path == "state":
            self._json(desk.state())
        elif path == "names":
            self._json(desk.matching(parse_qs(query).get("like", [""])[0]))
        elif found := re.fullmatch(r"photo/(\d{1,7})", path, re.ASCII):
            self._send(200, desk.photo(int(found[1])), "image/jpeg", _PICTURE)
        elif found := re.fullmatch(r"example/(\d{1,7})/(\d)", path, re.ASCII):
            picture = desk.example(int(found[1]), int(found[2]))
            self._send(200, picture, "image/jpeg", _PICTURE)
        else:
            raise KeyError(path)

    def _post(self, path: str, _query: str) -> None:
        desk = self.server.desk
        body = self._body()
        if path == "answer":
            desk.answer(int(body["number"]), str(body["answer"]))
        elif path == "undo":
            desk.undo()
        elif path == "end":
            threading.Thread(target=self.server.shutdown).start()
        else:
            raise KeyError(path)
        self._json(desk.state())

    def _body(self) -> Any:
        """Read JSON. Another site cannot send this kind of content here without being asked."""
        length = int(self.headers.get("Content-Length") or 0)
        if not 0 <= length <= _MAX_BODY:
            self.close_connection = True
            raise ValueError(length)
        body = self.rfile.read(length)
        if self.headers.get_content_type() != "application/json":
            raise ValueError("not JSON")
        return json.loads(body)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), "application/json")

    def _send(
        self, status: int, body: bytes, kind: str, more: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        if status >= 400:
            self.close_connection = True  # a body may not have been read
        self.send_response(status)
        about = {"Content-Type": kind, "Content-Length": str(len(body))}
        for name, value in {**_HEADERS, **about, **more}.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)


def serve_page(desk: Desk, *, browser: bool, tell: Callable[[str], None]) -> None:
    """Serve until the page asks for the end; signals raise through.

    Args:
        desk: the audit.
        browser: open one.
        tell: gets the address.
    """
    with PageServer(desk) as server:
        tell(server.url)
        if browser:
            threading.Thread(target=webbrowser.open, args=(server.url,), daemon=True).start()
        server.serve_forever(poll_interval=0.1)
