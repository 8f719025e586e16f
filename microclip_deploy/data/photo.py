"""How photo files are read, and what reading one gives."""

from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from PIL import Image, ImageColor
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from microclip_deploy.errors import UsageError, printable

MAX_PIXELS = 200_000_000
"""Default largest width x height; covers the cameras of phones (200 million)."""

DROPPED = "none"
"""Background that stands for dropping the alpha channel."""


def _colour(name: str) -> str:
    """Refuse what is no colour; pydantic turns the ValueError into its message."""
    if name != DROPPED:
        ImageColor.getrgb(name)
    return name


class PhotoConfig(BaseModel):
    """How photo files are read; kept with a model, so that it sees what it was adapted to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_pixels: int = Field(default=MAX_PIXELS, ge=4)
    """Largest width x height that is decoded; files may hold 8 bytes a pixel of it."""
    bit_depth: int | None = Field(default=None, ge=8, le=16)
    """Bits that hold data in files of 16 bits a channel, from the lowest one on. None: all 16,
    with a remark where the numbers look as if there were fewer."""
    background: Annotated[str, AfterValidator(_colour)] = "white"
    """Colour behind transparent photos, by name or as #rrggbb; "none" drops their alpha channel
    and shows the colours that it hides."""

    @classmethod
    def of(cls, **values: Any) -> "PhotoConfig":
        """Return the settings; what is None has its default.

        Raises:
            UsageError: a value out of range, or a background that is no colour.
        """
        try:
            return cls(**{name: value for name, value in values.items() if value is not None})
        except ValidationError as error:
            problem = error.errors()[0]
            raise UsageError(
                f"{problem['loc'][0]}: expected another value ({problem['msg']}), found "
                f"{problem['input']!r}; give another"
            ) from error

    def changed(self, **values: Any) -> "PhotoConfig":
        """Return a copy with those values that are not None; raises as `of`."""
        news = {name: value for name, value in values.items() if value is not None}
        return PhotoConfig.of(**{**self.model_dump(), **news})


USUAL = PhotoConfig()
"""The defaults."""


class Kind(StrEnum):
    """Kinds of remarks, with what they say about several photos."""

    SHALLOW = (
        "16-bit photos with no value above {white}, read as nearly black: {count}, such as {path}; "
        "if white is {white} in them, give --bit-depth {bits}"
    )
    FIRST_FRAME = "photos of several frames or pages, read as the first: {count}, such as {path}"
    UNENDED = "JPEG files without their end, of which nearly all is there: {count}, such as {path}"
    REDUCED = "photos of over 50 megapixels, decoded at reduced size: {count}, such as {path}"


class Remark(NamedTuple):
    """What the owner of photos may want to know about one that was read."""

    kind: Kind
    bits: int = 0
    """Of SHALLOW: how many seem to hold data."""

    def line(self, path: Path, count: int = 1) -> str:
        """Say it of `count` photos, the first of which is `path`."""
        facts = {"bits": self.bits, "white": 2**self.bits - 1}
        return self.kind.format(path=printable(path), count=count, **facts)


class Photo(NamedTuple):
    """A photo in memory."""

    image: Image.Image
    """Mode RGB, upright, without metadata."""
    remarks: tuple[Remark, ...] = ()
    depends: bool = False
    """The pixels would be others with another `bit_depth` or `background`."""


class Remarks:
    """The remarks on all photos of a command: of each kind how many, and the first photo."""

    def __init__(self) -> None:
        self._seen: dict[Kind, tuple[Remark, Path, int]] = {}

    def add(self, path: Path, remarks: Iterable[Remark]) -> None:
        """Note what reading a photo told."""
        for remark in remarks:
            before, first, count = self._seen.get(remark.kind, (remark, path, 0))
            self._seen[remark.kind] = (max(before, remark), first, count + 1)

    def lines(self) -> list[str]:
        """Return one line a kind."""
        return [remark.line(first, count) for remark, first, count in self._seen.values()]
