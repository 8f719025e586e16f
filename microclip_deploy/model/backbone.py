"""An open_clip ViT as microCLIP needs it: a class embedding and value-path patch tokens.

The only module that knows open_clip's insides. The blocks are run batch-first with one fused
projection; the last block computes attention for the class row alone and sends the patch rows
down its value path, sharing the value projection, the output projection and the MLP.
"""

import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn

from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.errors import CheckpointError, EnvironmentProblem

DEMO_MODEL = "demo"
"""Name of the tiny model inside the package."""

_WORKING_MODELS = (
    "open_clip vision transformers with a class token do, such as ViT-B-32, ViT-B-16, ViT-L-14, "
    "ViT-L-14-336 and their -quickgelu forms"
)


# What open_clip raises for weights that are missing, damaged or of another architecture.
_LOAD_ERRORS = (
    RuntimeError, ValueError, KeyError, TypeError, AssertionError, OSError, SafetensorError
)  # fmt: skip

# How open_clip words a failed download; the exceptions behind it differ by hub and version.
_DOWNLOAD_FAILED = ("Failed to download", "Failed initial config/weights load from HF Hub")


@contextmanager
def exact_float32() -> Iterator[None]:
    """Compute in float32 where CUDA would take TF32, which moves products of tokens across tau.

    The switches are the process's, so they are put back.
    """
    switches = _tf32_switches()
    before = [getattr(place, name) for place, name, _ in switches]
    for place, name, exact in switches:
        setattr(place, name, exact)
    try:
        yield
    finally:
        for (place, name, _), value in zip(switches, before, strict=True):
            setattr(place, name, value)


def _tf32_switches() -> list[tuple[Any, str, object]]:
    """Return what decides, and its exact value. PyTorch refuses to mix both kinds of switches."""
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    if hasattr(matmul, "fp32_precision"):  # PyTorch 2.9
        return [(place, "fp32_precision", "ieee") for place in (matmul, cudnn.conv, cudnn.rnn)]
    return [(place, "allow_tf32", False) for place in (matmul, cudnn)]


class BackboneSpec(BaseModel):
    """Where a CLIP model comes from, in open_clip's own words."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    """open_clip name, "hf-hub:ORG/REPO", "local-dir:PATH", or "demo"."""
    pretrained: str | None = None
    """open_clip tag or a .safetensors file; none for hf-hub:, local-dir: and demo."""


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
        for block in visual.transformer.resblocks[:-1]:
            query, key, value = _in_projection(block, block.ln_1(x)).chunk(3, dim=-1)
            x = _residual(block, x, _attention(query, key, value, block.attn.num_heads))
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


class Clip(NamedTuple):
    """A loaded CLIP model: its vision side, its text side, and how pixels become its input."""

    vision: VisionBackbone
    text: "TextEncoder"
    preprocess: Preprocess
    spec: BackboneSpec
    sha256: str
    """Hash of both towers' names, shapes and values."""


