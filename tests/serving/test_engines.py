"""Engines are run where they were built for, as the bytes that were proven, or refused."""

import re
import shlex
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from safetensors.numpy import save_file

from microclip_deploy import artifact
from microclip_deploy.errors import CheckpointError, EnvironmentProblem
from microclip_deploy.serving.engines import (
    BACKBONE_PLAN,
    ENGINES,
    FULL_PLAN,
    LATENCY,
    PLAN_OF,
    SCHEMA,
    BuildOptions,
    EngineManifest,
    Hardware,
    PlanSpec,
    Span,
    Target,
    find_engines,
    has_engines,
    read_engines,
)
from microclip_deploy.serving.exported import (
    BACKBONE,
    CLASSIFIER,
    FULL,
    Export,
    GraphSpec,
    read_export,
)
from tests.serving.made_exports import write_export

HERE = Target(
    tensorrt="11.4.0.106", gpu="NVIDIA H200", compute_capability="9.0", system="Linux x86_64"
)
SPANS = [(1, 1, 1), (1, 8, 64), (4, 8, 24), (2, 3, 3), (1, 1, 5), (7, 7, 7), (3, 33, 100)]
NO_TENSORS = GraphSpec(inputs=(), outputs=())
NO_SHA256 = "0" * 64

Build = Callable[..., Path]


def span(sizes: tuple[int, int, int]) -> Span:
    least, opt, most = sizes
    return Span(least=least, opt=opt, most=most)


def manifest_of(target: Target = HERE, **options: Any) -> EngineManifest:
    """Return the manifest of a build, whose graphs are nobody's."""
    return EngineManifest(
        target=target,
        precision="fp16",
        options=BuildOptions(**options),
        classes=Span(least=2, opt=3, most=4096),
        plans={
            plan: PlanSpec(graph=graph, graph_sha256=NO_SHA256, tensors=NO_TENSORS)
            for graph, plan in PLAN_OF.items()
        },
    )


def changed(**fields: str) -> Target:
    """Return this machine with something else."""
    return HERE.model_copy(update=fields)


@pytest.fixture
def export(tmp_path: Path) -> Export:
    """Return an export whose graphs are a few bytes, which nothing here parses."""
    graphs = {name: f"the graph of {name}".encode() for name in (BACKBONE, FULL)}
    matrix = np.eye(3, 8, dtype=np.float32)
    return read_export(write_export(tmp_path / "my exports" / "birds", graphs, matrix))


@pytest.fixture
def build(export: Export) -> Build:
    """Return a function that writes engines of the export for a machine."""

    def built(
        target: Target = HERE,
        *,
        plans: tuple[str, ...] = (BACKBONE_PLAN, FULL_PLAN),
        **options: Any,
    ) -> Path:
        folder = export.directory / ENGINES / target.folder
        folder.mkdir(parents=True)
        for plan in PLAN_OF.values():
            (folder / plan).write_text(f"{plan} for {target.gpu}")
        content = manifest_of(target, **options).model_dump(mode="json")
        for plan in content["plans"].values():
            plan["graph_sha256"] = export.stored["files"][plan["graph"]]["sha256"]
        artifact.write_manifest(folder, SCHEMA, content, list(plans))
        return folder

    return built


def rewrite(folder: Path, **fields: Any) -> None:
    """Change fields of a manifest, which agrees with itself afterwards."""
    stored = artifact.read_json(folder / artifact.MANIFEST)
    del stored["sha256"]
    artifact.rewrite_manifest(folder, {**stored, **fields}, [])


def refusal_of(export: Export, here: Target = HERE) -> str:
    """Return what is said where no engines run."""
    with pytest.raises(EnvironmentProblem) as caught:
        find_engines(export, here)
    return str(caught.value)


@pytest.mark.parametrize("sizes", [(0, 1, 1), (-1, 1, 1), (2, 1, 3), (1, 4, 3), (3, 2, 1)])
def test_a_span_that_does_not_rise_from_one_is_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValidationError):
        span(sizes)


@pytest.mark.parametrize("sizes", SPANS)
def test_profiles_are_one_image_and_the_span_and_take_their_batches(
    sizes: tuple[int, int, int],
) -> None:
    manifest, taken = manifest_of(batch=span(sizes)), [*range(sizes[0], sizes[2] + 1)]
    assert [size for size in range(200) if size in span(sizes)] == taken
    assert str(span(sizes)) == ":".join(map(str, sizes))
    batches = manifest.options.batches()
    assert batches == ((LATENCY,) if sizes == (1, 1, 1) else (LATENCY, span(sizes)))
    assert all(size in batches[manifest.profile_of(size)] for size in (1, *taken))


