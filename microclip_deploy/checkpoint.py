"""The adapted checkpoint: trained tensors, class heads and settings in one verified directory.

Frozen weights of the backbone are not copied: the manifest names their source and their hash, and
loading refuses other ones. See docs/artifacts.md.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from microclip_deploy import artifact
from microclip_deploy.backbone import BackboneSpec, Clip, load_clip
from microclip_deploy.errors import CheckpointError
from microclip_deploy.model import MicroCLIP, Pooling
from microclip_deploy.ncut.spec import NCutSpec
from microclip_deploy.preprocess import Preprocess
from microclip_deploy.text import TextHeads

SCHEMA = "microclip.checkpoint/1"
WEIGHTS = "weights.safetensors"


class Checkpoint(NamedTuple):
    """A checkpoint read from disk and verified."""

    manifest: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the logits."""
        return tuple(self.manifest["classes"])

    @property
    def preprocess(self) -> Preprocess:
        """How pixels become the network's input."""
        return Preprocess(**self.manifest["preprocess"])

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
        "backbone": {**clip.spec.model_dump(), "sha256": clip.sha256},
        "preprocess": clip.preprocess.model_dump(),
        "ncut": {**model.ncut.model_dump(), "fingerprint": model.ncut.fingerprint()},
        **content,
    }
    artifact.write_manifest(directory, SCHEMA, described, files)


def read_checkpoint(directory: Path) -> Checkpoint:
    """Read and verify a checkpoint directory.

    Raises:
        CheckpointError: missing, damaged, foreign, or with weights that are no finite numbers.
    """
    manifest = artifact.read_manifest(directory, SCHEMA)
    try:
        tensors = load_file(directory / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{directory / WEIGHTS}: expected safetensors, found: {error}"
        ) from error
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise CheckpointError(f"{directory / WEIGHTS}: NaN or Inf in {', '.join(broken[:3])}")
    return Checkpoint(manifest, tensors)


def load_model(checkpoint: Checkpoint, device: str = "cpu") -> MicroCLIP:
    """Rebuild the adapted model, in eval mode, on `device`.

    Raises:
        CheckpointError: the backbone cannot be loaded or is not the one that was adapted, or the
            checkpoint's tensors do not fit it.
    """
    model = initial_model(checkpoint, device)
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
                    f"found {tuple(adapted[name].shape)}"
                )
            parameter.copy_(adapted[name])
    return model


def initial_model(checkpoint: Checkpoint, device: str = "cpu") -> MicroCLIP:
    """Rebuild the model as it was before adaptation: what zero-shot CLIP says."""
    stored = checkpoint.manifest["backbone"]
    spec = BackboneSpec(model=stored["model"], pretrained=stored["pretrained"])
    clip = load_clip(spec, device)
    if clip.sha256 != stored["sha256"]:
        raise CheckpointError(
            f"backbone {spec.model}/{spec.pretrained}: expected weights with sha256 "
            f"{stored['sha256'][:12]}, found {clip.sha256[:12]}; "
            "adapt again or restore the old weights"
        )
    adapt = checkpoint.manifest["config"]["adapt"]
    ncut = {k: v for k, v in checkpoint.manifest["ncut"].items() if k != "fingerprint"}
    return build_model(
        clip,
        checkpoint.heads(),
        ncut=NCutSpec(**ncut),
        cls_share=adapt["cls_share"],
        pooling=adapt["pooling"],
    ).to(device)


def build_model(
    clip: Clip, heads: TextHeads, *, ncut: NCutSpec, cls_share: float, pooling: Pooling
) -> MicroCLIP:
    """Assemble a model in eval mode on the backbone's device."""
    model = MicroCLIP(clip.vision, heads, ncut=ncut, cls_share=cls_share, pooling=pooling)
    return model.to(next(clip.vision.parameters()).device).eval()
