"""Making a pack: every photo is decoded once, and a large one stored at the size that is needed.

    shard k     photos k * 1000 to k * 1000 + 999 of the list, as a tar
    its index   the same name and `.index.safetensors`; it makes the shard complete

Photos at or under the size are stored as the bytes they are, and so are those whose look is a
setting of a run (transparent, or of more than 8 bits a channel). The bytes of a shard depend on its
photos and the settings alone, and its index names both by a hash: what is complete is kept when a
pack is made again, what was cut short or changed is made anew.
"""

import hashlib
import io
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from microclip_deploy import artifact
from microclip_deploy.data import location
from microclip_deploy.data.archive import INDEX_ENDING, within
from microclip_deploy.data.decode import BadImage, decode_photo, opened_photo
from microclip_deploy.data.folder import BadFile
from microclip_deploy.data.formats import FORMATS, image_endings, recognised
from microclip_deploy.data.index import Index
from microclip_deploy.data.pack import SCHEMA, UNFINISHED
from microclip_deploy.data.photo import USUAL, PhotoConfig, Remark, Remarks
from microclip_deploy.data.remote import is_remote
from microclip_deploy.data.sources import ImageSet, as_label, read_ahead, require_few_bad
from microclip_deploy.data.tar import index_of_tar
from microclip_deploy.errors import DataError, UsageError, printable
from microclip_deploy.paths import Paths

PHOTOS_A_SHARD = 1000
"""About 100 MB where photos are reduced to 512 pixels; what a kill may cost."""

BAD_IMAGES = "bad-images.txt"

_SHARD = re.compile(r"photos-\d{5,}\.tar")

# JPEG is decoded at no less than this many times the side and then resized: as near to the pixels
# of a full decoding as JPEG's own loss is (docs/packs.md), at a quarter of the time.
_MARGIN = 2


