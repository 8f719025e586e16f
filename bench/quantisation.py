"""int8 with scales found at run time against scales held in the file: accuracy and speed.

A run's images are shared out: one part calibrates, the other is answered by every graph, which take
turns. PyTorch is left out; the proofs hold graphs against it. The last line of stdout is one JSON
document.
"""

import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from microclip_deploy.artifact import write_json
from microclip_deploy.bench.card import environment
from microclip_deploy.data.decode import read_photo
from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.data.sources import list_images
from microclip_deploy.export.to_onnx import write_graphs
from microclip_deploy.model.checkpoint import load_model, read_checkpoint
from microclip_deploy.serving.exported import FULL, Precision
from microclip_deploy.serving.onnx_graph import OnnxGraph

PRECISIONS: Sequence[Precision] = ("fp32", "int8", "int8-static")
BATCHES = (1, 8)
CALIBRATED_ON = 64
"""Images at most, as in `export`."""
_OUTPUTS = ("cls", "logits", "mask")

Answers = Mapping[str, NDArray[Any]]


def rows(run: Path, images: Path, count: int, repeats: int) -> Iterator[dict[str, Any]]:
    """Write a run's graphs, ask them all, and yield a line for each precision."""
    checkpoint = read_checkpoint(run)
    model, preprocess = load_model(checkpoint), checkpoint.manifest.preprocess
    views = _views(images, preprocess, count)
    held, asked = views[:CALIBRATED_ON], views[CALIBRATED_ON:]
    with tempfile.TemporaryDirectory() as folder:
        graphs = {}
        for precision in PRECISIONS:
            directory = Path(folder) / precision
            directory.mkdir()
            write_graphs(model, preprocess, precision, directory, {}, held)
            graphs[precision] = OnnxGraph(directory / FULL)
        seconds = _seconds(graphs, asked, repeats)
        exact = _answers(graphs["fp32"], asked)
        for precision, graph in graphs.items():
            yield {
                "run": run.resolve().name,
                "precision": precision,
                "full_mb": round((Path(folder) / precision / FULL).stat().st_size / 1e6, 1),
                **_apart(_answers(graph, asked), exact),
                "batch_mates": _moved_by_mates(graph, asked),
                "median_ms": {str(b): round(1e3 * s, 1) for b, s in seconds[precision].items()},
            }


def _views(images: Path, preprocess: Preprocess, count: int) -> NDArray[np.uint8]:
    """Return test views of the calibration's and `count` further images, in random order."""
    listed = list_images(images).paths
    order = np.random.default_rng(0).permutation(len(listed))[: CALIBRATED_ON + count]
    photos = (read_photo(listed[i], preprocess.photos).image for i in order)
    return np.stack([preprocess.test_view(photo) for photo in photos])


def _answers(graph: OnnxGraph, images: NDArray[np.uint8]) -> Answers:
    """Ask in batches of eight."""
    parts = [
        graph.run(_OUTPUTS, {"image": images[start : start + 8]})
        for start in range(0, len(images), 8)
    ]
    return dict(zip(_OUTPUTS, map(np.concatenate, zip(*parts, strict=True)), strict=True))


def _apart(found: Answers, exact: Answers) -> dict[str, float]:
    """Return how far answers are from those in float32, and how many classes and masks agree."""
    cls, logits = (np.abs(found[name] - exact[name]).max(axis=1) for name in ("cls", "logits"))
    same = found["logits"].argmax(axis=1) == exact["logits"].argmax(axis=1)
    return {
        "images": len(same),
        "same_class": float(same.mean()),
        "same_mask": float((found["mask"] == exact["mask"]).all(axis=1).mean()),
        "cls_largest": float(cls.max()),
        "cls_median": float(np.median(cls)),
        "logits_median": float(np.median(logits)),
    }


def _moved_by_mates(graph: OnnxGraph, images: NDArray[np.uint8]) -> float:
    """Return the largest difference of an image's logits beside others and beside its copies."""
    beside = graph.run(["logits"], {"image": images[:8]})[0]
    copies = [
        graph.run(["logits"], {"image": np.repeat(images[i : i + 1], 8, axis=0)})[0][i]
        for i in range(8)
    ]
    return float(np.abs(beside - np.stack(copies)).max())


def _seconds(
    graphs: Mapping[Precision, OnnxGraph], images: NDArray[np.uint8], repeats: int
) -> dict[Precision, dict[int, float]]:
    """Return the median seconds by precision and batch size; graphs take turns."""
    taken: dict[Precision, dict[int, list[float]]] = {
        precision: {batch: [] for batch in BATCHES} for precision in graphs
    }
    for batch in BATCHES:
        for turn in range(repeats + 1):
            for precision, graph in graphs.items():
                start = time.perf_counter()
                graph.run(["logits"], {"image": images[:batch]})
                if turn:  # the first warms up
                    taken[precision][batch].append(time.perf_counter() - start)
    return {p: {b: float(np.median(s)) for b, s in times.items()} for p, times in taken.items()}


def main(
    runs: Annotated[list[str], typer.Argument(help="RUN=IMAGES: what adapt wrote, and photos.")],
    count: Annotated[int, typer.Option(help="Images that are asked about.", min=8)] = 200,
    repeats: Annotated[int, typer.Option(help="Timed requests of each kind.", min=1)] = 15,
    out: Annotated[Path | None, typer.Option(help="Write the result here (JSON).")] = None,
) -> None:
    """Compare, print a line each, then one line of JSON."""
    compared = []
    for pair in runs:
        run, _, images = pair.partition("=")
        for row in rows(Path(run), Path(images), count, repeats):
            compared.append(row)
            print(
                f"{row['run']:12} {row['precision']:12} same class {row['same_class']:.1%}  "
                f"same mask {row['same_mask']:.0%}  cls {row['cls_median']:.4f}, at most "
                f"{row['cls_largest']:.4f}  mates {row['batch_mates']:.1e}  {row['full_mb']} MB  "
                f"{row['median_ms']} ms",
                flush=True,
            )
    result = {"benchmark": "int8", "rows": compared, "environment": environment()}
    if out is not None:
        write_json(out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
