"""`calibrate`: say on another folder how a model's logits are read."""

from pathlib import Path
from typing import Annotated

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
from microclip_deploy.console import notes, out, print_json


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
        option(PHOTOS, "FILE.csv", "A person's answers: columns path, answer, perhaps weight."),
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

    Example: microclip-deploy calibrate exports/birds new/
    """
    from microclip_deploy.cli.commands import run_calibrate

    found = run_calibrate(
        directory,
        images,
        notes,
        clicks=clicks,
        device=device,
        batch_size=batch_size,
        max_pixels=max_pixels,
        bit_depth=bit_depth,
        threads=threads,
    )
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        out.print(
            f"temperature {found.temperature:.3f}, unknown below {found.unknown_below:g}, found "
            f"with {found.images} {'photos' if found.source == 'folder' else 'answers'}",
            soft_wrap=True,
        )
    next_steps.tell(notes, next_steps.predict(directory), next_steps.evaluate(directory))