class PackConfig(BaseModel):
    """How photos are stored."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    side: int = Field(default=512, ge=32, le=8192)
    """Short side of photos that are larger, pixels."""
    quality: int = Field(default=95, ge=1, le=100)
    """Of the JPEGs they become, with colours at full resolution."""
    photos: PhotoConfig = USUAL
    """How they are read."""


class Packed(NamedTuple):
    """What a pack holds, and what was done for it."""

    photos: int
    bad: tuple[BadFile, ...]
    size_bytes: int
    there_already: int
    """Photos, bad ones too, of shards that were there already."""
    reduced: int
    """So many of the others are stored smaller than they were."""
    remarks: tuple[str, ...]
    """On the others."""


class _Photo(NamedTuple):
    """A photo as it is stored."""

    content: bytes
    reduced: bool
    remarks: tuple[Remark, ...]


class _Shard(NamedTuple):
    """A part of the photos."""

    path: Path
    photos: Paths
    names: Sequence[str]
    """Of the photos in the pack; without endings where the source has none."""
    made_of: str


def pack(
    listed: ImageSet,
    out: Path,
    config: PackConfig,
    *,
    max_bad: str | int = "1%",
    workers: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Packed:
    """Make a pack, or continue one.

    Args:
        listed: the photos.
        out: folder of the pack.
        config: how they are stored.
        max_bad: as for `check_images`.
        workers: photos that are decoded at once; None is one per processor, at most 8.
        on_progress: called with (done, total) photos.

    Raises:
        TooManyBad: as `check_images`; the pack stays unfinished, and what was decoded is kept.
        DataError: two photos would have one name.
        UsageError: the folder holds something else, or another process packs into it.
        EnvironmentProblem: the disk is full, or the folder cannot be written.
    """
    with artifact.exclusive(out, "another process packs into it; wait for it, or give another -o"):
        _require_ours(out)
        shards = _shards(listed, out, config)
        artifact.write_bytes(out / UNFINISHED, b"microclip-deploy pack continues this pack\n")
        (out / artifact.MANIFEST).unlink(missing_ok=True)
        missing = [shard for shard in shards if _index(shard) is None]
        total, reduced, remarks = len(listed.paths), 0, Remarks()
        done = there_already = total - sum(len(shard.photos) for shard in missing)
        paths = (path for shard in missing for path in shard.photos)
        with closing(read_ahead(partial(_packed, config=config), paths, workers)) as decoded:
            for shard in missing:
                unusable = list[BadFile]()
                with artifact.staged_file(shard.path) as file, _tar(file) as tar:
                    for path, name in zip(shard.photos, shard.names, strict=True):
                        photo = next(decoded)
                        if isinstance(photo, BadImage):
                            unusable.append(BadFile(path, photo.reason))
                        else:
                            _add(tar, name, photo.content)
                            reduced += photo.reduced
                            remarks.add(path, photo.remarks)
                        done += 1
                        on_progress(done, total)
                _write_index(shard, unusable)
        bad = _finish(out, shards, config, max_bad)
        size = sum(shard.path.stat().st_size for shard in shards)
    good = total - len(bad)
    return Packed(good, bad, size, there_already, reduced, tuple(remarks.lines()))


def reduced(image: Image.Image, side: int) -> Image.Image:
    """Return an image whose short side is at most `side` pixels, the very one where it is."""
    short = min(image.size)
    if short <= side:
        return image
    width, height = (max(1, round(length * side / short)) for length in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _packed(path: Path, config: PackConfig) -> _Photo | BadImage:
    """Return a photo as it is stored."""
    side = config.side
    try:
        with opened_photo(path, config.photos) as stream:
            photo = decode_photo(stream, path, config.photos, enough=_MARGIN * side)
            short = min(photo.image.size)
            if short <= side or photo.depends:
                stream.seek(0)
                return _Photo(stream.read(), False, photo.remarks)
    except BadImage as error:
        return error
    small = reduced(photo.image, side)
    content = io.BytesIO()
    small.save(content, "JPEG", quality=config.quality, subsampling=0)
    return _Photo(content.getvalue(), True, photo.remarks)


def _shards(listed: ImageSet, out: Path, config: PackConfig) -> list[_Shard]:
    names = _names(listed)
    return [
        _Shard(
            out / f"photos-{number:05d}.tar",
            photos := listed.paths[first : first + PHOTOS_A_SHARD],
            part := names[first : first + PHOTOS_A_SHARD],
            _made_of(photos, part, config),
        )
        for number, first in enumerate(range(0, len(names), PHOTOS_A_SHARD))
    ]


def _names(listed: ImageSet) -> list[str]:
    """Return the photos' names in the pack: their paths below the source, below their labels.

    Raises:
        DataError: two have the same.
    """
    root = f"{listed.root}{os.sep}"
    names = [
        _named(path.removeprefix(root), label)
        for path, label in zip(listed.paths.texts, listed.labels, strict=True)
    ]
    again = [name for name, count in Counter(names).items() if count > 1]
    if again:
        pairs = zip(listed.paths, names, strict=True)
        first, second, *_ = (path for path, name in pairs if name == again[0])
        raise DataError(
            f"pack: expected a name of its own for each photo, found '{printable(again[0])}' for "
            f"{printable(first)} and {printable(second)}; list each photo once, below one folder"
        )
    return names


def _named(below: str, label: str | None) -> str:
    parts = [part for part in Path(below).parts if part not in (os.sep, "..", ".")]
    if label and (len(parts) < 2 or as_label(parts[0]) != label):
        parts.insert(0, label.replace(os.sep, "_") if label.strip(".") else "_")
    return "/".join(parts)


def _made_of(photos: Paths, names: Sequence[str], config: PackConfig) -> str:
    """Hash what a shard depends on.

    Files count by size and time, as reading them is the work; objects of a store by name alone, as
    asking for each takes as long.
    """
    digest = hashlib.sha256(config.model_dump_json().encode())
    for path, name in zip(photos.texts, names, strict=True):
        place = within(path)
        status = None if is_remote(path) else location.status(place.archive if place else path)
        digest.update(json.dumps([path, name, status]).encode())
    return digest.hexdigest()


def _tar(file: IO[bytes]) -> tarfile.TarFile:
    return tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT, encoding="utf-8")


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add a photo; without an ending by which it is known, it gets that of its format."""
    if os.path.splitext(name)[1].lower() not in image_endings():
        formats = list(recognised(content[:16]))
        name += next((kind.endings[0] for kind in FORMATS if kind.name in formats), "")
    member = tarfile.TarInfo(name)  # without owner and time: they are no part of a photo
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _index_path(shard: _Shard) -> Path:
    return shard.path.with_name(f"{shard.path.name}{INDEX_ENDING}")


