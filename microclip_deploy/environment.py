"""What is installed and which devices there are, found out without importing anything here.

Packages with native code are imported in a process of their own: a broken driver or a wrong CUDA
major can end an import in a crash, and then that is what is reported.
"""

import json
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
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

# Run in a process of its own; the last line it prints is JSON.
_PROBES: Mapping[str, str] = {
    "torch": (
        "import json, torch as m; c = m.version.cuda; n = m.cuda.device_count();"
        "print(json.dumps({'cuda': c or '', 'threads': m.get_num_threads(), 'usable': n,"
        "'compute': ['%d.%d' % m.cuda.get_device_capability(i) for i in range(n)]}))"
    ),
    "torchvision": "import torchvision; print('{}')",
    "open_clip": "import open_clip; print('{}')",
    "timm": "import timm; print('{}')",
    "onnx": "import onnx; print('{}')",
    "onnxruntime": (
        "import base64, json, onnxruntime as m; m.set_default_logger_severity(4);"
        "getattr(m, 'preload_dlls', lambda: None)() if 'CUDAExecutionProvider' in "
        "m.get_available_providers() else None;"
        f"s = m.InferenceSession(base64.b64decode('{_IDENTITY}'),"
        "providers=m.get_available_providers());"
        "print(json.dumps({'cuda': getattr(m, 'cuda_version', ''), 'in_use': s.get_providers()}))"
    ),
    "tensorrt": "import tensorrt as m; m.Logger(); print('{}')",
    "cupy": (
        "import json, cupy as m; print(json.dumps({'usable': m.cuda.runtime.getDeviceCount()}))"
    ),
}

# Distribution names by package, most specific first; a group in a name is its CUDA major.
_DISTRIBUTIONS: Mapping[str, str] = {
    "torch": r"torch",
    "torchvision": r"torchvision",
    "open_clip": r"open[-_]clip[-_]torch",
    "timm": r"timm",
    "onnx": r"onnx",
    "onnxruntime": r"onnxruntime(?:-gpu|-openvino|-directml)?",
    "tensorrt": r"tensorrt(?:[-_]cu(\d+))?",
    "cupy": r"cupy(?:-cuda(\d+)x)?",
}

PACKAGES = tuple(_PROBES)
"""Names of the packages that `probe_package` knows."""


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


def probe_package(name: str) -> Package:
    """Look at one of PACKAGES; whatever goes wrong is in the result."""
    found = _distributions(name)
    if not found:
        return Package(name)
    details, error = _run_probe(_PROBES[name])
    cuda = str(details.get("cuda") or "").split(".")[0]
    return Package(
        name=name,
        version=found[0].version,
        cuda_major=found[0].cuda_major or (int(cuda) if cuda.isdigit() else None),
        error=error,
        distributions=tuple(entry.title for entry in found),
        details=details,
    )


class _Installed(NamedTuple):
    cuda_major: int
    """In the distribution's name; 0 if there is none."""
    title: str
    version: str


def _distributions(name: str) -> list[_Installed]:
    """Return the distributions that provide a package, the most specific name first."""
    pattern = re.compile(_DISTRIBUTIONS[name], re.IGNORECASE)
    found: set[_Installed] = set()
    for distribution in metadata.distributions():
        title = distribution.metadata["Name"] or ""
        if match := pattern.fullmatch(title):
            major = match.group(1) if pattern.groups else None
            found.add(_Installed(int(major or 0), title, distribution.version))
    return sorted(found, reverse=True)


def _run_probe(code: str) -> tuple[dict[str, Any], str]:
    """Run Python code in a process of its own; return its JSON line, or why there is none."""
    # -P: a file named torch.py in the working directory must not be taken for the package.
    command = [sys.executable, "-P", "-W", "ignore", "-c", code]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_PROBE_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return {}, f"the import takes longer than {_PROBE_TIMEOUT_S:.0f} s"
    except OSError as error:
        return {}, f"no process could be started: {error}"
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return dict(json.loads(lines[-1])), ""
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    if done.returncode < 0:
        return {}, f"the import crashed with signal {-done.returncode}: {last[:200]}"
    return {}, last[:300]


def probe_machine() -> Machine:
    """Look at processors, GPUs and driver."""
    gpus, driver_cuda = _nvidia()
    return Machine(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpus=usable_cpus(),
        gpus=gpus,
        driver_cuda=driver_cuda,
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
