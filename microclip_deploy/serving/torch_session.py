"""PyTorch session: the reference every exported graph must equal."""

import logging
import os
import re
from functools import cache
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from microclip_deploy.calibration import Calibration
from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.errors import EnvironmentProblem, UsageError
from microclip_deploy.model.checkpoint import load_model, read_checkpoint
from microclip_deploy.model.clip import exact_float32
from microclip_deploy.model.microclip import MicroCLIP
from microclip_deploy.paths import StrPath, as_path
from microclip_deploy.processors import checked_threads, usable_cpus
from microclip_deploy.serving.session import (
    Facts,
    Prediction,
    Session,
    closed_session,
)

_log = logging.getLogger(__name__)


class TorchSession(Session):
    """A MicroCLIP module as a session."""

    def __init__(
        self,
        model: MicroCLIP,
        classes: tuple[str, ...],
        preprocess: Preprocess,
        device: str,
        calibration: Calibration | None = None,
    ) -> None:
        classifier = model.class_matrix().detach().cpu().numpy()
        # A run's classes are those it adapted to.
        super().__init__(Facts(classes, frozenset(), preprocess, classifier, calibration), device)
        _first_process()
        self._model: MicroCLIP | None = model

    @classmethod
    def open(cls, path: StrPath, device: str = "cpu") -> Self:
        """Load the adapted model of a run directory on the device `resolve_device` finds."""
        device = resolve_device(device)
        checkpoint = read_checkpoint(as_path(path, "run"))
        known = checkpoint.manifest
        model = load_model(checkpoint, device)
        return cls(model, known.classes, known.preprocess, device, known.calibration)

    @torch.inference_mode()
    @exact_float32
    def _answer(self, pixels: NDArray[np.uint8]) -> Prediction:
        model = self._model
        if model is None:  # closed by another thread meanwhile
            raise closed_session()
        out = model(self.preprocess.normalize(_tensor(pixels).to(self.device)))
        cut = out.saliency
        found = (out.cls, out.fg, out.logits, cut.mask, out.attention, cut.complete)
        return Prediction(*(tensor.cpu().numpy() for tensor in found))

    def _release(self) -> None:
        self._model = None  # its memory goes once no call uses it


def _tensor(pixels: NDArray[np.uint8]) -> torch.Tensor:
    """Return a tensor of an array; PyTorch warns of one that cannot be written to."""
    return torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy())


@cache
def _first_process() -> int:
    """Return the process in which PyTorch first served: a fork of it inherits this answer."""
    return os.getpid()


def use_threads(threads: int | None) -> None:
    """Say how many threads PyTorch computes with on the CPU, in all of this process.

    Args:
        threads: None for what PyTorch uses by itself, but no more than this process may use.

    Raises:
        UsageError: no number of threads.
    """
    wanted = checked_threads(threads) or min(torch.get_num_threads(), usable_cpus())
    if _first_process() != os.getpid() and wanted > 1:
        _log.warning(
            "warning: this process was forked after PyTorch had served a run, whose threads do not "
            "survive that: using one thread; start it with multiprocessing's spawn method for more"
        )
        wanted = 1
    if wanted != torch.get_num_threads() or _first_process() != os.getpid():
        torch.set_num_threads(wanted)


def resolve_device(device: str) -> str:
    """Turn "auto" into the device that will be used; refuse one that is not there.

    Raises:
        UsageError: not the name of a device we know.
        EnvironmentProblem: a CUDA device was asked for and torch does not see it.
    """
    forked = torch.cuda._is_in_bad_fork()  # from a process that used CUDA
    if device == "auto":
        return "cuda" if torch.cuda.is_available() and not forked else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        exported = re.fullmatch(r"openvino|tensorrt(:\d+)?", device)
        remedy = "export the run first" if exported else "give one of them"
        raise UsageError(f"--device: expected auto, cpu, cuda or cuda:N, found {device}; {remedy}")
    if device != "cpu" and forked:
        raise EnvironmentProblem(
            f"--device {device}: expected a process that was not forked from one that used CUDA, "
            "found such a fork; start it with multiprocessing's spawn method, or use --device cpu"
        )
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device != "cpu" and int(device.partition(":")[2] or 0) >= count:
        raise EnvironmentProblem(
            f"--device {device}: torch {torch.__version__} sees {count} CUDA devices; use --device "
            "cpu, or run `microclip-deploy doctor` to see why"
        )
    return device
