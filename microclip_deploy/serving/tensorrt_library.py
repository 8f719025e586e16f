"""The library that `flavour` chose, loaded as `trt`, and what it says; needs no GPU."""

import importlib
from collections import deque
from typing import Any

from microclip_deploy.errors import EnvironmentProblem
from microclip_deploy.serving.flavour import EXTRA_OF, MODULES, TENSORRT, Flavour, flavour_here

FLAVOUR: Flavour = flavour_here() or TENSORRT
try:
    trt: Any = importlib.import_module(MODULES[FLAVOUR])  # the bindings have no types
except ImportError as error:
    raise EnvironmentProblem(
        f"{FLAVOUR}: expected its Python module and its library, found: {error}; reinstall it: "
        f'pip install --force-reinstall "microclip-deploy[{EXTRA_OF[FLAVOUR]}]"'
    ) from error
NAME = f"{FLAVOUR} {trt.__version__}"

_KEPT_LINES = 20_000
_LISTING = "Layers:"
"""How the one message begins in which the builder tells every layer."""


class Log(trt.ILogger):  # type: ignore[misc]
    """Keeps what TensorRT says; of its most talkative level only the layers of the last build.

    One a process, because TensorRT keeps the first one that it is given.
    """

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self._lines: deque[tuple[str, str]] = deque(maxlen=_KEPT_LINES)
        self._listing = ""

    def log(self, severity: Any, msg: str) -> None:
        """Take a message; called from TensorRT's own threads."""
        if severity != trt.ILogger.Severity.VERBOSE:
            self._lines.append((severity.name, msg))
        elif msg.startswith(_LISTING):
            self._listing = msg

    def taken(self) -> list[str]:
        """Return the lines so far and forget them."""
        lines = [f"{severity}: {message}" for severity, message in self._lines]
        self._lines.clear()
        return lines

    def listing(self) -> str:
        """Return the layers of the last build, and forget them; "" where it told none."""
        listing, self._listing = self._listing, ""
        return listing

    def last_error(self) -> str:
        """Return what TensorRT complained of last, in one line."""
        told = [message for severity, message in self._lines if "ERROR" in severity]
        return " ".join(told[-1].split())[:400] if told else "TensorRT gives no reason"


LOG = Log()
