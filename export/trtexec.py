"""The trtexec commands that build the same engines, for those who build elsewhere."""

import shlex
from collections.abc import Iterator
from pathlib import Path

from microclip_deploy.serving.engines import PLAN_OF, BuildOptions, Hardware, Span
from microclip_deploy.serving.exported import Export, TensorSpec

_HARDWARE: dict[Hardware, str] = {"ampere+": "ampere+", "same-cc": "sameComputeCapability"}


def trtexec_commands(export: Export, options: BuildOptions) -> str:
    """Return a shell script's text: one command a graph, for TensorRT 10 and for 11.

    trtexec proves nothing, and takes the class matrix inside full.onnx for a constant.
    """
    parts = [
        "# TensorRT 11; 10 also needs the flag in TENSORRT_10, because it would else choose types",
        "TENSORRT_10=  # on TensorRT 10: TENSORRT_10=--stronglyTyped",
    ]
    for graph, plan in PLAN_OF.items():
        command = ["trtexec", *_flags(export, graph, plan, options)]
        shown = " \\\n  ".join(map(shlex.quote, command))
        parts.append(f"{shown} \\\n  $TENSORRT_10")
    return "\n".join(parts)


def _flags(export: Export, graph: str, plan: str, options: BuildOptions) -> Iterator[str]:
    yield f"--onnx={export.directory / graph}"
    yield f"--saveEngine={plan}"
    yield "--noTF32"
    yield f"--builderOptimizationLevel={options.opt_level}"
    yield "--profilingVerbosity=detailed"
    yield "--maxAuxStreams=0"
    yield f"--timingCacheFile={Path(plan).with_suffix('.timing-cache')}"
    if options.workspace_gib is not None:
        yield f"--memPoolSize=workspace:{options.workspace_gib * 1024:.0f}M"
    if options.version_compatible:
        yield from ("--versionCompatible", "--excludeLeanRuntime")
    if options.hardware != "none":
        yield f"--hardwareCompatibilityLevel={_HARDWARE[options.hardware]}"
    image = next(each for each in export.manifest.graphs[graph].inputs if each.name == "image")
    for number, batch in enumerate(options.batches()):
        yield f"--profile={number}"
        yield from _shapes(image, batch)


def _shapes(image: TensorSpec, batch: Span) -> Iterator[str]:
    for name, size in (("min", batch.least), ("opt", batch.opt), ("max", batch.most)):
        dims = "x".join(str(dim) for dim in (size, *image.shape[1:]))
        yield f"--{name}Shapes={image.name}:{dims}"
