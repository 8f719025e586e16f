"""The export directory: ONNX graphs, class matrix and manifest, read without the training stack.

    manifest.json            last; its presence means the directory is complete
    full.onnx                uint8 images -> embeddings, logits, mask, attention; NCut inside
    backbone.onnx            uint8 images -> cls, patches
    head.onnx                cls, patches, mask, classifier -> fg, embedding, logits, attention
    classifier.safetensors   class matrix; replaced when classes change, the graphs are not
    head.safetensors         the matrices inside head.onnx, for the CUDA kernels
    weights.data             only of models too large for one file each
    probes.safetensors       images and what PyTorch answers to them, for `verify`
    parity.json              the proof: how far each graph is from PyTorch, stage by stage
    verify.json              the same by `verify`, on the machine that serves

See docs/artifacts.md section 7.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors import SafetensorError
from safetensors.numpy import load_file

from microclip_deploy import artifact
from microclip_deploy.calibration import Calibration, require_fit
from microclip_deploy.config import validate
from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.errors import CheckpointError, UsageError
from microclip_deploy.head import Head
from microclip_deploy.ncut.spec import NCutSpec
from microclip_deploy.serving.session import Facts

SCHEMA = "microclip.export/1"
FULL = "full.onnx"
BACKBONE = "backbone.onnx"
HEAD = "head.onnx"
CLASSIFIER = "classifier.safetensors"
HEAD_WEIGHTS = "head.safetensors"
PROBES = "probes.safetensors"
PARITY = "parity.json"

Precision = Literal["fp32", "fp16", "bf16", "int8", "int8-static"]
"""Of the encoder. int8 finds the scales of activations at run time, int8-static holds them."""


class TensorSpec(BaseModel):
    """An input or output of a graph."""

    model_config = ConfigDict(frozen=True)

    name: str
    dtype: str
    """As NumPy names it."""
    shape: tuple[int | str, ...]
    """Names stand for sizes that may vary: "batch", "classes"."""


class GraphSpec(BaseModel):
    """One ONNX file."""

    model_config = ConfigDict(frozen=True)

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class Parent(BaseModel):
    """The checkpoint an export was made of, and the model behind that."""

    model_config = ConfigDict(frozen=True)

    checkpoint_sha256: str
    """Hash of the checkpoint's manifest."""
    model: str
    pretrained: str | None
    backbone_sha256: str
    architecture: Mapping[str, Any] | None = None
    """What decides that model's answers besides its weights; None in older exports."""


class ExportManifest(BaseModel):
    """The fields of manifest.json that readers need; others are for people."""

    model_config = ConfigDict(frozen=True)

    parent: Parent
    precision: Precision
    opset: int
    preprocess: Preprocess
    ncut: dict[str, Any]
    """The fields of NCutSpec with their fingerprint."""
    cls_share: float
    classes: tuple[str, ...] = Field(min_length=2)
    """In the order of the classifier's rows."""
    unadapted: tuple[str, ...] = ()
    """Classes added after the adaptation: their rows are zero-shot text embeddings."""
    templates: tuple[str, ...] = Field(min_length=1)
    """Sentences that class names were put into, for classes to come."""
    classifier: str = CLASSIFIER
    """File of the class matrix; another name after classes changed."""
    graphs: Mapping[str, GraphSpec]
    """By file name."""
    calibration: Calibration | None = None
    """How the logits are read; None in older exports."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.ncut_spec()
        if len(set(self.classes)) < len(self.classes) or not set(self.unadapted) <= set(
            self.classes
        ):
            raise ValueError("classes: expected different names, the unadapted ones among them")
        require_fit(self.calibration, len(self.classes))
        return self

    def ncut_spec(self) -> NCutSpec:
        """Return the constants of the cut."""
        return NCutSpec.from_stored(self.ncut)


class Export(NamedTuple):
    """An export directory read from disk and verified."""

    directory: Path
    manifest: ExportManifest
    stored: dict[str, Any]
    """All fields of manifest.json, for writing it again."""
    classifier: NDArray[np.float32]
    """(C, E), unit rows."""

    def facts(self) -> Facts:
        """Return what a session says of the model."""
        known = self.manifest
        unadapted = frozenset(known.unadapted)
        return Facts(known.classes, unadapted, known.preprocess, self.classifier, known.calibration)


def read_export(directory: Path) -> Export:
    """Read and verify an export directory; the graphs themselves are not parsed.

    Raises:
        CheckpointError: missing, damaged, of another schema, or with a class matrix that does not
            fit its class names.
    """
    try:
        return _read(directory)
    except CheckpointError:
        # Classes may have changed while their old matrix was being read: what is damaged stays so.
        return _read(directory)


def _read(directory: Path) -> Export:
    stored = artifact.read_manifest(directory, SCHEMA)
    try:
        manifest = validate(ExportManifest, stored)
    except UsageError as error:
        raise CheckpointError(f"{directory / artifact.MANIFEST}: {error}; export again") from error
    absent = {FULL, manifest.classifier} - set(stored["files"])
    if absent:
        raise CheckpointError(
            f"{directory}: the manifest does not list {', '.join(sorted(absent))}; export again"
        )
    matrix = _read_classifier(directory / manifest.classifier, len(manifest.classes))
    return Export(directory, manifest, stored, matrix)


def _read_classifier(path: Path, classes: int) -> NDArray[np.float32]:
    try:
        matrix = load_file(path)["classifier"]
    except (SafetensorError, OSError, KeyError) as error:
        raise CheckpointError(f"{path}: expected a tensor 'classifier', found: {error}") from error
    if matrix.ndim != 2 or len(matrix) != classes or not np.isfinite(matrix).all():
        raise CheckpointError(
            f"{path}: expected finite numbers in {classes} rows, found shape {matrix.shape}; "
            "export again"
        )
    return matrix.astype(np.float32)


def read_head(export: Export) -> Head:
    """Read what head.onnx holds inside.

    Raises:
        CheckpointError: an older export without the file, or matrices that do not fit.
    """
    path = export.directory / HEAD_WEIGHTS
    if HEAD_WEIGHTS not in export.stored["files"]:
        raise CheckpointError(
            f"{path}: expected the matrices that the CUDA kernels need, found an older export "
            "without them; export again, or use --device cpu"
        )
    try:
        tensors = load_file(path)
        match, project = tensors.get("match"), tensors["project"]
    except (SafetensorError, OSError, KeyError) as error:
        raise CheckpointError(
            f"{path}: expected a tensor 'project', found: {error}; export again"
        ) from error
    joint, width = export.classifier.shape[1], project.shape[-1]
    wanted = {"match": (width, width), "project": (joint, width)}
    for name, matrix in tensors.items():
        fits = matrix.shape == wanted.get(name) and matrix.dtype == np.float32
        if not fits or not np.isfinite(matrix).all():
            raise CheckpointError(
                f"{path}: expected finite float32 {wanted}, found {name} {matrix.dtype} "
                f"{matrix.shape}; export again"
            )
    known = export.manifest
    alone = known.ncut_spec().fallback == "cls"
    return Head(match, project, export.classifier, known.cls_share, alone)
