"""The adapted checkpoint: trained tensors, class heads and settings in one verified directory.

Frozen weights of the backbone are not copied: the manifest names their source and their hash, and
loading refuses other ones. See docs/artifacts.md.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from microclip_deploy import artifact
from microclip_deploy.calibration import Calibration, require_fit
from microclip_deploy.config import validate
from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.errors import CheckpointError, UsageError
from microclip_deploy.model.clip import BackboneSpec, Clip, load_clip, require_same
from microclip_deploy.model.microclip import MicroCLIP, Pooling
from microclip_deploy.model.text import TextHeads
from microclip_deploy.ncut.spec import NCutSpec

SCHEMA = "microclip.checkpoint/1"
WEIGHTS = "weights.safetensors"
HEADS = ("classifier", *(f"text.{name}" for name in TextHeads._fields))
"""Class matrices in the weights, (C, E)."""


class StoredBackbone(BackboneSpec):
    """Where the frozen weights come from, their hash, and what else decides the answers."""

    sha256: str
    architecture: dict[str, Any] | None = None
    """None in a checkpoint from before it was recorded."""


class StoredFusion(BaseModel):
    """The settings of `adapt` that shape the model."""

    cls_share: float
    pooling: Pooling


class StoredConfig(BaseModel):
    """The part of the resolved recipe that shapes the model."""

    adapt: StoredFusion


class StoredTexts(BaseModel):
    """Where the class matrices come from."""

    templates: tuple[str, ...]


class CheckpointManifest(BaseModel):
    """The fields of manifest.json that loading needs; others are for people."""

    model_config = ConfigDict(frozen=True)

    backbone: StoredBackbone
    preprocess: Preprocess
    ncut: dict[str, Any]
    """The fields of NCutSpec, and the fingerprint they had when they were written."""
    classes: tuple[str, ...] = Field(min_length=2)
    texts: StoredTexts
    config: StoredConfig
    calibration: Calibration | None = None
    """How the logits are read; None in a checkpoint from before it was found."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.ncut_spec()
        require_fit(self.calibration, len(self.classes))
        return self

    def ncut_spec(self) -> NCutSpec:
        """Return the constants of the cut."""
        return NCutSpec.from_stored(self.ncut)


class Checkpoint(NamedTuple):
    """A checkpoint read from disk and verified."""

    manifest: CheckpointManifest
    tensors: dict[str, Tensor]

    def heads(self) -> TextHeads:
        """Class matrices as they were before adaptation."""
        return TextHeads(*(self.tensors[f"text.{name}"] for name in TextHeads._fields))


def write_checkpoint(
    directory: Path, model: MicroCLIP, clip: Clip, heads: TextHeads, content: Mapping[str, Any]
) -> None:
    """Write weights and manifest; the manifest comes last and completes the directory.

    Args:
        directory: existing run directory.
        model: the adapted model.
        clip: where its frozen weights come from.
        heads: the initial class matrices, kept so that zero-shot can be evaluated later.
        content: further manifest fields: classes, config, metrics, package.
    """
    tensors = {name: p.detach() for name, p in model.trainable().items()}
    tensors |= {f"text.{name}": tensor for name, tensor in heads._asdict().items()}
    portable = {name: tensor.float().cpu().contiguous() for name, tensor in tensors.items()}
    artifact.write_bytes(directory / WEIGHTS, save(portable))
    files = [
        name for name in (WEIGHTS, "config.json", "history.jsonl") if (directory / name).is_file()
    ]
    described = {
        "backbone": {
            **clip.spec.model_dump(),
            "sha256": clip.sha256,
            "architecture": clip.architecture,
        },
        "preprocess": clip.preprocess.model_dump(),
        "ncut": model.ncut.stored(),
        **content,
    }
    artifact.write_manifest(directory, SCHEMA, described, files)


