"""Models to export, and their graphs in every precision."""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partialmethod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import open_clip
import pytest
import torch
from numpy.typing import NDArray
from onnx import NodeProto, numpy_helper
from rich.console import Console
from torch import nn

from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.export import to_onnx
from microclip_deploy.export.command import run_export
from microclip_deploy.export.proof.probes import Reference
from microclip_deploy.model.backbone import VisionBackbone
from microclip_deploy.model.checkpoint import load_model, read_checkpoint
from microclip_deploy.model.microclip import MicroCLIP
from microclip_deploy.model.text import TextHeads
from microclip_deploy.ncut.spec import NCutSpec
from microclip_deploy.serving.exported import BACKBONE, FULL, HEAD, PROBES, Precision
from microclip_deploy.serving.onnx_graph import OnnxGraph

DATA = Path(__file__).parent.parent / "vectors"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
QUIET = Console(quiet=True)
FILES = (FULL, BACKBONE, HEAD)
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16", "int8", "int8-static")

ODD_MODEL = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {
        "image_size": 40,
        "layers": 2,
        "width": 48,
        "patch_size": 8,
        "head_width": 16,
        "ls_init_value": 0.3,
        "no_ln_pre": True,
    },
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 1, "layers": 1},
}
"""LayerScale, QuickGELU, and no LayerNorm in front."""

RULES = {
    "soap": {"threshold": "otsu", "side": "object", "fallback": "cls"},
    "mean": {"threshold": "mean"},
}
"""Of the cut, by the pooling of an odd model."""

Write = Callable[[Precision], Path]
Read = Callable[[Precision, str], "Graph"]
ErrorLine = Callable[[], str]


class Subject(NamedTuple):
    """A model and how images become its input."""

    model: MicroCLIP
    preprocess: Preprocess


class Graph:
    """A file with the types of all its values."""

    def __init__(self, path: Path) -> None:
        self.model = onnx.load(path)
        inferred = onnx.shape_inference.infer_shapes(
            self.model, check_type=True, strict_mode=True, data_prop=True
        ).graph
        self.nodes = tuple(self.model.graph.node)
        self.inputs = {value.name: value for value in self.model.graph.input}
        self.weights = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self.makers = {name: node for node in self.nodes for name in node.output}
        values = (*inferred.input, *inferred.value_info, *inferred.output)
        self.types = {value.name: value.type.tensor_type.elem_type for value in values}
        self.types |= {name: tensor.data_type for name, tensor in self.weights.items()}
        self.shapes = {value.name: _shape(value) for value in values}

    def users(self, name: str) -> list[NodeProto]:
        """Return the nodes that read a value."""
        return [node for node in self.nodes if name in node.input]

    def kinds(self) -> Counter[str]:
        """Count the operators."""
        return Counter(node.op_type for node in self.nodes)

    def of(self, *kinds: str) -> list[NodeProto]:
        """Return the nodes of these kinds."""
        return [node for node in self.nodes if node.op_type in kinds]

    def properties(self) -> dict[str, str]:
        """Return the metadata."""
        return {entry.key: entry.value for entry in self.model.metadata_props}

    def array(self, name: str) -> NDArray[Any]:
        """Return a weight."""
        found: NDArray[Any] = numpy_helper.to_array(self.weights[name])
        return found


def _shape(value: onnx.ValueInfoProto) -> tuple[int | str, ...]:
    return tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)


class Golden(NamedTuple):
    """A model of the reference's, images that it saw, and what it answered."""

    model: MicroCLIP
    preprocess: Preprocess
    images: NDArray[np.uint8]
    """(B, S, S, 3)."""
    answers: dict[str, NDArray[Any]]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Let graphs run on one thread: they are so small that more only wait for each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnnxGraph, "__init__", partialmethod(OnnxGraph.__init__, threads=1))
        yield


