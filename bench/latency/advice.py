"""What limits a model's latency, in plain words, and what would lift the limit."""

from collections.abc import Iterable, Sequence

from microclip_deploy.bench.latency.report import (
    BACKBONE,
    D2H,
    DECODE,
    H2D,
    K1,
    K2,
    K3_HEAD,
    PREPROCESS,
    SALIENCY,
    Report,
    StageRow,
    floors,
    place,
    stage_totals,
)
from microclip_deploy.bench.table_text import digits, in_ms, percent

_INPUT = (DECODE, PREPROCESS)
_MODEL = (BACKBONE, K1, K2, SALIENCY, K3_HEAD)

NEAR_FLOOR = 0.5
"""From this share on, less than half of a stage's time is left to win; it counts as near."""
MOST_SALIENCY = 0.1
"""Share of the stages' time that the saliency may take without a word."""

_FASTER_INPUT = "decode and resize with more processes, or on the GPU"
_LARGER_BATCHES = "larger batches"
_INT8 = "int8: export --dtype int8"


def advice(report: Report) -> list[str]:
    """Say in plain words what limits the target and what would lift the limit, lever last."""
    found = [
        f"{place(row)}: unstable, with a spread of {percent(row.spread)}, and not to be used: "
        "leave the machine to the measurement and measure again"
        for row in report.rows
        if not row.stable
    ]
    if reasons := _throttles(report):
        found.append(
            f"the clocks were held down ({', '.join(reasons)}): see to cooling, power limit and "
            "clock settings, and measure again"
        )
    for batch, total in stage_totals(report).items():
        stages = [row for row in report.stages if row.batch == batch]
        if total > 0:
            found.append(_largest_advice(report, stages, total))
            found += [*_input_advice(stages), *_saliency_advice(stages, total)]
    return found


def _largest_advice(report: Report, stages: Sequence[StageRow], total: float) -> str:
    row = max(stages, key=StageRow.median)
    nearness, words = row.share_of_floor(), ""
    needed = {} if nearness is None else floors(row.flop, row.bytes, report.ceilings)
    limit = max(needed, key=lambda name: needed[name], default=None)
    if nearness is not None:
        near = nearness >= NEAR_FLOOR
        side = f"near its {limit or 'own'} floor" if near else "far from both floors"
        words = f", {side} (the nearer is {percent(nearness)} of that time)"
    return (
        f"batch {row.batch}: {row.stage} takes most, {percent(row.median() / total)} of the "
        f"stages' time ({in_ms(row.median())} of {in_ms(total)} ms){words}: "
        f"{_lever(row, limit, report.precision)}"
    )


def _lever(row: StageRow, limit: str | None, precision: str) -> str:
    """Return what makes a stage shorter."""
    if row.stage in _INPUT:
        return _FASTER_INPUT
    if row.stage in (H2D, D2H):
        return "fewer bytes between host and device: decode and preprocess on the GPU"
    nearness = row.share_of_floor()
    if row.stage not in _MODEL or (nearness is not None and nearness < NEAR_FLOOR):
        return _LARGER_BATCHES  # time that neither arithmetic nor memory explains is spent a call
    first = [_LARGER_BATCHES] if limit == "memory" else []  # weights are read once a batch
    int8 = [_INT8] if row.stage == BACKBONE and precision != "int8" else []
    return ", or ".join([*first, *int8, "a smaller model"])


def _input_advice(stages: Sequence[StageRow]) -> list[str]:
    before, model = _sum(stages, _INPUT), _sum(stages, _MODEL)
    if not model or before <= model:
        return []
    return [
        f"batch {stages[0].batch}: decode and preprocess take {digits(before / model)}x as long as "
        f"the model ({in_ms(before)} against {in_ms(model)} ms): {_FASTER_INPUT}"
    ]


def _saliency_advice(stages: Sequence[StageRow], total: float) -> list[str]:
    cut = _sum(stages, (K1, K2, SALIENCY))
    if cut <= MOST_SALIENCY * total:
        return []
    return [
        f"batch {stages[0].batch}: the saliency (K1 and K2) costs {percent(cut / total)} of the "
        f"stages' time ({in_ms(cut)} of {in_ms(total)} ms): {_LARGER_BATCHES}, or a model with "
        "fewer patches"
    ]


def _sum(stages: Iterable[StageRow], names: Sequence[str]) -> float:
    return sum(row.median() for row in stages if row.stage in names)


def _throttles(report: Report) -> list[str]:
    """Return what held the clocks down at the start or the end; an idle device does not count."""
    if not report.device.startswith("cuda"):
        return []
    cards = (report.environment.get("gpu"), report.environment_after)
    lists = [card.get("throttled_by") for card in cards if isinstance(card, dict)]
    reasons = [str(reason) for found in lists if isinstance(found, list) for reason in found]
    return [reason for reason in dict.fromkeys(reasons) if reason != "idle"]
