"""One process at a time in a directory."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from microclip_deploy.artifact import write_problem
from microclip_deploy.errors import UsageError

LOCK = ".lock"
"""File in the directory; one left behind by a killed process does not count."""


@contextmanager
def exclusive(directory: Path, busy: str) -> Iterator[None]:
    """Hold a directory, or fail at once.

    Args:
        directory: made if it is not there.
        busy: what to say where another process holds it.

    Raises:
        UsageError: another process holds it.
        EnvironmentProblem: it cannot be made or locked.
    """
    lock = FileLock(directory / LOCK, timeout=0)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise UsageError(f"{directory}: {busy}") from error
    except (OSError, NotImplementedError) as error:
        raise write_problem(directory, error) from error
    try:
        yield
    finally:
        lock.release()
