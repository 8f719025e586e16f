"""Open a run or an export with the session that fits it and the machine."""

import importlib.util
import logging
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from microclip_deploy import artifact
from microclip_deploy.calibration import FOLDER
from microclip_deploy.errors import (
    CheckpointError,
    EnvironmentProblem,
    UsageError,
    missing_package,
    require,
)
from microclip_deploy.paths import StrPath, as_path
from microclip_deploy.processors import checked_threads
from microclip_deploy.serving.engines import has_engines
from microclip_deploy.serving.flavour import MODULES
from microclip_deploy.serving.session import Session

if TYPE_CHECKING:
    from microclip_deploy.model.checkpoint import CheckpointManifest
    from microclip_deploy.model.clip import Clip
    from microclip_deploy.model.microclip import MicroCLIP

_CHECKPOINT = "microclip.checkpoint/"
_EXPORT = "microclip.export/"

_log = logging.getLogger(__name__)


def open_session(
    path: StrPath,
    device: str = "cpu",
    *,
    max_pixels: int | None = None,
    bit_depth: int | None = None,
    threads: int | None = None,
    prior: StrPath = FOLDER,
) -> Session:
    """Open a run or an export with the backend that the schema in its manifest asks for.

    Args:
        path: directory that `adapt` or `export` wrote; text or a Path.
        device: "auto", "cpu", "cuda" or "cuda:N"; for an export also "openvino", "tensorrt" and
            "tensorrt:N". "auto" is a GPU where the backend has one that works, otherwise the CPU;
            the session's `device` says which. A GPU is served by the CUDA kernels where cupy is
            installed, and of an export by its TensorRT engines where it has some for this machine;
            "tensorrt" insists on them.
        max_pixels: as in `PhotoConfig`, in place of the run's; so `session.preprocess.read` takes
            photos that are larger.
        bit_depth: likewise.
        threads: of the CPU for one operator; None for one a core that this process may use.
            PyTorch has one such number for all of the process.
        prior: how frequent the classes are where the photos come from, as for `Session.expect`.

    Raises:
        CheckpointError: missing, damaged or of an unknown schema; without the calibration that
            another prior than "folder" needs.
        DataError: the prior's file cannot be used.
        EnvironmentProblem: the backend's packages or the device are missing.
        UsageError: not a path, a number out of range, or a device that this backend does not know.
    """
    path, device, threads = as_path(path, "session"), str(device), checked_threads(threads)
    schema = artifact.read_schema(path)
    if schema.startswith(_CHECKPOINT):
        session = _open_run(path, device, threads)
    elif schema.startswith(_EXPORT):
        session = _open_export(path, device, threads)
    else:
        raise CheckpointError(
            f"{path / artifact.MANIFEST}: expected schema {_CHECKPOINT}N or {_EXPORT}N, found "
            f"{schema}; give a directory that `adapt` or `export` wrote"
        )
    if prior != FOLDER:
        try:
            session.expect(prior)
        except BaseException:
            session.close()
            raise
    if max_pixels is not None or bit_depth is not None:
        session.preprocess = session.preprocess.reading(max_pixels=max_pixels, bit_depth=bit_depth)
    _log.info("%s: opened with %s on %s", path, type(session).__name__, session.device)
    return session


def is_export(path: StrPath) -> bool:
    """Say whether a directory is an export, which holds the adapted model alone.

    Raises:
        CheckpointError: it has no manifest with a schema.
    """
    return artifact.read_schema(as_path(path, "directory")).startswith(_EXPORT)


# Through `require`, so that whichever package is missing comes with its install line.


class RunSessions(NamedTuple):
    """Both models of a run; they share the weights that were not trained."""

    adapted: Session
    initial: Session
    """The model before adaptation: its class matrix is the mean of the descriptions."""
    names: NDArray[np.float32]
    """(C, E), unit rows: the class names alone, as plain zero-shot CLIP uses them."""
    prior: NDArray[np.float32]
    """(C, E), unit rows: the frozen head that pseudo-labels lean on."""

    def __enter__(self) -> Self:
        """Return the sessions."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close both."""
        self.adapted.close()
        self.initial.close()


def open_run(
    path: StrPath,
    device: str = "cpu",
    *,
    clip: "Clip | None" = None,
    threads: int | None = None,
) -> RunSessions:
    """Open a run as it is now and as it was before adaptation; CLIP is loaded once.

    Args:
        path: directory that `adapt` wrote.
        device: "auto", "cpu", "cuda" or "cuda:N".
        clip: the model behind the run, if it is loaded on this device already.
        threads: as for `open_session`.

    Raises:
        CheckpointError: missing or damaged, or CLIP's weights have changed.
        EnvironmentProblem: packages or the device are missing.
        UsageError: not a path, a number of threads, or a device that PyTorch knows.
    """
    require("microclip_deploy.serving.torch_session", "adapt")
    from microclip_deploy.model import checkpoint as stored
    from microclip_deploy.serving.torch_session import TorchSession, resolve_device, use_threads

    place = resolve_device(str(device))
    use_threads(threads)
    checkpoint = stored.read_checkpoint(as_path(path, "run"))
    clip = clip or stored.load_backbone(checkpoint, place)
    known, heads = checkpoint.manifest, checkpoint.heads()
    initial = stored.initial_model(checkpoint, clip)
    return RunSessions(
        _open_model(stored.load_model(checkpoint, place, clip=clip), known, place, device),
        TorchSession(initial, known.classes, known.preprocess, place),
        heads.names.numpy(),
        heads.frozen.numpy(),
    )


