"""The device's test view equals Pillow's byte for byte.

The kernels are plain C++ but for their qualifiers and thread indices, so they also run here without
a device: compiled by g++ behind the shim below, from the product's source, plan and launch grids.
"""

import ctypes
import io
import shutil
import subprocess
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from microclip_deploy.cuda.preprocess import (
    MAX_BATCH,
    PRECISION_BITS,
    THREADS,
    CudaTestView,
    cuda_source,
    plan_views,
    resampling,
)
from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.errors import DataError

Photo = NDArray[np.uint8]
Runner = Callable[[Preprocess, Sequence[Photo]], Photo]

# The device's words, and a launch as a loop over blocks and threads.
SHIM = """
#define __global__
#define __device__
static struct { unsigned int x, y; } blockIdx, blockDim, threadIdx;
"""
LAUNCH = """
#define LAUNCH(call) \\
    for (blockIdx.y = 0; blockIdx.y < grid_y; ++blockIdx.y) \\
        for (blockIdx.x = 0; blockIdx.x < grid_x; ++blockIdx.x) \\
            for (threadIdx.x = 0; threadIdx.x < blockDim.x; ++threadIdx.x) call

extern "C" void first(unsigned grid_x, unsigned grid_y, unsigned threads,
                      const long long *photos, const int *tables, unsigned char *lines) {
    blockDim.x = threads;
    LAUNCH(first_pass(photos, tables, lines));
}
extern "C" void second(unsigned grid_x, unsigned grid_y, unsigned threads, const long long *photos,
                       const int *tables, const unsigned char *lines, unsigned char *views) {
    blockDim.x = threads;
    LAUNCH(second_pass(photos, tables, lines, views));
}
"""

# Width, height: up and down, odd, equal, one side equal, one more or less than the target,
# panoramas, squares, and tall photos on both sides of the bounds where Pillow 13 swaps its passes.
SIZES = [
    (32, 32),
    (32, 57),
    (57, 32),
    (31, 33),
    (33, 31),
    (33, 33),
    (17, 23),
    (2, 2),
    (2, 9),
    (9, 2),
    (2, 200),
    (200, 2),
    (64, 64),
    (96, 64),
    (65, 64),
    (333, 500),
    (500, 375),
    (1201, 799),
    (37, 1900),
    (3000, 40),
    (2048, 2049),
    (63, 62),
    (108, 240),
    (200, 400),
    (200, 401),
    (200, 399),
]


