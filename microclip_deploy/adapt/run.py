"""One adaptation run: inputs -> adapted model -> checkpoint, pseudo-labels and warnings."""

import csv
import datetime
import io
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from microclip_deploy import artifact
from microclip_deploy.adapt.frequencies import estimate, warning
from microclip_deploy.adapt.loader import AdaptImages
from microclip_deploy.adapt.outcome import Outcome, judge
from microclip_deploy.adapt.reference import look_at
from microclip_deploy.adapt.run_directory import LABELS, RunInputs
from microclip_deploy.adapt.trainer import Adapted, Operation, Prior, StepReport, Validator, adapt
from microclip_deploy.errors import printable
from microclip_deploy.model.checkpoint import build_model, write_checkpoint
from microclip_deploy.model.clip import Clip
from microclip_deploy.model.text import TextHeads, cut_warning
from microclip_deploy.model.weights import file_warning
from microclip_deploy.ncut.spec import saliency_warning
from microclip_deploy.paths import Paths
from microclip_deploy.verdict import effective_classes

COLLAPSE_SHARE = 0.95
"""Above this share of all pseudo-labels one class has swallowed the others."""


def execute(
    inputs: RunInputs,
    operation: Operation,
    clip: Clip,
    heads: TextHeads,
    *,
    validator: Validator | None = None,
    on_look: Callable[[int, int], None] = lambda done, total: None,
    on_prior: Callable[[Prior], None] = lambda _: None,
    on_step: Callable[[StepReport], None] = lambda _: None,
) -> dict[str, Any]:
    """Adapt and write the checkpoint; return the content of its manifest.

    Of several processes the first one writes; the others help it to adapt and return nothing.

    Args:
        inputs: what the run depends on.
        operation: how it is carried out.
        clip: the model that the inputs name.
        heads: `text_heads` of it and of the inputs' texts.
        validator: as for `adapt`.
        on_look: called with (done, total) images while they are looked at before and after.
        on_prior: told what zero-shot has seen, before training.
        on_step: as for `adapt`.

    Raises:
        MicroclipError: as `adapt`.
    """
    recipe, clip = inputs.recipe, clip._replace(preprocess=inputs.preprocess(clip))
    model = build_model(
        clip,
        heads,
        ncut=recipe.ncut,
        cls_share=recipe.adapt.cls_share,
        pooling=recipe.adapt.pooling,
    )
    paths = Paths(inputs.images)
    images = AdaptImages(paths, clip.preprocess, recipe.views, recipe.adapt.seed)
    ranks = operation.ranks
    reference = ranks.first(lambda: look_at(operation.directory, model, images, on_look))
    joint = reference.joint() if recipe.adapt.joint_share > 0 else None
    prior = Prior(reference, estimate(reference.probabilities), joint)
    on_prior(prior)
    adapted = adapt(
        model, images, recipe.adapt, operation, prior=prior, validate=validator, on_step=on_step
    )
    ranks.leave()
    if not ranks.leads:
        return {}
    write_labels(operation.directory / LABELS, inputs, adapted)
    outcome = judge(
        model,
        images,
        reference,
        # How often the last epoch's strong views agreed with their pseudo-labels: two views of a
        # photo and two states of the model, as near to the accuracy as anything known here.
        expected_accuracy=adapted.history[-1]["agreement"],
        rollback=recipe.adapt.rollback,
        progress=on_look,
    )
    believed = belief(outcome, prior.frequencies, inputs.classes)
    content = manifest_content(inputs, adapted.history) | believed
    content["warnings"] += _doubts(inputs, clip, prior)
    write_checkpoint(operation.directory, model, clip, heads, content)
    return content


def _doubts(inputs: RunInputs, clip: Clip, prior: Prior) -> list[str]:
    """Return what is doubtful about photos, model and texts, whatever was learnt."""
    found = (
        warning(prior.frequencies, len(inputs.images), inputs.recipe.adapt),
        file_warning(clip.spec.model, clip.spec.pretrained),
        cut_warning(clip.text, inputs.texts()),
    )
    return [doubt for doubt in found if doubt]


def belief(
    outcome: Outcome, frequencies: NDArray[np.float64], classes: Sequence[str]
) -> dict[str, Any]:
    """Return the manifest fields that say what is believed of photos and the adapted model."""
    return {
        "frequencies": {
            "effective_classes": effective_classes(frequencies),
            "estimated": frequencies.tolist(),
        },
        "verdict": outcome.verdict.model_dump(mode="json"),
        "rolled_back": [classes[c] for c in outcome.rolled_back],
        "calibration": outcome.calibration.model_dump(mode="json"),
    }


def manifest_content(inputs: RunInputs, history: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the manifest fields that loading does not need but people do."""
    return {
        "package": {"name": "microclip-deploy", "version": version("microclip-deploy")},
        "created_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "config": inputs.recipe.model_dump(mode="json"),
        "classes": list(inputs.classes),
        "texts": {"templates": list(inputs.templates), "provenance": inputs.provenance},
        "images": {
            "used": len(inputs.images),
            "bad": len(inputs.bad_images),
            "copies": inputs.copies,
            "left_out": inputs.left_out,
            "remarks": list(inputs.remarks),
        },
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
    saliency = saliency_warning(epoch["complete_graphs"])
    found = [saliency] if saliency else []
    counts = epoch["label_counts"]
    if max(counts) > COLLAPSE_SHARE * sum(counts):
        found.append(
            f"the pseudo-labels collapsed: one class holds {max(counts) / sum(counts):.0%} of the "
            "images; check the class names, or lower --set adapt.lr"
        )
    return found
