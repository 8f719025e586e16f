"""`microclip-deploy bench ncut` where there is no GPU."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from microclip_deploy.bench.kernel.report import NotTimed
from microclip_deploy.bench.kernel.run import time_peer
from microclip_deploy.cli.main import main


def no_device(number: int) -> object:
    raise RuntimeError("cudaErrorNoDevice")


def test_what_a_gpu_needs_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cupy = ModuleType("cupy")
    vars(cupy)["cuda"] = SimpleNamespace(runtime=SimpleNamespace(getDeviceProperties=no_device))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    assert main(["bench", "ncut"]) == 4
    shown = capsys.readouterr().err
    assert "CuPy finds no CUDA device (cudaErrorNoDevice)" in shown
    assert "--device cpu" in shown
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert main(["bench", "ncut"]) == 4
    assert 'pip install "microclip-deploy[gpu]"' in capsys.readouterr().err


def test_the_solvers_of_a_cpu_are_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--device", "cpu", "--tokens", "16,25", "--batches", "1,4", "--out", str(tmp_path)]
    assert main(["bench", "ncut", *arguments]) == 0
    shown = capsys.readouterr().out.splitlines()
    report = json.loads(shown[-1])
    cases = [(case["tokens"], case["batch"]) for case in report["cases"]]
    assert cases == [(16, 1), (16, 4), (25, 1), (25, 4)]
    assert set(report["cases"][0]["times"]) == {"exact, CPU", "iterative, CPU"}
    assert set(report["timed"]) == {"exact, CPU", "iterative, CPU"}
    assert report["tokens"][0]["wrong"] == {"exact, CPU": 0, "iterative, CPU": 0}
    assert any("exact, CPU" in line for line in shown[:-1])
    (written,) = tmp_path.glob("*-cpu-kernel.json")
    assert json.loads(written.read_text()) == report
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md", ".svg"}


def test_json_is_all_of_stdout_where_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--tokens", "16", "--batches", "2", "--json"]
    assert main(["bench", "ncut", *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["benchmark"] == "ncut kernel"


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--tokens", "49,x", "whole numbers"),
        ("--batches", "0", "whole numbers"),
        ("--tokens", "2", "4 or more"),
        ("--dtype", "int8", "float16, bfloat16, float32"),
        ("--device", "tpu", "cuda or cpu"),
    ],
)
def test_bad_options_are_usage_errors(
    option: str, value: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "ncut", option, value]) == 2
    assert message in capsys.readouterr().err


def test_a_slow_contestant_is_tried_on_a_part_and_left_out() -> None:
    tried: list[int] = []

    def two_seconds(call: object) -> float:
        assert callable(call)
        call()
        return 2e6

    with pytest.raises(NotTimed, match=r"4 of 32 images took 2\.0 s"):
        time_peer(tried.append, 32, two_seconds)
    assert tried == [1, 4]
