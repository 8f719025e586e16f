"""The modules that are traced into ONNX: MicroCLIP rearranged for inference, in a chosen precision.

What `MicroCLIP` computes, with everything folded that does not depend on the image: pixel scaling
and normalisation into the patch embedding, the attention scale into the query projection, the
class token into the positions, LayerScale into the output projections, SOAP's maps into one matrix
before and one after the pooling. The last block attends from the class row alone and needs no key
projection. The cut is the model's own source, `ncut.steps`.

Matrices and what runs between them are in the graph's dtype; LayerNorms, the residual stream, the
cut and the heads are float32, with explicit casts, so that no runtime decides precision on its own.
Attention may have another dtype: between int8 products it is fp16, which TensorRT fuses.

Letters: B images, S image side, N tokens, D width, E joint space, H heads, C classes.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.head import LOGIT_SCALE
from microclip_deploy.model.backbone import BlockWeights, TowerWeights
from microclip_deploy.model.microclip import MicroCLIP
from microclip_deploy.ncut.foreground import agreement_with
from microclip_deploy.ncut.spec import NCutSpec
from microclip_deploy.ncut.steps import saliency_iterative

# Pixels enter as (x - 128) / 64, which fp16 and bf16 hold exactly; folding the normalisation of raw
# 0..255 values would cancel digits.
PIXEL_CENTER = 128.0
PIXEL_SCALE = 64.0


class Tokens(NamedTuple):
    """Outputs of `BackboneGraph`."""

    cls: Tensor
    """float32 (B, E), unit rows."""
    patches: Tensor
    """float32 (B, N, D)."""


class Fused(NamedTuple):
    """Outputs of `HeadGraph`."""

    logits: Tensor
    """float32 (B, C), scale 100."""
    embedding: Tensor
    """float32 (B, E), unit rows: what the class rows are compared with."""
    fg: Tensor
    """float32 (B, E), unit rows."""
    attention: Tensor
    """float32 (B, N+1); the last column is the zero token's."""


class Everything(NamedTuple):
    """Outputs of `FullGraph`."""

    logits: Tensor
    embedding: Tensor
    cls: Tensor
    fg: Tensor
    mask: Tensor
    """bool (B, N)."""
    attention: Tensor
    complete: Tensor
    """bool (B,): the graph joins every pair of tokens."""
    residual: Tensor
    """float32 (B,): how far the cut's filter is from one eigenvector."""
    patches: Tensor
    """float32 (B, N, D): what the backbone gives the cut and the head; no output of full.onnx."""
    agreement: Tensor | None = None
    """float32 (B, N): each token's with [CLS], where the cut asks for it; no output either."""


class BackboneGraph(nn.Module):
    """uint8 (B, S, S, 3) RGB images -> Tokens."""

    def __init__(
        self,
        tower: TowerWeights,
        preprocess: Preprocess,
        dtype: torch.dtype,
        attention: torch.dtype | None = None,
    ) -> None:
        """Fold the weights in float64 and round them to `dtype` once; attend in it if not told."""
        super().__init__()
        self.dtype = dtype
        weight, offset = _folded_patch_weight(tower.patch, preprocess)
        position = tower.position.double()
        position[1:] += offset
        self.side = int(tower.patch.shape[-1])
        self.patch = _frozen(weight, dtype)
        self.position = _frozen(position, torch.float32)
        self.ln_pre = _layer_norm(tower.ln_pre) if isinstance(tower.ln_pre, nn.LayerNorm) else None
        self.blocks = nn.ModuleList(Block(block, dtype, attention) for block in tower.blocks[:-1])
        self.last = LastBlock(tower.blocks[-1], dtype)
        self.ln_post = _layer_norm(tower.ln_post)
        self.projection = _frozen(tower.projection, torch.float32)

    def forward(self, image: Tensor) -> Tokens:
        """Encode images to class embeddings and patch tokens."""
        pixels = (image.float() - PIXEL_CENTER) * (1 / PIXEL_SCALE)
        patches = self._cut(pixels.to(self.dtype)) @ self.patch
        # A zero row takes the place of the class token, whose embedding is among the positions.
        x = F.pad(patches.float(), (0, 0, 1, 0)) + self.position
        x = x if self.ln_pre is None else self.ln_pre(x)
        for block in self.blocks:
            x = block(x)
        rows = self.ln_post(self.last(x))
        return Tokens(unit(rows[:, 0] @ self.projection), rows[:, 1:])

    def _cut(self, pixels: Tensor) -> Tensor:
        """Return (B, S, S, 3) as (B, N, P P 3): a convolution of stride P is one matrix product."""
        side, grid = self.side, pixels.shape[1] // self.side
        tiles = pixels.reshape(-1, grid, side, grid, side, 3).transpose(2, 3)
        return tiles.reshape(-1, grid * grid, side * side * 3)


