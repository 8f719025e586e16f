"""The arguments and options of the command line, each defined once."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from microclip_deploy.config import shipped_recipes


class Dtype(StrEnum):
    """Precision of an export."""

    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"
    int8 = "int8"
    auto = "auto"


class BenchmarkName(StrEnum):
    """The embedded benchmarks: animals among clutter, or letters that differ by one mark."""

    OBJECTS = "objects"
    LETTERS = "letters"


class ExportDtype(StrEnum):
    """Precision of an export that is made for a measurement."""

    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"
    int8 = "int8"
    int8_static = "int8-static"


class Calibration(StrEnum):
    """Where int8 takes the scales of activations from."""

    dynamic = "dynamic"
    static = "static"


class Hardware(StrEnum):
    """Other GPUs that may load an engine."""

    none = "none"
    ampere = "ampere+"
    same_cc = "same-cc"


class OutputFormat(StrEnum):
    """How `predict` prints."""

    table = "table"
    csv = "csv"
    json = "json"
    jsonl = "jsonl"


PHOTOS = "Photos and classes"
MODEL = "Model"
METHOD = "Method"
MACHINE = "Machine"
OUTPUT = "Output"
SHARDS = "Parquet shards"
PROOF = "Proof"
ENGINES = "TensorRT engines"
SERVER = "Server"
LANGUAGE = "Language model"
"""Sections of --help."""


def option(section: str, metavar: str | None, text: str, *names: str, **more: Any) -> Any:
    """Return an option.

    Args:
        section: of --help.
        metavar: what its value is called there; None names its type.
        text: what it is for.
        names: if they are not those of the parameter.
        more: as for `typer.Option`.
    """
    return typer.Option(*names, metavar=metavar, help=text, rich_help_panel=section, **more)


def recipe_names(incomplete: str) -> list[str]:
    """Return what completes the name of a shipped recipe."""
    return [name for name in shipped_recipes() if name.startswith(incomplete)]


Out = Annotated[Path, option(OUTPUT, "DIR", "Run directory.", "-o", "--out")]
Exportable = Annotated[
    Path,
    typer.Argument(
        metavar="RUN",
        help="Run directory that `adapt` wrote; with --trt or --triton also what `export` wrote.",
        show_default=False,
    ),
]
Adapted = Annotated[
    Path,
    typer.Argument(
        metavar="RUN_OR_EXPORT",
        help="Directory that `adapt` or `export` wrote.",
        show_default=False,
    ),
]
ServingDevice = Annotated[
    str,
    option(
        MACHINE,
        "DEVICE",
        "auto, cpu, cuda or cuda:N; for an export also tensorrt and openvino.",
        envvar="MICROCLIP_DEVICE",
    ),
]
Device = Annotated[
    str, option(MACHINE, "DEVICE", "auto, cpu, cuda or cuda:N.", envvar="MICROCLIP_DEVICE")
]
Sets = Annotated[
    list[str] | None,
    option(
        METHOD,
        "SECTION.KEY=VALUE",
        "A setting of adapt, views, photos or ncut; repeatable.",
        "--set",
    ),
]
MaxBad = Annotated[str, option(PHOTOS, "NUMBER|SHARE", "How many may be unusable: 25 or 1%.")]
MaxPixels = Annotated[
    int | None,
    option(
        PHOTOS, "N", "Largest photo, width x height. [default: 200 million, or the run's]", min=4
    ),
]
BitDepth = Annotated[
    int | None,
    option(
        PHOTOS,
        "BITS",
        "Bits that hold data in 16-bit photos: 10 or 12. [default: 16, or the run's]",
        min=8,
        max=16,
    ),
]
AsJson = Annotated[bool, option(OUTPUT, None, "One JSON document on stdout.", "--json")]
Images = Annotated[
    Path | None,
    typer.Argument(metavar="IMAGES", help="Folder of images, or a .csv/.tsv/.txt list."),
]
ImagesAgain = Annotated[
    Path | None,
    option(PHOTOS, "IMAGES", "As IMAGES; with --resume, where they lie now.", "--images"),
]
Descriptions = Annotated[
    Path | None, option(PHOTOS, "FILE", "JSON {class: [sentences]} or JSON Lines.")
]
Domain = Annotated[
    str | None, option(PHOTOS, "TEXT", 'What all classes are kinds of, such as "bird species".')
]
LanguageEndpoint = Annotated[
    str | None,
    option(
        LANGUAGE,
        "URL",
        "OpenAI-compatible base URL. [default: https://api.openai.com/v1]",
        envvar="OPENAI_BASE_URL",
    ),
]
Templates = Annotated[
    list[str] | None, option(PHOTOS, "TEXT", "Sentence with {} for the class name; repeatable.")
]
Model = Annotated[
    str | None,
    option(
        MODEL,
        "NAME",
        "open_clip name, hf-hub:ORG/REPO, demo, or local-dir:PATH. [default: ViT-B-32]",
    ),
]
Pretrained = Annotated[
    str | None, option(MODEL, "TAG|FILE", "open_clip tag or .safetensors file. [default: openai]")
]
ValDir = Annotated[
    Path | None, option(PHOTOS, "DIR", "Labelled folder, measured each epoch, never trained on.")
]
ProofImages = Annotated[
    Path | None, option(PROOF, "IMAGES", "Prove on images of yours too: folder or list.")
]
ProofDevice = Annotated[str, option(PROOF, "DEVICE", "Where graphs are run: cpu, cuda or cuda:N.")]
PRIOR_HELP = "How frequent classes are in the photos: as adapted to, alike, or class,weight."
Prior = Annotated[str, option(METHOD, "folder|uniform|FILE", PRIOR_HELP, "--prior")]
Joint = Annotated[
    bool,
    option(METHOD, None, "Also let all photos together say what each one shows.", "--joint"),
]
BatchSize = Annotated[int, option(MACHINE, "N", "Images a batch.", min=1)]
Threads = Annotated[
    int | None,
    option(MACHINE, "N", "Of the model on a CPU. [default: one a core that may be used]"),
]
ExportDirectory = Annotated[Path, typer.Argument(metavar="EXPORT", help="What `export` wrote.")]
Names = Annotated[list[str], typer.Argument(metavar="NAME", help="Class names.")]
Trt = Annotated[
    bool,
    option(
        ENGINES, None, "Also build TensorRT engines, and prove those for this machine.", "--trt"
    ),
]
Batch = Annotated[
    str | None, option(ENGINES, "MIN:OPT:MAX", "Images a batch of the engines. [default: 1:8:64]")
]
Workspace = Annotated[
    float | None, option(ENGINES, "GIB", "Most scratch memory of an engine, GiB. [default: all]")
]
OptLevel = Annotated[
    int | None,
    option(ENGINES, "N", "How long TensorRT looks for fast kernels. [default: 3]", min=0, max=5),
]
TimingCache = Annotated[
    Path | None,
    option(ENGINES, "DIR", "Folder of TensorRT's measurements. [default: the export's engines]"),
]
VersionCompatible = Annotated[
    bool,
    option(ENGINES, None, "Let newer TensorRT versions load the engines.", "--version-compatible"),
]
HardwareCompat = Annotated[
    Hardware | None, option(ENGINES, None, "Other GPUs that may load the engines. [default: none]")
]
Compute = Annotated[
    str | None,
    option(
        ENGINES,
        "8.6,8.9,…",
        "Compute capabilities that TensorRT for RTX builds for. [default: 8.6,8.9,12.0]",
    ),
]
Check = Annotated[
    bool,
    option(ENGINES, None, "Build, show layers and sizes, keep no engine; exit 5 if refused."),
]
PrintTrtexec = Annotated[
    bool, option(ENGINES, None, "Print trtexec commands instead of building.", "--print-trtexec")
]
