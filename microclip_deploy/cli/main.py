"""The command line: parse, call one library function, print.

Heavy libraries are imported inside the commands, so that --help and version are instant.
"""

import os
import signal
import sys
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version as package_version
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from microclip_deploy.cli import next_steps
from microclip_deploy.cli.audit import audit
from microclip_deploy.cli.bench_serving import app as bench_app
from microclip_deploy.cli.calibrate import calibrate
from microclip_deploy.cli.classes import app as classes_app
from microclip_deploy.cli.describe import app as describe_app
from microclip_deploy.cli.doctor_text import doctor
from microclip_deploy.cli.export import export, require_exporter, verify
from microclip_deploy.cli.help import SectionedCommand, SectionedGroup
from microclip_deploy.cli.options import (
    MACHINE,
    METHOD,
    OUTPUT,
    PHOTOS,
    Adapted,
    AsJson,
    BatchSize,
    BenchmarkName,
    BitDepth,
    Descriptions,
    Device,
    Images,
    ImagesAgain,
    Joint,
    MaxBad,
    MaxPixels,
    Model,
    Out,
    Pretrained,
    Prior,
    ServingDevice,
    Sets,
    Templates,
    Threads,
    ValDir,
    option,
    recipe_names,
)
from microclip_deploy.cli.pack import pack
from microclip_deploy.cli.predict import predict
from microclip_deploy.cli.recipes import recipes
from microclip_deploy.cli.serve import serve
from microclip_deploy.console import (
    ReaderGone,
    checked_stdout,
    notes,
    out,
    print_json,
    tolerant_stderr,
    waiting,
)
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


USE, DEPLOY, LOOK = "From photos to answers", "To a server", "Try and look around"
"""Sections of the commands."""