@pytest.mark.parametrize(
    "options",
    [{"workspace_gib": 0}, {"opt_level": 6}, {"opt_level": -1}, {"hardware": "all"}],
    ids=str,
)
def test_options_that_tensorrt_does_not_have_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        BuildOptions(**options)


def test_one_image_has_the_profile_tuned_for_it() -> None:
    assert manifest_of(batch=span((1, 1, 1))).profile_of(1) == 0
    assert [manifest_of(batch=span((1, 8, 64))).profile_of(size) for size in (1, 2, 8)] == [0, 1, 1]


@pytest.mark.parametrize("sizes", SPANS)
def test_every_batch_fits_into_a_bucket_that_a_profile_takes(sizes: tuple[int, int, int]) -> None:
    manifest = manifest_of(batch=span(sizes))
    buckets = manifest.buckets()
    assert buckets[0] == 1
    assert buckets[-1] == sizes[2]
    assert {sizes[0], sizes[1]} <= set(buckets)
    assert all(one < other for one, other in pairwise(buckets))
    for bucket in buckets:
        assert bucket in manifest.options.batches()[manifest.profile_of(bucket)]
    # Filling up never more than doubles a batch, but for those below the least of the profile.
    assert all(other <= 2 * one for one, other in pairwise(buckets) if one >= sizes[0])


@pytest.mark.parametrize(
    ("sizes", "buckets"),
    [
        ((1, 1, 1), (1,)),
        ((1, 8, 64), (1, 2, 4, 8, 16, 32, 64)),
        ((4, 8, 24), (1, 4, 8, 16, 24)),
        ((3, 5, 6), (1, 3, 4, 5, 6)),
    ],
)
def test_buckets_are_powers_of_two_and_the_sizes_of_profiles(
    sizes: tuple[int, int, int], buckets: tuple[int, ...]
) -> None:
    assert manifest_of(batch=span(sizes)).buckets() == buckets


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"system": "Windows AMD64"}, "built on Linux x86_64"),
        ({"system": "Linux aarch64"}, "built on Linux x86_64"),
        ({"tensorrt": "11.4.0.107"}, "built with TensorRT 11.4.0.106"),
        ({"tensorrt": "12.0.0.1"}, "built with TensorRT 11.4.0.106"),
        ({"tensorrt": "10.16.1.11"}, "built with TensorRT 11.4.0.106"),
        ({"gpu": "NVIDIA H100"}, "built for NVIDIA H200 (compute capability 9.0)"),
        ({"compute_capability": "9.1"}, "built for NVIDIA H200 (compute capability 9.0)"),
        ({"gpu": "Tesla T4", "compute_capability": "7.5"}, "built for NVIDIA H200"),
    ],
    ids=str,
)
def test_engines_of_another_machine_are_refused_with_the_reason(
    fields: dict[str, str], told: str
) -> None:
    assert str(manifest_of().refusal(changed(**fields))).startswith(told)


@pytest.mark.parametrize(
    ("version", "runs"),
    [
        ("11.4.0.106", True),
        ("11.4.0.107", True),
        ("11.10.0.1", True),
        ("12.0.0.1", True),
        ("11.4.0.105", False),
        ("11.3.9.999", False),
        ("10.16.1.11", False),
    ],
)
def test_compatible_engines_run_with_newer_versions_only(version: str, runs: bool) -> None:
    why = manifest_of(version_compatible=True).refusal(changed(tensorrt=version))
    assert why == (None if runs else "built with TensorRT 11.4.0.106")


@pytest.mark.parametrize(
    ("hardware", "gpu", "capability", "runs"),
    [
        ("none", "NVIDIA H200", "9.0", True),
        ("none", "NVIDIA H100", "9.0", False),
        ("same-cc", "NVIDIA H100", "9.0", True),
        ("same-cc", "NVIDIA B200", "10.0", False),
        ("same-cc", "NVIDIA A100", "8.0", False),
        ("ampere+", "NVIDIA H100", "9.0", True),
        ("ampere+", "NVIDIA A100", "8.0", True),
        ("ampere+", "NVIDIA L4", "8.9", True),
        ("ampere+", "NVIDIA B200", "10.0", True),
        ("ampere+", "Tesla T4", "7.5", False),
    ],
)
def test_other_gpus_run_what_the_build_allowed(
    hardware: Hardware, gpu: str, capability: str, runs: bool
) -> None:
    here = changed(gpu=gpu, compute_capability=capability)
    why = manifest_of(hardware=hardware).refusal(here)
    assert why == (None if runs else "built for NVIDIA H200 (compute capability 9.0)")


