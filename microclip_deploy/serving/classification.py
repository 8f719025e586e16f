"""What a model says about a photo, with the names of the classes, for people who call it.

Probabilities are the softmax of the fused logits at the model's temperature, as
`microclip_deploy.calibration` reads them. How far they can be trusted docs/calibration.md tells.
"""

import base64
import io
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from html import escape
from itertools import count, islice
from numbers import Integral
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from microclip_deploy.calibration import Calibration, is_unknown, probabilities
from microclip_deploy.data.picture import Picture, read_picture
from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.errors import DataError, UsageError
from microclip_deploy.processors import usable_cpus
from microclip_deploy.serving.overlay import photo_mask, photo_overlay

if TYPE_CHECKING:
    from microclip_deploy.serving.session import Session

_MAX_READERS = 8
"""Threads that decode; the GIL is released, and above this the disk is the limit."""

_SHOWN_SIDE = 320
"""Longest side of the picture in a notebook, pixels."""


class Guess(NamedTuple):
    """One class an image may show."""

    name: str
    probability: float
    """Softmax of the fused logits over all classes, at the model's temperature."""
    logit: float
    adapted: bool = True
    """False for a class that was added after the adaptation: its accuracy is zero-shot."""


@dataclass(frozen=True, eq=False, repr=False)
class Classification:
    """What the model says about one photo; a notebook shows it as a picture with a table."""

    picture: Picture
    """What was given. It is read again when it is drawn, so leave it as it is until then."""
    size: tuple[int, int]
    """Width and height of the photo, upright."""
    top: tuple[Guess, ...]
    """Most probable first."""
    tokens: NDArray[np.bool_]
    """(N,), row-major token grid: the saliency mask as the model has it."""
    attention: NDArray[np.float32]
    """(N+1,): SOAP's weights; the last entry is the zero token's."""
    complete: bool
    """The saliency graph joins every pair of tokens: the mask is all True and says nothing."""
    preprocess: Preprocess
    """Of the session: what the token grid covers."""
    unknown: bool = False
    """The best class is less probable than the model's threshold: do not rely on it."""

    @property
    def class_name(self) -> str:
        """Return the most probable class, also where `unknown` warns of it."""
        return self.top[0].name

    @property
    def probability(self) -> float:
        """Return its probability, as in `Guess`."""
        return self.top[0].probability

    @property
    def mask(self) -> NDArray[np.bool_]:
        """Return bool (H, W), of the photo's size: where the model sees the foreground.

        What the model's view cuts off the photo is False.
        """
        return photo_mask(self.size, self.preprocess.seen(self.size), self.tokens)

    def photo(self) -> Image.Image:
        """Return the photo, upright and RGB; raises as `read_picture`."""
        return read_picture(self.picture, self.preprocess.photos)

    def overlay(self, max_side: int | None = None) -> Image.Image:
        """Draw the mask and the attention on the photo.

        Args:
            max_side: longest side of the picture, pixels; None for the photo's own size.

        Raises:
            DataError: the photo can no longer be read.
            UsageError: `max_side` is no whole number from 1 on.
        """
        photo = self.photo()
        box = self.preprocess.seen(photo.size)
        if max_side is not None and _whole("max_side", max_side) < max(photo.size):
            scale = max_side / max(photo.size)
            width, height = (max(1, round(side * scale)) for side in photo.size)
            left, top, right, bottom = (edge * scale for edge in box)
            photo, box = photo.resize((width, height)), (left, top, right, bottom)
        return photo_overlay(photo, box, self.tokens, self.attention)

    def __repr__(self) -> str:
        """Return the classes with their probabilities."""
        told = ", ".join(f"{guess.name} {guess.probability:.3f}" for guess in self.top)
        return f"<{'unknown: ' if self.unknown else ''}{told}>"

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        rows = "".join(
            f"<tr><td style='text-align:left'><bdi>{escape(guess.name)}</bdi>"
            f"{'' if guess.adapted else ' (zero-shot)'}</td>"
            f"<td style='text-align:right'>{guess.probability:.3f}</td></tr>"
            for guess in self.top
        )
        head = "<tr><th style='text-align:left'>class</th><th>probability</th></tr>"
        note = "<caption>unknown</caption>" if self.unknown else ""
        return (
            "<div style='display:flex;flex-wrap:wrap;gap:1em;align-items:flex-start'>"
            f"{self._shown()}<table>{note}{head}{rows}</table></div>"
        )

    def _shown(self) -> str:
        """Return the picture as HTML; a remark where the photo is gone."""
        try:
            picture = self.overlay(_SHOWN_SIDE)
        except DataError as error:
            return f"<p>{escape(str(error))}</p>"
        stream = io.BytesIO()
        picture.save(stream, "PNG")
        data = base64.b64encode(stream.getvalue()).decode("ascii")
        alt = escape(f"where the model looks: {self.class_name}", quote=True)
        return f'<img src="data:image/png;base64,{data}" alt="{alt}">'


