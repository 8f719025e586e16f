"""Pretrain the tiny CLIP of the objects benchmark on scenes that are drawn as it goes.

    python -m microclip_deploy.bench.objects_model.pretrain SHEETS --out model --seed 1

SHEETS is what `artists` wrote. Minutes on a GPU (`--device cuda`), by arithmetic about two hours
on two CPU cores; no image is shown twice. The folder holds what the letters' does
(`bench.letters_model.pretrain`), with the same optimisers.

The shipped weights are those of seed 0. Seeds 0, 1 and 2 were trained beside one another on an
H200, for 255 s each: their rates followed the clock where this script counts `STEPS`, and they came
to 2048, 2043 and 2059 steps. The target in their log has smaller clutter (12 to 21 pixels) than the
benchmark, whose clutter was chosen afterwards, on the validation split.

Each step draws close-ups, from which [CLS] learns names as CLIP does from captioned photos, and
whole scenes, in which tokens learn where things are. The objective, a sum of:

* [CLS] against the names of the objects in the image, one at a time, the others masked out; in
  scenes with a small weight, so that what lies about still draws [CLS] off;
* the mean of all tokens of a close-up against the name, so that it is a fair rival of [FG];
* [FG] by the true mask of each object against its name, and of the rest against "an empty
  background": the tie between tokens and words that large CLIP models have from scale;
* coherence: tokens of one object point one way, those of the ground another.

So the geometry that the cut relies on is taught, with the renderer's masks. Adaptation sees no
mask. The artists of the target (`TARGET_ARTISTS`) take part with everything but the classes.
"""

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
import typer
from open_clip.model import CLIP
from safetensors.torch import save
from torch import Tensor
from torch.func import functional_call
from torch.optim.lr_scheduler import LambdaLR

from microclip_deploy.artifact import read_json, write_bytes, write_json
from microclip_deploy.bench.letters_model.pretrain import (
    CONFIG,
    WEIGHTS,
    advance,
    optimizers,
    rate,
)
from microclip_deploy.bench.objects_model.artists import read_sheets
from microclip_deploy.bench.objects_model.vocabulary import SHIPPED_CONFIG, Vocabulary
from microclip_deploy.bench.objects_model.zero_shot import (
    Images,
    class_weights,
    document,
    score,
    source_scenes,
    target_scenes,
)
from microclip_deploy.demo.benchmark import Split
from microclip_deploy.demo.objects.names import CLASSES
from microclip_deploy.demo.objects.scene import (
    COVERED,
    PATCH,
    SIDE,
    Domain,
    Scenes,
    render,
    token_cover,
)
from microclip_deploy.model.backbone import Tokens, VisionBackbone
from microclip_deploy.model.soap import SOAP
from microclip_deploy.ncut.spec import NCutSpec

WITHIN, APART, LEAST_OBJECT, LEAST_GROUND = 0.7, -0.1, 0.5, 0.4
"""Cosines: mean within object and ground, at most between them, of each token with its own side."""

TEXT_STEPS, TEXT_RATE, TEXT_SCALE = 150, 2e-3, 6.0
"""Of the warm-up in which two wordings of a thing find one another, before any image."""

METHOD = {"method": NCutSpec()}
"""The rule of the cut that the log tells of."""


class Part(NamedTuple):
    """What a step draws of one kind, and which terms of the objective it is for."""

    side: int
    """Of the scenes, pixels."""
    images: int
    """Of a step."""
    domain: Domain
    terms: Mapping[str, float]
    """Name of a term -> its weight."""


CLOSE_UPS = Part(
    side=48,
    images=192,
    domain=Domain(sizes=((24, 46),), clutter=0.2, shapes=0.15, jitter=1.7, bend=0.1),
    terms={"cls": 1.0, "mean": 0.3, "region": 0.5, "ground": 0.1, "coherence": 1.0},
)
"""One object each, that nearly fills the image, as in most captioned photos of the web."""

SCENES = Part(
    side=SIDE,
    images=128,
    domain=Domain(
        number=(0.45, 0.3, 0.25), clutter=0.8, clutter_sizes=(12, 26), jitter=1.7, bend=0.1
    ),
    terms={"cls": 0.15, "region": 1.0, "ground": 0.1, "coherence": 1.0},
)
"""Up to three small objects among clutter, like the benchmark's images."""

PARTS = {"close-ups": CLOSE_UPS, "scenes": SCENES}

STEPS, PEAK = 2050, 0.4
"""Of the one cosine, and its share of the peak rates."""
AHEAD = 8
"""Steps whose scenes are drawn together; they share the grain of their grounds."""


