"""Joint reading of a folder: time and peak memory by stage, on made-up features.

Features are unit vectors around one centre a class, with the labels of a long-tailed folder. Time
and memory depend on the numbers of photos and classes and on the width alone, accuracy is not
measured. The last line of stdout is one JSON document.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import typer
from numpy.typing import NDArray

from microclip_deploy.artifact import write_json
from microclip_deploy.bench.card import environment
from microclip_deploy.bench.memory import forget_peak, peak_rss_bytes
from microclip_deploy.head import LOGIT_SCALE
from microclip_deploy.joint import Folder
from microclip_deploy.joint.folder import NEIGHBOURS, ROUNDS, STEPS
from microclip_deploy.joint.mixture import Mixture
from microclip_deploy.joint.neighbours import Messages, graph_of

_T = TypeVar("_T")
_BATCH = 1000
_NOISE = 1.5  # norm of what sets a feature apart from its class


def features_of(
    images: int, texts: NDArray[np.float32], rng: np.random.Generator
) -> NDArray[np.float32]:
    """Return unit rows, float32 (images, E), around the rows of (C, E)."""
    classes, size = texts.shape
    share = np.exp(-4 * np.arange(classes) / classes)  # imbalance 50
    labels = rng.choice(classes, images, p=share / share.sum())
    rows = rng.standard_normal((images, size), np.float32)
    rows *= np.float32(_NOISE / size**0.5)
    rows += texts[labels]
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def measured(images: int, classes: int, size: int) -> dict[str, dict[str, float]]:
    """Return seconds and peak of resident memory (MiB) of every stage, and of all in one."""
    rng = np.random.default_rng(0)
    texts = rng.standard_normal((classes, size), np.float32)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    features = features_of(images, texts, rng)
    stages: dict[str, dict[str, float]] = {}

    def stage(name: str, work: Callable[[], _T]) -> _T:
        forget_peak()
        start = time.perf_counter()
        result = work()
        seconds = round(time.perf_counter() - start, 2)
        stages[name] = {"s": seconds, "peak_mib": round(peak_rss_bytes() / 2**20)}
        print(f"{name:32} {seconds:8.2f} s  peak {stages[name]['peak_mib']:.0f} MiB", flush=True)
        return result

    folder = Folder(texts)

    def add() -> None:
        for begin in range(0, images, _BATCH):
            rows = features[begin : begin + _BATCH].copy()
            logits = rows @ texts.T
            logits *= LOGIT_SCALE
            folder.add(rows, logits)

    stage("classify and shortlist", add)
    read = stage("joint reading, all of it", folder.read)
    graph = stage(f"{NEIGHBOURS} neighbours of each photo", lambda: graph_of(features, NEIGHBOURS))
    messages = stage("classes they share", lambda: Messages(graph, read.classes, classes))
    mixture = stage("start of the mixture", lambda: Mixture(features, texts, read))
    stage(f"update of the mixture, x {ROUNDS}", lambda: mixture.update(read))
    stage(f"likelihood, x {ROUNDS + 1}", lambda: mixture.log_likelihood(read.classes))
    told = (ROUNDS + 1) * STEPS
    stage(f"messages of neighbours, x {told}", lambda: messages.told(read.values))
    return stages


def main(
    images: Annotated[int, typer.Option(help="Photos.", min=2)] = 100_000,
    classes: Annotated[int, typer.Option(help="Classes.", min=1)] = 1000,
    size: Annotated[int, typer.Option(help="E: numbers of a feature.", min=1)] = 512,
    out: Annotated[Path | None, typer.Option(help="Write the result here (JSON).")] = None,
) -> None:
    """Measure, print a line for each stage, then one line of JSON."""
    work: dict[str, Any] = {"images": images, "classes": classes, "size": size}
    machine = environment()  # first: it tells what else is at work
    result = {
        "benchmark": "joint",
        **work,
        "stages": measured(images, classes, size),
        "environment": machine,
    }
    if out is not None:
        write_json(out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
