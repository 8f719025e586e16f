"""The TensorRT engines of an export: a folder for each TensorRT version and GPU they run on.

    EXPORT/engines/trt11.4.0.106-sm90-nvidia-h200/
        manifest.json            last; names the GPUs on which the engines are proven
        backbone.plan            images -> cls, patches: what serving runs before the CUDA kernels
        full.plan                images, classifier -> everything, the cut inside
        backbone.layers.json     what TensorRT's inspector tells of each plan
        full.layers.json
        parity.json              the proof: how far each plan is from ONNX Runtime
        build.log                what TensorRT said

Those of TensorRT for RTX, such as rtx1.7.1.116-sm86-sm89-sm120, are built without a GPU: they get
the layers and the proof where `verify` proves them, and are not served before.

A plan is native code: it is read only when its bytes are those that the manifest names, and only
where it was built for. Needs neither TensorRT nor a GPU; see docs/artifacts.md section 8.
"""

import hashlib
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from microclip_deploy import artifact
from microclip_deploy.config import validate
from microclip_deploy.errors import CheckpointError, EnvironmentProblem, UsageError
from microclip_deploy.serving.exported import BACKBONE, FULL, Export, GraphSpec, Precision
from microclip_deploy.serving.flavour import TENSORRT, Flavour

SCHEMA = "microclip.engines/1"
ENGINES = "engines"
"""Folder of an export; no part of the export's own manifest."""

BACKBONE_PLAN = "backbone.plan"
FULL_PLAN = "full.plan"
KERNELS = "backbone.kernels"
"""What TensorRT for RTX compiled of the backbone's plan for one GPU, in the folder of its proof."""
PLAN_OF: Mapping[str, str] = {BACKBONE: BACKBONE_PLAN, FULL: FULL_PLAN}

Hardware = Literal["none", "ampere+", "same-cc"]
"""GPUs beside the one of the build: none, every one since Ampere, every one of its capability."""


class Target(BaseModel):
    """What a plan is tied to, or the machine it is to run on."""

    model_config = ConfigDict(frozen=True)

    flavour: Flavour = TENSORRT
    tensorrt: str
    """Version of the flavour, such as "11.4.0.106"."""
    gpu: str = ""
    """Empty of a plan that was built for every GPU of some capabilities."""
    compute_capability: str = ""
    """Such as "9.0"; empty as `gpu`."""
    capabilities: tuple[str, ...] = ()
    """Of the GPUs that a plan of TensorRT for RTX runs on."""
    system: str
    """Such as "Linux x86_64"."""

    @property
    def library(self) -> str:
        """Return flavour and version."""
        return f"{self.flavour} {self.tensorrt}"

    @property
    def folder(self) -> str:
        """Return the name of the engines' folder."""
        if self.capabilities:
            numbers = (f"-sm{each.replace('.', '')}" for each in self.capabilities)
            return f"rtx{self.tensorrt}{''.join(numbers)}"
        return f"trt{self.tensorrt}-sm{self.compute_capability.replace('.', '')}-{self.gpu_slug}"

    @property
    def gpu_slug(self) -> str:
        """Return the GPU as a part of file names."""
        return "".join(c if c.isalnum() else "-" for c in self.gpu.lower()).strip("-")

    def __str__(self) -> str:
        if self.capabilities:
            capabilities = ", ".join(self.capabilities)
            return f"{self.library} for compute capability {capabilities} ({self.system})"
        return (
            f"{self.library} on {self.gpu} "
            f"(compute capability {self.compute_capability}, {self.system})"
        )


class Span(BaseModel):
    """Sizes of one dimension that a profile allows, and the one its kernels are tuned for."""

    model_config = ConfigDict(frozen=True)

    least: int = Field(ge=1)
    opt: int
    most: int

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.least <= self.opt <= self.most:
            raise ValueError(f"expected MIN <= OPT <= MAX, found {self}")
        return self

    def __contains__(self, size: int) -> bool:
        return self.least <= size <= self.most

    def __str__(self) -> str:
        return f"{self.least}:{self.opt}:{self.most}"


LATENCY = Span(least=1, opt=1, most=1)
"""The first profile: one image, with kernels of its own."""


RTX_CAPABILITIES = ("8.6", "8.9", "12.0")
"""GeForce and RTX PRO since Ampere."""


