"""What this machine can do at most, measured in the run that is compared with it.

Rates are medians, as the times of the stages are: on a machine that is shared, the best of a
ceiling and the middle of a stage would not belong together. A stage whose data stays in a cache can
move it faster than the copy does, which comes from memory.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np

from microclip_deploy.bench.latency.report import COPY, PRODUCT
from microclip_deploy.bench.latency.windows import repeated
from microclip_deploy.errors import require
from microclip_deploy.processors import usable_cpus
from microclip_deploy.serving.exported import Precision

COPY_BYTES = 256 << 20
"""Larger than the last cache of all but a few servers."""
SIDE = 1536
"""Of the multiplied matrices: products of well over a millisecond on any CPU."""
_samples = partial(repeated, budget_s=0.8, fewest=3, most=25)

# Versions of the exports, so that every runtime that reads them reads it. One factor is a constant,
# as the weights of a model are.
_PRODUCT_GRAPH = """
<ir_version: 9, opset_import: ["" : 20]>
product (float[{side}, {side}] left) => (float[{side}, {side}] product) {{
    shape = Constant <value_ints = [{side}, {side}]> ()
    right = ConstantOfShape <value = float[1] {{0.5}}> (shape)
    product = MatMul (left, right)
}}
"""

_DTYPES: Mapping[Precision, str] = {
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
    "int8": "float32",  # integer products are not counted, so what is left are these
    "int8-static": "float32",
}


def cpu_ceilings(threads: int | None) -> dict[str, float]:
    """Measure the CPU: about two seconds.

    Args:
        threads: as the model gets, at least 1; None for one a core.

    Returns:
        `COPY`: bytes a second of a copy from memory to memory by as many threads, read plus
        written; `PRODUCT`: float32 operations a second of a large matrix product in ONNX Runtime,
        loaded as the models are, 2 a multiply-add.

    Raises:
        EnvironmentProblem: onnx or onnxruntime is not installed.
    """
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
        rates = clock.ceilings(_DTYPES[precision], clock.new_stream())
    return {name: float(rates[name]) for name in (COPY, PRODUCT)}


def _copy_rate(threads: int) -> float:
    """Return bytes a second, read plus written, of threads that copy a part each."""
    source = np.full(COPY_BYTES, 7, np.uint8)
    target = np.zeros_like(source)  # written before: the first touch of a page is no copy
    parts = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))
    with ThreadPoolExecutor(threads) as pool:

        def copy() -> None:
            list(pool.map(lambda part: np.copyto(*part), parts))  # copyto lets go of the GIL

        return 2 * COPY_BYTES / median(_samples(copy))


def _product_rate(threads: int | None) -> float:
    """Return float32 operations a second of `SIDE`-wide matrices in ONNX Runtime."""
    onnx = require("onnx", "export")
    require("onnxruntime", "cpu")
    from microclip_deploy.serving.onnx_graph import OnnxGraph

    left = np.random.default_rng(0).standard_normal((SIDE, SIDE), np.float32)
    with TemporaryDirectory(prefix="microclip-bench-") as folder:
        path = Path(folder) / "product.onnx"
        onnx.save(onnx.parser.parse_model(_PRODUCT_GRAPH.format(side=SIDE)), path)
        graph = OnnxGraph(path, "cpu", threads=threads)
    return 2 * SIDE**3 / median(_samples(lambda: graph.run(["product"], {"left": left})))
