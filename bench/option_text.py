"""What people write after an option of the benchmark, as numbers: times, shares, percentiles.

Each function is the `parser` of an option: it takes the text and raises typer.BadParameter, which
the command line completes with the option's name.
"""

import math
import re
from collections.abc import Sequence

from typer import BadParameter

_NUMBER = r"(\d+\.?\d*|\.\d+)"  # no sign, no exponent, neither nan nor inf
_TIME = re.compile(rf"{_NUMBER} ?(ms|s)?", re.ASCII)
_SHARE = re.compile(rf"{_NUMBER} ?(%)?", re.ASCII)
_DECIMAL = re.compile(_NUMBER, re.ASCII)
_LIMIT = re.compile(rf"p{_NUMBER} ?= ?{_NUMBER} ?(ms|s)", re.ASCII)
_DEVICE = re.compile(r"cpu|cuda(:\d+)?", re.ASCII)

_SECONDS = {"ms": 1e-3, "s": 1.0}


def parse_seconds(text: str) -> float:
    """Read "2s", "500ms" or "1.5" as seconds, 0 or more; without a unit they are seconds."""
    match = _TIME.fullmatch(text.strip())
    seconds = float(match[1]) * _SECONDS[match[2] or "s"] if match else math.inf
    if not math.isfinite(seconds):
        raise _refused("a time such as 2s, 500ms or 1.5", text)
    return seconds


def parse_share(text: str) -> float:
    """Read "5%" or "0.05" as a share, over 0 and up to 1; "5" could mean either and is refused."""
    match = _SHARE.fullmatch(text.strip())
    share = float(match[1]) / (100 if match[2] else 1) if match else 0.0
    if not 0 < share <= 1:
        raise _refused("a share over 0 and up to 1 such as 5% or 0.05", text)
    return share


def parse_numbers(text: str) -> tuple[int, ...]:
    """Read "1,32" as whole numbers of at least 1, in rising order."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise _refused("whole numbers such as 1,32", text)
    return tuple(sorted({int(part) for part in parts}))


def parse_rates(text: str) -> tuple[float, ...]:
    """Read "0.5,0.8,20" as numbers over 0, in rising order."""
    parts = [part.strip() for part in text.split(",")]
    if not all(_DECIMAL.fullmatch(part) and 0 < float(part) < math.inf for part in parts):
        raise _refused("numbers over 0 such as 0.5,0.8,20", text)
    return tuple(sorted({float(part) for part in parts}))


def parse_choice(text: str, known: Sequence[str]) -> str:
    """Return one of the names."""
    if text not in known:
        raise _refused(" or ".join(known), text)
    return text


def parse_names(text: str, known: Sequence[str]) -> tuple[str, ...]:
    """Return the names of a comma list; "all" and "none" are short for the obvious."""
    if text in ("all", "none"):
        return tuple(known) if text == "all" else ()
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if unknown := [name for name in names if name not in known]:
        raise _refused(f"a comma list of {', '.join(known)}, or all or none", ", ".join(unknown))
    return names


def parse_device(text: str) -> str:
    """Read "cpu", "cuda" or "cuda:1"."""
    if not _DEVICE.fullmatch(text):
        raise _refused("cpu, cuda or cuda:N", text)
    return text


def parse_percentiles(text: str) -> tuple[float, ...]:
    """Read "50,90,99.9" as percentiles from 0 to 100, in rising order."""
    parts = [part.strip() for part in text.split(",")]
    if not all(_DECIMAL.fullmatch(part) and float(part) <= 100 for part in parts):
        raise _refused("percentiles from 0 to 100 such as 50,90,99.9", text)
    return tuple(sorted({float(part) for part in parts}))


def parse_limits(text: str) -> dict[float, float]:
    """Read "p99=10ms,p50=5ms" as percentile -> the most seconds that latencies may take.

    In the order of the percentiles. A limit without a unit is refused: one meant in ms and read in
    seconds would never be missed.
    """
    limits: dict[float, float] = {}
    for part in text.split(","):
        match = _LIMIT.fullmatch(part.strip())
        q = float(match[1]) if match else math.inf
        limit_s = float(match[2]) * _SECONDS[match[3]] if match else 0.0
        if not (q <= 100 and 0 < limit_s < math.inf):
            raise _refused("limits with a unit such as p99=10ms,p50=5ms", text)
        if q in limits:
            raise _refused(f"one limit for p{q:g}", text)
        limits[q] = limit_s
    return dict(sorted(limits.items()))


def parse_limit(text: str) -> tuple[float, float]:
    """Read "p95=100ms" as one percentile and its limit in seconds; "100ms" is one for p99."""
    match = _LIMIT.fullmatch((text if "=" in text else f"p99={text}").strip())
    q, limit_s = (float(match[1]), float(match[2]) * _SECONDS[match[3]]) if match else (0.0, 0.0)
    if not (0 < q <= 100 and 0 < limit_s < math.inf):
        raise _refused("one limit with a unit such as 100ms or p95=100ms", text)
    return q, limit_s


def _refused(expected: str, text: str) -> BadParameter:
    return BadParameter(f"expected {expected}, found '{text}'")
