"""The size of an image from the first bytes of its file. Pure functions; where they say nothing, Pillow is asked.

A scan reads no more than this of most files: opening each with Pillow would take several times as long.
"""

import struct
import zlib
from typing import NamedTuple

from library.data.buckets import Size

_LARGEST = 2**26  # pixels; beyond it Pillow decides whether the file is a trap
_ORIENTATION = 0x0112  # EXIF tag
_SHORT = 3  # EXIF type


class Header(NamedTuple):
    """What an image file says of itself."""

    width: int
    height: int
    """As stored, before turning."""
    turned: bool = False
    """Whether its EXIF orientation exchanges width and height."""
    animated: bool = False

    def size(self, *, legacy: bool = False) -> Size:
        """(width, height) as shown, or as stored."""
        return (self.height, self.width) if self.turned and not legacy else (self.width, self.height)


def parse(data: bytes) -> Header | None:
    """The header in the first bytes of a PNG, JPEG, WebP or BMP file.

    None where they are too few, damaged, of another format or of an unusual kind.
    """
    try:
        if data[:2] == b"\xff\xd8":
            header = _jpeg(data)
        elif data[:8] == b"\x89PNG\r\n\x1a\n":
            header = _png(data)
        elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            header = _webp(data)
        elif data[:2] == b"BM":
            header = _bmp(data)
        else:
            return None
    except (struct.error, IndexError):
        return None
    return header if header and 0 < header.width * header.height <= _LARGEST else None


def _png(data: bytes) -> Header | None:
    length, kind, width, height = struct.unpack_from(">I4sII", data, 8)
    if kind != b"IHDR" or length != 13 or zlib.crc32(data[12:29]) != struct.unpack_from(">I", data, 29)[0]:
        return None
    animated = False
    position = 33
    while True:
        length, kind = struct.unpack_from(">I4s", data, position)
        if kind == b"IDAT":
            return Header(width, height, animated=animated)
        if kind in (b"eXIf", b"IEND"):
            return None
        animated |= kind == b"acTL" and data[position + 8 : position + 12] > b"\0\0\0\1"  # frames
        position += length + 12


def _jpeg(data: bytes) -> Header | None:
    size, orientation, xmp = None, None, False
    position = 2
    while True:
        fill, marker, length = struct.unpack_from(">BBH", data, position)
        if fill != 0xFF or not (0xC0 <= marker <= 0xCF or 0xDA <= marker <= 0xFE) or length < 2:
            return None
        if marker == 0xDA:  # the picture itself starts
            break
        start, position = position + 4, position + 2 + length
        if marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            bits, height, width = struct.unpack_from(">BHH", data, start)
            size = (width, height) if bits == 8 else (0, 0)
        elif marker == 0xE1 and data.startswith(b"Exif\0\0", start):
            orientation = _orientation(data[start + 6 : position]) if orientation is None else None
            if orientation is None:
                return None
        elif marker == 0xE1:
            xmp |= data.find(b"tiff:Orientation", start, position) >= 0
    if size is None or (xmp and not orientation):
        return None
    return Header(*size, turned=orientation in (5, 6, 7, 8))


def _orientation(exif: bytes) -> int | None:
    """The orientation in an EXIF block; 0 if it holds none, None in doubt."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return None
    (directory,) = struct.unpack_from(order + "I", exif, 4)
    (count,) = struct.unpack_from(order + "H", exif, directory)
    for entry in range(directory + 2, directory + 2 + 12 * count, 12):
        tag, kind, values, value = struct.unpack_from(order + "HHIH", exif, entry)
        if tag == _ORIENTATION:
            return value if kind == _SHORT and values == 1 and 1 <= value <= 8 else None
    return 0


def _webp(data: bytes) -> Header | None:
    kind = data[12:16]
    if kind == b"VP8X":
        flags = data[20]
        width, height = (int.from_bytes(data[start : start + 3], "little") + 1 for start in (24, 27))
        exif_or_xmp = flags & 0b1100
        return None if exif_or_xmp or len(data) < 30 else Header(width, height, animated=bool(flags & 0b10))
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", data, 26)
        return Header(width & 0x3FFF, height & 0x3FFF)
    if kind == b"VP8L" and data[20] == 0x2F:
        (bits,) = struct.unpack_from("<I", data, 21)
        return Header((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
    return None


def _bmp(data: bytes) -> Header | None:
    (length,) = struct.unpack_from("<I", data, 14)
    if length not in (40, 52, 56, 64, 108, 124):
        return None
    width, height = struct.unpack_from("<ii", data, 18)
    return Header(width, abs(height)) if width > 0 else None
