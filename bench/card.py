"""The environment card that stands beside every measured number."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from microclip_deploy.errors import require
from microclip_deploy.processors import usable_cpus

PACKAGES = (
    "microclip-deploy", "torch", "open_clip_torch", "timm", "numpy", "pillow", "onnxruntime",
    "onnxruntime-gpu", "onnxruntime-openvino", "tensorrt", "cupy-cuda13x", "httptools", "starlette",
    "uvicorn",
)  # fmt: skip

INSTRUCTIONS = (
    "avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16",
    "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip
"""What decides how fast matrices are multiplied, as Linux names it on x86 and ARM."""

THROTTLE_REASONS = {
    0x1: "idle",
    0x2: "application clocks",
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
    0x100: "display clocks",
}
"""Bits of NVML's clocks event reasons."""


def environment(number: int = 0) -> dict[str, Any]:
    """Return processor, cores, memory, GPU, library versions and commit as plain values.

    `load` is the mean number of running processes in the last minute: what else was at work.

    Args:
        number: of the GPU that is measured.

    Raises:
        EnvironmentProblem: a package of the extra `bench` is not installed.
    """
    psutil = require("psutil", "bench")
    load = round(psutil.getloadavg()[0], 2)  # first: finding out about the processor is work
    cpu = require("cpuinfo", "bench").get_cpu_info()
    return {
        "cpu": cpu.get("brand_raw") or platform.processor(),
        "instructions": [name for name in INSTRUCTIONS if name in cpu.get("flags", ())],
        "cores": usable_cpus(),
        "load": load,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": gpu(number),
        "os": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: tag for name in PACKAGES if (tag := _version(name))},
        "commit": _commit(),
    }


def gpu(number: int = 0) -> dict[str, Any] | None:
    """Return what NVML and CuPy say about a GPU now, or None where there is none.

    A value that this driver does not tell is None. Clocks and what throttles them are those of
    the moment of the call.

    Args:
        number: as CUDA counts, of those that CUDA_VISIBLE_DEVICES shows.

    Raises:
        EnvironmentProblem: nvidia-ml-py is not installed.
    """
    nvml = require("pynvml", "bench")
    device = _device(nvml, number)
    if device is None:
        return None

    def ask(question: str, *details: int) -> Any:
        try:
            return getattr(nvml, f"nvmlDeviceGet{question}")(device, *details)
        except nvml.NVMLError:
            return None

    memory, power, limit = ask("MemoryInfo"), ask("PowerUsage"), ask("PowerManagementLimit")
    mig, reasons = ask("MigMode"), ask("CurrentClocksEventReasons")
    return {
        "name": ask("Name"),
        "driver": nvml.nvmlSystemGetDriverVersion(),
        "memory": _text("{:.0f} MiB", memory and memory.total / 2**20),
        "clock_sm": _text("{} MHz", ask("ClockInfo", nvml.NVML_CLOCK_SM)),
        "clock_sm_max": _text("{} MHz", ask("MaxClockInfo", nvml.NVML_CLOCK_SM)),
        "clock_memory": _text("{} MHz", ask("ClockInfo", nvml.NVML_CLOCK_MEM)),
        "power": _text("{:.2f} W", power and power / 1000),
        "power_limit": _text("{:.2f} W", limit and limit / 1000),
        "temperature_c": _text("{}", ask("Temperature", nvml.NVML_TEMPERATURE_GPU)),
        "mig": mig and ("Disabled", "Enabled")[mig[0]],
        "throttled_by": None if reasons is None else throttle_reasons(reasons),
        "cuda_runtime": _cuda_runtime(),
    }


def throttle_reasons(bits: int) -> list[str]:
    """Name the bits that lower the clocks."""
    known = [name for bit, name in THROTTLE_REASONS.items() if bits & bit]
    rest = bits & ~sum(THROTTLE_REASONS)
    return [*known, hex(rest)] if rest else known


def _text(pattern: str, value: float | None) -> str | None:
    return None if value is None else pattern.format(value)


def _device(nvml: Any, number: int) -> Any:
    """Return NVML's handle of a GPU; None without a driver or without that GPU."""
    visible = [each for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each]
    name = visible[number] if number < len(visible) else str(number)  # NVML sees all GPUs
    try:
        nvml.nvmlInit()
        if name.isdecimal():
            return nvml.nvmlDeviceGetHandleByIndex(int(name))
        return nvml.nvmlDeviceGetHandleByUUID(name)
    except nvml.NVMLError:
        return None


def _cuda_runtime() -> str | None:
    """Return the version of the CUDA runtime that CuPy uses, such as "13.0"."""
    try:
        import cupy

        number = cupy.cuda.runtime.runtimeGetVersion()
    except (ImportError, RuntimeError):
        return None
    return f"{number // 1000}.{number % 1000 // 10}"


def _commit() -> str | None:
    """Return the commit of this file, or None where it was installed without its history."""
    here = Path(__file__).resolve()
    git = ("git", "-C", str(here.parent))
    if _output(*git, "ls-files", "--error-unmatch", here.name) is None:  # another repository
        return None
    return _output(*git, "describe", "--always", "--dirty", "--exclude=*")


def _output(*command: str) -> str | None:
    """Return what a command prints, or None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
