"""The specified algorithm done plainly: what the product is compared with, for speed and equality.

Every block also computes its value path, as reading the specification word by word suggests; the
views go through the encoder one after another, each with its patch tokens; the graph of each image
is solved by itself, with one look at its numbers from the host. Slow, and short enough to check by
eye against docs/numerics.md.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn

from microclip_deploy.adapt.train_step import AdaptConfig, Views
from microclip_deploy.errors import UsageError
from microclip_deploy.model.microclip import MicroCLIP
from microclip_deploy.model.soap import SOAP
from microclip_deploy.ncut.spec import NCutSpec

SPEC = NCutSpec()
"""The constants are the product's; the algorithm below is not."""


class PlainOutput(NamedTuple):
    """[CLS] and [FG] embeddings, float (B, E), unit rows, and logits (B, C)."""

    cls: Tensor
    fg: Tensor
    logits: Tensor


class PlainMicroCLIP(nn.Module):
    """microCLIP word by word, with the very weights of a model."""

    frozen: Tensor

    def __init__(self, model: MicroCLIP, soap: SOAP) -> None:
        super().__init__()
        self.visual = model.backbone.visual
        self.soap = soap
        self.classifier = model.classifier
        self.register_buffer("frozen", model.frozen)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return cls (B, E) and tokens (B, N, D), with the value path in every block."""
        visual = self.visual
        x = visual._embeds(images)
        value_path = x
        for block in visual.transformer.resblocks:
            value_path = self._value_path(block, x)
            x = block(x)
        cls = F.normalize(visual.ln_post(x[:, 0]) @ visual.proj, dim=-1)
        return cls, visual.ln_post(value_path)[:, 1:]

    def forward(self, images: Tensor) -> PlainOutput:
        """Encode, cut, pool and classify a batch."""
        cls, tokens = self.encode(images)
        masks = torch.stack([cut(image) for image in tokens.detach()])
        fg = self._pool(tokens, masks)
        matrix = F.normalize(self.classifier, dim=-1)
        return PlainOutput(cls, fg, 50 * cls @ matrix.T + 50 * fg @ matrix.T)

    def _value_path(self, block: ResidualAttentionBlock, x: Tensor) -> Tensor:
        """Project queries, keys and values out, as the reference code does, and use the values."""
        weight, bias = block.attn.in_proj_weight, block.attn.in_proj_bias
        packed = F.linear(block.ln_1(x), weight, bias).chunk(3, dim=-1)
        _query, _key, value = (block.attn.out_proj(part) for part in packed)
        v = x + value
        rows: Tensor = v + block.mlp(block.ln_2(v))
        return rows

    def _pool(self, tokens: Tensor, masks: Tensor) -> Tensor:
        weight = masks.to(tokens.dtype)[:, :, None]
        query = (weight * tokens).sum(1) / weight.sum(1).clamp(min=1)
        padded = F.pad(tokens, (0, 0, 0, 1))
        scores = self.soap.query_proj(query)[:, None] @ self.soap.key_proj(padded).transpose(1, 2)
        attention = (scores / math.sqrt(tokens.shape[-1])).softmax(-1)
        return F.normalize(
            (attention @ self.soap.value_proj(padded))[:, 0] @ self.visual.proj, dim=-1
        )


def plain_of(model: MicroCLIP) -> PlainMicroCLIP:
    """Return the plain algorithm on a model's weights: training one moves both.

    Raises:
        UsageError: the model is not the specified one: another pooling, affinity or share of [CLS].
    """
    same = model.ncut == SPEC and model.cls_share == 0.5
    if not same or not isinstance(model.pooling, SOAP):
        raise UsageError(
            "the plain algorithm: expected the method's own settings, found another pooling, ncut "
            "or cls_share"
        )
    return PlainMicroCLIP(model, model.pooling)


def cut(tokens: Tensor) -> Tensor:
    """Return the NCut mask bool (N,) of one image's tokens (N, D)."""
    affinity = torch.where(tokens @ tokens.T > SPEC.tau, 1.0, SPEC.eps).float()
    if (affinity == 1).all().item():  # complete: no eigenvector to speak of
        return torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
    degree = affinity.sum(1)
    scale = 1 / (degree.sqrt() + SPEC.eps)
    laplacian = scale[:, None] * (torch.diag(degree) - affinity) * scale
    vector = torch.linalg.eigh(laplacian)[1][:, 1]
    if vector[vector.abs().argmax()].item() < 0:  # the host waits for every image
        vector = -vector
    mask = vector > vector.std()
    return mask if mask.any().item() else torch.ones_like(mask)


def plain_step(
    model: PlainMicroCLIP, optimizer: torch.optim.Optimizer, views: Views, config: AdaptConfig
) -> Tensor:
    """Label a batch, learn from it once, and return the loss."""
    matrix = F.normalize(model.classifier, dim=-1)
    with torch.no_grad():
        weak = model(views.weak)
        crops = torch.stack([model.encode(crop)[0] for crop in views.crops.unbind(1)], dim=1)
        relevance = (crops @ weak.cls[:, :, None]).softmax(dim=1)
        prior = F.normalize((relevance * crops).sum(1), dim=-1)
        fused = F.normalize(0.5 * weak.cls + 0.5 * weak.fg, dim=-1)
        labels = (
            config.gamma * prior @ model.frozen.T + (1 - config.gamma) * fused @ matrix.T
        ).argmax(1)
    logits = model(views.strong).logits
    average = logits.softmax(-1).mean(0)
    loss: Tensor = (
        F.cross_entropy(logits, labels) - config.fairness_weight * 2 * average.log().mean()
    )
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()
