"""What the first request of a fresh process waits for.

The process is new, the machine is not: files that were read before come from the page cache. Its
own work is timed inside it, one step after the other:

    import_s    microclip_deploy.serving, NumPy among it; what a backend needs is imported by the
                next step
    open_s      open_session: files verified, runtime imported, model on its device
    first_s     the first batch, from uint8 views to NumPy arrays; what the backend does lazily
    second_s    the same batch again
    process_s   everything as the parent sees it: the interpreter's start and end, too
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from microclip_deploy import errors
from microclip_deploy.bench.memory import peak_rss_bytes
from microclip_deploy.errors import EnvironmentProblem, MicroclipError
from microclip_deploy.serving import open_session

TIMEOUT_S = 600.0

# Not `-m`: that would import the package before the clock is started.
_CHILD = (
    "import sys; from time import perf_counter; start = perf_counter();"
    "import microclip_deploy.serving; import_s = perf_counter() - start;"
    "from microclip_deploy.bench.latency.cold_start import tell;"
    "sys.exit(tell(import_s, sys.argv[1:]))"
)

_STARTS = ('{"import_s": ', '{"error": ')
"""Of the line of JSON."""

_ERRORS = {
    kind.__name__: kind
    for kind in (
        errors.UsageError,
        errors.DataError,
        errors.CheckpointError,
        EnvironmentProblem,
        errors.VerificationError,
    )
}


def cold_start(target: Path, device: str, batch: int) -> dict[str, float]:
    """Let a fresh process open a run or an export and answer two batches of noise.

    Args:
        target: directory of the run or export.
        device: as `open_session` takes it.
        batch: B, at least 1.

    Returns:
        Seconds of each step, and `peak_rss_bytes`: the largest resident size of that process.

    Raises:
        EnvironmentProblem: the process cannot be started, crashes, or takes over `TIMEOUT_S`.
        MicroclipError: what the process itself met, such as CheckpointError.
    """
    # -P: a file named torch.py in the working directory must not be taken for the package.
    command = [sys.executable, "-P", "-c", _CHILD, str(target), device, str(batch)]
    start = perf_counter()
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise _failed(f"none within {TIMEOUT_S:.0f} s") from error
    except OSError as error:
        raise _failed(f"no process could be started: {error}") from error
    process_s = perf_counter() - start
    return {**_told(done), "process_s": process_s}


def tell(import_s: float, arguments: Sequence[str]) -> int:
    """Print what the fresh process measured, or what it met, as one line of JSON.

    Args:
        import_s: seconds of the import that came before.
        arguments: target, device, batch.

    Returns:
        Exit status.
    """
    target, device, batch = arguments
    try:
        times = _times(Path(target), device, int(batch))
    except MicroclipError as error:
        print(json.dumps({"error": type(error).__name__, "message": str(error)}))
        return error.exit_code
    print(json.dumps({"import_s": import_s, **times, "peak_rss_bytes": peak_rss_bytes()}))
    return 0


def _times(target: Path, device: str, batch: int) -> dict[str, float]:
    start = perf_counter()
    with open_session(target, device) as session:
        opened = perf_counter()
        side = session.preprocess.size
        images = np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), dtype=np.uint8)
        ready = perf_counter()
        session.predict(images)
        first = perf_counter()
        session.predict(images)
        second = perf_counter()
    return {"open_s": opened - start, "first_s": first - ready, "second_s": second - first}


def _told(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """Return the times in the line of JSON, or raise the error in it."""
    # Libraries print, too, before and after it.
    lines = (line for line in done.stdout.splitlines() if line.startswith(_STARTS))
    said = dict(json.loads(next(lines, "{}")))
    if "error" in said:
        raise _ERRORS.get(said["error"], MicroclipError)(said["message"])
    if done.returncode or not said:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        ended = f"signal {-done.returncode}" if done.returncode < 0 else f"exit {done.returncode}"
        raise _failed(f"{ended} ({last[:300]})")
    return said


def _failed(found: str) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"cold start: expected the times of a fresh Python process, found {found}; "
        "run `microclip-deploy doctor`, which tries the packages one by one"
    )