@pytest.fixture(scope="session", params=["g7", "g14", "h2"])
def golden(request: pytest.FixtureRequest) -> Golden:
    """Return one of the files that docs/numerics.md section 9 describes.

    Its last image is left out: it has no uint8 form.
    """
    stored = np.load(DATA / f"forward_{request.param}.npz")
    clip = open_clip.model.CLIP(**json.loads(str(stored["openclip_cfg_json"])))
    clip.visual.load_state_dict(_tensors(stored, "sd/visual."))
    classes = torch.from_numpy(stored["classifier_raw"])
    heads = TextHeads(classes, classes, classes)
    model = MicroCLIP(VisionBackbone(clip.visual), heads, ncut=NCutSpec())
    model.pooling.load_state_dict(_tensors(stored, "soap/"))
    preprocess = Preprocess(size=stored["images"].shape[-1], mean=CLIP_MEAN, std=CLIP_STD)
    scale, offset = (np.array(part)[:, None, None] for part in (CLIP_STD, CLIP_MEAN))
    pixels = np.rint((stored["images"][:-1].astype(float) * scale + offset) * 255)
    images = np.ascontiguousarray(pixels.astype(np.uint8).transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(preprocess.normalize(images), stored["images"][:-1])
    names = ("cls", "tokens", "mask", "attn", "fg", "logits", "logits_f64", "well_posed")
    answers = {name: stored[name][:-1] for name in names}
    return Golden(model.eval(), preprocess, images, answers)


def _tensors(stored: Any, prefix: str) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix(prefix): torch.from_numpy(stored[name])
        for name in stored.files
        if name.startswith(prefix)
    }


@pytest.fixture(scope="session", params=["soap", "mean"])
def odd(request: pytest.FixtureRequest) -> Subject:
    """Return a model with random weights on an unusual tower, with the pooling asked for."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = open_clip.model.CLIP(**ODD_MODEL)
        for name, parameter in clip.visual.named_parameters():
            if name.endswith("gamma"):
                nn.init.normal_(parameter)
        classes = torch.randn(4, 24)
        model = MicroCLIP(
            VisionBackbone(clip.visual),
            TextHeads(classes, classes, classes),
            ncut=NCutSpec.model_validate({"affinity": "centered_cosine", **RULES[request.param]}),
            cls_share=0.3,
            pooling=request.param,
        )
        for parameter in model.pooling.parameters():
            nn.init.normal_(parameter, std=0.2)
    return Subject(model.eval(), Preprocess(size=40, mean=CLIP_MEAN, std=CLIP_STD))


@pytest.fixture(scope="session")
def tiny(finished_run: Path) -> Subject:
    """Return the adapted model of the finished run."""
    checkpoint = read_checkpoint(finished_run)
    return Subject(load_model(checkpoint), checkpoint.manifest.preprocess)


@pytest.fixture(scope="session")
def write(finished_run: Path, tiny_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Write:
    """Return a function that exports the finished run in a precision, once."""

    @cache
    def of(precision: Precision) -> Path:
        if precision == "fp32":
            return tiny_export
        directory = tmp_path_factory.mktemp("exports") / precision
        run_export(finished_run, directory, QUIET, dtype=precision)
        return directory

    return of


@pytest.fixture(scope="session")
def write_large(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Write:
    """Return the same for a run whose weights are too large for one file a graph."""

    @cache
    def of(precision: Precision) -> Path:
        directory = tmp_path_factory.mktemp("large") / precision
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(to_onnx, "SINGLE_FILE_LIMIT", 1000)
            run_export(finished_run, directory, QUIET, dtype=precision)
        return directory

    return of


@pytest.fixture(scope="session")
def read(write: Write) -> Read:
    """Return a function that reads a graph of the finished run's in a precision."""
    return cache(lambda precision, name: Graph(write(precision) / name))


@pytest.fixture(params=[(precision, name) for precision in PRECISIONS for name in FILES], ids=str)
def graph(request: pytest.FixtureRequest, read: Read) -> Graph:
    """Return each graph of each precision."""
    return read(*request.param)


@pytest.fixture(scope="session")
def reference(tiny_export: Path) -> Reference:
    """Return PyTorch's answers to the made-up images."""
    return Reference.read(tiny_export / PROBES)


@pytest.fixture
def export(tiny_export: Path, tmp_path: Path) -> Path:
    """Return an export that may be changed."""
    return shutil.copytree(tiny_export, tmp_path / "export")


@pytest.fixture
def error_line(capsys: pytest.CaptureFixture[str]) -> ErrorLine:
    """Return what reads the one error line."""

    def read() -> str:
        printed = capsys.readouterr().err
        assert "Traceback" not in printed
        (line,) = (line for line in printed.splitlines() if line.startswith("error: "))
        return line

    return read
