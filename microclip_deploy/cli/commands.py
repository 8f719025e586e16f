"""What `evaluate` and `predict` do between parsing and printing.

PyTorch is imported where a run directory needs it; an export needs none.
"""

import csv
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from rich.console import Console

from microclip_deploy import artifact
from microclip_deploy.calibration import FOLDER
from microclip_deploy.console import (
    bar,
    counter,
    machine_stdout,
    tell_left_out,
    tell_skipped,
    tell_warnings,
    waiting,
)
from microclip_deploy.data.formats import image_endings
from microclip_deploy.data.photo import Remarks
from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.data.sources import BadFile, TooManyBad, list_images, list_sources
from microclip_deploy.describe.controls import controls_of_run
from microclip_deploy.errors import CheckpointError, EnvironmentProblem, UsageError, printable
from microclip_deploy.evaluation.evaluate import evaluate
from microclip_deploy.evaluation.evaluation import EVALUATION, Evaluation, write_answers
from microclip_deploy.evaluation.overlays import OverlayWriter
from microclip_deploy.evaluation.predict import FailedImage, Result, predict, predict_jointly
from microclip_deploy.evaluation.records import cell, file_name, open_writer, table
from microclip_deploy.evaluation.remote import Server
from microclip_deploy.serving import RunSessions, Session, is_export, open_run, open_session

if TYPE_CHECKING:
    from rich.table import Table

Format = Literal["table", "csv", "json", "jsonl"]

_FORMAT_OF: dict[str, Format] = {".csv": "csv", ".json": "json", ".jsonl": "jsonl", ".txt": "table"}
"""What `predict --out` writes, by the ending of the file."""

_FILE_WIDTH = 120  # columns of a table in a file


@contextmanager
def gpu_memory() -> Iterator[None]:
    """Turn torch's out-of-memory error into ours; other backends raise ours themselves."""
    try:
        yield
    except RuntimeError as error:
        torch = sys.modules.get("torch")  # if it is not loaded, the error is not its
        if torch is None or not isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        raise EnvironmentProblem(
            "the GPU is out of memory; lower --batch-size (in adapt also --set views.crops, or use "
            "--set adapt.precision=bf16), or use --device cpu"
        ) from error


def run_evaluate(
    directory: Path,
    data: Path,
    notes: Console,
    *,
    device: str = "auto",
    batch_size: int = 64,
    zero_shot: bool = True,
    limit: int | None = None,
    max_bad: str = "1%",
    max_pixels: int | None = None,
    bit_depth: int | None = None,
    threads: int | None = None,
    masks: Path | None = None,
    controls: bool = False,
    joint: bool = False,
    file: Path | None = None,
    prior: str = FOLDER,
    unknown: Path | None = None,
) -> Evaluation:
    """Evaluate a run or an export on labelled images; a run's report gets the outcome.

    An export is never written to: its files are those its manifest lists.

    Args:
        directory: the run or export.
        data: labelled images.
        notes: progress and remarks.
        device: as for `open_session`.
        batch_size: images a batch.
        zero_shot: as for `evaluate`.
        limit: as for `evaluate`.
        max_bad: as for `evaluate`.
        max_pixels: as for `evaluate`.
        bit_depth: as for `evaluate`.
        threads: as for `open_session`.
        masks: as for `evaluate`.
        controls: also measure texts that the run's descriptions must beat.
        joint: as for `evaluate`.
        file: gets one CSV row an image.
        prior: as for `evaluate`.
        unknown: as for `evaluate`.
    """
    _require_csv(file)
    if controls:
        _require_initial(directory, zero_shot=zero_shot)
    with gpu_memory(), ExitStack() as stack:
        answers = stack.enter_context(result_file(file, (data,))) if file else None
        stack.enter_context(listing_too_many_bad(file, notes))
        with counter(notes, "looking for images") as found:
            listed = list_images(data, on_found=found)
        tell_left_out(listed.left_out.summary(), notes)
        with waiting(notes, f"opening {printable(directory)}"):
            run, clip, control_rows = None, None, None
            if controls:
                clip, control_rows = controls_of_run(directory, device)
            if not is_export(directory):
                run = stack.enter_context(open_run(directory, device, clip=clip, threads=threads))
        with bar(notes, "evaluating", "images") as progress:
            measured = evaluate(
                directory,
                data,
                device=device,
                batch_size=batch_size,
                zero_shot=zero_shot,
                limit=limit,
                max_bad=max_bad,
                masks=masks,
                threads=threads,
                sessions=run,
                progress=progress.update,
                on_open=lambda session: tell_device(session, notes),
                listed=listed,
                max_pixels=max_pixels,
                bit_depth=bit_depth,
                controls=control_rows,
                prior=prior,
                unknown=unknown,
                joint=joint,
            )
        if answers is not None:
            write_answers(answers, measured)
        tell_skipped(measured.bad, notes, file)
        if run is not None:
            other = "--limit measures a part" if limit is not None else ""
            other = other or ("" if prior == FOLDER else "--prior expects other photos")
            _keep(directory, measured, run, notes, other)
    if file is not None:
        notes.print(f"answers: {printable(file)}", markup=False)
    return measured


