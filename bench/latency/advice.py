"""What limits a model's latency, in plain words, and what would lift the limit."""

from collections.abc import Iterator

from microclip_deploy.bench.latency.report import Report, Stage, StageRow
from microclip_deploy.bench.table_text import digits, in_ms, percent

NEAR_FLOOR = 0.5
"""From this share on, less than half of a stage's time is left to win."""
MOST_SALIENCY = 0.1
"""Share of the stages' time that the saliency may take without a word."""

_FASTER_INPUT = "decode and resize with more processes, or on the GPU"


def advice(report: Report) -> list[str]:
    """Say what limits the target and what would lift the limit, lever last."""
    lines = [
        f"{row}: unstable, with a spread of {percent(row.spread)}; leave the machine to the "
        "measurement and measure again"
        for row in report.rows
        if not row.stable
    ]
    if reasons := _throttled_by(report):
        lines.append(
            f"the clocks were held down ({', '.join(reasons)}): see to cooling, power limit and "
            "clock settings, and measure again"
        )
    for batch, total in report.stage_totals().items():
        if total > 0:
            stages = {row.stage: row for row in report.stages if row.batch == batch}
            lines += _on_stages(f"batch {batch}", stages, total, report.precision)
    return lines


def _on_stages(
    batch: str, stages: dict[str, StageRow], total: float, precision: str
) -> Iterator[str]:
    def seconds(*names: str) -> float:
        return sum(stages[name].median_s for name in names if name in stages)

    row = max(stages.values(), key=lambda row: row.median_s)
    floor = "" if row.of_floor is None else f", {percent(row.of_floor)} of which is its floor"
    yield (
        f"{batch}: {row.stage} takes most, {percent(row.median_s / total)} of the stages' time "
        f"({in_ms(row.median_s)} of {in_ms(total)} ms){floor}: {_lever(row, precision)}"
    )
    before, cut = (
        seconds(Stage.DECODE, Stage.PREPROCESS),
        seconds(Stage.K1, Stage.K2, Stage.SALIENCY),
    )
    model = cut + seconds(Stage.BACKBONE, Stage.HEAD)
    if before > model > 0:
        yield (
            f"{batch}: decode and preprocess take {digits(before / model)}x as long as the model "
            f"({in_ms(before)} against {in_ms(model)} ms): {_FASTER_INPUT}"
        )
    if cut > MOST_SALIENCY * total:
        yield (
            f"{batch}: the saliency (K1 and K2) costs {percent(cut / total)} of the stages' time "
            f"({in_ms(cut)} of {in_ms(total)} ms): larger batches, or a model with fewer patches"
        )


def _lever(row: StageRow, precision: str) -> str:
    """Return what makes a stage shorter."""
    if row.stage in (Stage.DECODE, Stage.PREPROCESS):
        return _FASTER_INPUT
    if row.stage in (Stage.H2D, Stage.D2H):
        return "fewer bytes between host and device: decode and preprocess on the GPU"
    if row.of_floor is not None and row.of_floor < NEAR_FLOOR:
        return "larger batches"  # time that its work does not explain is spent a call
    int8 = row.stage == Stage.BACKBONE and not precision.startswith("int8")
    return "int8 (export --dtype int8), or a smaller model" if int8 else "a smaller model"


def _throttled_by(report: Report) -> list[str]:
    """Return what held the clocks down at the start or the end; an idle device does not count."""
    if not report.device.startswith("cuda"):
        return []
    cards = (report.environment.get("gpu"), report.environment_after)
    reasons = [reason for card in cards if card for reason in card.get("throttled_by") or ()]
    return [reason for reason in dict.fromkeys(reasons) if reason != "idle"]
