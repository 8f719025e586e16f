"""The page about descriptions: what was kept and dropped and why, and how alike the classes are."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from microclip_deploy import artifact
from microclip_deploy.describe.checks import kind
from microclip_deploy.describe.judge import NOT_SEPARATING, Judgement, Similarity
from microclip_deploy.describe.sentence import Verdict
from microclip_deploy.evaluation import page

LISTED = 200
"""Classes whose sentences are listed, and dropped sentences of one reason."""

_STEPS = 20  # bars of the distribution


class Column(NamedTuple):
    """Classes whose nearest class lies in one range of cosines."""

    start: float
    names: float
    """Share of the classes, relative to the tallest column."""
    sentences: float


def write_report(
    path: Path,
    outcome: Judgement,
    *,
    provenance: Mapping[str, str],
    spend: Mapping[str, str] | None = None,
) -> None:
    """Write the page.

    Args:
        path: of the .html file.
        outcome: as from `judged`.
        provenance: where the sentences come from, as `Descriptions.provenance`.
        spend: what they cost; None where nothing was asked of a model.

    Raises:
        EnvironmentProblem: jinja2 is missing, the disk is full or the folder cannot be written.
    """
    artifact.write_bytes(path, render(outcome, provenance=provenance, spend=spend).encode())


def render(
    outcome: Judgement, *, provenance: Mapping[str, str], spend: Mapping[str, str] | None = None
) -> str:
    """Return the page as text; arguments are those of `write_report`."""
    alike = outcome.similarity
    return page.render(
        "describe/report.html.j2",
        outcome=outcome,
        headline=_headline(outcome),
        columns=_columns(alike) if alike else (),
        reasons=_by_reason(outcome),
        kept=_kept(outcome),
        provenance=dict(provenance),
        spend=dict(spend or {}),
        listed=LISTED,
        filter_reason=NOT_SEPARATING,
    )


def _headline(outcome: Judgement) -> list[tuple[str, str, str]]:
    """Return (label, value, remark) of the figures at the top."""
    classes, kept = len(outcome.names), len(outcome.kept)
    figures = [
        ("Sentences kept", f"{kept:,}", f"of {len(outcome.verdicts):,}"),
        ("Classes", f"{classes:,}", f"{kept / classes:.1f} sentences each"),
    ]
    if outcome.similarity:
        before, after = (
            float(np.mean(values))
            for values in (outcome.similarity.names, outcome.similarity.sentences)
        )
        value = f"{before:.3f} → {after:.3f}"
        figures.append(("Nearest class, cosine", value, "by names → by sentences"))
    return figures


def _columns(alike: Similarity) -> list[Column]:
    """Return the distribution of the cosine with the nearest class, before and after."""
    both = [np.array(alike.names), np.array(alike.sentences)]
    low, high = float(min(map(np.min, both))), float(max(map(np.max, both)))
    counts = [np.histogram(values, _STEPS, (low, max(high, low + 1e-3)))[0] for values in both]
    starts = np.histogram_bin_edges(both[0], _STEPS, (low, max(high, low + 1e-3)))
    tallest = max(int(count.max()) for count in counts)
    return [
        Column(float(start), int(names) / tallest, int(sentences) / tallest)
        for start, names, sentences in zip(starts[:-1], *counts, strict=True)
    ]


def _by_reason(outcome: Judgement) -> list[tuple[str, list[Verdict]]]:
    """Return the dropped sentences by kind of reason, the most frequent kind first."""
    return [
        (name, [verdict for verdict in outcome.dropped if kind(verdict.reason) == name])
        for name in outcome.reasons
    ]


def _kept(outcome: Judgement) -> dict[str, list[str]]:
    """Return the kept sentences of the classes that are listed."""
    said: dict[str, list[str]] = {name: [] for name in outcome.names[:LISTED]}
    for sentence in outcome.kept:
        if sentence.class_name in said:
            said[sentence.class_name].append(sentence.text)
    return said
