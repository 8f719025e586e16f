"""Other servers with the same session, started for a measurement and stopped after it.

They are no dependencies: one that is not installed says so. Each is set up as well as its
documentation tells, and what that is stands in the result.
"""

import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from microclip_deploy.artifact import make_directory, write_bytes
from microclip_deploy.bench.serving.bodies import OCTETS, pixel_request
from microclip_deploy.bench.serving.connection import Endpoint, request_bytes
from microclip_deploy.bench.serving.processes import Watched, free_port, module, running
from microclip_deploy.errors import EnvironmentProblem

MOST_IMAGES = 32
"""In one call of the model, as the server of this package by default."""

_MODEL = "session"
"""Name of Triton's model."""


class Served(NamedTuple):
    """The session that every peer serves."""

    export: Path
    device: str
    threads: int | None
    size: int
    classes: int
    folder: Path
    """For whatever has to be written."""


class Peer(NamedTuple):
    """A server that is running."""

    name: str
    what: str
    endpoint: Endpoint
    process: Watched
    request: Callable[[NDArray[np.uint8]], bytes]
    """Views (B, S, S, 3) -> a request whose answer ends with the logits."""


@contextmanager
def litserve(session: Served, images: int) -> Iterator[Peer]:
    """Run LitServe.

    Args:
        session: what it serves.
        images: of every request; batches are counted in requests there.

    Raises:
        EnvironmentProblem: it is not installed, or does not start.
    """
    if find_spec("litserve") is None:
        raise EnvironmentProblem("'litserve' is not installed; run: pip install litserve")
    endpoint, most = free_port(), max(1, MOST_IMAGES // images)
    given = (session.export, session.device, session.threads or 0, endpoint.port, most)
    command = module("microclip_deploy.bench.serving.litserve_server", *map(str, given))
    what = (
        f"LitServe {version('litserve')}, one worker, raw bytes in and out, batches of whatever "
        f"waits, at most {MOST_IMAGES} images"
    )

    def request(views: NDArray[np.uint8]) -> bytes:
        headers = {"Content-Type": OCTETS}
        return request_bytes(endpoint, "POST", "/predict", headers, views.tobytes())

    log = session.folder / "litserve.log"
    with running("LitServe", command, endpoint, "/health", log) as process:
        yield Peer("LitServe", what, endpoint, process, request)


@contextmanager
def triton(session: Served, images: int) -> Iterator[Peer]:
    """Run Triton with its Python backend; `tritonserver` on the PATH.

    Args:
        session: what it serves.
        images: of every request.

    Raises:
        EnvironmentProblem: it is not installed, or does not start.
    """
    program = shutil.which("tritonserver")
    if program is None:
        raise EnvironmentProblem(
            "expected the program 'tritonserver' on the PATH, found none; docs/benchmarks.md says "
            "where it comes from"
        )
    repository, endpoint = session.folder / "triton", free_port()
    _write_repository(repository, session, max(MOST_IMAGES, images))
    command = [program, f"--model-repository={repository}", "--http-address=127.0.0.1",
               f"--http-port={endpoint.port}", "--allow-grpc=false", "--allow-metrics=false",
               "--log-info=false"]  # fmt: skip
    what = (
        "Triton, Python backend, one instance, binary tensors by HTTP, dynamic batching without "
        f"delay, at most {MOST_IMAGES} images"
    )

    def request(views: NDArray[np.uint8]) -> bytes:
        return pixel_request(endpoint, _MODEL, views, {})

    log = session.folder / "triton.log"
    with running("Triton", command, endpoint, "/v2/health/ready", log) as process:
        yield Peer("Triton", what, endpoint, process, request)


Opening = Callable[[Served, int], AbstractContextManager[Peer]]
PEERS: Mapping[str, Opening] = {"litserve": litserve, "triton": triton}


def _write_repository(directory: Path, session: Served, most: int) -> None:
    """Write Triton's model repository: one model, the product's session in Python."""
    model = directory / _MODEL
    for each in (directory, model, model / "1"):
        make_directory(each)
    # Triton's Python ignores the environment and has a standard library of its own.
    library = sysconfig.get_path("stdlib")
    folders = [path for path in sys.path if path and Path(path).is_dir()]
    packages = [path for path in folders if library not in path or "-packages" in path]
    code = Path(__file__).with_name("triton_model.py").read_text()
    code = f"import sys\n\nsys.path[:0] = {packages!r}\n{code}"
    write_bytes(model / "1" / "model.py", code.encode())
    given = {
        "export": str(session.export.resolve()),
        "device": session.device,
        "threads": str(session.threads or 0),
    }
    parameters = "".join(
        f'parameters {{ key: "{key}" value {{ string_value: {_quoted(value)} }} }}\n'
        for key, value in given.items()
    )
    side = session.size
    config = (
        f'backend: "python"\nmax_batch_size: {most}\n'
        f'input {{ name: "image" data_type: TYPE_UINT8 dims: [{side}, {side}, 3] }}\n'
        f'output {{ name: "logits" data_type: TYPE_FP32 dims: [{session.classes}] }}\n'
        f"dynamic_batching {{ }}\ninstance_group {{ kind: KIND_CPU count: 1 }}\n{parameters}"
    )
    write_bytes(model / "config.pbtxt", config.encode())


def _quoted(text: str) -> str:
    """Return a string of a protobuf text file."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
