"""Whether the numbers of `audit` are what they claim: drawn 10,000 times from known truths.

Every setting is a folder whose answers are known: its size, the accuracy of A, how often the
models differ, by how much A is better, and the number of clicks. Draws are without replacement, as
`audit` makes them. Told are bias and coverage of the three 95 % intervals, the share of audits that
name the wrong model (or one of two equal ones) at any of the planned looks, the share that name
the right one, and the clicks until then. The last line of stdout is one JSON document.
"""

import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from microclip_deploy.audit.estimate import LOOKS, Interval, Tally, accuracy, difference, verdict
from microclip_deploy.audit.result import looks
from microclip_deploy.audit.sample import drawn
from microclip_deploy.bench.card import environment
from microclip_deploy.bench.document import markdown, write_files

DRAWS = 10_000
ENLARGED = 3
"""How many times the clicks are asked for by those who go on after a plan that could not tell."""
PHOTOS = (300, 3_000, 30_000)
ACCURACIES = (0.5, 0.7, 0.9, 0.98)
SHARES = (0.02, 0.1, 0.25, 0.4)
GAINS = (0.0, 0.03, 0.06, 0.15)
CLICKS = (30, 100, 300)
NEITHER = 0.2
"""Share of the photos on which the models differ where both are wrong, if the rest allows it."""
BAND = (0.94, 0.96)


