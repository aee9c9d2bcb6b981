"""Pictures in a prompt: checked by their bytes before anything is sent, and made ready for the wire once.

A `Picture` is made of a path, bytes, an open file, a URL or an object that can show itself as PNG or JPEG. Its format,
width and height are read from its first bytes, whatever its name says. A URL on the web is handed to the provider as it
is: llmkit never fetches it, so it cannot be turned against what only this machine can reach, and what the provider sees
is what the provider fetched. Its size is then unknown, and budgets reckon with the largest.
"""

from __future__ import annotations

import os
import re
from base64 import b64decode, b64encode
from binascii import Error as NotBase64
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from llmkit.errors import ConfigError
from llmkit.redaction import redact, tidy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llmkit.call import Message

__all__ = ["MOST_BYTES", "MOST_BYTES_IN_ALL", "MOST_PICTURES", "Format", "Picture", "illustrated", "size_in"]

MOST_BYTES = 20_000_000
"""Of one picture, before base64."""

MOST_BYTES_IN_ALL = 50_000_000
MOST_PICTURES = 100
FORMATS = "PNG, JPEG, GIF or WebP"

_DATA_URL = re.compile(r"data:[^,]{0,200}?;base64,")
_LONGEST_URL = 8_000
_OTHER_FORMATS = (
    (re.compile(rb"\s*(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*|<!DOCTYPE[^>]*>\s*)*<svg", re.DOTALL), "SVG"),
    (re.compile(rb"BM"), "BMP"),
    (re.compile(rb"II\*\0|MM\0\*"), "TIFF"),
    (re.compile(rb"....ftyp(?:avif|avis)", re.DOTALL), "AVIF"),
    (re.compile(rb"....ftyp(?:hei|hev|mif|msf)", re.DOTALL), "HEIC"),
    (re.compile(rb"%PDF"), "PDF"),
)


class Format(NamedTuple):
    """What a picture's first bytes say: its media type, and its size in pixels."""

    media_type: str
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture that may be sent.

    Attributes:
        url: ``data:…;base64,…``, or its address on the web.
        format: None for one on the web, which nobody has looked at.
        size: in bytes; None where ``format`` is.
    """

    url: str = field(repr=False)
    format: Format | None = None
    size: int | None = None

    @classmethod
    def of(cls, value: Any) -> Picture:
        """Make one of a path, a URL (``https:``, ``http:``, ``data:``), bytes, an open file, or an object that shows
        itself as PNG or JPEG: a PIL image, a matplotlib figure, an `IPython.display.Image`, an array (with Pillow).

        Raises:
            ConfigError: it is none, too large, broken, or of a format that no model takes.
        """
        if isinstance(value, Picture):
            return value
        taken, name = _taken(value)
        return _of_text(taken) if isinstance(taken, str) else cls.of_bytes(taken, name)

    @classmethod
    def of_bytes(cls, data: bytes, name: str = "the picture") -> Picture:
        """Make one of the bytes of a file.

        Raises:
            ConfigError: see `of`.
        """
        name = tidy(name, limit=120)
        if len(data) > MOST_BYTES:
            raise ConfigError(
                f"{name} has {len(data) / 1e6:.1f} MB; a picture may have {MOST_BYTES / 1e6:.0f}",
                next_step="make it smaller; no model looks at more than some 2000 pixels",
            )
        found = _format_of(data)
        if found is None:
            raise _no_picture(data, name)
        encoded = b64encode(data).decode("ascii")
        return cls(f"data:{found.media_type};base64,{encoded}", found, len(data))

    @classmethod
    def all_of(cls, values: Any) -> tuple[Picture, ...]:
        """Make one of each of ``values``, a list or a single one.

        Raises:
            ConfigError: see `of`; or there are too many.
        """
        each = values if isinstance(values, list | tuple) else [values]
        if len(each) > MOST_PICTURES:
            raise ConfigError(f"{len(each)} pictures are more than the {MOST_PICTURES} that one call may have")
        pictures, size = [], 0
        for value in each:
            pictures.append(cls.of(value))
            size += pictures[-1].size or 0
            if size > MOST_BYTES_IN_ALL:
                raise ConfigError(f"the pictures of one call may have {MOST_BYTES_IN_ALL / 1e6:.0f} MB in all")
        return tuple(pictures)

    @property
    def part(self) -> dict[str, Any]:
        """The content part of a message, in OpenAI's form."""
        return {"type": "image_url", "image_url": {"url": self.url}}

    def __str__(self) -> str:
        if self.format is None or self.size is None:
            return redact(self.url if len(self.url) <= 100 else f"{self.url[:99]}…")
        kind = self.format.media_type.removeprefix("image/").upper()
        return f"{kind}, {self.format.width} × {self.format.height}, {self.size / 1000:,.1f} kB"

    def __repr__(self) -> str:
        return f"<Picture {self}>"


