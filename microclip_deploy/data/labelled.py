"""Labelled images: files with the index of their class, for measuring and nothing else."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from microclip_deploy.data.folder import LeftOut
from microclip_deploy.data.names import NameIndex
from microclip_deploy.data.sources import ImageSet, list_images
from microclip_deploy.errors import DataError, printable
from microclip_deploy.paths import StrPath, as_path

_SHOWN = 5  # labels an error message lists


@dataclass(frozen=True)
class LabelledImages:
    """Image files with the index of their class."""

    paths: Sequence[Path]
    labels: NDArray[np.int64]
    """(M,), indices into the session's classes."""
    left_out: LeftOut = field(default_factory=LeftOut)

    @classmethod
    def read(
        cls, data: StrPath, classes: Sequence[str], listed: ImageSet | None = None
    ) -> "LabelledImages":
        """List labelled images and match their labels to class names.

        A label matches the class of exactly that name; otherwise the one class that `NameIndex`
        finds without regard to case, underscores, hyphens and look-alike characters.

        Args:
            data: folder whose first-level folders are class names, or a .csv/.tsv with `label`.
            classes: names in the order of the logits.
            listed: what `list_images` found there, if that is known.

        Raises:
            DataError: nothing is there, an image has no label, or a label is no class.
        """
        data = as_path(data, "labelled images")
        found = listed or list_images(data)
        missing = [path for path, label in zip(found.paths, found.labels, strict=True) if not label]
        if missing:
            remedy = (
                "put images into folders named after their class, or give a .csv with the columns "
                "path and label"
                if data.is_dir()
                else "give a .csv with the columns path and label, both filled in every line"
            )
            raise DataError(
                f"{printable(data)}: expected a class for every image, found none for "
                f"{len(missing)} of {len(found.paths)}, such as {printable(missing[0])}; {remedy}"
            )
        labels = [label or "" for label in found.labels]
        index = _class_indices(Counter(labels), classes)
        indices = np.array([index[label] for label in labels], np.int64)
        return cls(found.paths, indices, found.left_out)


def _class_indices(labels: Mapping[str, int], classes: Sequence[str]) -> dict[str, int]:
    """Return the class index of every label; refuse the unknown ones."""
    index = NameIndex(classes)
    found = {label: index.find(label) for label in labels}
    unknown = [label for label, row in found.items() if row is None]
    if unknown:
        named = "; ".join(_near(label, labels[label], index) for label in unknown[:_SHOWN])
        more = f"; and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
        numbers = "give names in place of numbers" if all(map(str.isdecimal, unknown)) else None
        raise DataError(
            f"labels: expected names of the model's {len(classes)} classes, found {named}{more}; "
            f"{numbers or 'rename the folders or labels'}, or evaluate a model of these classes"
        )
    return {label: row for label, row in found.items() if row is not None}


def _near(label: str, count: int, index: NameIndex) -> str:
    images = "1 image" if count == 1 else f"{count} images"
    close = index.near(label, count=3)
    hint = f", near {', '.join(map(repr, close))}" if close else ""
    return f"{printable(label)!r} ({images}{hint})"
