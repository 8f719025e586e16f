"""What is installed, which devices there are, what will be used for what, and how to mend the rest.

It imports none of the packages it looks at, so it works in the smallest installation.
"""

import importlib.util
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from microclip_deploy.environment import (
    FAMILIES,
    PACKAGES,
    PLAIN,
    Machine,
    Package,
    probe_machine,
    probe_packages,
)
from microclip_deploy.errors import EXTRA_OF, EnvironmentProblem, UsageError
from microclip_deploy.serving.flavour import MODULES, RTX

_PURPOSE: Mapping[str, str] = {
    "adapt": "to adapt, and to evaluate and predict with a run",
    "export": "to export",
    "cpu": "to evaluate and predict with an export",
    "gpu": "for exports at full speed on the GPU",
    "bench": "to measure with `bench`",
}

_MODEL = ("torch", "torchvision", "open_clip", "timm")
"""Packages that open a run."""

_NEEDED: Mapping[str, tuple[str, ...]] = {
    "adapt": (*_MODEL, "jinja2", "matplotlib", "tensorboard"),
    "export": (*_MODEL, "onnx", "onnxscript", "onnxruntime"),
    "bench": ("onnxruntime", "psutil", "cpuinfo", "pynvml"),
}

_DRIVER = re.compile(r"libcuda\.|driver|CUDA-capable device", re.IGNORECASE)
"""How CUDA's libraries word that there is no driver, or one that does not fit."""

_IMPOSSIBLE = "not possible without "

NEEDS = ("cupy", "gpu", "trt")
"""What `require` knows."""


class Problem(NamedTuple):
    """Something that is wrong, and the line that mends it."""

    severity: Literal["error", "note"]
    """"error": something installed does not work; "note": something optional is absent."""
    what: str
    fix: str


class Use(NamedTuple):
    """What a task will run on."""

    task: str
    by: str

    @property
    def possible(self) -> bool:
        """Say whether nothing is missing for it."""
        return not self.by.startswith(_IMPOSSIBLE)


@dataclass(frozen=True)
class Diagnosis:
    """The whole picture."""

    machine: Machine
    packages: Mapping[str, Package]
    uses: tuple[Use, ...]
    problems: tuple[Problem, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "machine": asdict(self.machine),
            "packages": {name: asdict(package) for name, package in self.packages.items()},
            "uses": {use.task: use.by for use in self.uses},
            "problems": [problem._asdict() for problem in self.problems],
        }


def _ignore(done: int, total: int) -> None:
    """Show no progress."""


def diagnose(
    families: Sequence[Sequence[str]] = (*FAMILIES, PLAIN),
    progress: Callable[[int, int], None] = _ignore,
) -> Diagnosis:
    """Look at packages and devices; takes seconds, changes nothing and never fails.

    Args:
        families: which packages to look at, each family in a process of its own; all others count
            as not installed.
        progress: called with (done, total) families.
    """
    found = {name: Package(name) for name in (*PACKAGES, *PLAIN)}
    with ThreadPoolExecutor(len(families) + 1, thread_name_prefix="probe") as pool:
        machine = pool.submit(probe_machine)
        looking = [pool.submit(probe_packages, names) for names in families]
        for done, family in enumerate(as_completed(looking), start=1):
            found |= {package.name: package for package in family.result()}
            progress(done, len(looking))
        return judge(machine.result(), found)


def judge(machine: Machine, packages: Mapping[str, Package]) -> Diagnosis:
    """Conclude from what was found: what will be used, and what is wrong.

    Args:
        machine: processors, GPUs and driver.
        packages: one entry for each of PACKAGES and PLAIN.
    """
    problems = [
        *_broken(machine, packages.values()),
        *_cuda_problems(machine, packages),
        *_absent(machine, packages),
    ]
    return Diagnosis(machine, packages, _uses(machine, packages), tuple(problems))


def require(diagnosis: Diagnosis, needs: set[str]) -> None:
    """Insist on parts of the environment.

    Args:
        diagnosis: what was found.
        needs: of "gpu" (a GPU that torch can use), "trt" (TensorRT on a GPU) and "cupy" (CuPy on
            a GPU).

    Raises:
        EnvironmentProblem: something is missing; names all of it, with the line that mends it.
        UsageError: an unknown need.
    """
    unknown = sorted(needs - set(NEEDS))
    if unknown:
        raise UsageError(f"--require: expected {', '.join(NEEDS)}, found {', '.join(unknown)}")
    checks: dict[str, Callable[[Diagnosis], str]] = {
        "gpu": _gpu_lacks,
        "trt": lambda found: _gpu_package_lacks(found, "tensorrt", "TensorRT"),
        "cupy": lambda found: _gpu_package_lacks(found, "cupy", "CuPy"),
    }
    lacking = [f"{need}: {lack}" for need in sorted(needs) if (lack := checks[need](diagnosis))]
    if lacking:
        raise EnvironmentProblem("required and missing: " + "; ".join(lacking))


