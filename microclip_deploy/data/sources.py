"""Where the images come from: folders and lists -> checked paths -> batches of test views.

    list_images    a folder, a .csv/.tsv/.txt list or one image  -> ImageSet (paths, labels)
    check_images   every file decoded once, in threads           -> CheckedImages (good, bad)
    read_batches   paths -> uint8 batches for inference, read ahead in threads

Labels are kept beside the paths and are for `evaluate` alone: adaptation is given `.paths`.
Every order is deterministic: it depends on the names, never on the file system or on threads.
"""

import csv
import io
import os
import unicodedata
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from microclip_deploy.data.decode import IMAGE_SUFFIXES, MAX_PIXELS, BadImage, read_image
from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.errors import DataError, UsageError, printable

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_PATH_COLUMNS = ("path", "image", "file", "filename")
_LABEL_COLUMN = "label"

# Decoding releases the GIL; above this many threads the disk or the memory is the limit.
_MAX_THREADS = 8

# How many bad files an error message lists.
_SHOWN = 5


@dataclass(frozen=True)
class ImageSet:
    """Image files found in a source, in a deterministic order; not decoded yet."""

    paths: tuple[Path, ...]
    labels: tuple[str | None, ...]
    """One per path, NFC-normalised; None where the source names no class. For evaluation only."""
    root: Path
    """The folder given, or the folder of the list or image given."""


class BadFile(NamedTuple):
    """A file that is skipped, and why."""

    path: Path
    reason: str


class TooManyBad(DataError):
    """No file can be used, or more cannot be than allowed."""

    def __init__(self, message: str, bad: Sequence[BadFile]) -> None:
        """Take the message, which names the first ones, and all of them."""
        super().__init__(message)
        self.bad = tuple(bad)


@dataclass(frozen=True)
class CheckedImages:
    """The outcome of decoding every file once."""

    good: tuple[Path, ...]
    bad: tuple[BadFile, ...]
    good_indices: tuple[int, ...]
    """Positions of `good` in the paths given, to pick the labels that go with them."""


class ImageBatch(NamedTuple):
    """Test views in the order of the paths given."""

    indices: NDArray[np.int64]
    """(B,) positions in the paths given; a skipped bad image leaves a gap."""
    images: NDArray[np.uint8]
    """(B, S, S, 3), RGB, 0..255."""


def list_images(source: Path | str) -> ImageSet:
    """Return the image files of a folder, of a list file, or the one image itself.

    A folder is searched at every depth for the endings in IMAGE_SUFFIXES, in either case. Hidden
    files and folders are skipped; each folder is entered once, so links cannot loop. A file's label
    is the folder directly below `source` that holds it; files in `source` itself have none.

    A .csv or .tsv file has a header naming a column `path` (or `image`, `file`, `filename`;
    otherwise the first column is taken) and optionally a column `label`. The header may be missing
    if the first cell ends like an image file. A .txt file holds one path per line. Relative paths
    start at the folder of the list. Listed files are not required to exist: `check_images` reports.

    Raises:
        DataError: nothing is there, it holds no images, or it cannot be read.
    """
    source = Path(source)
    if source.is_dir():
        return _images_in_folder(source)
    if not source.exists():
        raise DataError(
            f"image source: expected a folder, a list or an image, found nothing at "
            f"{printable(source)}; check the path"
        )
    suffix = source.suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return ImageSet((source,), (None,), source.parent)
    if suffix in (".csv", ".tsv"):
        rows = _table_rows(source, "\t" if suffix == ".tsv" else ",")
    elif suffix == ".txt":
        rows = [(line.strip(), None) for line in _list_text(source).split("\n") if line.strip()]
    else:
        raise DataError(
            f"image source: expected a folder, a .csv, .tsv or .txt list or an image, "
            f"found {printable(source)}; give one of these"
        )
    if not rows:
        raise DataError(
            f"{printable(source)}: expected at least one image path, found none; add paths"
        )
    paths = tuple(source.parent / path for path, _ in rows)
    return ImageSet(paths, tuple(_as_label(label) for _, label in rows), source.parent)


