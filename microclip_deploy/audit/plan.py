"""The plan of an audit: what was drawn before anybody answered. It never changes afterwards.

`plan.json` holds what both models say about the drawn photos, how many photos there are of each
kind, and what tells other models, photos and seeds apart from these.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from microclip_deploy import artifact
from microclip_deploy.audit.models import Facts, Model, Opinions
from microclip_deploy.audit.sample import order
from microclip_deploy.data.photo import PhotoConfig
from microclip_deploy.data.sources import ImageSet
from microclip_deploy.errors import CheckpointError, UsageError, printable

PLAN = "plan.json"
FORMAT = "microclip.audit-plan/1"
NEITHER, SKIP = WORDS = ("neither", "skip")
"""Answers that are no class."""
_EXAMPLES = 3  # photos that show what a class looks like


class Drawn(NamedTuple):
    """A photo that is asked about."""

    path: str
    """Relative to the folder of the photos."""
    classes: tuple[int, int]
    """What A and B say."""
    confidence: tuple[float, float]
    """Of A and of B: largest softmax probability, not calibrated."""
    swapped: bool
    """What B says is shown first, so that nobody knows whose answer is whose."""

    @property
    def differ(self) -> bool:
        """Say whether the models say something else."""
        return self.classes[0] != self.classes[1]

    @property
    def shown(self) -> tuple[int, ...]:
        """Return the classes to choose from, in the order shown."""
        a, b = self.classes
        return (a,) if a == b else (b, a) if self.swapped else (a, b)


class Plan(BaseModel):
    """What was drawn, and of what."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: str = FORMAT
    seed: int
    models: tuple[Facts, Facts]
    photos_sha256: str
    """Of all names and sizes of files."""
    reading: PhotoConfig
    """How photos are read."""
    planned: tuple[int, ...]
    """Clicks asked for; a further number each time that more were asked for."""
    classes: tuple[str, ...]
    differ: int
    """Photos on which the models differ."""
    agree: int
    predicted: dict[int, tuple[tuple[int, int], tuple[int, int]]]
    """Class -> photos of which A says so, where the models (differ, agree); the same of B."""
    examples: dict[int, tuple[str, ...]]
    """Class -> photos that both models take for it, the surest first; of the classes drawn."""
    drawn: tuple[Drawn, ...]
    """In the order in which they are asked about."""

    @property
    def titles(self) -> tuple[str, str]:
        """Return what the models are called."""
        return self.models[0]["title"], self.models[1]["title"]

    @property
    def photos(self) -> int:
        """Return how many photos the results are about."""
        return self.differ + self.agree


