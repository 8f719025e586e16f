"""One iteration: label a batch with the model as it is, then move the model once.

docs/numerics.md sections 6 to 8 hold every equation.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from microclip_deploy.adapt.boundary import Drift, added, moved, targets
from microclip_deploy.adapt.dka import aggregate, multi_view_prior
from microclip_deploy.adapt.loss import cross_entropy, fairness
from microclip_deploy.adapt.ranks import ALONE, Ranks
from microclip_deploy.adapt.reference import Support
from microclip_deploy.head import LOGIT_SCALE
from microclip_deploy.model.clip import exact_float32
from microclip_deploy.model.microclip import MicroCLIP, Output, Pooling, is_layer_norm
from microclip_deploy.model.token_fusion import fused_embedding


class AdaptConfig(BaseModel):
    """Settings of the optimisation; the defaults are the method's for every data set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(default=15, ge=1, le=10_000)
    """Passes over the images."""
    batch_size: int = Field(default=64, ge=1, le=65_536)
    """Images an iteration, over all processes; a last partial batch is kept."""
    micro_batch: int | None = Field(default=None, ge=1, le=65_536)
    """Images of a batch that a process looks at in one go; fewer need less memory, and one more
    forward pass of the strong views. None: all of them."""
    checkpointing: bool = False
    """Keep only the input of each block of the strong views' pass, and compute the block again when
    its gradient is due: less memory for about a third more time of that pass."""
    lr: float = Field(default=1e-4, gt=0, lt=1)
    """AdamW learning rate of the first iteration."""
    end_lr: float = Field(default=2e-6, ge=0, lt=1)
    """Where the per-iteration cosine ends."""
    weight_decay: float = Field(default=0.1, ge=0, lt=1)
    """Decoupled weight decay of every trained tensor."""
    decay_layer_norm: bool = True
    """Decay LayerNorm gains and biases too, as the method does."""
    gamma: float = Field(default=0.5, ge=0, le=1)
    """Share of the frozen multi-view prior in the pseudo-labels."""
    cls_share: float = Field(default=0.5, ge=0, le=1)
    """Share of [CLS] in TokenFusion; 1 leaves [FG] out."""
    fairness_weight: float = Field(default=1.0, ge=0, le=100)
    """Weight of the fairness term against the cross-entropy."""
    fairness_prior: Literal["uniform", "estimated"] = "uniform"
    """Class frequencies that fairness pulls the mean prediction towards: all the same, as the
    method does, or those estimated from zero-shot before training."""
    boundary: bool = False
    """Teach the probabilities behind the pseudo-labels, with what unlikely drift away from
    zero-shot took given back (`boundary.targets`), in place of hard labels."""
    joint_share: float = Field(default=0.0, ge=0, le=1)
    """Weight, beside the two heads' cosines, of the probabilities that zero-shot's joint reading of
    the folder gives (`microclip_deploy.joint`)."""
    rollback: bool = False
    """After training give classes that were harmed (`verdict.harmed`) the frozen head's rows again,
    unless the verdict is that adaptation helped."""
    confidence: float = Field(default=0.0, ge=0, lt=1)
    """Images whose pseudo-label has a lower softmax probability (scale 100) are not learnt from;
    0 learns from all, as the method does."""
    pooling: Pooling = "soap"
    """"soap", or "mean" for the plain token mean it is compared with."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the encoder; the graph, the heads and the losses stay in float32."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of data order and views."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.end_lr > self.lr:
            raise ValueError(f"expected end_lr <= lr, found {self.end_lr} > {self.lr}")
        return self


class Views(NamedTuple):
    """Normalised network input of one batch."""

    weak: Tensor
    """float32 (B, 3, S, S)."""
    strong: Tensor
    """float32 (B, 3, S, S)."""
    crops: Tensor
    """float32 (B, V, 3, S, S)."""


class Labels(NamedTuple):
    """Pseudo-labels of this process's share of one batch."""

    aggregated: Tensor
    """float32 (B, C): Dynamic Knowledge Aggregation, cosines."""
    prior: Tensor
    """int64 (B,): what the frozen head alone says (of the weak view when gamma is 0)."""
    weak: Output
    """The model's view of the weak image."""


