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
from pathlib import Path
from time import perf_counter

import numpy as np

from microclip_deploy.bench.memory import peak_rss_bytes
from microclip_deploy.errors import EnvironmentProblem, MicroclipError
from microclip_deploy.serving import open_session

TIMEOUT_S = 600.0

# Not `-m`: that would import the package before the clock is started.
_CHILD = (
    "import sys; from time import perf_counter; start = perf_counter();"
    "import microclip_deploy.serving; import_s = perf_counter() - start;"
    "from microclip_deploy.bench.latency.cold_start import print_times;"
    "print_times(import_s, *sys.argv[1:])"
)

_FIRST_KEY = '{"import_s": '
"""How the line of JSON begins; libraries print, too, before and after it."""


def cold_start(target: Path, device: str, batch: int) -> dict[str, float]:
    """Let a fresh process open a run or an export and answer two batches of noise.

    Args:
        target: directory of the run or export.
        device: as `open_session` takes it.
        batch: B, at least 1.

    Returns:
        Seconds of each step, and `peak_rss_bytes`: the largest resident size of that process.

    Raises:
        EnvironmentProblem: the process cannot be started, fails, or takes over `TIMEOUT_S`.
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
    line = next((x for x in done.stdout.splitlines() if x.startswith(_FIRST_KEY)), None)
    if done.returncode or line is None:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        ended = f"signal {-done.returncode}" if done.returncode < 0 else f"exit {done.returncode}"
        raise _failed(f"{ended} ({last[:500]})")
    return {**json.loads(line), "process_s": process_s}


def print_times(import_s: float, target: str, device: str, batch: str) -> None:
    """Print what the fresh process measured as one line of JSON, or end with the error it met."""
    start = perf_counter()
    try:
        with open_session(Path(target), device) as session:
            opened, side = perf_counter(), session.preprocess.size
            shape = (int(batch), side, side, 3)
            images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
            ready = perf_counter()
            session.predict(images)
            first = perf_counter()
            session.predict(images)
            second = perf_counter()
    except MicroclipError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    times = {"open_s": opened - start, "first_s": first - ready, "second_s": second - first}
    print(json.dumps({"import_s": import_s, **times, "peak_rss_bytes": peak_rss_bytes()}))


def _failed(outcome: str) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"cold start: expected the times of a fresh Python process, found {outcome}; "
        "run `microclip-deploy doctor`, which tries the packages one by one"
    )
