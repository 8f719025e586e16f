"""Paths as users of the library give them."""

import os
from pathlib import Path

from microclip_deploy.errors import UsageError

StrPath = str | os.PathLike[str]
"""What every public function takes for a path."""


def as_path(path: StrPath, what: str) -> Path:
    """Return a path; `~` stands for the home folder unless something of that name is there.

    Args:
        path: text, a Path, or another os.PathLike.
        what: names the argument in errors.

    Raises:
        UsageError: not a path, or an empty one.
    """
    text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
    if not isinstance(text, str) or not text:
        found = "an empty text" if text == "" else type(path).__name__
        raise UsageError(f"{what}: expected a path (str or os.PathLike), found {found}; give one")
    if text.startswith("~") and not os.path.lexists(text):
        text = os.path.expanduser(text)
    return Path(text)
