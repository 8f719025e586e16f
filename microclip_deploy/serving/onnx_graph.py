"""One ONNX file loaded by ONNX Runtime on a device that is really used, with our errors.

    cpu       CPUExecutionProvider
    cuda[:N]  CUDAExecutionProvider, float32 without TF32
    openvino  OpenVINOExecutionProvider on the CPU, float32 without bfloat16
    auto      cuda where it works, otherwise cpu

The cut joins two tokens whose similarity is above a threshold. Reduced precision moves
similarities across it, and with them whole masks; that is why every provider computes in the
precision of the graph.
"""

import ctypes
import io
import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast
from weakref import WeakSet

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state

from microclip_deploy.errors import (
    CheckpointError,
    EnvironmentProblem,
    MicroclipError,
    UsageError,
)
from microclip_deploy.processors import checked_threads, limited_cpus

_CPU = "CPUExecutionProvider"
_CUDA = "CUDAExecutionProvider"
_OPENVINO = "OpenVINOExecutionProvider"

_INSTALL: Mapping[str, str] = {
    _CUDA: "pip uninstall -y onnxruntime; pip install 'onnxruntime-gpu[cuda,cudnn]'",
    _OPENVINO: "pip uninstall -y onnxruntime; pip install onnxruntime-openvino",
}
"""What makes a provider available; its packages share one module and exclude each other."""

# ONNX Runtime's errors share no base class.
_ERRORS: tuple[type[Exception], ...] = (
    MemoryError,
    RuntimeError,
    ValueError,
    *(
        kind
        for kind in vars(onnxruntime_pybind11_state).values()
        if isinstance(kind, type) and issubclass(kind, Exception)
    ),
)

_log = logging.getLogger(__name__)


class Input(NamedTuple):
    """An input of a graph."""

    dtype: str
    """As ONNX Runtime names it, such as "tensor(uint8)"."""
    shape: tuple[int | str | None, ...]
    """Names and None stand for sizes that may vary."""


class Buffer(NamedTuple):
    """Memory of the graph's device that a bound graph reads or writes at every run."""

    address: int
    dtype: type[np.generic]
    shape: tuple[int, ...]


