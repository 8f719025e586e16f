"""Where the images come from: folders and lists -> checked paths -> batches of test views.

    list_images    a folder, an archive, a list or one image     -> ImageSet (paths, labels)
    list_sources   several of them, as `predict` takes them      -> ImageSet
    check_images   every file decoded once, in threads           -> CheckedImages (good, bad)
    copies         paths -> those with the bytes of one before them
    read_batches   paths -> uint8 batches for inference, read ahead in threads

Labels are kept beside the paths and are for `evaluate` alone: adaptation is given `.paths`.
Every order is deterministic: it depends on the names, never on the file system or on threads.
"""

import os
import unicodedata
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache, partial
from itertools import repeat
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from microclip_deploy.data.archive import Within, index_of, within
from microclip_deploy.data.decode import BadImage, read_photo
from microclip_deploy.data.folder import BadFile as BadFile
from microclip_deploy.data.folder import Found, LeftOut, is_archive_name, search
from microclip_deploy.data.formats import image_endings
from microclip_deploy.data.lists import LIST_ENDINGS, read_list
from microclip_deploy.data.location import status
from microclip_deploy.data.pack import is_pack, shards_of
from microclip_deploy.data.photo import USUAL, PhotoConfig, Remark, Remarks
from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.data.remote import is_remote, names_below
from microclip_deploy.errors import DataError, UsageError, printable
from microclip_deploy.paths import Paths, StrPath, as_path
from microclip_deploy.processors import usable_cpus

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

# Decoding releases the GIL; above this many threads the disk or the memory is the limit.
_MAX_THREADS = 8

# How many bad files an error message lists.
_SHOWN = 5


@dataclass(frozen=True)
class ImageSet:
    """Image files found in a source, in a deterministic order; not decoded yet."""

    paths: Paths
    labels: tuple[str | None, ...]
    """One per path, NFC-normalised; None where the source names no class. For evaluation only."""
    root: Path
    """The folder given, or the folder of the list or image given."""
    left_out: LeftOut = field(default_factory=LeftOut)


class NoImages(DataError):
    """A folder holds no images; `left_out` says what it holds."""

    def __init__(self, message: str, left_out: LeftOut) -> None:
        super().__init__(message)
        self.left_out = left_out


class TooManyBad(DataError):
    """No file can be used, or more cannot be than allowed."""

    def __init__(self, message: str, bad: Sequence[BadFile]) -> None:
        """Take the message, which names the first ones, and all of them."""
        super().__init__(message)
        self.bad = tuple(bad)


@dataclass(frozen=True)
class CheckedImages:
    """The outcome of decoding every file once."""

    good: Paths
    bad: tuple[BadFile, ...]
    good_indices: tuple[int, ...]
    """Positions of `good` in the paths given, to pick the labels that go with them."""
    remarks: tuple[str, ...] = ()
    """What reading them told, one line a kind."""


class _View(NamedTuple):
    """A photo as a model sees it."""

    pixels: NDArray[np.uint8]
    """(S, S, 3)."""
    remarks: tuple[Remark, ...]


class ImageBatch(NamedTuple):
    """Test views in the order of the paths given."""

    indices: NDArray[np.int64]
    """(B,) positions in the paths given; a skipped bad image leaves a gap."""
    images: NDArray[np.uint8]
    """(B, S, S, 3), RGB, 0..255."""


def list_images(source: StrPath, *, on_found: Callable[[int], None] = lambda _: None) -> ImageSet:
    """Return the image files of a folder, an archive, a list file, or the one image itself.

    A folder is searched at every depth for the endings of formats that can be read, in either case;
    what is left out is counted. A file's label is the folder directly below `source` that holds it;
    files in `source` itself have none. Archives in a folder are read where it holds no image
    outside of them, and are then no folders of their own: a label is a folder around or inside of
    them, or what a table says. `s3://`, `gs://` and `https://` are searched by prefix.

    Lists (.csv, .tsv, .txt) are those of `read_list`; relative paths start at the folder of the
    list. Any other file is taken for an image. Whether listed files exist, and are images,
    `check_images` reports.

    Args:
        source: folder, archive, list or image; may lead to a folder inside a tar.
        on_found: called with the number of images while a folder is searched.

    Raises:
        NoImages: a folder without images.
        DataError: nothing is there, or it cannot be read.
        EnvironmentProblem: an object store cannot be reached, or refuses.
    """
    source = as_path(source, "image source")
    place = within(source)
    if place is not None:
        return _images_in_tree(source, place, on_found)
    if os.path.isdir(source):  # unlike Path's own, without an error where access is denied
        return _images_in_folder(source, on_found)
    # A web server answers for a folder, too, but lists none: there a pack tells what it holds.
    if is_remote(source) and (is_pack(str(source)) or status(str(source)) is None):
        return _images_in_folder(source, on_found)
    if not _is_there(source):
        raise DataError(
            f"image source: expected a folder, a list or an image, found nothing at "
            f"{printable(source)}; check the path"
        )
    if source.suffix.lower() not in LIST_ENDINGS:
        return _one(source)
    rows = read_list(source)
    paths = (path if is_remote(path) else source.parent / path for path, _ in rows)
    labels = tuple(as_label(label) for _, label in rows)
    return ImageSet(Paths(str(Path(path)) for path in paths), labels, source.parent)


