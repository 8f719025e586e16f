"""read_image: every usable file becomes upright RGB, every other one a BadImage with a reason."""

import io
import os
import pickle  # how an error crosses a process boundary
import struct
import subprocess
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from microclip_deploy.data import decode
from microclip_deploy.data.decode import BadImage, decode_image, read_image, read_photo
from microclip_deploy.data.photo import MAX_PIXELS, USUAL, Kind
from microclip_deploy.errors import UsageError, printable

ORIENTATION = 0x0112
GIF_BOMB = (
    b"GIF89a\xff\xff\xff\xff\x80\0\0\0\0\0\xff\xff\xff,\0\0\0\0\xff\xff\xff\xff\0\x02\x02L\x01\0;"
)


def gradient(width: int = 24, height: int = 16) -> Image.Image:
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([10 * x, 12 * y, 5 * (x + y)], -1).astype(np.uint8))


def chunk(kind: bytes, content: bytes) -> bytes:
    length, check = (struct.pack(">I", n) for n in (len(content), zlib.crc32(kind + content)))
    return length + kind + content + check


def png(width: int, height: int, extra: bytes = b"", rows: int | None = None) -> bytes:
    pixels = zlib.compress((b"\0" + b"\x80" * 3 * width) * (height if rows is None else rows))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), extra, chunk(b"IDAT", pixels), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def rotated(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def reason_for(path: Path) -> str:
    with pytest.raises(BadImage) as caught:
        read_image(path)
    assert caught.value.path == path
    assert caught.value.exit_code == 3
    return caught.value.reason


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "JPEG", "WEBP", "GIF"])
def test_formats_are_known_by_their_content(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "image.dat"
    path.write_bytes(encoded(gradient(), kind))
    image = read_image(path)
    assert type(image) is Image.Image
    assert image.mode == "RGB"
    error = np.asarray(image, int) - np.asarray(gradient(), int)
    assert np.abs(error).mean() < (12 if kind in ("JPEG", "WEBP", "GIF") else 1e-9)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"hello, I am text", "no image of a known format"),
        (b"\xff\xfe" + struct.pack(">HH", 60000, 60000) + bytes(1000), "no image of a known"),
        (b"SIMPLE  =                    T".ljust(2880), "no image of a known format"),
        (png(1, 1), "1x1 pixels, a side is shorter than 2"),
        (png(1000, 3), "1000x3 pixels, one side exceeds 100 times the other"),
        (png(20, 20)[:60], "the file is truncated"),
        (encoded(gradient(200, 200), "JPEG")[:-900], "the file is truncated"),
        (png(20_000, 20_000, rows=1), "20000x20000 pixels exceed the limit of 200000000 pixels"),
        (png(30_000, 30_000, rows=1), "30000x30000 pixels exceed the limit"),
        (GIF_BOMB, "pixels"),
        (b"P6 60000 60000 255\n", "60000x60000 pixels exceed the limit"),
        (encoded(Image.new("F", (9, 9), 0.5), "TIFF"), "floating-point pixels have no defined"),
        (encoded(Image.new("I", (9, 9), 70000), "TIFF"), "more than 16 bits have no defined"),
    ],
    ids=range(14),
)
def test_unusable_content_is_refused_with_its_reason(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    path = tmp_path / "image.jpg"
    path.write_bytes(content)
    assert reason in reason_for(path)


def test_header_bombs_are_refused_before_memory_is_allocated(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png(30_000, 30_000, rows=1))
    heavy = tmp_path / "heavy.png"
    heavy.write_bytes(png(9, 9, struct.pack(">I", 100_000_000) + b"tEXt"))
    os.truncate(heavy, 8 * MAX_PIXELS + 1)
    script = (
        "import resource, sys\n"
        "from microclip_deploy.data.decode import BadImage, read_image\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for name in sys.argv[1:]:\n"
        "    try: read_image(name)\n"
        "    except BadImage: continue\n"
        "    raise SystemExit('read')\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    command = [sys.executable, "-c", script, str(path), str(heavy)]
    growth_kib = int(subprocess.run(command, check=True, capture_output=True).stdout)
    assert growth_kib < 20_000


def test_missing_file_folder_pipe_and_impossible_name_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    assert reason_for(tmp_path / "none.jpg") == "there is no such file"
    assert reason_for(tmp_path) == "it is a folder"
    assert reason_for(tmp_path / "pipe.jpg") == "it is not a regular file"
    assert "null byte" in reason_for(tmp_path / "a\0b.jpg")


def test_file_without_read_permission_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    # Replaced rather than chmod, which does not bind the administrator.
    monkeypatch.setattr(Path, "open", refuse)
    assert reason_for(Path(__file__)) == "permission denied"


def test_sixteen_bit_grey_keeps_the_high_byte(tmp_path: Path) -> None:
    values = np.array([[0, 255, 256], [32768, 65280, 65535]], np.uint16)
    expected = np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2)
    for name in ("grey.png", "grey.tif"):
        Image.fromarray(values).save(tmp_path / name)
        np.testing.assert_array_equal(np.asarray(read_image(tmp_path / name)), expected)
    (tmp_path / "grey.pgm").write_bytes(b"P5 3 2 65535\n" + values.astype(">u2").tobytes())
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "grey.pgm")), expected)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_pixel_type_becomes_rgb(tmp_path: Path, mode: str) -> None:
    source = gradient().convert("L") if mode == "I;16" else gradient()
    source.convert(mode).save(tmp_path / "image", "PNG" if mode == "LA" else "TIFF")
    assert read_image(tmp_path / "image").mode == "RGB"


