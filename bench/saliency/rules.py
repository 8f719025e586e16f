"""Every rule of the cut on the same tokens: encoded once, and solved once an affinity."""

import copy
from collections.abc import Iterable
from itertools import product
from types import SimpleNamespace
from typing import NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from open_clip.model import resize_pos_embed
from torch import Tensor, nn

from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.errors import UsageError
from microclip_deploy.model.backbone import VisionBackbone
from microclip_deploy.model.soap import SOAP
from microclip_deploy.ncut.foreground import agreement_with, bipartition
from microclip_deploy.ncut.spec import NCutSpec
from microclip_deploy.ncut.steps import adjacency, fiedler_exact

AFFINITIES, _THRESHOLDS, _SIDES = (
    get_args(NCutSpec.model_fields[name].annotation) for name in ("affinity", "threshold", "side")
)
RULES: tuple[str, ...] = tuple(map(", ".join, product(_THRESHOLDS, _SIDES)))
"""Threshold and side, the method's own first."""
METHOD, OBJECT = RULES[0], "otsu, object"


class Cuts(NamedTuple):
    """What the rules make of B images with one affinity; R rules in the order of `RULES`."""

    mask: NDArray[np.bool_]
    """(B, R, N)."""
    undefined: NDArray[np.bool_]
    """(B, R): the vector is, so the mask is every token, and `ncut.fallback` decides."""
    complete: NDArray[np.bool_]
    """(B, R): every pair of tokens is joined, whatever the rule."""
    effective: NDArray[np.float64]
    """(B, R): SOAP's effective number of tokens, exp of its attention's entropy."""
    likeness: NDArray[np.float64]
    """(B, R): cosine of [FG], pooled with this mask, and [CLS]."""


@torch.no_grad()
def cut_all(
    backbone: VisionBackbone, preprocess: Preprocess, batches: Iterable[NDArray[np.uint8]]
) -> dict[str, Cuts]:
    """Return affinity -> what all rules make of the images.

    Args:
        backbone: on the CPU.
        preprocess: its normalisation.
        batches: uint8 (B, S, S, 3) test views; at least one.
    """
    soap = SOAP(backbone.width)  # identity maps: as before any training
    parts: dict[str, list[Cuts]] = {affinity: [] for affinity in AFFINITIES}
    for images in batches:
        cls, patches = backbone(preprocess.normalize(torch.from_numpy(images)))
        for affinity, cuts in parts.items():
            cuts.append(_cut(backbone, soap, cls, patches, affinity))
    return {
        name: Cuts(*map(np.concatenate, zip(*cuts, strict=True))) for name, cuts in parts.items()
    }


def at_size(backbone: VisionBackbone, side: int) -> VisionBackbone:
    """Return the tower for another size of images, its positions resized as open_clip does it.

    Args:
        backbone: of any size.
        side: S, pixels.

    Raises:
        UsageError: the side is not at least two patches, or no whole number of them.
    """
    patch = int(backbone.visual.patch_size[0])
    if side % patch or side < 2 * patch:
        raise UsageError(f"--sizes: expected multiples of {patch}, at least two, found {side}")
    visual = copy.deepcopy(backbone.visual)
    visual.image_size, visual.grid_size = (side, side), (side // patch, side // patch)
    state = {"visual.positional_embedding": visual.positional_embedding.detach()}
    resize_pos_embed(state, SimpleNamespace(visual=visual))
    positions = state["visual.positional_embedding"]
    visual.positional_embedding = nn.Parameter(positions, requires_grad=False)
    return VisionBackbone(visual)


def _cut(backbone: VisionBackbone, soap: SOAP, cls: Tensor, patches: Tensor, affinity: str) -> Cuts:
    """Solve once, and split by every rule; `ncut.steps.saliency_exact` gives the same masks."""
    agreement = agreement_with(backbone.unproject(cls), patches)
    spec = NCutSpec.model_validate({"affinity": affinity})
    edges = adjacency(patches, spec)
    fiedler = fiedler_exact(edges, spec)
    found = []
    for threshold, side in product(_THRESHOLDS, _SIDES):
        rule = spec.model_copy(update={"threshold": threshold, "side": side})
        cut = bipartition(patches, edges, fiedler, spec.tie_tolerance, rule, agreement)
        vector, attention = soap(patches, cut.mask)
        entropy = torch.special.entr(attention.double()).sum(dim=1)
        likeness = (backbone.project(vector) * cls).sum(dim=1)
        found.append((cut.mask, cut.degenerate, cut.complete, entropy.exp(), likeness.double()))
    return Cuts(*(torch.stack(parts, dim=1).numpy() for parts in zip(*found, strict=True)))