def pretrain(
    sheets: Annotated[Path, typer.Argument(help="Sheets of all artists, by `artists`.")],
    out: Annotated[Path, typer.Option(help="Model folder to write.")],
    seed: Annotated[int, typer.Option(help="Of scenes, captions and initial weights.")] = 0,
    device: Annotated[str, typer.Option(help="Renders and trains: cpu or cuda.")] = "cpu",
    every: Annotated[int, typer.Option(help="Steps between two evaluations.")] = 500,
) -> None:
    """Pretrain the tiny CLIP of the benchmark; log to the folder and to stdout."""
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    drawn = read_sheets(sheets)
    scenes = {"source": source_scenes(drawn), "target": target_scenes(Split.VAL)}
    tested = {
        name: [
            (pixels.to(device), labels.to(device), shown.to(device))
            for pixels, labels, shown in batches
        ]
        for name, batches in scenes.items()
    }
    vocabulary = Vocabulary(drawn, out, device)
    config = read_json(SHIPPED_CONFIG)
    config["model_cfg"]["text_cfg"]["vocab_size"] = vocabulary.tokenizer.vocab_size
    write_json(out / CONFIG, config)
    config["model_cfg"]["text_cfg"].pop("tokenizer_kwargs")
    model = CLIP(**config["model_cfg"]).to(device)
    _warm_text(model, vocabulary)
    with (out / "pretrain-log.jsonl").open("w") as log:
        for record in _train(model, vocabulary, seed, every):
            line = json.dumps(record | _scores(model, vocabulary, tested))
            print(line, flush=True)
            print(line, file=log, flush=True)
    weights = {name: w.half().contiguous() for name, w in model.state_dict().items()}
    write_bytes(out / WEIGHTS, save(weights))


def _warm_text(model: CLIP, vocabulary: Vocabulary) -> None:
    """Spread the texts: two wordings of a thing are taught to find one another."""
    named = model.named_parameters()
    own = [p for name, p in named if not name.startswith("visual") and name != "logit_scale"]
    optimizer = torch.optim.AdamW(own, lr=TEXT_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = LambdaLR(optimizer, lambda i: min(1, (i + 1) / 10) * (1 - i / TEXT_STEPS))
    count = len(vocabulary.drawings.things)
    for _ in range(TEXT_STEPS):
        others = torch.randint(len(CLASSES), count, (80,))
        some = torch.cat([torch.arange(len(CLASSES)), others]).to(vocabulary.ground.device)
        pair = [
            model.encode_text(vocabulary.worded(some.unique(), None), normalize=True)
            for _ in range(2)
        ]
        logits = TEXT_SCALE * pair[0] @ pair[1].T
        truth = torch.arange(len(logits), device=some.device)
        optimizer.zero_grad()
        (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)).backward()
        optimizer.step()
        schedule.step()


def _train(model: CLIP, vocabulary: Vocabulary, seed: int, every: int) -> Iterator[dict[str, Any]]:
    """Optimise `model` in place; yield the losses now and then."""
    generator = torch.Generator(vocabulary.ground.device).manual_seed(seed)
    both = optimizers(model)
    schedules = [LambdaLR(each, lambda done: rate(done, STEPS, PEAK)) for each in both]
    backbone, weights = VisionBackbone(model.visual), vocabulary.weights()
    drawn = {name: _scenes(vocabulary, part, weights, generator) for name, part in PARTS.items()}
    started = time.monotonic()
    for step in range(1, STEPS + 1):
        losses = {
            name: _losses(model, backbone, vocabulary, next(drawn[name]), part.terms, generator)
            for name, part in PARTS.items()
        }
        terms = [term for each in losses.values() for term in each.values()]
        advance(model, both, schedules, torch.stack(terms).sum())
        if step % every == 0 or step == STEPS:
            yield {
                "step": step,
                "seconds": round(time.monotonic() - started),
                "losses": {
                    name: {term: round(value.item(), 4) for term, value in each.items()}
                    for name, each in losses.items()
                },
                "logit_scale": round(model.logit_scale.exp().item(), 2),
            }


def _scenes(
    vocabulary: Vocabulary, part: Part, weights: Tensor, generator: torch.Generator
) -> Iterator[Scenes]:
    """Yield fresh batches forever; drawing several at once costs a GPU little more than one."""
    while True:
        scenes = render(
            vocabulary.drawings,
            vocabulary.clutter,
            part.images * AHEAD,
            part.domain,
            generator,
            side=part.side,
            weights=weights,
        )
        for batch in zip(*(each.split(part.images) for each in scenes), strict=True):
            yield Scenes(*batch)


