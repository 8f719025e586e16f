"""One training step on this CPU: the product against the plain algorithm, in one run.

Inside the timed region: labelling (weak view and crops), the strong view forward and backward, and
AdamW, from normalised tensors on. Outside: decoding, augmentation, saving. The two sides take
turns, so that whatever else the machine does hits both; the ratio of medians is the result. Peak
memory is that of one process a side. The last line of stdout is one JSON document.
"""

import copy
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import open_clip
import torch
import typer

from microclip_deploy.artifact import write_json
from microclip_deploy.backbone import VisionBackbone
from microclip_deploy.bench.card import environment
from microclip_deploy.bench.plain import PlainMicroCLIP, plain_step
from microclip_deploy.iteration import AdaptConfig, Views, make_optimizer, train_step
from microclip_deploy.model import MicroCLIP
from microclip_deploy.ncut.spec import NCutSpec
from microclip_deploy.text import TextHeads

CLASSES = 100
SIDES = ("product", "plain")


def make_side(name: str, geometry: str, batch: int, crops: int) -> Callable[[], float]:
    """Return a function that runs one step of a side and returns its loss.

    Both sides start from the same random weights and see the same random views.
    """
    torch.manual_seed(0)
    clip = open_clip.create_model(geometry, pretrained=None)
    clip.requires_grad_(False)
    visual = copy.deepcopy(clip.visual)
    size, embed = visual.image_size[0], visual.proj.shape[1]
    matrix = torch.nn.functional.normalize(torch.randn(CLASSES, embed), dim=-1)
    heads = TextHeads(matrix, matrix, matrix)
    config = AdaptConfig()
    weak, strong = smooth_images(2 * batch, size).chunk(2)
    views = Views(weak, strong, smooth_images(batch * crops, size).unflatten(0, (batch, crops)))
    if name == "product":
        model = MicroCLIP(VisionBackbone(visual), heads, ncut=NCutSpec()).eval()
        optimizer = make_optimizer(model.trainable(), config)
        return lambda: train_step(
            model, optimizer, views, config, average=None, rate=config.lr
        ).losses.total.item()
    plain = PlainMicroCLIP(visual, heads).eval()
    trainable = [p for p in plain.parameters() if p.requires_grad]
    plain_optimizer = torch.optim.AdamW(trainable, lr=config.lr, weight_decay=config.weight_decay)
    return lambda: plain_step(plain, plain_optimizer, views, config).item()


def smooth_images(count: int, size: int) -> torch.Tensor:
    """Return float32 (count, 3, S, S) of soft colour fields.

    White noise would give near-complete graphs, whose masks no two solvers need agree on.
    """
    return torch.nn.functional.interpolate(torch.randn(count, 3, 5, 5), size, mode="bilinear")


def measure(geometry: str, batch: int, crops: int, repeats: int) -> dict[str, list[float]]:
    """Return seconds a step of both sides, taking turns, after one warm-up each."""
    sides = {name: make_side(name, geometry, batch, crops) for name in SIDES}
    first = {name: step() for name, step in sides.items()}
    if abs(first["product"] - first["plain"]) > 1e-3 * abs(first["plain"]):
        raise SystemExit(f"the two sides compute different losses: {first}")
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    for _ in range(repeats):
        for name, step in sides.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def peak_memory_mib(name: str, geometry: str, batch: int, crops: int) -> float:
    """Return the peak resident size of two steps of a side, in a fresh process (Linux)."""
    call = [sys.executable, "-m", __spec__.name, "--only", name, "--geometry", geometry]
    call += ["--batch", str(batch), "--crops", str(crops)]
    done = subprocess.run(call, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def main(
    geometry: Annotated[str, typer.Option(help="open_clip model name.")] = "ViT-B-32",
    batch: int = 16,
    crops: int = 8,
    repeats: int = 5,
    out: Annotated[Path | None, typer.Option(help="Write the result here (JSON).")] = None,
    only: Annotated[
        str | None, typer.Option(help="Run two steps of one side, print peak MiB.")
    ] = None,
) -> None:
    """Measure and print a table, then one line of JSON."""
    if only is not None:
        step = make_side(only, geometry, batch, crops)
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of building the model
        step(), step()
        status = Path("/proc/self/status").read_text()
        print(int(status.partition("VmHWM:")[2].split()[0]) / 1024)
        return
    seconds = measure(geometry, batch, crops, repeats)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    result: dict[str, Any] = {
        "benchmark": "training step",
        "geometry": geometry,
        "batch": batch,
        "crops": crops,
        "threads": torch.get_num_threads(),
        "ratio": round(median["plain"] / median["product"], 2),
        "median_s": median,
        "samples_s": seconds,
        "peak_mib": {name: peak_memory_mib(name, geometry, batch, crops) for name in SIDES},
        "environment": environment(),
    }
    for name in SIDES:
        speed, peak = batch / median[name], result["peak_mib"][name]
        print(f"{name:8} {median[name]:7.2f} s/step {speed:6.2f} images/s {peak:6.0f} MiB")
    print(f"the product is {result['ratio']}x as fast")
    if out is not None:
        write_json(out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