def classifications(
    session: "Session", pictures: Iterable[Picture], top_k: int, batch_size: int
) -> Iterator[Classification]:
    """Yield what a session says about each picture, in their order, a batch at a time.

    Raises:
        DataError: one of them is no picture, or a bad one; it is named.
        UsageError: `top_k` or `batch_size` is no whole number from 1 on.
    """
    top_k, batch_size = _whole("top_k", top_k), _whole("batch_size", batch_size)

    def view(picture: Picture, index: int) -> _View:
        photo = read_picture(picture, session.preprocess.photos, f"pictures[{index}]")
        return _View(picture, photo.size, session.preprocess.test_view(photo))

    rest, begin = iter(pictures), 0
    with ThreadPoolExecutor(min(_MAX_READERS, usable_cpus())) as pool:
        while batch := list(islice(rest, batch_size)):
            yield from _classified(session, list(pool.map(view, batch, count(begin))), top_k)
            begin += len(batch)


def _whole(name: str, number: int) -> int:
    if isinstance(number, Integral) and number >= 1:
        return int(number)
    raise UsageError(f"{name}: expected a whole number from 1 on, found {number!r}; give another")


class _View(NamedTuple):
    """A photo as the model sees it."""

    picture: Picture
    size: tuple[int, int]
    pixels: NDArray[np.uint8]


def _classified(session: "Session", views: list[_View], top_k: int) -> Iterator[Classification]:
    found = session.predict(np.stack([view.pixels for view in views]))
    ranked = guesses(session, found.logits, top_k)
    told = zip(views, ranked, found.mask, found.attention, found.complete, strict=True)
    for view, top, mask, attention, complete in told:
        unknown = is_unknown(top[0].probability, session.calibration)
        yield Classification(
            view.picture,
            view.size,
            top,
            mask,
            attention,
            bool(complete),
            session.preprocess,
            unknown,
        )


class Names(Protocol):
    """What knows the names of classes, as a session does."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Return them in the order of the logits."""

    @property
    def unadapted(self) -> frozenset[str]:
        """Return those that were added after the adaptation."""

    @property
    def calibration(self) -> Calibration | None:
        """Return how the logits are read."""


def guesses(known: Names, logits: NDArray[np.float32], top_k: int) -> Iterator[tuple[Guess, ...]]:
    """Yield the `top_k` best classes, or all if there are fewer, of each row of (B, C) logits.

    Of equal logits the class that is named first comes first.
    """
    order = np.argsort(-logits, axis=1, kind="stable")[:, :top_k]
    told = probabilities(logits, known.calibration)
    for best, row, shares in zip(order.tolist(), logits, told, strict=True):
        names = [known.classes[c] for c in best]
        yield tuple(
            Guess(name, float(shares[c]), float(row[c]), adapted=name not in known.unadapted)
            for c, name in zip(best, names, strict=True)
        )