class HeadGraph(nn.Module):
    """cls, patches, mask and class matrix -> Fused: SOAP, TokenFusion and the classifier."""

    def __init__(self, model: MicroCLIP) -> None:
        super().__init__()
        head = model.head()
        self.cls_share, self.cls_fallback = head.cls_share, head.cls_fallback
        self.project = _frozen(torch.from_numpy(head.project), torch.float32)
        self.match = (
            None if head.match is None else _frozen(torch.from_numpy(head.match), torch.float32)
        )

    def forward(self, cls: Tensor, patches: Tensor, mask: Tensor, classifier: Tensor) -> Fused:
        """Pool the patches by their likeness to the salient ones, fuse, and classify."""
        attention = self._attention(patches, mask)
        pooled = (attention[:, None, :-1] @ patches)[:, 0]
        fg = unit(F.linear(pooled, self.project))
        if self.cls_fallback:
            fg = torch.where(mask.all(dim=1, keepdim=True), cls, fg)
        fused = self.cls_share * cls + (1 - self.cls_share) * fg
        return Fused(F.linear(LOGIT_SCALE * fused, classifier), unit(fused), fg, attention)

    def _attention(self, patches: Tensor, mask: Tensor) -> Tensor:
        weight = mask.to(patches.dtype)
        if self.match is None:  # token mean: every token alike, without asking for the batch size
            return F.pad(0 * weight + 1 / patches.shape[1], (0, 1))
        query = (weight[:, None] @ patches)[:, 0] / weight.sum(dim=1, keepdim=True).clamp(min=1)
        scores = (patches @ F.linear(query, self.match)[:, :, None])[:, :, 0]
        return F.pad(scores, (0, 1)).softmax(dim=-1)


class FullGraph(nn.Module):
    """uint8 images and class matrix -> Everything, the normalised cut inside."""

    def __init__(self, backbone: BackboneGraph, head: HeadGraph, ncut: NCutSpec) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.ncut = ncut

    def forward(self, image: Tensor, classifier: Tensor) -> tuple[Tensor, ...]:
        """Run the whole of microCLIP; return the fields of `Everything`, its last only if it is."""
        cls, patches = self.backbone(image)
        agreement: tuple[Tensor, ...] = ()
        if self.ncut.asks_cls:
            agreement = (agreement_with(cls @ self.backbone.projection.T, patches),)
        cut = saliency_iterative(patches, self.ncut, *agreement)
        logits, embedding, fg, attention = self.head(cls, patches, cut.mask, classifier)
        found = (logits, embedding, cls, fg, cut.mask, attention, cut.complete, cut.residual)
        return (*found, patches, *agreement)


