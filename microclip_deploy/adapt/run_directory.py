"""The directory of one adaptation run: its lock, its inputs, and what may be replaced.

`inputs.json` is written before the first iteration and holds everything the result depends on, so
a killed run is resumed from its directory alone.
"""

import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict

from microclip_deploy import artifact
from microclip_deploy.adapt.log import BOARD, HISTORY, METRICS
from microclip_deploy.adapt.reference import SEAL, VECTORS
from microclip_deploy.adapt.trainer import STATE, Recipe
from microclip_deploy.artifact import LOCK, exclusive
from microclip_deploy.config import validate
from microclip_deploy.data.archive import exists
from microclip_deploy.data.classes import ClassTexts
from microclip_deploy.data.contents import contents
from microclip_deploy.data.folder import BadFile
from microclip_deploy.data.location import absolute
from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.errors import CheckpointError, DataError, UsageError, printable
from microclip_deploy.model.checkpoint import WEIGHTS
from microclip_deploy.model.clip import BackboneSpec, Clip, require_same
from microclip_deploy.paths import Paths

INPUTS = "inputs.json"
CONFIG = "config.json"
BAD_IMAGES = "bad-images.txt"
LABELS = "pseudo-labels.csv"
REPORT = "report.html"
EVALUATION = "evaluation.json"

# The manifest first and the inputs last: a removal that is cut short leaves a run to resume.
_OURS = (
    artifact.MANIFEST, REPORT, EVALUATION, LABELS, WEIGHTS, STATE, METRICS, HISTORY, BOARD,
    BAD_IMAGES, CONFIG, SEAL, VECTORS, INPUTS,
)  # fmt: skip


OnProgress = Callable[[int, int], None]


class RunInputs(BaseModel):
    """Everything the result of a run depends on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["microclip.inputs/1"] = "microclip.inputs/1"
    backbone: BackboneSpec
    backbone_sha256: str
    architecture: dict[str, Any] | None = None
    """What decides the model's answers besides its weights."""
    backbone_preprocess: Preprocess | None = None
    recipe: Recipe
    classes: tuple[str, ...]
    descriptions: tuple[tuple[str, ...], ...]
    templates: tuple[str, ...]
    provenance: dict[str, str]
    images: tuple[str, ...]
    """Absolute paths of the images that were found good."""
    images_sha256: tuple[str, ...] | None = None
    """Hash of each image's file; None in inputs from before it was recorded."""
    bad_images: tuple[tuple[str, str], ...]
    """Path and reason of the images that are skipped."""
    left_out: dict[str, Any] = {}
    """Files that were not taken for images, as `LeftOut.to_json`."""
    copies: int = 0
    """Images with the same bytes as one before them."""
    remarks: tuple[str, ...] = ()
    """What reading the images told."""
    val_dir: str | None = None
    """Labelled images that are measured after each epoch; they do not change the result."""

    def texts(self) -> ClassTexts:
        """Return the class texts as the text encoder takes them."""
        return ClassTexts(self.classes, self.descriptions, self.templates, self.provenance)

    def preprocess(self, clip: Clip) -> Preprocess:
        """Return how this run makes network input of files."""
        return clip.preprocess.model_copy(update={"photos": self.recipe.photos})

    def require_model(self, clip: Clip) -> None:
        """Make sure that a model is the one the run began with, wherever it lies now.

        Raises:
            CheckpointError: its weights, architecture or preprocessing are others.
        """
        remedy = "restore what it was when the run began, or start again with --overwrite"
        require_same(clip, self.backbone_sha256, self.architecture, remedy=remedy)
        if self.backbone_preprocess not in (None, clip.preprocess):
            raise CheckpointError(
                f"backbone {clip.spec.model}: expected the preprocessing "
                f"{self.backbone_preprocess}, found {clip.preprocess}; {remedy}"
            )

    def require_images(self, on_progress: OnProgress | None = None) -> None:
        """Make sure that every image is still there and was not changed.

        Raises:
            DataError: one is gone or another one now; the result depends on each.
        """
        gone = [path for path in self.images if not exists(path)]
        if gone:
            raise DataError(
                f"{len(gone)} images of this run are gone, the first is {printable(gone[0])}; put "
                "them back, say with --images where they are now, or start again with --overwrite"
            )
        if self.images_sha256 is None:
            return
        now = contents(Paths(self.images), on_progress)
        pairs = zip(self.images, self.images_sha256, now, strict=True)
        changed = [path for path, before, after in pairs if before != after]
        if changed:
            raise DataError(
                f"{len(changed)} of {len(self.images)} images of this run were changed since it "
                f"began, the first is {printable(changed[0])}; put the former ones back, say with "
                "--images where they are, or start again with --overwrite"
            )

    def moved_to(self, paths: Sequence[Path], on_progress: OnProgress | None = None) -> Self:
        """Return the inputs with the same images at other places, found by what they hold.

        Args:
            paths: files among which each of the run's images is, under any name.
            on_progress: called with (done, total).

        Raises:
            UsageError: one is not among them, or the inputs do not tell what the images held.
        """
        if self.images_sha256 is None:
            raise UsageError(
                "--images: expected the images at the paths of this run, found others; it began "
                "before their contents were recorded: put them back, or start with --overwrite"
            )
        places: dict[str | None, list[str]] = {}
        for path, held in zip(paths, contents(paths, on_progress), strict=True):
            places.setdefault(held, []).append(absolute(path))
        missing = [
            path
            for path, held in zip(self.images, self.images_sha256, strict=True)
            if held not in places
        ]
        if missing:
            raise UsageError(
                f"--images: expected the {len(self.images)} images of this run, under any names, "
                f"found all but {len(missing)}, the first was {printable(missing[0])}; give the "
                "place where they are unchanged, or start again with --overwrite"
            )
        # Of copies each stands for one, as long as there are any left.
        images = [
            found.pop(0) if len(found := places[held]) > 1 else found[0]
            for held in self.images_sha256
        ]
        return self.model_copy(update={"images": tuple(images)})