def list_sources(
    sources: Sequence[Path], *, on_found: Callable[[int], None] = lambda _: None
) -> ImageSet:
    """Return the images of several sources, in their order, without labels.

    Files that show something although their format is not read are among them, and so is a path
    at which nothing is found: whoever reads them says why not. Folders and paths without anything
    are errors where there is nothing else.

    Raises:
        NoImages: no image at all.
        DataError: nothing is at any of the paths, or a list cannot be read.
    """
    if sources and not any(map(_is_there, sources)):
        return list_images(sources[0])  # raises
    paths: list[str] = []
    left_out, empty = LeftOut(), list[NoImages]()
    for source in sources:
        if not _is_there(source):
            paths.append(str(source))
            continue
        try:
            found = list_images(source, on_found=partial(_tell_sum, on_found, len(paths)))
        except NoImages as problem:
            found = ImageSet(Paths(), (), source, problem.left_out)
            empty.append(problem)
        listed = [*found.paths.texts, *map(str, found.left_out.photos)]
        paths += sorted(listed, key=_parts) if found.left_out.photos else listed
        left_out.add(found.left_out)
    if empty and not paths:
        raise empty[0]
    return ImageSet(Paths(paths), (None,) * len(paths), Path(), left_out)


def _is_there(source: Path) -> bool:
    return os.path.exists(source) or within(source) is not None or is_remote(source)


def _parts(path: str) -> str:
    return path.replace(os.sep, "\0")


def _tell_sum(tell: Callable[[int], None], before: int, count: int) -> None:
    tell(before + count)


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
    config: PhotoConfig = USUAL,
    *,
    max_bad: str | int = "1%",
    threads: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> CheckedImages:
    """Decode every file once and return which can be used, in the order given.

    Args:
        paths: image files.
        config: how they are read.
        max_bad: as for `bad_image_limit`.
        threads: decoding threads; None is one per processor, at most 8.
        on_progress: called with (done, total) after each file, in this thread.

    Raises:
        TooManyBad: no file can be used, or more are bad than allowed; the first ones are named.
        UsageError: `max_bad` is malformed.
    """
    bad_image_limit(max_bad, len(paths))  # raises before the work

    def outcome(path: Path) -> tuple[Remark, ...] | BadImage:
        try:
            return read_photo(path, config).remarks
        except BadImage as error:
            return error

    good: list[int] = []
    bad: list[BadFile] = []
    remarks = Remarks()
    for index, found in enumerate(read_ahead(outcome, paths, threads)):
        if isinstance(found, BadImage):
            bad.append(BadFile(paths[index], found.reason))
        else:
            good.append(index)
            remarks.add(paths[index], found)
        if on_progress is not None:
            on_progress(index + 1, len(paths))
    require_few_bad(bad, len(paths), max_bad)
    usable = Paths(str(paths[i]) for i in good)
    return CheckedImages(usable, tuple(bad), tuple(good), tuple(remarks.lines()))


def require_few_bad(bad: Sequence[BadFile], total: int, max_bad: str | int) -> None:
    """Make sure that some of `total` files can be used, and few enough cannot.

    Raises:
        TooManyBad: it is not so; the first ones are named.
        UsageError: `max_bad` is malformed.
    """
    limit = bad_image_limit(max_bad, total)
    if len(bad) == total or len(bad) > limit:
        raise TooManyBad(_too_many_bad(bad, total, limit, max_bad), bad)


def read_batches(
    paths: Sequence[Path],
    preprocess: Preprocess,
    batch_size: int,
    *,
    threads: int | None = None,
    on_bad: Callable[[int, BadImage], None] | None = None,
    remarks: Remarks | None = None,
) -> Iterator[ImageBatch]:
    """Yield test views in the order of the paths, decoded ahead in threads.

    While a batch is used the next one is decoded. At most about three batches and four views per
    thread are in memory, whatever the number of paths.

    Args:
        paths: image files.
        preprocess: reads the files and makes the views.
        batch_size: B; the last batch may be smaller.
        threads: decoding threads; None is one per processor, at most 8.
        on_bad: called with (index, error) for a bad image, which is then skipped, in this thread.
        remarks: gets what reading the files tells.

    Yields:
        Batches of at least one image.

    Raises:
        BadImage: an image is bad and `on_bad` is None.
        UsageError: `batch_size` < 1.
    """
    if batch_size < 1:
        raise UsageError(f"batch size: expected at least 1, found {batch_size}; give another")

    def view(path: Path) -> _View | BadImage:
        try:
            photo = read_photo(path, preprocess.photos)
        except BadImage as error:
            return error
        return _View(preprocess.test_view(photo.image), photo.remarks)

    indices: list[int] = []
    images: list[NDArray[np.uint8]] = []
    for index, found in enumerate(read_ahead(view, paths, threads, batch_size)):
        if isinstance(found, BadImage):
            if on_bad is None:
                raise found
            on_bad(index, found)
            continue
        if remarks is not None:
            remarks.add(paths[index], found.remarks)
        indices.append(index)
        images.append(found.pixels)
        if len(images) == batch_size:
            yield ImageBatch(np.array(indices, np.int64), np.stack(images))
            indices, images = [], []
    if images:
        yield ImageBatch(np.array(indices, np.int64), np.stack(images))


