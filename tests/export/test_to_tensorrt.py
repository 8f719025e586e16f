"""NVIDIA's own parser and builder take the graphs: TensorRT for RTX, which needs no GPU."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import pytest

from microclip_deploy.serving.exported import Precision
from tests.tensorrt.bindings import run, run_cases

if TYPE_CHECKING:
    from tests.export.conftest import Write

HERE = Path(__file__).parent
LARGE_S = 1800


def test_the_graphs_are_built(
    rtx_folder: Path, write: "Write", monkeypatch: pytest.MonkeyPatch
) -> None:
    for precision in get_args(Precision):
        monkeypatch.setenv(f"EXPORT_{precision.upper()}", str(write(precision)))
    run_cases(rtx_folder, HERE / "builder_cases.py")


def test_bindings_without_their_library_are_told(rtx_folder: Path, tmp_path: Path) -> None:
    bindings = "tensorrt_rtx_bindings"
    shutil.copytree(rtx_folder / bindings, tmp_path / bindings)
    script = """
from microclip_deploy.errors import EnvironmentProblem
try:
    import microclip_deploy.serving.tensorrt_library
except EnvironmentProblem as problem:
    print(problem)
"""
    told = run(tmp_path, "-c", script)
    assert "TensorRT for RTX: expected its Python module and its library, found: lib" in told
    assert '"microclip-deploy[rtx]"' in told


@pytest.mark.large
@pytest.mark.parametrize(("geometry", "blocks"), [("ViT-B-32", 12), ("ViT-L-14-336", 24)])
def test_large_models_are_built(rtx_folder: Path, geometry: str, blocks: int) -> None:
    script = ("-m", "microclip_deploy.bench.engine_build", "--geometries", geometry)
    told = run(rtx_folder, *script, "--precisions", "fp16", limit_s=LARGE_S)
    for row in json.loads(told.splitlines()[-1])["rows"]:
        assert row["fused_attention"] == row["profiles"] * (blocks - 1)
        assert 0.8 < row["plan_bytes"] / row["onnx_bytes"] < 1.5
