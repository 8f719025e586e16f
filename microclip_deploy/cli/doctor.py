"""What is installed, which devices there are, what will be used for what, and how to mend the rest.

It imports none of the packages it looks at, so it works in the smallest installation.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from microclip_deploy.environment import (
    PACKAGES,
    Machine,
    Package,
    probe_machine,
    probe_package,
)
from microclip_deploy.errors import EXTRA_OF, EnvironmentProblem, UsageError

if TYPE_CHECKING:
    from rich.table import Table

_PURPOSE: Mapping[str, str] = {
    "adapt": "to adapt, evaluate and predict",
    "export": "to export",
    "cpu": "to run exported graphs",
    "gpu": "to run exported graphs on the GPU",
}

_DRIVER = re.compile(r"libcuda\.|driver|CUDA-capable device", re.IGNORECASE)
"""How CUDA's libraries word that there is no driver, or one that does not fit."""

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

    def tables(self) -> list["Table"]:
        """Return packages, devices, uses and problems for a terminal."""
        return [_package_table(self), _machine_table(self), _use_table(self), _problem_table(self)]


def diagnose(packages: Sequence[str] = PACKAGES) -> Diagnosis:
    """Look at packages and devices; takes seconds, changes nothing and never fails.

    Args:
        packages: which ones to look at; the others count as not installed.
    """
    with ThreadPoolExecutor(4, thread_name_prefix="probe") as pool:
        machine = pool.submit(probe_machine)
        found = {package.name: package for package in pool.map(probe_package, packages)}
        missing = {name: Package(name) for name in PACKAGES if name not in found}
        return judge(machine.result(), {**found, **missing})


