"""The environment card that stands beside every measured number."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from microclip_deploy.environment import usable_cpus

PACKAGES = (
    "microclip-deploy", "torch", "open_clip_torch", "timm", "numpy", "pillow", "onnxruntime",
    "onnxruntime-gpu", "onnxruntime-openvino", "tensorrt", "cupy-cuda13x",
)  # fmt: skip

INSTRUCTIONS = (
    "avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16",
    "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip
"""What decides how fast matrices are multiplied, as Linux names it on x86 and ARM."""

GPU_FIELDS = {
    "name": "name",
    "driver": "driver_version",
    "memory": "memory.total",
    "clock_sm": "clocks.sm",
    "clock_sm_max": "clocks.max.sm",
    "clock_memory": "clocks.mem",
    "power": "power.draw",
    "power_limit": "power.limit",
    "temperature_c": "temperature.gpu",
    "mig": "mig.mode.current",
}
"""Key on the card -> field of nvidia-smi; values keep their units."""

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
"""Bits of nvidia-smi's clocks_event_reasons.active."""


def environment(number: int = 0) -> dict[str, Any]:
    """Return processor, cores, memory, GPU, library versions and commit as plain values.

    Args:
        number: of the GPU that is measured.

    `load` is the mean number of running processes in the last minute: what else was at work.
    """
    cpu = _cpu()
    known = (cpu.get("flags") or cpu.get("Features") or "").split()
    return {
        "cpu": cpu.get("model name") or platform.processor(),
        "instructions": [name for name in INSTRUCTIONS if name in known],
        "cores": usable_cpus(),
        "load": round(os.getloadavg()[0], 2),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": gpu(number),
        "os": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "commit": _commit(),
    }


def gpu(number: int = 0) -> dict[str, Any] | None:
    """Return what nvidia-smi and CuPy say about a GPU now, or None where there is none.

    A value that this driver does not tell is None. Clocks and what throttles them are those of
    the moment of the call.
    """
    if _query("name", number) is None:
        return None
    found: dict[str, Any] = {key: _query(field, number) for key, field in GPU_FIELDS.items()}
    asked = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
    active = next((answer for field in asked if (answer := _query(field, number))), None)
    return {**found, "throttled_by": throttle_reasons(active), "cuda_runtime": _cuda_runtime()}


def throttle_reasons(active: str | None) -> list[str] | None:
    """Name the bits that lower the clocks; None where the driver does not tell them.

    Args:
        active: hexadecimal, as nvidia-smi prints it.
    """
    try:
        bits = int(active or "", 16)
    except ValueError:
        return None
    known = [name for bit, name in THROTTLE_REASONS.items() if bits & bit]
    rest = bits & ~sum(THROTTLE_REASONS)
    return [*known, hex(rest)] if rest else known


def _query(field: str, number: int) -> str | None:
    """Return one field of a GPU; an unknown field would spoil a query of several."""
    visible = [each for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each]
    name = visible[number] if number < len(visible) else number  # nvidia-smi sees all GPUs
    shown = _output("nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader", f"--id={name}")
    return None if shown is None or shown.startswith("[") else shown


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


def _cpu() -> dict[str, str]:
    """Return what Linux tells about the first processor; nothing on other systems."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


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
