"""Stages by themselves: together they are the request, and their work is counted right."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from microclip_deploy.bench.latency import ceilings, stages
from microclip_deploy.bench.latency.graph_parts import Part, open_parts
from microclip_deploy.bench.latency.report import COPY, PRODUCT, Stage
from microclip_deploy.bench.latency.stages import floor_s, measure_stages
from microclip_deploy.bench.photos import made_up_jpegs
from microclip_deploy.errors import CheckpointError
from microclip_deploy.export.proof.probes import made_up_photos
from microclip_deploy.serving.exported import FULL, read_export
from microclip_deploy.serving.onnx_graph import OnnxGraph

CEILINGS = {COPY: 1e9, PRODUCT: 1e12}
MODEL_STAGES = [Stage.BACKBONE, Stage.K1, Stage.K2, Stage.HEAD]


@pytest.fixture(scope="module")
def parts(tiny_export: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Part]:
    return open_parts(tiny_export, tmp_path_factory.mktemp("parts"), 1)


def test_the_parts_are_the_full_graph(parts: list[Part], tiny_export: Path) -> None:
    export = read_export(tiny_export)
    views = made_up_photos(32).views(export.manifest.preprocess)[:5]
    values: dict[str, NDArray[Any]] = {"image": views, "classifier": export.classifier}
    wanted = OnnxGraph(tiny_export / FULL).run(("mask", "logits", "attention"), values)
    assert [part.stage for part in parts] == MODEL_STAGES
    for part in parts:
        values |= part.run(values)
    np.testing.assert_array_equal(values["mask"], wanted[0])
    np.testing.assert_allclose(values["logits"], wanted[1], rtol=0, atol=1e-4)
    np.testing.assert_allclose(values["attention"], wanted[2], rtol=0, atol=1e-5)


def test_work_is_counted_as_by_hand(parts: list[Part], tiny_export: Path) -> None:
    work = parts[0].work(3, 5)
    tokens, width, heads, joint = 16, 64, 2, 32
    rows = tokens + 1
    patch = tokens * 192 * width
    mlp = 2 * 4 * width**2
    block = rows * (3 * width**2 + 2 * rows * width + width**2 + mlp)
    # The class row alone asks, by a key map a head; patches take the value path.
    last = 2 * width**2 + rows * width * (heads + 1) + rows * (2 * width**2 + mlp)
    assert work.flop == pytest.approx(2 * 3 * (patch + block + last + width * joint), rel=0.01)
    weights = (tiny_export / "backbone.onnx").stat().st_size
    moved = 3 * 32 * 32 * 3 + 3 * 4 * (joint + tokens * width)
    assert work.bytes == pytest.approx(weights + moved, rel=0.05)
    k1 = parts[1].work(3, 5)
    assert k1.flop == 2 * 3 * tokens**2 * width
    assert k1.bytes == pytest.approx(3 * (4 * tokens * width + tokens**2), rel=0.03)


@pytest.mark.parametrize(
    ("product", "kinds", "flop"),
    [
        ("MatMulInteger", ("uint8", "int8", "int32"), None),
        ("MatMul", ("float",) * 3, 2 * 4 * 8 * 5),
    ],
)
def test_integer_products_are_not_counted(
    product: str, kinds: tuple[str, ...], flop: int | None, parts: list[Part]
) -> None:
    left, right, made = kinds
    text = (
        f'<ir_version: 9, opset_import: ["": 20]> g ({left}[batch, 8] x, {right}[8, 5] w) '
        f"=> ({made}[batch, 5] y) {{ y = {product} (x, w) }}"
    )
    part = parts[0]._replace(model=onnx.parser.parse_model(text))
    assert part.work(4, 5).flop == flop


@pytest.mark.parametrize(
    ("flop", "moved", "seconds"),
    [(10**9, 10**6, 1e-3), (10**6, 10**7, 1e-2), (None, 10**9, None), (None, None, None)],
)
def test_a_floor_is_the_longer_of_arithmetic_and_memory(
    flop: int | None, moved: int | None, seconds: float | None
) -> None:
    assert floor_s(flop, moved, CEILINGS) == pytest.approx(seconds)
    assert floor_s(flop, moved, None) is None


def test_every_stage_of_a_request_is_timed(
    tiny_export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "BUDGET_S", 0.01)
    photos = made_up_jpegs(3, 32)
    rows = measure_stages(tiny_export, photos, (1, 2), CEILINGS, device="cpu", threads=1)
    wanted = [Stage.DECODE, Stage.PREPROCESS, *MODEL_STAGES, Stage.POST]
    assert [(row.batch, row.stage) for row in rows] == [(b, s) for b in (1, 2) for s in wanted]
    for row in rows:
        assert len(row.samples_s) >= 9
        assert (row.floor_s is None) == (row.stage not in MODEL_STAGES)
    flop = {(row.batch, row.stage): row.flop for row in rows}
    assert flop[2, Stage.BACKBONE] == 2 * (flop[1, Stage.BACKBONE] or 0)


def test_an_export_without_its_parts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{tmp_path.name}: expected graphs with the values"):
        open_parts(tmp_path, tmp_path, 1)


def test_ceilings_are_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "COPY_BYTES", 8 << 20)
    monkeypatch.setattr(ceilings, "SIDE", 256)
    found = ceilings.cpu_ceilings(1)
    assert found.keys() == {COPY, PRODUCT}
    assert min(found.values()) > 0
