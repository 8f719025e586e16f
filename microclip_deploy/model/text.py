"""Class texts -> the two-headed classifier: frozen prior, learnable start, and names alone."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from microclip_deploy.data.classes import ClassTexts
from microclip_deploy.model.clip import TextEncoder


class TextHeads(NamedTuple):
    """Three class matrices, float32 (C, E), unit rows."""

    names: Tensor
    """u: the class names alone, as plain zero-shot CLIP uses them."""
    frozen: Tensor
    """F: descriptions weighted by their cosine to the name; the stable prior, never trained."""
    initial: Tensor
    """Where the learnable head starts: the plain mean of the descriptions."""


def text_heads(encode: TextEncoder, texts: ClassTexts) -> TextHeads:
    """Encode names and descriptions with the text tower and build the heads."""
    prompts = [template.replace("{}", name) for name in texts.names for template in texts.templates]
    named = encode(prompts).unflatten(0, (len(texts.names), len(texts.templates)))
    flat = encode([text for group in texts.descriptions for text in group])
    return heads_from_embeddings(named, flat.split([len(group) for group in texts.descriptions]))


def heads_from_embeddings(prompts: Tensor, descriptions: Sequence[Tensor]) -> TextHeads:
    """Build the heads from raw text embeddings.

    Args:
        prompts: float (C, T, E), raw embeddings of the T templates of each class name. They are
            averaged without normalising them one by one.
        descriptions: one float (M_c, E) tensor a class, raw.

    Source: docs/numerics.md section 4. A weight sum of zero, which the method leaves as NaN,
    falls back to the unweighted mean.
    """
    names = F.normalize(prompts.mean(dim=1), dim=-1)
    frozen, initial = [], []
    for name, raw in zip(names, descriptions, strict=True):
        unit = F.normalize(raw, dim=-1)
        mean = unit.mean(dim=0)
        weight = unit @ name
        total = weight.sum()
        weighted = (weight[:, None] * unit).sum(dim=0) / total
        frozen.append(mean if total == 0 else weighted)
        initial.append(mean)
    return TextHeads(
        names, F.normalize(torch.stack(frozen), dim=-1), F.normalize(torch.stack(initial), dim=-1)
    )
