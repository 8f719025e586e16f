"""What NVRTC makes of every kernel, for every architecture: registers, spills, shared memory.

NVRTC compiles for any architecture without a device or driver. `python -m tests.cuda.kernel_builds`
writes tests/vectors/kernel-builds.json, which test_builds.py compares with.
"""

import importlib.metadata
import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from microclip_deploy.cuda.layout import Device, KernelLayout
from microclip_deploy.cuda.soap import attend_bytes, fusion_source, product_source
from microclip_deploy.cuda.source import TOKEN_TYPES, CudaSource, TokenType
from microclip_deploy.ncut.spec import NCutSpec

TABLE = Path(__file__).parent.parent / "vectors" / "kernel-builds.json"
SHARED_BYTES = {
    75: 65536,
    80: 166912,
    86: 101376,
    89: 101376,
    90: 232448,
    100: 232448,
    120: 101376,
}
"""What a block may have, by compute capability."""
COUNTS = (49, 196, 256, 576, 1024)
WIDTH = 768
_ENTRY = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers([^\n]*)",
    re.DOTALL,
)
_STATIC = re.compile(r"(\d+) bytes smem")


class Job(NamedTuple):
    """One compilation."""

    name: str
    source: CudaSource
    capability: int
    dynamic_bytes: dict[str, int]
    """Shared memory that a kernel of the source is launched with, where it exceeds 48 KiB."""


class Build(NamedTuple):
    """A kernel as it was compiled."""

    registers: int
    spill_bytes: int
    """Stored and loaded."""
    shared_bytes: int
    """Static and dynamic."""


class Compiled(NamedTuple):
    """What a compilation gives."""

    builds: dict[str, Build]
    warnings: list[str]


def nvrtc_version() -> str:
    """Return the version of the NVRTC in use, as exactly as it is known."""
    from cupy_backends.cuda.libs import nvrtc

    try:
        return importlib.metadata.version("nvidia-cuda-nvrtc")
    except importlib.metadata.PackageNotFoundError:
        return ".".join(map(str, nvrtc.getVersion()))


def jobs() -> Iterator[Job]:
    """Yield every source for every architecture."""
    for capability, shared in SHARED_BYTES.items():
        device = Device(capability, shared)
        for count in COUNTS:
            cut = _layout(count, "float16", device)
            name = f"cut N={count}"
            yield Job(name, cut.cut_source(), capability, {"ncut_cut": cut.cut_bytes()})
            if count == 256:
                rule = replace(cut, spec=NCutSpec(threshold="otsu", side="object"))
                dynamic = {"ncut_cut": rule.cut_bytes()}
                yield Job(f"{name} object", rule.cut_source(), capability, dynamic)
        yield from _affinity_jobs(device)
        yield from _head_jobs(capability)


def _affinity_jobs(device: Device) -> Iterator[Job]:
    counts = COUNTS if device.compute_capability == 90 else (49, 256)  # they hardly differ
    kinds: list[tuple[int, TokenType]] = [(count, "float16") for count in counts]
    kinds += [(count, token) for count in (49, 256) for token in TOKEN_TYPES[1:]]
    for count, token in kinds:
        if token == "bfloat16" and device.compute_capability < 80:
            continue
        layout = _layout(count, token, device)
        dynamic = {"ncut_affinity": layout.affinity_bytes(), "ncut_lengths": 4 * WIDTH}
        name = f"affinity N={count} {token}"
        yield Job(name, layout.affinity_source(), device.compute_capability, dynamic)
        if count == 256 and token == "float16":
            name = f"lengths N={count} {token}"
            yield Job(name, layout.lengths_source(), device.compute_capability, dynamic)


def _head_jobs(capability: int) -> Iterator[Job]:
    larger = [(1024, "float32")] if capability == 90 else []
    for width, token in [(768, "float16"), *larger]:
        attend = {"attend": attend_bytes(width)}
        name = f"fusion D={width}"
        yield Job(f"{name} {token}", fusion_source(width, token), capability, attend)
        yield Job(f"product K={width}", product_source(width), capability, {})


def _layout(count: int, token: TokenType, device: Device) -> KernelLayout:
    return KernelLayout(count, WIDTH, token, NCutSpec(affinity="centered_cosine"), device)


def compile_job(job: Job) -> Compiled:
    """Compile without a device, and read the compiler's notes."""
    from cupy.cuda.compiler import _NVRTCProgram

    log = io.StringIO()
    options = (*job.source.options(), f"-arch=sm_{job.capability}", "--ptxas-options=-v")
    program = _NVRTCProgram(job.source.text(), job.source.file, method="cubin")
    cubin = program.compile(options, log)[0]
    if not bytes(cubin[:4]) == b"\x7fELF":
        raise ValueError(f"{job.name} sm_{job.capability}: expected a cubin")
    return _read(job, log.getvalue())


def _read(job: Job, log: str) -> Compiled:
    builds = {}
    for kernel, stores, loads, registers, rest in _ENTRY.findall(log):
        static = _STATIC.search(rest)
        shared = (int(static[1]) if static else 0) + job.dynamic_bytes.get(kernel, 0)
        name = f"{job.name} {kernel} sm_{job.capability}"
        builds[name] = Build(int(registers), int(stores) + int(loads), shared)
    return Compiled(builds, [line for line in log.splitlines() if ": warning" in line])


def compile_all(wanted: Iterable[Job]) -> Compiled:
    """Compile jobs on all cores."""
    builds: dict[str, Build] = {}
    warnings: list[str] = []
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for compiled in pool.map(compile_job, wanted):
            builds |= compiled.builds
            warnings += compiled.warnings
    return Compiled(builds, sorted(set(warnings)))


def read_table() -> tuple[str, dict[str, Build]]:
    """Return the NVRTC version and the builds of the committed table."""
    table: dict[str, Any] = json.loads(TABLE.read_text())
    return table["nvrtc"], {name: Build(*numbers) for name, numbers in table["builds"].items()}


def write_table() -> None:
    """Replace the committed table, a build a line."""
    rows = [
        f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(compile_all(jobs()).builds.items())
    ]
    columns = json.dumps(list(Build._fields))
    head = f'{{\n "nvrtc": {json.dumps(nvrtc_version())},\n "columns": {columns},\n "builds": {{\n'
    TABLE.write_text(head + ",\n".join(rows) + "\n }\n}\n")
    print(f"{TABLE}: {len(rows)} builds")


if __name__ == "__main__":
    write_table()