@dataclass(frozen=True)
class Setting:
    """A folder whose truth is known, and an audit of it."""

    photos: int
    accuracy: float
    """Of A; that of B is lower by `gain`."""
    differ: float
    """Share of the photos on which the models differ."""
    gain: float
    clicks: int

    @property
    def truth(self) -> tuple[int, int, int, int]:
        """Return photos on which they differ, of these right by A and by B; right by both."""
        differ = round(self.differ * self.photos)
        lead = min(round(self.gain * self.photos), differ)
        b = max(0, round(((1 - NEITHER) * differ - lead) / 2))
        right = round(self.accuracy * self.photos)
        # What the accuracies leave: no more right by A than it has, and no fewer than it needs.
        b = int(np.clip(b, right - (self.photos - differ) - lead, right - lead))
        b = int(np.clip(b, 0, (differ - lead) // 2))
        both = int(np.clip(right - b - lead, 0, self.photos - differ))
        return differ, b + lead, b, both


def settings() -> Iterator[Setting]:
    """Yield what is tried, without gains that are larger than the share of differing photos."""
    for photos, right, differ, gain, clicks in product(PHOTOS, ACCURACIES, SHARES, GAINS, CLICKS):
        # Where two models differ at least one is wrong, so good ones cannot differ on much.
        possible = gain <= differ <= 2 * (1 - right) + gain
        if possible and gain < right and clicks < photos:
            yield Setting(photos, right, differ, gain, clicks)


@dataclass(frozen=True)
class Draws:
    """The answers of many audits at one look, each count (draws,)."""

    differ: Tally
    agree: tuple[Any, Any, Any]
    """Right, answered, photos."""


def draw(setting: Setting, draws: int, seed: int, clicks: Sequence[int]) -> list[Draws]:
    """Return the answers after each number of clicks; later ones include those before."""
    generator = np.random.default_rng(seed)
    differ, a, b, both = setting.truth
    agree = setting.photos - differ
    a_right, b_right, both_right = (np.zeros(draws, np.int64) for _ in range(3))
    seen, looks = (0, 0), []
    for number in clicks:
        now = drawn(number, differ, agree)
        more, left = now[0] - seen[0], differ - seen[0]
        a_left, b_left, both_left = a - a_right, b - b_right, both - both_right
        new_a = generator.hypergeometric(a_left, left - a_left, more)
        new_b = generator.hypergeometric(b_left, left - a_left - b_left, more - new_a)
        new_both = generator.hypergeometric(
            both_left, agree - seen[1] - both_left, now[1] - seen[1]
        )
        a_right, b_right, both_right = a_right + new_a, b_right + new_b, both_right + new_both
        seen = now
        looks.append(Draws(Tally(differ, now[0], a_right, b_right), (both_right, now[1], agree)))
    return looks


def measure(setting: Setting, draws: int = DRAWS) -> dict[str, Any]:
    """Return bias (points), coverage, widths and errors of one setting.

    The seed is made from the setting.
    """
    plans = [setting.clicks, min(ENLARGED * setting.clicks, setting.photos)]
    numbers = [number for clicks in plans for number in looks(clicks)]
    seed = zlib.crc32(repr(setting).encode())
    seen = dict(zip(sorted(numbers), draw(setting, draws, seed, sorted(numbers)), strict=True))
    differ, a, b, both = setting.truth
    last = seen[setting.clicks]
    agree = setting.photos - differ
    told: dict[str, Any] = asdict(setting)
    for name, right, truth in (("a", last.differ.a_right, a), ("b", last.differ.b_right, b)):
        found = _each(
            lambda x, y: accuracy((x, last.differ.answered, differ), (y, *last.agree[1:])),
            right,
            last.agree[0],
        )
        told[name] = _score(Interval(*found), (truth + both) / setting.photos)
    found = _each(
        lambda x, y: difference(Tally(differ, last.differ.answered, x, y), agree),
        last.differ.a_right,
        last.differ.b_right,
    )
    told["difference"] = _score(Interval(*found), (a - b) / setting.photos)
    said, at = _verdicts([(number, seen[number]) for number in numbers[: len(LOOKS)]])
    told["wrong"] = _wrong(said, a - b)
    told["right"] = float(np.mean(said == np.sign(a - b))) if a != b else None
    told["clicks_used"] = float(at.mean())
    further, _ = _verdicts([(number, seen[number]) for number in numbers[len(LOOKS) :]])
    told["wrong_enlarged"] = _wrong(np.where(said == 0, further, said), a - b)
    return told


def _each(function: Callable[[Any, Any], Any], *counts: NDArray[np.int64]) -> NDArray[Any]:
    """Compute a function of two counts for each draw, once for each pair that occurs."""
    kinds, back = np.unique(np.stack(counts, axis=1), axis=0, return_inverse=True)
    return np.asarray(function(*kinds.T))[..., back.reshape(-1)]


def _score(found: Interval, truth: float) -> dict[str, float]:
    slack = 1e-9  # limits of a census meet at the truth, up to rounding
    inside = (found.low <= truth + slack) & (found.high >= truth - slack)
    return {
        "bias": float(100 * (found.estimate - truth).mean()),
        "bias_error": float(100 * found.estimate.std() / np.sqrt(len(found.estimate))),
        "coverage": float(inside.mean()),
        "half_width": float(50 * (found.high - found.low).mean()),
    }


def _verdicts(at_looks: Sequence[tuple[int, Draws]]) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Return what audits say that stop once a model may be called better, and their clicks."""
    planned = at_looks[-1][1].differ.answered
    said = np.zeros(len(at_looks[0][1].differ.a_right), np.int64)
    used = np.full(len(said), at_looks[-1][0])
    for number, look in at_looks:
        photos, answered, a, b = look.differ

        def now_said(x: Any, y: Any, known: tuple[Any, Any] = (photos, answered)) -> Any:
            return verdict(Tally(*known, x, y), planned)

        now = _each(now_said, a, b)
        used = np.where((said == 0) & (now != 0), number, used)
        said = np.where(said == 0, now, said)
    return said, used


def _wrong(said: NDArray[np.int64], lead: int) -> float:
    """Return how often a model was called better that is not."""
    return float(np.mean((said != 0) & (said != np.sign(lead))))


def tables(results: Sequence[dict[str, Any]]) -> dict[str, list[list[str]]]:
    """Return coverage by accuracy and clicks, verdicts by gain, and what clicks bring."""
    cover = [["interval", "accuracy of A", "clicks", "settings", "mean", "lowest", "highest"]]
    for name, right, clicks in product(("accuracy", "difference"), ACCURACIES, CLICKS):
        rows = [r for r in results if r["accuracy"] == right and r["clicks"] == clicks]
        keys = ("a", "b") if name == "accuracy" else ("difference",)
        found = [100 * r[key]["coverage"] for r in rows for key in keys if r[key]["half_width"]]
        if found:
            numbers = (sum(found) / len(found), min(found), max(found))
            cells = [f"{number:.1f} %" for number in numbers]
            cover.append([name, f"{100 * right:.0f} %", str(clicks), str(len(found)), *cells])
    power = [["A better by", "models differ on", *(f"{clicks} clicks" for clicks in CLICKS)]]
    for gain, differ in product(GAINS, SHARES):
        rows = [r for r in results if r["gain"] == gain and r["differ"] == differ]
        by_clicks = [[r for r in rows if r["clicks"] == n and r["photos"] > 300] for n in CLICKS]
        if all(by_clicks):
            cells = [_verdict_cell(some) for some in by_clicks]
            power.append([f"{100 * gain:.0f} points", f"{100 * differ:.0f} %", *cells])
    return {"Coverage of the 95 % intervals": cover, "Verdicts": power}


def _verdict_cell(rows: Sequence[dict[str, Any]]) -> str:
    width = np.mean([r["difference"]["half_width"] for r in rows])
    if not rows[0]["gain"]:
        return f"± {width:.1f}, wrong {100 * max(r['wrong'] for r in rows):.1f} %"
    told, used = (np.mean([r[key] for r in rows]) for key in ("right", "clicks_used"))
    return f"± {width:.1f}, told {100 * told:.0f} %, {used:.0f} used"


def remarks(results: Sequence[dict[str, Any]]) -> list[str]:
    """Say what the settings have in common."""
    told = []
    for name, keys in {"accuracies": ("a", "b"), "difference": ("difference",)}.items():
        found = [r[key] for r in results for key in keys]
        sampled = np.array([each["coverage"] for each in found if each["half_width"]])
        below, above = (sampled < BAND[0]).sum(), (sampled > BAND[1]).sum()
        told.append(
            f"{name}: coverage is within 94 to 96 % in {len(sampled) - below - above} of "
            f"{len(sampled)} cases, above in {above}, below in {below} (lowest "
            f"{100 * sampled.min():.1f} %). The other {len(found) - len(sampled)} are answered "
            "completely, and exact."
        )
        bias = [abs(e["bias"]) / e["bias_error"] for e in found if e["bias_error"] > 1e-9]
        told.append(f"{name}: bias is at most {max(bias):.1f} standard errors of the simulation.")
    for key, what in {
        "wrong": "stopping as soon as it is allowed",
        "wrong_enlarged": f"asking {ENLARGED} times as often where the first plan could not tell",
    }.items():
        most = 100 * max(r[key] for r in results)
        told.append(f"{what}: a verdict is wrong in at most {most:.1f} % of audits.")
    return told


def main(
    draws: Annotated[int, typer.Option(help="Audits a setting.", min=1)] = DRAWS,
    results_to: Annotated[
        Path | None, typer.Option(help="Write NAME.json and NAME.md with this prefix.")
    ] = None,
) -> None:
    """Simulate all settings and print the tables."""
    results = [measure(setting, draws) for setting in settings()]
    machine = environment()
    title = f"Simulated audits: {len(results)} settings, {draws} draws each"
    text = markdown(title, tables(results), {"In all settings": remarks(results)}, machine)
    document = {"benchmark": "audit coverage", "draws": draws, "results": results}
    document |= {"environment": machine}
    if results_to is not None:
        write_files(results_to.parent, results_to.stem, document, {".md": text})
    print(text)
    print(json.dumps(document))


if __name__ == "__main__":
    typer.run(main)
