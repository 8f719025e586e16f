"""The environment card, with and without a GPU."""

import json
import platform
import sys
from types import SimpleNamespace
from typing import Any

import cpuinfo
import pytest

from microclip_deploy.bench import card


class Driver:
    """Stands for the module pynvml: tells what it is given, and raises for anything else."""

    NVMLError = KeyError
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self, **answers: Any) -> None:
        self.answers = answers

    def __getattr__(self, name: str) -> Any:
        if name.startswith("nvmlDeviceGetHandleBy"):
            return lambda index_or_uuid: index_or_uuid
        if name == "nvmlDeviceGetName":
            return lambda handle: f"GPU {handle}"
        return lambda *_: self.answers[name.removeprefix("nvmlDeviceGet")]


@pytest.fixture
def describe(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what the card says of a GPU whose driver tells so much, but the runtime's version."""

    def described(number: int = 0, **answers: Any) -> dict[str, Any]:
        driver = Driver(nvmlInit=None, nvmlSystemGetDriverVersion="580.1", **answers)
        monkeypatch.setitem(sys.modules, "pynvml", driver)
        found = card.gpu(number)
        assert found is not None
        del found["cuda_runtime"]
        return found

    return described


def test_without_a_driver_the_card_says_so() -> None:
    found = card.environment()
    assert found["gpu"] is None
    assert found["packages"]["torch"]
    assert found["memory_gib"] > 0
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("processor", "cpu", "instructions"),
    [
        ({"brand_raw": "EPYC", "flags": ["fpu", "avx512_vnni", "avx2"]}, "EPYC",
         ["avx2", "avx512_vnni"]),
        ({}, "generic", []),
    ],
)  # fmt: skip
def test_the_processor_and_its_instructions_are_told(
    processor: dict[str, Any], cpu: str, instructions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpuinfo, "get_cpu_info", lambda: processor)
    monkeypatch.setattr(platform, "processor", lambda: "generic")
    found = card.environment()
    assert (found["cpu"], found["instructions"]) == (cpu, instructions)


def test_a_gpu_is_described_and_what_is_unknown_is_none(describe: Any) -> None:
    found = describe(
        MemoryInfo=SimpleNamespace(total=143771 << 20), ClockInfo=1980, PowerUsage=120953,
        Temperature=35, MigMode=[1, 1], CurrentClocksEventReasons=0x204,
    )  # fmt: skip
    assert found == {
        "name": "GPU 0", "driver": "580.1", "memory": "143771 MiB", "clock_sm": "1980 MHz",
        "clock_sm_max": None, "clock_memory": "1980 MHz", "power": "120.95 W", "power_limit": None,
        "temperature_c": "35", "mig": "Enabled", "throttled_by": ["software power cap", "0x200"],
    }  # fmt: skip
    assert describe(CurrentClocksEventReasons=0)["throttled_by"] == []
    assert describe()["throttled_by"] is None


def test_the_gpu_that_is_measured_is_described(
    describe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-8a56")
    assert [describe(number)["name"] for number in (0, 1, 2)] == ["GPU 3", "GPU GPU-8a56", "GPU 2"]
