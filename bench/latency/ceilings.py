"""What this machine can do at most, measured in the run that is compared with it.

Rates are medians, as the times of the stages are: on a machine that is shared, the best of a
ceiling and the middle of a stage would not belong together. A stage whose data stays in a cache can
move it faster than the copy does, which comes from memory.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from microclip_deploy import artifact
from microclip_deploy.bench.latency.report import COPY, PRODUCT
from microclip_deploy.environment import usable_cpus
from microclip_deploy.errors import UsageError, require
from microclip_deploy.serving.exported import Precision

COPY_BYTES = 256 << 20
"""Larger than the last cache of all but a few servers."""
SIDE = 1536
"""Of the multiplied matrices: products of well over a millisecond on any CPU."""
OPSET, IR_VERSION = 20, 9
"""Of the product's graph: those of the exports, so that every runtime that reads them reads it."""

BUDGET_S = 0.8
"""Seconds a ceiling, as far as `FEWEST` samples allow."""
FEWEST, MOST = 3, 25

_DTYPES: Mapping[Precision, str] = {
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
    "int8": "float32",  # integer products are not counted, so what is left are these
}


def cpu_ceilings(threads: int | None) -> dict[str, float]:
    """Measure the CPU: about two seconds.

    Args:
        threads: as the model gets; None for one a core.

    Returns:
        `COPY`: bytes a second of a copy from memory to memory by as many threads, read plus
        written; `PRODUCT`: float32 operations a second of a large matrix product in ONNX Runtime,
        loaded as the models are, 2 a multiply-add.

    Raises:
        EnvironmentProblem: onnx or onnxruntime is not installed.
        UsageError: fewer than one thread.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"threads: expected at least 1, found {threads}; give more")
    require("onnx", "export")
    require("onnxruntime", "cpu")
    return {COPY: _copy_rate(threads or usable_cpus()), PRODUCT: _product_rate(threads)}


def device_ceilings(precision: Precision, device: str) -> dict[str, float]:
    """Measure a CUDA device.

    Args:
        precision: of the encoder's matrices, and so of the multiplied ones. Kernels in float32
            beside a half-precision encoder are held to the higher rate; their floors stay floors.
        device: "cuda" or "cuda:N".

    Returns:
        As `cpu_ceilings`, of the device's memory and arithmetic.

    Raises:
        EnvironmentProblem: cupy or torch is not installed.
    """
    require("cupy", "gpu")
    require("torch", "adapt")
    import cupy
    import torch

    from microclip_deploy.bench.kernel import clock

    number = int(device.partition(":")[2] or 0)
    with cupy.cuda.Device(number), torch.cuda.device(number):
        found = clock.ceilings(_DTYPES[precision], clock.new_stream())
    return {name: float(found[name]) for name in (COPY, PRODUCT)}


def _copy_rate(threads: int) -> float:
    """Return bytes a second, read plus written, of threads that copy a part each."""
    source = np.full(COPY_BYTES, 7, np.uint8)
    target = np.zeros_like(source)  # written before: the first touch of a page is no copy
    parts = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))
    with ThreadPoolExecutor(threads) as pool:

        def copy() -> None:
            list(pool.map(lambda part: np.copyto(*part), parts))  # copyto lets go of the GIL

        return 2 * COPY_BYTES / _median_s(copy)


def _product_rate(threads: int | None) -> float:
    """Return float32 operations a second of `SIDE`-wide matrices in ONNX Runtime."""
    from microclip_deploy.serving.onnx_graph import OnnxGraph

    left = np.random.default_rng(0).standard_normal((SIDE, SIDE), np.float32)
    with TemporaryDirectory(prefix="microclip-bench-") as folder:
        path = Path(folder) / "product.onnx"
        artifact.write_bytes(path, _product_model())
        graph = OnnxGraph(path, "cpu", threads=threads)
    return 2 * SIDE**3 / _median_s(lambda: graph.run(("product",), {"left": left}))


def _product_model() -> bytes:
    """Return a graph of one product with a constant, as the weights of a model are."""
    from onnx import TensorProto, helper, numpy_helper

    shape = (SIDE, SIDE)
    weight = np.random.default_rng(1).standard_normal(shape, np.float32)
    left, product = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name in ("left", "product")
    )
    node = helper.make_node("MatMul", ["left", "right"], ["product"])
    constant = numpy_helper.from_array(weight, "right")
    graph = helper.make_graph([node], "product", [left], [product], [constant])
    opset = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION)
    content: bytes = model.SerializeToString()
    return content


def _median_s(call: Callable[[], object]) -> float:
    """Return the median seconds of a call, after one that warms up."""
    call()
    samples: list[float] = []
    while len(samples) < FEWEST or (sum(samples) < BUDGET_S and len(samples) < MOST):
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)
