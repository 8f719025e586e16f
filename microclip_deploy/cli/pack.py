"""`pack`: photos decoded once, for all epochs of all adaptations."""

from pathlib import Path
from typing import Annotated

import typer

from microclip_deploy.cli import next_steps
from microclip_deploy.cli.options import (
    MACHINE,
    METHOD,
    OUTPUT,
    AsJson,
    BitDepth,
    MaxBad,
    MaxPixels,
    option,
)
from microclip_deploy.console import (
    bar,
    counter,
    notes,
    print_json,
    tell_left_out,
    tell_skipped,
    tell_warnings,
)
from microclip_deploy.data.packing import BAD_IMAGES, PackConfig
from microclip_deploy.data.packing import pack as make_pack
from microclip_deploy.data.photo import PhotoConfig
from microclip_deploy.data.sources import list_images
from microclip_deploy.errors import printable


def pack(
    images: Annotated[
        Path,
        typer.Argument(
            metavar="PHOTOS",
            help="Folder, list, tars, Parquet or Arrow files, or an s3://, gs:// or https:// URL.",
        ),
    ],
    out_dir: Annotated[Path, option(OUTPUT, "DIR", "Folder of the pack.", "-o", "--out")],
    side: Annotated[
        int, option(METHOD, "N", "Short side of larger photos, pixels.", min=32, max=8192)
    ] = 512,
    quality: Annotated[int, option(METHOD, "N", "Of the JPEGs they become.", min=1, max=100)] = 95,
    max_bad_images: MaxBad = "1%",
    max_pixels: MaxPixels = None,
    bit_depth: BitDepth = None,
    workers: Annotated[
        int | None,
        option(MACHINE, "N", "Photos decoded at once. [default: one a core, up to 8]", min=1),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Decode photos once and store them small, so that adaptation does not wait for them.

    Run again after an interruption, it continues. The pack is given wherever photos are.

    Example: microclip-deploy pack photos/ -o pack/
    """
    reading = PhotoConfig.of(max_pixels=max_pixels, bit_depth=bit_depth)
    config = PackConfig(side=side, quality=quality, photos=reading)
    with counter(notes, "looking for images") as found:
        listed = list_images(images, on_found=found)
    tell_left_out(listed.left_out.summary(), notes)
    with bar(notes, "packing", "images") as progress:
        packed = make_pack(
            listed,
            out_dir,
            config,
            max_bad=max_bad_images,
            workers=workers,
            on_progress=progress.update,
        )
    tell_skipped(packed.bad, notes, out_dir / BAD_IMAGES)
    tell_warnings(packed.remarks, notes)
    already = f", {packed.there_already} there already" if packed.there_already else ""
    notes.print(
        f"packed: {printable(out_dir)} ({packed.photos} images, {packed.size_bytes / 1e6:.1f} MB; "
        f"{packed.reduced} made smaller{already})",
        markup=False,
    )
    if as_json:
        told = packed._asdict()
        print_json({**told, "bad": len(packed.bad), "remarks": list(packed.remarks)})
    next_steps.tell(notes, next_steps.adapt(photos=out_dir))