def bad_image_limit(max_bad: str | int, total: int) -> int:
    """Return how many of `total` images may be bad.

    Args:
        max_bad: a count such as 25 or "25", or a share such as "1%" or "0.5%", rounded down.
        total: number of images.

    Raises:
        UsageError: neither a count >= 0 nor a share of 0% to 100%.
    """
    text = str(max_bad).strip()
    try:
        if text.endswith("%"):
            share = Fraction(text[:-1].strip())
            if 0 <= share <= 100:
                return int(total * share / 100)
        elif int(text) >= 0:
            return int(text)
    except (ValueError, ZeroDivisionError):
        pass
    raise UsageError(
        f"--max-bad-images: expected a count such as 25 or a share such as 1%, "
        f"found '{max_bad}'; give one of these"
    )


def check_images(
    paths: Sequence[Path],
    *,
    max_bad: str | int = "1%",
    max_pixels: int = MAX_PIXELS,
    threads: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> CheckedImages:
    """Decode every file once and return which can be used, in the order given.

    Args:
        paths: image files.
        max_bad: as for `bad_image_limit`.
        max_pixels: as for `read_image`.
        threads: decoding threads; None is one per processor, at most 8.
        on_progress: called with (done, total) after each file, in this thread.

    Raises:
        TooManyBad: no file can be used, or more are bad than allowed; the first ones are named.
        UsageError: `max_bad` is malformed.
    """
    limit = bad_image_limit(max_bad, len(paths))

    def reason(path: Path) -> str:
        try:
            read_image(path, max_pixels=max_pixels)
        except BadImage as error:
            return error.reason
        return ""

    good: list[int] = []
    bad: list[BadFile] = []
    for index, found in enumerate(_read_ahead(reason, paths, threads)):
        if found:
            bad.append(BadFile(paths[index], found))
        else:
            good.append(index)
        if on_progress is not None:
            on_progress(index + 1, len(paths))
    if not good or len(bad) > limit:
        raise TooManyBad(_too_many_bad(bad, len(paths), limit, max_bad), bad)
    return CheckedImages(tuple(paths[i] for i in good), tuple(bad), tuple(good))


def read_batches(
    paths: Sequence[Path],
    preprocess: Preprocess,
    batch_size: int,
    *,
    max_pixels: int = MAX_PIXELS,
    threads: int | None = None,
    on_bad: Callable[[int, BadImage], None] | None = None,
) -> Iterator[ImageBatch]:
    """Yield test views in the order of the paths, decoded ahead in threads.

    At most about two batches and four views per thread are in memory, whatever the number of paths.

    Args:
        paths: image files.
        preprocess: makes the views.
        batch_size: B; the last batch may be smaller.
        max_pixels: as for `read_image`.
        threads: decoding threads; None is one per processor, at most 8.
        on_bad: called with (index, error) for a bad image, which is then skipped, in this thread.

    Yields:
        Batches of at least one image.

    Raises:
        BadImage: an image is bad and `on_bad` is None.
        UsageError: `batch_size` < 1.
    """
    if batch_size < 1:
        raise UsageError(f"batch size: expected at least 1, found {batch_size}; give another")

    def view(path: Path) -> NDArray[np.uint8] | BadImage:
        try:
            return preprocess.test_view(read_image(path, max_pixels=max_pixels))
        except BadImage as error:
            return error

    indices: list[int] = []
    images: list[NDArray[np.uint8]] = []
    for index, found in enumerate(_read_ahead(view, paths, threads)):
        if isinstance(found, BadImage):
            if on_bad is None:
                raise found
            on_bad(index, found)
            continue
        indices.append(index)
        images.append(found)
        if len(images) == batch_size:
            yield ImageBatch(np.array(indices, np.int64), np.stack(images))
            indices, images = [], []
    if images:
        yield ImageBatch(np.array(indices, np.int64), np.stack(images))


def _read_ahead(
    function: Callable[[_Item], _Result], items: Iterable[_Item], threads: int | None
) -> Iterator[_Result]:
    """Yield function(item) in order; a bounded number of calls runs ahead in threads."""
    threads = threads or min(_MAX_THREADS, os.cpu_count() or 1)
    running: deque[Future[_Result]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="read-image") as pool:
        try:
            for item in items:
                running.append(pool.submit(function, item))
                if len(running) == 4 * threads:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            # An abandoned iteration or Ctrl-C must not wait for work nobody will read.
            pool.shutdown(wait=False, cancel_futures=True)


def _too_many_bad(bad: list[BadFile], total: int, limit: int, max_bad: str | int) -> str:
    """Return the message for `check_images`."""
    shown = "; ".join(f"{printable(file.path)} ({file.reason})" for file in bad[:_SHOWN])
    more = f"; and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
    if len(bad) == total:
        return f"images: expected usable images, found none in {total} files: {shown}{more}"
    return (
        f"images: expected at most {limit} bad ones (--max-bad-images {max_bad}), found "
        f"{len(bad)} of {total}: {shown}{more}; repair or remove them, or raise --max-bad-images"
    )


def _images_in_folder(root: Path) -> ImageSet:
    """Return the images below a folder."""
    found, others = _search(root)
    if not found:
        endings = ", ".join(f"{count} x {suffix}" for suffix, count in others.most_common(_SHOWN))
        raise DataError(
            f"{printable(root)}: expected images ({' '.join(sorted(IMAGE_SUFFIXES))}), "
            f"found {f'other files ({printable(endings)})' if others else 'no files'}; "
            f"give another folder or convert the files"
        )
    found.sort(key=lambda path: path.parts)
    below = (path.relative_to(root).parts for path in found)
    labels = tuple(_as_label(parts[0] if len(parts) > 1 else None) for parts in below)
    return ImageSet(tuple(found), labels, root)


def _search(root: Path) -> tuple[list[Path], Counter[str]]:
    """Return the images below a folder, in no order, and the endings of the other files.

    Links are followed after all plain folders, in the order of their names. So a folder that is
    reachable both ways keeps its own name, which may be a label.
    """
    images: list[Path] = []
    others: Counter[str] = Counter()
    entered: set[tuple[int, int]] = set()
    folders, links = [root], list[Path]()
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
            entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
        except OSError as error:
            raise DataError(
                f"{printable(folder)}: expected a readable folder, found: {error.strerror}; "
                f"change its permissions or move it elsewhere"
            ) from error
        for entry in entries:
            path = Path(entry.path)
            if entry.is_dir():
                (links if entry.is_symlink() else folders).append(path)
            elif path.suffix.lower() in IMAGE_SUFFIXES:
                images.append(path)
            else:
                others[path.suffix or "no ending"] += 1
    return images, others


def _as_label(name: str | None) -> str | None:
    """Return a label in the form class names have: stripped, NFC, None when empty."""
    return unicodedata.normalize("NFC", name).strip() or None if name is not None else None


def _list_text(source: Path) -> str:
    """Return the text of a list file."""
    try:
        text = source.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{printable(source)}: expected a list in UTF-8, found: {error}; save it as UTF-8"
        ) from error
    if "\0" in text:
        raise DataError(
            f"{printable(source)}: expected a list in UTF-8, found zero bytes; save it as UTF-8"
        )
    return text


def _table_rows(source: Path, delimiter: str) -> list[tuple[str, str | None]]:
    """Return (path, label) per row of a .csv or .tsv file."""
    try:
        reader = csv.reader(io.StringIO(_list_text(source), newline=""), delimiter=delimiter)
        rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise DataError(
            f"{printable(source)}: expected a table, found: {error}; save it again as text"
        ) from error
    if not rows:
        return []
    header = [cell.strip().casefold() for cell in rows[0][1]]
    column = next((header.index(name) for name in _PATH_COLUMNS if name in header), 0)
    label_column = header.index(_LABEL_COLUMN) if _LABEL_COLUMN in header else None
    named = label_column is not None or header[column] in _PATH_COLUMNS
    if named or Path(header[column]).suffix not in IMAGE_SUFFIXES:
        rows = rows[1:]
    result: list[tuple[str, str | None]] = []
    for line, row in rows:
        path = row[column].strip() if column < len(row) else ""
        if not path:
            raise DataError(
                f"{printable(source)}, line {line}: expected a path in column {column + 1}, "
                f"found none; fill it in or remove the line"
            )
        label = None if label_column is None else "".join(row[label_column : label_column + 1])
        result.append((path, label))
    return result
