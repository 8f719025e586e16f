"""The test view on a CUDA device, byte for byte what `Preprocess.test_view` makes with Pillow.

A host decodes a photo and uploads its pixels once, those that the centre crop needs; resizing and
cropping happen on the device. Pillow resizes 8-bit images with integer weights, so equality is
exact and not a tolerance. Where the view lies is `Preprocess.geometry`, here as there.

    photos      uint8 (H, W, 3) of any sizes, on the host
    plan        regions to upload, weight tables, one row of numbers a photo      plan_views
    views       uint8 (B, S, S, 3) on the device                                  preprocess.cu

Pillow skips a pass that would not change the size. Here it is not skipped: its weights are then one
whole and zeros, and the pixels come out untouched.

Which axis is resized first changes the rounding between the passes, and Pillow 13 changed it for
some tall photos. The order here is that of the Pillow that is installed (`_down_first`).
"""

from collections.abc import Sequence
from enum import IntEnum
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import PIL
from numpy.typing import NDArray

from microclip_deploy.cuda.source import CudaSource
from microclip_deploy.data.decode import MAX_ASPECT_RATIO, MAX_PIXELS, MIN_SIDE
from microclip_deploy.data.preprocess import Preprocess, ViewGeometry
from microclip_deploy.errors import DataError, require

if TYPE_CHECKING:
    import cupy

PRECISION_BITS = 32 - 8 - 2
"""Fractional bits of a weight: Pillow leaves 8 for the pixel and 2 for sums below 0 and above 1."""

THREADS = 256
"""Threads of a block; each makes one byte."""

MAX_BATCH = 65535
"""Most photos of one call: a photo is a row of CUDA's grid, and it has no more rows."""

_SUPPORT = 2.0
"""Reach of the bicubic filter on either side, output pixels."""

_A = -0.5
"""Pillow's coefficient of the bicubic filter."""

_CHANNELS = 3

_PILLOW = int(PIL.__version__.split(".")[0])

# A table takes about 16 bytes a source pixel of its axis: 64 kB for a side of 4000 pixels.
_CACHED_TABLES = 256


class _Field(IntEnum):
    """Columns of the numbers a photo has on the device."""

    PIXELS = 0
    ROWS = 1
    COLUMNS = 2
    LINES = 3
    ACROSS = 4
    DOWN = 5
    DOWN_FIRST = 6


class _Row(IntEnum):
    """Rows of a weight table; WEIGHTS is the first of many."""

    FIRST = 0
    COUNT = 1
    WEIGHTS = 2


class Resampling(NamedTuple):
    """How one axis of a photo becomes one axis of its view."""

    start: int
    """First source pixel that the view needs."""
    length: int
    """Number of source pixels that the view needs."""
    table: NDArray[np.int32]
    """int32 (2 + taps, S), read-only: first pixel from `start`, number of pixels, weights."""


class ViewPlan(NamedTuple):
    """What the device is given for a batch of B photos."""

    regions: list[NDArray[np.uint8]]
    """uint8 (rows, columns, 3) each, C-contiguous: the pixels to upload."""
    numbers: NDArray[np.int64]
    """int64 (B, fields); column `PIXELS` is 0 until `with_addresses`."""
    tables: NDArray[np.int32]
    """int32 (any,): the weight tables, each different one once."""
    lines_bytes: int
    """Size of what all photos are between the two passes."""
    first_grid: tuple[int, int]
    """Blocks of `first_pass`."""
    second_grid: tuple[int, int]
    """Blocks of `second_pass`."""

    def with_addresses(self, addresses: Sequence[int]) -> NDArray[np.int64]:
        """Return the numbers, int64 (B, fields), with the address of each uploaded region."""
        numbers = self.numbers.copy()
        numbers[:, _Field.PIXELS] = addresses
        return numbers


