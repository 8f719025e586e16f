"""An open_clip ViT as microCLIP needs it: a class embedding and value-path patch tokens.

The only module that knows the insides of open_clip's towers. The blocks are run batch-first with
one fused projection; the last block computes attention for the class row alone and sends the patch
rows down its value path, sharing the value projection, the output projection and the MLP.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from microclip_deploy.errors import CheckpointError

WORKING_MODELS = (
    "open_clip vision transformers with a class token do, such as ViT-B-32, ViT-B-16, ViT-L-14, "
    "ViT-L-14-336 and their -quickgelu forms"
)


class Tokens(NamedTuple):
    """What the encoder sees in a batch of images."""

    cls: Tensor
    """float (B, E), L2-normalised class embedding in the joint space."""
    patches: Tensor
    """float (B, N, D), value-path patch tokens after ln_post: neither projected nor normalised."""


class BlockWeights(NamedTuple):
    """A plain pre-norm block as matrices, applied as `x W^T + b`; LayerScale is folded in."""

    ln_1: nn.LayerNorm
    qkv: tuple[Tensor, Tensor]
    """(3D, D) and (3D,): queries, keys and values, stacked."""
    out: tuple[Tensor, Tensor]
    ln_2: nn.LayerNorm
    up: tuple[Tensor, Tensor]
    activation: nn.Module
    down: tuple[Tensor, Tensor]
    heads: int


class TowerWeights(NamedTuple):
    """A vision tower taken apart."""

    patch: Tensor
    """(D, 3, P, P): the convolution that cuts patches, stride P, no bias."""
    position: Tensor
    """(1+N, D); the class embedding is added to the first row."""
    ln_pre: nn.Module
    blocks: tuple[BlockWeights, ...]
    ln_post: nn.LayerNorm
    projection: Tensor
    """(D, E), applied as `x P`."""


class VisionBackbone(nn.Module):
    """An open_clip VisionTransformer read through its parameters.

    Source: docs/numerics.md section 1; MaskCLIP for the value path.
    """

    def __init__(self, visual: VisionTransformer) -> None:
        """Accept the tower or say what it lacks.

        Raises:
            CheckpointError: the tower has no class token, projection or plain blocks.
        """
        super().__init__()
        _require_supported(visual)
        self.visual = visual
        self.width = int(visual.conv1.out_channels)
        self.embed_dim = int(visual.proj.shape[1])
        self.grid = int(visual.grid_size[0])
        self.checkpointing = False
        """Whether blocks are computed again for their gradient, in place of kept."""

    def forward(self, images: Tensor) -> Tokens:
        """Encode float (B, 3, S, S) normalised images to a class embedding and patch tokens."""
        rows = self._last_block(self._trunk(images), patches=True)
        return Tokens(self.project(rows[:, 0]), rows[:, 1:])

    def encode_cls(self, images: Tensor) -> Tensor:
        """Encode images to the class embedding (B, E) alone; equals `forward(images).cls`."""
        return self.project(self._last_block(self._trunk(images), patches=False)[:, 0])

    def project(self, x: Tensor) -> Tensor:
        """Map float (..., D) to the joint space: float (..., E), L2-normalised."""
        return F.normalize(x @ self.visual.proj, dim=-1)

    def unproject(self, cls: Tensor) -> Tensor:
        """Map embeddings (..., E) back among the tokens: float (..., D), P cls.

        Its product with a token is that of the projected token with the embedding.
        """
        found: Tensor = cls @ self.visual.proj.T
        return found

    def weights(self) -> TowerWeights:
        """Return the tower's weights for other implementations of it; nothing is copied twice."""
        visual = self.visual
        position = visual.positional_embedding.detach().clone()
        position[0] += visual.class_embedding.detach()
        blocks = tuple(_block_weights(block) for block in visual.transformer.resblocks)
        patch, projection = visual.conv1.weight.detach(), visual.proj.detach()
        return TowerWeights(patch, position, visual.ln_pre, blocks, visual.ln_post, projection)

    def _trunk(self, images: Tensor) -> Tensor:
        """Return the input of the last block, (B, 1+N, D): the "penultimate layer"."""
        visual = self.visual
        patches = visual.conv1(images).flatten(2).transpose(1, 2)
        cls = visual.class_embedding.expand(len(patches), 1, -1).to(patches.dtype)
        x: Tensor = visual.ln_pre(torch.cat([cls, patches], dim=1) + visual.positional_embedding)
        again = self.checkpointing and torch.is_grad_enabled()
        for block in visual.transformer.resblocks[:-1]:
            x = _again(block, x) if again else _block(block, x)
        return x

    def _last_block(self, x: Tensor, patches: bool) -> Tensor:
        """Return ln_post of the class row after attention and, if asked, of the value-path rows."""
        block = self.visual.transformer.resblocks[-1]
        hidden = block.ln_1(x)
        width = hidden.shape[-1]
        weight, bias = block.attn.in_proj_weight, block.attn.in_proj_bias
        query = F.linear(hidden[:, :1], weight[:width], bias[:width])
        key, value = F.linear(hidden, weight[width:], bias[width:]).chunk(2, dim=-1)
        attended = _attention(query, key, value, block.attn.num_heads)
        if patches:
            attended = torch.cat([attended, value[:, 1:]], dim=1)
        rows: Tensor = self.visual.ln_post(_residual(block, x[:, : attended.shape[1]], attended))
        return rows


