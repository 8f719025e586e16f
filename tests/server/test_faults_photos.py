"""Photos that are broken, hostile or odd."""

import io
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

from microclip_deploy.serving import Session
from tests.server.conftest import Encode
from tests.server.lasting import lasting
from tests.server.running import Running, running

TOLERANCE = 1e-4
"""Of a logit: batches of another size round otherwise."""


@pytest.fixture(scope="module")
def server(tiny_export: Path) -> Iterator[Running]:
    with running(f"tiny={tiny_export}", "--max-pixels", "4000000") as started:
        yield started


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, data: bytes, *more: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(data))
    return b"".join((b"\x89PNG\r\n\x1a\n", header, *more, pixels, chunk(b"IEND", b"")))


BOMB = zlib.compress(bytes(300_000_000), 9)
WHITE = b"".join(b"\0" + b"\xff" * 24 for _ in range(8))

BAD = {
    "empty": b"",
    "a web page": b"<!DOCTYPE html><html><body>hello</body></html>",
    "a drawing": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
    "text": b"hello" * 100,
    "noise": bytes(range(256)) * 40,
    "a huge header": png(60_000, 60_000, b""),
    "no width": png(0, 0, b""),
    "one pixel": png(1, 1, b"\0\0\0\0"),
    "a header alone": png(8, 8, b"")[:40],
    "no pixels": png(8, 8, b""),
    "a long side": png(20_000, 2, b""),
    "a FITS header": b"SIMPLE  =                    T" + b" " * 50 + b"END" + b" " * 2800,
    "a TIFF bomb": b"II*\0\x08\0\0\0\xff\xff" + b"\0\1\4\0\1\0\0\0\xff\xff\xff\x7f" * 10,
    "a GIF header": b"GIF89a\xff\xff\xff\xff\xf7\0\0",
    "a BMP header": b"BM"
    + struct.pack("<IHHIIiiHH", 100, 0, 0, 54, 40, 2**30, 2**30, 1, 24)
    + b"x" * 99,
    "a WebP header": b"RIFF\x10\0\0\0WEBPVP8 \x04\0\0\0abcd",
}
GOOD = {
    "pixels that do not end": png(8, 8, WHITE + bytes(100_000_000)),
    "a profile bomb": png(8, 8, WHITE, chunk(b"iCCP", b"x\0\0" + BOMB)),
    "a text bomb": png(8, 8, WHITE, chunk(b"zTXt", b"x\0\0" + BOMB)),
}


@pytest.mark.parametrize("body", BAD.values(), ids=BAD)
def test_bad_photos_are_refused(server: Running, body: bytes) -> None:
    answer = server.classify(body)
    assert answer.status_code == 400
    told = answer.json()["error"]
    assert told.startswith("expected a photo")
    assert not any(word in told for word in ("/", " at 0x", "BytesIO", "Path", "photo.py", "'"))


@pytest.mark.parametrize("body", GOOD.values(), ids=GOOD)
def test_bombs_do_not_go_off(server: Running, body: bytes) -> None:
    """The photo is read without what would grow; a refusal would be fine, too."""
    before = psutil.Process(server.process.pid).memory_info().rss
    assert server.classify(body).status_code in (200, 400)
    assert psutil.Process(server.process.pid).memory_info().rss < before + 100e6


def logits(answer: httpx.Response, session: Session) -> Any:
    assert answer.status_code == 200, answer.text
    given = {each["name"]: each["logit"] for each in answer.json()["classes"]}
    return np.array([given[name] for name in session.classes])


def saved(photo: Image.Image, kind: str, **more: Any) -> bytes:
    stream = io.BytesIO()
    photo.save(stream, kind, **more)
    return stream.getvalue()


def test_orientations(server: Running, session: Session) -> None:
    """The answer is the session's to the photo as the camera was held."""
    rng = np.random.default_rng(0)
    upright = Image.fromarray(rng.integers(0, 256, (50, 70, 3), dtype=np.uint8))
    turns = (None, 0, 3, 1, 5, 2, 6, 4)  # how each orientation is stored
    for orientation, turn in enumerate(turns, start=1):
        stored = upright if turn is None else upright.transpose(Image.Transpose(turn))
        exif = Image.Exif()
        exif[0x0112] = orientation
        answer = server.classify(saved(stored, "PNG", exif=exif))
        assert answer.json()["photo"] == {"width": 70, "height": 50}
        expected = session.predict_photos([upright]).logits[0]
        np.testing.assert_allclose(logits(answer, session), expected, atol=TOLERANCE)