class CudaTestView:
    """Makes test views on the current CUDA device; without state, so safe in threads."""

    def __init__(self, preprocess: Preprocess, *, max_pixels: int = MAX_PIXELS) -> None:
        """Take the definition of the view and the largest accepted width x height of a photo."""
        self.preprocess = preprocess
        self.max_pixels = max_pixels
        self._source = cuda_source(preprocess.size)

    def __call__(
        self, photos: Sequence[NDArray[np.uint8]], out: "cupy.ndarray | None" = None
    ) -> "cupy.ndarray":
        """Return the test views of decoded photos, in order.

        Everything is put on the current CuPy stream and nothing waits for the device. Photos in
        ordinary memory may change after the call; photos in pinned memory only when the stream has
        passed it.

        Args:
            photos: uint8 (H, W, 3), RGB, of any sizes, on the host.
            out: uint8 (B, S, S, 3), C-contiguous, on the current device; allocated if not given.

        Returns:
            uint8 (B, S, S, 3) on the current device, `out` if given.

        Raises:
            DataError: no photo or too many, another dtype or shape, a size `read_image` refuses.
            EnvironmentProblem: CuPy is not installed.
        """
        cupy = require("cupy", "gpu")
        plan = plan_views(self.preprocess, photos, max_pixels=self.max_pixels)
        shape = (len(photos), self.preprocess.size, self.preprocess.size, _CHANNELS)
        if out is None:
            out = cupy.empty(shape, np.uint8)
        elif out.shape != shape or out.dtype != np.uint8 or not out.flags.c_contiguous:
            raise DataError(
                f"out: expected C-contiguous uint8 {shape}, found {out.dtype} {out.shape}; "
                "pass cupy.empty(shape, 'uint8') or nothing"
            )
        # CuPy copies ordinary memory into pinned memory of its own and keeps that until the upload
        # is done. What is freed on return is used again only behind this work on the same stream.
        regions = [cupy.asarray(region) for region in plan.regions]
        numbers = cupy.asarray(plan.with_addresses([region.data.ptr for region in regions]))
        tables = cupy.asarray(plan.tables)
        lines = cupy.empty(plan.lines_bytes, np.uint8)
        module = self._source.module()
        first, second = (module.get_function(name) for name in ("first_pass", "second_pass"))
        first(plan.first_grid, (THREADS,), (numbers, tables, lines))
        second(plan.second_grid, (THREADS,), (numbers, tables, lines, out))
        return out


def cuda_source(side: int) -> CudaSource:
    """Return preprocess.cu for views of `side` x `side` pixels."""
    values = {
        "SIDE": side,
        "CHANNELS": _CHANNELS,
        "PRECISION_BITS": PRECISION_BITS,
        "VALUE_MAX": int(np.iinfo(np.uint8).max),
        "FIELDS": len(_Field),
        **{f"FIELD_{field.name}": int(field) for field in _Field},
        **{f"ROW_{row.name}": int(row) for row in _Row},
    }
    return CudaSource.of("preprocess.cu", values)


