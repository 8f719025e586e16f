"""Paths as users of the library give them."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import overload

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


class Paths(Sequence[Path]):
    """Paths kept as text: a million take a quarter of the memory and time of as many objects."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self.texts = tuple(texts)

    @overload
    def __getitem__(self, index: int) -> Path: ...
    @overload
    def __getitem__(self, index: slice) -> "Paths": ...
    def __getitem__(self, index: int | slice) -> "Path | Paths":
        """Return one as a Path, or some of them."""
        if isinstance(index, slice):
            return Paths(self.texts[index])
        return Path(self.texts[index])

    def __len__(self) -> int:
        return len(self.texts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(self.texts)

    def __repr__(self) -> str:
        return f"Paths({self.texts!r})"
