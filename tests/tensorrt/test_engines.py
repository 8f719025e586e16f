"""The product against both TensorRT versions: it passes, and every planted mistake is caught."""

import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.tensorrt.bindings import VERSIONS, run, run_cases
from tests.tensorrt.conftest import BindingsOf
from tests.tensorrt.mistakes import ALL, MISTAKES

HERE = Path(__file__).parent


def test_the_product_runs_on_every_version(trt_folder: Path) -> None:
    run_cases(trt_folder, HERE / "engine_cases.py")


def test_plans_of_tensorrt_for_rtx_run_with_kernels_of_their_gpu(rtx_folder: Path) -> None:
    run_cases(rtx_folder, HERE / "rtx_cases.py")


@pytest.mark.slow
def test_planted_mistakes_are_caught(bindings_of: BindingsOf, rtx_folder: Path) -> None:
    unnoticed = list(range(len(MISTAKES)))
    for version in reversed(VERSIONS):  # a slip that one takes for right is caught by the other
        unnoticed = _unnoticed(bindings_of(version), unnoticed)
    unnoticed += _unnoticed(rtx_folder, range(len(MISTAKES), len(ALL)))
    assert [ALL[number] for number in unnoticed] == []


def _unnoticed(folder: Path, numbers: Iterable[int]) -> list[int]:
    told = run(folder, "-m", "tests.tensorrt.mistakes", *map(str, numbers))
    found: list[int] = json.loads(told.splitlines()[-1])
    return found
