"""Who is measured: the target on its backends, and peers that put its time into proportion.

A request takes uint8 test views (B, S, S, 3) in an array and returns when the logits are in another
one on the host. A peer that cannot be had says why; none is left out silently.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from microclip_deploy.bench.latency.device_time import answer_eagerly
from microclip_deploy.bench.latency.subject import Subject, write_export
from microclip_deploy.errors import (
    CheckpointError,
    EnvironmentProblem,
    UsageError,
    VerificationError,
    require,
)
from microclip_deploy.head import LOGIT_SCALE
from microclip_deploy.serving import Session, open_graphs, open_session
from microclip_deploy.serving.cuda_session import CudaSession

Answer = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
"""Views -> logits (B, C)."""

BACKENDS = ("onnx", "torch", "trt")
PEERS = ("plain", "compiled", "cls", "int8", "openvino")

_PLAIN_CLIP = "CLIP "
"""How the names of those begin that are [CLS] alone."""

# Of logits, scale 100; int8 is held to its own proof's spirit: near, never equal.
CLOSE: Mapping[str, float] = {
    "fp32": 1e-2,
    "fp16": 0.5,
    "bf16": 5.0,
    "int8": 5.0,
    "int8-static": 5.0,
}


@dataclass
class Contestants:
    """Those that can be measured, by name, and why others cannot."""

    subject: Subject
    device: str
    """"cpu", "cuda" or "cuda:N"."""
    threads: int | None = None
    """Of one operator on a CPU; None for one a core."""
    answers: dict[str, Answer] = field(default_factory=dict)
    timed: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    sessions: dict[str, Session] = field(default_factory=dict)
    stack: ExitStack = field(default_factory=ExitStack)
    """Closes what was opened."""

    @property
    def ours(self) -> str:
        """Name of the first, the target itself, which all others are compared with."""
        return next(iter(self.answers))

    def open(self, name: str) -> None:
        """Let one of `BACKENDS` or `PEERS` take part, or remember why it cannot."""
        try:
            getattr(self, f"_open_{name}")()
        except (CheckpointError, EnvironmentProblem, UsageError) as problem:
            self.absent[name] = str(problem)

    def add(self, name: str, timed: str, answer: Answer) -> None:
        """Let one take part; `timed` says what is inside its time."""
        self.answers[name] = answer
        self.timed[name] = timed

    def add_session(self, name: str, timed: str, session: Session) -> None:
        """Let a session take part; one of CUDA also without its graph."""
        self.sessions[name] = session
        self.add(name, timed, lambda images: session.predict(images).logits)
        if isinstance(session, CudaSession):
            eager = "the same session without its CUDA graph, operator by operator"
            self.add(f"{name}, no CUDA graph", eager, partial(answer_eagerly, session))

    def _open_onnx(self) -> None:
        if self.device == "cpu":
            timed = "ONNX Runtime, full.onnx: pixels in, logits, embeddings, mask and attention out"
            session = self._onnx_session(self.subject, "cpu")
        else:
            timed = (
                "backbone.onnx by ONNX Runtime, then the CUDA kernels in a CUDA graph: upload, "
                "both, download"
            )
            session = self.stack.enter_context(open_graphs(self.subject.export, self.device))
        self.add_session(f"onnx {self.subject.precision} {session.device}", timed, session)

    def _open_torch(self) -> None:
        if self.device == "cpu":
            from microclip_deploy.serving.torch_session import TorchSession

            timed = "this package's PyTorch session: pixels in, all answers out"
            model, classes = copy.deepcopy(self._model()), self._classes()
            session: Session = TorchSession(model, classes, self.subject.preprocess, "cpu")
            self.stack.enter_context(session)
        else:
            timed = (
                "this package's PyTorch encoder and the CUDA kernels in one CUDA graph: upload, "
                "both, download"
            )
            session = self._cuda_session(compiled=False)
        self.add_session(f"torch fp32 {session.device}", timed, session)

    def _open_trt(self) -> None:
        if not self.device.startswith("cuda"):
            raise UsageError("TensorRT needs --device cuda")
        timed = "backbone.plan and the CUDA kernels in one CUDA graph: upload, both, download"
        session = open_session(self.subject.export, self.device.replace("cuda", "tensorrt"))
        self.stack.enter_context(session)
        self.add_session(f"trt {self.subject.precision} {session.device}", timed, session)

    def _open_plain(self) -> None:
        timed = (
            "the specified algorithm word by word in PyTorch: value path in every block, eigh and "
            "a look from the host for every image"
        )
        self.add("plain PyTorch", timed, self._plain(compiled=False))

    def _open_compiled(self) -> None:
        answer, side = self._plain(compiled=True), self.subject.preprocess.size
        try:
            answer(np.zeros((1, side, side, 3), np.uint8))  # compiles
        except Exception as error:  # as for want of a C++ compiler; of many kinds
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise EnvironmentProblem(f"torch.compile failed: {lines[0][:200]}") from error
        self.add("plain PyTorch, compiled", "plain PyTorch after torch.compile", answer)
        if self.device != "cpu":
            timed = "this package's CUDA session, its encoder compiled by torch.compile"
            session = self._cuda_session(compiled=True)
            self.add_session(f"torch compiled fp32 {session.device}", timed, session)

    def _open_cls(self) -> None:
        from microclip_deploy.bench.latency.cls_encoder import write_cls_graph
        from microclip_deploy.serving.onnx_graph import OnnxGraph

        model, cpu = self._model(), self.device == "cpu"
        how = "exported and run the same way"
        if not cpu:
            how = "by ONNX Runtime with its own copies and no CUDA graph, which the target has: an "
            how += "upper bound"
        rows = {
            "cls": "every row of the last block",
            "cls pruned": "the last block's class row alone",
        }
        for kind, computed in rows.items():
            path = self.subject.folder / f"{kind.replace(' ', '-')}.onnx"
            write_cls_graph(model, self.subject.preprocess, path, pruned=kind != "cls")
            graph = OnnxGraph(path, self.device, threads=self.threads if cpu else None)
            timed = f"plain CLIP, [CLS] alone, {how}; {computed}"
            self.add(f"{_PLAIN_CLIP}{kind} fp32", timed, partial(_logits, graph))

    def _open_int8(self) -> None:
        model = self._model()
        if self.device != "cpu":
            raise UsageError("int8 graphs are for CPUs")
        if self.subject.precision == "int8":
            raise UsageError("the target is int8 itself")
        folder = self.subject.folder / "int8"
        write_export(model, self.subject.preprocess, self._classes(), "int8", folder)
        session = self._onnx_session(self.subject._replace(export=folder), "cpu")
        timed = "ONNX Runtime, full.onnx with the encoder's matrices in int8"
        self.add_session("onnx int8 cpu", timed, session)

    def _open_openvino(self) -> None:
        session = self._onnx_session(self.subject, "openvino")
        timed = "full.onnx by ONNX Runtime's OpenVINO provider, float32"
        self.add_session(f"openvino {self.subject.precision}", timed, session)

    def _model(self) -> Any:
        """Return the target's model; whoever moves it or folds its weights copies it."""
        if self.subject.model is None:
            raise UsageError("an export holds no PyTorch model; give the run, or a model name")
        return self.subject.model

    def _classes(self) -> tuple[str, ...]:
        return tuple(str(row) for row in range(len(self._model().classifier)))

    def _onnx_session(self, subject: Subject, device: str) -> Session:
        from microclip_deploy.serving.onnx_session import OnnxSession

        session = OnnxSession.open(subject.export, device, threads=self.threads)
        return self.stack.enter_context(session)

    def _cuda_session(self, *, compiled: bool) -> Session:
        """Serve the target's model as a run is served on CUDA."""
        model = copy.deepcopy(self._model())
        require("cupy", "gpu")
        import torch

        from microclip_deploy.serving import torch_encoder

        model = model.to(self.device)
        if compiled:
            model.backbone = torch.compile(model.backbone, dynamic=False)  # a bucket has one size
        return self.stack.enter_context(
            torch_encoder.session_of(model, self._classes(), self.subject.preprocess, self.device)
        )

    def _plain(self, *, compiled: bool) -> Answer:
        model = copy.deepcopy(self._model())
        import torch

        from microclip_deploy.bench.training.plain import plain_of
        from microclip_deploy.model.clip import exact_float32

        model = plain_of(model).to(self.device).eval()
        if compiled:
            model = torch.compile(model)

        @torch.inference_mode()
        @exact_float32  # as this package computes
        def answer(images: NDArray[np.uint8]) -> NDArray[np.float32]:
            pixels = self.subject.preprocess.normalize(torch.from_numpy(images).to(self.device))
            logits: NDArray[np.float32] = model(pixels).logits.cpu().numpy()
            return logits

        return answer


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
    contestants = Contestants(subject, device, threads)
    with contestants.stack:
        if threads is not None and subject.model is not None:
            _limit_torch(threads, contestants.stack)
        for name in backends:
            contestants.open(name)
        if not contestants.answers:
            raise EnvironmentProblem(
                "--backends: expected one that works here, found "
                + "; ".join(f"{name}: {why}" for name, why in contestants.absent.items())
            )
        for name in PEERS:
            if name in peers:
                contestants.open(name)
            else:
                contestants.absent[name] = f"not asked for; --peers {name}"
        yield contestants