class Losses(NamedTuple):
    """The loss of one batch."""

    total: Tensor
    cross_entropy: Tensor
    fairness: Tensor
    average: Tensor
    """float (C,): fairness running mean for the next iteration."""


class Guide(NamedTuple):
    """What is known of a batch and of its folder from before the adaptation."""

    expected: Tensor | None = None
    """float32 (C,): class frequencies that fairness pulls towards; None for uniform ones."""
    joint: Tensor | None = None
    """float32 (b, C): probabilities of the joint reading of this process's share, a third prior."""
    support: Support | None = None
    """Of the whole batch, for boundary-preserving targets."""
    rates: Tensor | None = None
    """float32 (C, C): `Drift.rates` of the epoch before."""
    drift: Drift | None = None
    """Of this epoch so far."""


_NO_GUIDE = Guide()


class Step(NamedTuple):
    """Everything one iteration computed; b of the batch's B images are this process's share."""

    labels: Labels
    """Of the share."""
    chosen: Tensor
    """int64 (B,): the pseudo-labels."""
    kept: Tensor | None
    """bool (B,): images learnt from; None for all."""
    output: Output
    """The model's view of the share's strong images."""
    losses: Losses
    drift: Drift | None = None
    """Of the epoch with this batch added."""


def make_optimizer(parameters: Mapping[str, Tensor], config: AdaptConfig) -> torch.optim.AdamW:
    """Return AdamW as the method configures it; LayerNorms are a group of their own."""
    norms = [p for name, p in parameters.items() if is_layer_norm(name)]
    others = [p for name, p in parameters.items() if not is_layer_norm(name)]
    norm_decay = config.weight_decay if config.decay_layer_norm else 0.0
    groups: list[dict[str, Any]] = [
        {"params": norms, "weight_decay": norm_decay},
        {"params": others},
    ]
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=config.weight_decay
    )


def learning_rate(config: AdaptConfig, iteration: int, total: int) -> float:
    """Return the rate of iteration 0 <= i < total: a cosine from `lr` to `end_lr`."""
    cosine = 0.5 * (1 + math.cos(math.pi * iteration / total))
    return config.end_lr + (config.lr - config.end_lr) * cosine


@torch.no_grad()
def label(
    model: MicroCLIP, views: Views, config: AdaptConfig, joint: Tensor | None = None
) -> Labels:
    """Label a batch with the current model: multi-view prior and Dynamic Knowledge Aggregation.

    `joint` (B, C) is what a joint reading says, weighted by `config.joint_share`.
    """
    with _encoder_precision(views, config):
        weak = model(views.weak)
        seen = model.encode_cls(views.crops.flatten(0, 1)) if config.gamma > 0 else None
    fused = fused_embedding(weak.cls, weak.fg, config.cls_share)
    prior = weak.cls
    if seen is not None:  # crops speak through the prior alone; with gamma 0 nobody listens
        prior = multi_view_prior(seen.unflatten(0, views.crops.shape[:2]), weak.cls)
    heads = {"frozen": model.frozen, "classifier": model.class_matrix()}
    aggregated = aggregate(prior, fused, gamma=config.gamma, **heads)
    if joint is not None:
        aggregated = aggregated + config.joint_share * joint
    return Labels(aggregated, (prior @ model.frozen.T).argmax(dim=1), weak)


