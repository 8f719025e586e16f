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

from microclip_deploy.data.archive import ARCHIVE_ENDINGS, INDEX_ENDING, find
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
    in_archives: Counter[str] = field(default_factory=Counter)
    """What archives hold besides files, by kind."""

    def add(self, others: "LeftOut") -> None:
        """Add what another search left out."""
        self.endings += others.endings
        self.photos += others.photos
        self.inside = others.inside | self.inside
        self.side_files += others.side_files
        self.hidden_files += others.hidden_files
        self.hidden_folders += others.hidden_folders
        self.unreadable += others.unreadable
        self.in_archives += others.in_archives

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
        parts += [f"{count} {kind} in archives" for kind, count in sorted(self.in_archives.items())]
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
            **({"in_archives": dict(self.in_archives)} if self.in_archives else {}),
        }

    def count(self, path: Path) -> None:
        """Count a file that is no image by its name."""
        ending = path.suffix.lower()
        kind = kind_of(ending)
        if kind == SIDE:
            self.side_files += 1
            return
        self.endings[ending] += 1
        if kind in PHOTO_KINDS:
            self.photos.append(path)
        if not kind and self.endings[ending] == 1:
            self.inside[ending] = _format_inside(path)

    def _advice(self, ending: str) -> str:
        inside = self.inside.get(ending)
        advice = kind_of(ending) or (
            f"{inside} inside: rename, or name in a list" if inside else ""
        )
        return f" ({advice})" if advice else ""


class Found(NamedTuple):
    """The outcome of a search."""

    images: list[str]
    """Below the folder, by the parts of their paths."""
    archives: list[str]
    """In the same order."""
    left_out: LeftOut

    def add(self, path: str) -> None:
        """Put a file where it belongs."""
        if _is_image(path):
            self.images.append(path)
        elif is_archive_name(path):
            self.archives.append(path)
        elif not path.endswith(INDEX_ENDING):
            self.left_out.count(Path(path))

    def add_names(self, place: str, names: Iterable[str]) -> None:
        """Put files where they belong, as names below a place that has no folders to enter."""
        for name in names:
            if any(part.startswith(".") or part in _SYSTEM_FOLDERS for part in name.split("/")):
                self.left_out.hidden_files += 1
            else:
                self.add(f"{place}/{name}")

    def in_order(self) -> "Found":
        """Sort everything by the parts of paths, and return this."""
        for paths in (self.images, self.archives):
            paths.sort(key=lambda path: path.replace(os.sep, "\0"))
        self.left_out.photos.sort(key=lambda path: path.parts)
        self.left_out.unreadable.sort()
        return self


def search(root: Path, on_found: Callable[[int], None]) -> Found:
    """Return the images below a folder.

    Links are followed after all plain folders, in the order of their names. So a folder that is
    reachable both ways keeps its own name, which may be a label. Each is entered once.

    Args:
        root: the folder.
        on_found: called with the number of images now and then.
    """
    found = Found([], [], LeftOut())
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
                _sort(entries, found, folders, links)
        except OSError as error:
            found.left_out.unreadable.append(BadFile(folder, error.strerror or str(error)))
        if len(found.images) >= told + _EVERY:
            told = len(found.images)
            on_found(told)
    return found.in_order()


def _sort(
    entries: Iterable[os.DirEntry[str]], found: Found, folders: list[Path], links: list[Path]
) -> None:
    """Put what a folder holds where it belongs."""
    left_out = found.left_out
    for entry in entries:
        is_folder = _is_folder(entry)
        if entry.name.startswith("."):
            if is_folder:
                left_out.hidden_folders[entry.name] += 1
            else:
                left_out.hidden_files += 1
        elif is_folder and entry.name in _SYSTEM_FOLDERS:
            left_out.hidden_folders[entry.name] += 1
        elif is_folder:
            (links if entry.is_symlink() else folders).append(Path(entry.path))
        else:
            found.add(entry.path.removeprefix(f".{os.sep}"))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or a network that fails
        return False


def is_archive_name(path: str) -> bool:
    """Say whether a file of a name is an archive of photos; the caches of `datasets` are copies."""
    name = os.path.basename(path).lower()
    return os.path.splitext(name)[1] in ARCHIVE_ENDINGS and not (
        name.startswith("cache-") and name.endswith(".arrow")
    )


def _is_image(path: str) -> bool:
    """Say whether a file is read; many .heic files are JPEG inside."""
    ending = os.path.splitext(path)[1].lower()
    return ending in image_endings() or (
        kind_of(ending) == INSTALL and bool(_format_inside(Path(path)))
    )


def _format_inside(path: Path) -> str:
    """Return the readable format of a file, '' if it is none; a pipe is never opened."""
    try:
        member = find(path)
        if member is not None or path.is_file():
            with path.open("rb") if member is None else member.open() as stream:
                return next(recognised(stream.read(16)), "")
    except OSError:
        pass
    return ""