app = typer.Typer(
    name="microclip-deploy",
    cls=SectionedGroup,
    help="Adapt a CLIP ViT to your unlabeled photos, evaluate it, and use it.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
use, deploy, look = (
    partial(app.command, cls=SectionedCommand, rich_help_panel=section)
    for section in (USE, DEPLOY, LOOK)
)


def _print_version(asked: bool) -> None:
    if asked:
        out.print(package_version("microclip-deploy"))
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    """Take what belongs to no command."""


app.add_typer(describe_app, name="describe", rich_help_panel=USE)


@use()
def adapt(
    out_dir: Out,
    images: Images = None,
    images_again: ImagesAgain = None,
    classes: Annotated[Path | None, option(PHOTOS, "FILE", "Class names, one a line.")] = None,
    descriptions: Descriptions = None,
    template: Templates = None,
    model: Model = None,
    pretrained: Pretrained = None,
    recipe: Annotated[
        str | None,
        option(
            METHOD,
            "NAME|FILE",
            "Shipped recipe (see `microclip-deploy recipes`) or TOML file. [default: default]",
            autocompletion=recipe_names,
        ),
    ] = None,
    sets: Sets = None,
    epochs: Annotated[int | None, option(METHOD, "N", "As --set adapt.epochs=N.")] = None,
    batch_size: Annotated[
        str | None,
        option(
            METHOD,
            "N|auto",
            "As --set adapt.batch_size=N; auto: the recipe's, in parts if need be.",
        ),
    ] = None,
    lr: Annotated[float | None, option(METHOD, "X", "As --set adapt.lr=X.")] = None,
    seed: Annotated[int | None, option(METHOD, "N", "As --set adapt.seed=N.")] = None,
    val_dir: ValDir = None,
    device: Device = "auto",
    workers: Annotated[int | None, option(MACHINE, "N", "Image loading processes.", min=0)] = None,
    max_bad_images: MaxBad = "1%",
    max_pixels: MaxPixels = None,
    bit_depth: BitDepth = None,
    save_every: Annotated[
        int, option(OUTPUT, "N", "Iterations between saved states.", min=1)
    ] = 200,
    resume: Annotated[
        bool, option(OUTPUT, None, "Continue the run in --out.", show_default=False)
    ] = False,
    overwrite: Annotated[
        bool, option(OUTPUT, None, "Replace the run in --out.", show_default=False)
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Adapt a CLIP ViT to unlabeled images.

    Example: microclip-deploy adapt photos/ --classes classes.txt -o runs/birds
    """
    with waiting(notes, "loading PyTorch"):
        require("torch", "adapt")
        from microclip_deploy.cli.adapt import Asked, run_adapt

    if images and images_again:
        raise UsageError("adapt: expected images once, found IMAGES and --images; leave one out")
    size = None if batch_size == "auto" else batch_size
    shorthand = {"epochs": epochs, "batch_size": size, "lr": lr, "seed": seed}
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
    if not summary:  # a process that helped the first one
        return
    if as_json:
        print_json(summary)
    next_steps.tell(
        notes,
        next_steps.predict(out_dir, "--top-k", "3"),
        next_steps.evaluate(out_dir),
        next_steps.audit(out_dir),
        next_steps.export(out_dir),
    )


@use()
def evaluate(
    directory: Adapted,
    data: Annotated[
        Path,
        typer.Argument(
            metavar="LABELLED", help="Labelled images: CLASS/image files, or a .csv list."
        ),
    ],
    limit: Annotated[
        int | None,
        option(
            PHOTOS,
            "N",
            "Measure N images only, spread over all; a run keeps no such evaluation.",
            min=1,
        ),
    ] = None,
    max_bad_images: MaxBad = "1%",
    masks: Annotated[
        Path | None,
        option(PHOTOS, "DIR", "True masks, named as the images: how much masks overlap with them."),
    ] = None,
    zero_shot: Annotated[
        bool, option(METHOD, None, "Also measure the model before adaptation; runs only.")
    ] = True,
    controls: Annotated[
        bool,
        option(
            METHOD,
            None,
            "Also measure names and random words in place of the descriptions; runs only.",
            "--controls",
        ),
    ] = False,
    prior: Prior = "folder",
    unknown: Annotated[
        Path | None,
        option(PHOTOS, "IMAGES", "Photos of no class: how many of them are called unknown."),
    ] = None,
    joint: Joint = False,
    device: ServingDevice = "auto",
    batch_size: BatchSize = 64,
    max_pixels: MaxPixels = None,
    bit_depth: BitDepth = None,
    threads: Threads = None,
    per_class: Annotated[bool, option(OUTPUT, None, "Print every class.", "--per-class")] = False,
    out_file: Annotated[
        Path | None,
        option(OUTPUT, "FILE.csv", "Also write what was said about each image.", "--out"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure accuracy on labelled images: fused, [CLS], [FG], and zero-shot.

    An export holds no model before adaptation, and is measured without zero-shot. Only a run
    needs PyTorch; it keeps the outcome in evaluation.json and in its report.

    Example: microclip-deploy evaluate runs/birds labelled/ --out answers.csv
    """
    from microclip_deploy.cli import commands

    result = commands.run_evaluate(
        directory,
        data,
        notes,
        device=device,
        batch_size=batch_size,
        zero_shot=zero_shot,
        limit=limit,
        max_bad=max_bad_images,
        max_pixels=max_pixels,
        bit_depth=bit_depth,
        threads=threads,
        masks=masks,
        controls=controls,
        joint=joint,
        file=out_file,
        prior=prior,
        unknown=unknown,
    )
    if as_json:
        print_json(result.to_json())
    else:
        out.print(*result.tables(per_class=per_class), sep="\n")
    use = next_steps.predict(directory, "--out", "predictions.csv")
    next_steps.tell(notes, use, next_steps.deployment(directory))


use()(audit)
use()(pack)
use()(predict)
use()(calibrate)
deploy()(export)
deploy()(verify)
deploy()(serve)
app.add_typer(classes_app, name="classes", rich_help_panel=DEPLOY)
app.add_typer(bench_app, name="bench", rich_help_panel=DEPLOY)


@look()
def demo(
    benchmark: Annotated[
        BenchmarkName, option(PHOTOS, "NAME", "Animals among clutter, or letters with one mark.")
    ] = BenchmarkName.OBJECTS,
    out_dir: Annotated[
        Path | None,
        option(OUTPUT, "DIR", "Images, run and export. [default: runs/demo-NAME]", "-o", "--out"),
    ] = None,
    write_images: Annotated[
        Path | None, option(OUTPUT, "DIR", "Only write the benchmark's images into this folder.")
    ] = None,
    seed: Annotated[int, option(METHOD, "N", "Seed of the adaptation.")] = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Run an embedded benchmark: adapt, evaluate, predict, export, verify. Three minutes."""
    with waiting(notes, "loading PyTorch"):
        require_exporter()
        from microclip_deploy.cli import demo
        from microclip_deploy.demo import BENCHMARKS
        from microclip_deploy.demo.folders import write_benchmark

    if write_images is not None:
        write_benchmark(BENCHMARKS[benchmark], write_images, notes)
        return
    result = demo.run(
        BENCHMARKS[benchmark],
        out_dir or Path("runs") / f"demo-{benchmark}",
        seed=seed,
        device=device,
        notes=notes,
        printed=notes if as_json else out,
    )
    if as_json:
        print_json(result.to_json())
    else:
        out.print(*result.tables(), sep="\n")
    next_steps.tell(notes, next_steps.adapt(), next_steps.DOCTOR)


look()(doctor)
look()(recipes)


@look()
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
    with tolerant_stderr():
        return _run(arguments)


def _run(arguments: Sequence[str] | None) -> int:
    try:
        with checked_stdout():
            app(args=arguments, prog_name="microclip-deploy")
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
    """Entry point of the console script.

    In a locale of another encoding the interpreter is started again in its UTF-8 mode: names of
    files and classes, on the command line too, are UTF-8 wherever they come from.
    """
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        encoding = getattr(sys.stdout, "encoding", None) or "ascii"  # of the terminal, as it was
        environment = {"PYTHONIOENCODING": encoding, **os.environ, "PYTHONUTF8": "1"}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
    sys.exit(main())