def test_neither_kind_of_compatibility_implies_the_other() -> None:
    newer, other = changed(tensorrt="12.0.0.1"), changed(gpu="NVIDIA H100")
    assert manifest_of(hardware="same-cc").refusal(newer) == "built with TensorRT 11.4.0.106"
    assert str(manifest_of(version_compatible=True).refusal(other)).startswith("built for")


@pytest.mark.parametrize(
    ("gpu", "name"),
    [
        ("NVIDIA H200", "trt11.4.0.106-sm90-nvidia-h200"),
        ("NVIDIA GeForce RTX 4090", "trt11.4.0.106-sm90-nvidia-geforce-rtx-4090"),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("../..\\etc: *?\"<>|", None),
        ("  Tesla\tT4\n", None),
    ],
)  # fmt: skip
def test_the_folder_of_a_machine_is_a_safe_file_name(gpu: str, name: str | None) -> None:
    folder = changed(gpu=gpu).folder
    assert re.fullmatch(r"trt11\.4\.0\.106-sm90-[a-z0-9]([a-z0-9-]*[a-z0-9])?", folder)
    assert name is None or folder == name


def test_machines_have_folders_of_their_own() -> None:
    others = [
        changed(tensorrt="11.4.0.107"),
        changed(gpu="NVIDIA H100"),
        changed(compute_capability="10.0"),
    ]
    assert len({machine.folder for machine in (HERE, *others)}) == 4


def test_engines_for_this_machine_are_found_with_their_plans(export: Export, build: Build) -> None:
    folder = build()
    found = find_engines(export, HERE)
    assert found.directory == folder
    assert found.manifest.target == HERE
    assert found.plan(BACKBONE_PLAN) == b"backbone.plan for NVIDIA H200"
    assert found.plan(FULL_PLAN) == b"full.plan for NVIDIA H200"


@pytest.mark.parametrize("gpu", ["NVIDIA A", "NVIDIA Z"])
def test_engines_built_for_exactly_this_machine_come_first(
    export: Export, build: Build, gpu: str
) -> None:
    other = build(changed(gpu=gpu), hardware="same-cc")
    assert find_engines(export, HERE).directory == other
    exact = build()
    assert find_engines(export, HERE).directory == exact


def test_stale_engines_give_way_to_others_that_run_here(export: Export, build: Build) -> None:
    stale, other = build(), build(changed(gpu="NVIDIA H100"), hardware="same-cc")
    plans = artifact.read_json(stale / artifact.MANIFEST)["plans"]
    plans[FULL_PLAN]["graph_sha256"] = NO_SHA256
    rewrite(stale, plans=plans)
    assert find_engines(export, HERE).directory == other


def test_an_export_without_engines_says_how_to_build_them(export: Export) -> None:
    told = refusal_of(export)
    assert "found none; build them here: " in told
    assert str(HERE) in told
    command = shlex.split(told.rpartition("build them here: ")[2])
    assert command == ["microclip-deploy", "export", str(export.directory), "--trt"]


def test_foreign_engines_are_listed_with_what_they_are_for(export: Export, build: Build) -> None:
    folders = [build(changed(gpu="NVIDIA H100")), build(changed(tensorrt="10.16.1.11"))]
    told = refusal_of(export)
    assert f"{folders[0].name}: built for NVIDIA H100 (compute capability 9.0)" in told
    assert f"{folders[1].name}: built with TensorRT 10.16.1.11" in told
    assert "export" in told.rpartition("build them here: ")[2]


@pytest.mark.parametrize(("plan", "graph"), [(BACKBONE_PLAN, BACKBONE), (FULL_PLAN, FULL)])
def test_engines_of_another_graph_are_stale(
    export: Export, build: Build, plan: str, graph: str
) -> None:
    folder = build()
    (export.directory / graph).write_text("the graph of another run")
    artifact.rewrite_manifest(export.directory, export.stored, [graph])
    told = refusal_of(read_export(export.directory))
    assert f"found {folder.name}: {plan} was built from another {graph};" in told


def test_engines_outlive_a_change_of_the_classes(export: Export, build: Build) -> None:
    folder = build()
    save_file({"classifier": np.eye(4, 8, dtype=np.float32)}, export.directory / CLASSIFIER)
    content = {**export.stored, "classes": ["robin", "wren", "owl", "crane"]}
    artifact.rewrite_manifest(export.directory, content, [CLASSIFIER])
    assert find_engines(read_export(export.directory), HERE).directory == folder


def test_a_copied_folder_is_refused_by_what_it_was_built_for(export: Export, build: Build) -> None:
    other = build(changed(gpu="NVIDIA H100"))
    shutil.move(other, other.with_name(HERE.folder))
    assert f"{HERE.folder}: built for NVIDIA H100" in refusal_of(export)


