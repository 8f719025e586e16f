"""Rendering of single glyphs."""

import numpy as np
import pytest

from microclip_deploy.bench.letters_model.captions import PRETRAINING_CHARACTERS
from microclip_deploy.demo.letters.glyphs import CLASS_CHARACTERS
from microclip_deploy.demo.letters.render import (
    HELD_OUT_FACES,
    SOURCE,
    SOURCE_FACES,
    TARGET,
    TARGET_FACES,
    Domain,
    image_generator,
    load_face,
    render_glyph,
    target_domain,
)

ALL_FACES = SOURCE_FACES + TARGET_FACES


@pytest.mark.parametrize("domain", [SOURCE, TARGET], ids=["source", "target"])
def test_images_follow_from_their_stream_alone(domain: Domain) -> None:
    streams = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    first, second = (
        [render_glyph("ą", domain, image_generator(*stream)) for stream in streams] for _ in "ab"
    )
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one.image, other.image)
        np.testing.assert_array_equal(one.ink, other.ink)
        assert one.style == other.style
        assert (one.image.shape, one.image.dtype) == ((64, 64, 3), np.dtype(np.uint8))
        assert (one.ink.shape, one.ink.dtype) == ((64, 64), np.dtype(np.float32))
        assert 0 < one.ink.mean() < 0.5
        assert one.ink.max() <= 1
    assert len({glyph.image.tobytes() for glyph in first}) == 4


def test_ink_is_darker_than_its_paper() -> None:
    glyph = render_glyph("ő", SOURCE, image_generator(0, 0, 1))
    luminance = glyph.image.mean(-1)
    assert luminance[glyph.ink > 0.9].mean() < luminance[glyph.ink == 0].mean() - 30


def test_target_and_held_out_faces_were_never_pretrained_on() -> None:
    assert len(set(ALL_FACES)) == len(ALL_FACES)
    assert set(SOURCE_FACES).isdisjoint(HELD_OUT_FACES)


@pytest.mark.parametrize("face", ALL_FACES)
def test_every_glyph_is_in_the_face(face: str) -> None:
    font = load_face(face, 40)
    missing_box = bytes(font.getmask("\U0010ffff"))
    drawn = {character: bytes(font.getmask(character)) for character in PRETRAINING_CHARACTERS}
    assert [c for c in PRETRAINING_CHARACTERS if drawn[c] == missing_box] == []
    assert len({(*font.getbbox(c), drawn[c]) for c in CLASS_CHARACTERS}) == len(CLASS_CHARACTERS)


def test_severity_zero_is_a_clean_print() -> None:
    clean = target_domain(0.0)
    assert (clean.haze, clean.blur_px, clean.noise, clean.clutter) == ((0, 0), (0, 0), (0, 0), 0)
