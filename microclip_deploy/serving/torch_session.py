"""PyTorch session: the reference every exported graph must equal."""

import re
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.errors import EnvironmentProblem, UsageError
from microclip_deploy.model.checkpoint import load_model, read_checkpoint
from microclip_deploy.model.clip import exact_float32
from microclip_deploy.model.microclip import MicroCLIP
from microclip_deploy.serving.session import (
    Facts,
    Prediction,
    Session,
    checked_images,
    closed_session,
)


class TorchSession(Session):
    """A MicroCLIP module as a session."""

    def __init__(
        self, model: MicroCLIP, classes: tuple[str, ...], preprocess: Preprocess, device: str
    ) -> None:
        classifier = model.class_matrix().detach().cpu().numpy()
        # A run's classes are those it adapted to.
        super().__init__(Facts(classes, frozenset(), preprocess, classifier), device)
        self._model: MicroCLIP | None = model

    @classmethod
    def open(cls, path: Path, device: str = "cpu") -> Self:
        """Load the adapted model of a run directory on the device `resolve_device` finds."""
        device = resolve_device(device)
        checkpoint = read_checkpoint(path)
        known = checkpoint.manifest
        return cls(load_model(checkpoint, device), known.classes, known.preprocess, device)

    @torch.inference_mode()
    @exact_float32
    def predict(self, images: NDArray[np.uint8]) -> Prediction:
        """Classify images as every session does."""
        if self._model is None:
            raise closed_session()
        pixels = torch.from_numpy(checked_images(images, self.preprocess.size)).to(self.device)
        out = self._model(self.preprocess.normalize(pixels))
        cut = out.saliency
        found = (out.cls, out.fg, out.logits, cut.mask, out.attention, cut.complete)
        return Prediction(*(tensor.cpu().numpy() for tensor in found))

    def close(self) -> None:
        """Drop the module; its memory goes with it."""
        self._model = None


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
