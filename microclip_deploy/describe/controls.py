"""Class texts that tell whether descriptions help because of what they say.

    bare names       the class name alone, without a template
    filtered         the descriptions that `separation` keeps
    random words     for each description the class name and as many random words as it has others
    shuffled words   likewise, the words drawn from the descriptions of all classes

A mean over many sentences helps whatever they say (WaffleCLIP, arXiv 2306.07282), so descriptions
count only where they beat random words. Sentence k of every class takes the same words, as there:
other words for each class would only add noise, and be easier to beat. A text tower may know few
words, as that of the demo does; the shuffled ones are words it knows as well as the descriptions'.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from microclip_deploy.data.classes import ClassTexts
from microclip_deploy.describe.pairs import nearest
from microclip_deploy.describe.separation import NEIGHBOURS, margins, neutral, separating
from microclip_deploy.describe.text_rows import Rows, mean_row, name_rows, unit_rows
from microclip_deploy.describe.vocabulary import RANDOM_WORDS
from microclip_deploy.describe.wording import name_words, without, words

if TYPE_CHECKING:
    from microclip_deploy.model.clip import Clip, TextEncoder

Groups = tuple[tuple[str, ...], ...]
"""Sentences of each class, (C, at least 1)."""

DRAWS = 5
"""How often random words are drawn, each time from another seed."""


def random_words(
    descriptions: Groups, names: Sequence[str], seed: int, among: Sequence[str] = RANDOM_WORDS
) -> Groups:
    """Return as many sentences of as many words, made of the class name and random words.

    Args:
        descriptions: the sentences whose number and lengths are taken over.
        names: of the classes.
        seed: another one gives other words.
        among: what words are drawn from.
    """
    return tuple(
        tuple(_random_sentence(text, name, f"{seed} {k}", among) for k, text in enumerate(group))
        for name, group in zip(names, descriptions, strict=True)
    )


def words_of(descriptions: Groups, names: Sequence[str]) -> tuple[str, ...]:
    """Return the words of all descriptions without the class names, as often as they are said."""
    told = tuple(
        word
        for name, group in zip(names, descriptions, strict=True)
        for text in group
        for word in without(words(text), name_words(name))
    )
    return told or RANDOM_WORDS


def filtered(encode: "TextEncoder", descriptions: Groups, names: Sequence[str]) -> Groups:
    """Return the sentences that separate their classes, as `describe` keeps them."""
    by_name = name_rows(encode, names)
    neighbours = nearest(by_name, NEIGHBOURS)
    kept = []
    for row, (name, group) in enumerate(zip(names, descriptions, strict=True)):
        told, owners = [neutral(text, name) for text in group], np.full(len(group), row)
        margin = margins(unit_rows(encode, told), owners, by_name, neighbours)
        chosen = separating(margin.values, owners).tolist()
        kept.append(tuple(text for text, good in zip(group, chosen, strict=True) if good))
    return tuple(kept)


def control_rows(encode: "TextEncoder", texts: ClassTexts) -> dict[str, list[Rows]]:
    """Return class matrices by the name of the control, one a draw: float32 (C, E), unit rows.

    They are means of sentences, as the classifier starts with. Where the run has no descriptions
    but filled templates there is only "bare names".
    """
    names, said = texts.names, texts.descriptions
    groups: dict[str, list[Groups]] = {"bare names": [tuple((name,) for name in names)]}
    if texts.described:
        groups["filtered"] = [filtered(encode, said, names)]
        sources = {"random words": RANDOM_WORDS, "shuffled words": words_of(said, names)}
        for control, among in sources.items():
            groups[control] = [random_words(said, names, draw, among) for draw in range(DRAWS)]
    return {
        control: [_mean_rows(encode, drawn) for drawn in draws] for control, draws in groups.items()
    }


def controls_of_run(directory: Path, device: str) -> tuple["Clip", dict[str, list[Rows]]]:
    """Load the model behind a run, and make the controls of the run's texts.

    Raises:
        CheckpointError: the run is damaged, or lacks its texts or its model.
    """
    from microclip_deploy.adapt.run_directory import read_inputs
    from microclip_deploy.model.checkpoint import load_backbone, read_checkpoint
    from microclip_deploy.serving.torch_session import resolve_device

    clip = load_backbone(read_checkpoint(directory), resolve_device(device))
    return clip, control_rows(clip.text, read_inputs(directory).texts())


def _mean_rows(encode: "TextEncoder", groups: Groups) -> Rows:
    rows = unit_rows(encode, [text for group in groups for text in group])
    ends = np.cumsum([len(group) for group in groups])[:-1]
    return np.stack([mean_row(part) for part in np.split(rows, ends)])


def _random_sentence(text: str, name: str, seed: str, among: Sequence[str]) -> str:
    count = max(1, len(without(words(text), name_words(name))))
    drawn = random.Random(seed)  # of a string: the same on every machine
    return f"{name}: {' '.join(drawn.choice(among) for _ in range(count))}"
