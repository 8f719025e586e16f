"""Add and remove classes of an export: its class matrix is replaced, its graphs stay as they are.

    classifier-XXXXXXXX.safetensors   1. the new matrix, under a name of its own
    manifest.json                     2. names it: from here on the classes have changed
    the old matrix                    3. is deleted

An interruption leaves the old classes before 2 and the new ones after it. Sessions that are
open keep the matrix they read.

The row of an added class is what CLIP's text tower says of it, where adaptation would have begun;
no photo was ever compared with it. Of its frequency nothing is known: the calibration takes the
geometric mean of the others'. Only `add_classes` needs PyTorch.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from microclip_deploy import artifact
from microclip_deploy.artifact import exclusive
from microclip_deploy.calibration import Calibration
from microclip_deploy.data.classes import ClassTexts, read_descriptions
from microclip_deploy.data.names import NameIndex, clean_name, name_key
from microclip_deploy.errors import DataError, UsageError, require
from microclip_deploy.serving.exported import CLASSIFIER, SCHEMA, Export, read_export

# The names this module gives, for what an interrupted change left behind.
_REPLACED = f"classifier-{'[0-9a-f]' * 8}.safetensors"


class ClassRow(NamedTuple):
    """A class of an export."""

    name: str
    adapted: bool
    """False where the class was added later, so that its accuracy is zero-shot."""

    def to_json(self) -> dict[str, str | bool]:
        """Return plain values."""
        return {"class": self.name, "adapted": self.adapted}


def list_classes(directory: Path) -> tuple[ClassRow, ...]:
    """Return the classes of an export in the order of its class matrix.

    Raises:
        CheckpointError: the export is missing or damaged.
    """
    manifest = read_export(directory).manifest
    return _rows(manifest.classes, manifest.unadapted)


def add_classes(
    directory: Path,
    names: Sequence[str],
    descriptions: Path | None = None,
    *,
    model: str | None = None,
    pretrained: str | None = None,
) -> tuple[ClassRow, ...]:
    """Append classes with the rows that adaptation would have begun with.

    Args:
        directory: the export.
        names: new ones.
        descriptions: sentences for each of them, as for `classes.read_descriptions`; None puts the
            names into the export's templates.
        model: where the CLIP model lies now, "local-dir:PATH" or "hf-hub:ORG/REPO"; None for
            where it was adapted from. Its weights must be the same.
        pretrained: where its .safetensors file lies now, if the model was one of those.

    Returns:
        All classes as they are now, the added ones last.

    Raises:
        UsageError: no name, an empty one, one that is there already, or another process changes
            the classes.
        DataError: a name is refused by `clean_name`, the descriptions do not fit the names, or the
            model does not tell a class from another one.
        CheckpointError: the export is missing or damaged, or its CLIP is another one now.
        EnvironmentProblem: PyTorch or open_clip is missing, or the export cannot be written.

    Source: docs/numerics.md section 4, Θ.
    """
    with _held(directory) as export:
        old = export.manifest
        texts = _texts(_new_names(names, old.classes), descriptions, old.templates)
        rows = _text_rows(export, texts, model, pretrained)
        matrix = np.concatenate([export.classifier, rows])
        known = old.calibration and old.calibration.with_classes_added(len(texts.names))
        return _replace(
            export, matrix, (*old.classes, *texts.names), (*old.unadapted, *texts.names), known
        )


def new_names(directory: Path, names: Sequence[str]) -> tuple[str, ...]:
    """Return names as `add_classes` would give them to classes.

    Raises:
        UsageError: no name, an empty one, or one that is there already.
        DataError: a name is refused by `clean_name`.
        CheckpointError: the export is missing or damaged.
    """
    return _new_names(names, read_export(directory).manifest.classes)


def remove_classes(directory: Path, names: Sequence[str]) -> tuple[ClassRow, ...]:
    """Remove classes and their rows, for good: added again they would be unadapted.

    Args:
        directory: the export.
        names: as `list_classes` spells them.

    Returns:
        The classes that remain.

    Raises:
        UsageError: a name is unknown, fewer than two classes would remain, or another process
            changes the classes.
        CheckpointError: the export is missing or damaged.
        EnvironmentProblem: the export cannot be written.
    """
    with _held(directory) as export:
        classes = export.manifest.classes
        removed = {_known_name(name, classes) for name in names}
        kept = [row for row, name in enumerate(classes) if name not in removed]
        if len(kept) < 2:
            raise UsageError(
                f"{directory}: expected at least 2 classes to remain, found {len(kept)}; remove "
                "fewer, or add others first"
            )
        remaining = tuple(classes[row] for row in kept)
        unadapted = tuple(name for name in export.manifest.unadapted if name not in removed)
        known = export.manifest.calibration and export.manifest.calibration.of_classes(kept)
        return _replace(export, export.classifier[kept], remaining, unadapted, known)


def _rows(classes: Iterable[str], unadapted: Iterable[str]) -> tuple[ClassRow, ...]:
    marked = frozenset(unadapted)
    return tuple(ClassRow(name, name not in marked) for name in classes)


def _new_names(given: Sequence[str], classes: Sequence[str]) -> tuple[str, ...]:
    """Return the names cleaned as class lists are; refuse empty ones and duplicates."""
    known = {name_key(name): name for name in classes}
    names: list[str] = []
    for text in given:
        name = clean_name(text, f"class {text!r}")
        if not name:
            raise UsageError("classes: expected names, found an empty one; leave it out")
        first = known.get(name_key(name))
        if first is not None:
            place = "in the export" if first in classes else "given too"
            raise UsageError(
                f"class '{name}': expected every class once, found '{first}' {place}; rename one "
                "or leave it out"
            )
        known[name_key(name)] = name
        names.append(name)
    if not names:
        raise UsageError("classes: expected at least one name, found none; give one")
    return tuple(names)


def _known_name(text: str, classes: Sequence[str]) -> str:
    name = clean_name(text, f"class {text!r}")
    if name in classes:
        return name
    close = NameIndex(classes).near(name)
    hint = f"did you mean '{close[0]}'?" if close else "`classes list` shows them"
    raise UsageError(f"class '{name}': expected a class of the export, found none; {hint}")


def _texts(
    names: tuple[str, ...], descriptions: Path | None, templates: tuple[str, ...]
) -> ClassTexts:
    """Return the sentences of new classes."""
    if descriptions is None:
        filled = tuple(tuple(t.replace("{}", name) for t in templates) for name in names)
        return ClassTexts(names, filled, templates)
    return ClassTexts(names, read_descriptions(descriptions, names).texts, templates)


def _text_rows(
    export: Export, texts: ClassTexts, model: str | None, pretrained: str | None
) -> NDArray[np.float32]:
    """Encode texts with the CLIP behind the export: float32 (new classes, E), unit rows."""
    require("microclip_deploy.model.text", "adapt")  # names whichever package below it is missing
    import torch

    from microclip_deploy.model.clip import BackboneSpec, load_clip, require_same
    from microclip_deploy.model.text import first_same, text_heads

    parent = export.manifest.parent
    # A model at another place names its weights itself, unless their file is given too.
    stored = None if model else parent.pretrained
    clip = load_clip(BackboneSpec(model=model or parent.model, pretrained=pretrained or stored))
    remedy = (
        "restore the old weights, name where they are with --model or --pretrained, or adapt and "
        "export again"
    )
    require_same(clip, parent.backbone_sha256, parent.architecture, remedy=remedy)
    rows = text_heads(clip.text, texts).initial
    classes = export.manifest.classes
    read = {clip.text.tokens(name): name for name in reversed(classes)}
    same = first_same(rows, torch.from_numpy(export.classifier))
    for name, place in zip(texts.names, same, strict=True):
        alike = read.get(clip.text.tokens(name)) if place is None else classes[place]
        if alike is not None:
            raise DataError(
                f"class '{name}': expected texts that the model tells apart, found the same as for "
                f"'{alike}' in the export; spell it otherwise, or leave it out"
            )
    return rows.numpy()


def _replace(
    export: Export,
    matrix: NDArray[np.float32],
    classes: tuple[str, ...],
    unadapted: tuple[str, ...],
    calibration: Calibration | None,
) -> tuple[ClassRow, ...]:
    """Replace class matrix and names; the manifest is the moment when it happens."""
    directory, old = export.directory, export.manifest.classifier
    content = save({"classifier": np.ascontiguousarray(matrix)})
    new = f"classifier-{hashlib.sha256(content).hexdigest()[:8]}.safetensors"
    artifact.write_bytes(directory / new, content)
    files = {name: entry for name, entry in export.stored["files"].items() if name != old}
    stored = calibration.model_dump(mode="json") if calibration else None
    fields = {
        "classes": classes,
        "unadapted": unadapted,
        "classifier": new,
        "calibration": stored,
        "files": files,
    }
    artifact.rewrite_manifest(directory, {**export.stored, **fields}, [new])
    for path in {directory / old, directory / CLASSIFIER, *directory.glob(_REPLACED)}:
        if path.name not in {new, *files}:
            with suppress(OSError):  # a leftover costs some bytes; the change is done
                path.unlink()
    return _rows(classes, unadapted)


@contextmanager
def _held(directory: Path) -> Iterator[Export]:
    """Hold an export and read it.

    Raises:
        UsageError: another process changes the classes.
        CheckpointError: the directory is no export.
        EnvironmentProblem: the directory cannot be locked.
    """
    if artifact.read_schema(directory) != SCHEMA:
        read_export(directory)  # says so, and no lock file is left in what is no export
    busy = "another process is changing the classes; wait for it and run again"
    with exclusive(directory, busy):
        yield read_export(directory)
