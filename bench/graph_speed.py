"""Exported graphs on this CPU against the plain algorithm in PyTorch, in one run.

Inside the timed region: uint8 images (B, S, S, 3) as a NumPy array in, all results as NumPy arrays
out; normalisation, encoder, cut, pooling, logits. Outside: decoding and resizing. The contestants
take turns, so that whatever else the machine does hits all of them; ratios of medians are the
result. One thread each by default: idle threads of one contestant's pool would disturb the next.
Weights are random; that the graphs equal PyTorch is checked before they are timed. The last line
of stdout is one JSON document.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray

from microclip_deploy.artifact import write_json
from microclip_deploy.bench.card import environment
from microclip_deploy.bench.geometry import Geometry, random_geometry
from microclip_deploy.bench.plain import PlainMicroCLIP
from microclip_deploy.export.probes import made_up_photos
from microclip_deploy.export.to_onnx import write_graphs
from microclip_deploy.exported import BACKBONE, FULL
from microclip_deploy.serving.onnx_graph import OnnxGraph

PLAIN, PRODUCT = "plain PyTorch", "our PyTorch"
FLOAT, ENCODER, INT8 = "full.onnx fp32", "backbone.onnx fp32", "full.onnx int8"

Contestant = Callable[[NDArray[np.uint8]], Any]


def make_contestants(geometry: Geometry, folder: Path, threads: int) -> dict[str, Contestant]:
    """Return what is timed, by name."""
    model, preprocess = geometry.model(), geometry.preprocess
    plain = PlainMicroCLIP(geometry.visual, geometry.heads).eval()
    for precision in ("fp32", "int8"):
        (folder / precision).mkdir()
        write_graphs(model, preprocess, precision, folder / precision, {})

    @torch.inference_mode()
    def run_plain(images: NDArray[np.uint8]) -> Any:
        return plain(preprocess.normalize(torch.from_numpy(images))).logits.numpy()

    @torch.inference_mode()
    def run_product(images: NDArray[np.uint8]) -> Any:
        return model(preprocess.normalize(torch.from_numpy(images))).logits.numpy()

    def graph(path: Path, *outputs: str) -> Contestant:
        loaded = OnnxGraph(path, "cpu", threads=threads)
        return lambda images: loaded.run(outputs, {"image": images})[0]

    everything = ("logits", "cls", "fg", "mask", "attention")
    return {
        PLAIN: run_plain,
        PRODUCT: run_product,
        FLOAT: graph(folder / "fp32" / FULL, *everything),
        ENCODER: graph(folder / "fp32" / BACKBONE, "cls", "patches"),
        INT8: graph(folder / "int8" / FULL, *everything),
    }


def check(contestants: dict[str, Contestant], images: NDArray[np.uint8]) -> dict[str, float]:
    """Return the largest difference of logits from our PyTorch, and stop if it is large."""
    expected = contestants[PRODUCT](images)
    found = {
        name: float(np.abs(contestants[name](images) - expected).max())
        for name in (PLAIN, FLOAT, INT8)
    }
    limits = {PLAIN: 5e-5, FLOAT: 5e-5, INT8: 1.0}  # int8 is proven by its classes, elsewhere
    if not all(found[name] <= limit for name, limit in limits.items()):
        raise SystemExit(f"a contestant computes other logits: {found}")
    return found


def measure(
    contestants: dict[str, Contestant], images: NDArray[np.uint8], repeats: int
) -> dict[str, list[float]]:
    """Return seconds a batch, taking turns, after two rounds of warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats + 2):
        for name, run in contestants.items():
            start = time.perf_counter()
            run(images)
            seconds[name].append(time.perf_counter() - start)
    return {name: values[2:] for name, values in seconds.items()}


def main(
    geometry: Annotated[str, typer.Option(help="open_clip model name, or tiny.")] = "ViT-B-32",
    batches: Annotated[str, typer.Option(help="Batch sizes.")] = "1,8",
    repeats: Annotated[int, typer.Option(min=1)] = 15,
    threads: Annotated[int, typer.Option(help="Of every contestant.", min=1)] = 1,
    out: Annotated[Path | None, typer.Option(help="Write the result here (JSON).")] = None,
) -> None:
    """Measure, print a table, then one line of JSON."""
    torch.set_num_threads(threads)
    chosen = random_geometry(geometry)
    images = made_up_photos(chosen.preprocess.size).views(chosen.preprocess)
    with tempfile.TemporaryDirectory() as folder:
        contestants = make_contestants(chosen, Path(folder), threads)
        result: dict[str, Any] = {
            "benchmark": "graph speed",
            "geometry": geometry,
            "threads": threads,
            "logits_difference": check(contestants, images[:8]),
            "batches": {},
            "environment": environment(),
        }
        for batch in map(int, batches.split(",")):
            taken = measure(contestants, images[:batch], repeats)
            median = {name: statistics.median(values) for name, values in taken.items()}
            ratios = {name: round(median[PLAIN] / value, 2) for name, value in median.items()}
            full = round(median[FLOAT] / median[ENCODER], 3)
            result["batches"][batch] = {
                "median_s": median,
                "times_as_fast_as_plain": ratios,
                "full_over_backbone": full,
                "samples_s": taken,
            }
            for name, value in median.items():
                print(f"B={batch} {name:20} {1e3 * value:8.1f} ms  {ratios[name]:5.2f}x")
            print(f"B={batch} the full graph takes {full} of the time of the backbone alone")
    if out is not None:
        write_json(out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
