import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from microclip_deploy import environment
from microclip_deploy.cli.doctor import Diagnosis, diagnose, judge, require
from microclip_deploy.cli.doctor_text import problem_lines, tables
from microclip_deploy.environment import PACKAGES, PLAIN, Gpu, Machine, Package, probe_packages
from microclip_deploy.errors import EnvironmentProblem, UsageError

GPU = Gpu("NVIDIA H100", 81559, "580.10")


def machine(
    gpus: tuple[Gpu, ...] = (), driver_cuda: str = "13.0", visible: str | None = None
) -> Machine:
    return Machine("3.12.1", "Linux", 8, gpus, driver_cuda if gpus else "", visible)


def installed(name: str, version: str = "1.0", **fields: Any) -> Package:
    return Package(name, version, **{"distributions": (name,), **fields})


def packages(**changed: Package) -> Mapping[str, Package]:
    usable = {
        "torch": installed("torch", "2.15", cuda_major=13, details={"usable": 1, "threads": 4}),
        "torchvision": installed("torchvision"),
        "open_clip": installed("open_clip"),
        "timm": installed("timm"),
        "onnx": installed("onnx"),
        "onnxruntime": installed(
            "onnxruntime", cuda_major=13,
            details={"in_use": ["CUDAExecutionProvider", "CPUExecutionProvider"]},
        ),
        "tensorrt": installed("tensorrt", "11.4", cuda_major=13),
        "cupy": installed("cupy", "14.2", cuda_major=13),
    }  # fmt: skip
    return {**usable, **{name: installed(name) for name in PLAIN}, **changed}


def on_cpu(**changed: Package) -> Diagnosis:
    plain = {
        "torch": installed("torch", "2.15", details={"usable": 0, "threads": 2}),
        "onnxruntime": installed("onnxruntime", details={"in_use": ["CPUExecutionProvider"]}),
        "tensorrt": Package("tensorrt"),
        "cupy": Package("cupy"),
    }
    return judge(machine(), packages(**{**plain, **changed}))


def test_a_good_gpu_machine_has_no_problems() -> None:
    found = judge(machine((GPU,)), packages())
    assert found.problems == ()
    uses = dict(found.uses)
    assert uses["adapt"] == "PyTorch 2.15 on cuda (NVIDIA H100)"
    assert uses["exported graphs"].endswith("on the GPU with the CUDA kernels")
    assert uses["exported engines"].startswith("TensorRT 11.4 with the CUDA kernels")
    assert "CUDA kernel" in uses["NCut"]
    require(found, {"gpu", "trt", "cupy"})


def test_a_cpu_machine_needs_no_gpu_packages() -> None:
    found = on_cpu()
    assert found.problems == ()
    assert dict(found.uses) == {
        "adapt": "PyTorch 2.15 on cpu (2 threads)",
        "evaluate, predict": (
            "a run: PyTorch 2.15 on cpu (2 threads); an export: ONNX Runtime 1.0 on the CPU"
        ),
        "export": "ONNX 1.0, proven with ONNX Runtime",
        "bench": "whatever the target runs on",
        "NCut": "exact solver in float64 on the CPU",
        "exported graphs": "ONNX Runtime 1.0 on the CPU",
        "exported engines": "not possible without TensorRT, CuPy, an NVIDIA GPU",
    }


def test_tensorrt_for_rtx_needs_no_gpu_to_build(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"tensorrt_rtx_bindings": object()}
    monkeypatch.setattr("importlib.util.find_spec", found.get)
    engines = dict(on_cpu().uses)["exported engines"]
    assert engines == (
        "TensorRT for RTX: export --trt builds them; verify proves them where they are to serve"
    )


def bare(*names: str, gpus: tuple[Gpu, ...] = ()) -> Diagnosis:
    """Judge a machine on which only these packages are installed."""
    plain = {
        "torch": installed("torch", "2.15", details={"usable": 0, "threads": 2}),
        "onnxruntime": installed("onnxruntime", details={"in_use": ["CPUExecutionProvider"]}),
    }
    every = {name: plain.get(name, installed(name)) for name in (*PACKAGES, *PLAIN)}
    return judge(machine(gpus), {n: p if n in names else Package(n) for n, p in every.items()})


