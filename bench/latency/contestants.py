"""Who is measured: the target on its backends, and peers that put its time into proportion.

A request takes uint8 test views (B, S, S, 3) in an array and returns when the logits are in another
one on the host. A peer that cannot be had says why; none is left out silently.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from microclip_deploy.bench.latency.device_time import answer_eagerly
from microclip_deploy.bench.latency.subject import Subject, write_export
from microclip_deploy.errors import CheckpointError, EnvironmentProblem, UsageError, require
from microclip_deploy.serving import Session
from microclip_deploy.serving.cuda_session import CudaSession

Answer = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
"""Views -> logits (B, C)."""

BACKENDS = ("onnx", "torch", "trt")
PEERS = ("plain", "compiled", "cls", "int8", "openvino")
QUICK_PEERS = ("plain", "cls", "int8", "openvino")
"""Without the one that compiles for a minute."""

NO_MODEL = "an export holds no PyTorch model; give the run, or a model name"

TIMED = {
    "onnx": "ONNX Runtime, full.onnx: pixels in, logits, embeddings, mask and attention out",
    "torch": "this package's PyTorch session: the same",
    "onnx cuda": "backbone.onnx by ONNX Runtime, then the CUDA kernels in a CUDA graph: upload, "
    "both, download",
    "torch cuda": "this package's PyTorch encoder and the CUDA kernels in one CUDA graph: upload, "
    "both, download",
    "trt": "backbone.plan and the CUDA kernels in one CUDA graph: upload, both, download",
    "eager": "the same session without its CUDA graph, operator by operator",
    "torch compiled": "this package's CUDA session, its encoder compiled by torch.compile",
    "plain": "the specified algorithm word by word in PyTorch: value path in every block, eigh and "
    "a look from the host for every image",
    "compiled": "the same after torch.compile",
    "cls": "plain CLIP, [CLS] alone, exported and run the same way; every row of the last block",
    "cls pruned": "the same with the class row alone in the last block",
    "cls cuda": "plain CLIP, [CLS] alone, by ONNX Runtime with its own copies and no CUDA graph, "
    "which the target has: an upper bound; every row of the last block",
    "cls pruned cuda": "the same with the class row alone in the last block",
    "int8": "ONNX Runtime, full.onnx with the encoder's matrices in int8",
    "openvino": "full.onnx by ONNX Runtime's OpenVINO provider, float32",
}


@dataclass
class Contestants:
    """Those that can be measured, by name, and why others cannot."""

    answers: dict[str, Answer] = field(default_factory=dict)
    timed: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    sessions: dict[str, Session] = field(default_factory=dict)

    def add(self, name: str, kind: str, answer: Answer) -> None:
        """Let one take part."""
        self.answers[name] = answer
        self.timed[name] = TIMED[kind]

    def add_session(self, name: str, kind: str, session: Session) -> None:
        """Let a session take part."""
        self.sessions[name] = session
        on_cuda = isinstance(session, CudaSession) and f"{kind} cuda" in TIMED
        told = f"{kind} cuda" if on_cuda else kind
        self.add(name, told, lambda images: session.predict(images).logits)
        if isinstance(session, CudaSession):
            self.add(f"{name}, no CUDA graph", "eager", partial(answer_eagerly, session))


@contextmanager
def contestants_of(
    subject: Subject,
    backends: Sequence[str],
    peers: Sequence[str],
    device: str,
    threads: int | None,
) -> Iterator[Contestants]:
    """Open everyone; close them at the end.

    Args:
        subject: the target.
        backends: of `BACKENDS`; the first that works is what all others are compared with.
        peers: of `PEERS`.
        device: "cpu", "cuda" or "cuda:N".
        threads: of one operator on a CPU; None for one a core.

    Raises:
        EnvironmentProblem: no backend works.
        UsageError: no backend was asked for.
    """
    if not backends:
        raise UsageError(f"--backends: expected at least one of {', '.join(BACKENDS)}, found none")
    found = Contestants()
    with ExitStack() as stack:
        if threads is not None and subject.model is not None:
            _limit_torch(threads, stack)
        for name in backends:
            with _told(found, name):
                session = stack.enter_context(_open(subject, name, device, threads))
                label = f"{name} {subject.precision if name != 'torch' else 'fp32'}"
                found.add_session(f"{label} {session.device}", name, session)
        if not found.answers:
            raise EnvironmentProblem(
                "--backends: expected one that works here, found "
                + "; ".join(f"{name}: {why}" for name, why in found.absent.items())
            )
        for name in PEERS:
            if name not in peers:
                found.absent[name] = f"not asked for; --peers {name}"
                continue
            with _told(found, name):
                _ADD[name](found, subject, device, threads, stack)
        yield found


def _limit_torch(threads: int, stack: ExitStack) -> None:
    """Give PyTorch as many threads as ONNX Runtime, until the end."""
    import torch

    stack.callback(torch.set_num_threads, torch.get_num_threads())
    torch.set_num_threads(threads)


@contextmanager
def _told(found: Contestants, name: str) -> Iterator[None]:
    """Remember why someone cannot take part."""
    try:
        yield
    except (CheckpointError, EnvironmentProblem, UsageError) as problem:
        found.absent[name] = str(problem)


def _open(subject: Subject, backend: str, device: str, threads: int | None) -> Session:
    if backend == "torch":
        return _torch_session(subject, device)
    if backend == "trt":
        from microclip_deploy.serving import open_session

        if not device.startswith("cuda"):
            raise UsageError("TensorRT needs --device cuda")
        return open_session(subject.export, device.replace("cuda", "tensorrt"))
    if device == "cpu":
        return _onnx_session(subject, "cpu", threads)
    from microclip_deploy.serving import open_graphs

    return open_graphs(subject.export, device)


def _torch_session(subject: Subject, device: str) -> Session:
    if subject.model is None:
        raise UsageError(NO_MODEL)
    if device == "cpu":
        from microclip_deploy.serving.torch_session import TorchSession

        model = _copied(subject.model)
        return TorchSession(model, _classes(subject), subject.preprocess, device)
    return _cuda_session(subject, device, compiled=False)


def _cuda_session(subject: Subject, device: str, *, compiled: bool) -> Session:
    """Serve the target's model as a run is served on CUDA."""
    require("cupy", "gpu")
    import torch

    from microclip_deploy.serving import torch_encoder

    model = _copied(subject.model).to(device)
    if compiled:
        model.backbone = torch.compile(model.backbone, dynamic=False)  # a bucket has one size
    return torch_encoder.session_of(model, _classes(subject), subject.preprocess, device)


