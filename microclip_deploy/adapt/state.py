"""Everything that must survive a kill: the state of a training run, saved atomically.

One safetensors file a save, with its position in the header and its sha256 beside it. The two
newest are kept; a damaged newest file falls back to the one before. Views and data order depend
on (seed, epoch, image) alone, so there is no random state to save.
"""

import json
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from microclip_deploy import artifact
from microclip_deploy.adapt.boundary import Drift
from microclip_deploy.errors import CheckpointError

_KEPT = 2


@dataclass
class TrainingState:
    """A training run between two iterations."""

    parameters: dict[str, nn.Parameter]
    """The trained tensors by name."""
    optimizer: torch.optim.Optimizer
    """AdamW over exactly these tensors."""
    labels: Tensor
    """int64 (images,): newest pseudo-label of each image, -1 before its first."""
    previous_labels: Tensor
    """int64 (images,): pseudo-labels at the end of the previous epoch."""
    tally: Tensor
    """float64 (K,): sums over the current epoch."""
    average: Tensor | None = None
    """float (C,): fairness running mean; None at the start of an epoch."""
    drift: Drift | None = None
    """Of the current epoch, where boundary-preserving targets are taught."""
    rates: Tensor | None = None
    """float32 (C, C): the drift's rates of the epoch before, likewise."""
    epoch: int = 0
    """Current epoch, from 0."""
    step: int = 0
    """Iterations done in the current epoch."""
    done: int = 0
    """Iterations done in all."""

    def save(self, directory: Path) -> None:
        """Write the state; on return it is on disk and older ones beyond two are gone."""
        directory.mkdir(parents=True, exist_ok=True)
        position = {"epoch": self.epoch, "step": self.step, "done": self.done}
        tensors = {name: t.detach().cpu().contiguous() for name, t in self._tensors().items()}
        path = directory / f"step-{self.done:09d}.safetensors"
        artifact.write_bytes(path, save(tensors, metadata={"position": json.dumps(position)}))
        artifact.write_json(path.with_suffix(".json"), {"sha256": artifact.sha256_file(path)})
        kept = {file.stem for file in _saved(directory)[-_KEPT:]}
        for old in directory.iterdir():  # older states, and what killed writes left behind
            if old.stem not in kept:
                old.unlink(missing_ok=True)

    def restore(self, directory: Path) -> None:
        """Load the newest intact state of a directory in place; without any, change nothing.

        Raises:
            CheckpointError: states exist but none is intact, or they belong to another run.
        """
        saved = _saved(directory)
        for path in reversed(saved):
            if _intact(path):
                self._load(path)
                return
        if saved:
            raise CheckpointError(
                f"{directory}: expected an intact state, found only damaged ones; start again with "
                "--overwrite"
            )

    def checksum(self) -> int:
        """Return a number that tells states apart, by their position and trained tensors."""
        found = self.done
        for parameter in self.parameters.values():
            found = zlib.crc32(parameter.detach().cpu().contiguous().numpy().tobytes(), found)
        return found

    def _tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {f"model.{name}": p for name, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"adamw.{key}.{name}"] = value
        tensors |= {
            "labels": self.labels,
            "previous_labels": self.previous_labels,
            "tally": self.tally,
        }
        if self.drift is not None and self.rates is not None:
            tensors |= {f"drift.{name}": t for name, t in self.drift._asdict().items()}
            tensors["rates"] = self.rates
        return tensors if self.average is None else {**tensors, "average": self.average}

    @torch.no_grad()
    def _load(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            position = json.loads(file.metadata()["position"])
        expected = {f"model.{name}" for name in self.parameters}
        if {name for name in stored if name.startswith("model.")} != expected:
            raise CheckpointError(f"{path}: the state of another model; give a new --out")
        for name, parameter in self.parameters.items():
            parameter.copy_(stored[f"model.{name}"])
            # AdamW keeps its step count on the CPU and its moments beside the parameter.
            self.optimizer.state[parameter] = {
                key: stored[f"adamw.{key}.{name}"].to("cpu" if key == "step" else parameter.device)
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"adamw.{key}.{name}" in stored
            }
        self.labels.copy_(stored["labels"])
        self.previous_labels.copy_(stored["previous_labels"])
        self.tally.copy_(stored["tally"])
        if self.drift is not None and self.rates is not None:
            self.rates.copy_(stored["rates"])
            for name, tensor in self.drift._asdict().items():
                tensor.copy_(stored[f"drift.{name}"])
        average = stored.get("average")
        self.average = None if average is None else average.to(self.tally.device)
        self.epoch, self.step, self.done = (position[key] for key in ("epoch", "step", "done"))


def _saved(directory: Path) -> list[Path]:
    """Return the state files that were finished, oldest first.

    The JSON file comes second: without it a kill cut the save short, and it never happened.
    """
    return [
        path
        for path in sorted(directory.glob("step-*.safetensors"))
        if path.with_suffix(".json").is_file()
    ]


def _intact(path: Path) -> bool:
    with suppress(CheckpointError, KeyError, TypeError):
        return bool(
            artifact.read_json(path.with_suffix(".json"))["sha256"] == artifact.sha256_file(path)
        )
    return False
