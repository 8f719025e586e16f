"""How a model's time divides into encoder, cut and head."""

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from microclip_deploy.serving import Session, is_export
from microclip_deploy.serving.exported import BACKBONE, HEAD

_REPEATS = 7


def stage_shares(
    directory: Path, session: Session, image: NDArray[np.uint8], threads: int | None
) -> Mapping[str, float]:
    """Measure the shares of a request of one image; they add up to 1.

    ONNX Runtime does not tell inside full.onnx where its time goes, so the encoder and the head are
    timed as the graphs of their own that an export has, and the cut is the rest.

    Returns:
        Shares of "encoder", "cut" and "head"; none for what is no export on a CPU.
    """
    if session.device != "cpu" or not is_export(directory):
        return {}
    from microclip_deploy.serving.onnx_graph import OnnxGraph

    backbone, head = (OnnxGraph(directory / n, threads=threads) for n in (BACKBONE, HEAD))
    answer = session.predict(image)
    patches = backbone.run(["patches"], {"image": image})[0]
    feeds = {"cls": answer.cls, "patches": patches, "mask": answer.mask}
    feeds["classifier"] = session.classifier()
    whole, encoder, fusion = _seconds(
        lambda: session.predict(image),
        lambda: backbone.run(["cls", "patches"], {"image": image}),
        lambda: head.run(["logits"], feeds),
    )
    cut = max(whole - encoder - fusion, 0.0)
    total = encoder + cut + fusion
    return {"encoder": encoder / total, "cut": cut / total, "head": fusion / total}


def _seconds(*runs: Callable[[], object]) -> list[float]:
    """Return the least time of each, taken in turns: what disturbs one disturbs the others, too."""
    least = [math.inf] * len(runs)
    for _ in range(_REPEATS):
        for number, run in enumerate(runs):
            begun = time.perf_counter()
            run()
            least[number] = min(least[number], time.perf_counter() - begun)
    return least
