"""The product against both TensorRT versions: it passes, and every planted mistake is caught."""

import json
from pathlib import Path

import pytest

from tests.tensorrt.bindings import VERSIONS, run, run_cases
from tests.tensorrt.conftest import BindingsOf
from tests.tensorrt.mistakes import MISTAKES

HERE = Path(__file__).parent


def test_the_product_runs_on_every_version(trt_folder: Path) -> None:
    run_cases(trt_folder, HERE / "engine_cases.py")


def test_plans_of_tensorrt_for_rtx_run_with_kernels_of_their_gpu(rtx_folder: Path) -> None:
    run_cases(rtx_folder, HERE / "rtx_cases.py")


@pytest.mark.slow
def test_planted_mistakes_are_caught(bindings_of: BindingsOf) -> None:
    unnoticed = list(range(len(MISTAKES)))
    for version in reversed(VERSIONS):  # a slip that one takes for right is caught by the other
        numbers = map(str, unnoticed)
        told = run(bindings_of(version), "-m", "tests.tensorrt.mistakes", *numbers)
        unnoticed = json.loads(told.splitlines()[-1])
    assert [MISTAKES[number] for number in unnoticed] == []