def _block(block: ResidualAttentionBlock, x: Tensor) -> Tensor:
    query, key, value = _in_projection(block, block.ln_1(x)).chunk(3, dim=-1)
    return _residual(block, x, _attention(query, key, value, block.attn.num_heads))


def _again(block: ResidualAttentionBlock, x: Tensor) -> Tensor:
    """As `_block`, computed again for its gradient; nothing in it is random."""
    found: Tensor = checkpoint(_block, block, x, use_reentrant=False, preserve_rng_state=False)
    return found


def _in_projection(block: ResidualAttentionBlock, hidden: Tensor) -> Tensor:
    return F.linear(hidden, block.attn.in_proj_weight, block.attn.in_proj_bias)


def _block_weights(block: ResidualAttentionBlock) -> BlockWeights:
    attention, mlp = block.attn, block.mlp
    return BlockWeights(
        ln_1=block.ln_1,
        qkv=(attention.in_proj_weight.detach(), attention.in_proj_bias.detach()),
        out=_scaled(attention.out_proj, block.ls_1),
        ln_2=block.ln_2,
        up=_scaled(mlp.c_fc, nn.Identity()),
        activation=mlp.gelu,
        down=_scaled(mlp.c_proj, block.ls_2),
        heads=int(attention.num_heads),
    )


def _scaled(linear: nn.Linear, layer_scale: nn.Module) -> tuple[Tensor, Tensor]:
    """Return a linear map with the LayerScale behind it, if there is one, folded in."""
    gain = getattr(layer_scale, "gamma", None)
    weight, bias = linear.weight.detach(), linear.bias.detach()
    return (
        (weight, bias) if gain is None else (weight * gain.detach()[:, None], bias * gain.detach())
    )


def _attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Multi-head attention of float (B, M, D) queries over (B, 1+N, D) keys and values."""
    split = [x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value)]
    return F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)


def _residual(block: ResidualAttentionBlock, x: Tensor, attended: Tensor) -> Tensor:
    """Finish a pre-norm block: output projection, residual, MLP, residual."""
    x = x + block.ls_1(block.attn.out_proj(attended))
    finished: Tensor = x + block.ls_2(block.mlp(block.ln_2(x)))
    return finished


def _require_supported(visual: nn.Module) -> None:
    if not isinstance(visual, VisionTransformer):
        raise _unsupported(
            f"its vision tower is a {type(visual).__name__}, not a VisionTransformer"
        )
    if visual.attn_pool is not None:
        raise _unsupported("it pools by attention and has no class embedding")
    if visual.pool_type != "tok":
        raise _unsupported(f"it pools by '{visual.pool_type}', not by its class token")
    if visual.proj is None:
        raise _unsupported("it has no projection to the joint space")
    if visual.grid_size[0] != visual.grid_size[1]:
        raise _unsupported(f"its token grid {visual.grid_size} is not square")
    plain = all(type(block) is ResidualAttentionBlock for block in visual.transformer.resblocks)
    if not plain:
        raise _unsupported("its blocks are not plain pre-norm attention blocks")


def _unsupported(reason: str) -> CheckpointError:
    return CheckpointError(f"this model cannot carry microCLIP: {reason}; {WORKING_MODELS}")
