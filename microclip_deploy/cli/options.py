"""The arguments and options of the command line, each defined once."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Dtype(StrEnum):
    """Precision of an export."""

    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"
    int8 = "int8"
    auto = "auto"


class ExportDtype(StrEnum):
    """Precision of an export that is made for a measurement."""

    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"
    int8 = "int8"


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


Out = Annotated[Path, typer.Option("-o", "--out", help="Run directory to write.")]
Exportable = Annotated[
    Path,
    typer.Argument(
        metavar="RUN",
        help="Run directory that `adapt` wrote; with --trt also what `export` wrote.",
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
    typer.Option(
        help="auto, cpu, cuda or cuda:N; for an export also tensorrt and openvino.",
        envvar="MICROCLIP_DEVICE",
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.", envvar="MICROCLIP_DEVICE")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", help="SECTION.KEY=VALUE of adapt, views, photos or ncut."),
]
MaxBad = Annotated[str, typer.Option(help="How many may be unusable: 25 or 1%.")]
MaxPixels = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Largest photo, width x height. [default: 200 million, or the run's]",
        min=4,
    ),
]
BitDepth = Annotated[
    int | None,
    typer.Option(
        metavar="BITS",
        help="Bits that hold data in 16-bit photos: 10 or 12. [default: 16, or the run's]",
        min=8,
        max=16,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Images = Annotated[Path | None, typer.Argument(help="Folder of images, or a .csv/.tsv/.txt list.")]
ImagesAgain = Annotated[
    Path | None,
    typer.Option("--images", help="As IMAGES; with --resume, where they lie now."),
]
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
ProofImages = Annotated[
    Path | None, typer.Option(help="Prove on images of yours too: folder or list.")
]
ProofDevice = Annotated[str, typer.Option(help="Where graphs are run: cpu, cuda or cuda:N.")]
BatchSize = Annotated[int, typer.Option(help="Images a batch.", min=1)]
Threads = Annotated[
    int | None,
    typer.Option(help="Of the model on a CPU. [default: one a core that may be used]"),
]
ExportDirectory = Annotated[Path, typer.Argument(metavar="EXPORT", help="What `export` wrote.")]
Names = Annotated[list[str], typer.Argument(metavar="NAME", help="Class names.")]
Trt = Annotated[
    bool,
    typer.Option("--trt", help="Also build and prove TensorRT engines for this machine."),
]
Batch = Annotated[
    str | None,
    typer.Option(metavar="MIN:OPT:MAX", help="Images a batch of the engines. [default: 1:8:64]"),
]
Workspace = Annotated[
    float | None, typer.Option(help="Most scratch memory of an engine, GiB. [default: all]")
]
OptLevel = Annotated[
    int | None,
    typer.Option(help="How long TensorRT looks for fast kernels. [default: 3]", min=0, max=5),
]
TimingCache = Annotated[
    Path | None,
    typer.Option(help="Folder of TensorRT's measurements. [default: the export's engines]"),
]
VersionCompatible = Annotated[
    bool, typer.Option("--version-compatible", help="Let newer TensorRT versions load the engines.")
]
HardwareCompat = Annotated[
    Hardware | None, typer.Option(help="Other GPUs that may load the engines. [default: none]")
]
PrintTrtexec = Annotated[
    bool, typer.Option("--print-trtexec", help="Print trtexec commands instead of building.")
]