def test_cmyk_jpeg_keeps_its_colours(tmp_path: Path) -> None:
    path = tmp_path / "cmyk.jpg"
    Image.new("RGB", (16, 16), (200, 30, 40)).convert("CMYK").save(path, quality=100)
    assert np.abs(np.asarray(read_image(path), int) - (200, 30, 40)).max() < 8


@pytest.mark.parametrize(
    ("background", "shown"),
    [("white", (255, 255, 255)), ("#010203", (1, 2, 3)), ("none", (10, 20, 30))],
)
def test_transparent_photos_lie_on_the_background(
    tmp_path: Path, background: str, shown: tuple[int, int, int]
) -> None:
    palette = Image.new("P", (4, 4))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    grey = Image.new("LA", (4, 4), (10, 0))
    for content, expected in (
        (encoded(Image.new("RGBA", (4, 4), (10, 20, 30, 0)), "PNG"), shown),
        (encoded(palette, "PNG", transparency=b"\x00\x80"), shown),
        (encoded(Image.new("RGB", (4, 4), (10, 20, 30)), "PNG", transparency=(10, 20, 30)), shown),
        (encoded(grey, "PNG"), (10, 10, 10) if background == "none" else shown),
    ):
        path = tmp_path / "clear.png"
        path.write_bytes(content)
        assert read_image(path, background=background).getpixel((0, 0)) == expected


def test_a_background_that_is_no_colour_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="background: expected another value"):
        read_image(tmp_path / "any.png", background="whiteish")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_exif_orientation_is_applied_once(tmp_path: Path, kind: str, orientation: int) -> None:
    path = tmp_path / "rotated"
    stored = gradient(48, 32)
    path.write_bytes(encoded(stored, kind, exif=rotated(orientation)))
    upright = stored.rotate({1: 0, 3: 180, 6: -90, 8: 90}[orientation], expand=True)
    image = read_image(path)
    assert image.size == upright.size
    assert np.abs(np.asarray(image, int) - np.asarray(upright, int)).mean() < 12


def test_first_frame_of_an_animation_is_taken(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("#c80000", "#0000c8")]
    for kind in ("WEBP", "GIF", "PNG"):
        path = tmp_path / kind
        path.write_bytes(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))
        assert np.abs(np.asarray(read_image(path), int) - (200, 0, 0)).max() < 8


