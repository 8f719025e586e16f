"""What adaptation came to: a second look at the photos, a verdict, a calibration."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from microclip_deploy.adapt.loader import AdaptImages, refuse_lost
from microclip_deploy.adapt.reference import Reference
from microclip_deploy.calibrating import calibrate, sample
from microclip_deploy.calibration import Calibration
from microclip_deploy.data.sources import read_batches
from microclip_deploy.head import fused_logits
from microclip_deploy.model.clip import exact_float32
from microclip_deploy.model.microclip import MicroCLIP
from microclip_deploy.verdict import Verdict, verdict

_BATCH = 64


class Seen(NamedTuple):
    """The photos as the adapted model sees them, or so many of a large folder, spread evenly."""

    rows: NDArray[np.int64]
    """(N,) positions among the photos."""
    cls: NDArray[np.float32]
    """(N, E), unit rows."""
    fg: NDArray[np.float32]
    """(N, E), unit rows."""

    def logits(self, model: MicroCLIP) -> NDArray[np.float32]:
        """Return TokenFusion's logits, float32 (N, C)."""
        classifier = model.class_matrix().detach().float().cpu().numpy()
        return np.asarray(fused_logits(self.cls, self.fg, classifier, np.float32(model.cls_share)))


class Outcome(NamedTuple):
    """What is believed of an adapted model."""

    verdict: Verdict
    calibration: Calibration
    rolled_back: tuple[int, ...]
    """Classes whose rows are zero-shot's again."""


def judge(
    model: MicroCLIP,
    images: AdaptImages,
    reference: Reference,
    *,
    expected_accuracy: float,
    rollback: bool,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Outcome:
    """Look at the photos once more; with `rollback` change the rows of classes that were harmed.

    Args:
        model: adapted.
        images: the photos.
        reference: of them.
        expected_accuracy: 0 to 1, for the calibration.
        rollback: unless the verdict is "adapted", give classes whose photos agree less with their
            neighbours than before the rows of the frozen head again.
        progress: called with (done, total) photos.

    Raises:
        DataError: a photo cannot be read any more; the run depends on it.
        VerificationError: the model's answers are no finite numbers.
    """
    seen = look_again(model, images, progress)
    before, classes = reference.labels(seen.rows), len(model.classifier)
    logits = seen.logits(model)
    found = verdict(seen.cls, before, logits.argmax(axis=1), classes, seen.rows)
    # Where adaptation is believed to help, rows that look harmed are better left as they are.
    rolled_back = found.harmed if rollback and found.decision != "adapted" else ()
    if rolled_back:
        with torch.no_grad():
            model.classifier[list(rolled_back)] = model.frozen[list(rolled_back)]
        logits = seen.logits(model)
        found = verdict(seen.cls, before, logits.argmax(axis=1), classes, seen.rows)
    return Outcome(found, calibrate(logits, expected_accuracy), rolled_back)


@torch.no_grad()
@exact_float32
def look_again(model: MicroCLIP, images: AdaptImages, progress: Callable[[int, int], None]) -> Seen:
    """Return the photos' test views as the model sees them."""
    rows, parts = sample(len(images.paths), len(model.classifier)), []
    paths = [images.paths[row] for row in rows]
    for batch in read_batches(paths, images.preprocess, _BATCH, on_bad=refuse_lost):
        pixels = torch.from_numpy(batch.images).permute(0, 3, 1, 2).to(model.frozen.device)
        said = model(images.preprocess.normalize(pixels))
        parts.append([token.float().cpu().numpy() for token in (said.cls, said.fg)])
        progress(int(batch.indices[-1]) + 1, len(paths))
    cls, fg = (np.concatenate(token) for token in zip(*parts, strict=True))
    return Seen(rows, cls, fg)
