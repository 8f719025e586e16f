"""What a tiny CLIP scores without adaptation: its global and its fine-grained branch.

The branches are those of adaptation before its first step: the same backbone, saliency graph and
pooling, with identity maps.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle, islice
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from microclip_deploy.demo.letters.glyphs import CLASS_CHARACTERS, descriptions, glyph_name
from microclip_deploy.demo.letters.render import Domain, PrintStyle, image_generator, render_glyph
from microclip_deploy.model.backbone import VisionBackbone
from microclip_deploy.model.saliency import saliency
from microclip_deploy.model.soap import SOAP
from microclip_deploy.ncut.foreground import Saliency
from microclip_deploy.ncut.spec import NCutSpec

TEMPLATES = ("{}", "a photo of {}", "the {}", "a picture of {}")
_BATCH = 256


class ImagePool(NamedTuple):
    """Rendered images; image i shows character i modulo their number."""

    images: NDArray[np.uint8]
    """(B, 64, 64, 3)."""
    labels: NDArray[np.int64]
    """(B,), index into the characters the pool was made of."""
    styles: list[PrintStyle]
    """What each image's print looks like."""


class Branches(NamedTuple):
    """Both readings of a batch of images."""

    cls: Tensor
    """float32 (B, E), unit rows."""
    fg: Tensor
    """float32 (B, E), unit rows: value-path tokens pooled by SOAP with identity maps."""
    patches: Tensor
    """float32 (B, N, D), value-path tokens, not normalised."""
    saliency: Saliency


class Encoder:
    """The image side of an unadapted microCLIP; gradients reach the visual tower only."""

    def __init__(self, visual: nn.Module) -> None:
        """Read an open_clip visual tower in place."""
        self.backbone = VisionBackbone(visual)
        self.pooling = SOAP(self.backbone.width).requires_grad_(False)

    def __call__(self, images: Tensor) -> Branches:
        """Encode float32 (B, 3, 64, 64) in [-1, 1]."""
        cls, patches = self.backbone(images)
        seen = saliency(patches.detach(), NCutSpec())
        fg = self.backbone.project(self.pooling(patches, seen.mask).vector)
        return Branches(cls, fg, patches, seen)


def render_pool(characters: str, domain: Domain, count: int, *, seed: int, split: int) -> ImagePool:
    """Render `count` images; `seed` and `split` decide their random numbers."""
    glyphs = [
        render_glyph(character, domain, image_generator(seed, split, index))
        for index, character in enumerate(islice(cycle(characters), count))
    ]
    images = np.stack([glyph.image for glyph in glyphs])
    labels = np.arange(count) % len(characters)
    return ImagePool(images, labels, [glyph.style for glyph in glyphs])


def pixels(images: NDArray[np.uint8]) -> Tensor:
    """Return float32 (B, 3, H, W) in [-1, 1] from uint8 (B, H, W, 3)."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1)


@torch.no_grad()
def class_weights(
    encode_text: Callable[[Tensor], Tensor], tokenizer: Callable[[list[str]], Tensor]
) -> dict[str, Tensor]:
    """Return text classifiers over the 82 classes, float32 (82, E), rows L2-normalised.

    Returns:
        "names", means over templates, and "descriptions", means over sentences.
    """

    def mean_embedding(texts: Sequence[str]) -> Tensor:
        embedded = F.normalize(encode_text(tokenizer(list(texts))), dim=-1)
        return F.normalize(embedded.mean(0), dim=-1)

    names = [mean_embedding([t.format(glyph_name(c)) for t in TEMPLATES]) for c in CLASS_CHARACTERS]
    sentences = [mean_embedding(descriptions(c)) for c in CLASS_CHARACTERS]
    return {"names": torch.stack(names), "descriptions": torch.stack(sentences)}


@torch.no_grad()
def score(encoder: Encoder, weights: Mapping[str, Tensor], pool: ImagePool) -> dict[str, float]:
    """Return accuracies in percent and statistics of the saliency graphs.

    Args:
        encoder: reads the images.
        weights: text classifiers by wording.
        pool: images whose labels index `CLASS_CHARACTERS`.

    Returns:
        "{cls,fg,fused}_WORDING", "complete_graphs" (percent of images whose graph
        has every edge) and "mask_share" (mean percent of tokens in the foreground).
    """
    starts = range(0, len(pool.images), _BATCH)
    batches = [encoder(pixels(pool.images[start : start + _BATCH])) for start in starts]
    cls, fg = (torch.cat(parts) for parts in ([b.cls for b in batches], [b.fg for b in batches]))
    truth = torch.from_numpy(pool.labels)
    scores = {
        f"{branch}_{wording}": _percent((embedded @ matrix.T).argmax(1) == truth)
        for branch, embedded in {"cls": cls, "fg": fg, "fused": cls + fg}.items()
        for wording, matrix in weights.items()
    }
    scores["complete_graphs"] = _percent(torch.cat([b.saliency.complete for b in batches]))
    scores["mask_share"] = _percent(torch.cat([b.saliency.mask for b in batches]))
    return scores


def _percent(hits: Tensor) -> float:
    return round(100 * hits.float().mean().item(), 2)
