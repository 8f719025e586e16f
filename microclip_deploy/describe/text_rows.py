"""Unit rows of texts in CLIP's space, as float32 arrays."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from microclip_deploy.data.classes import DEFAULT_TEMPLATES

if TYPE_CHECKING:
    from microclip_deploy.model.clip import TextEncoder

Rows = NDArray[np.float32]


def unit_rows(encode: "TextEncoder", texts: Sequence[str]) -> Rows:
    """Return float32 (len(texts), E), unit rows."""
    rows: Rows = encode(texts).cpu().numpy()
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def name_rows(encode: "TextEncoder", names: Sequence[str]) -> Rows:
    """Return float32 (C, E), unit rows of the class names as plain zero-shot CLIP uses them."""
    (template,) = DEFAULT_TEMPLATES
    return unit_rows(encode, [template.replace("{}", name) for name in names])


def mean_row(rows: Rows) -> Rows:
    """Return float32 (E,): the unit row of a class's sentences, as the classifier starts with."""
    mean: Rows = rows.mean(axis=0)
    return mean / np.linalg.norm(mean)