def _require_csv(file: Path | None) -> None:
    if file is not None and file.suffix.lower() != ".csv":
        raise UsageError(
            f"--out {printable(file)}: expected a name ending in .csv, found "
            f"{file.suffix or 'none'}; give another name"
        )


def _require_initial(directory: Path, *, zero_shot: bool) -> None:
    """Refuse controls where the model before adaptation is not measured."""
    if is_export(directory) or not zero_shot:
        raise UsageError(
            "--controls: expected a run, measured with zero-shot, found "
            f"{'an export' if is_export(directory) else '--no-zero-shot'}; give a run, whose class "
            "texts and model before adaptation are there"
        )


def _keep(
    directory: Path, measured: Evaluation, run: RunSessions, notes: Console, other: str
) -> None:
    """Keep an evaluation beside its run, unless it tells less, or `other` says why it differs."""
    kept = directory / EVALUATION
    if reason := other or _less_than_kept(measured, kept):
        notes.print(f"{printable(kept)} stays as it is: {reason}", markup=False)
        return
    try:
        artifact.write_json(kept, measured.to_json())
        update_report(directory, run, notes)
    except EnvironmentProblem as error:  # a read-only run directory can still be evaluated
        notes.print(f"warning: {error}", style="yellow", markup=False)


def _less_than_kept(measured: Evaluation, kept: Path) -> str:
    """Say what a kept evaluation measured that this one did not; '' where there is nothing."""
    if not kept.is_file():
        return ""
    try:
        stored = artifact.read_json(kept)
        images, rows, data = stored["images"], len(stored["rows"]), stored.get("data")
        true_masks = stored.get("masks", {}).get("true_masks", 0)
    except (CheckpointError, KeyError, TypeError):  # nothing that could be lost
        return ""
    if data != printable(measured.data):
        fewer = measured.images < images
        told = f"it measured {images} images, this evaluation {measured.images}" if fewer else ""
    elif measured.masks.true_masks < true_masks:
        told = f"it measured {true_masks} true masks, this one {measured.masks.true_masks}"
    else:
        told = "it measured zero-shot, controls or joint too" if len(measured.rows) < rows else ""
    return f"{told}; remove it to keep the next one" if told else ""


@dataclass
class _Tally:
    """What became of the images so far."""

    images: int = 0
    drawn: int = 0
    bad: list[BadFile] = field(default_factory=list)

    def counting(self, results: Iterable[Result]) -> Iterator[Result]:
        """Yield the results and count them."""
        for result in results:
            self.images += 1
            if isinstance(result, FailedImage):
                self.bad.append(BadFile(result.path, result.reason))
            else:
                self.drawn += result.overlay is not None
            yield result


def run_predict(
    source: Path | Server,
    images: Sequence[Path],
    out: Console,
    notes: Console,
    *,
    top_k: int = 5,
    output_format: Format | None = None,
    file: Path | None = None,
    overlay: Path | None = None,
    device: str = "auto",
    batch_size: int = 64,
    max_pixels: int | None = None,
    bit_depth: int | None = None,
    threads: int | None = None,
    prior: str = FOLDER,
    joint: bool = False,
) -> None:
    """Classify images and print or write the results as they come; joint ones after the last.

    The source is a run, an export, or a server, for which the device and what follows do not count.
    """
    chosen = output_format or _format_of(file)
    overlays = OverlayWriter(overlay) if overlay else None
    tally, remarks = _Tally(), Remarks()
    own: dict[str, Any] = {"max_pixels": max_pixels, "bit_depth": bit_depth, "threads": threads}
    own["prior"] = prior
    with gpu_memory(), ExitStack() as stack:
        target = stack.enter_context(result_file(file, images)) if file else None
        answered, preprocess = stack.enter_context(
            _predictor(
                source, device, notes, own, joint=joint, batch_size=batch_size, remarks=remarks
            )
        )
        with counter(notes, "looking for images") as found:
            given = list_sources(images, on_found=found)
        tell_left_out(given.left_out.summary(), notes)
        # Rows that scroll by in the terminal itself are progress enough.
        scrolls = target is None and chosen != "table" and sys.stdout.isatty()
        shown = Console(quiet=True) if scrolls else notes
        progress = stack.enter_context(bar(shown, "predicting", "images")).update
        results = answered(given, top_k, progress=progress)
        if overlays:
            results = overlays.drawn(results, preprocess)
        results = tally.counting(results)
        try:
            shown_table = _write(
                results, chosen, target, top_k, overlays=overlay is not None, joint=joint
            )
        finally:
            listed = list_bad(file, tally.bad) if file else None
    tell_warnings(remarks.lines(), notes)
    if shown_table is not None:
        out.print(shown_table)
    if file is not None or chosen != "table":
        tell_skipped(tally.bad, notes, listed)
    if file is not None:
        counts = f"{tally.images} images" + (f", {len(tally.bad)} skipped" if tally.bad else "")
        notes.print(f"predictions: {printable(file)} ({counts})", markup=False)
    if overlay is not None:
        notes.print(f"overlays: {printable(overlay)} ({tally.drawn} pictures)", markup=False)


