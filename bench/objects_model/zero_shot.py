"""What a tiny CLIP does with scenes before any adaptation, and what saliency is worth to it.

    python -m microclip_deploy.bench.objects_model.zero_shot SHEETS [--split test]
    ... --model demo-objects --model local-dir:seed-1 --model local-dir:seed-2

The first table holds each model against the conditions of a claim (`WANTED`). In the others rows
are what is read out: [CLS], the mean of all tokens, [FG] by the mask of each rule of the cut, and
[FG] by the true mask, which only the renderer knows; alone and added to [CLS]. Intervals are 1.96
standard errors of the paired difference over the classes, because the images of a class show one
drawing.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from microclip_deploy.bench.card import environment
from microclip_deploy.bench.document import write_files
from microclip_deploy.bench.objects_model.artists import SOURCE_ARTISTS, read_sheets
from microclip_deploy.bench.table_text import markdown_table
from microclip_deploy.demo.benchmark import BATCH, Split
from microclip_deploy.demo.objects.benchmark import OBJECTS, TARGET
from microclip_deploy.demo.objects.drawings import Drawings, Sheet
from microclip_deploy.demo.objects.names import CLASSES, CLUTTER, descriptions
from microclip_deploy.demo.objects.scene import COVERED, render, token_cover
from microclip_deploy.model.backbone import VisionBackbone
from microclip_deploy.model.clip import BackboneSpec, load_clip
from microclip_deploy.model.saliency import saliency
from microclip_deploy.model.soap import SOAP
from microclip_deploy.ncut.foreground import Saliency, agreement_with
from microclip_deploy.ncut.spec import NCutSpec

RULES = {
    "method": NCutSpec(),
    "cosine": NCutSpec(affinity="cosine"),
    "Otsu": NCutSpec(threshold="otsu"),
    "object": NCutSpec(affinity="cosine", threshold="otsu", side="object"),
}
"""Rules of the cut that are compared; `object` is that of the recipe of this name."""

SOURCE_IMAGES = 504
"""Scenes with the drawings of pretraining."""

WANTED = {
    "source [CLS]": 85,
    "target [CLS]": 50,
    "true mask over [CLS]": 4,
    "mask IoU": 60,
    "[FG] over [CLS]": 2,
    "[FG] over mean": 2,
}
"""Least of each before a claim about saliency is made, set before any was measured."""


class Scored(NamedTuple):
    """A set of scenes as the model reads them."""

    labels: Tensor
    """int64 (n,)."""
    hits: dict[str, Tensor]
    """What is read out -> bool (n,): whether the best class is right."""
    overlap: dict[str, float]
    """Rule -> mean intersection over union of its masks and the objects."""
    share: dict[str, float]
    """Rule -> mean share of the tokens in the mask."""

    def accuracy(self, arm: str) -> float:
        """Return the top-1 accuracy in percent."""
        return 100 * self.hits[arm].double().mean().item()

    def gain(self, arm: str, over: str) -> tuple[float, float]:
        """Return the mean difference of two arms in points, and 1.96 standard errors."""
        differences = self.hits[arm].double() - self.hits[over].double()
        by_class = torch.stack([differences[self.labels == c].mean() for c in self.labels.unique()])
        error = by_class.std() / len(by_class) ** 0.5
        return 100 * differences.mean().item(), 196 * error.item()


Sets = Mapping[str, Scored]
"""How a model reads `source` and, after it, `target, SPLIT`."""

Images = Iterable[tuple[Tensor, Tensor, Tensor]]
"""Batches: float (B, 3, S, S) in [0, 1], int64 labels (B,), bool (B, N) where the object is."""


def source_scenes(sheets: Mapping[str, Sheet], *, seed: int = 101) -> Images:
    """Yield scenes like those of the target, with the drawings of pretraining."""
    known = {artist: sheets[artist] for artist in SOURCE_ARTISTS}
    animals, clutter = Drawings(known, CLASSES), Drawings(known, CLUTTER)
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, SOURCE_IMAGES, len(CLASSES)):
        labels = torch.arange(start, start + len(CLASSES)) % len(CLASSES)
        scenes = render(animals, clutter, len(labels), TARGET, generator, labels=labels)
        yield scenes.images, labels, token_cover(scenes.cover[:, 0]) >= COVERED


def target_scenes(split: Split) -> Images:
    """Yield the images of a split as they are written to files."""
    examples = OBJECTS.examples(split, 0, OBJECTS.sizes[split])
    while batch := list(islice(examples, BATCH)):
        images = torch.from_numpy(np.stack([each.image for each in batch]))
        cover = torch.from_numpy(np.stack([each.cover for each in batch]))
        labels = torch.tensor([each.label for each in batch])
        yield images.permute(0, 3, 1, 2) / 255, labels, token_cover(cover) >= COVERED


@torch.no_grad()
def class_weights(encode: Callable[[list[str]], Tensor]) -> Tensor:
    """Return the classifier of the benchmark's sentences, float (C, E), unit rows."""
    means = [F.normalize(encode(texts), dim=-1).mean(0) for texts in descriptions().values()]
    return F.normalize(torch.stack(means), dim=-1)