def _losses(
    model: CLIP,
    backbone: VisionBackbone,
    vocabulary: Vocabulary,
    scenes: Scenes,
    weights: Mapping[str, float],
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Return the weighted terms of a batch, scalars."""
    things, labels = _local(scenes.labels)
    words = model.encode_text(vocabulary.worded(things, generator), normalize=True)
    scale, names = model.logit_scale.exp(), words[:-1]
    cls, patches = _encode(backbone, scenes.images * 2 - 1, generator)
    cover = token_cover(scenes.cover)
    shown, ground = cover >= COVERED, cover.sum(1) < COVERED
    scene, k = torch.nonzero((labels >= 0) & (shown.sum(-1) >= 2), as_tuple=True)
    pool = SOAP(backbone.width).to(patches.device)
    fg = backbone.project(pool(patches[scene], shown[scene, k]).vector)
    rest = backbone.project(pool(patches, ground).vector)
    nothing = labels.new_full((len(labels),), len(names))
    terms = {
        "cls": _named(scale * cls @ names.T, labels),
        "region": F.cross_entropy(scale * fg @ words.T, labels[scene, k]),
        "ground": F.cross_entropy(scale * rest @ words.T, nothing),
        "coherence": _coherence(patches, scene, shown[scene, k].float(), ground.float()),
        "mean": _named(scale * backbone.project(patches.mean(1)) @ names.T, labels),
    }
    return {name: weight * terms[name] for name, weight in weights.items()}


def _local(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the things a batch is told from, the classes first, and the labels among them."""
    classes = torch.arange(len(CLASSES), device=labels.device)
    things = torch.cat([classes, labels[labels >= len(CLASSES)]]).unique()
    place = labels.new_full((int(things.max()) + 1,), -1)
    place[things] = torch.arange(len(things), device=labels.device)
    return things, torch.where(labels >= 0, place[labels.clamp(min=0)], -1)


def _encode(backbone: VisionBackbone, images: Tensor, generator: torch.Generator) -> Tokens:
    """Encode scenes; a small one takes the positions of a random window of a whole one."""
    side, grid = images.shape[-1] // PATCH, SIDE // PATCH
    if side == grid:
        tokens: Tokens = backbone(images)
        return tokens
    row, column = torch.randint(
        grid + 1 - side, (2,), generator=generator, device=generator.device
    ).tolist()
    position = backbone.visual.positional_embedding
    window = position[1:].view(grid, grid, -1)[row : row + side, column : column + side]
    moved = torch.cat([position[:1], window.reshape(side * side, -1)])
    found: Tokens = functional_call(backbone, {"visual.positional_embedding": moved}, (images,))
    return found


def _named(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of each named object, its companions in the scene masked out."""
    scene, k = torch.nonzero(labels >= 0, as_tuple=True)
    own = labels[scene, k]
    companions = torch.zeros_like(logits[scene], dtype=torch.bool)
    for other in labels[scene].unbind(1):
        there = (other >= 0) & (other != own)
        companions[torch.nonzero(there)[:, 0], other[there]] = True
    return F.cross_entropy(logits[scene].masked_fill(companions, -1e9), own)


def _coherence(patches: Tensor, scene: Tensor, shown: Tensor, ground: Tensor) -> Tensor:
    """Return how far tokens are from one direction for each object and another for the ground.

    Args:
        patches: (B, N, D).
        scene: (K,), the scene of each object.
        shown: 0 or 1, (K, N): its tokens.
        ground: 0 or 1, (B, N): tokens of no object.
    """
    unit = F.normalize(patches, dim=-1)
    objects_mean = torch.einsum("kn,knd->kd", shown, unit[scene]) / shown.sum(-1, keepdim=True)
    ground_mean = torch.einsum("bn,bnd->bd", ground, unit) / ground.sum(-1, keepdim=True).clamp(1)
    within = F.relu(WITHIN - objects_mean.square().sum(-1))
    between = F.relu((objects_mean * ground_mean[scene]).sum(-1) - APART)
    means = (within + between).mean() + F.relu(WITHIN - ground_mean.square().sum(-1)).mean()
    to_object = torch.einsum("knd,kd->kn", unit[scene], F.normalize(objects_mean, dim=-1))
    to_ground = torch.einsum("bnd,bd->bn", unit, F.normalize(ground_mean, dim=-1))
    behind = ground[scene]

    def mean(values: Tensor, where: Tensor) -> Tensor:
        return (values * where).sum() / where.sum()

    tokens = (
        mean(F.relu(to_object - APART), behind)
        + mean(F.relu(LEAST_GROUND - to_ground), ground)
        + mean(F.relu(to_ground[scene] - APART), shown)
        + mean(F.relu(LEAST_OBJECT - to_object), shown)
    )
    return means + tokens


def _scores(model: CLIP, vocabulary: Vocabulary, tested: Mapping[str, Images]) -> dict[str, Any]:
    def encode(texts: list[str]) -> Tensor:
        tokens = vocabulary.tokenizer(texts).to(vocabulary.ground.device)
        embedded: Tensor = model.encode_text(tokens)
        return embedded

    backbone, weights = VisionBackbone(model.visual), class_weights(encode)
    scored = {name: score(backbone, weights, images, METHOD) for name, images in tested.items()}
    found = {
        name: {**each["top1"], "mask_iou": each["mask_iou"]["method"]}
        for name, each in document(scored).items()
    }
    return {
        name: {arm: round(value, 1) for arm, value in each.items()} for name, each in found.items()
    }


if __name__ == "__main__":
    typer.run(pretrain)
