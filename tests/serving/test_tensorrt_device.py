"""What only TensorRT on a CUDA device can show. Run with: python -m pytest -m trt"""

import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from rich.console import Console

from microclip_deploy import artifact
from microclip_deploy.errors import CheckpointError, EnvironmentProblem
from microclip_deploy.export.command import run_export
from microclip_deploy.export.engine_command import run_build
from microclip_deploy.serving import open_session
from microclip_deploy.serving.engines import (
    BACKBONE_PLAN,
    ENGINES,
    BuildOptions,
    Span,
    find_engines,
    read_engines,
)
from microclip_deploy.serving.exported import Precision, read_export
from microclip_deploy.serving.onnx_session import OnnxSession

if TYPE_CHECKING:
    from microclip_deploy.serving.cuda_session import CudaSession

pytestmark = [
    pytest.mark.trt,
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(
        not torch.cuda.is_available() or not all(map(find_spec, ("cupy", "tensorrt"))),
        reason="no CUDA device, no cupy or no tensorrt; run `pytest -m trt` where there are all",
    ),
]

OPTIONS = BuildOptions(batch=Span(least=1, opt=4, most=8))
LOGITS: dict[Precision, float] = {"fp32": 5e-5, "fp16": 5e-2, "bf16": 5e-1}
SIDE = 32


def images(count: int, seed: int = 0) -> NDArray[np.uint8]:
    """Return bright rectangles on noise: their graphs are cut where it is well determined."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 80, (count, SIDE, SIDE, 3), dtype=np.uint8)
    for image in pixels:
        top, left = rng.integers(0, SIDE // 2, 2)
        image[top : top + 14, left : left + 14, rng.integers(3)] += 150
    return pixels


@pytest.fixture(scope="module", params=["fp32", "fp16", "bf16"])
def built(
    request: pytest.FixtureRequest, finished_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return an export with proven engines, in each precision."""
    directory = tmp_path_factory.mktemp("engines") / str(request.param)
    console = Console(quiet=True)
    run_export(finished_run, directory, console, dtype=request.param)
    proof = run_build(directory, OPTIONS, console)
    assert proof is not None
    assert proof.departure is None
    return directory


@pytest.fixture
def export(built: Path, tmp_path: Path) -> Path:
    """Return a copy that may be damaged."""
    return shutil.copytree(built, tmp_path / "export")


@pytest.fixture
def session(built: Path) -> Iterator["CudaSession"]:
    with open_session(built, "tensorrt") as opened:
        yield opened  # type: ignore[misc]  # of engines it is one


def engine_folder(export: Path) -> Path:
    (manifest,) = (export / ENGINES).glob(f"*/{artifact.MANIFEST}")
    return manifest.parent


def test_engines_answer_like_onnx_runtime(session: "CudaSession", built: Path) -> None:
    limit = LOGITS[read_export(built).manifest.precision]
    with OnnxSession.open(built) as reference:
        for count in (1, 3, 4, 8, 20):
            found, wanted = (each.predict(images(count)) for each in (session, reference))
            same = (found.mask == wanted.mask).all(axis=1)
            assert same.mean() >= 0.9
            np.testing.assert_allclose(found.logits[same], wanted.logits[same], rtol=0, atol=limit)


def test_a_row_does_not_depend_on_its_batch(session: "CudaSession") -> None:
    batch = images(8)
    together = session.predict(batch)
    alone = session.predict(batch[5:6])
    np.testing.assert_allclose(together.logits[5], alone.logits[0], rtol=0, atol=5e-1)


def test_replays_see_new_images(session: "CudaSession") -> None:
    first, second = (session.predict(images(4, seed)).logits for seed in (1, 2))
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(session.predict(images(4, 1)).logits, first)


def test_sessions_can_be_opened_again_and_again(built: Path) -> None:
    import cupy

    free = []
    for _ in range(6):
        with open_session(built, "tensorrt") as session:
            session.predict(images(8))
        cupy.get_default_memory_pool().free_all_blocks()
        free.append(cupy.cuda.runtime.memGetInfo()[0])
    assert free[1] - free[-1] < 2**24  # the first one loads libraries


def test_a_truncated_engine_is_refused(export: Path) -> None:
    plan = engine_folder(export) / BACKBONE_PLAN
    plan.write_bytes(plan.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="its bytes are not"):
        open_session(export, "tensorrt")


def test_an_engine_that_lies_about_its_bytes_is_refused_by_tensorrt(export: Path) -> None:
    folder = engine_folder(export)
    plan = folder / BACKBONE_PLAN
    plan.write_bytes(plan.read_bytes()[:-1000])
    stored = read_stored(folder)
    artifact.rewrite_manifest(folder, stored, [BACKBONE_PLAN])
    with pytest.raises(CheckpointError, match="can load, found"):
        open_session(export, "tensorrt")


@pytest.mark.parametrize(
    ("field", "value"), [("tensorrt", "10.0.0.1"), ("gpu", "NVIDIA T4"), ("system", "Windows")]
)
def test_a_foreign_engine_is_refused(export: Path, field: str, value: str) -> None:
    folder = engine_folder(export)
    stored = read_stored(folder)
    stored["target"][field] = value
    artifact.rewrite_manifest(folder, stored, [])
    with pytest.raises(EnvironmentProblem, match=r"built .*export .* --trt"):
        open_session(export, "tensorrt")


def test_a_second_build_starts_from_the_timing_cache(export: Path) -> None:
    (cache,) = (export / ENGINES).glob("*.timing-cache")
    assert cache.stat().st_size
    proof = run_build(export, OPTIONS, Console(quiet=True))
    assert proof is not None
    assert proof.departure is None
    from microclip_deploy.serving.tensorrt_engine import target

    assert find_engines(read_export(export), target(0)).directory == engine_folder(export)


def read_stored(folder: Path) -> dict[str, Any]:
    """Return a manifest's fields, whatever state the files are in."""
    stored = artifact.read_json(folder / artifact.MANIFEST)
    stored.pop("sha256")
    return dict(stored)


def test_engines_are_whole(built: Path) -> None:
    assert read_engines(engine_folder(built)).manifest.options == OPTIONS