def judge(machine: Machine, packages: Mapping[str, Package]) -> Diagnosis:
    """Conclude from what was found: what will be used, and what is wrong.

    Args:
        machine: processors, GPUs and driver.
        packages: one entry for each of torch, torchvision, open_clip, timm, onnx, onnxruntime,
            tensorrt and cupy.
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
        if _lacks_driver(package):
            yield _driver_problem(machine, package)
        elif package.error:
            fix = f"pip install --force-reinstall {titles[0]}"
            yield Problem("error", f"{package.name} cannot be imported: {package.error}", fix)
        if package.name == "onnxruntime" and len(titles) > 1:
            yield Problem(
                "error",
                f"{' and '.join(titles)} are both installed and overwrite each other's files",
                f"pip uninstall -y {' '.join(titles)}; pip install {max(titles)}",
            )


def _lacks_driver(package: Package) -> bool:
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
    if not machine.gpus:
        return
    torch, runtime = packages["torch"], packages["onnxruntime"]
    driver = machine.driver_cuda.split(".")[0]
    if torch.works and torch.cuda_major is None:
        what = f"torch {torch.version} is a CPU build, and the GPU stays idle"
        yield Problem("error", what, "pip install --force-reinstall torch torchvision")
    elif torch.works and not torch.details.get("usable"):
        what = f"torch {torch.version} (CUDA {torch.cuda_major}) cannot use the GPU"
        old = driver.isdigit() and int(driver) < (torch.cuda_major or 0)
        reason = f"; the driver supports CUDA {machine.driver_cuda} only" if old else ""
        yield Problem("error", what + reason, "update the NVIDIA driver, then restart the machine")
    if runtime.works and "CUDAExecutionProvider" not in runtime.details.get("in_use", ()):
        if runtime.cuda_major is None:
            fix = "pip uninstall -y onnxruntime; pip install 'onnxruntime-gpu[cuda,cudnn]>=1.27'"
            yield Problem("note", "onnxruntime is a CPU build, and the GPU stays idle", fix)
        else:
            what = "onnxruntime-gpu falls back to the CPU: its CUDA libraries cannot be loaded"
            yield Problem("error", what, "pip install 'onnxruntime-gpu[cuda,cudnn]>=1.27'")


def _install_for(package: Package, major: int) -> str:
    """Return the commands that replace a package by its build for a CUDA major."""
    remove = f"pip uninstall -y {' '.join(package.distributions)}"
    builds = {"cupy": f"cupy-cuda{major}x", "tensorrt": f"tensorrt_cu{major}"}
    build = builds.get(package.name, f"a build of {package.name} for CUDA {major}")
    return f"{remove}; pip install {build}"


def _absent(machine: Machine, packages: Mapping[str, Package]) -> Iterator[Problem]:
    """Report what is not installed; what only a GPU needs, only where there is one."""
    missing: dict[str, list[str]] = {}
    for name in PACKAGES:
        extra = EXTRA_OF[name]
        if not packages[name].version and (extra != "gpu" or machine.gpus):
            missing.setdefault(extra, []).append(name)
    for extra, names in missing.items():
        needed = f"{', '.join(names)} not installed: needed {_PURPOSE[extra]}"
        yield Problem("note", needed, f'pip install "microclip-deploy[{extra}]"')


def _uses(machine: Machine, packages: Mapping[str, Package]) -> tuple[Use, ...]:
    torch = packages["torch"]
    lacking = [n for n in ("torch", "torchvision", "open_clip", "timm") if not packages[n].works]
    on_gpu = torch.works and bool(torch.details.get("usable"))
    device = machine.gpus[0].name if on_gpu and machine.gpus else "GPU" if on_gpu else "CPU"
    threads = torch.details.get("threads", machine.cpus)
    place = f"cuda ({device})" if on_gpu else f"cpu ({threads} threads)"
    model = f"PyTorch {torch.version} on {place}"
    if lacking:
        model = f"not possible without {', '.join(lacking)}"
    exact = "exact solver in float64 on the CPU"
    return (
        Use("adapt", model),
        Use("evaluate, predict", model),
        Use("NCut", _cut(packages) if on_gpu else exact),
        Use("exported graphs", _exported(packages)),
        Use("exported engines", _engines(machine, packages)),
    )


def _cut(packages: Mapping[str, Package]) -> str:
    if packages["cupy"].works:
        return f"CUDA kernel in float32, CuPy {packages['cupy'].version}"
    return "iterative solver in float32 on the GPU; CuPy would bring the kernel"


def _exported(packages: Mapping[str, Package]) -> str:
    runtime = packages["onnxruntime"]
    if not runtime.works:
        return "not possible without onnxruntime"
    on_gpu = "CUDAExecutionProvider" in runtime.details.get("in_use", ())
    kernels = " with the CUDA kernels" if on_gpu and packages["cupy"].works else ""
    return f"ONNX Runtime {runtime.version} on the {'GPU' if on_gpu else 'CPU'}{kernels}"


def _engines(machine: Machine, packages: Mapping[str, Package]) -> str:
    titles = {"tensorrt": "TensorRT", "cupy": "CuPy"}
    lacking = [title for name, title in titles.items() if not packages[name].works]
    lacking += [] if machine.gpus else ["an NVIDIA GPU"]
    if lacking:
        return f"not possible without {', '.join(lacking)}"
    version = packages["tensorrt"].version
    return f"TensorRT {version} with the CUDA kernels; export --trt builds them"


def _gpu_lacks(found: Diagnosis) -> str:
    torch = found.packages["torch"]
    if not found.machine.gpus and not torch.details.get("usable"):
        return "no NVIDIA GPU is visible; check that `nvidia-smi` lists one"
    return "" if torch.details.get("usable") else _lack_of(found, "torch", "PyTorch")


def _gpu_package_lacks(found: Diagnosis, name: str, title: str) -> str:
    package = found.packages[name]
    if not found.machine.gpus and (package.works or _lacks_driver(package)):
        return (
            f"{title} is installed and no NVIDIA GPU is visible; check that `nvidia-smi` lists one"
        )
    return "" if package.works else _lack_of(found, name, title)


def _lack_of(found: Diagnosis, name: str, title: str) -> str:
    package = found.packages[name]
    if not package.version:
        return f'{title} is not installed; run: pip install "microclip-deploy[{EXTRA_OF[name]}]"'
    fixes = [p.fix for p in found.problems if p.severity == "error" and name in p.what]
    reason = package.error or "it cannot use the GPU"
    return f"{title} {package.version} does not work: {reason}" + "".join(
        f"; run: {fix}" for fix in fixes[:1]
    )


def _package_table(found: Diagnosis) -> "Table":
    from rich.text import Text

    table = _table("packages", "package", "version", "CUDA", "state")
    for name in PACKAGES:
        package = found.packages[name]
        state = "works" if package.works else package.error or "not installed"
        style = "green" if package.works else "red" if package.error else "dim"
        if _lacks_driver(package) and not found.machine.gpus:
            state, style = "no NVIDIA driver", "dim"
        providers = package.details.get("in_use")
        if package.works and providers:
            state += f" ({', '.join(p.removesuffix('ExecutionProvider') for p in providers)})"
        major = str(package.cuda_major) if package.cuda_major is not None else "-"
        table.add_row(name, package.version or "-", major, Text(state, style=style))
    return table


def _machine_table(found: Diagnosis) -> "Table":
    machine = found.machine
    table = _table("machine", "part", "found")
    table.add_row("Python", f"{machine.python} on {machine.system}")
    table.add_row("processors", str(machine.cpus))
    for gpu in machine.gpus:
        table.add_row("GPU", f"{gpu.name}, {gpu.memory_mib} MiB, driver {gpu.driver}")
    if not machine.gpus:
        table.add_row("GPU", "none visible")
    if machine.driver_cuda:
        table.add_row("driver", f"supports up to CUDA {machine.driver_cuda}")
    return table


def _use_table(found: Diagnosis) -> "Table":
    table = _table("what will be used", "task", "by")
    for use in found.uses:
        table.add_row(use.task, use.by)
    return table


def _problem_table(found: Diagnosis) -> "Table":
    from rich.text import Text

    if not found.problems:
        table = _table("problems", "what")
        table.add_row("none found")
        return table
    table = _table("problems", "", "what", "how to mend it")
    for problem in found.problems:
        style = "red" if problem.severity == "error" else "yellow"
        table.add_row(Text(problem.severity, style=style), Text(problem.what), Text(problem.fix))
    return table


def _table(title: str, *headings: str) -> "Table":
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table
