"""Plans made without models."""

from collections.abc import Sequence

import numpy as np

from microclip_deploy.audit.clicks import Click
from microclip_deploy.audit.plan import Drawn, Plan
from microclip_deploy.audit.sample import order
from microclip_deploy.data.photo import USUAL

CLASSES = ("hen", "=1+1", "château", "arctic loon", "Hawk; red")


def made_plan(differ: int = 8, agree: int = 12, clicks: int = 9, seed: int = 0) -> Plan:
    """Return the plan of an audit in which A says 0 and 1 in turn, and B something else or not."""
    kinds = np.arange(differ + agree) < differ
    said = [(row % 2, 2 if kind else row % 2) for row, kind in enumerate(kinds.tolist())]
    drawn = tuple(
        Drawn(f"-{row}.png", said[row], (0.5 + row / 100, 0.4), bool(row % 3))
        for row in order(kinds, seed)[:clicks].tolist()
    )
    predicted = {
        row: (
            (sum(a == row != b for a, b in said), sum(a == row == b for a, b in said)),
            (sum(b == row != a for a, b in said), sum(a == row == b for a, b in said)),
        )
        for row in (0, 1, 2)
    }
    model = {"directory": "runs/x", "sha256": "0" * 64}
    return Plan(
        seed=seed,
        models=({"title": "adapted", **model}, {"title": "zero-shot", **model}),
        photos_sha256="1" * 64,
        reading=USUAL,
        planned=(clicks,),
        classes=CLASSES,
        differ=differ,
        agree=agree,
        predicted=predicted,
        examples={0: ("example.png",)},
        drawn=drawn,
    )


def all_said(plan: Plan, answers: Sequence[str]) -> list[Click]:
    """Return clicks with these answers, and the rest empty."""
    rest = len(plan.drawn) - len(answers)
    return [Click(text, "now") for text in answers] + [Click()] * rest


def right_for(plan: Plan, model: int) -> list[str]:
    """Return answers by which a model is right on all photos."""
    return [plan.classes[row.classes[model]] for row in plan.drawn]