def read_ahead(
    function: Callable[[_Item], _Result],
    items: Iterable[_Item],
    threads: int | None,
    least: int = 0,
) -> Generator[_Result, None, None]:
    """Yield function(item) in order; a bounded number of calls, `least` or more, runs ahead."""
    threads = threads or min(_MAX_THREADS, usable_cpus())
    ahead = max(4 * threads, least)
    running: deque[Future[_Result]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="read-image") as pool:
        try:
            for item in items:
                running.append(pool.submit(function, item))
                if len(running) == ahead:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            # An abandoned iteration or Ctrl-C must not wait for work nobody will read.
            pool.shutdown(wait=False, cancel_futures=True)


def _too_many_bad(bad: Sequence[BadFile], total: int, limit: int, max_bad: str | int) -> str:
    """Return the message for `check_images`."""
    shown = "; ".join(f"{printable(file.path)} ({file.reason})" for file in bad[:_SHOWN])
    more = f"; and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
    if len(bad) == total:
        return f"images: expected usable images, found none in {total} files: {shown}{more}"
    return (
        f"images: expected at most {limit} bad ones (--max-bad-images {max_bad}), found "
        f"{len(bad)} of {total}: {shown}{more}; repair or remove them, or raise --max-bad-images"
    )


def _images_in_folder(root: Path, on_found: Callable[[int], None]) -> ImageSet:
    """Return the images below a folder or a prefix, or in the archives there."""
    text = str(root)
    shards = shards_of(text)
    if shards is not None:
        return _images_in_archives(root, shards, "", Found([], [], LeftOut()))
    if is_remote(root):
        found = Found([], [], LeftOut())
        found.add_names(text, names_below(text))
        found.in_order()
    else:
        found = search(root, on_found)
    if found.archives and not found.images:
        return _images_in_archives(root, found.archives, "", found)
    left_out = found.left_out
    for archive in found.archives:
        left_out.count(Path(archive))
    denied = [bad.reason for bad in left_out.unreadable if bad.path == root]
    if denied:
        raise NoImages(
            f"{printable(root)}: expected a readable folder, found: {denied[0]}; change its "
            "permissions or move it elsewhere",
            left_out,
        )
    if not found.images:
        raise _no_images(root, left_out)
    labels = tuple(_folder_label(path, text) for path in found.images)
    return ImageSet(Paths(found.images), labels, root, left_out)


def _images_in_tree(source: Path, place: Within, on_found: Callable[[int], None]) -> ImageSet:
    """Return the images of an archive, below a folder inside it, or the one that is named."""
    if place.name and index_of(place.archive).find(place.name) is not None:
        return _one(source)
    found = Found([], [], LeftOut())
    listed = _images_in_archives(source, [place.archive], place.name, found)
    on_found(len(listed.paths))
    return listed


def _images_in_archives(root: Path, archives: Sequence[str], folder: str, found: Found) -> ImageSet:
    """Return the images of archives, those below a folder inside if one is named."""
    labels: list[str | None] = []
    left_out = found.left_out
    for archive in archives:
        index, inside = index_of(archive), Found([], [], left_out)
        left_out.in_archives.update(index.left_out)
        below = f"{folder}/" if folder else ""
        names = (name for name in index if name.startswith(below))
        if index.holds_photos:
            inside.images.extend(f"{archive}/{name}" for name in names)
        else:
            inside.add_names(archive, names)
        for nested in inside.archives:
            left_out.count(Path(nested))
        told = index.labels or repeat(None)
        labels += [
            as_label(label) or _folder_label(path, str(root))
            for path, label in zip(inside.images, told, strict=False)
        ]
        found.images.extend(inside.images)
    if not found.images:
        raise _no_images(root, left_out)
    return ImageSet(Paths(found.images), tuple(labels), root, left_out)


def _one(image: Path) -> ImageSet:
    return ImageSet(Paths((str(image),)), (None,), image.parent)


def _no_images(root: Path, left_out: LeftOut) -> NoImages:
    return NoImages(
        f"{printable(root)}: expected images ({' '.join(sorted(image_endings()))}), found "
        f"{left_out.summary() or 'no files'}; give another folder or convert the files",
        left_out,
    )


def _folder_label(path: str, root: str) -> str | None:
    """Return the label of a path: the first folder below a root that is no archive."""
    below = path if root == "." else path[len(root) :].lstrip(os.sep)
    folders = [part for part in below.split(os.sep)[:-1] if not is_archive_name(part)]
    return as_label(folders[0] if folders else None)


@lru_cache(maxsize=4096)
def as_label(name: str | None) -> str | None:
    """Return a label in the form class names have: stripped, NFC, None when empty."""
    return unicodedata.normalize("NFC", name).strip() or None if name is not None else None
