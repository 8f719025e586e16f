"""Where masks lie and how far they are the true ones: what an evaluation tells of the saliency."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from microclip_deploy.data.formats import image_endings, readable
from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.errors import DataError, printable
from microclip_deploy.ncut.foreground import on_border

Bools = NDArray[np.bool_]

PROBABLY_INVERTED = 0.5
"""Share of hugging masks from which on an evaluation warns."""


@dataclass(frozen=True)
class MaskFacts:
    """What the masks of all images have in common; shares are between 0 and 1."""

    share: float
    """Mean share of tokens in the foreground."""
    whole: float
    """Share of images whose mask is the whole image; every undefined cut is among them."""
    complete: float
    """Share of images whose graph joins every pair of tokens."""
    border: float
    """Mean share of the image's border tokens that are in the foreground, where it is not whole."""
    hugging: float
    """Share of these images whose mask holds more of the border than of what lies inside."""
    agreement: float
    """Share of images for which [CLS] alone and [FG] alone name the same class."""
    true_masks: int = 0
    """Images whose true mask is known."""
    overlap: float | None = None
    """Mean intersection over union with true masks."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Return what a terminal shows."""
        told = [
            f"masks: {self.share:.1%} of the image, {self.border:.1%} of its border; "
            f"{self.hugging:.1%} hug the border, {self.complete:.1%} of the graphs are complete",
            f"[CLS] and [FG] name the same class in {self.agreement:.1%} of the images",
        ]
        if self.overlap is not None:
            iou = f"{100 * self.overlap:.1f} %"
            told.append(f"overlap with {self.true_masks} true masks (IoU): {iou}")
        return told

    def warning(self) -> str | None:
        """Return advice where most masks seem to show the background."""
        if self.hugging <= PROBABLY_INVERTED or self.whole == 1:
            return None
        return (
            f"the saliency is probably inverted: {self.hugging:.0%} of the masks hold more of the "
            "image's border than of its inside; look at predict --overlay, and where the masks "
            "show the background adapt again with --recipe object, or with --set ncut.side=cls if "
            "that recipe made them"
        )


@dataclass
class MaskTally:
    """The masks seen so far; memory does not grow."""

    images: int = 0
    complete: int = 0
    whole: int = 0
    hugging: int = 0
    agreeing: int = 0
    true_masks: int = 0
    share: float = 0.0
    border: float = 0.0
    overlap: float = 0.0

    def add(self, mask: Bools, complete: Bools, agree: Bools) -> None:
        """Count images.

        Args:
            mask: bool (B, N).
            complete: bool (B,), the graph joins every pair.
            agree: bool (B,), [CLS] and [FG] name the same class.
        """
        self.agreeing += int(agree.sum())
        whole = mask.all(axis=1)
        self.images += len(mask)
        self.complete += int(complete.sum())
        self.whole += int(whole.sum())
        self.share += float(mask.mean(axis=1).sum())
        told, border = mask[~whole], on_border(mask)[0]
        outside = told[:, border].mean(axis=1)
        inside = told[:, ~border].mean(axis=1) if not border.all() else outside
        self.border += float(outside.sum())
        self.hugging += int((outside > inside).sum())

    def compare(self, mask: Bools, truth: Bools) -> None:
        """Count masks bool (B, N) beside true ones."""
        self.true_masks += len(truth)
        self.overlap += float(overlap(mask, truth).sum())

    def result(self) -> MaskFacts:
        """Return the means."""
        told = max(self.images - self.whole, 1)
        return MaskFacts(
            share=self.share / self.images,
            whole=self.whole / self.images,
            complete=self.complete / self.images,
            border=self.border / told,
            hugging=self.hugging / told,
            agreement=self.agreeing / self.images,
            true_masks=self.true_masks,
            overlap=self.overlap / self.true_masks if self.true_masks else None,
        )


def overlap(mask: Bools, truth: Bools) -> NDArray[np.float64]:
    """Return intersection over union of bool (..., N): (...); 0 where both are empty."""
    union = (mask | truth).sum(axis=-1)
    shared: NDArray[np.float64] = (mask & truth).sum(axis=-1) / np.maximum(union, 1)
    return shared


@dataclass(frozen=True)
class TrueMasks:
    """Files of true masks, by the names of their images."""

    files: Mapping[str, Path] = field(default_factory=dict)

    @classmethod
    def find(cls, folder: Path, images: Sequence[Path]) -> Self:
        """Look for `DIR/CLASS/NAME.*` and then `DIR/NAME.*` for each image CLASS/NAME.

        The latter only where no other image has the name.

        Raises:
            DataError: no image has one.
        """
        found: dict[str, Path] = {}
        for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
            if path.suffix.lower() in image_endings() and path.is_file():
                found.setdefault(path.relative_to(folder).with_suffix("").as_posix(), path)
        named, files = Counter(image.stem for image in images), {}
        for image in images:
            alone = [image.stem] if named[image.stem] == 1 else []
            for name in (f"{image.parent.name}/{image.stem}", *alone):
                if name in found:
                    files[str(image)] = found[name]
                    break
        if not files:
            raise DataError(
                f"--masks {printable(folder)}: expected a folder with files named like the images, "
                f"such as {printable(images[0].parent.name)}/{printable(images[0].stem)}.png, "
                "found none; give the folder of the masks"
            )
        return cls(files)

    def read(self, image: Path, preprocess: Preprocess, count: int) -> Bools | None:
        """Return which of N tokens lie on the object, bool (N,); None where no file tells.

        A token does where more than half of its square is. In the file the object is opaque, or,
        where nothing is transparent, brighter than half of the brightest value.

        Raises:
            DataError: the file is no image, or has not the photo's proportions.
        """
        path = self.files.get(str(image))
        if path is None:
            return None
        drawn = _drawn(path)
        _require_proportions(path, drawn.shape[::-1], preprocess.read(image).size)
        binary = Image.fromarray(drawn.astype(np.uint8) * 255).convert("RGB")
        # What a view adds around a photo is no object, whatever its colour.
        view = preprocess.model_copy(update={"fill_color": 0}).test_view(binary)[:, :, 0] > 127
        side = round(count**0.5)
        squares = view.reshape(side, len(view) // side, side, len(view) // side)
        covered: Bools = squares.mean(axis=(1, 3)).ravel() > 0.5
        return covered


def _drawn(path: Path) -> Bools:
    """Return which pixels of a file are the object, bool (H, W).

    Raises:
        DataError: it is no image.
    """
    try:
        with Image.open(path, formats=readable()) as opened:
            shown = opened if opened.mode[0] in "IF" else opened.convert("L")
            if opened.has_transparency_data:
                alpha = opened.convert("RGBA").getchannel("A")
                # Many programs save an alpha channel that says nothing.
                shown = alpha if alpha.getextrema() != (255, 255) else shown
            values = np.asarray(shown)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            f"--masks {printable(path)}: expected an image, found: {error}; repair or remove it"
        ) from error
    drawn: Bools = values > values.max() / 2
    return drawn


def _require_proportions(path: Path, mask: tuple[int, ...], photo: tuple[int, int]) -> None:
    """Refuse a mask that lies elsewhere than its photo; sides may be rounded to pixels.

    Raises:
        DataError: it does.
    """
    if abs(mask[0] * photo[1] - mask[1] * photo[0]) > max(photo):
        raise DataError(
            f"--masks {printable(path)}: expected the proportions of its photo, which upright is "
            f"{photo[0]} x {photo[1]} pixels, found {mask[0]} x {mask[1]}; turn or cut the mask as "
            "the photo, or remove it"
        )