class TextEncoder:
    """The text tower with its tokenizer."""

    def __init__(self, clip: Any, tokenizer: Any) -> None:
        self._clip = clip
        self._tokenizer = tokenizer

    @torch.no_grad()
    @exact_float32()
    def __call__(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Encode texts to raw embeddings: float32 (len(texts), E), not normalised."""
        device = next(self._clip.parameters()).device
        parts = [
            self._clip.encode_text(self._tokenizer(list(texts[i : i + batch_size])).to(device))
            for i in range(0, len(texts), batch_size)
        ]
        return torch.cat(parts).float()


def load_clip(spec: BackboneSpec, device: torch.device | str = "cpu") -> Clip:
    """Load a CLIP model with its weights; never a randomly initialised one.

    Args:
        spec: open_clip name and tag, or a directory, hub or file reference.
        device: where the towers go; weights are float32.

    Raises:
        EnvironmentProblem: the weights could not be downloaded.
        CheckpointError: unknown name or tag, missing or damaged weights, an architecture that
            does not match its weights, or a tower microCLIP cannot use.
    """
    name = resolve_name(spec.model)
    _check_source(spec, name)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="QuickGELU mismatch")
            clip = open_clip.create_model(
                name,
                pretrained=spec.pretrained,
                device=str(device),
                force_patch_dropout=0.0,
                require_pretrained=True,
                force_quick_gelu=_trained_with_quick_gelu(spec, name),
            )
        tokenizer = open_clip.get_tokenizer(name, **_tokenizer_options(name))
    except UserWarning as warning:
        raise CheckpointError(f"{spec.model}/{spec.pretrained}: {warning}") from warning
    except _LOAD_ERRORS as error:
        if any(sign in str(error) for sign in _DOWNLOAD_FAILED):
            raise EnvironmentProblem(
                f"model {spec.model}: its weights could not be downloaded: {_first_line(error)}; "
                "check the network, or download them elsewhere and use --model local-dir:PATH"
            ) from error
        raise CheckpointError(
            f"model {spec.model}: could not be loaded: {_first_line(error)}"
        ) from error
    clip.eval().requires_grad_(False)
    _check_finite(clip, spec)
    vision = VisionBackbone(clip.visual)
    preprocess = _preprocess_of(clip)
    return Clip(vision, TextEncoder(clip, tokenizer), preprocess, spec, weights_sha256(clip))


def _preprocess_of(clip: Any) -> Preprocess:
    """Return how the model's pixels are made, by its own open_clip configuration.

    Raises:
        CheckpointError: open_clip's transform does something that ours does not know.
    """
    settings = open_clip.get_model_preprocess_cfg(clip)
    statistics = {
        name: tuple(value) if isinstance(value, list | tuple) else (value,) * 3
        for name, value in settings.items()
        if name in ("mean", "std")
    }
    # open_clip evaluates models of "random" interpolation with bicubic.
    interpolation = settings["interpolation"].replace("random", "bicubic")
    try:
        return Preprocess(
            size=int(clip.visual.image_size[0]),
            interpolation=interpolation,
            resize_mode=settings["resize_mode"],
            fill_color=settings["fill_color"],
            **statistics,
        )
    except ValidationError as error:
        raise CheckpointError(
            f"this model's preprocessing: expected what open_clip's transform knows, found "
            f"{settings}: {_first_line(error)}; correct preprocess_cfg in open_clip_config.json"
        ) from error


def resolve_name(model: str) -> str:
    """Return open_clip's name of `model`; "demo" is the directory inside this package."""
    if model == DEMO_MODEL:
        return f"local-dir:{resources.files('microclip_deploy') / 'demo' / 'model'}"
    return model


def weights_sha256(module: nn.Module) -> str:
    """Hash a module's parameters and buffers: names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


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
    return CheckpointError(f"this model cannot carry microCLIP: {reason}; {_WORKING_MODELS}")


def _check_source(spec: BackboneSpec, name: str) -> None:
    """Refuse what would end in random weights or in unpickling a file."""
    if name.startswith(("hf-hub:", "local-dir:")):
        directory = Path(name.removeprefix("local-dir:"))
        if name.startswith("local-dir:") and not list(directory.glob("*.safetensors")):
            raise CheckpointError(
                f"model {spec.model}: expected a directory with open_clip_config.json and a "
                f".safetensors file, found none in {directory}"
            )
        return
    tags = open_clip.list_pretrained_tags_by_model(name)
    if spec.pretrained is None:
        raise CheckpointError(
            f"model {spec.model}: expected --pretrained TAG or FILE; "
            + (
                f"tags of this model: {', '.join(tags)}"
                if tags
                else f"unknown model; {_WORKING_MODELS}"
            )
        )
    is_file = Path(spec.pretrained).is_file()
    if spec.pretrained not in tags and not is_file:
        raise CheckpointError(
            f"--pretrained {spec.pretrained}: neither a file nor a tag of {spec.model}; "
            f"its tags: {', '.join(tags) or 'none'}"
        )
    if is_file and not spec.pretrained.endswith(".safetensors"):
        raise CheckpointError(
            f"{spec.pretrained}: expected a .safetensors file; other formats can run code when "
            "they are read; convert it with safetensors.torch.save_file"
        )


def _trained_with_quick_gelu(spec: BackboneSpec, name: str) -> bool:
    """Say whether the tag's weights need QuickGELU, which the plain model name does not ask for."""
    if spec.pretrained is None:
        return False
    return bool((open_clip.get_pretrained_cfg(name, spec.pretrained) or {}).get("quick_gelu"))


def _tokenizer_options(name: str) -> dict[str, str]:
    """Resolve a merges file that a local-dir's configuration names relative to its directory.

    open_clip passes text_cfg.tokenizer_kwargs on as they stand, so a relative `bpe_path` would be
    looked up in the working directory.
    """
    if not name.startswith("local-dir:"):
        return {}
    directory = Path(name.removeprefix("local-dir:"))
    config = json.loads((directory / "open_clip_config.json").read_text("utf-8"))
    options = config["model_cfg"]["text_cfg"].get("tokenizer_kwargs") or {}
    return {"bpe_path": str(directory / options["bpe_path"])} if "bpe_path" in options else {}


def _check_finite(clip: nn.Module, spec: BackboneSpec) -> None:
    for name, tensor in clip.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"model {spec.model}: {name} holds NaN or Inf; get an intact copy of the weights"
            )


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return " ".join(line.strip() for line in lines[:3]) if lines else type(error).__name__
