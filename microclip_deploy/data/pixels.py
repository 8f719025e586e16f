"""Pixels of any kind -> 8-bit RGB.

* Files of 16 bits a channel keep their high byte, unless the settings or the file say that fewer
  bits hold data. Clipping, Pillow's default for grey, would turn most such photos white.
* Transparent photos lie on the background of the settings.
* What has no defined black or white level is refused: floating-point numbers, negative ones, and
  more than 16 bits.
* Colour profiles are ignored, as open_clip ignores them.
"""

import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops
from PIL.ImageFile import ImageFile

from microclip_deploy.data.photo import DROPPED

_USUAL_DEPTHS = (8, 10, 12, 14)
"""Bits of cameras and of what is written by mistake; less than 16 are told when data fit."""

_TIFF_BITS, _TIFF_INVERTED, _TIFF_PLANES, _TIFF_SIGN = 258, 262, 284, 339
"""Tags: BitsPerSample, PhotometricInterpretation (0: white is zero), PlanarConfiguration (2: one
channel after the other), SampleFormat (2: signed)."""


class Samples(NamedTuple):
    """How an opened file stores its numbers; decoding forgets it."""

    rawmode: str
    """Pillow's; '' where it is none of our business."""
    declared: int | None
    """Bits that hold data, if the file says so."""
    inverted: bool
    """Zero is white, and Pillow does not turn it round."""

    @classmethod
    def of(cls, image: ImageFile) -> "Samples":
        """Look at a file that was opened and not loaded.

        Raises:
            ValueError: Pillow would read other numbers than there are.
        """
        codec, _, _, arguments = image.tile[0] if image.tile else ("", None, 0, "")
        rawmode = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
        declared, tags = None, getattr(image, "tag_v2", {})
        bits = tags.get(_TIFF_BITS, ())
        if tags.get(_TIFF_PLANES) == 2 and len(bits) > 1 and bits[0] > 8:
            raise ValueError("16-bit channels one after the other; interleave them")
        if codec in ("ppm", "ppm_plain"):  # scaled to 16 bits by Pillow: the file tells its white
            declared = 16
        elif rawmode == "I;12":
            declared = 12
        elif image.mode == "I" and tags.get(_TIFF_SIGN, (1,))[0] == 2 and bits == (16,):
            declared = 15
        inverted = image.mode.startswith("I") and tags.get(_TIFF_INVERTED) == 0
        return cls(rawmode if isinstance(rawmode, str) else "", declared, inverted)


class Flat(NamedTuple):
    """Pixels of 8 bits a channel."""

    image: Image.Image
    shallow_bits: int
    """Bits that seem to hold data in 16; 0 where nothing is remarkable."""


def eight_bits(
    image: Image.Image,
    samples: Samples,
    bit_depth: int | None,
    low_bytes: Callable[[str], Image.Image],
) -> Flat:
    """Return loaded pixels with 8 bits a channel; most are already.

    Args:
        image: loaded.
        samples: how its file stores them.
        bit_depth: as in `PhotoConfig`.
        low_bytes: decodes the file once more with another of Pillow's raw modes.

    Raises:
        ValueError: the pixels have no defined white level, or do not fit into `bit_depth`.
    """
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined white level")
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _eight_bits_of_grey(np.asarray(image), samples, bit_depth)
    if ";16" not in samples.rawmode:
        return Flat(image, 0)
    return _eight_bits_of_colour(image, samples.rawmode, bit_depth, low_bytes)


def is_deep(image: Image.Image, samples: Samples) -> bool:
    """Say whether a loaded image has more than 8 bits a channel."""
    return image.mode.startswith("I") or ";16" in samples.rawmode


def has_transparency(image: Image.Image) -> bool:
    """Say whether anything of an image lets the background through."""
    if image.mode in ("LA", "RGBA"):
        return image.getextrema()[-1][0] < 255  # type: ignore[index]  # a pair for each channel
    return image.has_transparency_data


