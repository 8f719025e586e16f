"""What NVIDIA's builder makes of the tiny model; test_to_tensorrt.py runs this in its own process.

TensorRT for RTX, on the CPU. EXPORT_FP32 and so on are the exports' directories.
"""

import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import pytest

from microclip_deploy.artifact import sha256_file
from microclip_deploy.cli.main import main
from microclip_deploy.errors import CheckpointError, EnvironmentProblem, UsageError
from microclip_deploy.export.layer_listing import fused_attention, types_of
from microclip_deploy.export.to_tensorrt import (
    Built,
    GraphRefused,
    build_plan,
    network_source,
)
from microclip_deploy.serving.engines import ENGINES, BuildOptions, Span, read_engines
from microclip_deploy.serving.tensorrt_library import FLAVOUR, LOG, trt

CLASSES = Span(least=2, opt=5, most=4096)
OPTIONS = BuildOptions()
BLOCKS = 1
"""Of the tiny model's two, those that are one kernel; the last one attends from [CLS] alone."""
PROFILES = 2
HALF = {"fp32": None, "fp16": "Half", "bf16": "BFloat16"}
PRODUCT = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16"}
NOWHERE = Path("no such folder")


class Told(NamedTuple):
    """A build and what was told meanwhile."""

    built: Built
    log: Sequence[str]
    progress: Sequence[tuple[int, int, str]]


def export_of(precision: str) -> Path:
    return Path(os.environ[f"EXPORT_{precision.upper()}"])


def path_of(precision: str, graph: str) -> Path:
    return export_of(precision) / f"{graph}.onnx"


def build(graph: Path, options: BuildOptions = OPTIONS, **changed: Any) -> Built:
    LOG.taken()
    return build_plan(graph, options, CLASSES, timing_cache=NOWHERE / "cache", **changed)


@cache
def told_of(precision: str, graph: str) -> Told:
    progress: list[tuple[int, int, str]] = []
    built = build(path_of(precision, graph), progress=lambda *step: progress.append(step))
    return Told(built, LOG.taken(), progress)


def network_of(source: bytes) -> Any:
    """Return the parsed network, with what keeps it alive."""
    builder = trt.Builder(LOG)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, LOG)
    assert parser.parse(source, "")
    return network, parser, builder


@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("graph", ["backbone", "full"])
def test_a_plan_has_the_precision_of_its_graph(precision: str, graph: str) -> None:
    built, log, _ = told_of(precision, graph)
    found = types_of(built.layers)
    assert found["Half"] + found["BFloat16"] == found[HALF[precision] or "Half"]
    assert bool(found[HALF[precision] or "Half"]) == (precision != "fp32")
    assert built.products[PRODUCT[precision]] > 1
    # What clearing the flag of TF32 does, as far as a plan shows it.
    assert b"tf32=0" in built.plan
    assert b"tf32=1" not in built.plan
    assert [line for line in log if not line.startswith("INFO")] == []
    assert not NOWHERE.exists()  # no timing cache of a library that has none


@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("graph", ["backbone", "full"])
def test_attention_is_one_kernel_in_half_precision(precision: str, graph: str) -> None:
    expected = 0 if precision == "fp32" else BLOCKS * PROFILES
    assert fused_attention(told_of(precision, graph).built.layers) == expected


def test_static_int8_is_built_and_attends_in_one_kernel() -> None:
    layers = told_of("int8-static", "backbone").built.layers
    found = types_of(layers)
    assert found["Int8"] > 0
    assert found["Half"] > 0
    assert fused_attention(layers) == BLOCKS * PROFILES


def test_the_cut_stays_in_float32() -> None:
    full, backbone = (types_of(told_of("fp16", name).built.layers) for name in ("full", "backbone"))
    assert full["Half"] == backbone["Half"]  # nothing that full.onnx adds is in half precision
    assert full["Float"] > backbone["Float"]


def test_a_listed_layer_has_name_kind_and_types() -> None:
    layers = told_of("fp16", "backbone").built.layers
    kinds = Counter(layer.kind for layer in layers)
    assert kinds["gemm"] > BLOCKS
    assert all(layer.name and layer.outputs for layer in layers if layer.kind == "gemm")
    assert "Half" in {layer.precision for layer in layers}


def test_pixels_go_in_and_masks_come_out() -> None:
    network, *_ = network_of(network_source(path_of("fp32", "full")))
    inputs = {each.name: each for each in map(network.get_input, range(network.num_inputs))}
    outputs = {each.name: each for each in map(network.get_output, range(network.num_outputs))}
    assert inputs.keys() == {"image", "classifier"}
    assert inputs["image"].dtype == trt.DataType.UINT8
    assert tuple(inputs["image"].shape) == (-1, 32, 32, 3)
    assert outputs["mask"].dtype == trt.DataType.BOOL
    assert {"logits", "embedding", "cls", "fg", "mask", "attention"} <= outputs.keys()


def test_the_class_matrix_is_an_input_that_would_else_be_a_constant() -> None:
    graph = path_of("fp32", "full")
    network, *_ = network_of(network_source(graph))
    (matrix,) = (
        tuple(network.get_input(number).shape)
        for number in range(network.num_inputs)
        if network.get_input(number).name == "classifier"
    )
    assert matrix[0] == -1
    folded, *_ = network_of(graph.read_bytes())
    assert [folded.get_input(number).name for number in range(folded.num_inputs)] == ["image"]


