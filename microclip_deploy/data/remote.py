"""Files in object stores and on web servers: `s3://`, `gs://` and `https://`, by obstore.

As a path, `s3://bucket/key` is `s3:/bucket/key`. Credentials and endpoints come from the usual
variables (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, `GOOGLE_SERVICE_ACCOUNT`, ...), and so do
certificate authorities (`SSL_CERT_FILE`). Requests that fail are repeated for RETRY_S; then the run
ends and can be resumed.
"""

import http.client
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import IO, TYPE_CHECKING, Any, NamedTuple, cast

from microclip_deploy.errors import EnvironmentProblem, as_url, printable, require

if TYPE_CHECKING:
    from obstore.store import ObjectStore

SCHEMES = ("s3", "gs", "https", "http")

RETRY_S = 60
"""How long a request is repeated."""

_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or for a public bucket AWS_SKIP_SIGNATURE",
    "gs": "GOOGLE_SERVICE_ACCOUNT, a key file, or for a public bucket GOOGLE_SKIP_SIGNATURE",
}

_READ_AHEAD = 8 * 2**20  # bytes a request where a file is read through


class _Place(NamedTuple):
    store: "ObjectStore"
    key: str


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Say whether a path stands for a URL."""
    scheme, colon, _ = os.fspath(path).partition(":/")
    return bool(colon) and scheme in SCHEMES


@cache
def status(path: str) -> tuple[int, int]:
    """Return the size of an object, bytes, and a number that changes with it; asked for once.

    Raises:
        FileNotFoundError: nothing is there.
        EnvironmentProblem: the store cannot be reached, or refuses.
    """
    with _explained(path) as (store, key):
        about = _obstore().head(store, key)
        told = f"{about.get('e_tag')} {about['last_modified']}"
        return int(about["size"]), zlib.crc32(told.encode())


def read(path: str) -> bytes:
    """Return an object; raises as `status`."""
    with _explained(path) as (store, key):
        return bytes(_obstore().get(store, key).bytes())


def read_range(path: str, offset: int, size: int) -> bytes:
    """Return bytes of an object; raises as `status`."""
    if not size:
        return b""
    with _explained(path) as (store, key):
        return bytes(_obstore().get_range(store, key, start=offset, length=size))


def open_file(path: str) -> IO[bytes]:
    """Return an object as a seekable stream; raises as `status`."""
    with _explained(path) as (store, key):
        reader = _obstore().open_reader(store, key, buffer_size=_READ_AHEAD)
    return cast("IO[bytes]", _Stream(path, reader))


def names_below(path: str) -> list[str]:
    """Return the names below a prefix; raises as `status`."""
    with _explained(path) as (store, key):
        prefix = f"{key.rstrip('/')}/" if key else ""
        if path.startswith("http"):
            return []  # a web server has no listing
        found = [item["path"] for page in _obstore().list(store, prefix) for item in page]
    return [name.removeprefix(prefix) for name in found]


class _Stream:
    """What tarfile and pyarrow need of a stream, of obstore's reader."""

    def __init__(self, path: str, reader: Any) -> None:
        self._path, self._reader = path, reader
        self.closed = False

    def read(self, size: int = -1) -> bytes:
        with _explained(self._path):
            return bytes(self._reader.read(None if size is None or size < 0 else size))

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._reader.seek(offset, whence))

    def tell(self) -> int:
        return int(self._reader.tell())

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _obstore() -> Any:
    return require("obstore", "remote")


@cache
def _store(root: str) -> "ObjectStore":
    require("obstore", "remote")
    from obstore.store import from_url

    if root.startswith("gs:"):
        _require_google_credentials()
    return from_url(
        root,
        client_options={"allow_http": True, "timeout": "30s"},
        retry_config={"max_retries": 1000, "retry_timeout": timedelta(seconds=RETRY_S)},
    )


def _require_google_credentials() -> None:
    """Raise OSError where there are none, before obstore asks for them for minutes."""
    stored = os.path.expanduser("~/.config/gcloud/application_default_credentials.json")
    if os.path.exists(stored) or any(name.startswith("GOOGLE_") for name in os.environ):
        return
    host = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
    machine = http.client.HTTPConnection(host, timeout=3)
    try:
        machine.connect()
    except OSError as error:
        told = f"no credentials, and no machine of Google's, which would have its own ({error})"
        raise OSError(told) from error
    finally:
        machine.close()


@contextmanager
def _explained(path: str) -> Iterator[_Place]:
    """Give where a path is; turn what a store answers into errors a user can act on."""
    exceptions = require("obstore.exceptions", "remote")
    scheme, _, rest = as_url(path).partition("://")
    root, _, key = rest.partition("/")
    try:
        yield _Place(_store(f"{scheme}://{root}"), key)
    except (FileNotFoundError, exceptions.NotFoundError) as error:
        raise FileNotFoundError(path) from error
    except (exceptions.BaseError, OSError, ValueError) as error:
        refused = isinstance(
            error, (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError)
        ) or any(word in str(error).lower() for word in ("credential", "accesskey", "token"))
        told = printable(str(error).split("\n")[0])[:300]
        remedy = f"it was tried for up to {RETRY_S} s; check network and address"
        doubt = re.search(r"InvalidCertificate\(\s*(\w+)", str(error))
        if doubt:
            told = f"a certificate that is not trusted ({doubt[1]})"
            remedy = "set SSL_CERT_FILE to a PEM file of the authorities to trust"
        elif refused:
            remedy = "give an address that needs no credentials"
            if scheme in _CREDENTIALS:
                remedy = f"set {_CREDENTIALS[scheme]}=true"
        raise EnvironmentProblem(
            f"{as_url(path)}: expected an answer of the store, found: {told}; {remedy}, and run "
            "again, adapt with --resume"
        ) from error