def _classes(subject: Subject) -> tuple[str, ...]:
    assert subject.model is not None
    return tuple(str(row) for row in range(len(subject.model.classifier)))


def _onnx_session(subject: Subject, device: str, threads: int | None) -> Session:
    from microclip_deploy.serving.onnx_session import OnnxSession

    return OnnxSession.open(subject.export, device, threads=threads)


def _add_plain(
    found: Contestants, subject: Subject, device: str, _threads: int | None, _stack: ExitStack
) -> None:
    found.add("plain PyTorch", "plain", _plain(subject, device, compiled=False))


def _add_compiled(
    found: Contestants, subject: Subject, device: str, _threads: int | None, stack: ExitStack
) -> None:
    answer, side = _plain(subject, device, compiled=True), subject.preprocess.size
    try:
        answer(np.zeros((1, side, side, 3), np.uint8))  # compiles
    except Exception as error:  # as for want of a C++ compiler; of many kinds
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise EnvironmentProblem(f"torch.compile failed: {lines[0][:200]}") from error
    found.add("plain PyTorch, compiled", "compiled", answer)
    if device != "cpu":
        session = stack.enter_context(_cuda_session(subject, device, compiled=True))
        found.add_session(f"torch compiled fp32 {session.device}", "torch compiled", session)


def _plain(subject: Subject, device: str, *, compiled: bool) -> Answer:
    if subject.model is None:
        raise UsageError(NO_MODEL)
    import torch

    from microclip_deploy.bench.training.plain import plain_of

    if device != "cpu":  # as this package computes: float32 means float32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    model: Any = plain_of(_copied(subject.model)).to(device).eval()
    if compiled:
        model = torch.compile(model)

    @torch.inference_mode()
    def answer(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        pixels = subject.preprocess.normalize(torch.from_numpy(images).to(device))
        logits: NDArray[np.float32] = model(pixels).logits.cpu().numpy()
        return logits

    return answer


def _add_cls(
    found: Contestants, subject: Subject, device: str, threads: int | None, _stack: ExitStack
) -> None:
    if subject.model is None:
        raise UsageError(NO_MODEL)
    from microclip_deploy.bench.latency.cls_encoder import write_cls_graph
    from microclip_deploy.serving.onnx_graph import OnnxGraph

    for pruned in (False, True):
        kind = "cls pruned" if pruned else "cls"
        path = subject.folder / f"{kind.replace(' ', '-')}.onnx"
        write_cls_graph(subject.model, subject.preprocess, path, pruned=pruned)
        graph = OnnxGraph(path, device, threads=threads if device == "cpu" else None)
        told = kind if device == "cpu" else f"{kind} cuda"
        found.add(f"CLIP {kind} fp32", told, _graph_answer(graph))


def _graph_answer(graph: Any) -> Answer:
    def answer(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = graph.run(("logits",), {"image": images})[0]
        return logits

    return answer


def _add_int8(
    found: Contestants, subject: Subject, device: str, threads: int | None, stack: ExitStack
) -> None:
    if subject.model is None:
        raise UsageError(NO_MODEL)
    if device != "cpu":
        raise UsageError("int8 graphs are for CPUs")
    if subject.precision == "int8":
        raise UsageError("the target is int8 itself")
    folder = subject.folder / "int8"
    write_export(subject.model, subject.preprocess, _classes(subject), "int8", folder)
    session = stack.enter_context(_onnx_session(subject._replace(export=folder), "cpu", threads))
    found.add_session("onnx int8 cpu", "int8", session)


def _add_openvino(
    found: Contestants, subject: Subject, _device: str, threads: int | None, stack: ExitStack
) -> None:
    session = stack.enter_context(_onnx_session(subject, "openvino", threads))
    found.add_session(f"openvino {subject.precision}", "openvino", session)


def _copied(model: Any) -> Any:
    """Return a copy: contestants move their models and fold weights."""
    import copy

    return copy.deepcopy(model)


_ADD: dict[str, Callable[[Contestants, Subject, str, int | None, ExitStack], None]] = {
    "plain": _add_plain,
    "compiled": _add_compiled,
    "cls": _add_cls,
    "int8": _add_int8,
    "openvino": _add_openvino,
}
