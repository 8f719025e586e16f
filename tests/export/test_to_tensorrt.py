"""NVIDIA's own parser and builder take the graphs: TensorRT for RTX, which needs no GPU."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.tensorrt.bindings import Unavailable, rtx, run_cases

if TYPE_CHECKING:
    from tests.export.conftest import Write

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def rtx_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return what to put on PYTHONPATH for TensorRT for RTX."""
    kept, name = request.config.cache, "tensorrt-bindings"
    try:
        return rtx(tmp_path_factory.mktemp(name) if kept is None else kept.mkdir(name))
    except Unavailable as error:
        pytest.skip(str(error))


def test_the_graphs_are_built(
    rtx_folder: Path, write: "Write", monkeypatch: pytest.MonkeyPatch
) -> None:
    for precision in ("fp32", "fp16", "bf16", "int8"):
        monkeypatch.setenv(f"EXPORT_{precision}", str(write(precision)))
    run_cases(rtx_folder, HERE / "builder_cases.py")