def _open_run(path: Path, device: str, threads: int | None) -> Session:
    require("microclip_deploy.serving.torch_session", "adapt")
    from microclip_deploy.model.checkpoint import load_model, read_checkpoint
    from microclip_deploy.serving.torch_session import resolve_device, use_threads

    place = resolve_device(device)
    use_threads(threads)
    checkpoint = read_checkpoint(path)
    return _open_model(load_model(checkpoint, place), checkpoint.manifest, place, device)


def _open_model(model: "MicroCLIP", known: "CheckpointManifest", place: str, asked: str) -> Session:
    """Open a model that is on its device: with the kernels on a GPU, otherwise with PyTorch."""
    from microclip_deploy.serving.torch_session import TorchSession

    described, read = (known.classes, known.preprocess, place), known.calibration
    if _is_cuda(place) and _has("cupy"):
        require("microclip_deploy.serving.torch_encoder", "gpu")
        from microclip_deploy.serving.torch_encoder import session_of

        session = _with_kernels(
            partial(session_of, model, *described, calibration=read), auto=asked == "auto"
        )
        if session is not None:
            return session
    return _without_cupy(TorchSession(model, *described, calibration=read))


def _open_export(path: Path, device: str, threads: int | None) -> Session:
    """Open an export: with engines or kernels on a GPU, otherwise with ONNX Runtime alone."""
    if re.fullmatch(r"tensorrt(:\d+)?", device):
        return _open_engines(path, device.replace("tensorrt", "cuda"))
    if (device == "auto" or _is_cuda(device)) and has_engines(path) and _has_tensorrt():
        session = _with_engines(path, device)
        if session is not None:
            return session
    return open_graphs(path, device, threads=threads)


def open_graphs(path: StrPath, device: str = "cpu", *, threads: int | None = None) -> Session:
    """Open an export with ONNX Runtime, whatever engines lie beside its graphs.

    Args:
        path: directory that `export` wrote.
        device: "auto", "cpu", "cuda", "cuda:N" or "openvino".
        threads: as for `open_session`.

    Raises:
        CheckpointError: missing or damaged.
        EnvironmentProblem: packages or the device are missing.
        UsageError: not a path, a number of threads, or a device that ONNX Runtime serves.
    """
    path, device = as_path(path, "export"), str(device)
    require("microclip_deploy.serving.onnx_session", "cpu")
    from microclip_deploy.serving.onnx_graph import has_cuda
    from microclip_deploy.serving.onnx_session import OnnxSession

    found = "cuda" if device == "auto" and has_cuda() else device
    if _is_cuda(found) and _has("cupy"):
        require("microclip_deploy.serving.onnx_encoder", "gpu")
        from microclip_deploy.serving.onnx_encoder import open_export

        session = _with_kernels(partial(open_export, path, found), auto=device == "auto")
        if session is not None:
            return session
    return _without_cupy(OnnxSession.open(path, device, threads=threads))


def _open_engines(path: Path, device: str) -> Session:
    require("cupy", "gpu")
    if not _has_tensorrt():
        raise missing_package("tensorrt", "gpu")
    from microclip_deploy.serving.tensorrt_encoder import open_engines

    return open_engines(path, device)


def _with_engines(path: Path, device: str) -> Session | None:
    """Open with the engines; None, with a warning, where there are none for this machine.

    With "auto" None also where they are damaged.
    """
    auto = device == "auto"
    try:
        return _open_engines(path, "cuda" if auto else device)
    except (CheckpointError, EnvironmentProblem) as problem:
        if isinstance(problem, CheckpointError) and not auto:
            raise
        _log.warning("warning: opening without the TensorRT engines: %s", problem)
        return None


def _with_kernels(opener: Callable[[], Session], *, auto: bool) -> Session | None:
    """Open with the kernels; None, with a warning, where they do not know the model.

    With `auto` None also where they cannot be used.
    """
    try:
        return opener()
    except UsageError as problem:
        told = str(problem)
    except (CheckpointError, EnvironmentProblem) as problem:
        if not auto:
            raise
        told = str(problem)
    _log.warning("warning: opening without the CUDA kernels: %s", told)
    return None


def _without_cupy(session: Session) -> Session:
    """Return a session, with a warning where a package is all that the kernels lack."""
    if _is_cuda(session.device) and not _has("cupy"):
        _log.warning(
            "warning: the package 'cupy' is not installed: serving on %s without the CUDA "
            'kernels, which is slower; run: pip install "microclip-deploy[gpu]"',
            session.device,
        )
    return session


def _is_cuda(device: str) -> bool:
    return re.fullmatch(r"cuda(:\d+)?", device) is not None


def _has_tensorrt() -> bool:
    return any(map(_has, MODULES.values()))


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