@exact_float32
def train_step(
    model: MicroCLIP,
    optimizer: torch.optim.Optimizer,
    views: Views,
    config: AdaptConfig,
    *,
    average: Tensor | None,
    rate: float,
    guide: Guide = _NO_GUIDE,
    ranks: Ranks = ALONE,
    images: int = 0,
) -> Step:
    """Label a batch with the model as it is, then move the model once.

    The loss is a function of the logits of the whole batch. Its gradient for each image's logits is
    computed first, and then sent back through the model for as many images at a time as memory
    holds, so that neither shares nor micro-batches change what is learnt.

    Args:
        model: on the views' device.
        optimizer: over the model's trainable tensors.
        views: one batch, or this process's share of it.
        config: optimisation settings.
        average: fairness running mean of the iteration before; None at the start of an epoch.
        rate: learning rate of this step.
        guide: what the settings beyond the method's own ask for.
        ranks: the processes that share the batch.
        images: B of the whole batch, where several share it.

    Raises:
        torch.OutOfMemoryError: a process lacks memory; the model is as it was.
    """
    parts = _parts(len(views.weak), config.micro_batch)
    labels, output = ranks.together(lambda: _look(model, views, config, parts, guide.joint))
    aggregated = ranks.gather(labels.aggregated, images)
    logits = ranks.gather(output.logits.detach(), images).requires_grad_()
    chosen = aggregated.argmax(dim=1)
    kept = confident(aggregated, config.confidence) if config.confidence > 0 else None
    taught, drift = _taught(aggregated, chosen, guide)
    agreement = cross_entropy(logits, taught, kept)
    fair = fairness(logits, average, guide.expected)
    total = agreement + config.fairness_weight * fair.loss
    total.backward()
    assert logits.grad is not None, "the loss depends on every logit"
    slope = logits.grad[ranks.share(len(logits))]
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    ranks.together(lambda: _send_back(model, views, config, parts, output.logits, slope))
    ranks.sum_gradients(model.trainable().values())
    optimizer.step()
    losses = Losses(total, agreement, fair.loss, fair.average)
    return Step(labels, chosen, kept, output, losses, drift)


def _parts(images: int, at_once: int | None) -> list[slice]:
    """Return the rows that are looked at in one go: all, or so many at most; always one part."""
    size = at_once or max(images, 1)
    return [slice(begin, min(begin + size, images)) for begin in range(0, max(images, 1), size)]


def _look(
    model: MicroCLIP, views: Views, config: AdaptConfig, parts: list[slice], joint: Tensor | None
) -> tuple[Labels, Output]:
    """Label images and look at their strong views, with a graph where all are seen in one go."""
    labels, outputs = [], []
    for rows in parts:
        some = Views(*(view[rows] for view in views))
        labels.append(label(model, some, config, None if joint is None else joint[rows]))
        with torch.set_grad_enabled(len(parts) == 1), _encoder_precision(views, config):
            outputs.append(model(some.strong))
    return _joined(labels), _joined(outputs)


def _send_back(
    model: MicroCLIP,
    views: Views,
    config: AdaptConfig,
    parts: list[slice],
    logits: Tensor,
    slope: Tensor,
) -> None:
    """Add up the parameters' gradients, given that of the loss for the share's logits (b, C)."""
    if len(parts) == 1:
        logits.backward(slope)
        return
    for rows in parts:
        with _encoder_precision(views, config):
            seen = model(views.strong[rows])
        seen.logits.backward(slope[rows])


def _joined(parts: Any) -> Any:
    """Return tensors, or tuples of them, one behind the other along their first dimension."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return type(parts[0])(*(_joined(fields) for fields in zip(*parts, strict=True)))


def _taught(aggregated: Tensor, chosen: Tensor, guide: Guide) -> tuple[Tensor, Drift | None]:
    """Return what the strong view is taught, and the epoch's drift with this batch."""
    if guide.support is None or guide.rates is None or guide.drift is None:
        return chosen, None
    current = (LOGIT_SCALE * aggregated).softmax(dim=1)
    found = moved(current, guide.support)
    return targets(current, found, guide.rates), added(guide.drift, found)


def confident(aggregated: Tensor, threshold: float) -> Tensor:
    """Return bool (B,): the label's softmax probability at scale 100 reaches `threshold`."""
    return (LOGIT_SCALE * aggregated).softmax(dim=1).amax(dim=1) >= threshold


def _encoder_precision(views: Views, config: AdaptConfig) -> torch.autocast:
    """Return the autocast of the encoder; pseudo-labels and losses stay outside it."""
    device = views.weak.device.type
    return torch.autocast(device, torch.bfloat16, enabled=config.precision == "bf16")