def test_odd_kinds(server: Running, session: Session, encode: Encode) -> None:
    """What a photo means is what the session says it means."""
    first = Image.open(io.BytesIO(encode(1)))
    second = Image.open(io.BytesIO(encode(2)))
    levels = np.random.default_rng(0).integers(0, 65536, (40, 48), dtype=np.uint16)
    odd = (
        saved(first, "GIF", save_all=True, append_images=[second]),
        saved(first.convert("CMYK"), "JPEG"),
        saved(Image.fromarray(levels), "PNG"),
        saved(first.convert("LA"), "PNG"),
        saved(first.convert("P"), "PNG", transparency=0),
        saved(first, "WEBP", save_all=True, append_images=[second]),
        saved(first, "JPEG")[:-2],
    )
    for body in odd:
        with_path = io.BytesIO(body)
        expected = session.predict_photos([session_photo(with_path)]).logits[0]
        answer = server.classify(body)
        np.testing.assert_allclose(logits(answer, session), expected, atol=TOLERANCE)
    cut = saved(first, "JPEG")
    assert server.classify(cut[: len(cut) // 2]).status_code == 400


def session_photo(stream: io.BytesIO) -> Image.Image:
    from microclip_deploy.data.decode import decode_image

    return decode_image(stream, Path("x"))


def form(*parts: tuple[str, bytes], boundary: str = "b", end: str = "--b--\r\n") -> bytes:
    told = b""
    for disposition, content in parts:
        told += f"--{boundary}\r\nContent-Disposition: form-data; {disposition}\r\n\r\n".encode()
        told += content + b"\r\n"
    return told + end.encode()


FILE = 'name="photo"; filename="{}"'
EVIL = ("../../etc/passwd", "C:\\\\x.png", 'a\\"b', "\u202egnp.png", "x" * 1000)


def test_forms(server: Running, session: Session, encode: Encode) -> None:
    photo = encode()
    expected = logits(server.classify(photo), session)

    def send(body: bytes, kind: str = "multipart/form-data; boundary=b") -> httpx.Response:
        address = f"{server.url}/v1/classify"
        return httpx.post(address, content=body, headers={"Content-Type": kind}, timeout=30)

    for name in EVIL:
        answer = send(form((FILE.format(name), photo)))
        np.testing.assert_array_equal(logits(answer, session), expected)
        answer = send(form((FILE.format(name), b"no photo")))
        assert answer.status_code == 400
        assert "passwd" not in answer.text
    two = send(form((FILE.format("a"), photo), (FILE.format("b"), photo)))
    wrong = {
        "two files": two,
        "no file": send(form(('name="photo"', photo))),
        "nothing": send(form()),
        "a large field": send(form(('name="x"', b"x" * 10_000_000), (FILE.format("a"), photo))),
        "many fields": send(form(*[('name="x"', b"1")] * 1000)),
        "no end": send(form((FILE.format("a"), photo), end="")),
        "another boundary": send(form((FILE.format("a"), photo), boundary="c")),
        "no boundary": send(form((FILE.format("a"), photo)), "multipart/form-data"),
        "an endless boundary": send(photo, f"multipart/form-data; boundary={'x' * 5000}"),
        "another alphabet": send(photo, "multipart/form-data; boundary=b; charset=no-such"),
        "almost boundaries": send(b"--b\r\n" + b"\r\n--" * 1_000_000),
        "a header that never ends": send(b"--b\r\nContent-Disposition: " + b"x" * 5_000_000),
    }
    assert {name: each.status_code for name, each in wrong.items()} == dict.fromkeys(wrong, 400)
    for each in wrong.values():
        assert "expected" in each.json()["error"]
        assert "/usr" not in each.text
    assert server.is_ready()


def test_one_bad_photo_beside_good_ones(server: Running, encode: Encode) -> None:
    """It is the only one that fails."""
    bodies = [encode(i) for i in range(33)]
    bodies[7] = bodies[7][:200]
    with ThreadPoolExecutor(33) as threads:
        found = [each.status_code for each in threads.map(server.classify, bodies)]
    assert found == [200] * 7 + [400] + [200] * 25
    assert server.is_ready()
    assert server.metric("microclip_worker_restarts") == 0


@lasting
def test_large_pictures_delay_nobody(tiny_export: Path, encode: Encode) -> None:
    """While masks of 36 megapixels are drawn, small requests are answered."""
    large = saved(Image.new("RGB", (6000, 6000)), "PNG", compress_level=1)
    with running(f"tiny={tiny_export}") as server, ThreadPoolExecutor(2) as threads:
        asked = [threads.submit(server.classify, large, saliency="mask") for _ in range(4)]
        times = []
        while not all(each.done() for each in asked):
            times.append(server.get("/v2/health/live").elapsed.total_seconds())
        assert {each.result().status_code for each in asked} == {200}
    assert np.median(times) < 0.1