def _index(shard: _Shard) -> Index | None:
    """Return the index of a shard that is complete and made of the same; None of any other."""
    try:
        index = Index.from_bytes(_index_path(shard).read_bytes())
        size = shard.path.stat().st_size
    except OSError:
        return None
    whole = index is not None and index.made_of == shard.made_of and index.archive_bytes == size
    return index if whole else None


def _write_index(shard: _Shard, bad: Iterable[BadFile]) -> None:
    """Complete a shard."""
    with shard.path.open("rb") as stream:
        index = index_of_tar(stream, str(shard.path), shard.path.stat().st_size)
    index = replace(
        index,
        made_of=shard.made_of,
        sha256=artifact.sha256_file(shard.path),
        bad=tuple((str(file.path), file.reason) for file in bad),
    )
    artifact.write_bytes(_index_path(shard), index.to_bytes())


def _finish(
    out: Path, shards: Sequence[_Shard], config: PackConfig, max_bad: str | int
) -> tuple[BadFile, ...]:
    """Write the manifest, and remove what is of no shard; return the bad photos."""
    indices = [index for shard in shards if (index := _index(shard)) is not None]
    bad = tuple(BadFile(Path(path), reason) for index in indices for path, reason in index.bad)
    total = sum(map(len, indices)) + len(bad)
    listed = "".join(f"{printable(file.path)}\t{file.reason}\n" for file in bad)
    artifact.write_bytes(out / BAD_IMAGES, listed.encode())
    require_few_bad(bad, total, max_bad)
    content = {
        "side": config.side,
        "quality": config.quality,
        "photos": config.photos.model_dump(),
        "images": {"packed": total - len(bad), "bad": len(bad)},
        "shards": [
            {
                "name": shard.path.name,
                "bytes": index.archive_bytes,
                "sha256": index.sha256,
                "images": len(index),
            }
            for shard, index in zip(shards, indices, strict=True)
        ],
    }
    names = {shard.path.name for shard in shards}
    for path in out.iterdir():
        shard_name = path.name.removesuffix(INDEX_ENDING)
        if _SHARD.fullmatch(shard_name) and shard_name not in names:
            path.unlink()
    artifact.write_manifest(out, SCHEMA, content, [_index_path(shard).name for shard in shards])
    (out / UNFINISHED).unlink()
    return bad


def _require_ours(out: Path) -> None:
    """Make sure that a folder holds a pack or nothing.

    Raises:
        UsageError: it holds something else.
    """
    ours = {artifact.MANIFEST, artifact.LOCK, UNFINISHED, BAD_IMAGES}
    others = [
        path.name
        for path in out.iterdir()
        if path.name not in ours
        and not _SHARD.fullmatch(path.name.removesuffix(INDEX_ENDING))
        and not (path.name.startswith(".") and path.name.endswith(".part"))
    ]
    foreign = (out / artifact.MANIFEST).is_file() and artifact.read_schema(out) != SCHEMA
    if others or foreign:
        raise UsageError(
            f"{printable(out)}: expected an empty folder or a pack, found "
            f"{printable(sorted(others)[0]) if others else 'another artifact'}; give another -o"
        )
