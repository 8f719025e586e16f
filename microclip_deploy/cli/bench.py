"""`microclip-deploy bench`: measurements a user can repeat."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from microclip_deploy.artifact import make_directory
from microclip_deploy.bench import option_text
from microclip_deploy.cli.options import AsJson, ExportDtype, Pretrained
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


def _backends(text: str) -> tuple[str, ...]:
    from microclip_deploy.bench.latency.contestants import BACKENDS

    return option_text.parse_names(text, BACKENDS)


def _peers(text: str) -> tuple[str, ...]:
    from microclip_deploy.bench.latency.contestants import PEERS

    return option_text.parse_names(text, PEERS)


def _parsed(parser: Callable[[str], object], metavar: str, text: str) -> Any:
    """Return an option whose text a parser reads; its value has the parser's type."""
    return typer.Option(parser=parser, metavar=metavar, help=text)


Target = Annotated[
    str,
    typer.Argument(
        metavar="TARGET",
        help="Run, export, or open_clip model name for random weights.",
        show_default=False,
    ),
]
Backends = Annotated[
    Any, _parsed(_backends, "NAMES", "Of onnx, torch, trt; all: those that the target has.")
]
Peers = Annotated[
    Any, _parsed(_peers, "NAMES", "Of plain, compiled, cls, int8, openvino; or all, none.")
]
Device = Annotated[Any, _parsed(option_text.parse_device, "DEVICE", "cpu, cuda or cuda:N.")]
Batches = Annotated[Any, _parsed(option_text.parse_numbers, "NUMBERS", "Images a request.")]
Concurrency = Annotated[
    Any, _parsed(option_text.parse_numbers, "NUMBERS", "Requests under way at once.")
]
Warmup = Annotated[Any, _parsed(option_text.parse_seconds, "TIME", "Before each measurement.")]
Duration = Annotated[
    Any, _parsed(option_text.parse_seconds, "TIME", "Measured at least, in three windows.")
]
UntilStable = Annotated[
    Any,
    _parsed(option_text.parse_share, "SHARE", "How near the windows must be; else measured again."),
]
Percentiles = Annotated[Any, _parsed(option_text.parse_percentiles, "NUMBERS", "Shown.")]
MadeDtype = Annotated[
    ExportDtype, typer.Option(help="Of the export that is made of a run or a model name.")
]
Photos = Annotated[Path | None, typer.Option(help="Photos of yours in place of made-up ones.")]
Threads = Annotated[
    int | None, typer.Option(help="Of one operator on a CPU. [default: one a core]", min=1)
]
Stages = Annotated[bool, typer.Option(help="Time each stage by itself too.")]
ReportDirectory = Annotated[
    Path | None, typer.Option("--out", help="Write a .json, .md and .html report here.")
]
Baseline = Annotated[Path | None, typer.Option(help="Earlier .json to compare with.")]
MaxRegression = Annotated[
    Any, _parsed(option_text.parse_share, "SHARE", "How much slower than the baseline is allowed.")
]
Slo = Annotated[
    Any, _parsed(option_text.parse_limits, "LIMITS", "Such as p99=10ms, from pixels to logits.")
]


@app.command(_MODEL)
def bench_model(
    target: Target,
    backends: Backends = "all",
    device: Device = "cpu",
    batches: Batches = "1,8,32",
    concurrency: Concurrency = "1",
    warmup: Warmup = "2s",
    duration: Duration = "10s",
    until_stable: UntilStable = "5%",
    percentiles: Percentiles = "50,90,95,99",
    dtype: MadeDtype = ExportDtype.fp32,
    peers: Peers = "plain,cls,int8,openvino",
    images: Photos = None,
    threads: Threads = None,
    stages: Stages = True,
    out_dir: ReportDirectory = None,
    baseline: Baseline = None,
    max_regression: MaxRegression = "10%",
    slo: Slo = None,
    as_json: AsJson = False,
) -> None:
    """Time a model from pixels and from JPEG to logits, with its stages and its peers.

    Exit 5 where a peer gives other answers, 6 where --slo or --max-regression is missed.

    Example: microclip-deploy bench exports/birds --batches 1,8 --slo p99=50ms
    """
    _require_packages(out_dir)
    from microclip_deploy.bench.latency import limits
    from microclip_deploy.bench.latency.report import read_report
    from microclip_deploy.bench.latency.run import run_latency_bench
    from microclip_deploy.bench.latency.windows import Plan

    earlier = None if baseline is None else read_report(baseline)
    measured = run_latency_bench(
        target,
        notes,
        backends=backends,
        peers=peers,
        batches=batches,
        concurrency=concurrency,
        plan=Plan(warmup, duration, until_stable),
        device=device,
        precision=dtype.value,
        threads=threads,
        images=images,
        with_stages=stages,
        baseline=earlier,
    )
    report = replace(measured, percentiles=list(percentiles))
    _show(report, out_dir, as_json=as_json)
    if earlier is not None:
        for line in limits.require_no_regression(report, earlier, max_regression):
            notes.print(line, markup=False)
    limits.require_slo(report, slo or {})


