"""The options of `export --trt`: from the command line, back to it, and to trtexec's."""

import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from microclip_deploy.config import validate
from microclip_deploy.errors import UsageError
from microclip_deploy.serving.engines import PLAN_OF, BuildOptions, Hardware, Span
from microclip_deploy.serving.exported import Export
from microclip_deploy.serving.flavour import RTX, TENSORRT, Flavour

_FIELDS: Mapping[str, str] = {
    "--batch": "batch",
    "--workspace": "workspace_gib",
    "--opt-level": "opt_level",
    "--version-compatible": "version_compatible",
    "--hardware-compat": "hardware",
    "--compute": "compute",
}
"""Option of the command -> field of BuildOptions."""

_ONLY_TENSORRT = ("--version-compatible", "--hardware-compat")
_ONLY_RTX = ("--compute",)

_HARDWARE: Mapping[Hardware, str] = {"ampere+": "ampere+", "same-cc": "sameComputeCapability"}
"""Our names -> trtexec's."""


def parse_options(trt: bool, given: Mapping[str, Any]) -> BuildOptions | None:
    """Return how to build; None without --trt.

    Args:
        trt: build at all.
        given: values by option, such as "--batch"; None for those that were not given.

    Raises:
        UsageError: options of a build without --trt, or one with a value that does not work.
    """
    chosen = {option: value for option, value in given.items() if value is not None}
    if trt:
        fields = {_FIELDS[each]: value for each, value in chosen.items() if each in _FIELDS}
        if "batch" in fields:
            fields["batch"] = _parse_span(fields["batch"])
        if "compute" in fields:
            fields["compute"] = _parse_capabilities(fields["compute"])
        return validate(BuildOptions, fields)
    if chosen:
        raise UsageError(f"{', '.join(chosen)}: expected --trt with it, found none; add --trt")
    return None


def _parse_span(text: str) -> dict[str, int]:
    parts = text.split(":")
    if len(parts) != 3 or not all(part.isdecimal() for part in parts):
        raise UsageError(f"--batch: expected MIN:OPT:MAX such as 1:8:64, found {text}")
    return dict(zip(Span.model_fields, map(int, parts), strict=True))


def _parse_capabilities(text: str) -> tuple[str, ...]:
    found = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if not all(re.fullmatch(r"\d{1,2}\.\d", part) for part in found):
        raise UsageError(
            f"--compute: expected compute capabilities such as 8.6,8.9, found '{text}'"
        )
    return found


def require_known(options: BuildOptions, flavour: Flavour, timing_cache: Path | None) -> None:
    """Refuse options that only the other library knows.

    Raises:
        UsageError: names them and the library that is used.
    """
    others = _ONLY_TENSORRT if flavour == RTX else _ONLY_RTX
    given = [option for option in others if _FIELDS[option] in options.model_fields_set]
    if flavour == RTX and timing_cache is not None:
        given.append("--timing-cache")
    if given:
        known = TENSORRT if flavour == RTX else RTX
        where = "where it and a GPU are" if known == TENSORRT else "where TensorRT or a GPU is not"
        raise UsageError(
            f"{', '.join(given)}: expected options of {flavour}, which builds here, found those of "
            f"{known}, which builds {where}; leave them out"
        )


def spelled(options: BuildOptions, others: Mapping[str, Any]) -> str:
    """Return options as they are to be given to the command, without those at their defaults.

    Args:
        options: of the build.
        others: values by option; None for those that were not given.
    """
    changed = options.model_dump(exclude_defaults=True).keys()
    given = {each: getattr(options, name) for each, name in _FIELDS.items() if name in changed}
    shown = {option: value for option, value in {**given, **others}.items() if value is not None}
    return "".join(
        f" {option}" if value is True else f" {option} {shlex.quote(_as_given(value))}"
        for option, value in shown.items()
    )


def _as_given(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)


def require_buildable(precision: str) -> None:
    """Refuse what TensorRT has no operators for.

    Raises:
        UsageError: int8 with scales found at run time, or a precision that is chosen by speed
            elsewhere.
    """
    if precision in ("int8", "auto"):
        raise UsageError(
            f"--trt: expected an export in fp32, fp16, bf16 or int8-static, found {precision}, "
            "whose graph is for ONNX Runtime; export with --dtype fp16, or with --dtype int8 "
            "--calibration static"
        )


def trtexec_commands(export: Export, options: BuildOptions) -> str:
    """Return a shell script's text: one command a graph, for TensorRT 10 and for 11.

    trtexec proves nothing, and takes the class matrix inside full.onnx for a constant.

    Raises:
        UsageError: as `require_buildable`.
    """
    require_buildable(export.manifest.precision)
    script = (
        "# TensorRT 11; 10 also needs the flag in TENSORRT_10, because it would else choose types\n"
        "TENSORRT_10=  # on TensorRT 10: TENSORRT_10=--stronglyTyped"
    )
    for graph, plan in PLAN_OF.items():
        flags = map(shlex.quote, _trtexec_flags(export, graph, plan, options))
        script += " \\\n  ".join(("\ntrtexec", *flags, "$TENSORRT_10"))
    return script


def _trtexec_flags(export: Export, graph: str, plan: str, options: BuildOptions) -> Iterator[str]:
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
    side = export.manifest.preprocess.size
    for number, batch in enumerate(options.batches()):
        yield f"--profile={number}"
        for name, size in (("min", batch.least), ("opt", batch.opt), ("max", batch.most)):
            yield f"--{name}Shapes=image:{size}x{side}x{side}x3"
