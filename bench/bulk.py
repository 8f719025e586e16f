"""Photos a second of bulk inference with one process and with several, each on its own processor.

Processes are bound to one processor each, with one thread of the model and one that decodes, so
that one process cannot take what the others are measured with. Numbers of processes take turns. The
last line of stdout is one JSON document.
"""

import multiprocessing
import os
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Annotated

import pyarrow as pa
import typer
from rich.console import Console

from microclip_deploy.bench.card import environment
from microclip_deploy.bench.table_text import columns
from microclip_deploy.bulk import Classifier
from microclip_deploy.console import print_json
from microclip_deploy.data.sources import list_images
from microclip_deploy.errors import DataError, UsageError

TIMEOUT_S = 600.0


class Worker:
    """A process on one processor that has opened its session and classifies when it is told to."""

    def __init__(self, export: Path, processor: int, batch_size: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, other = spawn.Pipe()
        self._process = spawn.Process(
            target=_serve, args=(other, export, processor, batch_size), daemon=True
        )
        self._process.start()
        other.close()

    def begin(self, paths: Sequence[str]) -> None:
        """Let it classify these photos."""
        self._pipe.send(list(paths))

    def errors(self) -> int:
        """Wait for its answer: how many photos could not be read."""
        if not self._pipe.poll(TIMEOUT_S):
            raise DataError(f"bulk: expected an answer in {TIMEOUT_S:.0f} s, found none; try fewer")
        return int(self._pipe.recv())

    def end(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.join()


def _serve(pipe: Connection, export: Path, processor: int, batch_size: int) -> None:
    os.sched_setaffinity(0, {processor})
    classify = Classifier(export, threads=1, batch_size=batch_size)
    while True:
        answers = classify(pa.table({"path": pa.array(pipe.recv(), pa.string())}))
        pipe.send(len(answers) - answers["error"].null_count)


def photos_per_s(workers: Sequence[Worker], paths: Sequence[str]) -> float:
    """Return the rate of workers that share the photos evenly, each with a part of its own."""
    count = len(workers)
    begin = time.perf_counter()
    for number, worker in enumerate(workers):
        worker.begin(paths[number::count])
    bad = sum(worker.errors() for worker in workers)
    seconds = time.perf_counter() - begin
    if bad:
        raise DataError(f"bulk: expected readable photos, found {bad} others; leave them out")
    return len(paths) / seconds


def run(
    export: Annotated[Path, typer.Argument(help="What `export` wrote.")],
    images: Annotated[Path, typer.Argument(help="Photos.")],
    processes: Annotated[int, typer.Option(min=1, help="Largest number of processes.")] = 2,
    photos: Annotated[int, typer.Option(min=1, help="Photos a measurement.")] = 512,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
) -> None:
    """Measure and print."""
    processors = sorted(os.sched_getaffinity(0))
    if processes > len(processors):
        raise UsageError(
            f"--processes: expected at most {len(processors)}, one a processor, found {processes}; "
            "give fewer"
        )
    found = [str(path) for path in list_images(images).paths]
    paths = (found * -(-photos // len(found)))[:photos]
    workers = [Worker(export, number, batch_size) for number in processors[:processes]]
    rates: dict[int, list[float]] = {count: [] for count in range(1, processes + 1)}
    try:
        photos_per_s(workers, paths[: 2 * batch_size * processes])  # opens the sessions
        for _ in range(repeats):
            for count, measured in rates.items():
                measured.append(photos_per_s(workers[:count], paths))
    finally:
        for worker in workers:
            worker.end()
    one = median(rates[1])
    rows = [["processes", "photos/s", "least", "most", "times one process"]]
    for count, measured in rates.items():
        middle = median(measured)
        cells = (middle, min(measured), max(measured))
        rows.append([str(count), *(f"{cell:.1f}" for cell in cells), f"{middle / one:.2f}"])
    Console(highlight=False).print("\n".join(columns(rows)), markup=False)
    what = {"export": str(export), "photos": photos, "batch_size": batch_size}
    print_json({**what, "photos_per_s": rates, "environment": environment()})


if __name__ == "__main__":
    typer.run(run)
