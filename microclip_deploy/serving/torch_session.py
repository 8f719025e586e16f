"""PyTorch session: the reference every exported graph must equal."""

import re
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.errors import EnvironmentProblem, UsageError
from microclip_deploy.model.checkpoint import initial_model, load_model, read_checkpoint
from microclip_deploy.model.microclip import MicroCLIP
from microclip_deploy.serving.session import Prediction


class TorchSession:
    """A MicroCLIP module behind the Session protocol."""

    def __init__(
        self, model: MicroCLIP, classes: tuple[str, ...], preprocess: Preprocess, device: str
    ) -> None:
        self.model = model
        self.classes = classes
        self.unadapted: frozenset[str] = frozenset()  # a run's classes are those it adapted to
        self.preprocess = preprocess
        self.device = device

    @classmethod
    def open(cls, path: Path, device: str = "cpu") -> Self:
        """Load the adapted model of a run directory on the device `resolve_device` finds."""
        device = resolve_device(device)
        checkpoint = read_checkpoint(path)
        model = load_model(checkpoint, device)
        return cls(model, checkpoint.manifest.classes, checkpoint.manifest.preprocess, device)

    @classmethod
    def open_initial(cls, path: Path, device: str = "cpu") -> Self:
        """Load the model of a run directory as it was before adaptation."""
        device = resolve_device(device)
        checkpoint = read_checkpoint(path)
        model = initial_model(checkpoint, device)
        return cls(model, checkpoint.manifest.classes, checkpoint.manifest.preprocess, device)

    @torch.inference_mode()
    def predict(self, images: NDArray[np.uint8]) -> Prediction:
        """Classify uint8 (B, S, S, 3) images that `preprocess.test_view` made."""
        pixels = torch.from_numpy(np.ascontiguousarray(images)).to(self.device)
        out = self.model(self.preprocess.normalize(pixels))
        found = (
            out.cls,
            out.fg,
            out.logits,
            out.saliency.mask,
            out.attention,
            out.saliency.complete,
        )
        return Prediction(*(tensor.cpu().numpy() for tensor in found))

    def classifier(self) -> NDArray[np.float32]:
        """Return the learnable class matrix, (C, E), unit rows."""
        return self.model.class_matrix().detach().cpu().numpy()

    def close(self) -> None:
        """Drop the module; its memory goes with it."""
        del self.model

    def __enter__(self) -> Self:
        """Return the session."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the session."""
        self.close()


def resolve_device(device: str) -> str:
    """Turn "auto" into the device that will be used; refuse one that is not there.

    Raises:
        UsageError: not the name of a device we know.
        EnvironmentProblem: a CUDA device was asked for and torch does not see it.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        exported = re.fullmatch(r"openvino|tensorrt(:\d+)?", device)
        remedy = "export the run first" if exported else "give one of them"
        raise UsageError(f"--device: expected auto, cpu, cuda or cuda:N, found {device}; {remedy}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device != "cpu" and int(device.partition(":")[2] or 0) >= count:
        raise EnvironmentProblem(
            f"--device {device}: torch {torch.__version__} sees {count} CUDA devices; use --device "
            "cpu, or run `microclip-deploy doctor` to see why"
        )
    return device