def illustrated(messages: Sequence[Message], pictures: Sequence[Picture]) -> tuple[Message, ...]:
    """``messages`` with the pictures in the last one of the user, before its text: what models read best.

    Raises:
        ConfigError: the user says nothing.
    """
    from dataclasses import replace

    place = next((place for place in reversed(range(len(messages))) if messages[place].role == "user"), None)
    if place is None:
        raise ConfigError("pictures go with a message of the user, and there is none")
    message = messages[place]
    said = [{"type": "text", "text": message.content}] if isinstance(message.content, str) else message.content
    with_them = replace(message, content=[*(picture.part for picture in pictures), *said])
    return (*messages[:place], with_them, *messages[place + 1 :])


# -- what users give ---------------------------------------------------------------------------------------------------


def _taken(value: Any) -> tuple[bytes | str, str]:
    """The bytes of ``value`` and what to call it; a URL or a path as it is."""
    if isinstance(value, str):
        return value, ""
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value), "the picture"
    if isinstance(value, os.PathLike):
        return _read(os.fspath(value)), os.fsdecode(value)
    if callable(getattr(value, "read", None)) and not hasattr(value, "_repr_png_"):
        return _all_of(value), "the file"
    from llmkit.drawing import drawn

    shown, name = drawn(value), f"the {type(value).__name__}"
    if isinstance(shown, str) and not shown.startswith(("https:", "http:", "data:")):
        return _decoded(shown, name), name
    return shown, name


def _of_text(text: str) -> Picture:
    """A URL, or a path."""
    if text[:5].lower() == "data:":
        start = _DATA_URL.match(text)
        if start is None:
            raise ConfigError(f"{_short(text)} is no picture", next_step="a data: URL is data:image/png;base64,…")
        name = "the data: URL"
        return Picture.of_bytes(_decoded(text[start.end() :], name), name)
    scheme, colon, _ = text.partition("://")
    if not colon:
        return Picture.of_bytes(_read(os.path.expanduser(text)), text)
    if scheme.lower() not in {"https", "http"}:
        step = "a file is given by its path, without file://"
        raise ConfigError(f"{_short(text)}: a picture's URL begins with https:, http: or data:", next_step=step)
    if len(text) > _LONGEST_URL or not text.isascii() or re.search(r"[\s\x00-\x20\x7f\"<>\\^`{|}]", text):
        raise ConfigError(f"{_short(text)} is no URL", next_step="characters beyond ASCII are written as %C3%A4")
    host = re.split(r"[/?#]", text[len(scheme) + 3 :], maxsplit=1)[0]
    if not host or "@" in host:
        why = "holds a name or a password, which the provider would get to see" if host else "names no host"
        raise ConfigError(f"the URL of the picture {why}")
    return Picture(f"{scheme.lower()}{text[len(scheme) :]}")


def _decoded(text: str, name: str) -> bytes:
    if len(text) > MOST_BYTES * 4 // 3 + 10_000:
        raise ConfigError(f"{name} has over {MOST_BYTES / 1e6:.0f} MB; a picture may have no more")
    try:
        return b64decode(re.sub(r"\s", "", text), validate=True)
    except (NotBase64, ValueError):
        raise ConfigError(f"{name} is no base64") from None