def test_a_server_that_runs_exports_can_evaluate_and_predict() -> None:
    found = bare("onnxruntime")
    uses = dict(found.uses)
    assert uses["evaluate, predict"] == (
        "a run: not possible without torch, torchvision, open_clip, timm; "
        "an export: ONNX Runtime 1.0 on the CPU"
    )
    assert uses["NCut"] == "inside the exported graphs"
    assert uses["export"].startswith("not possible without torch")
    assert {problem.severity for problem in found.problems} == {"note"}
    assert {problem.fix for problem in found.problems} == {
        'pip install "microclip-deploy[adapt]"',
        'pip install "microclip-deploy[adapt,export]"',
        'pip install "microclip-deploy[bench]"',
    }


def test_a_base_installation_is_told_what_each_extra_is_for() -> None:
    found = bare()
    assert {problem.fix: problem.what.partition(": ")[2] for problem in found.problems} == {
        'pip install "microclip-deploy[adapt]"': (
            "needed to adapt, and to evaluate and predict with a run"
        ),
        'pip install "microclip-deploy[adapt,cpu,export]"': "needed to export",
        'pip install "microclip-deploy[cpu]"': "needed to evaluate and predict with an export",
        'pip install "microclip-deploy[bench,cpu]"': "needed to measure with `bench`",
    }


def test_a_gpu_machine_is_never_told_to_install_both_runtimes() -> None:
    fixes = [problem.fix for problem in bare(gpus=(GPU,)).problems]
    assert not any("cpu" in fix for fix in fixes)
    assert 'pip install "microclip-deploy[gpu]"' in fixes
    with_cpu_build = [problem.fix for problem in bare("onnxruntime", gpus=(GPU,)).problems]
    assert 'pip uninstall -y onnxruntime; pip install "microclip-deploy[gpu]"' in with_cpu_build


def test_a_package_that_is_only_looked_up_is_missed() -> None:
    found = on_cpu(tensorboard=Package("tensorboard"), onnxscript=Package("onnxscript"))
    uses = dict(found.uses)
    assert uses["adapt"] == "not possible without tensorboard"
    assert uses["export"] == "not possible without onnxscript"


def test_hidden_gpus_are_not_the_drivers_fault() -> None:
    torch = installed("torch", cuda_major=13, details={"usable": 0})
    (problem,) = judge(machine((GPU,), visible=""), packages(torch=torch)).problems
    assert "CUDA_VISIBLE_DEVICES=''" in problem.what
    assert problem.fix == "unset CUDA_VISIBLE_DEVICES"


def test_a_gpu_that_only_pytorch_sees_is_a_gpu() -> None:
    engines = dict(judge(machine(), packages()).uses)["exported engines"]
    assert engines.startswith("TensorRT 11.4")


DRIVERLESS = (
    "cupy_backends.cuda.api.runtime.CUDARuntimeError: cudaErrorInsufficientDriver: CUDA driver "
    "version is insufficient for CUDA runtime version",
    "cudaErrorNoDevice: no CUDA-capable device is detected",
    "ImportError: libcuda.so.1: cannot open shared object file: No such file or directory",
)


@pytest.mark.parametrize("name", ["cupy", "tensorrt"])
@pytest.mark.parametrize("error", DRIVERLESS)
def test_a_missing_driver_is_not_the_wheels_fault(name: str, error: str) -> None:
    broken = {name: installed(name, "14.2", cuda_major=13, error=error)}
    (problem,) = on_cpu(**broken).problems
    assert problem.severity == "note"
    assert f"{name} finds no NVIDIA driver" in problem.what
    assert "pip" not in problem.fix
    with pytest.raises(EnvironmentProblem, match="nvidia-smi"):
        require(on_cpu(**broken), {{"cupy": "cupy", "tensorrt": "trt"}[name]})
    (problem,) = judge(machine((GPU,)), packages(**broken)).problems
    assert problem.severity == "error"
    assert problem.fix.startswith("update the NVIDIA driver")


def test_requirements_name_all_that_is_missing() -> None:
    with pytest.raises(EnvironmentProblem) as error:
        require(on_cpu(), {"gpu", "trt", "cupy"})
    message = str(error.value)
    assert error.value.exit_code == 4
    assert "gpu: no NVIDIA GPU" in message
    install = 'pip uninstall -y onnxruntime; pip install "microclip-deploy[gpu]"'
    assert f"TensorRT is not installed; run: {install}" in message
    assert "CuPy is not installed" in message


def test_an_unknown_requirement_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="cupy, gpu, trt"):
        require(on_cpu(), {"tpu"})