def fingerprint(listed: ImageSet) -> str:
    """Return a hash of the names and sizes of all photos; nothing is read."""
    digest = hashlib.sha256()
    for path in listed.paths:
        name = _relative(path, listed.root)
        size = path.stat().st_size if path.exists() else -1
        digest.update(f"{name}\0{size}\n".encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


def _relative(path: Path, root: Path) -> str:
    return str(path.relative_to(root) if path.is_relative_to(root) else path.absolute())


def make_plan(
    facts: tuple[Facts, Facts],
    model: Model,
    said: Opinions,
    listed: ImageSet,
    *,
    clicks: int,
    seed: int,
) -> Plan:
    """Draw the photos that are asked about.

    Args:
        facts: of both models.
        model: A.
        said: what both say.
        listed: the photos.
        clicks: how many are drawn.
        seed: of the draw.

    Raises:
        UsageError: a class has the name of an answer.
    """
    if words := [name for name in model.session.classes if name.casefold() in WORDS]:
        raise UsageError(
            f"audit: expected class names other than {' and '.join(WORDS)}, which are answers, "
            f"found '{words[0]}'; rename the class"
        )
    names = [_relative(listed.paths[row], listed.root) for row in said.rows]
    differ = said.best[0] != said.best[1]
    places = order(differ, seed)[:clicks]
    swaps = np.random.default_rng([seed, 1]).random(len(names)) < 0.5
    drawn = tuple(
        Drawn(
            names[row],
            (int(said.best[0, row]), int(said.best[1, row])),
            (float(said.confidence[0, row]), float(said.confidence[1, row])),
            bool(swaps[row]),
        )
        for row in places
    )
    return Plan(
        seed=seed,
        models=facts,
        photos_sha256=fingerprint(listed),
        reading=model.session.preprocess.photos,
        planned=(min(clicks, len(names)),),
        classes=model.session.classes,
        differ=int(differ.sum()),
        agree=int((~differ).sum()),
        predicted=_predicted(said, differ),
        examples=_examples(said, names, places.tolist()),
        drawn=drawn,
    )


def _predicted(said: Opinions, differ: Any) -> dict[int, Any]:
    classes = int(said.best.max()) + 1
    counts = [
        [np.bincount(best[kind], minlength=classes) for kind in (differ, ~differ)]
        for best in said.best
    ]
    table = np.array(counts).transpose(2, 0, 1)
    return {row: tuple(map(tuple, table[row].tolist())) for row in np.unique(said.best).tolist()}


def _examples(
    said: Opinions, names: Sequence[str], places: Sequence[int]
) -> dict[int, tuple[str, ...]]:
    """Return the surest photos of each class that may be shown; none that is asked about."""
    taken, found = set(places), dict[int, list[str]]()
    wanted = set(said.best[:, list(places)].ravel().tolist())
    for row in np.argsort(-said.confidence.min(axis=0), kind="stable").tolist():
        a, b = said.best[:, row].tolist()
        if a == b and a in wanted and row not in taken:
            of_class = found.setdefault(a, [])
            if len(of_class) < _EXAMPLES:
                of_class.append(names[row])
    return {row: tuple(paths) for row, paths in found.items()}


def write_plan(directory: Path, plan: Plan) -> None:
    """Write it whole."""
    artifact.write_json(directory / PLAN, plan.model_dump(mode="json"))


def read_plan(directory: Path) -> Plan | None:
    """Return the plan of an audit that was begun here, or None.

    Raises:
        CheckpointError: it is damaged, or of another version.
    """
    path = directory / PLAN
    if not path.exists():
        return None
    stored = artifact.read_json(path)
    found = stored.get("format") if isinstance(stored, dict) else None
    try:
        if found == FORMAT:
            return Plan.model_validate(stored)
    except ValidationError as error:
        first = error.errors()[0]
        found = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    raise CheckpointError(
        f"{printable(path)}: expected a plan of the format {FORMAT}, found {found}; restore it, or "
        "begin another audit with another -o"
    )


def require_same(
    plan: Plan, models: Sequence[Facts], photos_sha256: str, seed: int, place: Path
) -> None:
    """Refuse to go on with an audit of something else.

    Raises:
        UsageError: other models, photos, or another seed.
    """
    for known, given in zip(plan.models, models, strict=True):
        if (known["title"], known["sha256"]) != (given["title"], given["sha256"]):
            wanted, got = (f"{each['title']} of {each['directory']}" for each in (known, given))
            changed = "; it has been changed since" if wanted == got else ""
            raise _other(place, f"the model {wanted}", f"{got}{changed}")
    if plan.photos_sha256 != photos_sha256:
        raise _other(place, "the same photos", "others: files were added, removed or changed")
    if plan.seed != seed:
        raise _other(place, f"--seed {plan.seed}", f"{seed}")


def _other(place: Path, wanted: str, found: str) -> UsageError:
    return UsageError(
        f"{printable(place)}: the audit there was begun with something else: expected {wanted}, "
        f"found {found}; give what it was begun with, or another -o"
    )


def enlarged(plan: Plan, again: Plan) -> Plan:
    """Return a plan with more photos, of which those drawn before are the first.

    Raises:
        UsageError: the models say something else than before, as on another device.
    """
    same = [row.path for row in again.drawn[: len(plan.drawn)]] == [row.path for row in plan.drawn]
    if not same:
        raise UsageError(
            "--clicks: expected the models to say the same again, found other answers; use the "
            "device of the first time, or begin another audit with another -o"
        )
    kept = plan.drawn + again.drawn[len(plan.drawn) :]
    return again.model_copy(update={"planned": plan.planned + again.planned, "drawn": kept})
