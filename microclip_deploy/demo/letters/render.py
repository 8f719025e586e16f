"""Render one glyph as a 64x64 image, in the source or in the target domain.

Source: DejaVu faces, dark ink on light paper, mild noise (what the model is pretrained on).
Target: faces never pretrained on, photographed through haze: low contrast, textured paper, stray
marks, blur. All target settings grow with one severity knob, chosen on the validation split and
then frozen (`TARGET_SEVERITY`). Font files are those inside the matplotlib package.

Every random number of an image comes from one generator, `image_generator(seed, split, index)`,
so any image can be rendered again from its index alone.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

IMAGE_SIDE = 64
SOURCE_FACES = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSansMono-BoldOblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
    "DejaVuSerif-BoldItalic",
)
HELD_OUT_FACES = ("DejaVuSans-BoldOblique", "DejaVuSansMono-Oblique")
TARGET_FACES = (*HELD_OUT_FACES, "STIXGeneral", "STIXGeneralBol")
TARGET_SEVERITY = 1.0

_INKS = {
    "black": (20, 20, 20),
    "blue": (40, 70, 190),
    "red": (200, 40, 40),
    "green": (40, 140, 60),
    "purple": (130, 60, 160),
    "brown": (120, 80, 45),
}
_PAPERS = {
    "white": (245, 245, 245),
    "yellow": (235, 215, 70),
    "pink": (240, 170, 190),
    "grey": (135, 135, 135),
    "cyan": (90, 200, 210),
    "orange": (235, 140, 50),
}
_OVERSAMPLING = 2
_PADDING_PX = 4  # room around the glyph box for anti-aliased edges
_HAZE = np.array((170.0, 170.0, 175.0), np.float32)  # the light a dirty lens adds

Range = tuple[float, float]


@dataclass(frozen=True)
class Domain:
    """Settings of one image domain; ranges are drawn uniformly per image, in 0..255 units."""

    faces: tuple[str, ...]
    """Font file stems."""
    size: Range = (0.5, 0.9)
    """Font size as a share of the image side."""
    rotation_deg: float = 4.0
    """Standard deviation of the rotation."""
    shear: float = 0.0
    """Largest horizontal shear."""
    offset: float = 0.3
    """Largest shift of the glyph as a share of the free room (0.5 reaches the border)."""
    shade: Range = (0.0, 40.0)
    """Amplitude of smooth uneven light."""
    texture: Range = (0.0, 0.0)
    """Amplitude of the paper texture."""
    clutter: float = 0.0
    """Mean number of stray lines, circles and patches."""
    haze: Range = (0.0, 0.0)
    """Share of every pixel replaced by flat grey light: lowers the contrast."""
    blur_px: Range = (0.0, 0.0)
    """Radius of the Gaussian blur."""
    noise: Range = (0.0, 6.0)
    """Standard deviation of the pixel noise."""


class PrintStyle(NamedTuple):
    """What a caption may say about the print itself: face style, ink and paper colour."""

    style: str
    ink: str
    paper: str


class RenderedGlyph(NamedTuple):
    """One image and what is known about it."""

    image: NDArray[np.uint8]
    """(64, 64, 3), RGB."""
    ink: NDArray[np.float32]
    """(64, 64) in [0, 1], coverage by the glyph's ink before blur and noise."""
    style: PrintStyle


def target_domain(severity: float) -> Domain:
    """Return the target domain at a severity: 0 is a clean print in the target faces.

    Haze does most of the harm: it leaves a quarter of the contrast at severity 1.
    """
    return Domain(
        faces=TARGET_FACES,
        size=(0.55, 0.9),
        shear=0.04 * severity,
        texture=(2.0 * severity, 8.0 * severity),
        clutter=0.3 * severity,
        haze=(min(0.69 * severity, 0.95), min(0.75 * severity, 0.95)),
        blur_px=(0.2 * severity, 0.6 * severity),
        noise=(3.0 * severity, 6.0 * severity),
    )


SOURCE = Domain(faces=SOURCE_FACES)
TARGET = target_domain(TARGET_SEVERITY)


