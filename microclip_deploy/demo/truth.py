"""How well the saliency finds the object: overlap of NCut masks with what the renderer drew."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from microclip_deploy.data.sources import list_images, read_batches
from microclip_deploy.demo.benchmark import Benchmark, Split
from microclip_deploy.demo.folders import cover_folder
from microclip_deploy.serving import Session


def mask_iou(
    session: Session, benchmark: Benchmark, images: Path, split: Split = Split.TEST
) -> float:
    """Return the mean intersection over union of mask and object tokens on a labelled split.

    Args:
        session: an open model with square token grids.
        benchmark: whose images they are.
        images: its folder.
        split: a labelled one.
    """
    folder, covers = images / split.name.lower(), images / cover_folder(split)
    paths = list_images(folder).paths
    overlaps = []
    for batch in read_batches(paths, session.preprocess, 128):
        masks = session.predict(batch.images).mask
        for index, mask in zip(batch.indices, masks, strict=True):
            cover = covers / paths[index].relative_to(folder)
            truth = object_tokens(cover, mask.size, benchmark.covered)
            overlaps.append((mask & truth).sum() / (mask | truth).sum())
    return float(np.mean(overlaps))


def object_tokens(path: Path, tokens: int, covered: float) -> NDArray[np.bool_]:
    """Return bool (N,): tokens of a row-major square grid that show the object.

    Args:
        path: grey picture of where the object is.
        tokens: N.
        covered: the least share of a token's pixels.
    """
    side = round(tokens**0.5)
    share = Image.open(path).convert("L").resize((side, side), Image.Resampling.BOX)
    shown: NDArray[np.bool_] = np.asarray(share).reshape(-1) >= 255 * covered
    return shown
