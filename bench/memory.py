"""The most memory a process has held in RAM: its largest resident size."""

import sys
from pathlib import Path

_STATUS, _CONTROL = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_rss_bytes() -> int:
    """Return the largest resident size of this process since its start, or `forget_peak`.

    getrusage comes second: on Linux a process takes over the peak of the one that started it.
    """
    if _STATUS.exists():
        return 1024 * int(_STATUS.read_text().partition("VmHWM:")[2].split()[0])  # its kB are KiB
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def forget_peak() -> None:
    """Let the largest resident size start again from the present one, where the kernel can."""
    if _CONTROL.exists():
        _CONTROL.write_text("5")
