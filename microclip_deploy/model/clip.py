"""A CLIP model of open_clip's: loaded with its weights, or refused with the reason."""

import hashlib
import json
import logging
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ContextDecorator, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.errors import CheckpointError
from microclip_deploy.model.architecture import architecture
from microclip_deploy.model.backbone import VisionBackbone
from microclip_deploy.model.weights import (
    LOAD_ERRORS,
    check_source,
    first_line,
    from_cache_or_hub,
    load_problem,
    resolve_name,
)


class BackboneSpec(BaseModel):
    """Where a CLIP model comes from, in open_clip's own words."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    """open_clip name, "hf-hub:ORG/REPO", "local-dir:PATH", "demo" or "demo-objects"."""
    pretrained: str | None = None
    """open_clip tag or a .safetensors file; none for hf-hub:, local-dir: and the demo's."""


class _ExactFloat32(ContextDecorator):
    """Context manager and decorator; switches when the first thread enters and the last leaves."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before: list[tuple[Any, str, object]] = []

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                switches = _tf32_switches()
                self._before = [(place, name, getattr(place, name)) for place, name, _ in switches]
                for place, name, exact in switches:
                    setattr(place, name, exact)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                for place, name, value in self._before:
                    setattr(place, name, value)


exact_float32 = _ExactFloat32()
"""Within it float32 is computed in float32 where CUDA would take TF32, which moves products of
tokens across tau. The switches are the process's, so they are put back."""


def _tf32_switches() -> list[tuple[Any, str, object]]:
    """Return what decides, and its exact value.

    PyTorch 2.9 brought other switches and refuses to read the old ones once those have been set by
    hand. Its own exporter reads the old ones, so they are set wherever they can be.
    """
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    try:
        _ = matmul.allow_tf32, cudnn.allow_tf32
    except RuntimeError:
        return [(place, "fp32_precision", "ieee") for place in (matmul, cudnn.conv, cudnn.rnn)]
    return [(place, "allow_tf32", False) for place in (matmul, cudnn)]


