"""What TensorRT for RTX builds of exported graphs: plan size, build time, memory, fused attention.

Weights are random: a plan's size and build do not depend on them. Each graph is built in a process
of its own, for its peak of memory. Needs no GPU; nothing of answers or speed is measured. The last
line of stdout is one JSON document.
"""

import json
import multiprocessing
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from microclip_deploy.artifact import write_json
from microclip_deploy.bench.card import environment
from microclip_deploy.bench.memory import peak_rss_bytes
from microclip_deploy.console import notes
from microclip_deploy.export.engine_check import check_graph
from microclip_deploy.serving.engines import PLAN_OF, BuildOptions, Span
from microclip_deploy.serving.exported import Precision

CLASSES = Span(least=2, opt=100, most=4096)


def rows(name: str, precisions: list[str]) -> Iterator[dict[str, Any]]:
    """Write and build the graphs of a geometry in each precision."""
    # PyTorch, which processes that build must not hold.
    from microclip_deploy.bench.geometry import random_geometry
    from microclip_deploy.export.to_onnx import write_graphs

    for precision in cast(list[Precision], precisions):
        with tempfile.TemporaryDirectory() as folder:
            geometry = random_geometry(name)
            write_graphs(geometry.model(), geometry.preprocess, precision, Path(folder), {})
            del geometry
            for graph in PLAN_OF:
                path = Path(folder) / graph
                onnx_bytes = sum(file.stat().st_size for file in Path(folder).glob(f"{graph}*"))
                built = _alone(path)
                yield {
                    "geometry": name, "precision": precision, "onnx_bytes": onnx_bytes, **built
                }  # fmt: skip


def _alone(graph: Path) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as process:
        return process.submit(_build, graph).result()


def _build(graph: Path) -> dict[str, Any]:
    checked = check_graph(graph, BuildOptions(), CLASSES, notes)
    return {**checked.model_dump(mode="json"), "peak_rss_bytes": peak_rss_bytes()}


def main(
    geometries: Annotated[str, typer.Option(help="open_clip names, or tiny.")] = "ViT-B-32",
    precisions: str = "fp32,fp16,bf16",
    out: Annotated[Path | None, typer.Option(help="Write the result here (JSON).")] = None,
) -> None:
    """Build everything, print a line each, then one line of JSON."""
    built = []
    for name in geometries.split(","):
        for row in rows(name, precisions.split(",")):
            built.append(row)
            print(
                f"{name:14} {row['precision']} {row['graph']:13} "
                f"plan {row['plan_bytes'] / 1e6:.0f} MB in {row['build_s']:.0f} s, "
                f"peak {row['peak_rss_bytes'] / 1e9:.2f} GB, "
                f"fused attention {row['fused_attention']} of {row['profiles']} profiles",
                flush=True,
            )
    result = {"benchmark": "engine build", "rows": built, "environment": environment()}
    if out is not None:
        write_json(out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