class _BlockParts(nn.Module):
    """What an ordinary block and the last one share: the norms, the way out, and the MLP."""

    def __init__(self, weights: BlockWeights, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.heads = weights.heads
        self.ln_1 = _layer_norm(weights.ln_1)
        self.out = _linear(*weights.out, dtype)
        self.ln_2 = _layer_norm(weights.ln_2)
        self.up = _linear(*weights.up, dtype)
        self.activation = weights.activation
        self.down = _linear(*weights.down, dtype)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Add the attention's and the MLP's part to the residual stream, float32."""
        x = x + self.out(attended).float()
        hidden = self.activation(self.up(self.ln_2(x).to(self.dtype)))
        finished: Tensor = x + self.down(hidden).float()
        return finished

    def split(self, x: Tensor) -> Tensor:
        """Return (B, M, D) as (B, H, M, D/H)."""
        return x.reshape(-1, x.shape[1], self.heads, x.shape[2] // self.heads).transpose(1, 2)

    def join(self, x: Tensor) -> Tensor:
        """Return (B, H, M, D/H) as (B, M, D)."""
        return x.transpose(1, 2).reshape(-1, x.shape[2], x.shape[1] * x.shape[3])


class Block(_BlockParts):
    """A pre-norm attention block."""

    def __init__(
        self, weights: BlockWeights, dtype: torch.dtype, attention: torch.dtype | None = None
    ) -> None:
        super().__init__(weights, dtype)
        self.attention = attention or dtype
        self.qkv = _linear(*_scaled_queries(weights), dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Attend from every row to every row."""
        packed = self.qkv(self.ln_1(x).to(self.dtype)).to(self.attention)
        query, key, value = (self.split(part) for part in packed.chunk(3, dim=-1))
        attention = (query @ key.transpose(-1, -2)).softmax(dim=-1)
        return self.finish(x, self.join(attention @ value).to(self.dtype))


class LastBlock(_BlockParts):
    """The last block: the class row attends, the patch rows take the value path.

    Scores are q . (Wk h): Wk is applied to the one query of each head instead of to every token,
    and the key bias, the same for all tokens, drops out of the softmax.
    """

    def __init__(self, weights: BlockWeights, dtype: torch.dtype) -> None:
        super().__init__(weights, dtype)
        weight, bias = _scaled_queries(weights)
        query, key, value = weight.chunk(3)
        query_bias, _, value_bias = bias.chunk(3)
        self.query = _linear(query, query_bias, dtype)
        self.key = _frozen(key.unflatten(0, (self.heads, -1)), dtype)  # (H, D/H, D)
        self.value = _linear(value, value_bias, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Attend from the class row; the others take their values."""
        hidden = self.ln_1(x).to(self.dtype)
        query = self.split(self.query(hidden[:, :1])) @ self.key
        attention = (query[:, :, 0] @ hidden.transpose(1, 2)).softmax(dim=-1)
        value = self.value(hidden)
        attended = self.join(attention[:, :, None] @ self.split(value))
        return self.rows(x, attended, value)

    def rows(self, x: Tensor, attended: Tensor, value: Tensor) -> Tensor:
        """Return the finished rows: the class row that attended, and the patches' value path."""
        return self.finish(x, torch.cat([attended, value[:, 1:]], dim=1))


def unit(x: Tensor) -> Tensor:
    """Return rows of length 1; as `F.normalize`, in operators that need no shape at run time."""
    return x / (x * x).sum(dim=-1, keepdim=True).clamp(min=1e-24).sqrt()


def _folded_patch_weight(patch: Tensor, preprocess: Preprocess) -> tuple[Tensor, Tensor]:
    """Return the patch matrix (P P 3, D) for centred pixels, and what it adds (D,), float64."""
    mean = torch.tensor(preprocess.mean, dtype=torch.float64)
    std = torch.tensor(preprocess.std, dtype=torch.float64)
    gain, shift = PIXEL_SCALE / (255 * std), (PIXEL_CENTER / 255 - mean) / std
    weight = patch.double().permute(2, 3, 1, 0)  # (P, P, 3, D)
    offset = torch.einsum("ijcd,c->d", weight, shift)
    return (weight * gain[:, None]).flatten(0, 2), offset


def _scaled_queries(weights: BlockWeights) -> tuple[Tensor, Tensor]:
    """Return the packed projection with the attention scale on the queries, float64."""
    weight, bias = (part.double() for part in weights.qkv)
    width = weight.shape[1]
    scale = torch.ones(len(weight), 1, dtype=torch.float64)
    scale[:width] = (width // weights.heads) ** -0.5
    return weight * scale, bias * scale[:, 0]


def _layer_norm(norm: nn.LayerNorm) -> nn.LayerNorm:
    """Return the norm in float32; one ONNX operator."""
    copied = nn.LayerNorm(norm.normalized_shape, norm.eps, device="meta")
    copied.weight = _frozen(norm.weight, torch.float32)
    copied.bias = _frozen(norm.bias, torch.float32)
    return copied


def _linear(weight: Tensor, bias: Tensor, dtype: torch.dtype) -> nn.Linear:
    """Return `x W^T + b` in the graph's dtype."""
    made = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    made.weight, made.bias = _frozen(weight, dtype), _frozen(bias, dtype)
    return made


def _frozen(tensor: Tensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(tensor.detach().to(dtype).contiguous(), requires_grad=False)
