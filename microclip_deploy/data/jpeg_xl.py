"""The size and the orientation in the header of a JPEG XL file.

The plugin decodes while it opens a file, so limits must be checked before it is asked.

Source: ISO/IEC 18181-1, SizeHeader and ImageMetadata; 18181-2 for the boxes around them.
"""

import struct
from typing import IO, NamedTuple

_RATIOS = {1: (1, 1), 2: (12, 10), 3: (4, 3), 4: (3, 2), 5: (16, 9), 6: (5, 4), 7: (2, 1)}
"""Width to height, by their code."""

_SIGNATURE = b"\xff\n"

_HEADER_BYTES = 32
"""More than size and orientation take."""


class Header(NamedTuple):
    """What the file declares."""

    width: int
    height: int
    """Pixels, before it is turned upright."""
    orientation: int
    """1 to 8, as in EXIF; the decoder applies it."""


def read_header(stream: IO[bytes]) -> Header:
    """Return the header of a JPEG XL file.

    Args:
        stream: at its start, seekable.

    Raises:
        SyntaxError: it has none.
    """
    bits = _Bits(_codestream(stream))
    eights = bits.take(1)
    height = _length(bits, eights)
    ratio = bits.take(3)
    if ratio:
        across, down = _RATIOS[ratio]
        width = height * across // down
    else:
        width = _length(bits, eights)
    plain = bits.take(1)
    special = not plain and bits.take(1)
    return Header(width, height, 1 + bits.take(3) if special else 1)


class _Bits:
    """Numbers from a stream of bits, the least one first."""

    def __init__(self, content: bytes) -> None:
        self._left = int.from_bytes(content, "little")

    def take(self, count: int) -> int:
        """Return the next `count` bits."""
        value = self._left & ((1 << count) - 1)
        self._left >>= count
        return value


def _length(bits: _Bits, eights: int) -> int:
    """Return one side, pixels."""
    if eights:
        return 8 * (1 + bits.take(5))
    return 1 + bits.take((9, 13, 18, 30)[bits.take(2)])


def _codestream(stream: IO[bytes]) -> bytes:
    """Return the start of the codestream behind its signature, which may lie in a box."""
    start = stream.read(2 + _HEADER_BYTES)
    if start[:2] != _SIGNATURE:
        stream.seek(0)
        while len(head := stream.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind in (b"jxlc", b"jxlp"):
                stream.seek(
                    8 * (length == 1) + 4 * (kind == b"jxlp"), 1
                )  # long sizes, part numbers
                start = stream.read(2 + _HEADER_BYTES)
                break
            if length < 8:  # up to the end of the file, or of over 4 GiB
                break
            stream.seek(length - 8, 1)
    if start[:2] != _SIGNATURE or len(start) == 2:
        raise SyntaxError("no JPEG XL codestream")
    return start[2:]
