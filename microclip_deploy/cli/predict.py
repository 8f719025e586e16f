"""`predict`: classify photos with a run, an export or a server."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from microclip_deploy.cli import next_steps
from microclip_deploy.cli.options import (
    OUTPUT,
    SERVER,
    SHARDS,
    BatchSize,
    BitDepth,
    Joint,
    MaxPixels,
    OutputFormat,
    Prior,
    ServingDevice,
    Threads,
    option,
)
from microclip_deploy.console import notes, out
from microclip_deploy.errors import UsageError


def predict(
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_OR_EXPORT",
            help="Directory that `adapt` or `export` wrote; left out with --server.",
            show_default=False,
        ),
    ],
    images: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="IMAGES",
            help="Images, folders or lists.",
            readable=False,  # they get a row
            show_default=False,
        ),
    ] = None,
    prior: Prior = "folder",
    top_k: Annotated[int, option(OUTPUT, "K", "Classes to show.", min=1)] = 5,
    output_format: Annotated[
        OutputFormat | None,
        option(
            OUTPUT,
            None,
            "Of the results. [default: table; with --out what its ending says]",
            "--format",
        ),
    ] = None,
    out_file: Annotated[
        str | None,  # a Path would lose the slash at the end
        option(
            OUTPUT,
            "FILE|DIR/",
            "Write here: .csv, .json, .jsonl or .txt; a folder, with / at its end, gets Parquet "
            "shards, and the same command continues them.",
            "--out",
            path_type=str,
        ),
    ] = None,
    shard_rows: Annotated[
        int | None, option(SHARDS, "N", "Photos a shard. [default: 8192]", min=1)
    ] = None,
    part: Annotated[
        str | None, option(SHARDS, "I/N", "Make every N-th shard, from the I-th on: 2/8.")
    ] = None,
    columns: Annotated[
        str | None, option(SHARDS, "NAMES", "Further columns: embedding, mask or embedding,mask.")
    ] = None,
    joint: Joint = False,
    overlay: Annotated[
        Path | None, option(OUTPUT, "DIR", "Write saliency overlays (PNG) into this folder.")
    ] = None,
    device: ServingDevice = "auto",
    batch_size: BatchSize = 64,
    max_pixels: MaxPixels = None,
    bit_depth: BitDepth = None,
    threads: Threads = None,
    server: Annotated[
        str | None,
        option(SERVER, "URL", "Ask what `serve` started, in place of a directory."),
    ] = None,
    served: Annotated[
        str | None, option(SERVER, "NAME", "One of several models there.", "--model")
    ] = None,
    api_key: Annotated[
        str | None, option(SERVER, "KEY", "If it asks for one.", envvar="MICROCLIP_API_KEY")
    ] = None,
) -> None:
    """Classify images with an adapted model; only a run needs PyTorch, an export does not.

    Example: microclip-deploy predict runs/birds new/ --out predictions.csv
    """
    from microclip_deploy.cli import commands
    from microclip_deploy.cli.shards import is_folder, run_shards
    from microclip_deploy.evaluation.remote import Server

    given = [directory, *(images or [])]
    if server is None and not images:
        raise UsageError(
            f"predict: expected RUN_OR_EXPORT and IMAGES, found {directory} alone; name photos too"
        )
    if server is not None and prior != "folder":
        raise UsageError(
            "--prior: expected a directory, found --server, which was started with its own; leave "
            "one out"
        )
    if server is not None and joint:
        raise UsageError(
            "--joint: expected RUN_OR_EXPORT, found --server, which answers each photo alone; "
            "leave one of them out"
        )
    how: dict[str, Any] = {
        "top_k": top_k,
        "device": device,
        "batch_size": batch_size,
        "max_pixels": max_pixels,
        "bit_depth": bit_depth,
        "threads": threads,
        "prior": prior,
    }
    to_shards = {"--shard-rows": shard_rows, "--part": part, "--columns": columns}
    to_file = {"--format": output_format, "--overlay": overlay, "--server": server}
    if out_file is not None and is_folder(out_file):
        _refuse({**to_file, "--joint": joint or None}, "a file as --out, or none", out_file)
        run_shards(
            directory,
            given[1:],
            notes,
            out=Path(out_file),
            shard_rows=shard_rows,
            part=part,
            columns=columns,
            **how,
        )
        return
    _refuse(to_shards, "a folder as --out, such as shards/", out_file or "none")
    with ExitStack() as stack:
        source: Path | Server = directory
        if server is not None:
            source = stack.enter_context(Server(server, api_key, served))
        commands.run_predict(
            source,
            given if source is not directory else given[1:],
            out,
            notes,
            output_format=None if output_format is None else output_format.value,
            file=None if out_file is None else Path(out_file),
            overlay=overlay,
            joint=joint,
            **how,
        )
    if server is not None:
        return
    look = next_steps.evaluate if overlay else next_steps.overlay
    next_steps.tell(notes, look(directory), next_steps.deployment(directory))


def _refuse(options: Mapping[str, object], needed: str, found: str) -> None:
    """Refuse options that --out does not go with."""
    for name, value in options.items():
        if value is not None:
            raise UsageError(f"{name}: expected {needed}, found {found}; leave one of them out")
