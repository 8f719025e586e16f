"""What an epoch sums up over its images."""

import torch
from torch import Tensor

from microclip_deploy.adapt.train_step import Step

TALLY = (
    "images",
    "loss",
    "cross_entropy",
    "fairness",
    "agreement",
    "prior_agreement",
    "kept",
    "complete_graphs",
    "degenerate_graphs",
    "mask_share",
)
"""What an epoch sums up, each weighted by images; kept on the device so that nothing waits."""


def sums(step: Step, share: slice) -> Tensor:
    """Return float64 (len(TALLY),): what a share of a batch adds to the epoch's tally."""
    # torch.full fills on the device; a tensor made from a Python number would be copied to it.
    chosen = step.chosen[share]
    count, device = len(chosen), chosen.device
    images = torch.full((), count, dtype=torch.float64, device=device)
    weak = step.labels.weak.saliency
    found = {
        "images": images,
        "loss": step.losses.total.detach() * images,
        "cross_entropy": step.losses.cross_entropy.detach() * images,
        "fairness": step.losses.fairness.detach() * images,
        "agreement": (step.output.logits.argmax(dim=1) == chosen).sum(),
        "prior_agreement": (step.labels.prior == chosen).sum(),
        "kept": images if step.kept is None else step.kept[share].sum(),
        "complete_graphs": weak.complete.sum(),
        "degenerate_graphs": weak.degenerate.sum(),
        "mask_share": weak.mask.double().mean(dim=1).sum(),
    }
    return torch.stack([found[name].double() for name in TALLY])