class BuildOptions(BaseModel):
    """What the user decides about a build."""

    model_config = ConfigDict(frozen=True)

    batch: Span = Span(least=1, opt=8, most=64)
    """Of the throughput profile; the first profile is one image."""
    workspace_gib: float | None = Field(default=None, gt=0)
    """Most scratch memory of a kernel; None: all of the device."""
    opt_level: int = Field(default=3, ge=0, le=5)
    """How long TensorRT looks for fast kernels."""
    version_compatible: bool = False
    """Let newer TensorRT versions load the plan; slower."""
    hardware: Hardware = "none"
    """Other GPUs that may load the plan; slower."""
    compute: tuple[str, ...] = RTX_CAPABILITIES
    """Compute capabilities that TensorRT for RTX builds for; of no meaning to TensorRT."""

    def batches(self) -> tuple[Span, ...]:
        """Return the images a batch of each profile."""
        return (LATENCY,) if self.batch == LATENCY else (LATENCY, self.batch)


class PlanSpec(BaseModel):
    """One plan."""

    model_config = ConfigDict(frozen=True)

    graph: str
    """The ONNX file it was built from."""
    graph_sha256: str
    tensors: GraphSpec
    """Inputs and outputs; the class matrix has no default here."""


class EngineManifest(BaseModel):
    """The fields of manifest.json that readers need; others are for people."""

    model_config = ConfigDict(frozen=True)

    target: Target
    precision: Precision
    options: BuildOptions
    classes: Span
    """Rows of the class matrix that the full plan takes."""
    plans: Mapping[str, PlanSpec]
    """By file name."""
    proven: tuple[str, ...] | None = None
    """GPUs on which the plans were proven; None of earlier builds, whose every plan was."""

    def is_proven(self, here: Target) -> bool:
        """Say whether a GPU may be served: those of TensorRT are proven where they are built."""
        return self.target.flavour == TENSORRT or here.gpu in (self.proven or ())

    def profile_of(self, batch: int) -> int:
        """Return the narrowest profile that takes a batch, the one tuned for it first."""
        fits = [
            (span.most - span.least, span.opt != batch, number)
            for number, span in enumerate(self.options.batches())
            if batch in span
        ]
        return min(fits)[2]

    def buckets(self) -> tuple[int, ...]:
        """Return the batch sizes to prepare: powers of two, and the ends and middles of profiles.

        Every batch of at most the last one fits into the next larger bucket.
        """
        batch = self.options.batch
        powers = (1 << k for k in range(batch.most.bit_length()))
        fits = {size for size in powers if size in batch}
        return tuple(sorted({LATENCY.opt, batch.least, batch.opt, batch.most, *fits}))

    def refusal(self, here: Target) -> str | None:
        """Say why the plans cannot run here; None where they can."""
        built = self.target
        if here.system != built.system:
            return f"built on {built.system}"
        if here.flavour != built.flavour:
            return f"built with {built.library}"
        newer = _numbers(here.tensorrt) >= _numbers(built.tensorrt)
        if here.tensorrt != built.tensorrt and not (self.options.version_compatible and newer):
            return f"built with {built.library}"
        if self._same_gpu(here):
            return None
        if built.capabilities:
            return f"built for compute capability {', '.join(built.capabilities)}"
        return f"built for {built.gpu} (compute capability {built.compute_capability})"

    def _same_gpu(self, here: Target) -> bool:
        if self.target.capabilities:
            return here.compute_capability in self.target.capabilities
        same = here.compute_capability == self.target.compute_capability
        if self.options.hardware == "ampere+":
            return _numbers(here.compute_capability) >= (8, 0)
        return same and (self.options.hardware == "same-cc" or here.gpu == self.target.gpu)


class Engines(NamedTuple):
    """A folder of engines; the plans themselves are not read yet."""

    directory: Path
    manifest: EngineManifest
    stored: dict[str, Any]
    """All fields of manifest.json."""

    def plan(self, name: str) -> bytes:
        """Read a plan whose bytes are those that the manifest names.

        Raises:
            CheckpointError: missing, damaged or exchanged.
        """
        path = self.directory / name
        try:
            data = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path}: expected an engine, found: {error}") from error
        expected = self.stored["files"].get(name, {}).get("sha256")
        # The very bytes that are run, not the file at another moment.
        if hashlib.sha256(data).hexdigest() != expected:
            raise CheckpointError(
                f"{path}: its bytes are not those that were proven; it was not loaded; "
                f"rebuild: {rebuild_command(self.directory.parent.parent)}"
            )
        return data

    def kernels(self, here: Target) -> bytes:
        """Read the kernels that a proof compiled for a GPU; empty where there are none.

        Raises:
            CheckpointError: as `plan`.
        """
        name = f"{here.gpu_slug}/{KERNELS}"
        return self.plan(name) if name in self.stored["files"] else b""


