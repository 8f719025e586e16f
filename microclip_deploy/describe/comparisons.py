"""Which classes are compared: pairs that CLIP confuses, by their names and on the user's photos."""

from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from microclip_deploy.console import bar, tell_skipped
from microclip_deploy.data.sources import list_images, read_batches
from microclip_deploy.describe.pairs import confused_pairs
from microclip_deploy.describe.text_rows import Rows, name_rows
from microclip_deploy.errors import DataError, printable
from microclip_deploy.head import LOGIT_SCALE

if TYPE_CHECKING:
    from microclip_deploy.model.clip import Clip

PAIRS = 30
"""Pairs at most; on 200 species of birds more brought nothing (FuDD, arXiv 2306.05963)."""

MOST = 2000
"""Photos that are looked at, spread evenly: enough to find pairs, and 80 MB at 10,000 classes."""

_BATCH = 32


def compared_pairs(
    clip: "Clip", names: Sequence[str], images: Path | None, notes: Console
) -> list[tuple[int, int]]:
    """Return rows of names that are confused, the most confused first.

    Args:
        clip: the model that confuses them.
        names: class names.
        images: unlabelled photos, folder or list; None asks by the names alone.
        notes: where to show progress.

    Raises:
        DataError: there is no photo that can be read.
    """
    rows = name_rows(clip.text, names)
    seen = None if images is None else photo_probabilities(clip, rows, images, notes)
    return confused_pairs(rows, PAIRS, seen)


def photo_probabilities(
    clip: "Clip", rows: Rows, images: Path, notes: Console
) -> NDArray[np.float32]:
    """Return float32 (P, C): the softmax over the classes for each photo.

    Args:
        clip: the model.
        rows: float32 (C, E), unit rows of the class names.
        images: folder or list.
        notes: where to show progress.

    Raises:
        DataError: there is no photo that can be read.
    """
    paths = list_images(images).paths
    chosen = paths[:: -(-len(paths) // MOST)] if paths else paths
    bad: list[tuple[Path, str]] = []
    found = list(_probabilities(clip, rows, chosen, bad, notes))
    tell_skipped(bad, notes)
    if not found:
        raise DataError(f"{printable(images)}: expected photos, found none that can be read")
    return np.concatenate(found)


def _probabilities(
    clip: "Clip",
    rows: Rows,
    paths: Sequence[Path],
    bad: list[tuple[Path, str]],
    notes: Console,
) -> Iterator[NDArray[np.float32]]:
    import torch

    batches = read_batches(
        paths,
        clip.preprocess,
        _BATCH,
        on_bad=lambda index, error: bad.append((paths[index], error.reason)),
    )
    with bar(notes, "looking at photos", "photos") as shown, torch.inference_mode():
        for number, batch in zip(count(1), batches, strict=False):
            pixels = clip.preprocess.normalize(torch.from_numpy(batch.images))
            cosine = clip.vision.encode_cls(pixels) @ torch.from_numpy(rows).T
            yield (LOGIT_SCALE * cosine).softmax(dim=1).numpy()
            shown.update(min(number * _BATCH, len(paths)), len(paths))
