"""HTML pages: one file, no script, nothing loaded from elsewhere.

Class names, descriptions and file names may come from anywhere. The template engine escapes every
text, control and direction-changing characters are dropped, and pages forbid themselves scripts and
connections (Content-Security-Policy). Pictures are data: URIs, in which nothing runs.
"""

import base64
import io
import unicodedata
from importlib import resources
from typing import Any

from PIL import Image

from microclip_deploy.errors import require

_JOINERS = "\u200c\u200d"


def render(template: str, **values: Any) -> str:
    """Return a page as text.

    Args:
        template: path below this package; it extends "evaluation/page.html.j2".
        values: what the template names; a name it lacks is an error.
    """
    jinja2 = require("jinja2", "adapt")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_source),
        autoescape=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"percent": percent, "shortened": shortened, "svg_uri": svg_uri}
    page: str = environment.get_template(template).render(values)
    return page


def visible(text: str) -> str:
    """Drop what has no place in a page: control characters, direction changes, lone surrogates.

    Joiners stay: they are spelling in several scripts.
    """
    spaced = "".join(" " if c in "\t\n\r" else c for c in text)
    return "".join(
        c
        for c in spaced
        if c in _JOINERS or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
    )


def shortened(text: str, most: int) -> str:
    """Return a name of at most so many characters; both ends tell more than its middle."""
    if len(text) <= most:
        return text
    end = most // 2
    return f"{text[: most - end - 1]}…{text[-end:]}"


def percent(value: float | None, digits: int = 1) -> str:
    """Return a fraction as a percentage, or a dash for None."""
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def svg_uri(svg: str) -> str:
    """Return an SVG document as a data: URI."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


def data_uri(picture: Image.Image, side: int) -> str:
    """Return a square picture as a data: URI of a JPEG, `side` pixels wide."""
    buffer = io.BytesIO()
    picture.resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _source(template: str) -> str:
    return (resources.files("microclip_deploy") / template).read_text("utf-8")
