"""`microclip-deploy bench`: measurements a user can repeat."""

from pathlib import Path
from typing import Annotated

import typer

from microclip_deploy.cli_options import AsJson
from microclip_deploy.errors import require
from microclip_deploy.terminal import notes, out, print_json

app = typer.Typer(
    help="Measure this package on this machine, correctness beside speed.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.callback()
def bench() -> None:
    """Measure this package on this machine, correctness beside speed."""


@app.command("ncut")
def bench_ncut(
    batches: Annotated[str, typer.Option(help="Images a batch.")] = "1,32,256",
    tokens: Annotated[str, typer.Option(help="Patch tokens an image.")] = "49,196,256,576",
    dtype: Annotated[
        str, typer.Option(help="Of the tokens: float16, bfloat16 or float32.")
    ] = "float16",
    device: Annotated[
        str, typer.Option(help="cuda, or cpu to measure only the solvers of a CPU.")
    ] = "cuda",
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="Write DATE-GPU-kernel.json, .md and .svg here.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Time the CUDA kernels of the normalised cut against its peers; two minutes.

    The last line of stdout is one JSON document. Exit 5 where a mask is wrong.
    """
    require("torch", "adapt")
    from microclip_deploy.bench import kernel, kernel_report

    request = kernel.KernelRequest(
        tokens=kernel.parse_numbers("--tokens", tokens),
        batches=kernel.parse_numbers("--batches", batches),
        dtype=dtype,
        device=device,
    )
    report = kernel.run_kernel_bench(request, notes)
    if out_dir is not None:
        notes.print(f"wrote {kernel_report.write_report(report, out_dir)}")
    shown = notes if as_json else out
    shown.print(kernel_report.plain(report), markup=False, soft_wrap=True)
    print_json(report.to_json())
    kernel_report.require_right(report)
