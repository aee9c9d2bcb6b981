"""Keys out of everything that people or files get to see.

Two nets. The exact one knows the key that was used and takes it out of whatever the server sends back, before it is
parsed. The wide one knows what keys look like, and goes over the texts of errors.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["REDACTED", "Screen", "keylike", "redact", "secret_in", "tidy"]

REDACTED = "[redacted]"

# Shorter "keys" are placeholders for servers that need none ("none", "EMPTY", "ollama"), and also plain words.
_SHORTEST_SECRET = 8
_SHOWN = 3  # of the key's beginning, where it comes in pieces: "sk-"

_KEYLIKE = re.compile(
    r"""
    (?P<lead> \bbearer\s+ (?= \S*\d | \S{20} )
      | (?:x-api-key|api[-_ ]?key|authorization|access[-_]?token)["']?\s*[:=]\s*["']?(?:bearer\s+)? )
    (?P<value> [^\s"',;&<>]{6,} )
    | \b(?: (?:sk|gsk|xai|hf|pplx|nvapi|csk|tgp|glpat|ghp|gho|github_pat)[-_] (?=[\w.*-]{8}) [\w.*-]+
      | AIza[\w-]{20,} | ya29\.[\w-]{10,} | eyJ[\w-]{8,}\.[\w-]{8,}(?:\.[\w-]*)? )
    | (?<=://) [^/@\s:]*:[^/@\s]+ (?=@)
    """,
    re.IGNORECASE | re.VERBOSE,
)
# With what turns the direction of a text, so that it reads as another.
_CONTROL = re.compile(r"\x1b\[[0-9;]*[A-Za-z]|[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]+")


def redact(text: str, secret: str | None = None) -> str:
    """``text`` without ``secret``, and without anything that looks like a key, a token or a password in a URL."""
    if secret and len(secret) >= _SHORTEST_SECRET:
        for form in _forms(secret):
            text = text.replace(form, REDACTED)
    return _KEYLIKE.sub(_blank, text)


def _forms(secret: str) -> Iterator[str]:
    """A key as it is, as a part of a URL, and as a header of ``Basic`` holds it, alone or behind a colon."""
    import base64
    from urllib.parse import quote, quote_plus

    yield from dict.fromkeys((secret, quote(secret, "", errors="replace"), quote_plus(secret, errors="replace")))
    for lead in ("", ":"):
        yield base64.b64encode((lead + secret).encode("utf-8", "replace")).decode().rstrip("=")


def _blank(match: re.Match[str]) -> str:
    return (match["lead"] or "") + REDACTED


def keylike(text: str) -> Iterator[tuple[int, int]]:
    """Where in ``text`` something stands that looks like a key, a token or a password in a URL: (begin, end)."""
    for match in _KEYLIKE.finditer(text):
        yield match.span("value" if match["value"] is not None else 0)


def secret_in(key: str | None) -> bytes:
    """``key`` as bytes to look for in what a server sends; empty for placeholders too short to be secret."""
    return key.encode() if key and len(key) >= _SHORTEST_SECRET else b""


def tidy(text: str, secret: str | None = None, *, limit: int = 500) -> str:
    """Text from a server, fit for a person: redacted, on one line, no control characters, at most ``limit`` long."""
    text = _CONTROL.sub(" ", redact(text[: limit * 8], secret)).strip()
    return text if len(text) <= limit else text[: limit - 1] + "…"


class Screen:
    """Takes a key out of a text that comes in pieces, wherever the pieces are cut.

    What might be the beginning of the key waits for the next piece, all but its first characters: they tell nothing,
    and without them no ordinary word would ever wait.
    """

    __slots__ = ("_begun", "_first", "_pair", "_secret")

    def __init__(self, secret: str) -> None:
        self._secret = secret
        self._first = secret[0]
        self._pair = secret[:2]
        self._begun = ""  # how far the key has come at the end of the last piece

    def feed(self, text: str) -> str:
        """What can be shown of it by now."""
        if not self._begun and self._pair not in text and text[-1:] != self._first:
            return text  # most texts, at a tenth of the cost
        out = min(len(self._begun), _SHOWN)
        text = (self._begun + text).replace(self._secret, self._secret[:_SHOWN] + REDACTED)
        self._begun = self._beginning(text)
        return text[out : len(text) - max(0, len(self._begun) - _SHOWN)]

    def end(self) -> str:
        """What still waits; no more of the text will come."""
        rest, self._begun = self._begun[_SHOWN:], ""
        return rest

    def _beginning(self, text: str) -> str:
        at = text.find(self._first, max(0, len(text) - len(self._secret) + 1))
        while at >= 0:
            if self._secret.startswith(text[at:]):
                return text[at:]
            at = text.find(self._first, at + 1)
        return ""
