"""All that is decided about sentences, in one call: checks, filter, and how alike the classes are.

    outcome = judged(sentences, names, domain, clip)      # clip: a loaded Clip, or None
    outcome.kept        sentences to write, cleaned, in the order of the classes
    outcome.dropped     verdicts with the reason, likewise
    outcome.empty       classes that no sentence is left for: exit 3 is the caller's
    outcome.to_json()   for --json; outcome.tables() for a terminal
    report.write_report(path, outcome, provenance=..., spend=...)

Without a model there are the checks of the wording alone, with one also the length in its tokens,
the filter (unless `filtering` is off) and the similarity of the classes. Memory beside the
sentences is a row for each class and the rows of one block of classes.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from microclip_deploy.describe.checks import check, kind
from microclip_deploy.describe.name_remarks import Remark, name_remarks
from microclip_deploy.describe.pairs import confused_pairs, nearest, nearest_cosine
from microclip_deploy.describe.sentence import Sentence, Verdict
from microclip_deploy.describe.separation import NEIGHBOURS, margins, neutral, separating
from microclip_deploy.describe.text_rows import Rows, mean_row, name_rows, unit_rows
from microclip_deploy.errors import printable

if TYPE_CHECKING:
    from rich.table import Table

    from microclip_deploy.model.clip import Clip, TextEncoder

PAIRS = 12
"""Most confused pairs that are told."""

NOT_SEPARATING = "does not separate"
"""Kind of the reason the filter gives."""

_BLOCK = 64  # classes whose sentences are encoded together


class Pair(NamedTuple):
    """Two classes and the cosine of their rows."""

    one: str
    other: str
    names: float
    """By the names alone."""
    sentences: float
    """By the mean of the kept sentences."""


class Similarity(NamedTuple):
    """How alike the classes are to CLIP's text tower, with names alone and with sentences."""

    model: str
    names: tuple[float, ...]
    """(C,), cosine of each class with the one nearest to it."""
    sentences: tuple[float, ...]
    """(C,), likewise, by the mean of the kept sentences."""
    pairs: tuple[Pair, ...]
    """The most alike by names first."""


@dataclass(frozen=True)
class Judgement:
    """What was decided."""

    names: tuple[str, ...]
    verdicts: tuple[Verdict, ...]
    """By class, then in the order in which the sentences came."""
    remarks: tuple[Remark, ...]
    """On names."""
    similarity: Similarity | None
    """None without a model."""
    filtered: bool
    """Whether the filter took part."""

    @cached_property
    def kept(self) -> tuple[Sentence, ...]:
        """Sentences that are used."""
        return tuple(sentence for sentence, reason in self.verdicts if not reason)

    @cached_property
    def dropped(self) -> tuple[Verdict, ...]:
        """Sentences that are not."""
        return tuple(verdict for verdict in self.verdicts if verdict.reason)

    @cached_property
    def empty(self) -> tuple[str, ...]:
        """Classes without a kept sentence."""
        told = {sentence.class_name for sentence in self.kept}
        return tuple(name for name in self.names if name not in told)

    @cached_property
    def reasons(self) -> dict[str, int]:
        """Kind of reason -> sentences, the most first."""
        counts = Counter(kind(verdict.reason) for verdict in self.dropped)
        return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        alike = self.similarity
        return {
            "classes": len(self.names),
            "kept": len(self.kept),
            "reasons": self.reasons,
            "filtered": self.filtered,
            "dropped": [
                {"class": s.class_name, "text": s.text, "reason": reason}
                for s, reason in self.dropped
            ],
            "without_sentences": list(self.empty),
            "names": [remark._asdict() for remark in self.remarks],
            "similarity": None
            if alike is None
            else {**alike._asdict(), "pairs": [pair._asdict() for pair in alike.pairs]},
        }

    def tables(self) -> list["Table"]:
        """Return what a terminal shows: reasons with an example each, and the confused pairs."""
        shown = [_reason_table(self)] if self.dropped else []
        return [*shown, *([_pair_table(self.similarity)] if self.similarity else [])]

    def summary(self) -> str:
        """Return one line: how many were kept, and how alike the classes are."""
        line = f"{len(self.kept)} of {len(self.verdicts)} sentences kept"
        if self.similarity is None:
            return line
        names, sentences = (
            float(np.mean(values)) for values in (self.similarity.names, self.similarity.sentences)
        )
        return (
            f"{line}; mean cosine of a class with the one nearest to it: {names:.3f} by names, "
            f"{sentences:.3f} by sentences"
        )


