"""`calibrate`: say on another folder how a model's logits are read."""

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from microclip_deploy.cli import next_steps
from microclip_deploy.cli.options import (
    PHOTOS,
    Adapted,
    AsJson,
    BatchSize,
    BitDepth,
    MaxPixels,
    ServingDevice,
    Threads,
    option,
)
from microclip_deploy.console import (
    bar,
    counter,
    notes,
    out,
    print_json,
    tell_left_out,
    tell_skipped,
    waiting,
)
from microclip_deploy.errors import printable


def calibrate(
    directory: Adapted,
    images: Annotated[
        Path,
        typer.Argument(
            metavar="PHOTOS", help="Unlabeled photos as the model will see: folder or list."
        ),
    ],
    clicks: Annotated[
        Path | None,
        option(
            PHOTOS, "AUDIT|CSV", "Answers: what `audit` wrote for PHOTOS, or path,answer,weight."
        ),
    ] = None,
    device: ServingDevice = "auto",
    batch_size: BatchSize = 64,
    max_pixels: MaxPixels = None,
    bit_depth: BitDepth = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Find temperature, class frequencies and the threshold of unknown, and store them.

    `adapt` does so on the photos it learns from, and `export` copies it. Run it on a folder in
    which classes are otherwise distributed, or with answers, which no estimate replaces.

    Example: microclip-deploy calibrate exports/birds new/ --clicks audits/new
    """
    from microclip_deploy.audit.answers import answered
    from microclip_deploy.cli.commands import gpu_memory, tell_device
    from microclip_deploy.data.answers import read_answers
    from microclip_deploy.data.sources import list_images
    from microclip_deploy.evaluation.calibrate import calibration_of, store
    from microclip_deploy.serving import open_session

    own: dict[str, Any] = {"max_pixels": max_pixels, "bit_depth": bit_depth, "threads": threads}
    with gpu_memory(), ExitStack() as stack:
        with waiting(notes, f"opening {printable(directory)}"):
            session = stack.enter_context(open_session(directory, device, **own))
        tell_device(session, notes)
        with counter(notes, "looking for images") as count:
            listed = list_images(images, on_found=count)
        tell_left_out(listed.left_out.summary(), notes)
        answers = None
        if clicks is not None and clicks.suffix.lower() == ".csv":
            answers = read_answers(clicks, session.classes)
        elif clicks is not None:
            answers = answered(clicks, listed.root, session.classes)
        with bar(notes, "calibrating", "images") as progress:
            found, bad = calibration_of(
                session, listed.paths, answers, batch_size=batch_size, progress=progress.update
            )
        store(directory, found, session.classes)
    tell_skipped(bad, notes)
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        out.print(
            f"temperature {found.temperature:.3f}, unknown below {found.unknown_below:g}, found "
            f"with {found.images} {'photos' if found.source == 'folder' else 'answers'}",
            soft_wrap=True,
        )
    next_steps.tell(notes, next_steps.predict(directory), next_steps.evaluate(directory))
