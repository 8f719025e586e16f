"""What pretraining draws and names: things, their captions, and the tokenizer made from them."""

from collections.abc import Mapping
from pathlib import Path

import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from microclip_deploy.artifact import read_json, write_bytes
from microclip_deploy.bench.letters_model.bpe import merges_bytes, train_merges
from microclip_deploy.bench.letters_model.pretrain import CONFIG, MERGES_FILE
from microclip_deploy.bench.objects_model.artists import SOURCE_ARTISTS
from microclip_deploy.demo import objects
from microclip_deploy.demo.objects.drawings import Drawings, Sheet
from microclip_deploy.demo.objects.names import CAPTIONS, CLASSES, CLUTTER

WORDINGS = (
    *CAPTIONS,
    "{}",
    "a picture of a {}",
    "the {}",
    "an emoji of a {}",
    "a {} somewhere in a colourful scene",
)
"""Captions of pretraining; the benchmark's sentences are five of them."""
GROUND = "an empty background"
MERGES = 700
"""Most merges of the tokenizer."""

OTHERS = 0.12
"""Share of the objects that belong to no class of the benchmark."""

SHIPPED_CONFIG = Path(objects.__file__).parent / "model" / CONFIG


class Vocabulary:
    """Everything that is drawn and named: the classes first, then all other things."""

    def __init__(self, sheets: Mapping[str, Sheet], folder: Path, device: str) -> None:
        """Train the tokenizer on all names, write it into `folder`, and encode them on `device`."""
        known = {name for sheet in sheets.values() for name in sheet}
        others = sorted(name for name in known - {*CLASSES, *CLUTTER} if "flag" not in name)
        self.drawings = Drawings(sheets, (*CLASSES, *others), _seen_in_pretraining, device)
        self.clutter = Drawings(sheets, CLUTTER, device=device)
        names = self.drawings.things
        texts = [wording.format(name) for wording in WORDINGS for name in (*names, *CLASSES * 10)]
        write_bytes(folder / MERGES_FILE, merges_bytes(train_merges(texts, MERGES)))
        context = read_json(SHIPPED_CONFIG)["model_cfg"]["text_cfg"]["context_length"]
        merges = str(folder / MERGES_FILE)
        self.tokenizer = SimpleTokenizer(bpe_path=merges, context_length=context)
        self.captions: Tensor = torch.stack(
            [self.tokenizer([wording.format(name) for name in names]) for wording in WORDINGS]
        ).to(device)
        """int64 (wordings, things, context)."""
        self.ground: Tensor = self.tokenizer([GROUND]).to(device)

    def weights(self) -> Tensor:
        """Return how often each thing is drawn, float (things,)."""
        count = len(self.drawings.things)
        weights = torch.full((count,), OTHERS / (count - len(CLASSES)), device=self.ground.device)
        weights[: len(CLASSES)] = (1 - OTHERS) / len(CLASSES)
        return weights

    def worded(self, things: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return the things in random wordings, and the ground last: int64 (n + 1, context)."""
        wording = torch.randint(
            len(WORDINGS), things.shape, generator=generator, device=things.device
        )
        return torch.cat([self.captions[wording, things], self.ground])


def _seen_in_pretraining(thing: str, artist: str) -> bool:
    return artist in SOURCE_ARTISTS or thing not in CLASSES
