"""`microclip-deploy bench`: measurements a user can repeat."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from microclip_deploy.artifact import make_directory
from microclip_deploy.cli.options import AsJson, ExportDtype
from microclip_deploy.console import notes, out, print_json
from microclip_deploy.errors import require

if TYPE_CHECKING:
    from microclip_deploy.bench.latency.report import Report

_MODEL = "model"
"""Name of the command that a target stands for."""


class _TargetFirst(TyperGroup):
    """Takes what is no command for the target of `bench model`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = [_MODEL, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    help="Measure on this machine: TARGET (a run, an export, or a model name) or what is below.",
    cls=_TargetFirst,
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.callback()
def bench() -> None:
    """Measure on this machine: TARGET (a run, an export, or a model name) or what is below.

    Example: microclip-deploy bench exports/birds --batches 1,8
    """


@app.command(_MODEL)
def bench_model(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="Run, export, or open_clip model name for random weights.",
            show_default=False,
        ),
    ],
    backends: Annotated[
        str, typer.Option(help="Of onnx, torch, trt; all: those that the target has.")
    ] = "all",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    batches: Annotated[str, typer.Option(help="Images a request.")] = "1,8,32",
    concurrency: Annotated[str, typer.Option(help="Requests under way at once.")] = "1",
    warmup: Annotated[str, typer.Option(help="Before each measurement.")] = "2s",
    duration: Annotated[str, typer.Option(help="Measured at least, in three windows.")] = "10s",
    until_stable: Annotated[
        str, typer.Option(help="How near the windows must be; else measured again.")
    ] = "5%",
    percentiles: Annotated[str, typer.Option(help="Shown.")] = "50,90,95,99",
    dtype: Annotated[
        ExportDtype, typer.Option(help="Of the export that is made of a run or a model name.")
    ] = ExportDtype.fp32,
    peers: Annotated[
        str, typer.Option(help="Of plain, compiled, cls, int8, openvino; or all, none.")
    ] = "plain,cls,int8,openvino",
    images: Annotated[
        Path | None, typer.Option(help="Photos of yours in place of made-up ones.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Of one operator on a CPU. [default: one a core]", min=1)
    ] = None,
    stages: Annotated[bool, typer.Option(help="Time each stage by itself too.")] = True,
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="Write a .json, .md and .html report here.")
    ] = None,
    baseline: Annotated[Path | None, typer.Option(help="Earlier .json to compare with.")] = None,
    max_regression: Annotated[
        str, typer.Option(help="How much slower than the baseline is allowed.")
    ] = "10%",
    slo: Annotated[
        str | None, typer.Option(help="Limits such as p99=10ms, from pixels to logits.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Time a model from pixels and from JPEG to logits, with its stages and its peers.

    Exit 5 where a peer gives other answers, 6 where --slo or --max-regression is missed.

    Example: microclip-deploy bench exports/birds --batches 1,8 --slo p99=50ms
    """
    require("onnxruntime", "cpu")
    from microclip_deploy.bench import option_text
    from microclip_deploy.bench.latency import limits
    from microclip_deploy.bench.latency.contestants import BACKENDS, PEERS
    from microclip_deploy.bench.latency.page import write_report
    from microclip_deploy.bench.latency.report import read_report
    from microclip_deploy.bench.latency.run import LatencyRequest, run_latency_bench
    from microclip_deploy.bench.latency.windows import Plan

    plan = Plan(
        option_text.parse_seconds("--warmup", warmup),
        option_text.parse_seconds("--duration", duration),
        option_text.parse_share("--until-stable", until_stable),
    )
    wanted = None if slo is None else option_text.parse_limits("--slo", slo)
    allowed = option_text.parse_share("--max-regression", max_regression)
    request = LatencyRequest(
        target=target,
        backends=option_text.parse_names("--backends", backends, BACKENDS),
        device=option_text.parse_device("--device", device),
        batches=option_text.parse_numbers("--batches", batches),
        concurrency=option_text.parse_numbers("--concurrency", concurrency),
        plan=plan,
        percentiles=option_text.parse_percentiles("--percentiles", percentiles),
        baseline=None if baseline is None else read_report(baseline),
        precision=dtype.value,
        peers=option_text.parse_names("--peers", peers, PEERS),
        images=images,
        threads=threads,
        with_stages=stages,
    )
    if out_dir is not None:  # before minutes of measuring
        make_directory(out_dir)
    report = run_latency_bench(request, notes)
    _show(report, as_json=as_json)
    if out_dir is not None:
        notes.print(f"wrote {write_report(report, out_dir)}", markup=False)
    if request.baseline is not None:
        for line in limits.require_no_regression(report, request.baseline, allowed):
            notes.print(line, markup=False)
    if wanted is not None:
        limits.require_slo(report, wanted)


def _show(report: "Report", *, as_json: bool) -> None:
    from microclip_deploy.bench.latency.tables import as_json as plain_values
    from microclip_deploy.bench.latency.tables import plain

    shown = notes if as_json else out
    shown.print(plain(report), markup=False, highlight=False, soft_wrap=True)
    if as_json:
        print_json(plain_values(report, samples=False))


@app.command("compare")
def bench_compare(
    before: Annotated[Path, typer.Argument(help=".json of an earlier `bench TARGET --out`.")],
    after: Annotated[Path, typer.Argument(help="A later one.")],
) -> None:
    """Compare two result files: ratios, times, and what differs between the machines."""
    from microclip_deploy.bench.latency.limits import comparison
    from microclip_deploy.bench.latency.report import read_report

    shown = comparison(read_report(before), read_report(after))
    out.print(shown, markup=False, highlight=False, soft_wrap=True)


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
    from microclip_deploy.bench.kernel import report, run
    from microclip_deploy.bench.option_text import parse_numbers

    measured = run.run_kernel_bench(
        parse_numbers("--tokens", tokens),
        parse_numbers("--batches", batches),
        notes,
        dtype=dtype,
        device=device,
    )
    if out_dir is not None:
        notes.print(f"wrote {report.write_report(measured, out_dir)}", markup=False)
    shown = notes if as_json else out
    shown.print(report.plain(measured), markup=False, soft_wrap=True)
    print_json(measured.model_dump())
    report.require_right(measured)


@app.command("adapt")
def bench_adapt(
    geometry: Annotated[str, typer.Option(help="open_clip model names.")] = "ViT-B-32",
    batch_size: Annotated[int, typer.Option(help="Images a step.", min=2)] = 16,
    crops: Annotated[int, typer.Option(help="Of the multi-view prior.", min=1, max=64)] = 8,
    repeats: Annotated[int, typer.Option(help="Timed steps a side.", min=1)] = 5,
    workers: Annotated[int, typer.Option(help="Image loading processes.", min=0)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "cpu",
    plain_peer: Annotated[
        bool, typer.Option("--plain/--no-plain", help="Time the plain algorithm too.")
    ] = True,
    images: Annotated[
        Path | None, typer.Option(help="Photos of yours in place of made-up ones.")
    ] = None,
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="Write a .json and .md report here.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Time a training step against the plain algorithm, and the loading of photos by itself.

    Example: microclip-deploy bench adapt --images photos/ --workers 4
    """
    require("torch", "adapt")
    from microclip_deploy.bench.training import report, run

    if out_dir is not None:  # before minutes of measuring
        make_directory(out_dir)
    measured = run.run_adaptation_bench(
        [name.strip() for name in geometry.split(",")],
        notes,
        batch=batch_size,
        crops=crops,
        repeats=repeats,
        workers=workers,
        device=device,
        plain=plain_peer,
        images=images,
    )
    shown = notes if as_json else out
    shown.print(report.plain(measured), markup=False, highlight=False, soft_wrap=True)
    if out_dir is not None:
        notes.print(f"wrote {report.write_report(measured, out_dir)}", markup=False)
    if as_json:
        print_json(measured.model_dump())
