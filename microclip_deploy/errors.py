"""Errors a user can act on, each with the exit code its command ends with.

    MicroclipError          1  internal error: please report it
    ├── UsageError          2  an option or configuration value is wrong
    ├── DataError           3  images, class lists or descriptions cannot be used
    │   └── CheckpointError 3  a checkpoint or model is missing, damaged or of the wrong kind
    ├── EnvironmentProblem  4  a package, device or resource is missing
    ├── VerificationError   5  a result does not equal the one it must equal
    ├── ThresholdError      6  a limit the user set was missed
    └── Interrupted   130/143  stopped by SIGINT or SIGTERM

Every message says what was expected, what was found, and what to do.
"""

import importlib
import re
import signal
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

EXTRA_OF: Mapping[str, str] = {
    "torch": "adapt",
    "torchvision": "adapt",
    "open_clip": "adapt",
    "timm": "adapt",
    "jinja2": "adapt",
    "markupsafe": "adapt",
    "matplotlib": "adapt",
    "tensorboard": "adapt",
    "onnx": "export",
    "onnxscript": "export",
    "onnxruntime": "cpu",
    "cpuinfo": "bench",
    "psutil": "bench",
    "pynvml": "bench",
    "starlette": "serve",
    "uvicorn": "serve",
    "httptools": "serve",
    "prometheus_client": "serve",
    "python_multipart": "serve",
    "openai": "describe",
    "httpx2": "describe",
    "pyarrow": "parquet",
    "obstore": "remote",
    "tensorrt": "gpu",
    "cupy": "gpu",
}
"""The extra that installs a package, by the name it is imported under."""


class MicroclipError(Exception):
    """Base of all errors raised on purpose; `exit_code` is the command's exit status."""

    exit_code = 1


class UsageError(MicroclipError):
    """An option or a configuration value is wrong."""

    exit_code = 2


class DataError(MicroclipError):
    """The user's images, class names or descriptions cannot be used."""

    exit_code = 3


class CheckpointError(DataError):
    """A checkpoint or model is missing, damaged, or of a kind this version cannot use."""


class EnvironmentProblem(MicroclipError):
    """A package, a device or a resource such as disk space is missing."""

    exit_code = 4


class VerificationError(MicroclipError):
    """A result differs from the one it must equal."""

    exit_code = 5


class ThresholdError(MicroclipError):
    """A limit set by the user was missed."""

    exit_code = 6


class Interrupted(MicroclipError):
    """Stopped by a signal; what was saved before is complete."""

    def __init__(self, message: str, signum: int = signal.SIGINT) -> None:
        """Keep the shell's convention: 128 plus the signal number."""
        super().__init__(message)
        self.exit_code = 128 + int(signum)


def require(module: str, extra: str) -> ModuleType:
    """Import a module of an optional extra.

    Args:
        module: importable name, such as "torch".
        extra: the extra of this package that installs it, such as "adapt".

    Raises:
        EnvironmentProblem: the module is not installed; the message holds the install line.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise missing_package(error.name or module, extra) from error


def missing_package(name: str, extra: str) -> EnvironmentProblem:
    """Return the error of a package that is not installed, with the line that installs it."""
    return EnvironmentProblem(
        f"the package '{name}' is needed here and is not installed; "
        f'run: pip install "microclip-deploy[{extra}]"'
    )


def printable(path: Path | str) -> str:
    """Return the path on one line, safe for a terminal, a log and UTF-8 output.

    Line breaks, control characters and undecodable bytes become backslash escapes.
    """
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii")
        for c in as_url(str(path))
    )


def as_url(path: str) -> str:
    """Return the URL that a path stands for (`data.remote`), any other path as it is."""
    return re.sub(r"^(s3|gs|https?):/+", r"\1://", path)
