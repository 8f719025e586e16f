"""Models to export, and their graphs in every precision."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import open_clip
import pytest
import torch
from numpy.typing import NDArray
from onnx import NodeProto, numpy_helper
from torch import nn

from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.export.to_onnx import write_graphs
from microclip_deploy.model.backbone import VisionBackbone
from microclip_deploy.model.checkpoint import load_model, read_checkpoint
from microclip_deploy.model.microclip import MicroCLIP, Pooling
from microclip_deploy.model.text import TextHeads
from microclip_deploy.ncut.spec import NCutSpec
from microclip_deploy.serving.exported import Precision

DATA = Path(__file__).parent.parent / "vectors"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

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

Remember = Callable[[], AbstractContextManager[None]]
Write = Callable[[Precision], Path]
Read = Callable[[Precision, str], "Graph"]


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
    """Matrices are so small here that two threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
    """Return a model with random weights on an unusual tower, with every pooling."""
    return _odd(request.param)


@pytest.fixture(scope="session")
def odd_mean() -> Subject:
    """Return the one that takes the mean of all tokens."""
    return _odd("mean")


def _odd(pooling: Pooling) -> Subject:
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
            ncut=NCutSpec(affinity="centered_cosine", threshold="mean"),
            cls_share=0.3,
            pooling=pooling,
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
def remember() -> Remember:
    """Return a context in which a model that was traced before is not traced again."""
    programs: dict[str, Any] = {}
    trace = torch.onnx.export

    def export(graph: nn.Module, example: Any, **options: Any) -> Any:
        told = f"{graph} {vars(graph.full)} {vars(graph.head)} {options}"
        digest = hashlib.sha256(told.encode())
        for name, tensor in sorted(graph.state_dict().items()):
            digest.update(name.encode() + tensor.view(torch.uint8).numpy().tobytes())
        key = digest.hexdigest()
        if key not in programs:
            programs[key] = trace(graph, example, **options)
        return programs[key]

    @contextmanager
    def remembering() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.onnx, "export", export)
            yield

    return remembering


@pytest.fixture(scope="session")
def write(tiny: Subject, remember: Remember, tmp_path_factory: pytest.TempPathFactory) -> Write:
    """Return a function that writes the tiny model's graphs in a precision, once."""
    written: dict[Precision, Path] = {}

    def of(precision: Precision) -> Path:
        if precision not in written:
            directory = tmp_path_factory.mktemp(precision)
            with remember():
                write_graphs(*tiny, precision, directory, {"precision": precision})
            written[precision] = directory
        return written[precision]

    return of


@pytest.fixture(scope="session")
def read(write: Write) -> Read:
    """Return a function that reads a file of the tiny model's in a precision."""
    return cache(lambda precision, name: Graph(write(precision) / name))
