"""Train a small byte-pair encoding on the captions, in the file format of CLIP's tokenizer.

The merges CLIP ships cover the whole web; a benchmark of about 300 words needs a few hundred.
The file is written so that open_clip's `SimpleTokenizer(bpe_path=...)` reads it unchanged.
"""

import gzip
import io
import re
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

Pair = tuple[str, str]

_WORD = re.compile(r"'s|[a-z]+|[0-9]|[^\sa-z0-9]+")
"""The word split of CLIP's tokenizer, restricted to the ASCII our captions use."""


def train_merges(texts: Iterable[str], limit: int, *, min_count: int = 3) -> list[Pair]:
    """Return up to `limit` merges, most frequent first; ties go to the larger pair.

    Args:
        texts: training captions.
        limit: most merges to learn.
        min_count: stop when the best pair occurs less often than this.
    """
    counts = Counter(word for text in texts for word in _WORD.findall(text.lower()))
    words = {" ".join(word) + "</w>": count for word, count in counts.items()}
    merges: list[Pair] = []
    while len(merges) < limit:
        pairs: Counter[Pair] = Counter()
        for word, count in words.items():
            for pair in pairwise(word.split()):
                pairs[pair] += count
        best = max(pairs, key=lambda pair: (pairs[pair], pair), default=("", ""))
        if pairs[best] < min_count:
            break
        merges.append(best)
        apart = re.compile(rf"(?<!\S){re.escape(' '.join(best))}(?!\S)")
        words = {apart.sub("".join(best), word): count for word, count in words.items()}
    return merges


def merges_bytes(merges: Iterable[Pair]) -> bytes:
    """Return the gzip file content; equal merges give equal bytes.

    The first line is a header (the tokenizer skips it) and there is no newline at the end (it
    would become an empty token). The gzip header carries no time and no name.
    """
    text = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)])
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, mtime=0) as file:
        file.write(text.encode())
    return buffer.getvalue()
