"""The command line: parse, call one library function, print.

Heavy libraries are imported inside the commands, so that --help and version are instant.
"""

import os
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import version as package_version
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from microclip_deploy.cli.bench import app as bench_app
from microclip_deploy.cli.classes import app as classes_app
from microclip_deploy.cli.export import export, require_exporter, verify
from microclip_deploy.cli.options import (
    Adapted,
    AsJson,
    BatchSize,
    BitDepth,
    Descriptions,
    Device,
    Images,
    ImagesAgain,
    MaxBad,
    MaxPixels,
    Model,
    Out,
    OutputFormat,
    Pretrained,
    ServingDevice,
    Sets,
    Templates,
    Threads,
    ValDir,
)
from microclip_deploy.console import ReaderGone, checked_stdout, notes, out, print_json
from microclip_deploy.errors import (
    EXTRA_OF,
    Interrupted,
    MicroclipError,
    UsageError,
    missing_package,
    require,
)

EPILOG = (
    "Exit codes: 0 ok, 1 internal error, 2 usage, 3 bad data, 4 environment, 5 verification "
    "failed, 6 limit missed, 130/143 interrupted (a running adaptation saves its state first), "
    "141 the reader of stdout went away."
)

app = typer.Typer(
    name="microclip-deploy",
    help="Adapt a CLIP ViT to your unlabeled photos, evaluate it, and use it.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(classes_app, name="classes")
app.add_typer(bench_app, name="bench")


@app.command()
def adapt(
    out_dir: Out,
    images: Images = None,
    images_again: ImagesAgain = None,
    classes: Annotated[Path | None, typer.Option(help="Class names, one a line.")] = None,
    descriptions: Descriptions = None,
    template: Templates = None,
    model: Model = None,
    pretrained: Pretrained = None,
    recipe: Annotated[str | None, typer.Option(help="Shipped recipe or TOML file.")] = None,
    sets: Sets = None,
    epochs: Annotated[int | None, typer.Option(help="As --set adapt.epochs=N.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="As --set adapt.batch_size=N.")] = None,
    lr: Annotated[float | None, typer.Option(help="As --set adapt.lr=X.")] = None,
    seed: Annotated[int | None, typer.Option(help="As --set adapt.seed=N.")] = None,
    val_dir: ValDir = None,
    device: Device = "auto",
    workers: Annotated[int | None, typer.Option(help="Image loading processes.", min=0)] = None,
    max_bad_images: MaxBad = "1%",
    max_pixels: MaxPixels = None,
    bit_depth: BitDepth = None,
    save_every: Annotated[int, typer.Option(help="Iterations between saved states.", min=1)] = 200,
    resume: Annotated[bool, typer.Option(help="Continue the run in --out.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace the run in --out.")] = False,
    as_json: AsJson = False,
) -> None:
    """Adapt a CLIP ViT to unlabeled images.

    Example: microclip-deploy adapt photos/ --classes classes.txt -o runs/birds
    """
    require("torch", "adapt")
    from microclip_deploy.cli.adapt import Asked, run_adapt

    if images and images_again:
        raise UsageError("adapt: expected images once, found IMAGES and --images; leave one out")
    shorthand = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "seed": seed}
    photos = {"max_pixels": max_pixels, "bit_depth": bit_depth}
    overrides = (
        *(sets or ()),
        *_overrides("adapt", shorthand),
        *_overrides("photos", photos),
    )
    texts = (classes, descriptions, tuple(template or ()))
    summary = run_adapt(
        out_dir,
        Asked(images or images_again, *texts, model, pretrained, recipe, overrides, val_dir),
        notes,
        device=device,
        workers=workers,
        max_bad=max_bad_images,
        save_every=save_every,
        resume=resume,
        overwrite=overwrite,
    )
    if as_json:
        print_json(summary)


@app.command()
def evaluate(
    directory: Adapted,
    data: Annotated[
        Path, typer.Argument(help="Labelled images: CLASS/image files, or a .csv list.")
    ],
    device: ServingDevice = "auto",
    batch_size: BatchSize = 64,
    threads: Threads = None,
    zero_shot: Annotated[
        bool, typer.Option(help="Also measure the model before adaptation; runs only.")
    ] = True,
    max_bad_images: MaxBad = "1%",
    max_pixels: MaxPixels = None,
    bit_depth: BitDepth = None,
    per_class: Annotated[bool, typer.Option("--per-class", help="Print every class.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure accuracy on labelled images: fused, [CLS], [FG], and zero-shot.

    An export holds no model before adaptation, and is measured without zero-shot. Only a run
    needs PyTorch; it keeps the outcome in evaluation.json and in its report.
    """
    from microclip_deploy.cli import commands

    result = commands.run_evaluate(
        directory,
        data,
        notes,
        device=device,
        batch_size=batch_size,
        zero_shot=zero_shot,
        max_bad=max_bad_images,
        max_pixels=max_pixels,
        bit_depth=bit_depth,
        threads=threads,
    )
    if as_json:
        print_json(result.to_json())
    else:
        for table in result.tables(per_class=per_class):
            out.print(table)


@app.command()
def predict(
    directory: Adapted,
    images: Annotated[
        list[Path],
        typer.Argument(help="Images, folders or lists.", readable=False),  # they get a row
    ],
    top_k: Annotated[int, typer.Option(help="Classes to show.", min=1)] = 5,
    output_format: Annotated[
        OutputFormat, typer.Option("--format", help="How to print.")
    ] = OutputFormat.table,
    overlay: Annotated[
        Path | None, typer.Option(help="Write saliency overlays (PNG) into this folder.")
    ] = None,
    device: ServingDevice = "auto",
    batch_size: BatchSize = 64,
    max_pixels: MaxPixels = None,
    bit_depth: BitDepth = None,
    threads: Threads = None,
) -> None:
    """Classify images with an adapted model; only a run needs PyTorch, an export does not."""
    from microclip_deploy.cli import commands

    commands.run_predict(
        directory,
        images,
        out,
        notes,
        top_k=top_k,
        output_format=output_format.value,
        overlay=overlay,
        device=device,
        batch_size=batch_size,
        max_pixels=max_pixels,
        bit_depth=bit_depth,
        threads=threads,
    )


app.command()(export)
app.command()(verify)


@app.command()
def demo(
    out_dir: Annotated[Path, typer.Option("-o", "--out", help="Folder for images and run.")] = Path(
        "runs/demo"
    ),
    write_images: Annotated[
        Path | None, typer.Option(help="Only write the benchmark's images into this folder.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the adaptation.")] = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Run the embedded benchmark: adapt, evaluate, predict, export, verify. Three minutes."""
    require_exporter()
    from microclip_deploy.cli import demo
    from microclip_deploy.demo.folders import write_benchmark

    if write_images is not None:
        write_benchmark(write_images, notes)
        return
    result = demo.run(
        out_dir, seed=seed, device=device, notes=notes, printed=notes if as_json else out
    )
    if as_json:
        print_json(result.to_json())
    else:
        for table in result.tables():
            out.print(table)


@app.command()
def doctor(
    needs: Annotated[
        list[str] | None, typer.Option("--require", help="gpu, trt or cupy; exit 4 when missing.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show versions and devices, what will be used for what, and how to fix what is wrong."""
    from microclip_deploy.cli import doctor as diagnosis

    found = diagnosis.diagnose()
    if as_json:
        print_json(found.to_json())
    else:
        for table in found.tables():
            out.print(table)
    diagnosis.require(found, {part for need in needs or () for part in need.split(",")})


@app.command()
def recipes(as_json: AsJson = False) -> None:
    """List the shipped recipes."""
    from microclip_deploy.config import shipped_recipes

    if as_json:
        print_json(shipped_recipes())
        return
    for name in shipped_recipes():
        out.print(name)


@app.command()
def version(as_json: AsJson = False) -> None:
    """Print the version."""
    number = package_version("microclip-deploy")
    if as_json:
        print_json({"microclip-deploy": number, "python": sys.version.split()[0]})
    else:
        out.print(number)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; our errors are printed without a traceback."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _interrupt)
    try:
        with checked_stdout():
            app(args=arguments)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except ReaderGone as gone:
        return gone.exit_code
    except MicroclipError as error:
        return _fail(error)
    except Exception as error:
        return _fail(_explained(error))
    return 0


def _interrupt(signum: int, _frame: FrameType | None) -> None:
    """Leave at once; the adaptation loop replaces this while it has something to save."""
    raise Interrupted("interrupted; what was saved before is complete", signum)


def _fail(error: MicroclipError) -> int:
    if os.environ.get("MICROCLIP_TRACEBACK") == "1":
        notes.print_exception()
    notes.print(f"error: {error}", markup=False)
    return error.exit_code


def _explained(error: Exception) -> MicroclipError:
    """Turn any other exception into an error of ours: a missing package, or a mistake we made."""
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        if package in EXTRA_OF:
            return missing_package(package, EXTRA_OF[package])
    return MicroclipError(
        f"internal error: {type(error).__name__}: {error}; please report it with the output of the "
        "same command under MICROCLIP_TRACEBACK=1"
    )


def _overrides(section: str, shorthand: dict[str, Any]) -> list[str]:
    return [f"{section}.{name}={value}" for name, value in shorthand.items() if value is not None]


def run_main() -> None:
    """Entry point of the console script."""
    sys.exit(main())
