"""What `predict` does with a folder as --out: Parquet shards."""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from microclip_deploy.cli.commands import gpu_memory, tell_device
from microclip_deploy.console import bar, counter, tell_left_out, waiting
from microclip_deploy.data.sources import ImageSet, list_sources
from microclip_deploy.errors import UsageError, printable, require
from microclip_deploy.serving import open_session

if TYPE_CHECKING:
    from microclip_deploy.bulk.job import Job
    from microclip_deploy.bulk.shards import Part
    from microclip_deploy.bulk.table import Wanted

SHARD_ROWS = 8192
"""With embeddings of 512 numbers a shard has about 16 MB; a kill loses what one shard takes."""

_SHOWN = 5  # unreadable photos that are named


def is_folder(out: str) -> bool:
    """Say whether --out names a folder: one that is there, or with a slash at its end."""
    return out.endswith(("/", os.sep)) or os.path.isdir(out)


def run_shards(
    source: Path,
    images: Sequence[Path],
    notes: Console,
    *,
    out: Path,
    shard_rows: int | None = None,
    part: str | None = None,
    columns: str | None = None,
    top_k: int = 5,
    batch_size: int = 64,
    device: str = "auto",
    threads: int | None = None,
    **reading: Any,
) -> None:
    """Make the missing shards of a job, which begins where the folder is new.

    The options are those of `predict`; `reading` are `prior`, `max_pixels` and `bit_depth`.
    """
    require("pyarrow", "parquet")
    from microclip_deploy.bulk.job import open_job, settings_of
    from microclip_deploy.bulk.shards import Part

    own, wanted = Part.parse(part or "1/1"), _wanted(top_k, columns)
    settings = settings_of(source, images, wanted, shard_rows or SHARD_ROWS, **reading)
    with gpu_memory(), ExitStack() as stack:
        # Before the job begins: one that cannot be done must not keep the folder from the next.
        with waiting(notes, f"opening {printable(source)}"):
            session = stack.enter_context(open_session(source, device, threads=threads, **reading))
        tell_device(session, notes)
        job = open_job(out, settings, wanted, lambda: _listed(images, notes))
        _make(job, own, session, batch_size, notes)
    _tell_end(job, own, notes)


def _wanted(top_k: int, columns: str | None) -> "Wanted":
    from microclip_deploy.bulk.table import EXTRAS, Wanted

    names = set(columns.split(",")) if columns is not None else set()
    if not names <= set(EXTRAS):
        raise UsageError(
            f"--columns: expected {' or '.join(EXTRAS)}, or both with a comma between, found "
            f"'{columns}'; give that"
        )
    return Wanted(top_k, **dict.fromkeys(names, True))


def _listed(images: Sequence[Path], notes: Console) -> ImageSet:
    with counter(notes, "looking for images") as found:
        given = list_sources(images, on_found=found)
    tell_left_out(given.left_out.summary(), notes)
    return given


def _make(job: "Job", own: "Part", session: Any, batch_size: int, notes: Console) -> None:
    """Make what is missing; name the first photos that cannot be read."""
    from microclip_deploy.bulk.shards import make_shards, missing_shards

    missing = missing_shards(job, own)
    total = sum(job.rows_of(number) for number in missing)
    if total < len(job.names):  # continued, or a part
        here = f"{total} of {len(job.names)} photos, {len(missing)} of {job.shards} shards"
        notes.print(f"to do: {here}", markup=False)
    done = bad = 0
    with bar(notes, "predicting", "images") as progress:

        def tell(name: bytes, error: str | None) -> None:
            nonlocal done, bad
            done, bad = done + 1, bad + (error is not None)
            if error is not None and bad <= _SHOWN:
                told = printable(os.fsdecode(name))
                notes.print(f"skipped: {told}: {error}", style="yellow", markup=False)
            progress.update(done, total)

        make_shards(job, own, session, batch_size=batch_size, tell=tell)
    if bad > _SHOWN:
        notes.print(f"skipped: {bad} files in all", style="yellow", markup=False)


def _tell_end(job: "Job", own: "Part", notes: Console) -> None:
    from microclip_deploy.bulk.shards import finish, missing_shards

    summary, where = finish(job), printable(job.directory)
    if summary is None:
        missing = len(missing_shards(job))
        notes.print(
            f"predictions: {where}: part {own.number}/{own.of} is done; {missing} of {job.shards} "
            "shards are still to be made by other parts",
            markup=False,
        )
        return
    skipped = f", {summary.errors} with an error" if summary.errors else ""
    counts = f"{summary.photos} images{skipped}, {summary.shards} shards"
    notes.print(f"predictions: {where} ({counts})", markup=False)
