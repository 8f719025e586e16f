"""`export --trt --check`: build the plans, tell what they are made of, and keep nothing.

TensorRT for RTX does so on any machine. What it shows is that the graphs are read and built, in
which precision, and whether attention is fused; nothing of answers or of speed.
"""

import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from microclip_deploy.console import bar
from microclip_deploy.errors import VerificationError
from microclip_deploy.export.build_options import require_known, spelled
from microclip_deploy.export.engine_command import class_span, require_flavour
from microclip_deploy.export.layer_listing import fused_attention
from microclip_deploy.serving.engines import PLAN_OF, BuildOptions, Span
from microclip_deploy.serving.exported import read_export


class Kernels(BaseModel, frozen=True):
    """Layers of one kind and precision."""

    kind: str
    precision: str
    count: int


class Checked(BaseModel, frozen=True):
    """One plan, which is not kept."""

    library: str
    graph: str
    plan_bytes: int
    build_s: float
    profiles: int
    products: dict[str, int]
    """Matrix products by the type of their factors."""
    layers: tuple[Kernels, ...]
    """Of all profiles together; none where the library does not list them."""
    fused_attention: int | None
    """Kernels that are a whole attention, of all profiles; None as `layers`."""


def run_check(directory: Path, options: BuildOptions, notes: Console) -> list[Checked]:
    """Build the graphs of an export, and return what their plans are made of.

    Args:
        directory: the export; nothing is written into it.
        options: how to build.
        notes: gets progress.

    Raises:
        CheckpointError: the export is damaged.
        EnvironmentProblem: no library that builds here, or a build fails.
        VerificationError: graphs that the library does not take; names operators.
    """
    export = read_export(directory)
    flavour = require_flavour(directory, f" --check{spelled(options, {})}")
    require_known(options, flavour, None)
    from microclip_deploy.export.to_tensorrt import GraphRefused

    checked, refused = [], []
    for graph in PLAN_OF:
        try:
            checked.append(check_graph(directory / graph, options, class_span(export), notes))
        except GraphRefused as error:
            refused.append(str(error))
    if refused:
        raise VerificationError("\n".join(refused))
    return checked


def table(checked: Sequence[Checked]) -> Table:
    """Return the plans for a terminal."""
    shown = Table(title=f"{checked[0].library}: built, not kept, not proven")
    for heading in ("graph", "layers", "precision"):
        shown.add_column(heading)
    shown.add_column("count", justify="right")
    for plan in checked:
        for row in plan.layers:
            shown.add_row(plan.graph, row.kind, row.precision, str(row.count))
        fused = "not listed" if plan.fused_attention is None else str(plan.fused_attention)
        products = ", ".join(f"{count} in {kind}" for kind, count in plan.products.items())
        shown.add_row(plan.graph, "fused attention", f"{plan.profiles} profiles", fused)
        shown.add_row(plan.graph, "matrix products", products, "")
        size = f"{plan.plan_bytes / 2**20:.1f} MiB"
        shown.add_row(plan.graph, f"plan of {size}", f"built in {plan.build_s:.1f} s", "")
        shown.add_section()
    return shown


def check_graph(graph: Path, options: BuildOptions, classes: Span, notes: Console) -> Checked:
    """Build one graph.

    Raises:
        GraphRefused: the parser does not take it.
        CheckpointError: no ONNX graph.
        EnvironmentProblem: the build fails.
    """
    from microclip_deploy.export.to_tensorrt import build_plan
    from microclip_deploy.serving.tensorrt_library import LOG, NAME

    LOG.taken()
    begun = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as scratch,
        bar(notes, f"building {graph.name}") as progress,
    ):
        cache = Path(scratch) / "timing-cache"
        told = progress.update
        built = build_plan(graph, options, classes, timing_cache=cache, progress=told)
    kinds = Counter((layer.kind, layer.precision) for layer in built.layers)
    return Checked(
        library=NAME,
        graph=graph.name,
        plan_bytes=len(built.plan),
        build_s=time.perf_counter() - begun,
        profiles=len(options.batches()),
        products=built.products,
        layers=tuple(
            Kernels(kind=kind, precision=precision, count=count)
            for (kind, precision), count in kinds.most_common()
        ),
        fused_attention=fused_attention(built.layers) if built.layers else None,
    )
