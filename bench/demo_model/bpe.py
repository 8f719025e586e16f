"""Train a small byte-pair encoding on the captions, in the file format of CLIP's tokenizer.

The merges CLIP ships cover the whole web; a benchmark of about 300 words needs a few hundred.
The file is written so that open_clip's `SimpleTokenizer(bpe_path=...)` reads it unchanged.
"""

from __future__ import annotations

import gzip
import io
import re
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

__all__ = ["merges_bytes", "train_merges"]

Pair = tuple[str, str]
# The word split of CLIP's tokenizer, restricted to the ASCII our captions use.
_WORD = re.compile(r"'s|[a-z]+|[0-9]|[^\sa-z0-9]+")


def train_merges(texts: Iterable[str], limit: int, *, min_count: int = 3) -> list[Pair]:
    """Return up to `limit` merges, most frequent first; ties go to the larger pair.

    Args:
        texts: training captions.
        limit: most merges to learn.
        min_count: stop when the best pair occurs less often than this.
    """
    counts = Counter(word for text in texts for word in _WORD.findall(text.lower()))
    words = {word: (*word[:-1], f"{word[-1]}</w>") for word in counts}
    merges: list[Pair] = []
    while len(merges) < limit:
        pairs: Counter[Pair] = Counter()
        for word, symbols in words.items():
            for pair in pairwise(symbols):
                pairs[pair] += counts[word]
        if not pairs:
            break
        best, count = max(pairs.items(), key=lambda item: (item[1], item[0]))
        if count < min_count:
            break
        merges.append(best)
        words = {word: _merged(symbols, best) for word, symbols in words.items()}
    return merges


def merges_bytes(merges: Iterable[Pair]) -> bytes:
    """Return the gzip file content; equal merges give equal bytes.

    The first line is a header (the tokenizer skips it) and there is no newline at the end (it
    would become an empty token). The gzip header carries no time and no name.
    """
    text = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)])
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, mtime=0) as stream:
        stream.write(text.encode())
    return buffer.getvalue()


def _merged(symbols: tuple[str, ...], pair: Pair) -> tuple[str, ...]:
    merged: list[str] = []
    position = 0
    while position < len(symbols):
        if symbols[position : position + 2] == pair:
            merged.append(pair[0] + pair[1])
            position += 2
        else:
            merged.append(symbols[position])
            position += 1
    return tuple(merged)