def plan_views(
    preprocess: Preprocess,
    photos: Sequence[NDArray[np.uint8]],
    *,
    max_pixels: int = MAX_PIXELS,
) -> ViewPlan:
    """Return what the device needs to make the test views of `photos`.

    Args:
        preprocess: the definition of the view.
        photos: uint8 (H, W, 3), RGB, of any sizes.
        max_pixels: largest accepted width x height.

    Raises:
        DataError: no photo or too many, another dtype or shape, a size `read_image` refuses.
    """
    if not 1 <= len(photos) <= MAX_BATCH:
        raise DataError(
            f"photos: expected 1 to {MAX_BATCH}, found {len(photos)}; split them into batches"
        )
    side = preprocess.size
    numbers = np.zeros((len(photos), len(_Field)), np.int64)
    regions: list[NDArray[np.uint8]] = []
    tables = _Tables()
    lines_bytes = most_lines_bytes = 0
    for index, photo in enumerate(photos):
        _check(photo, index, max_pixels)
        height, width = photo.shape[:2]
        view = preprocess.geometry(width, height)
        across = resampling(width, view.width, view.left, side)
        down = resampling(height, view.height, view.top, side)
        down_first = _down_first(width, height, view)
        rows = slice(down.start, down.start + down.length)
        columns = slice(across.start, across.start + across.length)
        regions.append(np.ascontiguousarray(photo[rows, columns]))
        numbers[index, _Field.ROWS] = down.length
        numbers[index, _Field.COLUMNS] = across.length
        numbers[index, _Field.LINES] = lines_bytes
        numbers[index, _Field.ACROSS] = tables.place(across.table)
        numbers[index, _Field.DOWN] = tables.place(down.table)
        numbers[index, _Field.DOWN_FIRST] = down_first
        unchanged = across.length if down_first else down.length
        lines_bytes += unchanged * side * _CHANNELS
        most_lines_bytes = max(most_lines_bytes, unchanged * side * _CHANNELS)
    blocks = [-(-size // THREADS) for size in (most_lines_bytes, side * side * _CHANNELS)]
    first_grid, second_grid = ((count, len(photos)) for count in blocks)
    return ViewPlan(regions, numbers, tables.joined(), lines_bytes, first_grid, second_grid)


class _Tables:
    """The weight tables of a batch one after the other, each different one once."""

    def __init__(self) -> None:
        self._tables: list[NDArray[np.int32]] = []
        self._places: dict[int, int] = {}
        self._length = 0

    def place(self, table: NDArray[np.int32]) -> int:
        """Return where the table begins; it is added if it is not yet there."""
        # Tables are cached, so one object stands for equal ones; held here, its id stays its own.
        if id(table) not in self._places:
            self._places[id(table)] = self._length
            self._tables.append(table)
            self._length += table.size
        return self._places[id(table)]

    def joined(self) -> NDArray[np.int32]:
        """Return all tables, int32 (any,)."""
        return np.concatenate([table.reshape(-1) for table in self._tables])


def _down_first(width: int, height: int, view: ViewGeometry) -> bool:
    """Return whether the installed Pillow resizes this photo along its columns first.

    Source: Pillow 13 `src/libImaging/Resample.c`, `ImagingResampleInner`: height shrinks by more
    than twice the pixels that width does. Before, rows came first up to MAX_ASPECT_RATIO.
    """
    shrinks = height - view.height
    return _PILLOW >= 13 and shrinks > 0 and shrinks > 2 * (width - view.width)


@lru_cache(maxsize=_CACHED_TABLES)
def resampling(length: int, target: int, offset: int, side: int) -> Resampling:
    """Return how `side` pixels from `offset` on are made when `length` becomes `target` pixels.

    Every operation is Pillow's, in its order and in float64, so that every weight is equal.

    Source: Pillow `src/libImaging/Resample.c`, `precompute_coeffs` and `normalize_coeffs_8bpc`.
    Differs: only the positions that the crop keeps, counted from the first pixel they need.
    """
    scale = length / target
    stretch = max(scale, 1.0)
    reach = _SUPPORT * stretch
    centers = (np.arange(offset, offset + side) + 0.5) * scale
    first = np.maximum((centers - reach + 0.5).astype(np.int64), 0)
    count = np.minimum((centers + reach + 0.5).astype(np.int64), length) - first
    taps = np.arange(count.max())[:, None]
    weights = _bicubic(((taps + first) - centers + 0.5) * (1.0 / stretch))
    weights[taps >= count] = 0.0
    # A running sum adds one after the other as Pillow does; `sum` would add in pairs.
    weights /= np.cumsum(weights, axis=0)[-1]
    scaled = weights * (1 << PRECISION_BITS)
    fixed = np.trunc(np.where(weights < 0, -0.5, 0.5) + scaled)
    start = int(first.min())
    table = np.concatenate([[first - start], [count], fixed]).astype(np.int32)
    table.flags.writeable = False
    return Resampling(start, int((first + count).max()) - start, table)


def _bicubic(distance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the weight at a distance in output pixels, in Pillow's order of operations."""
    x = np.abs(distance)
    near = ((_A + 2.0) * x - (_A + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * _A
    result: NDArray[np.float64] = np.where(x < 1.0, near, np.where(x < _SUPPORT, far, 0.0))
    return result


def _check(photo: object, index: int, max_pixels: int) -> None:
    """Refuse what is no photo, and the sizes that `read_image` refuses."""
    remedy = "use numpy.asarray(read_image(path))"
    if not isinstance(photo, np.ndarray):
        found = type(photo).__name__
    elif photo.dtype != np.uint8 or photo.ndim != 3 or photo.shape[2] != _CHANNELS:
        found = f"{photo.dtype} {photo.shape}"
    else:
        short, long = sorted(photo.shape[:2])
        if short >= MIN_SIDE and long <= MAX_ASPECT_RATIO * short and short * long <= max_pixels:
            return
        found = f"{photo.shape[1]}x{photo.shape[0]} pixels"
        remedy = "shrink, crop or skip it"
    raise DataError(
        f"photo {index}: expected a NumPy array uint8 (H, W, {_CHANNELS}) of at most {max_pixels} "
        f"pixels, sides from {MIN_SIDE} and at most 1:{MAX_ASPECT_RATIO}, found {found}; {remedy}"
    )