class Clip(NamedTuple):
    """A loaded CLIP model: its vision side, its text side, and how pixels become its input."""

    vision: VisionBackbone
    text: "TextEncoder"
    preprocess: Preprocess
    spec: BackboneSpec
    weights_sha256: str
    """Hash of both towers' names, shapes and values."""
    architecture: dict[str, Any]
    """What decides the answers besides the weights."""

    @property
    def sha256(self) -> str:
        """Hash of the weights and of what else decides the answers."""
        record = json.dumps(self.architecture, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(f"{self.weights_sha256} {record}".encode()).hexdigest()


class TextEncoder:
    """The text tower with its tokenizer."""

    def __init__(self, clip: Any, tokenizer: Any) -> None:
        self._clip = clip
        self._tokenizer = tokenizer
        self.context_length = int(tokenizer.context_length)
        """How many tokens the tower reads; what comes behind them is cut off."""

    @torch.no_grad()
    @exact_float32
    def __call__(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Encode texts to raw embeddings: float32 (len(texts), E), not normalised."""
        device = next(self._clip.parameters()).device
        parts = [
            self._clip.encode_text(self._tokenizer(list(texts[i : i + batch_size])).to(device))
            for i in range(0, len(texts), batch_size)
        ]
        return torch.cat(parts).float()

    def tokens(self, text: str) -> tuple[int, ...]:
        """Return the tokens that the tower reads of a text, padding included."""
        read: tuple[int, ...] = tuple(self._tokenizer([text])[0].tolist())
        return read

    def uncut_length(self, text: str) -> int | None:
        """Return how many tokens a text has that is cut off, or None if it is read to its end."""
        # No token stands for less than a byte, and no tokenizer adds more than a few of its own.
        room = self.context_length + len(text.encode()) + 16
        whole: list[int] = self._tokenizer([text], context_length=room)[0].tolist()
        read = self.tokens(text)
        if tuple(whole[: self.context_length]) == read:
            return None
        padding = whole[-1]
        while whole[-1] == padding:
            whole.pop()
        return len(whole) + (read[-1] == padding)  # some tokenizers pad with the token that ends


def load_clip(spec: BackboneSpec, device: torch.device | str = "cpu") -> Clip:
    """Load a CLIP model with its weights; never a randomly initialised one.

    Args:
        spec: open_clip name and tag, or a directory, hub or file reference.
        device: where the towers go; weights are float32.

    Raises:
        EnvironmentProblem: the weights are not on this computer and could not be downloaded.
        CheckpointError: unknown name or tag, missing or damaged weights, an architecture that
            does not match its weights, or a tower microCLIP cannot use.
    """
    check_source(spec.model, spec.pretrained)
    try:
        with _quiet_root():
            clip, tokenizer = from_cache_or_hub(partial(_create, spec, str(device)), spec.model)
    except UserWarning as warning:
        raise CheckpointError(f"{spec.model}/{spec.pretrained}: {warning}") from warning
    except LOAD_ERRORS as error:
        raise load_problem(error, spec.model) from error
    clip.eval().requires_grad_(False)
    _check_finite(clip, spec)
    return Clip(
        vision=VisionBackbone(clip.visual),
        text=TextEncoder(clip, tokenizer),
        preprocess=_preprocess_of(clip),
        spec=spec,
        weights_sha256=weights_sha256(clip),
        architecture=architecture(clip, tokenizer),
    )


def require_same(clip: Clip, sha256: str, stored: Mapping[str, Any] | None, *, remedy: str) -> None:
    """Make sure that a model computes what another one did.

    Args:
        clip: the model that was loaded.
        sha256: the other's; of its weights alone where `stored` is None.
        stored: the other's architecture; None of models from before it was recorded.
        remedy: what to do otherwise.

    Raises:
        CheckpointError: weights or architecture are others.
    """
    named = f"backbone {clip.spec.model}/{clip.spec.pretrained}"
    found = clip.weights_sha256 if stored is None else clip.sha256
    if found == sha256:
        return
    differing = [
        f"{part} {value}, found {clip.architecture.get(part)}"
        for part, value in (stored or {}).items()
        if clip.architecture.get(part) != value
    ]
    if differing:
        raise CheckpointError(
            f"{named}: another function of the weights: expected {'; '.join(differing)}; name the "
            f"same --model as before, or {remedy}"
        )
    raise CheckpointError(
        f"{named}: expected weights with sha256 {sha256[:12]}, found {found[:12]}; {remedy}"
    )


def _create(spec: BackboneSpec, device: str) -> tuple[Any, Any]:
    """Let open_clip make the model and its tokenizer."""
    name = resolve_name(spec.model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="QuickGELU mismatch")
        clip = open_clip.create_model(
            name,
            pretrained=spec.pretrained,
            device=device,
            force_patch_dropout=0.0,
            require_pretrained=True,
            force_quick_gelu=_trained_with_quick_gelu(spec, name),
        )
    return clip, open_clip.get_tokenizer(name, **_tokenizer_options(name))


@contextmanager
def _quiet_root() -> Iterator[None]:
    """Keep open_clip from configuring and using the root logger, which is the application's.

    Its calls of logging.info install a handler where there is none; every error it logs it raises.
    """
    handler = logging.NullHandler()
    logging.root.addHandler(handler)
    try:
        yield
    finally:
        logging.root.removeHandler(handler)


def _preprocess_of(clip: Any) -> Preprocess:
    """Return how the model's pixels are made, by its own open_clip configuration.

    Raises:
        CheckpointError: open_clip's transform does something that ours does not know.
    """
    settings = open_clip.get_model_preprocess_cfg(clip)
    statistics: dict[str, Any] = {
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
            f"{settings}: {first_line(error)}; correct preprocess_cfg in open_clip_config.json"
        ) from error


def weights_sha256(module: nn.Module) -> str:
    """Hash a module's parameters and buffers: names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


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