def require_alike(contestants: Contestants, views: NDArray[np.uint8]) -> None:
    """Let nobody be timed who answers something else: logits must be the target's.

    Those of plain CLIP, which are others by nature, must be those of the model's [CLS] alone. The
    median image counts: a mask near a threshold may move the logits of single images.

    Raises:
        VerificationError: names who answers something else, and how far it is.
    """
    subject = contestants.subject
    answers = {name: answer(views) for name, answer in contestants.answers.items()}
    for name, logits in answers.items():
        precision, whose, expected = subject.precision, "the target", answers[contestants.ours]
        if name.startswith(_PLAIN_CLIP):
            precision, whose, expected = "fp32", "[CLS] alone", _cls_logits(subject, views)
        limit = CLOSE["int8" if " int8 " in name else precision]
        apart = float(np.median(np.abs(logits - expected).max(axis=1)))
        if not apart <= limit:
            raise VerificationError(
                f"{name}: expected logits within {limit} of those of {whose}, found {apart:.3g}; "
                "its time would compare different things"
            )


def _cls_logits(subject: Subject, views: NDArray[np.uint8]) -> NDArray[np.float32]:
    import torch

    model = subject.model
    assert model is not None  # plain CLIP is made of it
    with torch.inference_mode():
        cls = model.encode_cls(subject.preprocess.normalize(torch.from_numpy(views)))
        logits: NDArray[np.float32] = (LOGIT_SCALE * cls @ model.class_matrix().T).numpy()
    return logits


def _limit_torch(threads: int, stack: ExitStack) -> None:
    """Give PyTorch as many threads as ONNX Runtime, until the end."""
    import torch

    stack.callback(torch.set_num_threads, torch.get_num_threads())
    torch.set_num_threads(threads)


def _logits(graph: Any, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    logits: NDArray[np.float32] = graph.run(("logits",), {"image": images})[0]
    return logits
