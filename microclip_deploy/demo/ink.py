"""How well the saliency finds the glyph: overlap of NCut masks with the ink the renderer knows."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from microclip_deploy.data.sources import list_images, read_batches
from microclip_deploy.serving import Session

INKED_SHARE = 0.1
"""A token counts as ink when at least this share of its pixels is covered."""


def mask_ink_iou(session: Session, images: Path, *, split: str = "test") -> float:
    """Return the mean intersection over union of mask and inked tokens on a labelled split.

    Args:
        session: an open model with square token grids.
        images: benchmark folder with SPLIT/ and SPLIT-ink/.
        split: "val" or "test".
    """
    paths = list_images(images / split).paths
    overlaps = []
    for batch in read_batches(paths, session.preprocess, 128):
        masks = session.predict(batch.images).mask
        for index, mask in zip(batch.indices, masks, strict=True):
            relative = paths[index].relative_to(images / split)
            ink = inked_tokens(images / f"{split}-ink" / relative, mask.size)
            overlaps.append((mask & ink).sum() / (mask | ink).sum())
    return float(np.mean(overlaps))


def inked_tokens(path: Path, tokens: int) -> NDArray[np.bool_]:
    """Return bool (N,): the tokens of a row-major square grid that hold ink."""
    side = round(tokens**0.5)
    coverage = Image.open(path).convert("L").resize((side, side), Image.Resampling.BOX)
    inked: NDArray[np.bool_] = np.asarray(coverage).reshape(-1) >= 255 * INKED_SHARE
    return inked
