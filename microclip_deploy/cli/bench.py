"""`microclip-deploy bench`: measurements a user can repeat."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from microclip_deploy.artifact import make_directory
from microclip_deploy.bench import option_text
from microclip_deploy.cli import next_steps
from microclip_deploy.cli.help import SectionedCommand, TargetGroup
from microclip_deploy.cli.options import (
    OUTPUT,
    AsJson,
    BitDepth,
    ExportDtype,
    MaxPixels,
    Pretrained,
    option,
)
from microclip_deploy.console import notes, out, print_json
from microclip_deploy.errors import require

if TYPE_CHECKING:
    from microclip_deploy.bench.latency.report import Report

_MODEL = "model"
"""Name of the command that a target stands for."""


class _Bench(TargetGroup):
    target_command = _MODEL


app = typer.Typer(
    help="Measure on this machine: TARGET (a run, an export, or a model name) or what is below.",
    cls=_Bench,
    no_args_is_help=True,
    subcommand_metavar="TARGET [OPTIONS] | COMMAND [ARGS]...",
    rich_markup_mode=None,
)
command = partial(app.command, cls=SectionedCommand)


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


TIMED, HOW_LONG, LIMITS = "What is timed", "How long", "Limits, exit 6 where they are missed"
"""Sections of --help."""


Target = Annotated[
    str,
    typer.Argument(
        metavar="TARGET",
        help="Run, export, or open_clip model name for random weights.",
        show_default=False,
    ),
]
Backends = Annotated[
    Any,
    option(
        TIMED, "NAMES", "Of onnx, torch, trt; all: those that the target has.", parser=_backends
    ),
]
Peers = Annotated[
    Any,
    option(TIMED, "NAMES", "Of plain, compiled, cls, int8, openvino; or all, none.", parser=_peers),
]
Device = Annotated[
    Any, option(TIMED, "DEVICE", "cpu, cuda or cuda:N.", parser=option_text.parse_device)
]
Batches = Annotated[
    Any, option(TIMED, "NUMBERS", "Images a request.", parser=option_text.parse_numbers)
]
Concurrency = Annotated[
    Any, option(TIMED, "NUMBERS", "Requests under way at once.", parser=option_text.parse_numbers)
]
Warmup = Annotated[
    Any, option(HOW_LONG, "TIME", "Before each measurement.", parser=option_text.parse_seconds)
]
Duration = Annotated[
    Any,
    option(
        HOW_LONG, "TIME", "Measured at least, in three windows.", parser=option_text.parse_seconds
    ),
]
UntilStable = Annotated[
    Any,
    option(
        HOW_LONG,
        "SHARE",
        "How near the windows must be; else measured again.",
        parser=option_text.parse_share,
    ),
]
Percentiles = Annotated[
    Any, option(OUTPUT, "NUMBERS", "Those that are shown.", parser=option_text.parse_percentiles)
]
MadeDtype = Annotated[
    ExportDtype, option(TIMED, None, "Of the export that is made of a run or a model name.")
]
Photos = Annotated[
    Path | None, option(TIMED, "IMAGES", "Photos of yours in place of made-up ones.")
]
Threads = Annotated[
    int | None, option(TIMED, "N", "Of one operator on a CPU. [default: one a core]", min=1)
]
Stages = Annotated[bool, option(TIMED, None, "Time each stage by itself too.")]
ReportDirectory = Annotated[
    Path | None, option(OUTPUT, "DIR", "Write a .json, .md and .html report here.", "--out")
]
Baseline = Annotated[Path | None, option(LIMITS, "FILE", "Earlier .json to compare with.")]
MaxRegression = Annotated[
    Any,
    option(
        LIMITS,
        "SHARE",
        "How much slower than the baseline is allowed.",
        parser=option_text.parse_share,
    ),
]
Slo = Annotated[
    Any,
    option(
        LIMITS,
        "LIMITS",
        "Such as p99=10ms, from pixels to logits.",
        parser=option_text.parse_limits,
    ),
]


@command(_MODEL, hidden=True)
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
    max_pixels: MaxPixels = None,
    bit_depth: BitDepth = None,
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
        max_pixels=max_pixels,
        bit_depth=bit_depth,
        with_stages=stages,
        baseline=earlier,
    )
    report = replace(measured, percentiles=list(percentiles))
    written = _show(report, out_dir, as_json=as_json)
    if earlier is not None:
        for line in limits.require_no_regression(report, earlier, max_regression):
            notes.print(line, markup=False)
    limits.require_slo(report, slo or {})
    if written is None:
        keep: next_steps.Step = (
            ("bench", target, "--out", "reports"),
            "keep the result, to compare another with",
        )
    else:
        again = ("bench", target, "--baseline", written, "--max-regression", "10%")
        keep = (again, "after a change: fail where it became slower")
    next_steps.tell(notes, keep)


def _require_packages(out_dir: Path | None) -> None:
    """Make sure, before minutes of measuring, that they can be measured and written."""
    require("onnxruntime", "cpu")
    for package in ("cpuinfo", "psutil", "pynvml"):
        require(package, "bench")
    if out_dir is not None:
        require("jinja2", "bench")
        require("matplotlib", "bench")
        make_directory(out_dir)


def _show(report: "Report", out_dir: Path | None, *, as_json: bool) -> Path | None:
    """Print a report, and write it if there is a folder for it; return the JSON's path."""
    from microclip_deploy.bench.latency import tables

    shown = notes if as_json else out
    shown.print(tables.plain(report), markup=False, highlight=False, soft_wrap=True)
    if as_json:
        print_json(tables.as_json(report, samples=False))
    if out_dir is None:
        return None
    from microclip_deploy.bench.latency.page import write_report

    written = write_report(report, out_dir)
    notes.print(f"wrote {written}", markup=False)
    return written