def _require_packages(out_dir: Path | None) -> None:
    """Make sure, before minutes of measuring, that they can be measured and written."""
    require("onnxruntime", "cpu")
    for package in ("cpuinfo", "psutil", "pynvml"):
        require(package, "bench")
    if out_dir is not None:
        require("jinja2", "bench")
        require("matplotlib", "bench")
        make_directory(out_dir)


def _show(report: "Report", out_dir: Path | None, *, as_json: bool) -> None:
    from microclip_deploy.bench.latency import tables

    shown = notes if as_json else out
    shown.print(tables.plain(report), markup=False, highlight=False, soft_wrap=True)
    if as_json:
        print_json(tables.as_json(report, samples=False))
    if out_dir is not None:
        from microclip_deploy.bench.latency.page import write_report

        notes.print(f"wrote {write_report(report, out_dir)}", markup=False)


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
    batches: Annotated[
        Any, _parsed(option_text.parse_numbers, "NUMBERS", "Images a batch.")
    ] = "1,32,256",
    tokens: Annotated[
        Any, _parsed(option_text.parse_numbers, "NUMBERS", "Patch tokens an image.")
    ] = "49,196,256,576",
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
    require("psutil", "bench")
    from microclip_deploy.bench.kernel import report, run

    measured = run.run_kernel_bench(
        tokens,
        batches,
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
    require("psutil", "bench")
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


@app.command("saliency")
def bench_saliency(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="open_clip name, hf-hub:ORG/REPO, local-dir:PATH, or demo.",
            show_default=False,
        ),
    ],
    pretrained: Pretrained = None,
    cutouts: Annotated[
        Path | None, typer.Option(help="Photos with transparency: folder or list.")
    ] = None,
    backgrounds: Annotated[
        Path | None, typer.Option(help="Photos that they are pasted on: folder or list.")
    ] = None,
    photos: Annotated[
        Path | None, typer.Option(help="Ordinary photos, without a true mask: folder or list.")
    ] = None,
    sizes: Annotated[
        Any, _parsed(option_text.parse_numbers, "NUMBERS", "Of the ordinary photos, pixels.")
    ] = "112,224,336",
    out_dir: Annotated[
        Path | None,
        typer.Option("--out", help="Write DATE-cpu-saliency.json, .md, .svg and .jpg here."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Hold every rule of the cut against true masks: cut-outs pasted on photos, by object size.

    Example: microclip-deploy bench saliency ViT-B-32 --pretrained openai --cutouts stamps.txt
    --backgrounds /usr/share/backgrounds/mate/nature
    """
    require("torch", "adapt")
    require("psutil", "bench")
    from microclip_deploy.bench.saliency import report, run
    from microclip_deploy.model.clip import BackboneSpec

    if out_dir is not None:  # before minutes of measuring
        require("matplotlib", "bench")
        make_directory(out_dir)
    measured = run.run_saliency_bench(
        BackboneSpec(model=model, pretrained=pretrained),
        notes,
        cutouts=cutouts,
        backgrounds=backgrounds,
        photos=photos,
        sizes=sizes,
    )
    if out_dir is not None:
        path = report.write_report(measured.report, measured.pictures, out_dir)
        notes.print(f"wrote {path}", markup=False)
    shown = notes if as_json else out
    shown.print(report.plain(measured.report), markup=False, highlight=False, soft_wrap=True)
    if as_json:
        print_json(measured.report.model_dump())
