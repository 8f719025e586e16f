"""What `evaluate` and `predict` do between parsing and printing.

PyTorch is imported where a run directory needs it; an export needs none.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

from rich.console import Console

from microclip_deploy import artifact
from microclip_deploy.console import bar, counter, tell_left_out, tell_skipped, tell_warnings
from microclip_deploy.data.photo import Remarks
from microclip_deploy.data.sources import list_images, list_sources
from microclip_deploy.errors import EnvironmentProblem
from microclip_deploy.evaluation.evaluate import EVALUATION, Evaluation, evaluate
from microclip_deploy.evaluation.predict import OverlayWriter, open_writer, predict, table
from microclip_deploy.serving import RunSessions, Session, is_export, open_run, open_session


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
    max_bad: str = "1%",
    max_pixels: int | None = None,
    bit_depth: int | None = None,
    threads: int | None = None,
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
        max_bad: as for `evaluate`.
        max_pixels: as for `evaluate`.
        bit_depth: as for `evaluate`.
        threads: as for `open_session`.
    """
    with gpu_memory(), ExitStack() as stack:
        with counter(notes, "looking for images") as found:
            listed = list_images(data, on_found=found)
        tell_left_out(listed.left_out.summary(), notes)
        run = None
        if not is_export(directory):
            run = stack.enter_context(open_run(directory, device, threads=threads))
        with bar(notes, "evaluating") as progress:
            measured = evaluate(
                directory,
                data,
                device=device,
                batch_size=batch_size,
                zero_shot=zero_shot,
                max_bad=max_bad,
                threads=threads,
                sessions=run,
                progress=progress.update,
                on_open=lambda session: _tell_device(session, notes),
                listed=listed,
                max_pixels=max_pixels,
                bit_depth=bit_depth,
            )
        tell_skipped(measured.bad, notes)
        if run is not None:
            _keep(directory, measured, run, notes)
    return measured


def _keep(directory: Path, measured: Evaluation, run: RunSessions, notes: Console) -> None:
    try:
        artifact.write_json(directory / EVALUATION, measured.to_json())
        update_report(directory, run, notes)
    except EnvironmentProblem as error:  # a read-only run directory can still be evaluated
        notes.print(f"warning: {error}", style="yellow", markup=False)


def run_predict(
    directory: Path,
    images: Sequence[Path],
    out: Console,
    notes: Console,
    *,
    top_k: int = 5,
    output_format: Literal["table", "csv", "json", "jsonl"] = "table",
    overlay: Path | None = None,
    device: str = "auto",
    batch_size: int = 64,
    max_pixels: int | None = None,
    bit_depth: int | None = None,
    threads: int | None = None,
) -> None:
    """Classify images with a run or an export and print the results as they come."""
    overlays = OverlayWriter(overlay) if overlay else None
    remarks = Remarks()
    own = {"max_pixels": max_pixels, "bit_depth": bit_depth, "threads": threads}
    with gpu_memory(), open_session(directory, device, **own) as session:
        _tell_device(session, notes)
        with counter(notes, "looking for images") as found:
            listed = list_sources(images, on_found=found)
        tell_left_out(listed.left_out.summary(), notes)
        results = predict(session, listed, top_k, batch_size=batch_size, remarks=remarks)
        if output_format == "table":
            out.print(table(results, overlays.write if overlays else None))
        else:
            with open_writer(output_format, sys.stdout, top_k) as writer:
                for result in results:
                    writer.write(result)
                    if overlays:
                        overlays.write(result)
    tell_warnings(remarks.lines(), notes)


def update_report(directory: Path, run: RunSessions, notes: Console) -> None:
    """Write a run's report.html; the checkpoint is complete without it."""
    from microclip_deploy.evaluation.report import write_report

    write_report(directory, sessions=run)
    notes.print(f"report: {directory / 'report.html'}", markup=False)


def _tell_device(session: Session, notes: Console) -> None:
    notes.print(f"device: {session.device}", markup=False)
