"""What is installed and which devices there are, found out without importing anything here.

Packages with native code are imported in a process of their own: a broken driver or a wrong CUDA
major can end an import in a crash, and then that is what is reported.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, NamedTuple

from microclip_deploy.processors import usable_cpus

_PROBE_TIMEOUT_S = 120.0

# The ONNX graph y = Identity(x), opset 17: a session of it tells which providers really load,
# where get_available_providers only tells which ones were compiled in.
_IDENTITY = (
    "CAg6NwoQCgF4EgF5IghJZGVudGl0eRIBZ1oPCgF4EgoKCAgBEgQKAggBYg8KAXkSCgoICAESBAoCCAFCBAoAEBE="
)

# What is run to look at a package; it leaves `found`, plain values.
_PROBES: Mapping[str, str] = {
    "torch": (
        "import torch as m; n = m.cuda.device_count();"
        "found = {'cuda': m.version.cuda or '', 'threads': m.get_num_threads(), 'usable': n,"
        "'compute': ['%d.%d' % m.cuda.get_device_capability(i) for i in range(n)]}"
    ),
    "torchvision": "import torchvision; found = {}",
    "timm": "import timm; found = {}",
    "open_clip": "import open_clip; found = {}",
    "onnx": "import onnx; found = {}",
    "onnxruntime": (
        "import base64, onnxruntime as m; m.set_default_logger_severity(4);"
        "getattr(m, 'preload_dlls', lambda: None)() if 'CUDAExecutionProvider' in "
        "m.get_available_providers() else None;"
        f"s = m.InferenceSession(base64.b64decode('{_IDENTITY}'),"
        "providers=m.get_available_providers());"
        "found = {'cuda': getattr(m, 'cuda_version', ''), 'in_use': s.get_providers()}"
    ),
    "tensorrt": "import tensorrt as m; m.Logger(); found = {}",
    "cupy": "import cupy as m; found = {'usable': m.cuda.runtime.getDeviceCount()}",
}

# Run in a process of its own: each probe given, one JSON line a package as soon as it is known.
_PROBING = """
import json, sys, traceback
for name, code in json.loads(sys.argv[1]).items():
    space, error = {"found": {}}, ""
    try:
        exec(code, space)
    except Exception as problem:
        error = traceback.format_exception_only(problem)[-1].strip().splitlines()[-1]
    print(json.dumps([name, space["found"], error[:300]]), flush=True)
"""

FAMILIES = (
    ("torch", "torchvision", "timm", "open_clip"),
    ("onnx",),
    ("onnxruntime",),
    ("tensorrt",),
    ("cupy",),
)
"""Packages that import one another are looked at in one process, which imports each once."""

PACKAGES = tuple(name for family in FAMILIES for name in family)
"""Packages with native code, all of which `probe_packages` imports."""

PLAIN = ("jinja2", "matplotlib", "onnxscript", "psutil", "cpuinfo", "pynvml", "tensorboard")
"""Packages that are only looked up."""

# Distribution names by package, most specific first; a group in a name is its CUDA major.
_DISTRIBUTIONS: Mapping[str, str] = {
    "open_clip": r"open[-_]clip[-_]torch",
    "onnxruntime": r"onnxruntime(?:-gpu|-openvino|-directml)?",
    "tensorrt": r"tensorrt(?:[-_]cu(\d+))?",
    "cupy": r"cupy(?:-cuda(\d+)x)?",
    "cpuinfo": r"py-cpuinfo",
    "pynvml": r"nvidia-ml-py",
}


@dataclass(frozen=True)
class Package:
    """An installed or missing package."""

    name: str
    version: str = ""
    """Empty when it is not installed."""
    cuda_major: int | None = None
    """CUDA it was built for; None for a CPU build, or where it cannot be told."""
    error: str = ""
    """Why its import failed; empty when it works or is not installed."""
    distributions: tuple[str, ...] = ()
    """Names under which it is installed, the one that counts first."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Execution providers, threads, usable devices."""

    @property
    def works(self) -> bool:
        """Say whether it is installed and can be imported."""
        return bool(self.version) and not self.error


@dataclass(frozen=True)
class Gpu:
    """A GPU the driver sees."""

    name: str
    memory_mib: int
    driver: str


@dataclass(frozen=True)
class Machine:
    """Where we run."""

    python: str
    system: str
    cpus: int
    """Processors this process may use."""
    gpus: tuple[Gpu, ...]
    driver_cuda: str
    """Newest CUDA the driver supports, such as "13.0"; empty without a driver."""
    visible: str | None = None
    """CUDA_VISIBLE_DEVICES, which hides GPUs from programs; None where it is not set."""


