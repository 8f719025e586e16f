"""Stages by themselves: together they are the request, and their work is counted right."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from microclip_deploy.bench.latency import ceilings as ceilings_module
from microclip_deploy.bench.latency import stages as stages_module
from microclip_deploy.bench.latency.ceilings import cpu_ceilings
from microclip_deploy.bench.latency.graph_parts import open_parts, work_of
from microclip_deploy.bench.latency.report import (
    BACKBONE,
    COPY,
    DECODE,
    K1,
    K2,
    K3_HEAD,
    POST,
    PREPROCESS,
    PRODUCT,
)
from microclip_deploy.bench.latency.stages import StageRequest, measure_stages
from microclip_deploy.bench.photos import made_up_jpegs
from microclip_deploy.errors import UsageError
from microclip_deploy.export.proof.probes import made_up_photos
from microclip_deploy.serving.exported import FULL, read_export
from microclip_deploy.serving.onnx_graph import OnnxGraph

CEILINGS = {COPY: 1e10, PRODUCT: 1e11}


def test_the_parts_are_the_full_graph(tiny_export: Path) -> None:
    export = read_export(tiny_export)
    views = made_up_photos(32).views(export.manifest.preprocess)[:5]
    values: dict[str, NDArray[Any]] = {"image": views, "classifier": export.classifier}
    wanted = OnnxGraph(tiny_export / FULL).run(("mask", "logits", "attention"), values)
    with TemporaryDirectory() as folder:
        parts = open_parts(tiny_export, Path(folder), 1)
        assert [part.stage for part in parts] == [BACKBONE, K1, K2, K3_HEAD]
        for part in parts:
            values |= part.run(values)
    np.testing.assert_array_equal(values["mask"], wanted[0])
    np.testing.assert_allclose(values["logits"], wanted[1], rtol=0, atol=1e-4)
    np.testing.assert_allclose(values["attention"], wanted[2], rtol=0, atol=1e-5)


def test_work_is_counted_as_by_hand(tiny_export: Path) -> None:
    views = np.zeros((3, 32, 32, 3), np.uint8)
    with TemporaryDirectory() as folder:
        backbone = open_parts(tiny_export, Path(folder), 1)[0]
        work = backbone.work(3, (5, 32))
    tokens, width, heads, joint = 16, 64, 2, 32
    rows = tokens + 1
    patch = tokens * 192 * width
    mlp = 2 * 4 * width**2
    block = rows * (3 * width**2 + 2 * rows * width + width**2 + mlp)
    # The class row alone asks, by a key map a head; patches take the value path.
    last = 2 * width**2 + rows * width * (heads + 1) + rows * (2 * width**2 + mlp)
    assert work.flop == pytest.approx(2 * 3 * (patch + block + last + width * joint), rel=0.01)
    weights = (tiny_export / "backbone.onnx").stat().st_size
    moved = views.nbytes + 3 * 4 * (joint + tokens * width)
    assert work.bytes == pytest.approx(weights + moved, rel=0.05)


@pytest.mark.parametrize(("operator", "flop"), [("MatMulInteger", None), ("MatMul", 2 * 4 * 8 * 5)])
def test_integer_products_have_no_floor(operator: str, flop: int | None) -> None:
    integer = operator == "MatMulInteger"
    kinds = (TensorProto.UINT8, TensorProto.INT32) if integer else (TensorProto.FLOAT,) * 2
    value, weights = helper.make_tensor_value_info, np.ones((8, 5), np.int8 if integer else "f4")
    graph = helper.make_graph(
        [helper.make_node(operator, ["x", "w"], ["y"])],
        "product",
        [value("x", kinds[0], ["batch", 8])],
        [value("y", kinds[1], ["batch", 5])],
        [numpy_helper.from_array(weights, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    assert work_of(model, {"x": (4, 8)}, ("y",)).flop == flop


def test_every_stage_of_a_request_is_timed(
    tiny_export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages_module, "_BUDGET_S", 0.01)
    photos = made_up_jpegs(3, 32)
    request = StageRequest(tiny_export, photos, (1, 2), "cpu", 1)
    rows = measure_stages(request, CEILINGS)
    stages = [DECODE, PREPROCESS, BACKBONE, K1, K2, K3_HEAD, POST]
    assert [(row.batch, row.stage) for row in rows] == [(b, s) for b in (1, 2) for s in stages]
    for row in rows:
        assert len(row.samples_s) >= 9
        assert (row.floor_s is None) == (row.stage in (DECODE, PREPROCESS, POST))
    flop = {(row.batch, row.stage): row.flop for row in rows}
    assert flop[2, BACKBONE] == 2 * (flop[1, BACKBONE] or 0)


def test_ceilings_are_rates_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings_module, "COPY_BYTES", 8 << 20)
    monkeypatch.setattr(ceilings_module, "SIDE", 256)
    monkeypatch.setattr(ceilings_module, "BUDGET_S", 0.05)
    found = cpu_ceilings(1)
    assert found.keys() == {COPY, PRODUCT}
    assert 1e8 < found[COPY] < 1e13
    assert 1e8 < found[PRODUCT] < 1e14
    with pytest.raises(UsageError, match="threads: expected at least 1, found 0"):
        cpu_ceilings(0)