def has_engines(export: Path) -> bool:
    """Say whether engines were ever built for an export, for whatever machine."""
    return any((export / ENGINES).glob(f"*/{artifact.MANIFEST}"))


def has_unproven(export: Path) -> bool:
    """Say whether engines were built for an export that no GPU has proven."""
    manifests = (export / ENGINES).glob(f"*/{artifact.MANIFEST}")
    return any(artifact.read_json(path).get("proven") == [] for path in manifests)


def find_engines(export: Export, here: Target) -> Engines:
    """Return the engines of an export that run here and are proven.

    Raises:
        EnvironmentProblem: there are none; says what there is, and how to build or prove them.
        CheckpointError: those for this machine are damaged.
    """
    fitting, refused = _fitting(export, here)
    for engines in fitting:
        if engines.manifest.is_proven(here):
            return engines
    if fitting:
        raise EnvironmentProblem(
            f"{fitting[0].directory}: expected engines that are proven on {here.gpu}, found them "
            f"built, not proven; prove them here: {prove_command(export.directory)}"
        )
    raise EnvironmentProblem(
        f"{export.directory / ENGINES}: expected engines for {here}, found "
        f"{'; '.join(refused) or 'none'}; build them here: {rebuild_command(export.directory)}"
    )


def unproven_engines(export: Export, here: Target) -> list[Engines]:
    """Return the engines that run here once they are proven.

    Raises:
        CheckpointError: those for this machine are damaged.
    """
    fitting, _ = _fitting(export, here)
    return [engines for engines in fitting if not engines.manifest.is_proven(here)]


def current_engines(export: Export) -> list[Engines]:
    """Return the engines that were built from an export's present graphs, whatever they run on.

    Those of one compute capability come in the order of their versions.

    Raises:
        CheckpointError: some are damaged.
    """
    folders = (path.parent for path in (export.directory / ENGINES).glob(f"*/{artifact.MANIFEST}"))
    built = [read_engines(directory) for directory in folders]
    current = [engines for engines in built if _stale(engines.manifest, export) is None]
    return sorted(current, key=lambda engines: _numbers(engines.manifest.target.tensorrt))


def _fitting(export: Export, here: Target) -> tuple[list[Engines], list[str]]:
    """Return what runs here, that built for exactly this machine first, and why others do not."""
    folder = export.directory / ENGINES
    built = sorted(path.parent for path in folder.glob(f"*/{artifact.MANIFEST}"))
    fitting, refused = [], []
    for directory in sorted(built, key=lambda path: path.name != here.folder):
        try:
            engines = read_engines(directory)
        except CheckpointError as error:
            if directory.name == here.folder:
                raise
            refused.append(str(error))
            continue
        why = engines.manifest.refusal(here) or _stale(engines.manifest, export)
        if why is None:
            fitting.append(engines)
        else:
            refused.append(f"{directory.name}: {why}")
    return fitting, refused


def read_engines(directory: Path) -> Engines:
    """Read and verify a folder of engines.

    Raises:
        CheckpointError: missing, damaged or of another schema.
    """
    stored = artifact.read_manifest(directory, SCHEMA)
    try:
        manifest = validate(EngineManifest, stored)
    except UsageError as error:
        raise CheckpointError(f"{directory / artifact.MANIFEST}: {error}; rebuild") from error
    absent = sorted(set(PLAN_OF.values()) - (set(stored["files"]) & set(manifest.plans)))
    if absent:
        raise CheckpointError(f"{directory}: the manifest lists no {', '.join(absent)}; rebuild")
    return Engines(directory, manifest, stored)


def rebuild_command(export: Path) -> str:
    """Return the command that builds engines for the machine it is run on."""
    return f"microclip-deploy export {shlex.quote(str(export))} --trt"


def prove_command(export: Path) -> str:
    """Return the command that proves engines on the machine it is run on."""
    return f"microclip-deploy verify {shlex.quote(str(export))}"


def _stale(manifest: EngineManifest, export: Export) -> str | None:
    """Say which graph is another one now than that which a plan was built from."""
    for name, plan in manifest.plans.items():
        found = export.stored["files"].get(plan.graph, {}).get("sha256")
        if plan.graph_sha256 != found:
            return f"{name} was built from another {plan.graph}"
    return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
