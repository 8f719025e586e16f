"""The shards of a job: Parquet files that are whole or absent, dealt to parts in turn.

Shard i holds the photos from i * shard_rows on and its name says i, so which rows are done is which
files are there. A process that is killed leaves at most a hidden file that nobody reads. Batches
begin anew with each shard: it holds the same whoever makes it, and however often it was begun.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from microclip_deploy import artifact
from microclip_deploy.bulk.job import Job, write_table
from microclip_deploy.bulk.table import answered
from microclip_deploy.errors import DataError, UsageError, as_url, printable
from microclip_deploy.serving import Session

SUCCESS = "_SUCCESS"
"""Written when all shards are there: JSON, the fields of `Summary`."""

_JOB_KEY = b"microclip.job"


class Part(NamedTuple):
    """Which share of the shards a process makes: every `of`-th, beginning with `number`."""

    number: int = 1
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return what "I/N" says.

        Raises:
            UsageError: anything else, or I not from 1 to N.
        """
        found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
        part = cls(*map(int, found.groups())) if found else cls(0, 0)
        if not 1 <= part.number <= part.of:
            raise UsageError(
                f"--part: expected I/N with I from 1 to N, such as 2/8, found {text!r}; give that"
            )
        return part


WHOLE = Part()


class Summary(NamedTuple):
    """What the shards of a finished job hold."""

    photos: int
    errors: int
    """Rows of photos that could not be read."""
    unknown: int
    shards: int


def shard_path(job: Job, number: int) -> Path:
    """Return where a shard is, or will be."""
    return job.directory / f"shard-{number:05d}.parquet"


def missing_shards(job: Job, part: Part = WHOLE) -> list[int]:
    """Return the numbers of a part's shards that are still to be made.

    Raises:
        DataError: one that is there is damaged, or of another job.
    """
    own = range(part.number - 1, job.shards, part.of)
    return [number for number in own if not _is_made(job, number)]


def make_shards(
    job: Job,
    part: Part,
    session: Session,
    *,
    batch_size: int = 64,
    tell: Callable[[bytes, str | None], None] = lambda name, error: None,
) -> None:
    """Make a part's missing shards, one after the other.

    Args:
        job: what to do.
        part: which shards.
        session: an open model; stays open.
        batch_size: photos a batch of the model.
        tell: called with the name of each photo once it is read, and its error or None.

    Raises:
        EnvironmentProblem: the disk is full; all shards before are there.
        UsageError: another process does this part.
    """
    busy = "another process makes this part; wait for it, or give another --part"
    with artifact.exclusive(job.directory, busy, f".part-{part.number}-of-{part.of}.lock"):
        for number in missing_shards(job, part):
            _drop_leftovers(job, number)
            write_table(shard_path(job, number), _shard(job, number, session, batch_size, tell))


def finish(job: Job) -> Summary | None:
    """Count and write `_SUCCESS` if all shards are there; otherwise None.

    Raises:
        DataError: a shard is damaged or of another job, or no photo at all could be read.
    """
    if missing_shards(job):
        return None
    errors = unknown = 0
    for number in range(job.shards):
        shard = pq.read_table(shard_path(job, number), columns=["error", "unknown"])
        errors += len(shard) - shard["error"].null_count
        unknown += pc.sum(shard["unknown"]).as_py() or 0
    if errors == len(job.names):
        raise DataError(
            f"{printable(job.directory)}: expected readable photos, found none in {errors} files; "
            "read the column `error`, mend what it says, and begin anew with an empty folder"
        )
    summary = Summary(len(job.names), errors, unknown, job.shards)
    artifact.write_json(job.directory / SUCCESS, summary._asdict())
    return summary


def _is_made(job: Job, number: int) -> bool:
    """Say whether a shard is there.

    Raises:
        DataError: it is damaged or of another job.
    """
    path = shard_path(job, number)
    if not path.exists():
        return False
    rows = job.rows_of(number)
    try:
        footer = pq.read_metadata(path)
    except (pa.ArrowException, OSError) as error:
        raise _not_ours(path, rows, str(error)) from error
    if (footer.metadata or {}).get(_JOB_KEY) != job.sha256.encode():
        raise _not_ours(path, rows, "one of another job")
    if footer.num_rows != rows:
        raise _not_ours(path, rows, f"{footer.num_rows} rows")
    return True


def _not_ours(path: Path, rows: int, found: str) -> DataError:
    return DataError(
        f"{printable(path)}: expected {rows} rows of this job, found {found}; remove it and run "
        "again"
    )


def _shard(
    job: Job,
    number: int,
    session: Session,
    batch_size: int,
    tell: Callable[[bytes, str | None], None],
) -> pa.Table:
    """Classify the photos of one shard; `index` and `path` say which photo a row is of."""
    first = number * job.shard_rows
    names: list[bytes] = job.names.slice(first, job.shard_rows).to_pylist()
    paths = [as_url(name.decode("utf-8", "backslashreplace")) for name in names]
    index = pa.array(range(first, first + len(names)), pa.int64())
    keys = pa.table({"index": index, "path": pa.array(paths, pa.string())})
    photos, told = (Path(os.fsdecode(name)) for name in names), iter(names)
    table = answered(
        session, keys, photos, job.wanted, batch_size, lambda error: tell(next(told), error)
    )
    return table.replace_schema_metadata({_JOB_KEY: job.sha256.encode()})


def _drop_leftovers(job: Job, number: int) -> None:
    """Remove what killed processes left of a shard."""
    for path in job.directory.glob(f".{shard_path(job, number).name}.*.part"):
        path.unlink(missing_ok=True)
