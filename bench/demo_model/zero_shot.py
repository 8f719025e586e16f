"""What a tiny CLIP scores without adaptation: its global and its fine-grained branch.

The branches are those of adaptation before its first step: the same backbone, saliency graph and
pooling, with identity maps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from microclip_deploy.bench.demo_model.pool import ImagePool
from microclip_deploy.demo.glyphs import CLASS_CHARACTERS, descriptions, glyph_name
from microclip_deploy.model.backbone import VisionBackbone
from microclip_deploy.model.saliency import saliency
from microclip_deploy.model.soap import SOAP
from microclip_deploy.ncut.spec import NCutSpec
from microclip_deploy.ncut.steps import Saliency

__all__ = [
    "TEMPLATES",
    "Branches",
    "ClassWeights",
    "Encoder",
    "class_weights",
    "images_to_tensor",
    "score",
]

TEMPLATES = ("{}", "a photo of {}", "the {}", "a picture of {}")
Tokenizer = Callable[[list[str]], Tensor]
_BATCH = 256


class ClassWeights(NamedTuple):
    """Text classifiers over the 82 classes, float32 (82, E), rows L2-normalised."""

    names: Tensor
    descriptions: Tensor


class Branches(NamedTuple):
    """Both readings of a batch of images.

    Attributes:
        cls: float32 (B, E), unit rows.
        fg: float32 (B, E), unit rows: value-path tokens pooled by SOAP with identity maps.
        patches: float32 (B, N, D), value-path tokens, not normalised.
        found: the saliency of each image.
    """

    cls: Tensor
    fg: Tensor
    patches: Tensor
    found: Saliency


class Encoder(nn.Module):
    """The image side of an unadapted microCLIP; gradients reach the visual tower only."""

    def __init__(self, visual: nn.Module) -> None:
        """Read an open_clip visual tower in place."""
        super().__init__()
        self.backbone = VisionBackbone(visual)
        self.pooling = SOAP(self.backbone.width).requires_grad_(False)
        self.ncut = NCutSpec()

    def forward(self, images: Tensor) -> Branches:
        """Encode float32 (B, 3, 64, 64) in [-1, 1]."""
        cls, patches = self.backbone(images)
        found = saliency(patches.detach(), self.ncut)
        fg = self.backbone.project(self.pooling(patches, found.mask).vector)
        return Branches(cls, fg, patches, found)


@torch.no_grad()
def class_weights(encode_text: Callable[[Tensor], Tensor], tokenizer: Tokenizer) -> ClassWeights:
    """Embed names (mean over templates) and descriptions (mean over sentences)."""

    def mean_embedding(texts: Sequence[str]) -> Tensor:
        embedded = functional.normalize(encode_text(tokenizer(list(texts))), dim=-1)
        return functional.normalize(embedded.mean(0), dim=-1)

    names = [mean_embedding([t.format(glyph_name(c)) for t in TEMPLATES]) for c in CLASS_CHARACTERS]
    sentences = [mean_embedding(descriptions(c)) for c in CLASS_CHARACTERS]
    return ClassWeights(torch.stack(names), torch.stack(sentences))


@torch.no_grad()
def score(encoder: Encoder, weights: ClassWeights, pool: ImagePool) -> dict[str, float]:
    """Return accuracies in percent and statistics of the saliency graphs.

    Args:
        encoder: reads the images.
        weights: text classifiers.
        pool: images whose labels index `CLASS_CHARACTERS`.

    Returns:
        "{cls,fg,fused}_{names,descriptions}", "complete_graphs" (percent of images whose graph
        has every edge) and "mask_share" (mean percent of tokens in the foreground).
    """
    starts = range(0, len(pool.images), _BATCH)
    inputs = (images_to_tensor(pool.images[start : start + _BATCH]) for start in starts)
    batches = [cast(Branches, encoder(batch)) for batch in inputs]
    branches = {
        "cls": torch.cat([batch.cls for batch in batches]),
        "fg": torch.cat([batch.fg for batch in batches]),
    }
    branches["fused"] = branches["cls"] + branches["fg"]
    truth = torch.from_numpy(pool.labels)
    scores = {
        f"{branch}_{wording}": _accuracy(embedded @ matrix.T, truth)
        for branch, embedded in branches.items()
        for wording, matrix in weights._asdict().items()
    }
    scores["complete_graphs"] = _percent(torch.cat([batch.found.complete for batch in batches]))
    scores["mask_share"] = _percent(torch.cat([batch.found.mask for batch in batches]))
    return scores


def images_to_tensor(images: NDArray[np.uint8]) -> Tensor:
    """Return float32 (B, 3, H, W) in [-1, 1] from uint8 (B, H, W, 3)."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def _accuracy(logits: Tensor, truth: Tensor) -> float:
    return _percent(logits.argmax(1) == truth)


def _percent(hits: Tensor) -> float:
    return round(100 * hits.float().mean().item(), 2)