def image_generator(seed: int, split: int, index: int) -> np.random.Generator:
    """Return the generator of one image; different (seed, split, index) are independent."""
    return np.random.default_rng([seed, split, index])


def render_glyph(character: str, domain: Domain, rng: np.random.Generator) -> RenderedGlyph:
    """Render one character with every choice drawn from `rng`.

    Args:
        character: one precomposed letter.
        domain: `SOURCE`, `TARGET` or `target_domain(severity)`.
        rng: numpy generator; same state, same image.

    Returns:
        The image, its ink coverage and its print style.
    """
    face = domain.faces[rng.integers(len(domain.faces))]
    ink_name = tuple(_INKS)[rng.integers(len(_INKS))]
    paper_name = tuple(_PAPERS)[rng.integers(len(_PAPERS))]
    ink_colour = np.clip(np.array(_INKS[ink_name]) + rng.normal(0, 15, 3), 0, 255) * 0.75
    paper_colour = np.clip(np.array(_PAPERS[paper_name]) + rng.normal(0, 10, 3), 0, 255) * 0.5 + 127
    ink = _ink_mask(character, face, domain, rng)
    paper = _paper(paper_colour.astype(np.float32), domain, rng)
    image = paper + (ink_colour.astype(np.float32) - paper) * ink[..., None]
    image = _photograph(image, domain, rng)
    return RenderedGlyph(image, ink, PrintStyle(_style(face), ink_name, paper_name))


@lru_cache(maxsize=512)
def load_face(face: str, size_px: int) -> ImageFont.FreeTypeFont:
    """Load a face of the matplotlib package at one pixel size (cached per process)."""
    import matplotlib  # heavy, and only its data folder is needed

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/{face}.ttf", size_px)


def _style(face: str) -> str:
    words = ["bold"] if "Bol" in face else []
    words += ["slanted"] if "Obl" in face or "Ita" in face else []
    words.append("mono" if "Mono" in face else "sans" if "Sans" in face else "serif")
    return " ".join(words)


def _ink_mask(
    character: str, face: str, domain: Domain, rng: np.random.Generator
) -> NDArray[np.float32]:
    """Draw the glyph oversampled, shear and turn it, and place its ink box in the image."""
    size_px = round(rng.uniform(*domain.size) * IMAGE_SIDE * _OVERSAMPLING)
    font = load_face(face, size_px)
    left, top, right, bottom = (int(edge) for edge in font.getbbox(character))
    box = (right - left + 2 * _PADDING_PX, bottom - top + 2 * _PADDING_PX)
    glyph = Image.new("L", box)
    origin = (_PADDING_PX - left, _PADDING_PX - top)
    ImageDraw.Draw(glyph).text(origin, character, 255, font=font)
    glyph = _sheared(glyph, rng.uniform(-1, 1) * domain.shear)
    angle = float(rng.normal(0, domain.rotation_deg))
    glyph = glyph.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    glyph = glyph.crop(glyph.getbbox())
    room = IMAGE_SIDE - 2
    shrink = min(1 / _OVERSAMPLING, room / max(glyph.size))
    width, height = (max(1, round(side * shrink)) for side in glyph.size)
    glyph = glyph.resize((width, height), Image.Resampling.BOX)
    shift_x, shift_y = 0.5 + rng.uniform(-domain.offset, domain.offset, 2)
    canvas = Image.new("L", (IMAGE_SIDE, IMAGE_SIDE))
    canvas.paste(glyph, (round(1 + shift_x * (room - width)), round(1 + shift_y * (room - height))))
    return np.asarray(canvas, np.float32) / np.float32(255)


def _sheared(glyph: Image.Image, shear: float) -> Image.Image:
    if shear == 0:
        return glyph
    width = glyph.width + int(abs(shear) * glyph.height)
    start = -shear * glyph.height if shear > 0 else 0.0
    affine = (1, shear, start, 0, 1, 0)
    return glyph.transform(
        (width, glyph.height), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR
    )