def test_mixed_cuda_majors_are_named_with_the_commands() -> None:
    cupy = installed("cupy", cuda_major=12, distributions=("cupy-cuda12x",))
    found = judge(machine((GPU,)), packages(cupy=cupy))
    (problem,) = found.problems
    assert problem.severity == "error"
    assert "torch 13, onnxruntime 13, tensorrt 13, cupy 12" in problem.what
    assert problem.fix == "pip uninstall -y cupy-cuda12x; pip install cupy-cuda13x"


def test_a_cpu_torch_beside_a_gpu_is_an_error() -> None:
    torch = installed("torch", details={"usable": 0, "threads": 2})
    found = judge(machine((GPU,)), packages(torch=torch))
    assert found.problems[0].fix == "pip install --force-reinstall torch torchvision"
    with pytest.raises(EnvironmentProblem, match="does not work: it cannot use the GPU"):
        require(found, {"gpu"})


def test_an_old_driver_is_explained() -> None:
    torch = installed("torch", cuda_major=13, details={"usable": 0})
    found = judge(machine((GPU,), "12.4"), packages(torch=torch))
    assert "the driver supports CUDA 12.4 only" in found.problems[0].what
    assert "update the NVIDIA driver" in found.problems[0].fix


def test_onnxruntime_that_falls_back_is_an_error() -> None:
    runtime = installed("onnxruntime", cuda_major=13, details={"in_use": ["CPUExecutionProvider"]})
    found = judge(machine((GPU,)), packages(onnxruntime=runtime))
    assert "falls back to the CPU" in found.problems[0].what


def test_two_onnxruntimes_are_an_error() -> None:
    both = ("onnxruntime", "onnxruntime-gpu")
    runtime = installed("onnxruntime", distributions=both)
    found = on_cpu(onnxruntime=runtime)
    remove = "pip uninstall -y onnxruntime onnxruntime-gpu; pip install "
    assert found.problems[0].fix == remove + "onnxruntime"
    on_gpu = judge(machine((GPU,)), packages(onnxruntime=runtime))
    assert on_gpu.problems[0].fix == remove + "onnxruntime-gpu"


def test_what_cannot_be_imported_is_reported() -> None:
    torch = installed("torch", error="libcudart.so.13: cannot open shared object file")
    found = on_cpu(torch=torch)
    assert "libcudart.so.13" in found.problems[0].what
    assert dict(found.uses)["adapt"] == "not possible without torch"


def test_missing_packages_name_their_extra() -> None:
    found = on_cpu(onnx=Package("onnx"), onnxruntime=Package("onnxruntime"))
    assert [problem.fix for problem in found.problems] == [
        'pip install "microclip-deploy[cpu,export]"',
        'pip install "microclip-deploy[cpu]"',
    ]
    assert dict(found.uses)["exported graphs"] == "not possible without onnxruntime"


@pytest.mark.parametrize(
    ("code", "timeout_s", "told"),
    [
        ("import os; os.kill(os.getpid(), 11)", 60, "crashed with signal 11"),
        ("raise OSError('no libfoo.so')", 60, "OSError: no libfoo.so"),
        ("import time; time.sleep(60)", 0.2, "longer than"),
    ],
)
def test_an_import_that_fails_is_reported(
    code: str, timeout_s: float, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "onnx.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(environment, "_PROBE_TIMEOUT_S", timeout_s)
    (tmp_path / "timm.py").touch()
    found, next_one = probe_packages(("onnx", "timm"))
    assert told in found.error
    assert not found.works
    assert not next_one.error  # whatever ended the process, it is looked at in another


def test_this_machine_is_diagnosed_and_shown() -> None:
    told: list[tuple[int, int]] = []
    found = diagnose((("onnxruntime",), PLAIN), lambda *done: told.append(done))
    assert told == [(1, 2), (2, 2)]
    assert set(found.packages) == {*PACKAGES, *PLAIN}
    assert found.packages["onnxruntime"].works == bool(found.packages["onnxruntime"].version)
    content = json.loads(json.dumps(found.to_json()))
    assert content["machine"]["cpus"] >= 1
    console = Console(width=120)
    with console.capture() as captured:
        console.print(*tables(found), *problem_lines(found), sep="\n", soft_wrap=True)
    text = captured.get()
    assert "onnxruntime" in text
    assert '    pip install "microclip-deploy[adapt]"\n' in text  # a line that can be copied