@torch.no_grad()
def score(
    backbone: VisionBackbone,
    weights: Tensor,
    images: Images,
    rules: Mapping[str, NCutSpec] = RULES,
) -> Scored:
    """Read scenes out in every way; backbone, weights and images are on one device."""
    pool = SOAP(backbone.width).to(weights.device)
    hits: dict[str, list[Tensor]] = {}
    overlaps: dict[str, list[Tensor]] = {rule: [] for rule in rules}
    shares: dict[str, list[Tensor]] = {rule: [] for rule in rules}
    truth: list[Tensor] = []
    for pixels, labels, shown in images:
        cls, patches = backbone(pixels * 2 - 1)
        read = {"token mean": patches.mean(1), "true mask": pool(patches, shown).vector}
        for rule, spec in rules.items():
            found = cut(backbone, cls, patches, spec)
            read[rule] = pool(patches, found.mask).vector
            both = (found.mask & shown).sum(1) / (found.mask | shown).sum(1)
            overlaps[rule].append(both)
            shares[rule].append(found.mask.double().mean(1))
        arms = {"[CLS]": cls}
        for name, vector in read.items():
            one = backbone.project(vector)
            arms |= {name: one, f"[CLS] + {name}": cls + one}
        for arm, embedded in arms.items():
            hits.setdefault(arm, []).append((embedded @ weights.T).argmax(-1) == labels)
        truth.append(labels)
    mean = {rule: torch.cat(parts).mean().item() for rule, parts in overlaps.items()}
    share = {rule: torch.cat(parts).mean().item() for rule, parts in shares.items()}
    joined = {arm: torch.cat(parts) for arm, parts in hits.items()}
    return Scored(torch.cat(truth), joined, mean, share)


def cut(backbone: VisionBackbone, cls: Tensor, patches: Tensor, spec: NCutSpec) -> Saliency:
    """Return the masks of a rule; those that ask [CLS] get the tokens' agreement with it."""
    agreement = agreement_with(backbone.unproject(cls), patches) if spec.asks_cls else None
    return saliency(patches, spec, agreement)


def markdown(scored: Mapping[str, Scored]) -> str:
    """Return one table a set of images."""
    texts = []
    for name, one in scored.items():
        rows = [["read out", "top-1", "over [CLS]", "mask IoU", "mask share"]]
        for arm in one.hits:
            gain, error = one.gain(arm, "[CLS]")
            rule = arm.removeprefix("[CLS] + ")
            cells = [arm, f"{one.accuracy(arm):.1f}", f"{gain:+.1f} ± {error:.1f}"]
            known = rule in one.overlap
            cells.append(f"{100 * one.overlap[rule]:.1f}" if known else "")
            rows.append([*cells, f"{100 * one.share[rule]:.1f}" if known else ""])
        texts += [f"{name}, {len(one.labels)} images", "", *markdown_table(rows), ""]
    return "\n".join(texts)


def document(scored: Mapping[str, Scored]) -> dict[str, Any]:
    """Return the numbers as plain values, in percent and points."""
    return {
        name: {
            "images": len(one.labels),
            "top1": {arm: one.accuracy(arm) for arm in one.hits},
            "over_cls": {arm: one.gain(arm, "[CLS]") for arm in one.hits},
            "mask_iou": {rule: 100 * value for rule, value in one.overlap.items()},
            "mask_share": {rule: 100 * value for rule, value in one.share.items()},
        }
        for name, one in scored.items()
    }


def conditions(source: Scored, target: Scored) -> dict[str, tuple[float, float | None]]:
    """Return what `WANTED` asks, in its order: percent or points, and 1.96 standard errors."""
    fused = "[CLS] + method"
    return {
        "source [CLS]": (source.accuracy("[CLS]"), None),
        "target [CLS]": (target.accuracy("[CLS]"), None),
        "true mask over [CLS]": target.gain("[CLS] + true mask", "[CLS]"),
        "mask IoU": (100 * target.overlap["method"], None),
        "[FG] over [CLS]": target.gain(fused, "[CLS]"),
        "[FG] over mean": target.gain(fused, "[CLS] + token mean"),
    }


def conditions_table(models: Mapping[str, Sets]) -> list[list[str]]:
    """Return a row for each model, under what is wanted."""
    rows = [["model", *WANTED], ["wanted", *(f"{least}" for least in WANTED.values())]]
    for model, sets in models.items():
        source, target = sets.values()
        found = conditions(source, target).values()
        cells = [f"{v:.1f}" if e is None else f"{v:.1f} ± {e:.1f}" for v, e in found]
        rows.append([model, *cells])
    return rows


def main(
    sheets: Annotated[Path, typer.Argument(help="Sheets of all artists, by `artists`.")],
    models: Annotated[
        list[str] | None,
        typer.Option("--model", help="As for `adapt --model`, repeatable; else demo-objects."),
    ] = None,
    split: Annotated[Literal["val", "test"], typer.Option(help="Of the target.")] = "val",
    results_to: Annotated[Path | None, typer.Option(help="Prefix of NAME.json and .md.")] = None,
) -> None:
    """Print what models score before adaptation."""
    found: dict[str, Sets] = {}
    drawn = read_sheets(sheets)
    for model in models or ["demo-objects"]:
        clip = load_clip(BackboneSpec(model=model))
        weights = class_weights(clip.text)
        found[Path(model.removeprefix("local-dir:")).name] = {
            "source": score(clip.vision, weights, source_scenes(drawn)),
            f"target, {split}": score(clip.vision, weights, target_scenes(Split[split.upper()])),
        }
    details = [f"## {name}\n\n{markdown(sets)}" for name, sets in found.items()]
    text = "\n".join([*markdown_table(conditions_table(found)), "", *details])
    results = {name: document(sets) for name, sets in found.items()}
    print(text)
    if results_to is not None:
        whole = {"benchmark": "objects, zero-shot", "environment": environment()}
        write_files(
            results_to.parent, results_to.stem, {**whole, "results": results}, {".md": text}
        )
    print(json.dumps(results))


if __name__ == "__main__":
    typer.run(main)