def _smooth_field(rng: np.random.Generator, cells: int) -> NDArray[np.float32]:
    """Return float32 (64, 64) in about [-1, 1]: random values on a grid, smoothly enlarged."""
    grid = Image.fromarray((rng.random((cells, cells)) * 255).astype(np.uint8))
    side = (IMAGE_SIDE, IMAGE_SIDE)
    return (
        np.asarray(grid.resize(side, Image.Resampling.BICUBIC), np.float32) / np.float32(127.5) - 1
    )


def _paper(
    colour: NDArray[np.float32], domain: Domain, rng: np.random.Generator
) -> NDArray[np.float32]:
    """Return float32 (64, 64, 3): paper colour with uneven light, texture and clutter."""
    light = _smooth_field(rng, 3) * np.float32(rng.uniform(*domain.shade) / 2)
    paper = colour + light[..., None]
    amplitude = np.float32(rng.uniform(*domain.texture))
    if amplitude > 0:
        paper = paper + amplitude * _texture(rng)
    if domain.clutter > 0:
        paper = _cluttered(paper, float(amplitude), domain.clutter, rng)
    return paper


def _texture(rng: np.random.Generator) -> NDArray[np.float32]:
    """Return float32 (64, 64, 3) in [-1, 1]: stripes, checks or blotches of one random colour."""
    rows, columns = np.mgrid[0:IMAGE_SIDE, 0:IMAGE_SIDE].astype(np.float32) / IMAGE_SIDE
    phase = rng.uniform(0, 2 * np.pi, 2)
    kind = rng.integers(3)
    if kind == 0:
        angle, cycles = rng.uniform(0, np.pi), rng.uniform(4, 12)
        along = columns * np.cos(angle) + rows * np.sin(angle)
        pattern = np.sin(2 * np.pi * cycles * along + phase[0])
    elif kind == 1:
        cycles = rng.uniform(3, 8)
        waves = np.sin(2 * np.pi * cycles * columns + phase[0])
        pattern = np.sign(waves * np.sin(2 * np.pi * cycles * rows + phase[1]))
    else:
        pattern = np.sign(_smooth_field(rng, int(rng.integers(6, 14))))
    tint = rng.normal(0, 1, 3) + 1  # mostly brightness, a little colour
    tint /= np.abs(tint).max()
    return np.asarray(pattern[..., None] * tint, np.float32)


def _cluttered(
    paper: NDArray[np.float32], amplitude: float, mean_count: float, rng: np.random.Generator
) -> NDArray[np.float32]:
    """Draw stray lines, circles and patches in colours close to the paper."""
    image = Image.fromarray(np.clip(paper, 0, 255).astype(np.uint8))
    draw, base = ImageDraw.Draw(image), paper.mean((0, 1))
    for _ in range(rng.poisson(mean_count)):
        tone = np.clip(base + rng.normal(0, 1.4 * amplitude, 3), 0, 255)
        colour = (int(tone[0]), int(tone[1]), int(tone[2]))
        x0, y0, x1, y1 = (int(v) for v in rng.integers(-8, IMAGE_SIDE + 8, 4))
        width, side = int(rng.integers(1, 4)), int(rng.integers(6, 26))
        kind = rng.integers(3)
        if kind == 0:
            draw.line((x0, y0, x1, y1), fill=colour, width=width)
        elif kind == 1:
            draw.ellipse((x0, y0, x0 + side, y0 + side), outline=colour, width=width)
        else:
            draw.rectangle((x0, y0, x0 + side, y0 + side // 2), fill=colour)
    return np.asarray(image, np.float32)


def _photograph(
    image: NDArray[np.float32], domain: Domain, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Apply haze, blur and pixel noise, and round to uint8."""
    haze = np.float32(rng.uniform(*domain.haze))
    image = image * (1 - haze) + _HAZE * haze
    radius_px = float(rng.uniform(*domain.blur_px))
    if radius_px > 0:
        blurred = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))
        image = np.asarray(blurred.filter(ImageFilter.GaussianBlur(radius_px)), np.float32)
    deviation = np.float32(rng.uniform(*domain.noise))
    image = image + rng.standard_normal(image.shape, dtype=np.float32) * deviation
    return np.clip(image, 0, 255).astype(np.uint8)
