"""Exported graphs against PyTorch, at the geometries people use, in every precision.

Weights are random: no pretrained model is needed, and none is measured. The three graphs of each
geometry and precision are written and proven as `export` does it, with made-up images. The last
line of stdout is one JSON document.
"""

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from microclip_deploy.artifact import write_json
from microclip_deploy.bench.card import environment
from microclip_deploy.bench.geometry import random_geometry
from microclip_deploy.export.proof.answers import Graphs
from microclip_deploy.export.proof.forward_error import forward_error
from microclip_deploy.export.proof.limits import Tolerance
from microclip_deploy.export.proof.parity import compare_pixels, prove
from microclip_deploy.export.proof.probes import Reference, made_up_photos
from microclip_deploy.export.proof.quantised import quantisation_error
from microclip_deploy.export.to_onnx import write_graphs
from microclip_deploy.serving.exported import BACKBONE, FULL, Precision

GEOMETRIES = "tiny,ViT-B-32,ViT-B-16,ViT-L-14-336"
PRECISIONS = "fp32,fp16,bf16,int8,int8-static"


def rows(name: str, precisions: list[str], images: int) -> Iterator[dict[str, Any]]:
    """Write and prove a geometry in each precision."""
    geometry = random_geometry(name)
    model, preprocess = geometry.model(), geometry.preprocess
    photos = made_up_photos(preprocess.size, images)
    views = photos.views(preprocess)
    pixels = compare_pixels(photos.read(), views, preprocess)
    reference = Reference.of(model, preprocess, views)
    tolerance = Tolerance(error=forward_error(model, preprocess, reference))
    for precision in cast(list[Precision], precisions):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            write_graphs(model, preprocess, precision, Path(folder), {})
            written = time.perf_counter()
            if precision == "int8-static":
                quantised = quantisation_error(Path(folder) / BACKBONE, reference)
                tolerance = tolerance.model_copy(update={"quantised": quantised})
            matrix, share = model.class_matrix().detach().numpy(), model.cls_share
            proof = prove(
                Graphs(Path(folder), precision, model.ncut, matrix, share),
                reference,
                photos,
                tolerance=tolerance,
                pixels=pixels,
            )
            yield {
                "geometry": name,
                "write_s": round(written - start, 1),
                "prove_s": round(time.perf_counter() - written, 1),
                "full_mb": round((Path(folder) / FULL).stat().st_size / 1e6, 1),
                **proof.model_dump(mode="json"),
            }


def main(
    geometries: Annotated[str, typer.Option(help="open_clip names, or tiny.")] = GEOMETRIES,
    precisions: str = PRECISIONS,
    images: Annotated[int, typer.Option(help="Made-up images; 9 or more.", min=9)] = 24,
    out: Annotated[Path | None, typer.Option(help="Write the result here (JSON).")] = None,
) -> None:
    """Prove everything, print a line each, then one line of JSON."""
    proven = []
    for name in geometries.split(","):
        for row in rows(name, precisions.split(","), images):
            proven.append(row)
            worst = {s["stage"]: s["difference"] for s in row["stages"] if s["graph"] == FULL}
            print(
                f"{name:14} {row['precision']:11}  logits {worst['logits']:.1e}  "
                f"other masks {len(row['other_masks'])}/{images} "
                f"({len(row['undetermined'])} undetermined)  same class {row['agreement']:.1%}  "
                f"{row['full_mb']:.0f} MB  {row['departure'] or 'proven'}",
                flush=True,
            )
    result = {"benchmark": "export parity", "rows": proven, "environment": environment()}
    if out is not None:
        write_json(out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
