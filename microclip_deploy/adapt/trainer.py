"""The adaptation loop: unlabeled images and class texts -> an adapted checkpoint.

Each iteration labels a batch with the model of this very moment (weak view and crops), and
teaches it these labels on the strong view. Only LayerNorms, SOAP's maps and the class matrix
move. docs/numerics.md sections 6 to 8 hold every equation.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from microclip_deploy.adapt.boundary import Drift
from microclip_deploy.adapt.loader import AdaptImages, Batch
from microclip_deploy.adapt.log import TrainingLog
from microclip_deploy.adapt.ranks import ALONE, Ranks
from microclip_deploy.adapt.reference import Reference
from microclip_deploy.adapt.state import TrainingState
from microclip_deploy.adapt.stop_signal import StopSignal
from microclip_deploy.adapt.tally import TALLY, sums
from microclip_deploy.adapt.train_step import (
    AdaptConfig,
    Guide,
    Losses,
    Step,
    Views,
    learning_rate,
    make_optimizer,
    train_step,
)
from microclip_deploy.adapt.views import ViewConfig
from microclip_deploy.data.photo import PhotoConfig
from microclip_deploy.errors import Interrupted, VerificationError
from microclip_deploy.joint import Shortlist
from microclip_deploy.model.microclip import MicroCLIP
from microclip_deploy.ncut.spec import NCutSpec

_log = logging.getLogger(__name__)

Validator: TypeAlias = Callable[[MicroCLIP, Tensor], Mapping[str, float]]
"""(model, int64 (images,) pseudo-labels) -> named measurements."""

STATE = "state"
"""Folder of the saved states in a run directory."""

LOG_EVERY = 10
"""Iterations between two lines of metrics.jsonl; also the device's synchronisation points."""