@pytest.mark.parametrize(
    "content",
    [
        png(24, 16, chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(5_000_000)))),
        png(24, 16, chunk(b"zTXt", b"key\0\0" + zlib.compress(bytes(5_000_000)))),
        png(24, 16, chunk(b"tEXt", b"key\0" + b"x" * 5_000_000)),
        png(24, 16, chunk(b"eXIf", b"MM\0*" + b"\xff" * 100_000)),
        encoded(gradient(), "JPEG", icc_profile=bytes(3_000_000)),
    ],
    ids=["iCCP", "zTXt", "tEXt", "eXIf", "JPEG"],
)
def test_large_or_damaged_metadata_does_not_cost_the_image(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "metadata"
    path.write_bytes(content)
    image = read_image(path)
    assert image.size == (24, 16)
    assert image.info == {}


def test_warnings_of_pillow_do_not_leak_and_filters_are_restored(tmp_path: Path) -> None:
    (tmp_path / "large.png").write_bytes(png(20_000, 20_000, rows=1))
    (tmp_path / "exif.jpg").write_bytes(
        encoded(gradient(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05" + b"\x01\x12\0\x02" * 9)
    )

    def attempt(name: str) -> str:
        try:
            read_image(tmp_path / name)
        except BadImage as error:
            return error.reason
        return ""

    with warnings.catch_warnings(record=True) as leaked:
        warnings.simplefilter("always")
        before = list(warnings.filters)
        with ThreadPoolExecutor(4) as pool:
            reasons = list(pool.map(attempt, ["large.png", "exif.jpg"] * 50))
        assert list(warnings.filters) == before
    assert leaked == []
    large = "20000x20000 pixels exceed the limit of 200000000 pixels (--max-pixels)"
    assert set(reasons) == {"", large}


def test_limit_of_pixels_is_an_argument(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(png(20, 10))
    assert read_image(path, max_pixels=200).size == (20, 10)
    with pytest.raises(BadImage, match="20x10 pixels exceed the limit of 199"):
        read_image(path, max_pixels=199)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "GIF"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_large_photos_are_decoded_at_reduced_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, mode: str
) -> None:
    x, y = np.meshgrid(np.linspace(0, 255, 128), np.linspace(0, 255, 72))
    source = Image.fromarray(((x + y) / 2).astype(np.uint8)).convert(mode)
    path = tmp_path / "large"
    path.write_bytes(encoded(source, kind, **({} if kind == "GIF" else {"exif": rotated(6)})))
    whole = read_image(path)
    monkeypatch.setattr(decode, "FULL_PIXELS", 128 * 72 // 9)
    photo = read_photo(path, USUAL)
    assert [remark.kind for remark in photo.remarks] == [Kind.REDUCED]
    assert photo.image.size == tuple(side // 4 for side in whole.size)
    error = np.asarray(photo.image, int) - np.asarray(whole.reduce(4), int)
    assert np.abs(error).mean() < 3


def cut(count: int, **options: object) -> bytes:
    return encoded(gradient(200, 400), "JPEG", **options)[:-count]


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("count", [1, 2])
def test_jpeg_without_its_end_marker_is_read(
    tmp_path: Path, count: int, progressive: bool, orientation: int
) -> None:
    path = tmp_path / "cut.jpg"
    options = {"progressive": progressive, "exif": rotated(orientation)}
    path.write_bytes(cut(count, **options))
    photo = read_photo(path, USUAL)
    assert [remark.kind for remark in photo.remarks] == [Kind.UNENDED]
    (tmp_path / "whole.jpg").write_bytes(encoded(gradient(200, 400), "JPEG", **options))
    assert photo.image.tobytes() == read_image(tmp_path / "whole.jpg").tobytes()


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_jpeg_that_lacks_more_is_refused(tmp_path: Path, share: float, progressive: bool) -> None:
    path = tmp_path / "cut.jpg"
    whole = encoded(gradient(200, 400), "JPEG", progressive=progressive)
    path.write_bytes(whole[: -int(share * len(whole))])
    assert reason_for(path) == "the file is truncated"


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    damaged = bytearray(content)
    for position in rng.integers(len(content), size=int(rng.integers(1, 6))):
        damaged[position] = int(rng.integers(256))
    return bytes(damaged[: int(rng.integers(1, 2 * len(content)))])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM"])
def test_damaged_bytes_raise_nothing_but_bad_image(kind: str) -> None:
    rng = np.random.default_rng(0)
    content = encoded(gradient(), kind)
    outcomes: set[str] = set()
    for _ in range(300):
        try:
            decode_image(io.BytesIO(mutated(content, rng)), Path("damaged"))
            outcomes.add("read")
        except BadImage:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_bad_image_survives_a_process_boundary() -> None:
    error = pickle.loads(pickle.dumps(BadImage(Path("a\nb.jpg"), "the file is empty")))
    assert (error.path, error.reason) == (Path("a\nb.jpg"), "the file is empty")
    assert "a\\nb.jpg" in str(error)


@pytest.mark.parametrize(
    ("name", "shown"),
    [("ünï日本.jpg", "ünï日本.jpg"), ("a\nb\x1b[31m", "a\\nb\\x1b[31m"), ("\udcff", "\\udcff")],
)
def test_printable_names_fit_on_one_line_of_utf8(name: str, shown: str) -> None:
    assert printable(Path(name)) == shown
    shown.encode()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc")
def test_no_file_stays_open(tmp_path: Path) -> None:
    path = tmp_path / "image.tif"
    path.write_bytes(encoded(gradient(), "TIFF"))
    before = len(os.listdir("/proc/self/fd"))
    kept = [read_image(path) for _ in range(20)]
    assert len(kept) == 20
    assert len(os.listdir("/proc/self/fd")) == before
