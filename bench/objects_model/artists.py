"""Emoji of seven artists as sheets of tiles, from the icon sets that the npm registry carries.

    npm install @iconify-json/{noto@1.2.9,noto-v1@1.2.5,emojione@1.2.3,fxemoji@1.2.2}
    npm install @iconify-json/{streamline-emojis@1.2.4,twemoji@1.2.5,fluent-emoji-flat@1.2.6}
    pip install resvg-py==0.5.0
    python -m microclip_deploy.bench.objects_model.artists node_modules/@iconify-json sheets

`sheets/` gets ARTIST.png and ARTIST.json for each set. `--shipped DIR` writes the sheets of the
benchmark itself.
"""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image

from microclip_deploy.artifact import write_json
from microclip_deploy.demo.objects.drawings import (
    TARGET_ARTISTS,
    TILE,
    Sheet,
    read_sheet,
    sheet_image,
)
from microclip_deploy.demo.objects.names import CLASSES, CLUTTER

SOURCE_ARTISTS = ("noto", "noto-v1", "emojione", "streamline-emojis", "fxemoji")
"""Whose animals the tiny model is pretrained on."""

ARTISTS = SOURCE_ARTISTS + TARGET_ARTISTS

_PICTOGRAPHS = 0x1F300
"""First code point of the emoji that are taken: of one code point, without skin tone."""
_LEFT_OUT = ("clock", "button", "skin-tone")
_FXEMOJI = {
    "ewe": "sheep",
    "camel": "dromedarycamel",
    "two-hump-camel": "bactriancamel",
    "panda": "pandaface",
    "wolf": "wolfface",
    "spouting-whale": "spurtingwhale",
    "front-facing-baby-chick": "frontfacingchick",
    "dragon-face": "dragonhead",
}
"""Emoji that fxemoji calls by a name of its own."""
_RASTER = 128  # pixels, before a drawing is cut to its bounding box


def main(
    icons: Annotated[Path, typer.Argument(help="Folder with the icon sets, one folder each.")],
    out: Annotated[Path, typer.Argument(help="Folder of the sheets.")],
    shipped: Annotated[Path | None, typer.Option(help="Folder of the benchmark's sheets.")] = None,
) -> None:
    """Draw every emoji by every artist."""
    names = emoji_names(icons / "noto")
    for folder in filter(None, (out, shipped)):
        folder.mkdir(parents=True, exist_ok=True)
    for artist in ARTISTS:
        sheet = draw_set(json.loads((icons / artist / "icons.json").read_text("utf-8")), names)
        sheet_image(list(sheet.values())).save(out / f"{artist}.png", optimize=True)
        write_json(out / f"{artist}.json", list(sheet))
        print(f"{artist}: {len(sheet)} drawings")
        if shipped is not None and artist in TARGET_ARTISTS:
            shown = [sheet[name] for name in CLASSES + CLUTTER]
            sheet_image(shown).save(shipped / f"{artist}.png", optimize=True)


def read_sheets(folder: Path) -> dict[str, Sheet]:
    """Return the sheets of every artist that `main` wrote."""
    return {
        artist: read_sheet(
            folder / f"{artist}.png", json.loads((folder / f"{artist}.json").read_text("utf-8"))
        )
        for artist in ARTISTS
    }


def emoji_names(noto: Path) -> list[str]:
    """Return the names of the emoji, as the set that has most of them spells them."""
    characters = json.loads((noto / "chars.json").read_text("utf-8"))
    return [
        name
        for code, name in characters.items()
        if "-" not in code
        and int(code, 16) >= _PICTOGRAPHS
        and not any(word in name for word in _LEFT_OUT)
    ]


def draw_set(icons: Mapping[str, Any], names: Sequence[str]) -> Sheet:
    """Return an artist's drawings of the named emoji, those it has, by name with spaces."""
    drawn = {}
    for name in names:
        own = _own_name(name, icons)
        if own in icons["icons"]:
            drawn[name.replace("-", " ")] = _tile(_svg(icons, own))
    return drawn


def _own_name(name: str, icons: Mapping[str, Any]) -> str:
    """Return what the set calls an emoji; the name itself where it has none of it."""
    known, plain = icons["icons"], name.replace("-", "")
    if icons["prefix"] != "fxemoji":
        return name if name in known else icons.get("aliases", {}).get(name, {}).get("parent", name)
    if name in _FXEMOJI:
        return _FXEMOJI[name]
    if plain + "side" in known:  # a plain name is the face, the whole animal is a "side"
        return plain + "side"
    face = plain.removesuffix("face")
    return face if face + "side" in known else plain


def _svg(icons: Mapping[str, Any], name: str) -> str:
    icon = {"left": 0, "top": 0, "width": 16, "height": 16} | {
        key: icons[key] for key in ("width", "height") if key in icons
    }
    icon |= icons["icons"][name]
    box = f"{icon['left']} {icon['top']} {icon['width']} {icon['height']}"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box}" width="{_RASTER}" height="{_RASTER}">{icon["body"]}</svg>'
    )


def _tile(svg: str) -> NDArray[np.uint8]:
    """Draw one emoji, (TILE, TILE, 4), colours multiplied by alpha, touching the tile's sides."""
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=svg, width=_RASTER, skip_system_fonts=True)
    image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    image = image.crop(image.getchannel("A").getbbox())
    side = max(image.size)
    square = Image.new("RGBA", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    small = square.convert("RGBa").resize((TILE, TILE), Image.Resampling.LANCZOS)
    return np.asarray(small, np.uint8)


if __name__ == "__main__":
    typer.run(main)
