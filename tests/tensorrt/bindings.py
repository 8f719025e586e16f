"""TensorRT's own Python bindings over empty libraries: they import without TensorRT or a GPU.

Classes, enums, signatures and subclassing are the real ones. `Builder`, `Runtime` and all else
that the library makes cannot be had; fake.py stands in for these.

TensorRT for RTX is had whole: its library builds without a GPU.

Wheels come from the package index. Their licence keeps them, and all that is unpacked, out of
the repository: nothing is written outside the cache.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

VERSIONS = ("10.16.1.11", "11.4.0.106")
"""The newest of each major version that the product supports."""
RTX_VERSION = "1.7.1.116"
"""The layers it lists and the bytes of its plans are as the tests expect: both are undocumented."""
DOWNLOAD_S = 120
RUN_S = 300
_ROOT = Path(__file__).parents[2]
_TOOLS = ("gcc", "readelf")
_PIP_DOWNLOAD = (
    *(sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--retries=1"),
    *("--disable-pip-version-check", "--no-deps", "--only-binary=:all:"),
)


class Unavailable(Exception):
    """The bindings cannot be had on this machine; says why."""


def bindings(version: str, cache: Path) -> Path:
    """Return a folder for PYTHONPATH whose `tensorrt` is this version's.

    Args:
        version: as the package index lists it.
        cache: where finished folders are kept, one for each version and kind of Python.

    Raises:
        Unavailable: the index has no wheel for this Python, or does not answer; gcc or readelf
            is not installed.
    """

    def finish(folder: Path) -> None:
        (folder / "tensorrt_bindings").rename(folder / "tensorrt")
        # The bindings load the real libraries where `import tensorrt_libs` finds them.
        (folder / "tensorrt_libs.py").touch()
        _write_libraries(folder / "tensorrt")

    return kept(version, cache, [f"tensorrt-cu13-bindings=={version}"], finish, _TOOLS)


def rtx(cache: Path) -> Path:
    """Return a folder for PYTHONPATH that has TensorRT for RTX, the library included.

    Raises:
        Unavailable: as `bindings`.
    """
    wanted = [f"tensorrt-rtx-cu13-{part}=={RTX_VERSION}" for part in ("bindings", "libs")]
    return kept(f"rtx-{RTX_VERSION}", cache, wanted, lambda _: None, ())


def kept(
    name: str,
    cache: Path,
    wanted: Sequence[str],
    finish: Callable[[Path], None],
    tools: Sequence[str],
) -> Path:
    """Return the folder that wheels are unpacked into, once."""
    target = cache / f"{name}-{sysconfig.get_config_var('SOABI')}"
    if target.is_dir():
        return target
    if missing := [tool for tool in tools if shutil.which(tool) is None]:
        raise Unavailable(f"needs {' and '.join(missing)}: apt-get install gcc binutils")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="unfinished-", dir=cache) as scratch:
        built = Path(scratch) / "built"
        for wheel in wanted:
            with zipfile.ZipFile(_download(wheel, Path(scratch))) as archive:
                archive.extractall(built)
        finish(built)
        try:
            built.rename(target)
        except OSError:
            # Another process may have finished it meanwhile.
            if not target.is_dir():
                raise
    return target


def run(folder: Path, *arguments: str, limit_s: float = RUN_S) -> str:
    """Return what Python prints, run in the repository with the folder's `tensorrt`."""
    path = os.pathsep.join((str(folder), str(_ROOT)))
    found = subprocess.run(
        [sys.executable, "-X", "faulthandler", *arguments],
        cwd=_ROOT,
        env={**os.environ, "PYTHONPATH": path, "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=False,
    )
    told = f"exit status {found.returncode}\n{found.stdout}{found.stderr}"
    assert found.returncode == 0, told
    return found.stdout


def run_cases(folder: Path, cases: Path) -> None:
    """Run a file of tests that import `tensorrt`, in a process of their own.

    They are ordinary tests, but have no fixtures from conftest.py: those would import PyTorch.
    """
    run(folder, *("-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider"), str(cases))


def _download(wanted: str, scratch: Path) -> Path:
    folder = scratch / wanted
    command = (*_PIP_DOWNLOAD, f"--dest={folder}", wanted)
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=DOWNLOAD_S)
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip() or "no reason given").splitlines()[-1]
        raise Unavailable(f"pip cannot download {wanted}: {reason}") from error
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"pip did not download {wanted} in {DOWNLOAD_S} s") from error
    return next(folder.glob("*.whl"))


def _write_libraries(package: Path) -> None:
    """Put a library in place of each of TensorRT's, whose functions all return a null pointer.

    The bindings look in their own folder first, and take a function from whichever library has it.
    """
    binary = str(package / "tensorrt.so")
    libraries = re.findall(r"NEEDED.*\[(libnv\S+)\]", _readelf("-d", binary))
    symbols = _readelf("--dyn-syms", binary)
    # All other libraries' symbols but Python's own carry a version.
    functions = re.findall(r"FUNC +GLOBAL +DEFAULT +UND ((?!_?Py)\w+)$", symbols, re.MULTILINE)
    source = "".join(f"void *{name}(void) {{ return 0; }}\n" for name in functions)
    for library in libraries:
        command = ("gcc", "-shared", "-fPIC", "-nostdlib", "-xc", "-", "-o", package / library)
        subprocess.run(command, input=source, check=True, text=True)


def _readelf(*arguments: str) -> str:
    return subprocess.check_output(("readelf", "--wide", *arguments), text=True)
