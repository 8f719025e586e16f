"""What a directory of shards was begun with: its photos, in their order, and its settings.

    _job.json         what the rows depend on; its presence means that the photos are listed
    _photos.parquet   the names of the photos as bytes, in their order
    shard-NNNNN.parquet, _SUCCESS: see `shards`

The photos are listed once, when the job begins. Whoever continues it, or does a part of it on
another machine, reads that list: photos that come and go cannot shift the rows. Programs that read
a folder of Parquet leave out names that begin with an underscore.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from microclip_deploy import artifact
from microclip_deploy.bulk.table import EXTRAS, Wanted
from microclip_deploy.calibration import FOLDER, UNIFORM
from microclip_deploy.data.lists import LIST_ENDINGS
from microclip_deploy.data.location import absolute
from microclip_deploy.data.sources import ImageSet
from microclip_deploy.errors import DataError, UsageError, printable

JOB = "_job.json"
PHOTOS = "_photos.parquet"

_SCHEMA = "microclip.predictions/1"
_AT_A_TIME = 65536  # names that are held as bytes too
_HASH = 64  # characters; nobody wants to read them


@dataclass(frozen=True)
class Job:
    """Photos and what is told of them, dealt into shards of `shard_rows` rows."""

    directory: Path
    names: pa.ChunkedArray
    """Binary: one name a photo, as the file system has it."""
    shard_rows: int
    wanted: Wanted
    sha256: str
    """Of all that the rows depend on; each shard carries it."""

    @property
    def shards(self) -> int:
        """Return how many there are."""
        return -(-len(self.names) // self.shard_rows)

    def rows_of(self, shard: int) -> int:
        """Return how many rows a shard has."""
        return min(self.shard_rows, len(self.names) - shard * self.shard_rows)


def settings_of(
    model: Path,
    sources: Sequence[Path],
    wanted: Wanted,
    shard_rows: int,
    *,
    prior: str = FOLDER,
    max_pixels: int | None = None,
    bit_depth: int | None = None,
) -> dict[str, Any]:
    """Return what the rows of a job depend on, but for the photos that are there.

    Where it runs, the device and the size of its batches, moves logits by no more than an export is
    proven to, and is left out.

    Args:
        model: run or export.
        sources: images, folders or lists.
        wanted: what is told of each photo.
        shard_rows: rows a shard.
        prior: as for `open_session`, like the last two.
        max_pixels: of a photo.
        bit_depth: of photos of 16 bits.

    Raises:
        CheckpointError: the model has no manifest.
        UsageError: less than one row a shard.
    """
    if shard_rows < 1:
        raise UsageError(f"--shard-rows: expected at least 1, found {shard_rows}; give another")
    artifact.read_schema(model)  # raises with a remedy where nothing is there
    word = prior in (FOLDER, UNIFORM)
    return {
        "schema": _SCHEMA,
        "model": artifact.read_json(model / artifact.MANIFEST).get("sha256"),
        "images": _sha256_of(sources),
        "shard_rows": shard_rows,
        "top_k": wanted.top_k,
        "columns": [name for name in EXTRAS if getattr(wanted, name)],
        "prior": prior if word or not os.path.isfile(prior) else artifact.sha256_file(Path(prior)),
        "max_pixels": max_pixels,
        "bit_depth": bit_depth,
    }


def open_job(
    directory: Path,
    settings: Mapping[str, Any],
    wanted: Wanted,
    list_photos: Callable[[], ImageSet],
) -> Job:
    """Begin a job, or go on with the one that a directory holds.

    Of processes that begin it at once one lists the photos and the others wait for it.

    Args:
        directory: of the shards; made if it is not there.
        settings: what `settings_of` returned.
        wanted: what is told of each photo.
        list_photos: called where the job begins.

    Raises:
        UsageError: the directory holds another job, or something else.
        DataError: its list of photos is damaged.
        EnvironmentProblem: the directory cannot be written.
    """
    if not (directory / JOB).is_file():
        _require_empty(directory)
        with artifact.exclusive(directory, "", ".job.lock", timeout_s=-1):
            if not (directory / JOB).is_file():
                _begin(directory, settings, list_photos())
    stored = artifact.read_json(directory / JOB)
    _require_same(directory, stored, settings)
    photos = directory / PHOTOS
    if not photos.is_file() or artifact.sha256_file(photos) != stored.get("photos_sha256"):
        raise DataError(
            f"{printable(photos)}: expected the photos that the job began with, found "
            f"{'other bytes' if photos.exists() else 'nothing'}; restore it, or begin anew with "
            "another --out"
        )
    canonical = json.dumps(stored, sort_keys=True, separators=(",", ":"))
    sha256 = hashlib.sha256(canonical.encode()).hexdigest()
    names = pq.read_table(photos)["path"]
    return Job(directory, names, settings["shard_rows"], wanted, sha256)


def write_table(path: Path, table: pa.Table) -> None:
    """Write Parquet so that the whole file or none is there.

    Raises:
        EnvironmentProblem: the disk is full or the directory cannot be written.
    """
    with artifact.staged_file(path) as file:
        pq.write_table(table, file, compression="zstd")


def _begin(directory: Path, settings: Mapping[str, Any], found: ImageSet) -> None:
    paths = found.paths
    slices = (paths[first : first + _AT_A_TIME] for first in range(0, len(paths), _AT_A_TIME))
    arrays = [pa.array(map(os.fsencode, some), pa.binary()) for some in slices]
    names = pa.chunked_array(arrays, pa.binary())
    write_table(directory / PHOTOS, pa.table({"path": names}))
    photos = {"photos": len(names), "photos_sha256": artifact.sha256_file(directory / PHOTOS)}
    artifact.write_json(directory / JOB, {**settings, **photos})


def _sha256_of(sources: Sequence[Path]) -> str:
    """Hash where the photos come from: names as given, where they lead, and the bytes of lists."""
    digest = hashlib.sha256()
    for source in sources:
        digest.update(os.fsencode(source) + b"\0" + os.fsencode(absolute(source)) + b"\0")
        if source.suffix.lower() in LIST_ENDINGS and source.is_file():
            digest.update(bytes.fromhex(artifact.sha256_file(source)))
    return digest.hexdigest()


def _require_empty(directory: Path) -> None:
    """Refuse a directory of something else, such as the photos; hidden files do not count."""
    found = sorted(directory.iterdir()) if directory.is_dir() else []
    names = [path.name for path in found if not path.name.startswith((".", PHOTOS))]
    if names and JOB not in names:  # another process may have begun the job just now
        raise UsageError(
            f"--out {printable(directory)}: expected a new or empty folder, or one that `predict` "
            f"began, found one with {printable(names[0])}; give another"
        )


def _require_same(directory: Path, stored: Any, settings: Mapping[str, Any]) -> None:
    known = stored if isinstance(stored, dict) else {}
    differing = [
        name.replace("_", "-")
        + (f" ({known.get(name)} there, {value} now)" if len(str(value)) < _HASH else "")
        for name, value in settings.items()
        if known.get(name) != value
    ]
    if differing:
        raise UsageError(
            f"--out {printable(directory)}: expected the job that was begun there, found other "
            f"settings: {', '.join(differing)}; give the command that began it, or another --out"
        )
