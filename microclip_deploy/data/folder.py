"""The search of a folder: images by their endings, and a count of all that is left out.

Nothing inside the folder ends the search: what cannot be entered is named and passed by. Hidden
files and what systems put among photos (thumbnails of a NAS, trash) are passed by and counted.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from microclip_deploy.data.formats import (
    INSTALL,
    PHOTO_KINDS,
    SIDE,
    image_endings,
    kind_of,
    recognised,
)
from microclip_deploy.errors import printable

_SYSTEM_FOLDERS = frozenset(
    {
        "#recycle",
        "#snapshot",
        "$RECYCLE.BIN",
        "@Recycle",
        "@eaDir",
        "@tmp",
        "System Volume Information",
        "__MACOSX",
    }
)

_SHOWN = 20  # endings or folders that one line names

_EVERY = 1000
"""Files between two calls of `on_found`."""


class BadFile(NamedTuple):
    """A file or folder that is skipped, and why."""

    path: Path
    reason: str


@dataclass
class LeftOut:
    """What a search of folders did not take for images."""

    endings: Counter[str] = field(default_factory=Counter)
    """Files by the ending of their names, in lower case; '' without one."""
    photos: list[Path] = field(default_factory=list)
    """Those of them that show something, by the parts of their paths."""
    inside: dict[str, str] = field(default_factory=dict)
    """Format that was found in the first file of an ending that is unknown."""
    side_files: int = 0
    """Texts and the like."""
    hidden_files: int = 0
    hidden_folders: Counter[str] = field(default_factory=Counter)
    """Hidden and systems' folders, by name; what they hold is not counted."""
    unreadable: list[BadFile] = field(default_factory=list)
    """Folders that could not be entered."""

    def add(self, others: "LeftOut") -> None:
        """Add what another search left out."""
        self.endings += others.endings
        self.photos += others.photos
        self.inside = others.inside | self.inside
        self.side_files += others.side_files
        self.hidden_files += others.hidden_files
        self.hidden_folders += others.hidden_folders
        self.unreadable += others.unreadable

    def summary(self) -> str:
        """Return all of it on one line, '' if there is nothing."""
        ranked = sorted(self.endings.items(), key=lambda item: (-item[1], item[0]))
        by_advice: dict[str, list[str]] = {}
        for ending, count in ranked[:_SHOWN]:
            named = f"{count} {printable(ending) or 'without an ending'}"
            by_advice.setdefault(self._advice(ending), []).append(named)
        parts = [f"{', '.join(named)}{advice}" for advice, named in by_advice.items()]
        rest = sum(count for _, count in ranked[_SHOWN:])
        folders = ", ".join(map(printable, sorted(self.hidden_folders)[:_SHOWN]))
        unreadable = "; ".join(f"{printable(f.path)}: {f.reason}" for f in self.unreadable[:_SHOWN])
        counted = (
            (rest, "with other endings", ""),
            (self.side_files, "beside photos, such as texts", ""),
            (self.hidden_files, "hidden", ""),
            (self.hidden_folders.total(), "hidden or system folders", f" ({folders})"),
            (len(self.unreadable), "folders that cannot be read", f" ({unreadable})"),
        )
        parts += [f"{count} {what}{names}" for count, what, names in counted if count]
        return "; ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """Return plain values; names are made printable."""
        return {
            "endings": {printable(ending): count for ending, count in self.endings.items()},
            "side_files": self.side_files,
            "hidden_files": self.hidden_files,
            "hidden_folders": self.hidden_folders.total(),
            "unreadable_folders": [
                {"path": printable(folder.path), "reason": folder.reason}
                for folder in self.unreadable
            ],
        }

    def _advice(self, ending: str) -> str:
        inside = self.inside.get(ending)
        advice = kind_of(ending) or (
            f"{inside} inside: rename, or name in a list" if inside else ""
        )
        return f" ({advice})" if advice else ""


class Found(NamedTuple):
    """The outcome of a search."""

    images: list[Path]
    """Below the folder, by the parts of their paths."""
    left_out: LeftOut


def search(root: Path, on_found: Callable[[int], None]) -> Found:
    """Return the images below a folder.

    Links are followed after all plain folders, in the order of their names. So a folder that is
    reachable both ways keeps its own name, which may be a label. Each is entered once.

    Args:
        root: the folder.
        on_found: called with the number of images now and then.
    """
    images: list[Path] = []
    left_out = LeftOut()
    entered: set[tuple[int, int]] = set()
    folders, links, told = [root], list[Path](), 0
    while folders or links:
        if not folders:
            links.sort(reverse=True)
            folders.append(links.pop())
        folder = folders.pop()
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in entered:
                continue
            entered.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                _sort(entries, images, folders, links, left_out)
        except OSError as error:
            left_out.unreadable.append(BadFile(folder, error.strerror or str(error)))
        if len(images) >= told + _EVERY:
            told = len(images)
            on_found(told)
    images.sort(key=lambda path: path.parts)
    left_out.photos.sort(key=lambda path: path.parts)
    left_out.unreadable.sort()
    return Found(images, left_out)


def _sort(
    entries: Iterable[os.DirEntry[str]],
    images: list[Path],
    folders: list[Path],
    links: list[Path],
    left_out: LeftOut,
) -> None:
    """Put what a folder holds where it belongs."""
    for entry in entries:
        path, is_folder = Path(entry.path), _is_folder(entry)
        if entry.name.startswith("."):
            if is_folder:
                left_out.hidden_folders[entry.name] += 1
            else:
                left_out.hidden_files += 1
        elif is_folder and entry.name in _SYSTEM_FOLDERS:
            left_out.hidden_folders[entry.name] += 1
        elif is_folder:
            (links if entry.is_symlink() else folders).append(path)
        elif _is_image(path):
            images.append(path)
        else:
            _count(path, left_out)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or a network that fails
        return False


def _is_image(path: Path) -> bool:
    """Say whether a file is read; many .heic files are JPEG inside."""
    ending = path.suffix.lower()
    return ending in image_endings() or (kind_of(ending) == INSTALL and bool(_format_inside(path)))


def _count(path: Path, left_out: LeftOut) -> None:
    """Count a file that is no image by its name."""
    ending = path.suffix.lower()
    kind = kind_of(ending)
    if kind == SIDE:
        left_out.side_files += 1
        return
    left_out.endings[ending] += 1
    if kind in PHOTO_KINDS:
        left_out.photos.append(path)
    if not kind and left_out.endings[ending] == 1:
        left_out.inside[ending] = _format_inside(path)


def _format_inside(path: Path) -> str:
    """Return the readable format of a file, '' if it is none; a pipe is never opened."""
    try:
        if path.is_file():
            with path.open("rb") as stream:
                return next(recognised(stream.read(16)), "")
    except OSError:
        pass
    return ""