def _broken(machine: Machine, packages: Iterable[Package]) -> Iterator[Problem]:
    """Report what is installed and cannot be used, or is installed twice."""
    for package in packages:
        titles = package.distributions
        if lacks_driver(package):
            yield _driver_problem(machine, package)
        elif package.error:
            fix = f"pip install --force-reinstall {titles[0]}"
            yield Problem("error", f"{package.name} cannot be imported: {package.error}", fix)
        if package.name == "onnxruntime" and len(titles) > 1:
            usable = [title for title in titles if machine.gpus or not title.endswith("-gpu")]
            yield Problem(
                "error",
                f"{' and '.join(titles)} are both installed and overwrite each other's files",
                f"pip uninstall -y {' '.join(titles)}; pip install {max(usable)}",
            )


def lacks_driver(package: Package) -> bool:
    """Say whether a package fails for want of an NVIDIA driver: no other wheel would mend that."""
    return EXTRA_OF[package.name] == "gpu" and bool(_DRIVER.search(package.error))


def _driver_problem(machine: Machine, package: Package) -> Problem:
    if machine.gpus:
        what = f"{package.name} cannot use the NVIDIA driver: {package.error}"
        return Problem("error", what, "update the NVIDIA driver, then restart the machine")
    what = f"{package.name} finds no NVIDIA driver, and is not used"
    fix = "install the driver if this machine has an NVIDIA GPU; otherwise nothing is wrong"
    return Problem("note", what, fix)


def _cuda_problems(machine: Machine, packages: Mapping[str, Package]) -> Iterator[Problem]:
    """Report CUDA majors that differ, and GPUs that a package does not reach."""
    majors = {name: p.cuda_major for name, p in packages.items() if p.cuda_major is not None}
    wanted = majors.get("torch") or max(majors.values(), default=None)
    if wanted is not None and len(set(majors.values())) > 1:
        listed = ", ".join(f"{name} {major}" for name, major in majors.items())
        wrong = [packages[name] for name, major in majors.items() if major != wanted]
        yield Problem(
            "error",
            f"packages are built for different CUDA majors ({listed}); one process cannot mix them",
            "; ".join(_install_for(package, wanted) for package in wrong),
        )
    torch, runtime = packages["torch"], packages["onnxruntime"]
    reached = bool(torch.details.get("usable"))
    if not machine.gpus:
        return
    if machine.visible is not None and not reached:
        what = f"CUDA_VISIBLE_DEVICES={machine.visible!r} hides the GPU from all programs"
        yield Problem("note", what, "unset CUDA_VISIBLE_DEVICES")
        return
    if torch.works and torch.cuda_major is None:
        what = f"torch {torch.version} is a CPU build, and the GPU stays idle"
        yield Problem("error", what, "pip install --force-reinstall torch torchvision")
    elif torch.works and not reached:
        yield _unreached(machine, torch)
    if runtime.works and "CUDAExecutionProvider" not in runtime.details.get("in_use", ()):
        if runtime.cuda_major is None:
            remove = f"pip uninstall -y {' '.join(runtime.distributions)}"
            fix = f"{remove}; pip install 'onnxruntime-gpu[cuda,cudnn]>=1.27'"
            yield Problem("note", "onnxruntime is a CPU build, and the GPU stays idle", fix)
        else:
            what = "onnxruntime-gpu falls back to the CPU: its CUDA libraries cannot be loaded"
            yield Problem("error", what, "pip install 'onnxruntime-gpu[cuda,cudnn]>=1.27'")


def _unreached(machine: Machine, torch: Package) -> Problem:
    """Say why PyTorch cannot use the GPU that the driver lists."""
    what = f"torch {torch.version} (CUDA {torch.cuda_major}) cannot use the GPU"
    driver = machine.driver_cuda.split(".")[0]
    if driver.isdigit() and int(driver) < (torch.cuda_major or 0):
        what += f"; the driver supports CUDA {machine.driver_cuda} only"
        return Problem("error", what, "update the NVIDIA driver, then restart the machine")
    fix = "restart the machine; if that does not help, update the NVIDIA driver"
    return Problem("error", what, fix)


def _install_for(package: Package, major: int) -> str:
    """Return the commands that replace a package by its build for a CUDA major."""
    remove = f"pip uninstall -y {' '.join(package.distributions)}"
    builds = {"cupy": f"cupy-cuda{major}x", "tensorrt": f"tensorrt_cu{major}"}
    build = builds.get(package.name, f"a build of {package.name} for CUDA {major}")
    return f"{remove}; pip install {build}"


def _absent(machine: Machine, packages: Mapping[str, Package]) -> Iterator[Problem]:
    """Report what is not installed; what only a GPU needs, only where there is one."""
    missing: dict[str, list[str]] = {}
    for name in (*PACKAGES, *PLAIN):
        extra = _extra_of(name, machine)
        if not packages[name].version and (extra != "gpu" or machine.gpus):
            missing.setdefault(extra, []).append(name)
    for extra, names in missing.items():
        needed = f"{', '.join(names)} not installed: needed {_PURPOSE[extra]}"
        # With one command everything that the purpose needs is there.
        extras = {extra, *(_extra_of(name, machine) for name in _NEEDED.get(extra, ()))}
        listed = ",".join(sorted(extras & set(missing)))
        yield Problem("note", needed, _install(listed, packages["onnxruntime"]))


