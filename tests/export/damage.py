"""Damage to the files of an export, done so that only a proof can notice it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, helper, numpy_helper

from microclip_deploy import artifact

Array = NDArray[Any]
Change = Callable[[ModelProto], None]


def change(path: Path, damage: Change) -> None:
    """Rewrite a graph; weights outside of it stay there."""
    model = onnx.load(path, load_external_data=False)
    damage(model)
    path.write_bytes(model.SerializeToString())


def declare(directory: Path, *names: str, **fields: Any) -> None:
    """Let the manifest say that files and fields are as they should be; None removes a field."""
    stored = artifact.read_json(directory / artifact.MANIFEST) | fields
    kept = {name: value for name, value in stored.items() if value is not None}
    kept.pop("sha256")
    artifact.rewrite_manifest(directory, kept, list(names))


def weight(name: str, to: Callable[[Array], Array]) -> Change:
    """Return a change of a weight."""

    def changed(model: ModelProto) -> None:
        (tensor,) = (each for each in model.graph.initializer if each.name == name)
        array = np.ascontiguousarray(to(numpy_helper.to_array(tensor).copy()))
        tensor.CopyFrom(numpy_helper.from_array(array, name))

    return changed


def output(name: str, *nodes: tuple[str, Sequence[str], dict[str, Any]], **new: Any) -> Change:
    """Return a change of an output alone: a node reads `intact`, the last one writes the output."""

    def changed(model: ModelProto) -> None:
        for node in model.graph.node:
            for names in (node.input, node.output):
                names[:] = ["intact" if each == name else each for each in names]
        for number, (kind, inputs, attributes) in enumerate(nodes):
            made = name if number == len(nodes) - 1 else f"step {number}"
            model.graph.node.append(helper.make_node(kind, inputs, [made], **attributes))
        for constant, value in new.items():
            model.graph.initializer.append(numpy_helper.from_array(np.array(value), constant))

    return changed


def scaled(name: str, factor: float) -> Change:
    return output(name, ("Mul", ["intact", "factor"], {}), factor=np.float32(factor))


def inverted(name: str) -> Change:
    return output(name, ("Not", ["intact"], {}))


def of_first_row(name: str) -> Change:
    """Return what happens when a batch is taken for its first image."""
    return output(
        name,
        ("Gather", ["intact", "first"], {"axis": 0}),
        ("Mul", ["intact", "zero"], {}),
        ("Add", ["step 0", "step 1"], {}),
        first=np.array([0]),
        zero=np.float32(0),
    )


def noisy(array: Array) -> Array:
    rng = np.random.default_rng(0)
    return (array + rng.normal(0, 1e-3, array.shape)).astype(array.dtype)


def unknown(array: Array) -> Array:
    array.flat[0] = np.nan
    return array
