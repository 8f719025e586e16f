"""What zero-shot CLIP sees in every photo: one vector each, kept in a file beside the run.

    zero-shot.npy    float16 (N, E), unit rows: [CLS] of the test view, before adaptation

All that adaptation asks about the model as it was follows from these vectors: class probabilities,
class frequencies, anchors. The file is mapped, so that memory does not grow with the photos; it is
2 E bytes a photo, 1 GB for a million of them with a ViT-B. A damaged or missing one is made again.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from microclip_deploy import artifact
from microclip_deploy.adapt.loader import AdaptImages, refuse_lost
from microclip_deploy.data.sources import read_batches
from microclip_deploy.errors import CheckpointError
from microclip_deploy.head import LOGIT_SCALE
from microclip_deploy.joint import Folder, Shortlist
from microclip_deploy.model.clip import exact_float32
from microclip_deploy.model.microclip import MicroCLIP

VECTORS = "zero-shot.npy"
SEAL = "zero-shot.json"
"""Its hash; written after it."""

_BATCH = 256
_CHUNK = 8192
"""Vectors in memory at a time."""


class Support(NamedTuple):
    """What is known of a batch of B photos from before the adaptation."""

    zero_shot: Tensor
    """float32 (B, C): probabilities by the frozen head, scale 100."""
    anchors: Tensor
    """float32 (B, C): cosine with the mean photo of each class."""


class Reference:
    """The photos as the model before adaptation sees them."""

    def __init__(self, vectors: NDArray[np.float16], frozen: Tensor) -> None:
        """Find the anchors.

        Args:
            vectors: float16 (N, E), unit rows, perhaps mapped from a file.
            frozen: float32 (C, E), unit rows: the frozen head; its device is that of the answers.
        """
        self.vectors, self.frozen = vectors, frozen
        self.anchors = self._anchors()

    def support(self, indices: Tensor) -> Support:
        """Look up photos by their int64 (B,) positions."""
        seen = self._rows(indices.cpu().numpy())
        return Support(self._probabilities(seen), seen @ self.anchors.T)

    def labels(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return zero-shot's classes (n,) of photos by their positions (n,), ascending."""
        chunks = np.array_split(rows, max(1, len(rows) // _CHUNK))
        found = [(self._rows(chunk) @ self.frozen.T).argmax(dim=1).cpu() for chunk in chunks]
        return torch.cat(found).numpy()

    def probabilities(self) -> Iterator[NDArray[np.float32]]:
        """Yield the zero-shot probabilities of all photos in their order, (n, C) at a time."""
        for seen in self._chunks():
            yield self._probabilities(seen).cpu().numpy()

    def joint(self) -> Shortlist:
        """Return what a joint reading of the photos says; it depends on nothing but them."""
        folder = Folder(self.frozen.cpu().numpy())
        for seen in self._chunks():
            rows = F.normalize(seen, dim=1)  # half precision left the norm
            folder.add(rows.cpu().numpy(), (LOGIT_SCALE * rows @ self.frozen.T).cpu().numpy())
        return folder.read()

    def _anchors(self) -> Tensor:
        """Return float32 (C, E): mean vector of the photos that zero-shot gives each class.

        Unit rows; zero for a class that gets none.
        """
        sums = torch.zeros_like(self.frozen)
        for seen in self._chunks():
            sums.index_add_(0, (seen @ self.frozen.T).argmax(dim=1), seen)
        return F.normalize(sums, dim=1)

    def _chunks(self) -> Iterator[Tensor]:
        for begin in range(0, len(self.vectors), _CHUNK):
            yield self._rows(slice(begin, begin + _CHUNK))

    def _rows(self, chosen: "NDArray[np.int64] | slice") -> Tensor:
        rows = torch.from_numpy(self.vectors[chosen].astype(np.float32))
        return rows.to(self.frozen.device)

    @exact_float32
    def _probabilities(self, seen: Tensor) -> Tensor:
        return (LOGIT_SCALE * seen @ self.frozen.T).softmax(dim=1)


def look_at(
    directory: Path,
    model: MicroCLIP,
    images: AdaptImages,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Reference:
    """Return the reference of a run; its file is made unless it is there and whole.

    Args:
        directory: of the run.
        model: before adaptation.
        images: the photos.
        progress: called with (done, total) photos.

    Raises:
        DataError: a photo cannot be read any more; the run depends on it.
        EnvironmentProblem: the file cannot be written.
    """
    path = directory / VECTORS
    if not _whole(path, (len(images.paths), model.frozen.shape[1])):
        _write(path, model, images, progress)
    return Reference(np.load(path, mmap_mode="r"), model.frozen)


@torch.no_grad()
@exact_float32
def _write(
    path: Path, model: MicroCLIP, images: AdaptImages, progress: Callable[[int, int], None]
) -> None:
    total = len(images.paths)
    header = {"descr": "<f2", "fortran_order": False, "shape": (total, model.frozen.shape[1])}
    with artifact.staged_file(path) as file:
        np.lib.format.write_array_header_2_0(file, header)
        for batch in read_batches(images.paths, images.preprocess, _BATCH, on_bad=refuse_lost):
            pixels = torch.from_numpy(batch.images).permute(0, 3, 1, 2).to(model.frozen.device)
            seen = model.encode_cls(images.preprocess.normalize(pixels))
            file.write(seen.cpu().numpy().astype("<f2").tobytes())
            progress(int(batch.indices[-1]) + 1, total)
    artifact.write_json(path.with_name(SEAL), {"sha256": artifact.sha256_file(path)})


def _whole(path: Path, shape: tuple[int, int]) -> bool:
    """Say whether the vectors are those that were written, and of this many photos."""
    with suppress(CheckpointError, KeyError, TypeError, OSError, ValueError):
        sealed = artifact.read_json(path.with_name(SEAL))["sha256"]
        return bool(
            np.load(path, mmap_mode="r").shape == shape and sealed == artifact.sha256_file(path)
        )
    return False