def read_checkpoint(directory: Path) -> Checkpoint:
    """Read and verify a checkpoint directory.

    Raises:
        CheckpointError: missing, damaged, foreign, or with weights that are no finite numbers.
    """
    stored = artifact.read_manifest(directory, SCHEMA)
    try:
        manifest = validate(CheckpointManifest, stored)
    except UsageError as error:
        raise CheckpointError(f"{directory / artifact.MANIFEST}: {error}; restore it") from error
    if WEIGHTS not in stored["files"]:
        raise CheckpointError(f"{directory}: the manifest does not list {WEIGHTS}; restore it")
    try:
        tensors = load_file(directory / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{directory / WEIGHTS}: expected safetensors, found: {error}"
        ) from error
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise CheckpointError(
            f"{directory / WEIGHTS}: NaN or Inf in {', '.join(broken[:3])}; restore it or run again"
        )
    shapes = {name: tuple(tensors[name].shape) for name in HEADS if name in tensors}
    if len(shapes) < len(HEADS) or any(s[0] != len(manifest.classes) for s in shapes.values()):
        raise CheckpointError(
            f"{directory}: expected {', '.join(HEADS)} with {len(manifest.classes)} rows, found "
            f"{shapes}; restore it or run again"
        )
    return Checkpoint(manifest, tensors)


def load_model(
    checkpoint: Checkpoint, device: str = "cpu", *, clip: Clip | None = None
) -> MicroCLIP:
    """Rebuild the adapted model, in eval mode, on `device`.

    Args:
        checkpoint: what `read_checkpoint` returned.
        device: where the model goes.
        clip: the model behind it, if it is loaded there already.

    Raises:
        CheckpointError: the backbone cannot be loaded or is not the one that was adapted, or the
            checkpoint's tensors do not fit it.
    """
    model = initial_model(checkpoint, clip or load_backbone(checkpoint, device))
    trainable = model.trainable()
    adapted = {name: t for name, t in checkpoint.tensors.items() if not name.startswith("text.")}
    if adapted.keys() != trainable.keys():
        wrong = sorted(adapted.keys() ^ trainable.keys())
        raise CheckpointError(
            f"checkpoint: expected the backbone's tensors, differing: {wrong[:3]}; adapt again"
        )
    with torch.no_grad():
        for name, parameter in trainable.items():
            if parameter.shape != adapted[name].shape:
                raise CheckpointError(
                    f"checkpoint: {name}: expected shape {tuple(parameter.shape)}, "
                    f"found {tuple(adapted[name].shape)}; adapt again"
                )
            parameter.copy_(adapted[name])
    return model


def initial_model(checkpoint: Checkpoint, clip: Clip) -> MicroCLIP:
    """Rebuild the model as it was before adaptation: what zero-shot CLIP says."""
    manifest = checkpoint.manifest
    fusion = manifest.config.adapt
    return build_model(
        clip,
        checkpoint.heads(),
        ncut=manifest.ncut_spec(),
        cls_share=fusion.cls_share,
        pooling=fusion.pooling,
    )


def load_backbone(checkpoint: Checkpoint, device: str = "cpu") -> Clip:
    """Load the CLIP model that was adapted.

    Raises:
        CheckpointError: it cannot be loaded, or has other weights or another architecture now.
    """
    stored = checkpoint.manifest.backbone
    clip = load_clip(BackboneSpec(model=stored.model, pretrained=stored.pretrained), device)
    remedy = "adapt again or restore the old weights"
    require_same(clip, stored.sha256, stored.architecture, remedy=remedy)
    return clip


def build_model(
    clip: Clip, heads: TextHeads, *, ncut: NCutSpec, cls_share: float, pooling: Pooling
) -> MicroCLIP:
    """Assemble a model in eval mode on the backbone's device."""
    model = MicroCLIP(clip.vision, heads, ncut=ncut, cls_share=cls_share, pooling=pooling)
    return model.to(next(clip.vision.parameters()).device).eval()