def test_damaged_engines_for_this_machine_are_bad_data(export: Export, build: Build) -> None:
    build(changed(gpu="NVIDIA H100"), hardware="same-cc")
    (build() / BACKBONE_PLAN).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"backbone\.plan: its bytes are not"):
        find_engines(export, HERE)


@pytest.mark.parametrize("kind", ["bytes", "schema"])
def test_damaged_engines_of_other_machines_are_nobodys_concern(
    export: Export, build: Build, kind: str
) -> None:
    other = build(changed(gpu="NVIDIA H100"))
    if kind == "bytes":
        (other / BACKBONE_PLAN).write_bytes(b"x")
    else:
        rewrite(other, schema="microclip.engines/2")
    assert f"found {other}" in refusal_of(export)
    exact = build()
    assert find_engines(export, HERE).directory == exact


def test_folders_without_a_manifest_are_no_engines(export: Export, build: Build) -> None:
    assert not has_engines(export.directory)
    failed = build().with_name(f"{HERE.folder}.failed")
    shutil.move(failed.with_name(HERE.folder), failed)
    assert has_engines(export.directory)
    (failed / artifact.MANIFEST).unlink()
    (export.directory / ENGINES / f"{HERE.folder}.timing-cache").touch()
    assert not has_engines(export.directory)
    assert "found none" in refusal_of(export)


@pytest.mark.parametrize("damage", ["truncated", "exchanged", "missing"])
def test_a_damaged_plan_is_refused(build: Build, damage: str) -> None:
    folder = build()
    plan = folder / BACKBONE_PLAN
    if damage == "truncated":
        plan.write_bytes(plan.read_bytes()[:-1])
    elif damage == "exchanged":
        plan.write_bytes(plan.read_bytes()[::-1])
    else:
        plan.unlink()
    with pytest.raises(CheckpointError, match=r"backbone\.plan: "):
        read_engines(folder)


@pytest.mark.parametrize("plan", [BACKBONE_PLAN, FULL_PLAN])
def test_a_plan_that_changes_after_it_was_verified_is_not_returned(build: Build, plan: str) -> None:
    engines = read_engines(build())
    path = engines.directory / plan
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(CheckpointError, match="not those that were proven") as caught:
        engines.plan(plan)
    export = engines.directory.parent.parent
    command = shlex.split(str(caught.value).rpartition("rebuild: ")[2])
    assert command == ["microclip-deploy", "export", str(export), "--trt"]


def test_a_plan_that_vanishes_after_it_was_verified_is_bad_data(build: Build) -> None:
    engines = read_engines(build())
    (engines.directory / FULL_PLAN).unlink()
    with pytest.raises(CheckpointError, match=r"full\.plan: expected an engine, found"):
        engines.plan(FULL_PLAN)


def test_a_file_that_the_manifest_does_not_list_is_no_plan(build: Build) -> None:
    engines = read_engines(build())
    (engines.directory / "other.plan").write_bytes(b"code")
    with pytest.raises(CheckpointError, match="not those that were proven"):
        engines.plan("other.plan")


@pytest.mark.parametrize("lost", ["file", "origin"])
@pytest.mark.parametrize("plan", [BACKBONE_PLAN, FULL_PLAN])
def test_a_manifest_without_the_file_or_origin_of_a_plan_is_refused(
    build: Build, plan: str, lost: str
) -> None:
    others = tuple({BACKBONE_PLAN, FULL_PLAN} - {plan})
    folder = build(plans=others if lost == "file" else (plan, *others))
    if lost == "origin":
        plans = artifact.read_json(folder / artifact.MANIFEST)["plans"]
        rewrite(folder, plans={name: plans[name] for name in others})
    with pytest.raises(CheckpointError, match=f"lists no {re.escape(plan)}; rebuild"):
        read_engines(folder)


@pytest.mark.parametrize(
    "fields",
    [{"target": {}}, {"precision": "fp8"}, {"options": {"batch": 8}}, {"classes": None}],
    ids=str,
)
def test_a_manifest_that_tells_too_little_is_bad_data(build: Build, fields: dict[str, Any]) -> None:
    folder = build()
    rewrite(folder, **fields)
    with pytest.raises(CheckpointError, match="rebuild"):
        read_engines(folder)


def test_a_manifest_changed_by_hand_is_refused(build: Build) -> None:
    folder = build()
    path = folder / artifact.MANIFEST
    path.write_text(path.read_text().replace("NVIDIA H200", "NVIDIA H100"))
    with pytest.raises(CheckpointError, match="differs from its own sha256"):
        read_engines(folder)
