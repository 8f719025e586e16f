"""Pillow's own warnings, hidden while photos are decoded."""

import re
import threading
import warnings
from typing import cast


class _PillowWarningsHidden:
    """Context manager that hides Pillow's own warnings while any thread is inside.

    Pillow warns about large images and damaged metadata. Both are handled here, and a caller that
    turns warnings into errors must not see them. `warnings.catch_warnings` is unsafe in threads:
    its exit restores a copy that may be another thread's. One filter is added and removed instead.
    """

    _FILTER = ("ignore", None, Warning, re.compile(r"PIL\."), 0)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._FILTER not in warnings.filters:
                self._filters().insert(0, self._FILTER)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and self._FILTER in warnings.filters:
                self._filters().remove(self._FILTER)

    @staticmethod
    def _filters() -> list[object]:
        """Return the list behind `warnings.filters`, which the type stubs call a sequence."""
        return cast("list[object]", warnings.filters)


PILLOW_WARNINGS_HIDDEN = _PillowWarningsHidden()
"""The one of this process."""
