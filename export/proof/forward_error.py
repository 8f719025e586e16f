"""PyTorch's own rounding: how far its float32 is from float64 on the images of a proof."""

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.export.proof.limits import ForwardError, StageErrors
from microclip_deploy.export.proof.probes import Array, Progress, Reference, silent

if TYPE_CHECKING:
    from microclip_deploy.model.microclip import MicroCLIP

FEW = 4 * 2.0**-24
"""No answer is taken to be exact to less than a few roundings of the largest value."""

_BATCH = 8


def forward_error(
    model: "MicroCLIP", preprocess: Preprocess, reference: Reference, progress: Progress = silent
) -> ForwardError:
    """Compare a model's float32 answers with those of the same model in float64.

    The masks are the reference's: a mask is right or wrong, it has no rounding.

    Args:
        model: float32, on any device.
        preprocess: how images become its input.
        reference: images, and the model's answers.
        progress: called with (done, total) images.
    """
    exact = copy.deepcopy(model).double()
    device = next(model.parameters()).device
    total, encoder = [], []
    for start in range(0, len(reference.images), _BATCH):
        part = Reference._make(each[start : start + _BATCH] for each in reference)
        mask, cls, patches = (
            torch.from_numpy(each).to(device) for each in (part.mask, part.cls, part.patches)
        )
        with torch.inference_mode():
            pixels = preprocess.normalize(torch.from_numpy(part.images).to(device)).double()
            exact_cls, exact_patches = exact.backbone(pixels)
            made = _answers(exact, exact_cls, exact_patches, mask)
            continued = _answers(exact, cls.double(), patches.double(), mask)
        total.append(_largest(part._asdict(), made))
        encoder.append(_largest(continued, made))
        progress(min(start + _BATCH, len(reference.images)), len(reference.images))
    largest = {name: float(np.abs(getattr(reference, name)).max()) for name in total[0]}
    return ForwardError(total=_stages(total, largest), encoder=_stages(encoder, largest))


def _answers(model: "MicroCLIP", cls: Tensor, patches: Tensor, mask: Tensor) -> dict[str, Array]:
    """Return what the model makes of tokens, with these masks."""
    fg, logits, attention = model.fuse(cls, patches, mask)
    made = {"cls": cls, "patches": patches, "attention": attention, "fg": fg, "logits": logits}
    return {name: each.cpu().numpy() for name, each in made.items()}


def _largest(found: Mapping[str, Array], exact: Mapping[str, Array]) -> dict[str, float]:
    return {name: float(np.abs(found[name] - each).max()) for name, each in exact.items()}


def _stages(parts: list[dict[str, float]], largest: Mapping[str, float]) -> StageErrors:
    """Join the parts of all images."""
    errors = {
        name: max(FEW * size, *(part[name] for part in parts)) for name, size in largest.items()
    }
    return StageErrors(**errors | {"patches": errors["patches"] / largest["patches"]})
