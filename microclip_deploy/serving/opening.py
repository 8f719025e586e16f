"""Open a run or an export with the session that fits it and the machine."""

import importlib.util
import logging
import re
from collections.abc import Callable
from pathlib import Path

from microclip_deploy import artifact
from microclip_deploy.errors import CheckpointError, EnvironmentProblem, UsageError, require
from microclip_deploy.serving.engines import has_engines
from microclip_deploy.serving.session import Session

_CHECKPOINT = "microclip.checkpoint/"
_EXPORT = "microclip.export/"

_log = logging.getLogger(__name__)


def open_session(path: Path, device: str = "cpu") -> Session:
    """Open a run or an export with the backend that the schema in its manifest asks for.

    Args:
        path: directory that `adapt` or `export` wrote.
        device: "auto", "cpu", "cuda" or "cuda:N"; for an export also "openvino", "tensorrt" and
            "tensorrt:N". "auto" is a GPU where the backend has one that works, otherwise the CPU;
            the session's `device` says which. A GPU is served by the CUDA kernels where cupy is
            installed, and of an export by its TensorRT engines where it has some for this machine;
            "tensorrt" insists on them.

    Raises:
        CheckpointError: missing, damaged or of an unknown schema.
        EnvironmentProblem: the backend's packages or the device are missing.
        UsageError: not a device that this backend knows.
    """
    schema = artifact.read_schema(path)
    if schema.startswith(_CHECKPOINT):
        session = _open_run(path, device)
    elif schema.startswith(_EXPORT):
        session = _open_export(path, device)
    else:
        raise CheckpointError(
            f"{path / artifact.MANIFEST}: expected schema {_CHECKPOINT}N or {_EXPORT}N, found "
            f"{schema}; give a directory that `adapt` or `export` wrote"
        )
    _log.info("%s: opened with %s on %s", path, type(session).__name__, session.device)
    return session


def is_export(path: Path) -> bool:
    """Say whether a directory is an export, which holds the adapted model alone.

    Raises:
        CheckpointError: it has no manifest with a schema.
    """
    return artifact.read_schema(path).startswith(_EXPORT)


# Through `require`, so that whichever package is missing comes with its install line.


def _open_run(path: Path, device: str) -> Session:
    """Open a run: with the kernels on a GPU, otherwise with PyTorch alone."""
    require("microclip_deploy.serving.torch_session", "adapt")
    from microclip_deploy.serving.torch_session import TorchSession, resolve_device

    found = resolve_device(device)
    if _is_cuda(found) and _has("cupy"):
        require("microclip_deploy.serving.torch_encoder", "gpu")
        from microclip_deploy.serving.torch_encoder import open_run

        session = _with_kernels(open_run, path, found, auto=device == "auto")
        if session is not None:
            return session
    return _without_cupy(TorchSession.open(path, found))


def _open_export(path: Path, device: str) -> Session:
    """Open an export: with engines or kernels on a GPU, otherwise with ONNX Runtime alone."""
    if re.fullmatch(r"tensorrt(:\d+)?", device):
        return _open_engines(path, device.replace("tensorrt", "cuda"))
    if (device == "auto" or _is_cuda(device)) and has_engines(path) and _has("tensorrt"):
        session = _with_engines(path, device)
        if session is not None:
            return session
    return open_graphs(path, device)


def open_graphs(path: Path, device: str = "cpu") -> Session:
    """Open an export with ONNX Runtime, whatever engines lie beside its graphs.

    Args:
        path: directory that `export` wrote.
        device: "auto", "cpu", "cuda", "cuda:N" or "openvino".

    Raises:
        CheckpointError: missing or damaged.
        EnvironmentProblem: packages or the device are missing.
        UsageError: not a device that ONNX Runtime serves.
    """
    require("microclip_deploy.serving.onnx_session", "cpu")
    from microclip_deploy.serving.onnx_graph import has_cuda
    from microclip_deploy.serving.onnx_session import OnnxSession

    found = "cuda" if device == "auto" and has_cuda() else device
    if _is_cuda(found) and _has("cupy"):
        require("microclip_deploy.serving.onnx_encoder", "gpu")
        from microclip_deploy.serving.onnx_encoder import open_export

        session = _with_kernels(open_export, path, found, auto=device == "auto")
        if session is not None:
            return session
    return _without_cupy(OnnxSession.open(path, device))


def _open_engines(path: Path, device: str) -> Session:
    for module in ("cupy", "tensorrt"):
        require(module, "gpu")
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


def _with_kernels(
    opener: Callable[[Path, str], Session], path: Path, device: str, *, auto: bool
) -> Session | None:
    """Open with the kernels; None, with a warning, where they do not know the model.

    With `auto` None also where they cannot be used.
    """
    try:
        return opener(path, device)
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


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
