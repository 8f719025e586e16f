"""What plain zero-shot CLIP makes of unlabelled photos."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from microclip_deploy.data.sources import list_images, read_batches
from microclip_deploy.describe.text_rows import Rows
from microclip_deploy.head import LOGIT_SCALE
from microclip_deploy.serving.classification import softmax

if TYPE_CHECKING:
    from microclip_deploy.model.clip import Clip

MOST = 1000
"""Photos that are looked at, spread over all."""

_BATCH = 32


def class_shares(clip: "Clip", name_rows: Rows, photos: Path) -> NDArray[np.float64]:
    """Return the probabilities (P, C) of the classes for each photo that can be read.

    Args:
        clip: a loaded model.
        name_rows: (C, E), unit rows of the class names.
        photos: folder or list.

    Raises:
        DataError: there is no photo.
    """
    import torch

    paths = list_images(photos).paths
    paths = paths[:: max(1, -(-len(paths) // MOST))]
    found = [np.empty((0, len(name_rows)))]
    for batch in read_batches(paths, clip.preprocess, _BATCH, on_bad=lambda index, error: None):
        with torch.inference_mode():
            views = torch.from_numpy(batch.images)
            cls = clip.vision.encode_cls(clip.preprocess.normalize(views)).cpu().numpy()
        found.append(softmax(LOGIT_SCALE * (cls @ name_rows.T)))
    return np.concatenate(found)
