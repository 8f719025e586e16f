"""Write a Triton model repository from an export.

    DIR/
        README.md             how to start it and how to change classes
        kserve.yaml           an InferenceService of it
        NAME/                 backend python: the session of this package
            config.pbtxt
            labels.txt        class names, for Triton's classification extension
            1/model.py
            1/export/         a copy of the export
        NAME_onnx/            backend onnxruntime: the graph with the present classes inside
        NAME_tensorrt/        backend tensorrt: the proven engines of the whole graph, if any

Every model directory is complete or absent, and needs nothing outside it. Classes are those of the
moment: labels, graph and export of a directory agree, and Triton changes from one directory to the
next when it loads the model again.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import NamedTuple

from rich.console import Console

from microclip_deploy import artifact
from microclip_deploy.errors import UsageError
from microclip_deploy.serving.engines import FULL_PLAN, Engines, current_engines
from microclip_deploy.serving.exported import CLASSIFIER, FULL, Export, TensorSpec, read_export
from microclip_deploy.serving.flavour import TENSORRT

MAX_BATCH, MAX_QUEUE, TIMEOUT_S = 32, 256, 30
"""As `serve` has them by itself."""

_PREFERRED = (8, 16, 32)
_OURS = "Written by `microclip-deploy export --triton`"
_FILES = resources.files("microclip_deploy.export.triton")
_TYPES = {"uint8": "TYPE_UINT8", "float32": "TYPE_FP32", "bool": "TYPE_BOOL"}
_KINDS = ("", "_onnx", "_tensorrt")
"""What follows NAME in the names of the models."""
_TEXTS = ("README.md", "kserve.yaml")
_LABELLED = ("logits", "probabilities")


class _Model(NamedTuple):
    """A directory of the repository."""

    name: str
    row: str
    """Of the table in README.md."""
    write: Callable[[Path], None]


def write_repository(export: Path, directory: Path, notes: Console) -> tuple[str, ...]:
    """Write the models of an export into a Triton model repository; other models in it stay.

    Args:
        export: what `export` wrote; its engines are taken along.
        directory: the repository, made if it is not there.
        notes: gets remarks.

    Returns:
        The names of the models.

    Raises:
        CheckpointError: the export, or engines in it, are damaged.
        UsageError: something that this function did not write is in the way.
        EnvironmentProblem: the repository cannot be written.
    """
    require_replaceable(export, directory)
    read, name = read_export(export), _name(export)
    models = tuple(_models(read, name, notes))
    for stale in {f"{name}{kind}" for kind in _KINDS} - {model.name for model in models}:
        shutil.rmtree(directory / stale, ignore_errors=True)  # of classes or engines of before
    for model in models:
        with artifact.staged_directory(directory / model.name) as folder:
            try:
                model.write(folder)
            except OSError as error:
                raise artifact.write_problem(directory / model.name, error) from error
    table = "\n".join(model.row for model in models)
    dns_name = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    for text in _TEXTS:
        filled = _filled(text, name=name, table=table, dns_name=dns_name)
        artifact.write_bytes(directory / text, filled.encode())
    notes.print(
        f"Triton repository: {directory} ({', '.join(model.name for model in models)}); "
        f"how to start it: {directory / _TEXTS[0]}",
        markup=False,
        soft_wrap=True,
    )
    return tuple(model.name for model in models)


def require_replaceable(export: Path, directory: Path) -> None:
    """Make sure that nothing but what an earlier call wrote is replaced.

    Args:
        export: its name counts; it need not be there yet.
        directory: the repository.

    Raises:
        UsageError: something else is in the way.
    """
    if directory.resolve().is_relative_to(export.resolve()):
        raise UsageError(
            f"--triton {directory}: expected a directory outside the export {export}, found one "
            "inside it; give another"
        )
    told_by = {directory / text: directory / text for text in _TEXTS}
    models = (directory / f"{_name(export)}{kind}" for kind in _KINDS)
    told_by |= {model: model / "config.pbtxt" for model in models}
    for path, teller in told_by.items():
        if (path.exists() or path.is_symlink()) and not _is_ours(teller):
            raise UsageError(
                f"{path}: expected nothing there, or what an earlier --triton wrote, found "
                "something else; move it, or give another directory"
            )


def _is_ours(path: Path) -> bool:
    return path.is_file() and _OURS in path.read_text("utf-8", "replace").partition("\n")[0]


def _models(export: Export, name: str, notes: Console) -> Iterator[_Model]:
    """Yield what an export can be served as."""
    yield _Model(
        name,
        f"| `{name}` | python | `image` or `photo` (files) | microclip-deploy |",
        lambda folder: _write_python(export, name, folder),
    )
    if export.manifest.precision.startswith("int8"):
        notes.print(
            f"{name}_onnx is left out: Triton cannot tell ONNX Runtime to keep int8 products from "
            f"saturating, which they do on processors without VNNI; {name} serves the export",
            markup=False,
            soft_wrap=True,
        )
    else:
        yield _Model(
            f"{name}_onnx",
            f"| `{name}_onnx` | onnxruntime | `image` | nothing |",
            lambda folder: _write_onnx(export, f"{name}_onnx", folder),
        )
    engines = _newest(export)
    if engines:
        yield _Model(
            f"{name}_tensorrt",
            f"| `{name}_tensorrt` | tensorrt | `image` and `classifier` | TensorRT "
            f"{', '.join(sorted({each.manifest.target.tensorrt for each in engines}))} |",
            lambda folder: _write_tensorrt(export, engines, f"{name}_tensorrt", folder),
        )


def _name(export: Path) -> str:
    """Return the name of an export's directory as Triton, URLs and file systems take it."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", export.resolve().name).strip("_-") or "microclip"


