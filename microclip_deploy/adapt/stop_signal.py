"""SIGINT and SIGTERM as a flag, so that an iteration is finished and saved before a run stops."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self


class StopSignal:
    """While entered, remembers the first signal instead of dying of it; a second one kills."""

    def __init__(self) -> None:
        self.received = 0
        """Number of the signal, 0 while there is none."""
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        """Install the handlers; outside the main thread Python allows none, and none are."""
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._remember)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Put the previous handlers back."""
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _remember(self, signum: int, _frame: FrameType | None) -> None:
        self.received = signum
        signal.signal(signum, self._previous[signum])