def test_progress_goes_up_to_its_end() -> None:
    _, _, progress = told_of("fp16", "backbone")
    assert progress
    steps = [done for done, _, _ in progress]
    assert steps == sorted(steps)
    assert all(done <= of for done, of, _ in progress)


def test_dynamic_int8_is_refused_once_for_each_operator() -> None:
    with pytest.raises(GraphRefused) as caught:
        build(path_of("int8", "full"))
    message = str(caught.value)
    assert message.count("DynamicQuantizeLinear,") == message.count("MatMulInteger,") == 1
    assert message.count("more nodes): no such operator") == 2


def test_one_profile_and_a_narrow_list_of_gpus() -> None:
    one = Span(least=1, opt=1, most=1)
    built = build(path_of("fp16", "backbone"), BuildOptions(batch=one, compute=("8.9",)))
    assert fused_attention(built.layers) == BLOCKS
    assert len(built.plan) < len(told_of("fp16", "backbone").built.plan)


@pytest.mark.parametrize("capability", ["9.0", "1.2", "12.7"])
def test_gpus_that_are_not_built_for_are_told(capability: str) -> None:
    with pytest.raises(UsageError, match=rf"--compute {capability}: .*8\.6, 8\.9, 12\.0"):
        build(path_of("fp32", "backbone"), BuildOptions(compute=("8.9", capability)))


def test_turing_cannot_have_float32() -> None:
    with pytest.raises(EnvironmentProblem, match="built no engine"):
        build(path_of("fp32", "backbone"), BuildOptions(compute=("7.5",)))


def test_too_small_a_workspace_is_told() -> None:
    with pytest.raises(EnvironmentProblem, match=r"built no engine.*--workspace"):
        build(path_of("fp32", "full"), BuildOptions(workspace_gib=0.0005))


def test_a_cut_off_file_is_no_graph(tmp_path: Path) -> None:
    data = path_of("fp32", "backbone").read_bytes()
    graph = tmp_path / "backbone.onnx"
    graph.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"backbone\.onnx: expected"):
        build(graph)


def test_weights_in_a_file_beside_the_graph_are_found(tmp_path: Path) -> None:
    model = onnx.load(path_of("fp16", "backbone"))
    graph = tmp_path / "backbone.onnx"
    onnx.save(model, graph, save_as_external_data=True, location="weights", size_threshold=100)
    assert (tmp_path / "weights").stat().st_size > 100_000
    built = build(graph, BuildOptions(batch=Span(least=1, opt=1, most=1), compute=("8.9",)))
    assert built.products["HALF"] > 1


def test_a_signal_cancels_a_build() -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            build(path_of("fp32", "full"))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert any("BuildCanceled" in line for line in LOG.taken())


def test_an_error_of_the_display_cancels_a_build() -> None:
    def broken(*_: object) -> None:
        raise ValueError("the terminal is gone")

    with pytest.raises(ValueError, match="the terminal is gone"):
        build(path_of("fp32", "backbone"), progress=broken)
    assert any("BuildCanceled" in line for line in LOG.taken())


# ---- the command


@pytest.fixture
def export(tmp_path: Path) -> Path:
    return shutil.copytree(export_of("fp16"), tmp_path / "export")


def test_engines_are_built_ahead_and_wait_for_a_proof(
    export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(export), "--trt", "--batch", "1:1:1", "--compute", "8.9"]) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "(fp16, built, not proven)" in told
    assert f"on such a machine: microclip-deploy verify {export}" in told
    (folder,) = (export / ENGINES).iterdir()
    assert folder.name == f"rtx{trt.__version__}-sm89"
    manifest = read_engines(folder).manifest
    assert (manifest.target.flavour, manifest.proven) == (FLAVOUR, ())
    assert {plan.graph_sha256 for plan in manifest.plans.values()} == {
        sha256_file(path_of("fp16", name)) for name in ("backbone", "full")
    }
    assert main(["verify", str(export)]) == 0
    assert "engines: still not proven" in capsys.readouterr().err
    assert main(["predict", str(export), str(export), "--device", "tensorrt"]) == 4


def test_a_check_tells_and_keeps_nothing(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(export.rglob("*"))
    options = ["--batch", "1:1:1", "--compute", "8.9", "--json"]
    assert main(["export", str(export), "--trt", "--check", *options]) == 0
    backbone, full = json.loads(capsys.readouterr().out)
    assert (backbone["graph"], full["graph"]) == ("backbone.onnx", "full.onnx")
    assert backbone["fused_attention"] == full["fused_attention"] == BLOCKS
    assert full["plan_bytes"] > backbone["plan_bytes"] > 1_000_000
    assert {row["precision"] for row in backbone["layers"]} >= {"Half", "Float"}
    assert sorted(export.rglob("*")) == before


def test_a_check_of_what_is_refused_names_the_operators(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["export", str(export_of("int8")), "--trt", "--check"]) == 5
    told = capsys.readouterr().err
    assert told.count("DynamicQuantizeLinear") == told.count("MatMulInteger") == 2  # both graphs


def test_capabilities_that_do_not_exist_leave_nothing(
    export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(export), "--trt", "--compute", "9.0"]) == 2
    assert "other GPUs, such as those of data centres" in capsys.readouterr().err
    assert list((export / ENGINES).iterdir()) == []
