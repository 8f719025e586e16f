"""A real Triton server on this machine, out of a wheel of the package index.

The server, version 2.51, is inside `nvidia-pytriton`, with the python backend and no other. It
reads arrays of NumPy 1 only. Nothing is written outside the cache.
"""

import os
import platform
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.tensorrt.bindings import Unavailable, kept

WHEEL = "nvidia-pytriton==0.7.0"
OLD_NUMPY = "numpy==1.26.4"
START_S = 60
_ROOT = Path(__file__).parents[2]
_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


class Triton(NamedTuple):
    """Where the server and what its models need lie."""

    home: Path
    numpy: Path
    """NumPy 1."""


class Server(NamedTuple):
    """A running server."""

    http: str
    grpc: str
    metrics: str


def triton(cache: Path) -> Triton:
    """Return the server, unpacked once.

    Raises:
        Unavailable: not this machine, or the index does not answer.
    """
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise Unavailable("Triton's server comes for x86-64 Linux only")

    def finish(folder: Path) -> None:
        server = folder / "pytriton" / "tritonserver"
        stub = server / "python_backend_stubs" / _PYTHON / "triton_python_backend_stub"
        if not stub.is_file():
            raise Unavailable(f"Triton 2.51 has no Python {_PYTHON}")
        stub.rename(server / "backends" / "python" / stub.name)
        for program in ("bin/tritonserver", f"backends/python/{stub.name}"):
            (server / program).chmod(0o755)

    return Triton(
        kept("triton-2.51", cache, [WHEEL], finish, ()),
        kept("numpy-1.26", cache, [OLD_NUMPY], lambda _: None, ()),
    )


def python_for(folder: Path, first: Sequence[Path]) -> Path:
    """Make the environment of Triton's Python, which does not look at PYTHONPATH.

    Args:
        folder: to write.
        first: what comes before this checkout and the packages of this environment.
    """
    venv.create(folder, symlinks=True)
    paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
    lines = [*first, _ROOT, *(path for path in sys.path if path.endswith("-packages"))]
    Path(paths["purelib"], "checkout.pth").write_text("".join(f"{line}\n" for line in lines))
    return folder


@contextmanager
def running(
    home: Path, python: Path, repository: Path, model: str, scratch: Path
) -> Iterator[Server]:
    """Run a server with one model loaded.

    Raises:
        RuntimeError: it does not become ready; with the end of its log.
    """
    http, grpc, metrics = _free_ports(3)
    server, log = home / "pytriton" / "tritonserver", scratch / "triton.log"
    ports = {"http": http, "grpc": grpc, "metrics": metrics}
    options = [f"--{name}-{part}" for name, port in ports.items()
               for part in (f"port={port}", "address=127.0.0.1")]  # fmt: skip
    libraries = (home / "nvidia_pytriton.libs", sysconfig.get_config_var("LIBDIR"))
    command: list[str | Path] = [
        *(server / "bin" / "tritonserver", f"--backend-directory={server / 'backends'}"),
        *(f"--model-repository={repository}", "--model-control-mode=explicit"),
        *(f"--load-model={model}", *options),
    ]
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
        "PATH": f"{python / 'bin'}:{os.environ['PATH']}",
    }
    with open(log, "wb") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    try:
        _wait(process, f"http://127.0.0.1:{http}/v2/health/ready", log)
        yield Server(f"127.0.0.1:{http}", f"127.0.0.1:{grpc}", f"127.0.0.1:{metrics}")
    finally:
        process.terminate()
        process.wait(START_S)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _wait(process: subprocess.Popen[bytes], ready: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(ready, timeout=START_S):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.05)
    raise RuntimeError(f"Triton did not become ready:\n{log.read_text('utf-8', 'replace')[-8000:]}")
