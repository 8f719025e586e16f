"""Exports made by hand: a manifest, some graphs, a class matrix."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from microclip_deploy import artifact
from microclip_deploy.ncut.spec import NCutSpec
from microclip_deploy.serving.exported import CLASSIFIER, SCHEMA

MANIFEST: dict[str, Any] = {
    "parent": {
        "checkpoint_sha256": "0" * 64,
        "model": "ViT-B-32",
        "pretrained": "openai",
        "backbone_sha256": "0" * 64,
    },
    "precision": "fp16",
    "opset": 20,
    "preprocess": {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3},
    "ncut": NCutSpec().stored(),
    "cls_share": 0.5,
    "classes": ["robin", "wren", "owl"],
    "templates": ["a photo of a {}."],
}


def write_export(
    directory: Path,
    files: Mapping[str, bytes],
    matrix: Any,
    *,
    matrix_file: str = CLASSIFIER,
    **fields: Any,
) -> Path:
    """Write an export, whatever the bytes of its graphs are.

    Args:
        directory: made if it does not exist.
        files: the graphs by their names.
        matrix: one row a class.
        matrix_file: its name.
        fields: of the manifest, in place of MANIFEST's; None leaves one out.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for name, graph in files.items():
        (directory / name).write_bytes(graph)
    save_file({"classifier": matrix}, directory / matrix_file)
    empty: dict[str, list[Any]] = {"inputs": [], "outputs": []}
    content = {**MANIFEST, "graphs": dict.fromkeys(files, empty), **fields}
    given = {name: value for name, value in content.items() if value is not None}
    artifact.write_manifest(directory, SCHEMA, given, [*files, matrix_file])
    return directory