def on_background(image: Image.Image, background: str) -> Image.Image:
    """Return an RGB image of what is not transparent, on a colour.

    Args:
        image: 8 bits a channel, of any mode.
        background: as in `PhotoConfig`.
    """
    if image.mode in ("La", "RGBa"):  # colours times alpha
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if background == DROPPED or not image.has_transparency_data:
        return image.convert("RGB")
    seen = image.convert("RGBA")
    canvas = Image.new("RGB", image.size, background)
    canvas.paste(seen, mask=seen)
    return canvas


def _eight_bits_of_grey(grey: NDArray[np.integer], samples: Samples, bit_depth: int | None) -> Flat:
    """Return numbers of up to 32 bits as mode L."""
    least, peak = int(grey.min()), int(grey.max())
    if least < 0:
        raise ValueError("negative pixels have no defined black level")
    depth = samples.declared or bit_depth or 16
    if depth > 16 or (peak > 0xFFFF and not bit_depth):
        raise ValueError("pixels of more than 16 bits have no defined white level")
    _require_fit(peak, depth)
    shades = (grey >> (depth - 8)).astype(np.uint8)
    unsure = samples.declared is None and bit_depth is None
    inverted = ~shades if samples.inverted else shades
    return Flat(Image.fromarray(inverted), _shallow(peak) if unsure else 0)


def _eight_bits_of_colour(
    high: Image.Image, rawmode: str, bit_depth: int | None, decoded: Callable[[str], Image.Image]
) -> Flat:
    """Return colours of 16 bits a channel as 8 bits; Pillow has kept their high bytes."""
    peak = _peak(high)
    high.info.pop("transparency", None)  # a colour of 16 bits
    if bit_depth is None:
        told = 256 * peak + 255 if peak else _peak(_low_bytes(rawmode, decoded) or high)
        return Flat(high, _shallow(told))
    if bit_depth == 16:
        return Flat(high, 0)
    _require_fit(256 * peak, bit_depth)
    low = _low_bytes(rawmode, decoded)
    if low is None:
        raise ValueError("16-bit pixels of this kind cannot be read at another bit depth")
    joined = ImageChops.add(
        high.point(lambda value: value << (16 - bit_depth)),
        low.point(lambda value: value >> (bit_depth - 8)),
    )
    if "A" in high.getbands() and _peak(high.getchannel("A")) << 8 >= 2**bit_depth:
        joined.putalpha(high.getchannel("A"))  # is of 16 bits, whatever the colours are
    return Flat(joined, 0)


def _low_bytes(rawmode: str, decoded: Callable[[str], Image.Image]) -> Image.Image | None:
    """Return the low bytes of 16-bit colours, or None where Pillow cannot give them.

    The raw mode of the other byte order picks the other byte of each number.
    """
    if rawmode == "LA;16B":  # has no other order, but is as wide as RGBA
        _, grey, _, alpha = decoded("RGBA").split()
        return Image.merge("RGBA", (grey, grey, grey, alpha))
    name, _, order = rawmode.partition(";16")
    if name not in ("RGB", "RGBA", "RGBX"):
        return None
    if order == "N":  # as this machine has it
        order = "L" if sys.byteorder == "little" else "B"
    return decoded(f"{name};16{'B' if order == 'L' else 'L'}")


def _require_fit(peak: int, bit_depth: int) -> None:
    if peak >= 2**bit_depth:
        raise ValueError(f"values of up to {peak} do not fit into --bit-depth {bit_depth}")


def _shallow(peak: int) -> int:
    """Return how many bits a largest value suggests; 0 if 16, or if there is nothing to see."""
    return next((bits for bits in _USUAL_DEPTHS if 0 < peak < 2**bits), 0)


def _peak(image: Image.Image) -> int:
    """Return the largest value of all channels but alpha."""
    channels = [image.getchannel(band) for band in image.getbands() if band != "A"]
    return max(int(np.asarray(channel).max()) for channel in channels)
