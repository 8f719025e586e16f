"""How many processors this process may use: its affinity, and the quota of its container."""

import math
import os
from collections.abc import Iterator
from numbers import Integral
from pathlib import Path

from microclip_deploy.errors import UsageError

MAX_THREADS = 1024
"""Most that may be asked for; a mistyped number would fill the machine with them."""

_OWN_GROUPS = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")


def usable_cpus() -> int:
    """Return how many processors this process may use, at least 1.

    A container's quota (`docker run --cpus`, Kubernetes' `limits.cpu`) counts, rounded up; so does
    that of every group of processes above it.
    """
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return min([len(os.sched_getaffinity(0)), *map(math.ceil, _quotas())])
    return os.cpu_count() or 1


def limited_cpus() -> int | None:
    """Return how many processors this process may use if that is fewer than there are."""
    cpus = usable_cpus()
    return cpus if cpus < (os.cpu_count() or 1) else None


def checked_threads(threads: int | None) -> int | None:
    """Return a number of threads that a user asked for; None is the default.

    Raises:
        UsageError: no whole number, or not from 1 to `MAX_THREADS`.
    """
    if threads is None:
        return None
    if isinstance(threads, Integral) and 1 <= threads <= MAX_THREADS:
        return int(threads)
    raise UsageError(
        f"threads: expected a whole number from 1 to {MAX_THREADS}, found {threads!r}; give one, "
        "or leave it out for one a core"
    )


def _quotas() -> Iterator[float]:
    """Yield the processors that each group of this process is allowed; none outside Linux."""
    try:
        lines = _OWN_GROUPS.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return
    for line in lines:
        _, controllers, own = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = _GROUPS / ("cpu" if controllers else "")  # version 1 has a tree for each controller
        # In a container this may be the host's path, of which only the end is there, as the root.
        below = root / own.lstrip("/")
        for group in (below, *below.parents):
            if group.is_relative_to(root):
                yield from _quota(group)


def _quota(group: Path) -> Iterator[float]:
    """Yield the quota of one group, of either version of control groups, if it has one."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text("ascii").split()
        else:
            quota, period = (
                (group / f"cpu.cfs_{name}_us").read_text("ascii") for name in ("quota", "period")
            )
        if quota != "max" and float(quota) > 0:  # -1 is none, too
            yield float(quota) / float(period)
    except (OSError, ValueError, ZeroDivisionError):
        return
