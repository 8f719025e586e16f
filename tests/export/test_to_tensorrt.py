"""NVIDIA's own parser and builder take the graphs: TensorRT for RTX, which needs no GPU."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.tensorrt.bindings import run_cases

if TYPE_CHECKING:
    from tests.export.conftest import Write

HERE = Path(__file__).parent


def test_the_graphs_are_built(
    rtx_folder: Path, write: "Write", monkeypatch: pytest.MonkeyPatch
) -> None:
    for precision in ("fp32", "fp16", "bf16", "int8"):
        monkeypatch.setenv(f"EXPORT_{precision.upper()}", str(write(precision)))
    run_cases(rtx_folder, HERE / "builder_cases.py")
