"""What `bench TARGET` measures: a run, an export, or a model's geometry with random weights.

Whatever it is, an export of it stands in a folder, so that each part of the benchmark opens it as
a user would. That of a run or a geometry is written for the benchmark alone and is not proven: the
answers of all contestants are compared instead.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple

from safetensors.numpy import save

from microclip_deploy import artifact
from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.errors import UsageError, require
from microclip_deploy.serving import is_export
from microclip_deploy.serving.exported import (
    CLASSIFIER,
    FULL,
    HEAD_WEIGHTS,
    SCHEMA,
    Precision,
    read_export,
)

if TYPE_CHECKING:
    from microclip_deploy.model.microclip import MicroCLIP


class Subject(NamedTuple):
    """The target, ready to be measured."""

    name: str
    """For people; no path."""
    export: Path
    precision: Precision
    preprocess: Preprocess
    sha256: str
    """Of full.onnx."""
    model: "MicroCLIP | None"
    """In PyTorch, on the CPU; None for an export, which holds none."""
    folder: Path
    """For whatever else has to be written."""


@contextmanager
def subject_of(target: str, precision: Precision) -> Iterator[Subject]:
    """Open a target.

    Args:
        target: directory of a run or an export, or an open_clip model name for random weights.
        precision: of the export that is written for a run or a geometry.

    Raises:
        CheckpointError: the directory cannot be used.
        UsageError: neither a directory nor a model name.
    """
    path = Path(target)
    with TemporaryDirectory(prefix="microclip-bench-") as folder:
        if path.is_dir() and is_export(path):
            yield _of_export(path.resolve().name, path, None, Path(folder))
            return
        model, preprocess, classes = _of_run(path) if path.is_dir() else _random(target)
        name = path.resolve().name if path.is_dir() else target
        written = Path(folder) / "target"
        write_export(model, preprocess, classes, precision, written)
        yield _of_export(name, written, model, Path(folder))


def write_export(
    model: "MicroCLIP",
    preprocess: Preprocess,
    classes: tuple[str, ...],
    precision: Precision,
    directory: Path,
) -> None:
    """Write an export that no proof stands behind, for measurements."""
    require("onnxscript", "export")
    from microclip_deploy.export.graphs import HeadGraph
    from microclip_deploy.export.to_onnx import OPSET, write_graphs

    directory.mkdir()
    graphs = write_graphs(model, preprocess, precision, directory, {"precision": precision})
    matrix = model.class_matrix().detach().numpy()
    artifact.write_bytes(directory / CLASSIFIER, save({"classifier": matrix}))
    head = {name: value.numpy() for name, value in HeadGraph(model).named_parameters()}
    artifact.write_bytes(directory / HEAD_WEIGHTS, save(head))
    nobody = {"checkpoint_sha256": "", "model": "", "pretrained": None, "backbone_sha256": ""}
    content = {
        "parent": nobody,
        "precision": precision,
        "opset": OPSET,
        "preprocess": preprocess.model_dump(mode="json"),
        "ncut": model.ncut.stored(),
        "cls_share": model.cls_share,
        "classes": list(classes),
        "templates": ["{}"],
        "graphs": {name: graph.model_dump(mode="json") for name, graph in graphs.items()},
    }
    artifact.write_manifest(directory, SCHEMA, content, [*graphs, CLASSIFIER, HEAD_WEIGHTS])


def _of_export(name: str, directory: Path, model: "MicroCLIP | None", folder: Path) -> Subject:
    export = read_export(directory)
    return Subject(
        name=name,
        export=directory,
        precision=export.manifest.precision,
        preprocess=export.manifest.preprocess,
        sha256=export.stored["files"][FULL]["sha256"],
        model=model,
        folder=folder,
    )


def _of_run(directory: Path) -> tuple["MicroCLIP", Preprocess, tuple[str, ...]]:
    require("torch", "adapt")
    from microclip_deploy.model.checkpoint import load_model, read_checkpoint

    checkpoint = read_checkpoint(directory)
    return load_model(checkpoint), checkpoint.manifest.preprocess, checkpoint.manifest.classes


def _random(name: str) -> tuple["MicroCLIP", Preprocess, tuple[str, ...]]:
    require("torch", "adapt")
    import open_clip

    from microclip_deploy.bench.geometry import CLASSES, TINY, random_geometry

    if name != TINY and name not in open_clip.list_models():
        raise UsageError(
            f"{name}: expected the directory of a run or an export, or an open_clip model name for "
            "random weights, found neither; try ViT-B-32"
        )
    geometry = random_geometry(name)
    classes = tuple(f"class {number}" for number in range(CLASSES))
    return geometry.model(), geometry.preprocess, classes
