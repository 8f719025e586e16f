"""The harness itself: fakes are strict, and bindings can be had or say why not."""

import re
from pathlib import Path

import pytest

from tests.tensorrt.bindings import VERSIONS, Unavailable, bindings, run, run_cases

HERE = Path(__file__).parent


def test_fakes_take_what_tensorrt_takes(trt_folder: Path) -> None:
    run_cases(trt_folder, HERE / "fake_cases.py")


def test_a_version_that_cannot_be_had_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(
        Unavailable, match=r"pip cannot download tensorrt-cu13-bindings==0\.0\.1: .+"
    ):
        bindings("0.0.1", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_compiler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unavailable, match="needs gcc and readelf"):
        bindings(VERSIONS[0], tmp_path / "cache")


def test_a_finished_folder_is_taken_as_it_is(
    trt_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    version = trt_folder.name.partition("-")[0]
    assert bindings(version, trt_folder.parent) == trt_folder


def test_a_failing_script_shows_what_it_printed(trt_folder: Path) -> None:
    code = "import tensorrt; print(tensorrt.__version__); 1 / 0"
    version = re.escape(trt_folder.name.partition("-")[0])
    with pytest.raises(AssertionError, match=rf"(?s)exit status 1\n{version}.*ZeroDivisionError"):
        run(trt_folder, "-c", code)
