"""Random batches through the kernels for a given time: equal twice, equal in any order, and right.

Each round takes another number of tokens, type and affinity, and a few batches of each:

* a second run into poisoned buffers gives the same bytes;
* the images in another order give the same bytes in that order;
* masks of some images are those of exact float64 on the CPU, on every graph that rounding in
  float32 cannot change. The others are counted.

The last line of stdout is one JSON document; exit status 1 after any failure.
"""

import json
import sys
import time
from collections import Counter
from itertools import cycle, product
from pathlib import Path
from typing import Annotated, Any

import cupy
import numpy as np
import typer
from numpy.typing import NDArray

from microclip_deploy.artifact import write_json
from microclip_deploy.bench.card import environment
from microclip_deploy.bench.kernel.exact_masks import exact_masks
from microclip_deploy.bench.kernel.inputs import SPECS, Batch, device_tokens, random_fusion
from microclip_deploy.bench.kernel.run import width_of
from microclip_deploy.bench.kernel.tokens import DTYPES, exact_values, stored, vit_tokens
from microclip_deploy.cuda.ncut import NCutKernels
from microclip_deploy.cuda.soap import CudaFusion
from microclip_deploy.ncut.spec import NCutSpec

TOKENS = (49, 100, 196, 256, 576)
BATCHES = (1, 2, 7, 33, 64)
BATCHES_A_ROUND = 6
EXACT_IMAGES = 4
"""Images of a batch that are solved in float64 too."""
UNDEFINED = ("rows",)
"""Fields of which only a part is written; what they list is in the mask."""

Bytes = dict[str, NDArray[np.uint8]]


def run_once(batch: Batch) -> Bytes:
    """Run everything into poisoned outputs; return the bytes of each, (B, bytes an image)."""
    batch.poison()
    batch.run()
    cupy.cuda.get_current_stream().synchronize()
    # Both have `salient` and `rows`; the fusion's are None, as it takes the cut's.
    outputs = {**batch.fused._asdict(), **batch.cut._asdict()}
    return {
        name: cupy.asnumpy(array).reshape(len(array), -1).view(np.uint8)
        for name, array in outputs.items()
        if name not in UNDEFINED
    }


def departures(expected: Bytes, second: Bytes, label: str) -> Counter[str]:
    """Count the outputs that have other bytes, by name."""
    other = (name for name in expected if not np.array_equal(expected[name], second[name]))
    return Counter(f"{label}: {name}" for name in other)


def check_batch(
    kernels: NCutKernels, fusion: CudaFusion, host: NDArray[Any], spec: NCutSpec, seed: int
) -> tuple[Counter[str], Counter[str]]:
    """Return failures and counts of one batch of tokens (B, N, D)."""
    order = np.random.default_rng(seed).permutation(len(host))
    batch = Batch.of(kernels, fusion, device_tokens(host), seed=seed)
    first = run_once(batch)
    failures = departures(first, run_once(batch), "second run")
    shuffled = batch._replace(
        patches=device_tokens(host[order]), cls=batch.cls[cupy.asarray(order)]
    )
    # The products behind the pooling may be summed differently in another row; the cut may not.
    expected = {name: first[name][order] for name in first if name in batch.cut._fields}
    failures += departures(expected, run_once(shuffled), "other order")
    if first["mask"].max() > 1:
        failures["mask: bytes other than 0 and 1"] += 1
    exact = exact_masks(exact_values(host[:EXACT_IMAGES]), spec)
    wrong = exact.wrong(first["mask"][:EXACT_IMAGES].astype(bool))
    failures += Counter({"mask: not the exact one": wrong})
    counts = {"images": len(host), "compared": len(exact.mask), "binding": exact.binding.sum()}
    return +failures, Counter({name: int(number) for name, number in counts.items()})


def tokens_of(batch: int, count: int, width: int, seed: int) -> NDArray[np.float32]:
    """Return ViT-like tokens, and every third time tokens without any structure."""
    if seed % 3:
        return vit_tokens(batch, count, width, seed=seed)
    rng = np.random.default_rng(seed)
    return rng.standard_normal((batch, count, width), np.float32)


def stress(seconds: float, seed: int) -> dict[str, Any]:
    """Go round until the time is over; return failures and counts as plain values."""
    failures: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    kernels: dict[tuple[int, str, str], NCutKernels] = {}
    fusions = {width: random_fusion(width) for width in {width_of(count) for count in TOKENS}}
    end = time.monotonic() + seconds
    for spec, dtype, count, _ in cycle(product(SPECS, DTYPES, TOKENS, range(BATCHES_A_ROUND))):
        if time.monotonic() > end:
            break
        width, key = width_of(count), (count, dtype, spec.affinity)
        if key not in kernels:
            kernels[key] = NCutKernels.of(count=count, width=width, token=dtype, spec=spec)
        images = BATCHES[counts["batches"] % len(BATCHES)]
        number = seed + counts["batches"]
        host = stored(tokens_of(images, count, width, number), dtype)
        failed, seen = check_batch(kernels[key], fusions[width], host, spec, number)
        for what in failed:
            print(f"FAILED {key} B={images} seed={number}: {what}", flush=True)
        failures += failed
        counts += seen + Counter({"batches": 1})
    kinds = [" ".join(map(str, kind)) for kind in kernels]
    return {"seed": seed, "kinds": kinds, "failures": dict(failures), **counts}


def main(
    seconds: Annotated[float, typer.Option(min=1, envvar="STRESS_S")] = 60,
    seed: Annotated[int, typer.Option(help="Of the first batch; the next ones count on.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the result here (JSON).")] = None,
) -> None:
    """Stress the kernels, print what failed, then one line of JSON."""
    result = {"benchmark": "stress", "seconds": seconds, **stress(seconds, seed)}
    result["environment"] = environment()
    if out is not None:
        write_json(out, result)
    print(json.dumps(result))
    sys.exit(1 if result["failures"] else 0)


if __name__ == "__main__":
    typer.run(main)
