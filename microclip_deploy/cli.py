"""The command line: parse, call one library function, print.

Heavy libraries are imported inside the commands, so that --help and version are instant.
"""

import json
import os
import signal
import sys
from collections.abc import Sequence
from enum import StrEnum
from importlib.metadata import version as package_version
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console

from microclip_deploy.errors import (
    EXTRA_OF,
    Interrupted,
    MicroclipError,
    missing_package,
    require,
)
from microclip_deploy.standard_output import ReaderGone, checked_stdout, discard

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


class _Notes(Console):
    """stderr. Where nobody reads it any more, a long run goes on in silence."""

    def on_broken_pipe(self) -> None:
        """Stop printing instead of ending the process, as the base class does."""
        self.quiet = True
        discard(sys.stderr)


notes = _Notes(stderr=True, highlight=False, soft_wrap=True)
"""Everything that is no result."""
out = Console(highlight=False)
"""Results."""


class OutputFormat(StrEnum):
    """How `predict` prints."""

    table = "table"
    csv = "csv"
    json = "json"
    jsonl = "jsonl"


Out = Annotated[Path, typer.Option("-o", "--out", help="Run directory to write.")]
Run = Annotated[Path, typer.Argument(help="Run directory that `adapt` wrote.", show_default=False)]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.", envvar="MICROCLIP_DEVICE")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", help="SECTION.KEY=VALUE of adapt, views or ncut.")
]
MaxBad = Annotated[str, typer.Option(help="How many may be unusable: 25 or 1%.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Images = Annotated[Path | None, typer.Argument(help="Folder of images, or a .csv/.tsv/.txt list.")]
Descriptions = Annotated[Path | None, typer.Option(help="JSON {class: [sentences]} or JSON Lines.")]
Templates = Annotated[
    list[str] | None, typer.Option(help="Sentence with {} for the class name; repeatable.")
]
Model = Annotated[
    str | None,
    typer.Option(
        help="open_clip name, hf-hub:ORG/REPO, local-dir:PATH, or demo. [default: ViT-B-32]"
    ),
]
Pretrained = Annotated[
    str | None, typer.Option(help="open_clip tag or .safetensors file. [default: openai]")
]
ValDir = Annotated[
    Path | None, typer.Option(help="Labelled folder, measured each epoch, never trained on.")
]
BatchSize = Annotated[int, typer.Option(help="Images a batch.", min=1)]


@app.command()
def adapt(
    out_dir: Out,
    images: Images = None,
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
    save_every: Annotated[int, typer.Option(help="Iterations between saved states.", min=1)] = 200,
    resume: Annotated[bool, typer.Option(help="Continue the run in --out.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace the run in --out.")] = False,
    as_json: AsJson = False,
) -> None:
    """Adapt a CLIP ViT to unlabeled images.

    Example: microclip-deploy adapt photos/ --classes classes.txt -o runs/birds
    """
    require("torch", "adapt")
    from microclip_deploy import commands

    shorthand = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "seed": seed}
    request = commands.AdaptRequest(
        out=out_dir,
        images=images,
        classes=classes,
        descriptions=descriptions,
        templates=tuple(template or ()),
        model=model,
        pretrained=pretrained,
        recipe=recipe,
        overrides=(*(sets or ()), *_overrides(shorthand)),
        val_dir=val_dir,
        device=device,
        workers=workers,
        max_bad_images=max_bad_images,
        save_every=save_every,
        resume=resume,
        overwrite=overwrite,
    )
    summary = commands.run_adapt(request, notes)
    if as_json:
        _print_json(summary)


@app.command()
def evaluate(
    run: Run,
    data: Annotated[
        Path, typer.Argument(help="Labelled images: CLASS/image files, or a .csv list.")
    ],
    device: Device = "auto",
    batch_size: BatchSize = 64,
    zero_shot: Annotated[
        bool, typer.Option(help="Also measure the model before adaptation.")
    ] = True,
    max_bad_images: MaxBad = "1%",
    per_class: Annotated[bool, typer.Option("--per-class", help="Print every class.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure accuracy on labelled images: fused, [CLS], [FG], and zero-shot."""
    require("torch", "adapt")
    from microclip_deploy import commands

    result = commands.run_evaluate(
        run,
        data,
        notes,
        device=device,
        batch_size=batch_size,
        zero_shot=zero_shot,
        max_bad=max_bad_images,
    )
    if as_json:
        _print_json(result.to_json())
    else:
        for table in result.tables(per_class=per_class):
            out.print(table)


@app.command()
def predict(
    run: Run,
    images: Annotated[list[Path], typer.Argument(help="Images, folders or lists.")],
    top_k: Annotated[int, typer.Option(help="Classes to show.", min=1)] = 5,
    output_format: Annotated[
        OutputFormat, typer.Option("--format", help="How to print.")
    ] = OutputFormat.table,
    overlay: Annotated[
        Path | None, typer.Option(help="Write saliency overlays (PNG) into this folder.")
    ] = None,
    device: Device = "auto",
    batch_size: BatchSize = 64,
) -> None:
    """Classify images with an adapted model."""
    require("torch", "adapt")
    from microclip_deploy import commands

    request = commands.PredictRequest(
        run, tuple(images), top_k, output_format.value, overlay, device, batch_size
    )
    commands.run_predict(request, out, notes)


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
    """Run the embedded benchmark: zero-shot, adapt, evaluate, predict. About three minutes."""
    require("torch", "adapt")
    from microclip_deploy.demo import benchmark

    if write_images is not None:
        benchmark.write_benchmark(write_images, notes)
        return
    result = benchmark.run(
        out_dir, seed=seed, device=device, notes=notes, printed=notes if as_json else out
    )
    if as_json:
        _print_json(result.to_json())
    else:
        out.print(result.table())


@app.command()
def doctor(
    needs: Annotated[
        list[str] | None, typer.Option("--require", help="gpu, trt or cupy; exit 4 when missing.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show versions and devices, what will be used for what, and how to fix what is wrong."""
    from microclip_deploy import doctor as diagnosis

    found = diagnosis.diagnose()
    if as_json:
        _print_json(found.to_json())
    else:
        for table in found.tables():
            out.print(table)
    diagnosis.require(found, {part for need in needs or () for part in need.split(",")})


@app.command()
def recipes(as_json: AsJson = False) -> None:
    """List the shipped recipes."""
    from microclip_deploy.config import shipped_recipes

    if as_json:
        _print_json(shipped_recipes())
        return
    for name in shipped_recipes():
        out.print(name)


@app.command()
def version(as_json: AsJson = False) -> None:
    """Print the version."""
    number = package_version("microclip-deploy")
    if as_json:
        _print_json({"microclip-deploy": number, "python": sys.version.split()[0]})
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


def _overrides(shorthand: dict[str, Any]) -> list[str]:
    return [f"adapt.{name}={value}" for name, value in shorthand.items() if value is not None]


def _print_json(value: Any) -> None:
    """Print one line of JSON; the last line of stdout."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")
    sys.stdout.flush()


def run_main() -> None:
    """Entry point of the console script."""
    sys.exit(main())


if __name__ == "__main__":
    run_main()