@contextmanager
def _predictor(
    source: Path | Server,
    device: str,
    notes: Console,
    own: dict[str, Any],
    *,
    joint: bool,
    **reading: Any,
) -> Iterator[tuple[Callable[..., Iterator[Result]], Preprocess]]:
    """Give what predicts photos, here or on a server, and how it sees them."""
    if isinstance(source, Server):
        yield source.predict, source.preprocess
        return
    with ExitStack() as stack:
        with waiting(notes, f"opening {printable(source)}"):
            session = stack.enter_context(open_session(source, device, **own))
        tell_device(session, notes)
        if joint:
            notes.print("joint: classes are read from all photos together, after the last one")
        answered = predict_jointly if joint else predict
        yield partial(answered, session, **reading), session.preprocess


def _write(
    results: Iterable[Result],
    chosen: Format,
    target: IO[str] | None,
    top_k: int,
    *,
    overlays: bool,
    joint: bool,
) -> "Table | None":
    """Write the results to a file or to stdout; return a table that is still to be printed."""
    if chosen == "table":
        found = table(results)
        if target is None:
            return found
        Console(file=target, width=_FILE_WIDTH).print(found)
        return None
    stream = target or machine_stdout()
    with open_writer(chosen, stream, top_k, overlays=overlays, joint=joint) as writer:
        for result in results:
            writer.write(result)
    return None


def _format_of(file: Path | None) -> Format:
    """Return the format that the ending of a file asks for; a table without a file."""
    if file is None:
        return "table"
    if file.suffix.lower() not in _FORMAT_OF:
        raise UsageError(
            f"--out {printable(file)}: expected a name ending in {', '.join(_FORMAT_OF)}, found "
            f"{file.suffix or 'none'}; give another name, or --format"
        )
    return _FORMAT_OF[file.suffix.lower()]


@contextmanager
def result_file(file: Path, sources: Sequence[Path]) -> Iterator[IO[str]]:
    """Give a text file that takes its name when all is written; its folder is made.

    Raises:
        EnvironmentProblem: the disk is full or the folder cannot be written.
        UsageError: it has the name of an image or is one of the sources, which would be lost.
    """
    read = any(source.exists() and file.exists() and file.samefile(source) for source in sources)
    if read or file.suffix.lower() in image_endings():
        raise UsageError(
            f"--out {printable(file)}: expected another file than what is read; give another name"
        )
    artifact.make_directory(file.parent)
    with artifact.staged_file(file, "w") as stream:
        yield stream


def list_bad(file: Path, bad: Sequence[BadFile]) -> Path:
    """Write all files that could not be read beside a result, as CSV: path, reason.

    Where all could be read, the list of an earlier command is removed.
    """
    listed = file.with_name(f"{file.stem}.bad-files.csv")
    if not bad:
        listed.unlink(missing_ok=True)
        return listed
    with artifact.staged_file(listed, "w") as stream:
        rows = csv.writer(stream, lineterminator="\n")
        rows.writerow(("path", "reason"))
        rows.writerows((cell(file_name(path)), cell(reason)) for path, reason in bad)
    return listed


@contextmanager
def listing_too_many_bad(result: Path | None, notes: Console) -> Iterator[None]:
    """List all unusable files beside a result that they prevent; the error names the first."""
    try:
        yield
    except TooManyBad as error:
        if result is not None:
            listed = printable(list_bad(result, error.bad))
            notes.print(f"unusable files: {len(error.bad)}, listed in {listed}", markup=False)
        raise
    if result is not None:
        list_bad(result, ())


def update_report(directory: Path, run: RunSessions, notes: Console) -> None:
    """Write a run's report.html; the checkpoint is complete without it."""
    from microclip_deploy.evaluation.report import write_report

    write_report(directory, sessions=run)
    notes.print(f"report: {printable(directory / 'report.html')}", markup=False)


def tell_device(session: Session, notes: Console) -> None:
    """Say which device a session chose."""
    notes.print(f"device: {session.device}", markup=False)