def judged(
    sentences: Sequence[Sentence],
    names: Sequence[str],
    domain: str | None,
    clip: "Clip | None",
    *,
    filtering: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Judgement:
    """Check sentences, filter them, and measure how alike the classes are.

    Args:
        sentences: of any of the classes; of repeated ones the first is kept.
        names: all class names.
        domain: what the classes are; None if nobody said.
        clip: the model whose text tower is asked; None for checks of the wording alone.
        filtering: drop what does not separate a class from its neighbours; needs `clip`.
        progress: called with (done, total) classes while the text tower reads.
    """
    order = {name: row for row, name in enumerate(names)}
    ordered = sorted(sentences, key=lambda sentence: order[sentence.class_name])
    verdicts = check(ordered, names, clip.text.uncut_length if clip else None)
    similarity = None
    if clip is not None:
        tell = progress or (lambda done, total: None)
        verdicts, similarity = _with_clip(verdicts, names, clip, tell, filtering=filtering)
    remarks = tuple(name_remarks(names, domain))
    filtered = filtering and clip is not None
    return Judgement(tuple(names), tuple(verdicts), remarks, similarity, filtered)


def _with_clip(
    verdicts: Sequence[Verdict],
    names: Sequence[str],
    clip: "Clip",
    tell: Callable[[int, int], None],
    *,
    filtering: bool,
) -> tuple[list[Verdict], Similarity]:
    """Filter the sentences that are left, and compare the classes before and after."""
    encode, judged_ones = clip.text, list(verdicts)
    by_name = name_rows(encode, names)
    by_sentences = by_name.copy()  # a class without sentences is its name
    neighbours = nearest(by_name, NEIGHBOURS)
    for rows, owners in _blocks(verdicts, names):
        said = [verdicts[row].sentence for row in rows]
        kept = np.ones(len(rows), np.bool_)
        if filtering:
            told = [neutral(sentence.text, sentence.class_name) for sentence in said]
            margin = margins(unit_rows(encode, told), owners, by_name, neighbours)
            kept = separating(margin.values, owners)
            for place in np.flatnonzero(~kept).tolist():
                reason = f"{NOT_SEPARATING}: {names[margin.rivals[place]]}"
                judged_ones[rows[place]] = Verdict(said[place], reason)
        _take_means(by_sentences, encode, said, owners, kept)
        tell(int(owners.max()) + 1, len(names))
    tell(len(names), len(names))
    return judged_ones, _similarity(clip, names, by_name, by_sentences)


def _blocks(
    verdicts: Sequence[Verdict], names: Sequence[str]
) -> Iterator[tuple[list[int], NDArray[np.int64]]]:
    """Yield positions and classes of the kept sentences of some classes; all of a class at once."""
    owner = {name: row for row, name in enumerate(names)}
    by_block: dict[int, list[int]] = {}
    for row, (sentence, reason) in enumerate(verdicts):
        if not reason:
            by_block.setdefault(owner[sentence.class_name] // _BLOCK, []).append(row)
    for rows in by_block.values():
        yield rows, np.array([owner[verdicts[row].sentence.class_name] for row in rows])


def _take_means(
    by_sentences: Rows,
    encode: "TextEncoder",
    said: Sequence[Sentence],
    owners: NDArray[np.int64],
    kept: NDArray[np.bool_],
) -> None:
    """Put the means of the kept sentences of a block in the place of their classes' rows."""
    places = np.flatnonzero(kept)
    rows = unit_rows(encode, [said[place].text for place in places.tolist()])
    for owner in np.unique(owners[places]).tolist():
        by_sentences[owner] = mean_row(rows[owners[places] == owner])


def _similarity(clip: "Clip", names: Sequence[str], before: Rows, after: Rows) -> Similarity:
    model = "/".join(filter(None, (clip.spec.model, clip.spec.pretrained)))
    pairs = tuple(
        Pair(names[i], names[j], float(before[i] @ before[j]), float(after[i] @ after[j]))
        for i, j in confused_pairs(before, PAIRS)
    )
    nearest_before, nearest_after = (
        tuple(nearest_cosine(rows).tolist()) for rows in (before, after)
    )
    return Similarity(model, nearest_before, nearest_after, pairs)


def _reason_table(outcome: Judgement) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(title="sentences dropped")
    table.add_column("reason", overflow="fold")
    table.add_column("sentences", justify="right")
    table.add_column("such as", overflow="fold")
    for name, count in outcome.reasons.items():
        sentence, reason = next(v for v in outcome.dropped if kind(v.reason) == name)
        detail = f" ({reason.partition(': ')[2]})" if ": " in reason else ""
        example = f"{sentence.text[:160]}{detail}"
        table.add_row(name, str(count), Text(printable(example)))
    return table


def _pair_table(alike: Similarity) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"classes most alike to {printable(alike.model)}, cosine")
    for heading in ("class", "and"):
        table.add_column(heading, overflow="fold")
    for heading in ("by names", "by sentences"):
        table.add_column(heading, justify="right")
    for pair in alike.pairs:
        names = (Text(printable(name)) for name in (pair.one, pair.other))
        table.add_row(*names, f"{pair.names:.3f}", f"{pair.sentences:.3f}")
    return table