def _read(path: str | bytes) -> bytes:
    name = _short(os.fsdecode(path))
    try:
        if not os.path.exists(path):
            raise ConfigError(f"there is no file {name}", next_step=f"paths are seen from {os.getcwd()}")
        if not os.path.isfile(path):
            raise ConfigError(f"{name} is no file")
        with open(path, "rb") as file:
            return file.read(MOST_BYTES + 1) if os.path.getsize(path) <= MOST_BYTES else _too_large(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _too_large(path: str | bytes) -> bytes:
    size = os.path.getsize(path) / 1e6
    raise ConfigError(
        f"{_short(os.fsdecode(path))} has {size:.1f} MB; a picture may have {MOST_BYTES / 1e6:.0f}",
        next_step="make it smaller; no model looks at more than some 2000 pixels",
    )


def _all_of(file: Any) -> bytes:
    """All that an open file holds, wherever it was read or written last; it is left as it was, for the next run."""
    try:
        if not (callable(getattr(file, "seekable", None)) and file.seekable()):
            data = file.read(MOST_BYTES + 1)
        else:
            before = file.tell()
            file.seek(0)
            data = file.read(MOST_BYTES + 1)
            file.seek(before)
    except (OSError, ValueError) as error:  # such as a closed one
        raise ConfigError(f"the file cannot be read: {tidy(str(error), limit=200)}") from None
    if not isinstance(data, bytes):
        raise ConfigError("the file is open as text", next_step='open it with "rb"')
    return data


def _short(text: str) -> str:
    return repr(tidy(text, limit=120))


def _no_picture(data: bytes, name: str) -> ConfigError:
    if not data:
        return ConfigError(f"{name} is empty")
    head = data[:2000]
    if head[:1] in {b"\x89", b"\xff"} or head[:4] in {b"GIF8", b"RIFF"}:
        return ConfigError(f"{name} begins like a picture, but its size cannot be read: it is broken")
    other = next((kind for pattern, kind in _OTHER_FORMATS if pattern.match(head)), None)
    if other == "SVG":
        step = "models read pixels: save it as PNG (in Python: cairosvg.svg2png), or put its text into the prompt"
        return ConfigError(f"{name} is SVG, and models take {FORMATS}", next_step=step)
    return ConfigError(f"{name} is {other or 'no picture'}; models take {FORMATS}", next_step="save it as PNG")


# -- what the bytes say ------------------------------------------------------------------------------------------------

_PREFIXES = (96, 16_384, 1_048_576)  # characters of base64; what stands before a JPEG's size may be long


def size_in(part: Any) -> tuple[int, int] | None:
    """Width and height of a message's picture, in OpenAI's or Anthropic's form; None where nobody can tell."""
    source = part.get("image_url", part.get("source")) if isinstance(part, dict) else None
    if isinstance(source, dict):
        source = source.get("url") or source.get("data")
    if not isinstance(source, str) or source[:5] in {"http:", "https"}:
        return None
    at = start.end() if (start := _DATA_URL.match(source)) else 0
    for length in _PREFIXES:
        try:
            head = b64decode(
                source[at : at + length] + "===" if len(source) - at < length else source[at : at + length]
            )
        except (NotBase64, ValueError):
            return None
        if found := _format_of(head):
            return found.width, found.height
    return None


def _format_of(data: bytes) -> Format | None:
    """The format of a picture; None where it is none of those that models take, or cut off before its size."""
    try:
        found = _read_header(data)
    except IndexError:
        return None
    return found if found and found.width > 0 and found.height > 0 else None


def _read_header(data: bytes) -> Format | None:
    if data.startswith(b"\x89PNG\r\n\x1a\n") and data[12:16] == b"IHDR" and len(data) >= 24:
        return Format("image/png", int.from_bytes(data[16:20]), int.from_bytes(data[20:24]))
    if data[:6] in {b"GIF87a", b"GIF89a"} and len(data) >= 10:
        return Format("image/gif", int.from_bytes(data[6:8], "little"), int.from_bytes(data[8:10], "little"))
    if data[:3] == b"\xff\xd8\xff":
        return _jpeg(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP" and len(data) >= 30:
        return _webp(data)
    return None


def _jpeg(data: bytes) -> Format | None:
    """The size stands in the first "start of frame", behind segments of any number."""
    at = 2
    while True:
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF:  # filling
            at += 1
            continue
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:
            at += 2
            continue
        if 0xC0 <= marker <= 0xCF and marker not in {0xC4, 0xC8, 0xCC}:
            height, width = data[at + 5] << 8 | data[at + 6], data[at + 7] << 8 | data[at + 8]
            return Format("image/jpeg", width, height)
        if marker in {0xD9, 0xDA}:
            return None
        at += 2 + max(2, data[at + 2] << 8 | data[at + 3])


def _webp(data: bytes) -> Format | None:
    kind = data[12:16]
    if kind == b"VP8X":
        return Format(
            "image/webp", 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
        )
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = int.from_bytes(data[26:28], "little"), int.from_bytes(data[28:30], "little")
        return Format("image/webp", width & 0x3FFF, height & 0x3FFF)
    if kind == b"VP8L" and data[20] == 0x2F:
        bits = int.from_bytes(data[21:25], "little")
        return Format("image/webp", 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF))
    return None