def preprocess(side: int) -> Preprocess:
    return Preprocess(size=side, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def noise(width: int, height: int) -> Photo:
    rng = np.random.default_rng([width, height])
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def extremes(width: int, height: int) -> Photo:
    """Black and white pixels: the sums that must be clipped on either side."""
    return np.where(noise(width, height) < 128, 0, 255).astype(np.uint8)


def scene(width: int, height: int) -> Photo:
    """A photo as a camera's JPEG has it: shading, edges, sensor noise, block artefacts."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    rng = np.random.default_rng([height, width])
    shade = np.stack([x, y, 1 - x * y], axis=-1) * 160
    shade[(x - 0.4) ** 2 + (y - 0.4) ** 2 < 0.04] += 90
    pixels = np.clip(shade + rng.normal(0, 6, shade.shape), 0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=85)
    return np.asarray(Image.open(stream).convert("RGB"))


def pillow(definition: Preprocess, photos: Sequence[Photo]) -> Photo:
    return np.stack([definition.test_view(Image.fromarray(photo)) for photo in photos])


def on_cpu(directory: Path, definition: Preprocess, photos: Sequence[Photo]) -> Photo:
    """Do what CudaTestView does, with NumPy's memory and g++'s code."""
    side = definition.size
    library = directory / f"views{side}.so"
    if not library.exists():
        source = cuda_source(side)
        text = library.with_suffix(".cpp")
        text.write_text(SHIM + source.text() + LAUNCH)
        defines = [f"-D{name}={value}" for name, value in source.defines]
        flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
        command = ["g++", *flags, *defines, str(text), "-o", str(library)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    kernels = ctypes.CDLL(str(library))
    plan = plan_views(definition, photos)
    assert all(region.flags.c_contiguous for region in plan.regions)
    numbers = plan.with_addresses([region.ctypes.data for region in plan.regions])
    lines = np.full(plan.lines_bytes, 99, np.uint8)
    views = np.full((len(photos), side, side, 3), 99, np.uint8)

    def pointers(*arrays: NDArray[Any]) -> list[ctypes.c_void_p]:
        return [ctypes.c_void_p(array.ctypes.data) for array in arrays]

    kernels.first(*plan.first_grid, THREADS, *pointers(numbers, plan.tables, lines))
    kernels.second(*plan.second_grid, THREADS, *pointers(numbers, plan.tables, lines, views))
    return views


@pytest.fixture(scope="module")
def run_on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed; it compiles the kernels for the CPU")
    directory = tmp_path_factory.mktemp("kernels")
    return lambda definition, photos: on_cpu(directory, definition, photos)


@pytest.mark.parametrize("make", [noise, extremes, scene])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_views_equal_pillow(
    run_on_cpu: Runner, make: Callable[[int, int], Photo], width: int, height: int
) -> None:
    photos = [make(width, height)]
    found = run_on_cpu(preprocess(32), photos)
    np.testing.assert_array_equal(found, pillow(preprocess(32), photos))


@pytest.mark.parametrize("side", [2, 3, 31, 224, 336])
def test_a_batch_of_many_sizes_equals_pillow(run_on_cpu: Runner, side: int) -> None:
    sizes = [(224, 224), (500, 375), (375, 500), (500, 375), (640, 91), (30, 20), (1023, 1024)]
    photos = [scene(*sizes[0]), *(noise(*size) for size in sizes), extremes(336, 350)]
    found = run_on_cpu(preprocess(side), photos)
    np.testing.assert_array_equal(found, pillow(preprocess(side), photos))


def test_random_sizes_equal_pillow(run_on_cpu: Runner) -> None:
    rng = np.random.default_rng(0)
    photos = [noise(*np.exp(rng.uniform(1.5, 6, 2)).astype(int)) for _ in range(150)]
    found = run_on_cpu(preprocess(24), photos)
    np.testing.assert_array_equal(found, pillow(preprocess(24), photos))


def test_a_large_photo_equals_pillow(run_on_cpu: Runner) -> None:
    photos = [noise(4001, 3000)]
    found = run_on_cpu(preprocess(224), photos)
    np.testing.assert_array_equal(found, pillow(preprocess(224), photos))


def test_views_of_larger_arrays_are_taken_as_they_look(run_on_cpu: Runner) -> None:
    whole = noise(120, 90)
    photos = [whole[::-1, 7:110:2], whole.transpose(1, 0, 2), np.asfortranarray(whole)]
    found = run_on_cpu(preprocess(32), photos)
    expected = pillow(preprocess(32), [np.ascontiguousarray(photo) for photo in photos])
    np.testing.assert_array_equal(found, expected)


def test_the_sides_of_a_panorama_are_not_uploaded() -> None:
    plan = plan_views(preprocess(32), [noise(3000, 40), noise(40, 3000)])
    assert [max(region.shape) for region in plan.regions] == [44, 44]


def test_photos_of_one_size_share_their_tables() -> None:
    one = plan_views(preprocess(32), [noise(50, 40)])
    many = plan_views(preprocess(32), [noise(50, 40)] * 3)
    np.testing.assert_array_equal(one.tables, many.tables)


def test_an_unchanged_side_has_one_whole_weight_at_each_position() -> None:
    made = resampling(32, 32, 0, 32)
    assert (made.start, made.length) == (0, 32)
    weights = made.table[2:]
    assert (np.count_nonzero(weights, axis=0) == 1).all()
    assert (weights.max(axis=0) == 1 << PRECISION_BITS).all()


@pytest.mark.parametrize(
    ("photos", "message"),
    [
        ([], f"expected 1 to {MAX_BATCH}, found 0; split"),
        ([noise(4, 4), noise(4, 4).astype(np.float32)], r"photo 1: .*found float32 \(4, 4, 3\)"),
        ([noise(4, 4)[:, :, 0]], r"found uint8 \(4, 4\); use numpy.asarray\(read_image"),
        ([np.zeros((4, 4, 4), np.uint8)], r"found uint8 \(4, 4, 4\)"),
        ([np.zeros((0, 4, 3), np.uint8)], "sides from 2 .*found 4x0 pixels"),
        ([np.zeros((202, 2, 3), np.uint8)], "at most 1:100, found 2x202 pixels; shrink, crop"),
        ([Image.new("L", (4, 4))], "found Image; use"),
        ([noise(11, 10)], "at most 100 pixels, .*found 11x10 pixels; shrink"),
    ],
)
def test_what_is_no_photo_is_refused(photos: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        plan_views(preprocess(32), photos, max_pixels=100)


@pytest.mark.parametrize("architecture", ["sm_75", "sm_90", "sm_120"])
def test_the_kernels_compile_for(architecture: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CuPy warns where it finds no CUDA toolkit
        compiler = pytest.importorskip(
            "cupy.cuda.compiler", reason="CuPy is not installed; it brings NVRTC's interface"
        )
    source = cuda_source(224)
    log = io.StringIO()
    program = compiler._NVRTCProgram(source.text(), "preprocess.cu", method="cubin")
    binary, _ = program.compile((*source.options(), f"-arch={architecture}"), log)
    assert binary.startswith(b"\x7fELF")
    assert log.getvalue().strip("\0\n ") == ""


def devices() -> int:
    """Return the number of CUDA devices that CuPy can use; 0 without CuPy or a driver."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import cupy
        except ImportError:
            return 0
    try:
        return int(cupy.cuda.runtime.getDeviceCount())
    except cupy.cuda.runtime.CUDARuntimeError:
        return 0


@pytest.fixture
def cupy() -> Any:
    if not devices():
        pytest.skip("no CUDA device or no CuPy; run `pytest -m gpu` where there are both")
    return pytest.importorskip("cupy")


@pytest.mark.gpu
@pytest.mark.parametrize("side", [32, 224])
def test_views_on_the_device_equal_pillow(cupy: Any, side: int) -> None:
    photos = [make(*size) for size in SIZES for make in (noise, extremes, scene)]
    found = CudaTestView(preprocess(side))(photos)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(cupy.asnumpy(found), pillow(preprocess(side), photos))


@pytest.mark.gpu
def test_views_on_another_stream_go_into_the_given_array(cupy: Any) -> None:
    make_views = CudaTestView(preprocess(224))
    batches = [[noise(700 + i, 500), scene(320, 480 + i)] for i in range(8)]
    with cupy.cuda.Stream(non_blocking=True) as stream:
        outs = [cupy.full((2, 224, 224, 3), 99, np.uint8) for _ in batches]
        for photos, out in zip(batches, outs, strict=True):
            assert make_views([photo.copy() for photo in photos], out=out) is out
        stream.synchronize()
    for photos, out in zip(batches, outs, strict=True):
        np.testing.assert_array_equal(cupy.asnumpy(out), pillow(preprocess(224), photos))


@pytest.mark.gpu
def test_an_unsuitable_array_is_refused(cupy: Any) -> None:
    with pytest.raises(DataError, match=r"out: expected C-contiguous uint8 \(1, 32, 32, 3\)"):
        CudaTestView(preprocess(32))([noise(40, 40)], out=cupy.empty((1, 3, 32, 32), np.uint8))
