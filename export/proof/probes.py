"""The images an export is proven on, and what PyTorch answers to them.

Without photos of the user's, made-up ones serve: colour fields, shapes and noise, the same on every
machine. They are stored in the export with PyTorch's answers, so that `verify` needs neither
PyTorch nor the checkpoint. Photos of the user's are never stored.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from rich.console import Console
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from microclip_deploy import artifact
from microclip_deploy.console import tell_left_out, tell_skipped, tell_warnings
from microclip_deploy.data.decode import read_photo
from microclip_deploy.data.photo import USUAL, PhotoConfig
from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.data.sources import check_images, list_images
from microclip_deploy.errors import CheckpointError, printable
from microclip_deploy.ncut.steps import adjacency, determined

if TYPE_CHECKING:
    from microclip_deploy.model.microclip import MicroCLIP

Array = NDArray[Any]
Progress = Callable[[int, int], None]
"""Called with (done, total)."""

COUNT = 24
"""Made-up photos: more than the batch sizes that are tried one by one."""

MOST = 64
"""Of the user's images so many are looked at."""

_BATCH = 8


def silent(done: int, total: int) -> None:
    """Show no progress."""


class Reference(NamedTuple):
    """Images and PyTorch's float32 answers to them; P images."""

    images: NDArray[np.uint8]
    """(P, S, S, 3)."""
    cls: NDArray[np.float32]
    patches: NDArray[np.float32]
    mask: NDArray[np.bool_]
    attention: NDArray[np.float32]
    fg: NDArray[np.float32]
    embedding: NDArray[np.float32]
    logits: NDArray[np.float32]
    complete: NDArray[np.bool_]
    """(P,): the graph joins every pair of tokens."""
    determined: NDArray[np.bool_]
    """(P,): rounding in float32 cannot change the mask."""

    @classmethod
    def of(
        cls,
        model: "MicroCLIP",
        preprocess: Preprocess,
        images: NDArray[np.uint8],
        progress: Progress = silent,
    ) -> "Reference":
        """Ask the model, on its own device."""
        import torch

        from microclip_deploy.model.token_fusion import fused_embedding

        device = next(model.parameters()).device

        def answer(batch: NDArray[np.uint8]) -> "Reference":
            with torch.inference_mode():
                network_input = preprocess.normalize(torch.from_numpy(batch).to(device))
                out = model(network_input)
                patches = model.backbone(network_input).patches
                embedding = fused_embedding(out.cls, out.fg, model.cls_share)
                agreement = model.agreement(out.cls, patches)
                decided = determined(adjacency(patches, model.ncut), model.ncut, agreement)
            cut = out.saliency
            made = (out.cls, patches, cut.mask, out.attention, out.fg, embedding, out.logits)
            return cls(batch, *(part.cpu().numpy() for part in (*made, cut.complete, decided)))

        return cls.by_batch(answer, images, progress)

    @classmethod
    def by_batch(
        cls,
        answer: "Callable[[NDArray[np.uint8]], Reference]",
        images: NDArray[np.uint8],
        progress: Progress = silent,
    ) -> "Reference":
        """Ask about a few images at a time."""
        parts = []
        for start in range(0, len(images), _BATCH):
            parts.append(answer(images[start : start + _BATCH]))
            progress(min(start + _BATCH, len(images)), len(images))
        return cls(*map(np.concatenate, zip(*parts, strict=True)))

    def write(self, path: Path) -> None:
        """Store the made-up images, which come first, with their answers, as safetensors."""
        stored = {name: np.ascontiguousarray(part[:COUNT]) for name, part in self._asdict().items()}
        artifact.write_bytes(path, save(stored))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what `write` stored.

        Raises:
            CheckpointError: no such file, or not all of it.
        """
        try:
            stored = load_file(path)
            reference = cls(**{name: stored[name] for name in cls._fields})
        except (SafetensorError, OSError, KeyError) as error:
            raise CheckpointError(
                f"{path}: expected stored probe images, found: {error}; export again"
            ) from error
        counts = {len(part) for part in reference}
        if counts != {COUNT}:
            raise CheckpointError(
                f"{path}: expected {COUNT} probe images, found {counts}; export again"
            )
        return reference


class Photos(NamedTuple):
    """Where the images of a proof come from."""

    source: str
    names: tuple[str, ...]
    read: Callable[[], Iterator[Image.Image]]
    """Decode them one by one, mode RGB; each call does so again."""
    left_out: Mapping[str, Any] = MappingProxyType({})
    """What the search for the user's left out, as `LeftOut.to_json`."""

    def views(self, preprocess: Preprocess) -> NDArray[np.uint8]:
        """Return their test views, uint8 (P, S, S, 3)."""
        return np.stack([preprocess.test_view(photo) for photo in self.read()])


def made_up_photos(side: int, count: int = COUNT) -> Photos:
    """Return photos of things that do not exist, somewhat larger than `side`, of many shapes."""

    def read() -> Iterator[Image.Image]:
        rng = np.random.default_rng(0)
        return (_made_up_photo(rng, side) for _ in range(count))

    return Photos("made-up images", tuple(f"made-up {i}" for i in range(count)), read)


def photos_with(
    users: Path | None, side: int, notes: Console, config: PhotoConfig = USUAL
) -> Photos:
    """Put up to `MOST` of the user's images, spread over all of them, behind the made-up ones.

    Args:
        users: folder or list of images; None for the made-up ones alone.
        side: as for `made_up_photos`.
        notes: told of images that are left out or cannot be read.
        config: how the user's are read.

    Raises:
        DataError: there is none, or none that was chosen can be read.
    """
    made_up = made_up_photos(side)
    if users is None:
        return made_up
    found = list_images(users)
    tell_left_out(found.left_out.summary(), notes)
    listed = found.paths
    chosen = listed[:: -(-len(listed) // MOST)]
    checked = check_images(chosen, config, max_bad=len(chosen))
    tell_skipped(checked.bad, notes)
    tell_warnings(checked.remarks, notes)

    def read() -> Iterator[Image.Image]:
        yield from made_up.read()
        yield from (read_photo(path, config).image for path in checked.good)

    return Photos(
        f"{made_up.source} and {len(checked.good)} of {printable(users)}",
        (*made_up.names, *map(printable, checked.good)),
        read,
        found.left_out.to_json(),
    )


def _made_up_photo(rng: np.random.Generator, side: int) -> Image.Image:
    width, height = (int(side * factor) for factor in rng.uniform(1.05, 1.8, 2))
    cells = int(rng.integers(2, 7))
    field = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
    photo = field.resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(photo)
    for _ in range(int(rng.integers(1, 5))):
        left, top = rng.uniform(0, 0.8, 2) * (width, height)
        right, bottom = (left, top) + rng.uniform(0.1, 0.5, 2) * (width, height)
        colour = tuple(rng.integers(0, 256, 3).tolist())
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape((left, top, right, bottom), fill=colour)
    noise = rng.normal(0, 6, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(photo) + noise, 0, 255).astype(np.uint8))