def make_inputs(
    clip: Clip,
    recipe: Recipe,
    texts: ClassTexts,
    *,
    good: Sequence[Path],
    bad: tuple[BadFile, ...] = (),
    val_dir: Path | None = None,
    on_progress: OnProgress | None = None,
    **noticed: Any,
) -> RunInputs:
    """Gather what a new run depends on.

    Args:
        clip: the model.
        recipe: all settings.
        texts: of the classes.
        good: images.
        bad: images that are skipped.
        val_dir: labelled images.
        on_progress: called with (done, total) images.
        noticed: further fields that tell about the images.

    Raises:
        DataError: an image cannot be read any more.
    """
    held = contents(good, on_progress)
    if None in held:
        raise DataError(
            f"{printable(good[held.index(None)])}: expected the image that was just checked, found "
            "none; let nothing change the images and run again"
        )
    return RunInputs(
        backbone=clip.spec,
        backbone_sha256=clip.sha256,
        architecture=clip.architecture,
        backbone_preprocess=clip.preprocess,
        recipe=recipe,
        classes=texts.names,
        descriptions=texts.descriptions,
        templates=texts.templates,
        provenance=texts.provenance,
        images=tuple(map(absolute, good)),
        images_sha256=tuple(map(str, held)),
        bad_images=tuple((printable(file.path), file.reason) for file in bad),
        copies=len(held) - len(set(held)),
        val_dir=str(val_dir.absolute()) if val_dir else None,
        **noticed,
    )


def locked(directory: Path) -> AbstractContextManager[None]:
    """Hold the run directory.

    Raises:
        UsageError: another process works in this directory.
        EnvironmentProblem: the directory cannot be made or locked.
    """
    return exclusive(
        directory, "another adaptation is running there; wait for it or give another --out"
    )


def require_replaceable(directory: Path, overwrite: bool) -> None:
    """Make sure that a new run does not mix with what is in the directory.

    Raises:
        UsageError: the directory holds a run and `overwrite` is not set, or foreign files only.
    """
    present = {path.name for path in directory.iterdir() if not _is_rest(path)} - {LOCK}
    if not present:
        return
    if not overwrite:
        raise UsageError(
            f"{directory}: expected an empty directory, found {len(present)} entries; continue "
            "with --resume, replace the run with --overwrite, or give another --out"
        )
    if not present & set(_OURS):
        raise UsageError(
            f"{directory}: --overwrite only replaces a run, and this is none; choose another"
        )


def remove_run(directory: Path) -> None:
    """Remove the files of an older run and nothing else."""
    rests = [path for path in directory.iterdir() if _is_rest(path)]
    for path in [*rests, *(directory / name for name in _OURS)]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def read_inputs(directory: Path) -> RunInputs:
    """Read the inputs of a run that is to be resumed.

    Raises:
        CheckpointError: they are missing or damaged.
    """
    stored = artifact.read_json(directory / INPUTS)
    try:
        return validate(RunInputs, stored)
    except UsageError as error:
        raise CheckpointError(f"{directory / INPUTS}: not the inputs of a run: {error}") from error


def write_inputs(directory: Path, inputs: RunInputs) -> None:
    """Write the inputs: the run exists from here on."""
    artifact.write_json(directory / INPUTS, inputs.model_dump(mode="json"))
    artifact.write_json(directory / CONFIG, inputs.recipe.model_dump(mode="json"))
    listed = "".join(f"{path}\t{reason}\n" for path, reason in inputs.bad_images)
    artifact.write_bytes(directory / BAD_IMAGES, listed.encode())


def _is_rest(path: Path) -> bool:
    """Say whether a file is what a killed write left behind."""
    return path.name.startswith(".") and path.name.endswith(".part")