def probe_packages(names: Sequence[str]) -> list[Package]:
    """Look at packages, in one process if they can all be imported; what goes wrong is told.

    Args:
        names: of PACKAGES, those first that others import, or of PLAIN.
    """
    installed = _installed(names)
    present = [name for name in names if installed[name]]
    found: dict[str, tuple[dict[str, Any], str]] = {
        name: ({}, "") for name in present if name in PLAIN
    }
    while left := [name for name in present if name not in found]:
        found |= _run_probes(left)
    return [_package(name, installed[name], *found.get(name, ({}, ""))) for name in names]


def _package(
    name: str, installed: Sequence["_Installed"], details: Mapping[str, Any], error: str
) -> Package:
    if not installed:
        return Package(name)
    cuda = str(details.get("cuda") or "").split(".")[0]
    return Package(
        name=name,
        version=installed[0].version,
        cuda_major=installed[0].cuda_major or (int(cuda) if cuda.isdigit() else None),
        error=error,
        distributions=tuple(entry.title for entry in installed),
        details=details,
    )


class _Installed(NamedTuple):
    cuda_major: int
    """In the distribution's name; 0 if there is none."""
    title: str
    version: str


def _installed(names: Sequence[str]) -> dict[str, list[_Installed]]:
    """Return the distributions that provide each package, the most specific name first."""
    patterns = {
        name: re.compile(_DISTRIBUTIONS.get(name, re.escape(name)), re.IGNORECASE) for name in names
    }
    found: dict[str, set[_Installed]] = {name: set() for name in names}
    for distribution in metadata.distributions():
        title = distribution.metadata["Name"] or ""
        for name, pattern in patterns.items():
            if match := pattern.fullmatch(title):
                major = match.group(1) if pattern.groups else None
                found[name].add(_Installed(int(major or 0), title, distribution.version))
    return {name: sorted(entries, reverse=True) for name, entries in found.items()}


def _run_probes(names: Sequence[str]) -> dict[str, tuple[dict[str, Any], str]]:
    """Import packages in a process of their own; return details and error of those it came to.

    The first one is always among them: where the process ends without a word, that is its error.
    """
    # -P: a file named torch.py in the working directory must not be taken for the package.
    asked = json.dumps({name: _PROBES[name] for name in names})
    command = [sys.executable, "-P", "-W", "ignore", "-c", _PROBING, asked]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    try:
        told, complaint = process.communicate(timeout=_PROBE_TIMEOUT_S)
        why = _end_of(process.returncode, complaint)
    except subprocess.TimeoutExpired:
        process.kill()
        told, _ = process.communicate()
        why = f"the import takes longer than {_PROBE_TIMEOUT_S:.0f} s"
    found = {
        name: (details, error)
        for name, details, error in (json.loads(line) for line in _json_lines(told))
    }
    silent = [name for name in names if name not in found]
    return found | {name: ({}, why) for name in silent[:1]}


def _json_lines(text: str) -> list[str]:
    """Return the lines a probe printed, and not those of the packages themselves."""
    return [line for line in text.splitlines() if line.startswith('["') and line.endswith("]")]


def _end_of(code: int, complaint: str) -> str:
    """Say how a process ended that should have told more."""
    last = (complaint.strip().splitlines() or ["no message"])[-1]
    return f"the import crashed with signal {-code}: {last[:200]}" if code < 0 else last[:300]


def probe_machine() -> Machine:
    """Look at processors, GPUs and driver."""
    gpus, driver_cuda = _nvidia()
    return Machine(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpus=usable_cpus(),
        gpus=gpus,
        driver_cuda=driver_cuda,
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
    )


def _nvidia() -> tuple[tuple[Gpu, ...], str]:
    """Return the GPUs and the CUDA version of the driver, as nvidia-smi tells them."""
    listed = _nvidia_smi("--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    gpus = []
    for line in listed.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 3:
            memory = re.match(r"\d+", parts[1])
            gpus.append(Gpu(parts[0], int(memory.group()) if memory else 0, parts[2]))
    version = re.search(r"CUDA Version:\s*(\d+\.\d+)", _nvidia_smi() if gpus else "")
    return tuple(gpus), version.group(1) if version else ""


def _nvidia_smi(*arguments: str) -> str:
    """Return its output; '' where there is no driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    try:
        done = subprocess.run(
            [program, *arguments], capture_output=True, text=True, errors="replace", timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
