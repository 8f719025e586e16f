"""Kernels compile without a device and are what they were: registers, spills, shared memory.

The committed table has every kernel for every architecture; some are compiled here. After a change
run `python -m tests.cuda.kernel_builds`, which compiles all, and look at the difference.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import microclip_deploy
from tests.cuda.kernel_builds import (
    SHARED_BYTES,
    Build,
    Compiled,
    Job,
    compile_all,
    jobs,
    nvrtc_version,
    read_table,
)

pytest.importorskip("cupy", reason="needs CuPy, though no device: pip install cupy-cuda13x")

OTHER_NVRTC = 8
"""Registers by which another NVRTC may differ: its allocator works in steps of 8."""
SPILL_FREE = 256
"""Tokens up to which the cut must keep everything in registers."""
ROOT = Path(__file__).parents[2]
CUDA_FILES = sorted(
    path
    for folder in (Path(microclip_deploy.__file__).parent, ROOT / "tests")
    for kind in ("*.cu", "*.cuh", "*.h", "*.cpp")
    for path in folder.rglob(kind)
)


def is_compiled_here(job: Job) -> bool:
    """Choose what takes a few seconds: all for Hopper, one size for the oldest and the newest."""
    if job.capability == 90:
        return job.name != "cut N=576"
    return job.capability in (min(SHARED_BYTES), max(SHARED_BYTES)) and "N=256" in job.name


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    return compile_all(filter(is_compiled_here, jobs()))


def test_builds_are_those_of_the_table(compiled: Compiled) -> None:
    version, expected = read_table()
    remedy = "run `python -m tests.cuda.kernel_builds` if this is meant"
    assert compiled.builds.keys() <= expected.keys(), remedy
    allowed = 0 if version == nvrtc_version() else OTHER_NVRTC
    other = {
        name: (expected[name], build)
        for name, build in compiled.builds.items()
        if not is_as(expected[name], build, allowed)
    }
    assert other == {}, remedy


def is_as(expected: Build, found: Build, allowed: int) -> bool:
    """Say whether a build is the expected one; another NVRTC may use a few registers more."""
    registers = abs(found.registers - expected.registers) <= allowed
    spills = found.spill_bytes == expected.spill_bytes or (
        allowed > 0 and found.spill_bytes > 0 < expected.spill_bytes
    )
    return registers and spills and found.shared_bytes == expected.shared_bytes


def test_nothing_spills_up_to_256_tokens() -> None:
    spilled = [name for name, build in read_table()[1].items() if build.spill_bytes]
    assert [name for name in spilled if count_of(name) <= SPILL_FREE] == []


def count_of(name: str) -> int:
    """Return N of "cut N=49 ncut_cut sm_90"; other kernels must never spill."""
    return int(name.split()[1].removeprefix("N=")) if name.startswith("cut ") else 0


def test_shared_memory_is_what_every_architecture_has() -> None:
    builds = {name: build.shared_bytes for name, build in read_table()[1].items()}
    assert {int(name.rsplit("_", 1)[1]) for name in builds} == set(SHARED_BYTES)
    for name, shared in builds.items():
        assert shared <= SHARED_BYTES[int(name.rsplit("_", 1)[1])], name


def test_nvrtc_has_no_warnings(compiled: Compiled) -> None:
    assert compiled.warnings == []


@pytest.mark.parametrize("path", CUDA_FILES, ids=lambda path: path.name)
def test_cuda_and_c_sources_are_formatted(path: Path) -> None:
    beside_python = Path(sys.executable).parent / "clang-format"
    tool = str(beside_python) if beside_python.exists() else shutil.which("clang-format")
    if tool is None:
        pytest.skip("needs clang-format: pip install clang-format")
    command = [tool, "--dry-run", "--Werror", str(path)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, f"run clang-format -i {path}\n{found.stderr[:500]}"