def _newest(export: Export) -> list[Engines]:
    """Return the proven engines of TensorRT, for each compute capability the newest."""
    by_capability: dict[str, Engines] = {}
    for engines in current_engines(export):
        target = engines.manifest.target
        if target.flavour == TENSORRT and target.system == "Linux x86_64":
            by_capability[target.compute_capability] = engines
    return list(by_capability.values())


def _write_python(export: Export, name: str, folder: Path) -> None:
    version = folder / "1"
    version.mkdir()
    shutil.copytree(
        export.directory,
        version / "export",
        ignore=shutil.ignore_patterns(".*"),  # locks, and what is only being written
    )
    copied = read_export(version / "export")  # classes may have changed meanwhile
    artifact.write_bytes(version / "model.py", (_FILES / "model.py").read_bytes())
    logits, *others = _outputs(copied)
    probabilities = logits.model_copy(update={"name": "probabilities"})
    unknown = others[-1].model_copy(update={"name": "unknown"})
    outputs = [logits, probabilities, *others, unknown]
    _write_config("python.pbtxt", name, copied, outputs, folder)


def _write_onnx(export: Export, name: str, folder: Path) -> None:
    """Write the graph with the class matrix as a constant: Triton cannot batch it as an input."""
    import onnx
    from onnx import numpy_helper

    version = folder / "1"
    version.mkdir()
    model = onnx.load(export.directory / FULL, load_external_data=False)
    [inside] = (tensor for tensor in model.graph.initializer if tensor.name == "classifier")
    inside.CopyFrom(numpy_helper.from_array(export.classifier, "classifier"))
    [given] = (value for value in model.graph.input if value.name == "classifier")
    model.graph.input.remove(given)
    names = json.dumps(dict(enumerate(export.manifest.classes)), ensure_ascii=False)
    [stored] = (entry for entry in model.metadata_props if entry.key == "names")
    stored.value = names
    artifact.write_bytes(version / "model.onnx", model.SerializeToString())
    for shared in (file for file in export.stored["files"] if file.endswith(".data")):
        shutil.copy(export.directory / shared, version)
    _write_config("onnxruntime.pbtxt", name, export, _outputs(export), folder)


def _write_tensorrt(export: Export, engines: Sequence[Engines], name: str, folder: Path) -> None:
    version = folder / "1"
    version.mkdir()
    known = [each.manifest for each in engines]
    plans = {each.target.compute_capability: f"{each.target.folder}.plan" for each in known}
    for each, plan in zip(engines, plans.values(), strict=True):
        artifact.write_bytes(version / plan, each.plan(FULL_PLAN))
    classifier = export.manifest.classifier
    shutil.copy(export.directory / classifier, folder / CLASSIFIER)
    listed = (f'cc_model_filenames {{ key: "{cc}" value: "{plan}" }}' for cc, plan in plans.items())
    profiles = range(min(len(each.options.batches()) for each in known))
    _write_config(
        "tensorrt.pbtxt",
        name,
        export,
        _outputs(export),
        folder,
        batched=False,
        width=export.classifier.shape[1],
        most=min(each.options.batch.most for each in known),
        plans="\n".join(listed),
        profiles=", ".join(f'"{profile}"' for profile in profiles),
    )


def _outputs(export: Export) -> list[TensorSpec]:
    """Return the outputs of the whole graph that a prediction holds, logits first."""
    known = {each.name: each for each in export.manifest.graphs[FULL].outputs}
    names = ("logits", "cls", "fg", "mask", "attention", "complete")
    return [known[name] for name in names]


def _write_config(
    template: str,
    name: str,
    export: Export,
    outputs: Sequence[TensorSpec],
    folder: Path,
    *,
    batched: bool = True,
    **more: object,
) -> None:
    """Write labels and, last, the configuration."""
    classes, size = export.manifest.classes, export.manifest.preprocess.size
    artifact.write_bytes(folder / "labels.txt", "".join(f"{c}\n" for c in classes).encode())
    listed = ",\n".join(f"  {_output(each, len(classes), batched=batched)}" for each in outputs)
    text = _filled(
        template,
        name=name,
        size=size,
        max_batch=MAX_BATCH,
        preferred=", ".join(map(str, _PREFERRED)),
        outputs=f"output [\n{listed}\n]\n",
        queue=_filled("queue.pbtxt", timeout_us=TIMEOUT_S * 1_000_000, max_queue=MAX_QUEUE),
        warmup=_filled("warmup.pbtxt", size=size),
        **more,
    )
    artifact.write_bytes(folder / "config.pbtxt", text.encode())


def _output(spec: TensorSpec, classes: int, *, batched: bool) -> str:
    """Return an output as Triton's configuration has it; "batch" and "classes" may vary."""
    rest = spec.shape[1:]
    if batched:
        sizes = [classes if size == "classes" else size for size in rest]
    else:
        sizes = [-1, *(-1 if size == "classes" else size for size in rest)]
    # Every output needs a dimension beside the batch.
    reshape = "" if sizes else " reshape { shape: [ ] }"
    labels = ' label_filename: "labels.txt"' if batched and spec.name in _LABELLED else ""
    dims = ", ".join(map(str, sizes or [1]))
    kind = f'name: "{spec.name}" data_type: {_TYPES[spec.dtype]}'
    return f"{{ {kind} dims: [ {dims} ]{reshape}{labels} }}"


def _filled(template: str, **values: object) -> str:
    return Template((_FILES / template).read_text("utf-8")).substitute(values)