class OnnxGraph:
    """A loaded ONNX file. `run` may be called from several threads at once."""

    device: str
    """What runs it: "cpu", "cuda:N" or "openvino"."""

    def __init__(
        self,
        path: Path,
        device: str = "cpu",
        *,
        threads: int | None = None,
        stream: int | None = None,
    ) -> None:
        """Load a graph.

        Args:
            path: an .onnx file; data outside its folder is refused.
            device: "auto", "cpu", "cuda", "cuda:N" or "openvino".
            threads: of one operator on the CPU; None for one a core that this process may use.
            stream: address of the CUDA stream that everything runs on; only with "cuda" and
                "cuda:N". None for one of ONNX Runtime's own.

        Raises:
            CheckpointError: no graph that this ONNX Runtime can run.
            EnvironmentProblem: the device, its provider or its memory is missing.
            UsageError: an unknown device, or no number of threads.
        """
        checked_threads(threads)
        self._path = path
        self._session = (
            _start_auto(path, threads)
            if device == "auto"
            else _start(path, device, threads, stream)
        )
        self.device = _device_of(self._session)
        _kept_in_forks().add(self)

    def inputs(self) -> dict[str, Input]:
        """Return the inputs by name, those with a default among them."""
        session = self._session
        nodes = [*session.get_inputs(), *session.get_overridable_initializers()]
        return {node.name: Input(node.type, tuple(node.shape)) for node in nodes}

    def outputs(self) -> tuple[str, ...]:
        """Return the names of all outputs."""
        return tuple(node.name for node in self._session.get_outputs())

    def run(self, outputs: Sequence[str], feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Compute the named outputs.

        Raises:
            CheckpointError: the graph cannot be run with these inputs.
            EnvironmentProblem: the device failed, or is out of memory.
        """
        try:
            found = self._session.run(list(outputs), dict(feeds))
        except _ERRORS as error:
            self._settle(feeds)
            raise _problem(self._path, self.device, error) from error
        return cast(list[NDArray[Any]], found)

    def bind(
        self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]
    ) -> Callable[[], None]:
        """Return what computes outputs from inputs in place, without copies.

        A run returns when the device is done: the pinned memory that it took would otherwise be
        kept until the session goes, and abort the process then (`_settle`). The caller keeps the
        buffers alive, and waits for the stream before it drops the graph.

        Raises:
            CheckpointError: the graph has no such input or output; so does each run that fails.
            EnvironmentProblem: by a run: the device failed, or is out of memory.
        """
        kind, _, number = self.device.partition(":")
        session = self._session

        def place(buffer: Buffer) -> tuple[Any, ...]:
            return kind, int(number or 0), buffer.dtype, list(buffer.shape), buffer.address

        def run() -> None:
            try:
                session.run_with_iobinding(binding)
            except _ERRORS as error:
                self._settle(
                    {name: np.zeros(each.shape, each.dtype) for name, each in inputs.items()}
                )
                raise _problem(self._path, self.device, error) from error

        try:
            binding = session.io_binding()
            for name, buffer in inputs.items():
                binding.bind_input(name, *place(buffer))
            for name, buffer in outputs.items():
                binding.bind_output(name, *place(buffer))
        except _ERRORS as error:
            raise _problem(self._path, self.device, error) from error
        return run

    def _settle(self, feeds: Mapping[str, NDArray[Any]]) -> None:
        """Run one row after a failed run on CUDA; if that fails too, never free the session.

        A run frees the small pieces of pinned memory that it took when it ends; a run that fails
        leaves them to the next. What is left when the session goes is freed by a thread of CUDA's.
        If that thread is then the last to hold the pool of these pieces, it frees the pool, which
        takes a call that CUDA forbids there, and the process aborts.
        """
        if not self.device.startswith("cuda"):
            return
        try:
            self._session.run(None, {name: feed[:1] for name, feed in feeds.items()})
        except _ERRORS:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._session))


def has_cuda() -> bool:
    """Say whether this ONNX Runtime knows CUDA; a session shows whether it works."""
    return _CUDA in onnxruntime.get_available_providers()


def _start_auto(path: Path, threads: int | None) -> onnxruntime.InferenceSession:
    """Start on the GPU if that works, otherwise on the CPU; say so where it should have worked."""
    if has_cuda():
        try:
            return _start(path, "cuda", threads)
        except EnvironmentProblem as problem:
            _log.warning("warning: running on the CPU: %s", problem)
    return _start(path, "cpu", threads)


def _start(
    path: Path, device: str, threads: int | None, stream: int | None = None
) -> onnxruntime.InferenceSession:
    """Start on exactly this device."""
    provider, options = _provider(device, threads)
    if stream is not None:
        options["user_compute_stream"] = str(stream)
    available = onnxruntime.get_available_providers()
    if provider not in available:
        raise EnvironmentProblem(
            f"--device {device}: expected an onnxruntime with {provider}, found "
            f"{', '.join(available)}; run: {_INSTALL[provider]}; or use --device cpu"
        )
    told = _preload() if provider == _CUDA else ""
    try:
        # Its own fallback would print to stdout, go on with the CPU, and call that success.
        session = onnxruntime.InferenceSession(
            str(path), _settings(threads), [(provider, options)], enable_fallback=0
        )
    except _ERRORS as error:
        raise _problem(path, device, error) from error
    # A provider whose libraries cannot be loaded is left out without an error.
    found = session.get_providers()
    if found[:1] != [provider]:
        raise EnvironmentProblem(
            f"--device {device}: expected {provider}, found {', '.join(found)} only: its libraries "
            f"cannot be loaded{told}; run `microclip-deploy doctor` to see why, or use --device cpu"
        )
    return session


@cache
def _kept_in_forks() -> "WeakSet[OnnxGraph]":
    """Return the graphs that a fork of this process never frees.

    To free a graph is to wait for its threads; a fork has none, and would wait for ever, at the
    latest when it ends.
    """
    graphs: WeakSet[OnnxGraph] = WeakSet()

    def keep() -> None:
        for graph in graphs:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(graph))

    if hasattr(os, "register_at_fork"):  # not on Windows, which has no forks
        os.register_at_fork(after_in_child=keep)
    return graphs


def _settings(threads: int | None) -> onnxruntime.SessionOptions:
    """Return the settings of every session; speed, and what int8 products are, is decided here.

    Threads spin between operators, as ONNX Runtime does by itself: that measured 4 to 10 % faster
    than letting them sleep.

    Where x86 processors lack VNNI, products of uint8 and int8 add up in 16 bits and saturate, down
    to half of a sum. The setting makes them exact there, and does nothing elsewhere.
    """
    settings = onnxruntime.SessionOptions()
    settings.add_session_config_entry("session.x64quantprecision", "1")
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    settings.log_severity_level = 3  # errors
    # 0: one a core, whatever the container allows; threads beyond that would wait for one another.
    settings.intra_op_num_threads = threads or limited_cpus() or 0
    return settings


def _provider(device: str, threads: int | None) -> tuple[str, dict[str, str]]:
    """Return the execution provider of a device, and its options."""
    if device == "cpu":
        return _CPU, {}
    if device == "openvino":
        # Where the processor has bfloat16 matrix units OpenVINO would use them.
        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
        threads = threads or limited_cpus()
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        return _OPENVINO, {"device_type": "CPU", "load_config": json.dumps({"CPU": settings})}
    if match := re.fullmatch(r"cuda(?::(\d+))?", device):
        # TF32 keeps 10 of the 23 bits of float32's factors, and is on by default: it would move
        # edges of the graph that the cut is made of.
        options = {"use_tf32": "0"}
        number = int(match[1] or 0)
        # Given a number, ONNX Runtime warns since 1.26, whatever the severity; else it takes 0.
        return _CUDA, {"device_id": str(number), **options} if number else options
    raise UsageError(
        f"--device: expected auto, cpu, cuda, cuda:N or openvino, found {device}; give one of them"
    )


def _device_of(session: onnxruntime.InferenceSession) -> str:
    """Return what a session says that it runs on."""
    provider = session.get_providers()[0]
    if provider == _CUDA:
        return f"cuda:{session.get_provider_options()[_CUDA].get('device_id', '0')}"
    return {_CPU: "cpu", _OPENVINO: "openvino"}[provider]


def _preload() -> str:
    """Load CUDA's libraries from their Python packages; return what went wrong."""
    printed = io.StringIO()
    with redirect_stdout(printed):  # stdout is for results
        onnxruntime.preload_dlls()
    first = printed.getvalue().strip().partition("\n")[0]
    return f" ({first})" if first else ""


def _problem(path: Path, device: str, error: Exception) -> MicroclipError:
    """Tell a failing device from a graph that cannot be used."""
    text = _short(str(error))
    if re.search(r"bad_?alloc|out of memory|allocate memory", text, re.IGNORECASE):
        return EnvironmentProblem(
            f"--device {device}: out of memory: {text}; lower --batch-size, or use another device"
        )
    if device != "cpu" and re.search(r"CUDA|CUBLAS|CUDNN|OpenVINO", text, re.IGNORECASE):
        return EnvironmentProblem(
            f"--device {device}: {text}; run `microclip-deploy doctor` to see why, or use "
            "--device cpu"
        )
    return CheckpointError(
        f"{path}: expected a graph that onnxruntime {onnxruntime.__version__} can run, found: "
        f"{text}; export again, or update onnxruntime"
    )


def _short(text: str) -> str:
    """Return one line without the C++ signatures that may be in its middle."""
    line = " ".join(text.split())
    return line if len(line) <= 400 else f"{line[:150]} ... {line[-250:]}"