def _extra_of(name: str, machine: Machine) -> str:
    """Return the extra that installs a package here: `cpu` and `gpu` exclude each other."""
    return "gpu" if name == "onnxruntime" and machine.gpus else EXTRA_OF[name]


def _install(extras: str, runtime: Package) -> str:
    """Return the commands that install extras; a build of ONNX Runtime for CPUs makes way."""
    install = f'pip install "microclip-deploy[{extras}]"'
    if "gpu" in extras and "onnxruntime" in runtime.distributions:
        return f"pip uninstall -y onnxruntime; {install}"
    return install


def _uses(machine: Machine, packages: Mapping[str, Package]) -> tuple[Use, ...]:
    torch = packages["torch"]
    on_gpu = torch.works and bool(torch.details.get("usable"))
    device = machine.gpus[0].name if on_gpu and machine.gpus else "GPU" if on_gpu else "CPU"
    threads = torch.details.get("threads", machine.cpus)
    place = f"cuda ({device})" if on_gpu else f"cpu ({threads} threads)"
    pytorch, graphs = f"PyTorch {torch.version} on {place}", _exported(packages)
    run = _impossible(packages, _MODEL) or pytorch
    proof = f"ONNX {packages['onnx'].version}, proven with ONNX Runtime"
    return (
        Use("adapt", _impossible(packages, _NEEDED["adapt"]) or pytorch),
        Use("evaluate, predict", f"a run: {run}; an export: {graphs}"),
        Use("export", _impossible(packages, _NEEDED["export"]) or proof),
        Use("bench", _impossible(packages, _NEEDED["bench"]) or "whatever the target runs on"),
        Use("NCut", _cut(packages, on_gpu=on_gpu)),
        Use("exported graphs", graphs),
        Use("exported engines", _engines(machine, packages)),
    )


def _impossible(packages: Mapping[str, Package], needed: Iterable[str]) -> str:
    """Say what a task cannot do without; '' where all of it works."""
    lacking = [name for name in needed if not packages[name].works]
    return _IMPOSSIBLE + ", ".join(lacking) if lacking else ""


def _cut(packages: Mapping[str, Package], *, on_gpu: bool) -> str:
    if not packages["torch"].works:
        return "inside the exported graphs"
    if not on_gpu:
        return "exact solver in float64 on the CPU"
    if packages["cupy"].works:
        return f"CUDA kernel in float32, CuPy {packages['cupy'].version}"
    return "iterative solver in float32 on the GPU; CuPy would bring the kernel"


def _exported(packages: Mapping[str, Package]) -> str:
    runtime = packages["onnxruntime"]
    if lacking := _impossible(packages, ("onnxruntime",)):
        return lacking
    on_gpu = "CUDAExecutionProvider" in runtime.details.get("in_use", ())
    kernels = " with the CUDA kernels" if on_gpu and packages["cupy"].works else ""
    return f"ONNX Runtime {runtime.version} on the {'GPU' if on_gpu else 'CPU'}{kernels}"


def _engines(machine: Machine, packages: Mapping[str, Package]) -> str:
    titles = {"tensorrt": "TensorRT", "cupy": "CuPy"}
    lacking = [title for name, title in titles.items() if not packages[name].works]
    seen = machine.gpus or packages["torch"].details.get("usable")
    lacking += [] if seen else ["an NVIDIA GPU"]
    if lacking and importlib.util.find_spec(MODULES[RTX]) is not None:
        return f"{RTX}: export --trt builds them; verify proves them where they are to serve"
    if lacking:
        return _IMPOSSIBLE + ", ".join(lacking)
    version = packages["tensorrt"].version
    return f"TensorRT {version} with the CUDA kernels; export --trt builds them"


def _gpu_lacks(found: Diagnosis) -> str:
    torch = found.packages["torch"]
    if not found.machine.gpus and not torch.details.get("usable"):
        return "no NVIDIA GPU is visible; check that `nvidia-smi` lists one"
    return "" if torch.details.get("usable") else _lack_of(found, "torch", "PyTorch")


def _gpu_package_lacks(found: Diagnosis, name: str, title: str) -> str:
    package = found.packages[name]
    lack = "" if package.works else _lack_of(found, name, title)
    if found.machine.gpus or found.packages["torch"].details.get("usable"):
        return lack
    look = "no NVIDIA GPU is visible; check that `nvidia-smi` lists one"
    if package.works or lacks_driver(package):
        return f"{title} is installed and {look}"
    return f"{look}. With a GPU: {lack}"


def _lack_of(found: Diagnosis, name: str, title: str) -> str:
    package = found.packages[name]
    if not package.version:
        fix = _install(EXTRA_OF[name], found.packages["onnxruntime"])
        return f"{title} is not installed; run: {fix}"
    fixes = [p.fix for p in found.problems if p.severity == "error" and name in p.what]
    reason = package.error or "it cannot use the GPU"
    return f"{title} {package.version} does not work: {reason}" + "".join(
        f"; run: {fix}" for fix in fixes[:1]
    )
