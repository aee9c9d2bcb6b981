"""The smallest files that say how large a picture is, in each format, and whole ones where Pillow is there."""

from __future__ import annotations

import base64
import struct
import zlib

PNG_URL = "data:image/png;base64,"


def png(width: int = 2, height: int = 3) -> bytes:
    """A whole picture, all black."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress((b"\0" + b"\0" * ((width + 7) // 8)) * height, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def png_url(width: int = 2, height: int = 3) -> str:
    return PNG_URL + base64.b64encode(png(width, height)).decode()


def gif(width: int = 2, height: int = 3) -> bytes:
    return b"GIF89a" + struct.pack("<HH", width, height) + b"\0\0\0;"


def jpeg(width: int = 2, height: int = 3, *, before: bytes = b"") -> bytes:
    """The head alone; ``before``: what an application put in front of the size."""
    segments = b"".join(
        b"\xff\xe1" + struct.pack(">H", 2 + len(before[at : at + 65_000])) + before[at : at + 65_000]
        for at in range(0, len(before), 65_000)
    )
    frame = b"\xff\xc2" + struct.pack(">HBHHB", 11, 8, height, width, 1) + b"\x01\x11\x00"
    return b"\xff\xd8\xff\xe0\x00\x04JF" + segments + b"\xff" + frame + b"\xff\xda" + b"\0" * 50


def webp(width: int = 2, height: int = 3, kind: str = "VP8X") -> bytes:
    if kind == "VP8X":
        body = b"\0" * 4 + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    elif kind == "VP8 ":
        body = b"\0\0\0\x9d\x01\x2a" + struct.pack("<HH", width, height)
    else:
        body = b"\x2f" + ((width - 1) | (height - 1) << 14).to_bytes(4, "little") + b"\0" * 5
    return (
        b"RIFF" + struct.pack("<I", 4 + 8 + len(body)) + b"WEBP" + kind.encode() + struct.pack("<I", len(body)) + body
    )
