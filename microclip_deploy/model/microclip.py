"""MicroCLIP: images -> class embedding, fine-grained embedding, saliency and logits."""

import copy
import math
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from microclip_deploy.head import Head
from microclip_deploy.model.backbone import VisionBackbone
from microclip_deploy.model.saliency import saliency
from microclip_deploy.model.soap import SOAP, TokenMean
from microclip_deploy.model.text import TextHeads
from microclip_deploy.model.token_fusion import fused_logits
from microclip_deploy.ncut.foreground import Saliency, agreement_with
from microclip_deploy.ncut.spec import NCutSpec

Pooling = Literal["soap", "mean"]


class Output(NamedTuple):
    """What the model says about a batch of images."""

    cls: Tensor
    """float32 (B, E), unit rows: the [CLS] embedding."""
    fg: Tensor
    """float32 (B, E), unit rows: the [FG] embedding."""
    logits: Tensor
    """float32 (B, C): TokenFusion's logits, scale 100."""
    attention: Tensor
    """float32 (B, N+1): SOAP's weights; the last column is the zero token's."""
    saliency: Saliency
    """NCut mask (B, N) with its vector and its degenerate and complete flags (B,)."""


class MicroCLIP(nn.Module):
    """A ViT with SOAP, TokenFusion and the two-headed classifier.

    Trainable: every LayerNorm of the ViT, the pooling's maps, and the class matrix. Everything
    else is frozen. The encoder may run under autocast; the graph and all that follows it run in
    float32, because products near tau decide edges.
    """

    frozen: Tensor
    names: Tensor

    def __init__(
        self,
        backbone: VisionBackbone,
        heads: TextHeads,
        *,
        ncut: NCutSpec,
        cls_share: float = 0.5,
        pooling: Pooling = "soap",
    ) -> None:
        """Assemble the model in its initial state: identity maps, class matrix from the texts.

        Frozen weights are shared with `backbone`, which adaptation leaves as it is.
        """
        super().__init__()
        self.backbone = _with_own_layer_norms(backbone)
        self.pooling = SOAP(backbone.width) if pooling == "soap" else TokenMean()
        self.classifier = nn.Parameter(heads.initial.clone())
        self.register_buffer("frozen", heads.frozen.clone())
        self.register_buffer("names", heads.names.clone())
        self.ncut = ncut
        self.cls_share = cls_share
        for name, parameter in self.backbone.named_parameters():
            parameter.requires_grad_(is_layer_norm(name))

    def forward(self, images: Tensor) -> Output:
        """Look at float (B, 3, S, S) images that `Preprocess.normalize` made."""
        cls, patches = self.backbone(images)
        with torch.autocast(images.device.type, enabled=False):
            cls, patches = _at_least_float32(cls), _at_least_float32(patches)
            found = saliency(patches.detach(), self.ncut, self.agreement(cls, patches))
            fused = self.fuse(cls, patches, found.mask)
        return Output(cls, *fused, found)

    def agreement(self, cls: Tensor, patches: Tensor) -> Tensor | None:
        """Return each token's agreement with [CLS], float32 (B, N), where the cut asks for it."""
        if not self.ncut.asks_cls:
            return None
        found: Tensor = agreement_with(self.backbone.unproject(cls), patches).detach()
        return found

    def fuse(self, cls: Tensor, patches: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return [FG] (B, E), logits (B, C) and SOAP's weights (B, N+1) of tokens and their mask.

        Args:
            cls: float (B, E), unit rows.
            patches: float (B, N, D).
            mask: bool (B, N).
        """
        vector, attention = self.pooling(patches, mask)
        fg = self.backbone.project(vector)
        if self.ncut.fallback == "cls":
            fg = torch.where(mask.all(dim=1, keepdim=True), cls, fg)
        return fg, fused_logits(cls, fg, self.class_matrix(), self.cls_share), attention

    def encode_cls(self, images: Tensor) -> Tensor:
        """Return only the [CLS] embedding, float32 (B, E): cheaper, and all that crops need."""
        return _at_least_float32(self.backbone.encode_cls(images))

    def class_matrix(self) -> Tensor:
        """Return the learnable classifier with unit rows, (C, E)."""
        return F.normalize(self.classifier, dim=-1)

    def head(self) -> Head:
        """Return what follows the encoder, folded in float64 and rounded once, on the host."""
        project = self.backbone.weights().projection.double().T
        match: Tensor | None = None
        if isinstance(self.pooling, SOAP):
            maps = (self.pooling.query_proj, self.pooling.key_proj, self.pooling.value_proj)
            query, key, value = (linear.weight.detach().double() for linear in maps)
            match, project = key.T @ query / math.sqrt(len(query)), project @ value
        folded = None if match is None else _on_host(match)
        return Head(
            folded,
            _on_host(project),
            _on_host(self.class_matrix()),
            self.cls_share,
            self.ncut.fallback == "cls",
        )

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the trained tensors by name, in a fixed order."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


def _with_own_layer_norms(backbone: VisionBackbone) -> VisionBackbone:
    """Copy a backbone, but for what is never trained."""
    frozen = {id(p): p for name, p in backbone.named_parameters() if not is_layer_norm(name)}
    return copy.deepcopy(backbone, frozen)


def is_layer_norm(name: str) -> bool:
    """Say whether a backbone parameter belongs to a LayerNorm (ln_pre, ln_1, ln_2, ln_post)."""
    return ".ln_" in f".{name}"


def _on_host(matrix: Tensor) -> NDArray[np.float32]:
    return matrix.detach().float().cpu().contiguous().numpy()


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
