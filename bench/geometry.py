"""Models of the size of well-known ones, with random weights: for speed and for equality."""

import logging
from typing import Any, NamedTuple

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer

from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.errors import CheckpointError, UsageError
from microclip_deploy.model.backbone import VisionBackbone
from microclip_deploy.model.microclip import MicroCLIP
from microclip_deploy.model.text import TextHeads
from microclip_deploy.ncut.spec import NCutSpec

CLASSES = 100

TINY = "tiny"
"""No name of open_clip's: three narrow layers, for quick runs of a script."""

_TINY_CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 64, "patch_size": 8, "head_width": 32},
    "text_cfg": {"context_length": 16, "vocab_size": 512, "width": 32, "heads": 1, "layers": 1},
}


class Geometry(NamedTuple):
    """A vision tower and class matrices, and what its pixels look like."""

    visual: VisionTransformer
    heads: TextHeads
    preprocess: Preprocess

    def model(self) -> MicroCLIP:
        """Assemble the product's model, in eval mode."""
        return MicroCLIP(VisionBackbone(self.visual), self.heads, ncut=NCutSpec()).eval()


def random_geometry(name: str) -> Geometry:
    """Build a tower; the same weights for the same name.

    LayerNorm gains and biases are disturbed as training would: at their initial values half of the
    arithmetic is the identity.

    Args:
        name: open_clip model name, or "tiny".

    Raises:
        UsageError: no vision transformer with a class token.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        visual = _clip(name).visual.requires_grad_(False)
        try:
            VisionBackbone(visual)
        except CheckpointError as problem:
            raise UsageError(f"{name}: {problem}") from problem
        for parameter_name, parameter in visual.named_parameters():
            if "ln_" in parameter_name:
                parameter.add_(0.1 * torch.randn_like(parameter))
        matrix = F.normalize(torch.randn(CLASSES, visual.proj.shape[1]), dim=-1)
    preprocess = Preprocess(
        size=visual.image_size[0],
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
    )
    return Geometry(visual, TextHeads(matrix, matrix, matrix), preprocess)


def _clip(name: str) -> Any:
    """Return open_clip's model without its warning of random weights, which are wanted here."""
    if name == TINY:
        return open_clip.model.CLIP(**_TINY_CONFIG)
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        return open_clip.create_model(name, pretrained=None)
    finally:
        root.setLevel(level)