@command("compare")
def bench_compare(
    before: Annotated[Path, typer.Argument(help=".json of an earlier `bench TARGET --out`.")],
    after: Annotated[Path, typer.Argument(help="A later one.")],
) -> None:
    """Compare two result files: ratios, times, and what differs between the machines."""
    from microclip_deploy.bench.latency.limits import comparison
    from microclip_deploy.bench.latency.report import read_report

    shown = comparison(read_report(before), read_report(after))
    out.print(shown, markup=False, highlight=False, soft_wrap=True)


@command("ncut")
def bench_ncut(
    batches: Annotated[
        Any, option(TIMED, "NUMBERS", "Images a batch.", parser=option_text.parse_numbers)
    ] = "1,32,256",
    tokens: Annotated[
        Any, option(TIMED, "NUMBERS", "Patch tokens an image.", parser=option_text.parse_numbers)
    ] = "49,196,256,576",
    dtype: Annotated[
        str, option(TIMED, "DTYPE", "Of the tokens: float16, bfloat16 or float32.")
    ] = "float16",
    device: Annotated[
        str, option(TIMED, "DEVICE", "cuda, or cpu to measure only the solvers of a CPU.")
    ] = "cuda",
    out_dir: Annotated[
        Path | None,
        option(OUTPUT, "DIR", "Write DATE-GPU-kernel.json, .md and .svg here.", "--out"),
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
    next_steps.tell(notes, next_steps.bench("TARGET", "--batches", "1,8"))


@command("adapt")
def bench_adapt(
    geometry: Annotated[str, option(TIMED, "NAMES", "open_clip model names.")] = "ViT-B-32",
    batch_size: Annotated[int, option(TIMED, "N", "Images a step.", min=2)] = 16,
    crops: Annotated[int, option(TIMED, "N", "Of the multi-view prior.", min=1, max=64)] = 8,
    repeats: Annotated[int, option(HOW_LONG, "N", "Timed steps a side.", min=1)] = 5,
    workers: Annotated[int, option(TIMED, "N", "Image loading processes.", min=0)] = 0,
    device: Annotated[str, option(TIMED, "DEVICE", "auto, cpu or cuda.")] = "cpu",
    views_there: Annotated[
        bool, option(TIMED, None, "Cut views on --device: views.device=model.", "--views-there")
    ] = False,
    plain_peer: Annotated[
        bool, option(TIMED, None, "Time the plain algorithm too.", "--plain/--no-plain")
    ] = True,
    images: Photos = None,
    max_pixels: MaxPixels = None,
    bit_depth: BitDepth = None,
    out_dir: Annotated[
        Path | None, option(OUTPUT, "DIR", "Write a .json and .md report here.", "--out")
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
        max_pixels=max_pixels,
        bit_depth=bit_depth,
        views_there=views_there,
    )
    shown = notes if as_json else out
    shown.print(report.plain(measured), markup=False, highlight=False, soft_wrap=True)
    if out_dir is not None:
        notes.print(f"wrote {report.write_report(measured, out_dir)}", markup=False)
    if as_json:
        print_json(measured.model_dump())
    next_steps.tell(notes, next_steps.adapt("--workers", str(workers)))


@command("saliency")
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
        Path | None, option(TIMED, "FOLDER|LIST", "Photos with transparency.")
    ] = None,
    backgrounds: Annotated[
        Path | None, option(TIMED, "FOLDER|LIST", "Photos that they are pasted on.")
    ] = None,
    photos: Annotated[
        Path | None, option(TIMED, "FOLDER|LIST", "Ordinary photos, without a true mask.")
    ] = None,
    sizes: Annotated[
        Any,
        option(
            TIMED, "NUMBERS", "Of the ordinary photos, pixels.", parser=option_text.parse_numbers
        ),
    ] = "112,224,336",
    out_dir: Annotated[
        Path | None,
        option(OUTPUT, "DIR", "Write DATE-cpu-saliency.json, .md, .svg and .jpg here.", "--out"),
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
    next_steps.tell(notes, next_steps.adapt("--recipe", "object"))
