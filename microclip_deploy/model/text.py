"""Class texts -> the two-headed classifier: frozen prior, learnable start, and names alone.

Texts that cannot work are found here, before anything is computed from them: sentences that are
longer than what the text tower reads, and classes whose texts give the same row.
"""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from microclip_deploy.data.classes import ClassTexts
from microclip_deploy.errors import DataError
from microclip_deploy.model.clip import TextEncoder

SAME_ROW = 1e-5
"""Distance of two unit rows up to which they are one. float32 moves a sentence's row by 5e-7 with
its place in the batch (measured at ViT-B-32 and ViT-L-14). Logits are 100 times a product with a
unit vector: those of such classes differ by less than 0.001, whatever the image."""

_BLOCK = 1024  # rows that are compared with all others at once
_SHOWN = 5  # sentences or groups of classes that a message lists

_log = logging.getLogger(__name__)


class TextHeads(NamedTuple):
    """Three class matrices, float32 (C, E), unit rows."""

    names: Tensor
    """u: the class names alone, as plain zero-shot CLIP uses them."""
    frozen: Tensor
    """F: descriptions weighted by their cosine to the name; the stable prior, never trained."""
    initial: Tensor
    """Where the learnable head starts: the plain mean of the descriptions."""


def text_heads(encode: TextEncoder, texts: ClassTexts) -> TextHeads:
    """Encode names and descriptions with the text tower and build the heads; log a warning.

    Raises:
        DataError: classes have the same row, or the tokenizer reads nothing of a name.
    """
    nothing = encode.tokens("")
    unread = [name for name in texts.names if encode.tokens(name) == nothing]
    if unread:
        raise DataError(
            f"class '{unread[0]}': expected a name that the tokenizer reads, found one of which "
            "nothing is left; spell it in words"
        )
    warning = cut_warning(encode, texts)
    if warning:
        _log.warning("warning: %s", warning)
    prompts = [text for group in _prompts(texts) for text in group]
    named = encode(prompts).unflatten(0, (len(texts.names), len(texts.templates)))
    flat = encode([text for group in texts.descriptions for text in group])
    groups = flat.split([len(group) for group in texts.descriptions])
    heads = heads_from_embeddings(named, groups)
    require_distinct(heads.initial, encode, texts)
    return heads


def cut_warning(encode: TextEncoder, texts: ClassTexts) -> str | None:
    """Return what a user must know about sentences that are not read to their end."""
    both = zip(texts.names, texts.descriptions, _prompts(texts), strict=True)
    sentences = dict.fromkeys(
        (name, text) for name, said, prompts in both for text in (*said, *prompts)
    )
    lengths = [(name, encode.uncut_length(text)) for name, text in sentences]
    cut = [(name, length) for name, length in lengths if length is not None]
    if not cut:
        return None
    shown = ", ".join(f"'{name}' ({length} tokens)" for name, length in cut[:_SHOWN])
    more = f" and {len(cut) - _SHOWN} more" if len(cut) > _SHOWN else ""
    return (
        f"{len(cut)} of {len(sentences)} sentences are longer than the {encode.context_length} "
        f"tokens that the text tower reads, and their ends are cut off: {shown}{more}; shorten them"
    )


def require_distinct(rows: Tensor, encode: TextEncoder, texts: ClassTexts) -> None:
    """Make sure that no two classes have the same row, which would make one of them useless.

    Args:
        rows: float (C, E), unit rows; one for each class of `texts`.
        encode: tells why rows are the same.
        texts: of the classes.

    Raises:
        DataError: two rows are closer than SAME_ROW.
    """
    groups: dict[int, list[int]] = {}
    for row, first in enumerate(first_same(rows, rows)):
        groups.setdefault(row if first is None else first, []).append(row)
    same = [group for group in groups.values() if len(group) > 1]
    if not same:
        return
    named = " and ".join(f"'{texts.names[row]}'" for row in same[0][:_SHOWN])
    more = f" and {len(same[0]) - _SHOWN} more" if len(same[0]) > _SHOWN else ""
    others = f" (and for {len(same) - 1} other groups of classes)" if len(same) > 1 else ""
    raise DataError(
        f"classes: expected texts that the model tells apart, found the same row for {named}{more}"
        f"{others}: {_why_same(encode, texts, same[0])}, or make them one class"
    )


def first_same(rows: Tensor, others: Tensor) -> list[int | None]:
    """Return for each row the position of the first of the others that is the same, or None.

    Args:
        rows: float (M, E), unit rows.
        others: float (K, E), unit rows; K >= 1.
    """
    wide, blocks = others.double(), rows.double().split(_BLOCK)
    found: list[int | None] = []
    for block in blocks:
        squares = block.square().sum(dim=1)[:, None] + wide.square().sum(dim=1)
        near = squares - 2 * block @ wide.T < SAME_ROW**2
        first = near.int().argmax(dim=1).tolist()
        found += [
            place if some else None
            for place, some in zip(first, near.any(dim=1).tolist(), strict=True)
        ]
    return found


def _why_same(encode: TextEncoder, texts: ClassTexts, rows: Sequence[int]) -> str:
    """Return why classes have the same row, and what to do about it."""
    said = [texts.descriptions[row] for row in rows]
    if len({frozenset(group) for group in said}) == 1:
        return "their sentences are the same; write some that tell them apart"
    if len({frozenset(map(encode.tokens, group)) for group in said}) > 1:
        return "the text tower gives all of their sentences one row; write others"
    if any(encode.uncut_length(text) for group in said for text in group):
        return (
            f"their sentences differ only behind the {encode.context_length} tokens that the text "
            "tower reads; put first what tells them apart"
        )
    return "the tokenizer reads their sentences alike; spell them otherwise"


def _prompts(texts: ClassTexts) -> list[list[str]]:
    """Return the templates filled with each class name."""
    return [[template.replace("{}", name) for template in texts.templates] for name in texts.names]


def heads_from_embeddings(prompts: Tensor, descriptions: Sequence[Tensor]) -> TextHeads:
    """Build the heads from raw text embeddings.

    Args:
        prompts: float (C, T, E), raw embeddings of the T templates of each class name. They are
            averaged without normalising them one by one.
        descriptions: one float (M_c, E) tensor a class, raw.

    Source: docs/numerics.md section 4. A weight sum of zero, which the method leaves as NaN,
    falls back to the unweighted mean.
    """
    names = F.normalize(prompts.mean(dim=1), dim=-1)
    frozen, initial = [], []
    for name, raw in zip(names, descriptions, strict=True):
        unit = F.normalize(raw, dim=-1)
        mean = unit.mean(dim=0)
        weight = unit @ name
        total = weight.sum()
        weighted = (weight[:, None] * unit).sum(dim=0) / total
        frozen.append(mean if total == 0 else weighted)
        initial.append(mean)
    return TextHeads(
        names, F.normalize(torch.stack(frozen), dim=-1), F.normalize(torch.stack(initial), dim=-1)
    )
