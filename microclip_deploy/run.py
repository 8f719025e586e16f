"""One adaptation run on disk: inputs, lock, adaptation, checkpoint and report.

`inputs.json` is written before the first iteration and holds everything the result depends on, so
a killed run is resumed from its directory alone.
"""

import csv
import datetime
import io
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict

from microclip_deploy import artifact
from microclip_deploy.adapt import Adapted, Operation, Recipe, StepReport, Validator, adapt
from microclip_deploy.backbone import BackboneSpec, Clip
from microclip_deploy.checkpoint import build_model, write_checkpoint
from microclip_deploy.classes import ClassTexts
from microclip_deploy.config import validate
from microclip_deploy.data import AdaptImages
from microclip_deploy.errors import CheckpointError, UsageError
from microclip_deploy.images import printable
from microclip_deploy.sources import BadFile
from microclip_deploy.text import text_heads

INPUTS = "inputs.json"
STATE = "state"

UNINFORMATIVE_SHARE = 0.5
"""Above this share of complete graphs the saliency carries no information for most images."""

COLLAPSE_SHARE = 0.95
"""Above this share of all pseudo-labels one class has swallowed the others."""


class RunInputs(BaseModel):
    """Everything the result of a run depends on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["microclip.inputs/1"] = "microclip.inputs/1"
    backbone: BackboneSpec
    backbone_sha256: str
    recipe: Recipe
    classes: tuple[str, ...]
    descriptions: tuple[tuple[str, ...], ...]
    templates: tuple[str, ...]
    provenance: dict[str, str]
    images: tuple[str, ...]
    """Absolute paths of the images that were found good."""
    bad_images: tuple[tuple[str, str], ...]
    """Path and reason of the images that are skipped."""

    def texts(self) -> ClassTexts:
        """Return the class texts as the text encoder takes them."""
        return ClassTexts(self.classes, self.descriptions, self.templates, self.provenance)


def make_inputs(
    clip: Clip,
    recipe: Recipe,
    texts: ClassTexts,
    good: tuple[Path, ...],
    bad: tuple[BadFile, ...],
) -> RunInputs:
    """Gather what a new run depends on."""
    return RunInputs(
        backbone=clip.spec,
        backbone_sha256=clip.sha256,
        recipe=recipe,
        classes=texts.names,
        descriptions=texts.descriptions,
        templates=texts.templates,
        provenance=texts.provenance,
        images=tuple(str(path.absolute()) for path in good),
        bad_images=tuple((printable(file.path), file.reason) for file in bad),
    )


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the run directory; a lock left behind by a killed process does not count.

    Raises:
        UsageError: another process works in this directory.
        EnvironmentProblem: the directory cannot be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory / ".lock", timeout=0)
        with lock:
            yield
    except Timeout as error:
        raise UsageError(
            f"{directory}: another adaptation is running there; wait for it or give another --out"
        ) from error
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise artifact.write_problem(directory, error) from error


def require_unused(directory: Path, overwrite: bool) -> None:
    """Make sure that a new run does not mix with what is in the directory.

    Raises:
        UsageError: the directory holds files; only a run of ours is ever removed.
    """
    present = [path for path in directory.iterdir() if path.name != ".lock"]
    if not present:
        return
    if not overwrite:
        raise UsageError(
            f"{directory}: expected an empty directory, found {len(present)} entries; continue "
            "with --resume, replace the run with --overwrite, or give another --out"
        )
    if not (directory / INPUTS).is_file():
        raise UsageError(
            f"{directory}: --overwrite only replaces a run, and this is none; choose another"
        )
    for path in present:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def read_inputs(directory: Path) -> RunInputs:
    """Read the inputs of a run that is to be resumed."""
    stored = artifact.read_json(directory / INPUTS)
    try:
        return validate(RunInputs, stored)
    except UsageError as error:
        raise CheckpointError(f"{directory / INPUTS}: not the inputs of a run: {error}") from error


def write_inputs(directory: Path, inputs: RunInputs) -> None:
    """Write the inputs and the list of skipped images: the run exists from here on."""
    listed = "".join(f"{path}\t{reason}\n" for path, reason in inputs.bad_images)
    artifact.write_bytes(directory / "bad-images.txt", listed.encode())
    artifact.write_json(directory / "config.json", inputs.recipe.model_dump(mode="json"))
    artifact.write_json(directory / INPUTS, inputs.model_dump(mode="json"))


def execute(
    inputs: RunInputs,
    operation: Operation,
    clip: Clip,
    *,
    validator: Validator | None = None,
    on_step: Callable[[StepReport], None] = lambda _: None,
) -> dict[str, Any]:
    """Adapt and write the checkpoint; return its manifest's metrics and warnings.

    Raises:
        CheckpointError: the backbone's weights are not the ones the run began with.
        MicroclipError: as `adapt`.
    """
    if clip.sha256 != inputs.backbone_sha256:
        raise CheckpointError(
            f"backbone {clip.spec.model}: its weights changed since the run began; restore them or "
            "start again with --overwrite"
        )
    recipe = inputs.recipe
    heads = text_heads(clip.text, inputs.texts())
    model = build_model(
        clip,
        heads,
        ncut=recipe.ncut,
        cls_share=recipe.adapt.cls_share,
        pooling=recipe.adapt.pooling,
    )
    paths = [Path(path) for path in inputs.images]
    images = AdaptImages(paths, clip.preprocess, recipe.views, recipe.adapt.seed)
    adapted = adapt(
        model, images, clip.preprocess, recipe.adapt, operation, validate=validator, on_step=on_step
    )
    write_labels(operation.directory / "pseudo-labels.csv", inputs, adapted)
    content = _manifest_content(inputs, adapted.history)
    write_checkpoint(operation.directory, model, clip, heads, content)
    return content


def _manifest_content(inputs: RunInputs, history: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "package": {"name": "microclip-deploy", "version": version("microclip-deploy")},
        "created_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "config": inputs.recipe.model_dump(mode="json"),
        "classes": list(inputs.classes),
        "texts": {"templates": list(inputs.templates), "provenance": inputs.provenance},
        "images": {"used": len(inputs.images), "bad": len(inputs.bad_images)},
        "metrics": history[-1],
        "warnings": warnings_of(history[-1]),
    }


def write_labels(path: Path, inputs: RunInputs, adapted: Adapted) -> None:
    """Write the last pseudo-label of every image, as CSV with the columns path and class."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(("path", "class"))
    for image, label in zip(inputs.images, adapted.labels.tolist(), strict=True):
        writer.writerow((printable(image), inputs.classes[label]))
    artifact.write_bytes(path, text.getvalue().encode())


def warnings_of(epoch: Mapping[str, Any]) -> list[str]:
    """Return what the last epoch says that a user must know, each with its remedy."""
    found = []
    if epoch["complete_graphs"] > UNINFORMATIVE_SHARE:
        found.append(
            f"the saliency carries no information: {epoch['complete_graphs']:.0%} of the graphs "
            "join every pair of tokens; try --set ncut.affinity=centered_cosine"
        )
    counts = epoch["label_counts"]
    if max(counts) > COLLAPSE_SHARE * sum(counts):
        found.append(
            f"the pseudo-labels collapsed: one class holds {max(counts) / sum(counts):.0%} of the "
            "images; check the class names, or lower --set adapt.lr"
        )
    return found