class Recipe(BaseModel):
    """All settings that decide the result of an adaptation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    adapt: AdaptConfig = AdaptConfig()
    views: ViewConfig = ViewConfig()
    photos: PhotoConfig = PhotoConfig()
    ncut: NCutSpec = NCutSpec()


@dataclass(frozen=True)
class Operation:
    """How a run is carried out: nothing here changes its result on a CPU.

    Several processes add up in another order, and so change its rounding.
    """

    directory: Path
    workers: int = 0
    save_every: int = 200
    """Iterations between two saved states."""
    ranks: Ranks = ALONE
    """The processes that adapt together."""


class Prior(NamedTuple):
    """What is known of the photos before the adaptation."""

    reference: Reference
    frequencies: NDArray[np.float64]
    """(C,), sum 1: how often each class seems to occur among them."""
    joint: Shortlist | None = None
    """What a joint reading by zero-shot says of each, for `joint_share`."""


class StepReport(NamedTuple):
    """Progress after an iteration that was logged."""

    done: int
    total: int
    epoch: int
    loss: float
    images_per_s: float


class Adapted(NamedTuple):
    """What an adaptation leaves besides the model."""

    history: list[dict[str, Any]]
    """One record an epoch; none in a process that does not lead."""
    labels: Tensor
    """int64 (images,): the last pseudo-label of each image."""


def adapt(
    model: MicroCLIP,
    images: AdaptImages,
    config: AdaptConfig,
    operation: Operation,
    *,
    prior: Prior | None = None,
    validate: Validator | None = None,
    on_step: Callable[[StepReport], None] = lambda _: None,
) -> Adapted:
    """Adapt `model` in place, resuming from the run directory's state if it holds one.

    Of several processes all end with the same model; the first one alone writes and measures.

    Args:
        model: in its initial state, on the device that trains.
        images: the unlabeled images, with the backbone's normalisation.
        config: optimisation settings.
        operation: run directory, workers, saving.
        prior: what the settings `fairness_prior`, `boundary` and `joint_share` need.
        validate: given the model and the pseudo-labels after each epoch; what it returns is logged
            and never reaches the training.
        on_step: told about progress at every logged iteration.

    Raises:
        Interrupted: SIGINT or SIGTERM arrived; the state is on disk.
        VerificationError: the loss is no longer a finite number; the last good state is kept.
        EnvironmentProblem: the disk is full, or another process of the adaptation ended.
    """
    ranks = operation.ranks
    model.backbone.checkpointing = config.checkpointing
    state = start_state(model, images, config)
    state.restore(operation.directory / STATE)
    ranks.require_same(state.checksum())
    total = config.epochs * images.iterations(config.batch_size)
    log = TrainingLog(operation.directory, state.done, state.epoch) if ranks.leads else None
    try:
        with StopSignal() as stop:
            loop = _Loop(model, images, config, operation, prior, state, log, total, on_step, stop)
            while state.epoch < config.epochs:
                loop.run_epoch()
                loop.finish_epoch(validate)
        return Adapted(log.history() if log else [], state.labels.cpu())
    finally:
        if log:
            log.close()


def start_state(model: MicroCLIP, images: AdaptImages, config: AdaptConfig) -> TrainingState:
    """Return the state of a run that has not begun."""
    device = model.classifier.device
    unlabeled = torch.full((len(images.paths),), -1, dtype=torch.int64, device=device)
    tally = torch.zeros(len(TALLY), dtype=torch.float64, device=device)
    parameters = model.trainable()
    drift = Drift.none(len(model.classifier), device) if config.boundary else None
    return TrainingState(
        parameters,
        make_optimizer(parameters, config),
        unlabeled,
        unlabeled.clone(),
        tally,
        drift=drift,
        rates=None if drift is None else drift.rates(),
    )


@dataclass
class _Loop:
    """What the iterations of one run share."""

    model: MicroCLIP
    images: AdaptImages
    config: AdaptConfig
    operation: Operation
    prior: Prior | None
    state: TrainingState
    log: TrainingLog | None
    """None in a process that does not lead."""
    total: int
    on_step: Callable[[StepReport], None]
    stop: StopSignal
    trained: int = 0
    """Images since this process began the epoch."""
    started: float = 0.0
    """When it did, in perf_counter's seconds."""
    logged: tuple[int, float] = (0, 0.0)
    """`trained` and the time when a metrics line was last written."""

    def run_epoch(self) -> None:
        """Run the current epoch's remaining iterations."""
        state, config = self.state, self.config
        self.trained, self.started = 0, time.perf_counter()
        self.logged = (0, self.started)
        batches = self.images.epoch(
            state.epoch,
            batch_size=config.batch_size,
            start_iteration=state.step,
            workers=self.operation.workers,
            ranks=self.operation.ranks,
            device=self.model.classifier.device,
        )
        for batch in batches:
            found = self.iterate(batch)
            if state.done % LOG_EVERY == 0 or state.done == self.total:
                self.log_step(found)
            # Asked once: a signal after the save must wait its turn.
            stopping = self.operation.ranks.any(self.stop.received)
            if state.done % self.operation.save_every == 0 or stopping:
                self._finite(found)
                self.save()
            self.leave_if_stopped(stopping)

    def iterate(self, batch: Batch) -> Losses:
        """Label a batch, learn from it, and add to the tally."""
        state, ranks, count = self.state, self.operation.ranks, len(batch.whole)
        step = self._step(batch)
        state.drift = step.drift
        state.average = step.losses.average.detach()
        state.labels[batch.whole.to(state.labels.device)] = step.chosen
        state.tally += ranks.sum(sums(step, ranks.share(count)))
        self.trained += count
        state.step += 1
        state.done += 1
        return step.losses

    def _step(self, batch: Batch) -> Step:
        """Take the step, again with half as many images at a time wherever memory runs out."""
        state, device = self.state, self.model.classifier.device
        views = Views(*(self._network_input(x.to(device)) for x in batch[:3]))
        rate = learning_rate(self.config, state.done, self.total)
        guide, ranks, count = self._guide(batch), self.operation.ranks, len(batch.whole)
        while True:
            try:
                return train_step(
                    self.model,
                    state.optimizer,
                    views,
                    self.config,
                    average=state.average,
                    rate=rate,
                    guide=guide,
                    ranks=ranks,
                    images=count,
                )
            except torch.OutOfMemoryError:
                largest = math.ceil(count / ranks.count)
                held = min(largest, self.config.micro_batch or largest)
                if held == 1:
                    raise
                self._hold_fewer(held, math.ceil(held / 2))

    def _hold_fewer(self, held: int, fewer: int) -> None:
        """From now on look at fewer images at a time."""
        self.config = self.config.model_copy(update={"micro_batch": fewer})
        if self.operation.ranks.leads:
            _log.warning(
                "warning: out of memory with %d images at a time; from here on %d, with the same "
                "batch and the same result but for rounding; --set adapt.micro_batch=%d begins "
                "with it",
                *(held, fewer, fewer),
            )

    def _guide(self, batch: Batch) -> Guide:
        """Return what a batch needs of the time before the adaptation."""
        prior, state, guide = self.prior, self.state, Guide()
        if prior is None:
            return guide
        if self.config.fairness_prior == "estimated":
            expected = torch.from_numpy(prior.frequencies).to(self.model.frozen)
            guide = guide._replace(expected=expected)
        if prior.joint is not None:
            rows = Shortlist(*(part[batch.indices.numpy()] for part in prior.joint))
            joint = torch.from_numpy(rows.dense(len(prior.frequencies)))
            guide = guide._replace(joint=joint.to(self.model.frozen))
        if state.drift is not None:
            support = prior.reference.support(batch.whole)
            guide = guide._replace(support=support, rates=state.rates, drift=state.drift)
        return guide

    def log_step(self, found: Losses) -> None:
        """Write a metrics line and tell the user."""
        state, now = self.state, time.perf_counter()
        values = self._finite(found)
        before, then = self.logged
        speed = (self.trained - before) / max(now - then, 1e-9)
        self.logged = (self.trained, now)
        rate = state.optimizer.param_groups[0]["lr"]
        line = {"iteration": state.done, "epoch": state.epoch + 1, **values, "lr": rate}
        if self.log is None:
            return
        self.log.metrics({**line, "images_per_s": round(speed, 2)})
        self.on_step(StepReport(state.done, self.total, state.epoch + 1, values["loss"], speed))

    def finish_epoch(self, validate: Validator | None) -> None:
        """Measure and log the epoch, start the next one, and save."""
        state, seconds = self.state, time.perf_counter() - self.started
        if validate is not None:
            self.save()  # a long validation must not cost the epoch when it fails or is killed
        if self.log is not None:
            self.log.epoch(self._epoch_record(seconds, validate))
        state.average, state.step, state.epoch = None, 0, state.epoch + 1
        state.previous_labels.copy_(state.labels)
        state.tally.zero_()
        if state.drift is not None:
            state.rates = state.drift.rates()
            state.drift = Drift.none(len(state.rates), state.rates.device)
        self.save()
        if state.epoch < self.config.epochs:
            self.leave_if_stopped(self.operation.ranks.any(self.stop.received))

    def save(self) -> None:
        """Save the state, unless a number in it is none; on return it is on disk.

        A finite loss may still have left a gradient that was not.
        """
        finite = [torch.isfinite(p).all() for p in self.state.parameters.values()]
        if not torch.stack(finite).all().item():
            raise self._diverged()
        if self.operation.ranks.leads:
            self.state.save(self.operation.directory / STATE)
        self.operation.ranks.wait()

    def leave_if_stopped(self, received: int) -> None:
        """Raise Interrupted if a process got a signal; the state was saved just before."""
        if received and not self.operation.ranks.leads:
            raise Interrupted("stopped with the first process", received)
        if received:
            raise Interrupted(
                f"stopped at iteration {self.state.done} of {self.total}; the state is saved, "
                f"continue with: microclip-deploy adapt --resume -o {self.operation.directory}",
                received,
            )

    def _network_input(self, pixels: Tensor) -> Tensor:
        flat = pixels.flatten(0, -4)
        normal: Tensor = self.images.preprocess.normalize(flat).unflatten(0, pixels.shape[:-3])
        return normal

    def _epoch_record(self, seconds: float, validate: Validator | None) -> dict[str, Any]:
        state = self.state
        images, *sums = state.tally.tolist()
        shares = {name: total / images for name, total in zip(TALLY[1:], sums, strict=True)}
        if not math.isfinite(shares["loss"]):
            raise self._diverged()
        known = state.previous_labels >= 0
        changed = (state.labels != state.previous_labels) & known
        classes = len(self.model.classifier)
        return {
            "epoch": state.epoch + 1,
            "iteration": state.done,
            **shares,
            "churn": changed.sum().item() / known.sum().item() if bool(known.any()) else None,
            "label_counts": torch.bincount(state.labels.clamp(min=0), minlength=classes).tolist(),
            "seconds": round(seconds, 3),
            "images_per_s": round(self.trained / seconds, 2),
            "validation": dict(validate(self.model, state.labels)) if validate else None,
        }

    def _finite(self, found: Losses) -> dict[str, float]:
        parts = (found.total, found.cross_entropy, found.fairness)
        values = torch.stack([part.detach().float() for part in parts]).tolist()
        if not all(math.isfinite(value) for value in values):
            raise self._diverged()
        return dict(zip(("loss", "cross_entropy", "fairness"), values, strict=True))

    def _diverged(self) -> VerificationError:
        return VerificationError(
            f"the loss is not a finite number near iteration {self.state.done}: training diverged; "
            "the last good state is kept; start again with a lower --set adapt.lr"
        )
