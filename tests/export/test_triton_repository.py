"""A Triton model repository: what its configurations say, what its graph answers, what stays."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from google.protobuf import text_format
from rich.console import Console
from tritonclient.grpc.model_config_pb2 import ModelConfig

from microclip_deploy import artifact
from microclip_deploy.cli.main import main
from microclip_deploy.errors import CheckpointError, UsageError
from microclip_deploy.export.class_rows import remove_classes
from microclip_deploy.export.triton.repository import write_repository
from microclip_deploy.server.settings import Settings
from microclip_deploy.serving import Prediction, open_session
from microclip_deploy.serving.engines import (
    ENGINES,
    PLAN_OF,
    SCHEMA,
    BuildOptions,
    EngineManifest,
    PlanSpec,
    Span,
    Target,
)
from microclip_deploy.serving.exported import CLASSIFIER, FULL, GraphSpec, read_export
from tests.conftest import CLASSES
from tests.export.damage import declare
from tests.serving.test_export_commands import TRAINING, without

QUIET = Console(quiet=True)


@pytest.fixture
def export(tiny_export: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_export, tmp_path / "tiny")


def build(export: Path, **target: Any) -> None:
    """Write engines whose plans are a few bytes."""
    here = Target(system="Linux x86_64", **target)
    folder = export / ENGINES / here.folder
    folder.mkdir(parents=True)
    files = read_export(export).stored["files"]
    for plan in PLAN_OF.values():
        (folder / plan).write_text(f"{plan} of {here.tensorrt}")
    manifest = EngineManifest(
        target=here,
        precision="fp32",
        options=BuildOptions(),
        classes=Span(least=2, opt=3, most=4096),
        proven=(),
        plans={
            plan: PlanSpec(
                graph=graph,
                graph_sha256=files[graph]["sha256"],
                tensors=GraphSpec(inputs=(), outputs=()),
            )
            for graph, plan in PLAN_OF.items()
        },
    )
    artifact.write_manifest(folder, SCHEMA, manifest.model_dump(), [*PLAN_OF.values()])


def config(model: Path) -> Any:
    return text_format.Parse((model / "config.pbtxt").read_text("utf-8"), ModelConfig())


def shapes(tensors: Any) -> dict[str, list[int]]:
    """Return the dimensions of inputs or outputs as the backend has them."""
    return {
        each.name: list(each.reshape.shape if each.HasField("reshape") else each.dims)
        for each in tensors
    }


def test_configurations_describe_what_the_session_takes_and_gives(
    export: Path, tmp_path: Path
) -> None:
    names = write_repository(export, tmp_path / "models", QUIET)
    assert names == ("tiny", "tiny_onnx")
    with open_session(export) as session:
        told = session.predict(np.zeros((1, 32, 32, 3), np.uint8))
    outputs = {field: list(getattr(told, field).shape[1:]) for field in Prediction._fields}
    served, graph = (config(tmp_path / "models" / name) for name in names)
    assert shapes(served.input) == {"image": [32, 32, 3], "photo": [1]}
    assert all(each.optional for each in served.input)
    assert shapes(served.output) == {**outputs, "probabilities": [len(CLASSES)], "unknown": []}
    assert shapes(graph.input) == {"image": [32, 32, 3]}
    assert shapes(graph.output) == outputs
    [accelerator] = graph.optimization.execution_accelerators.gpu_execution_accelerator
    assert (accelerator.name, dict(accelerator.parameters)) == ("cuda", {"use_tf32": "0"})
    usual = Settings()
    model = (tmp_path / "models" / "tiny" / "1" / "model.py").read_text("utf-8")
    assert f"MAX_PIXELS = {usual.max_pixels:_}\n" in model
    for each, name, backend in ((served, "tiny", "python"), (graph, "tiny_onnx", "onnxruntime")):
        assert (each.name, each.backend) == (name, backend)
        queue = each.dynamic_batching.default_queue_policy
        assert (each.max_batch_size, queue.max_queue_size) == (usual.max_batch, usual.max_queue)
        assert queue.default_timeout_microseconds == 1e6 * usual.timeout_s
        assert each.model_warmup[0].inputs["image"].zero_data
        labelled = {output.name for output in each.output if output.label_filename}
        assert labelled == {"logits", "probabilities"} & {output.name for output in each.output}
        labels = (tmp_path / "models" / name / "labels.txt").read_text("utf-8").splitlines()
        assert labels == list(CLASSES)


@pytest.mark.parametrize("shared", [False, True], ids=["one file", "weights beside it"])
def test_the_graph_answers_alone_for_the_present_classes(
    export: Path, tmp_path: Path, shared: bool
) -> None:
    if shared:
        model = onnx.load(export / FULL)
        onnx.save(model, export / FULL, save_as_external_data=True, location="weights.data")
        declare(export, FULL, "weights.data")
    remove_classes(export, CLASSES[:1])
    write_repository(export, tmp_path / "models", QUIET)
    graph = onnxruntime.InferenceSession(tmp_path / "models" / "tiny_onnx" / "1" / "model.onnx")
    assert [node.name for node in graph.get_inputs()] == ["image"]
    assert not graph.get_overridable_initializers()
    names = json.loads(graph.get_modelmeta().custom_metadata_map["names"])
    assert tuple(names.values()) == CLASSES[1:]
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    found = Prediction(*graph.run(list(Prediction._fields), {"image": images}))
    with open_session(export) as session:
        told = session.predict(images)
    assert (found.mask == told.mask).all()
    np.testing.assert_allclose(found.logits, told.logits, atol=1e-4)


def test_the_newest_engines_of_each_capability_are_taken_and_go_with_their_graph(
    export: Path, tmp_path: Path
) -> None:
    h200 = {"gpu": "NVIDIA H200", "compute_capability": "9.0"}
    build(export, tensorrt="10.16.1.11", **h200)
    build(export, tensorrt="11.4.0.106", **h200)
    build(export, tensorrt="11.4.0.106", gpu="NVIDIA L4", compute_capability="8.9")
    build(export, flavour="TensorRT for RTX", tensorrt="1.7.1.116", capabilities=("12.0",))
    models = tmp_path / "models"
    assert write_repository(export, models, QUIET)[-1] == "tiny_tensorrt"
    found = config(models / "tiny_tensorrt")
    plans = {
        capability: (models / "tiny_tensorrt" / "1" / plan).read_text()
        for capability, plan in found.cc_model_filenames.items()
    }
    assert plans == {key: "full.plan of 11.4.0.106" for key in ("8.9", "9.0")}
    width = read_export(export).classifier.shape[1]
    assert found.max_batch_size == 0
    assert shapes(found.input) == {"image": [-1, 32, 32, 3], "classifier": [-1, width]}
    assert shapes(found.output)["logits"] == [-1, -1]
    assert shapes(found.output)["complete"] == [-1]
    assert list(found.instance_group[0].profile) == ["0", "1"]
    assert (models / "tiny_tensorrt" / CLASSIFIER).read_bytes() == (
        export / CLASSIFIER
    ).read_bytes()
    shutil.rmtree(export / ENGINES)
    write_repository(export, models, QUIET)
    assert not (models / "tiny_tensorrt").exists()


def test_int8_graphs_are_left_to_the_session(export: Path, tmp_path: Path) -> None:
    stored = artifact.read_json(export / artifact.MANIFEST)
    del stored["sha256"]
    artifact.rewrite_manifest(export, {**stored, "precision": "int8-static"}, [])
    assert write_repository(export, tmp_path / "models", QUIET) == ("tiny",)


def test_names_are_those_that_triton_and_kubernetes_take(export: Path, tmp_path: Path) -> None:
    odd = export.rename(tmp_path / "Vögel & co.v2")
    assert write_repository(odd, tmp_path / "models", QUIET)[0] == "V_gel_co_v2"
    assert "  name: v-gel-co-v2\n" in (tmp_path / "models" / "kserve.yaml").read_text()


@pytest.mark.parametrize("mine", ["tiny/config.pbtxt", "tiny_onnx/notes.txt", "README.md"])
def test_nothing_of_the_users_is_replaced(export: Path, tmp_path: Path, mine: str) -> None:
    path = tmp_path / "models" / mine
    path.parent.mkdir(parents=True)
    path.write_text('name: "mine"')
    with pytest.raises(UsageError, match="found something else"):
        write_repository(export, tmp_path / "models", QUIET)
    assert [each for each in (tmp_path / "models").rglob("*") if each.is_file()] == [path]


def test_a_place_that_is_taken_is_told_before_anything_is_exported(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "models" / "out").mkdir(parents=True)
    out = ["--out", str(tmp_path / "out"), "--triton", str(tmp_path / "models")]
    assert main(["export", str(finished_run), *out]) == 2
    assert "models/out: expected nothing there" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_repository_inside_the_export_is_refused(export: Path) -> None:
    with pytest.raises(UsageError, match="outside the export"):
        write_repository(export, export / "models", QUIET)


def test_a_damaged_export_leaves_the_earlier_repository(export: Path, tmp_path: Path) -> None:
    write_repository(export, tmp_path / "models", QUIET)
    (export / FULL).write_bytes(b"no graph")
    with pytest.raises(CheckpointError, match=r"full\.onnx"):
        write_repository(export, tmp_path / "models", QUIET)
    read_export(tmp_path / "models" / "tiny" / "1" / "export")


def test_the_command_writes_it_beside_other_models_and_without_pytorch(
    export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "models" / "theirs"
    other.mkdir(parents=True)
    call = ["export", str(export), "--triton", str(tmp_path / "models"), "--json"]
    packages = [name for name in TRAINING if name != "onnx"]
    [(code, told, notes)] = without(packages, call)
    assert (code, json.loads(told)["models"]) == (0, ["tiny", "tiny_onnx"]), notes
    assert other.is_dir()
    assert main([*call, "--out", str(tmp_path / "out")]) == 2
    assert "leave it out" in capsys.readouterr().err
