"""What the simulated model says: the same to the same question, and plainly a simulation."""

from __future__ import annotations

import hashlib
import itertools
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["pieces", "prose", "thoughts"]

_PIECE = re.compile(r"\s*\S+")
_QUOTED = 160  # characters of the prompt that come back
# Nothing in a prompt may act as Markdown, mathematics or HTML when it comes back.
_HARMLESS = str.maketrans({"<": "\u2039", ">": "\u203a", "`": "'", "[": "(", "]": ")", "\\": "/", "|": "/",
                           "$": "\uff04", "*": "\u2217", "_": " "})  # fmt: skip

_BEGINNINGS = (
    "This is a **simulated** answer: no model was asked, and nothing is billed.",
    "**Simulated answer.** No model read this, and it costs nothing.",
    "This answer is **simulated**: there is no model behind it, and no bill either.",
)
_MIDDLES = (
    "A real model would now answer; this one can only describe what reached it:",
    "Here is what arrived, as far as a program without any understanding can tell:",
    "It knows nothing, but it can count, and this is what it counted:",
)
_ENDS = (
    "Choose a real model with `-m provider:model`, and the same cell asks that one.",
    "Set a key or start a local server, and the same question goes to a real model.",
    "Everything around it — streaming, tokens, limits, retries — is the real thing.",
)
_THOUGHTS = ("Let", "me", "think", "this", "through,", "one", "step", "after", "the", "other.")


def pieces(text: str) -> list[str]:
    """The text as tokens: each a word with the white space before it; what is left at the end goes with the last."""
    found = _PIECE.findall(text)
    rest = text[sum(map(len, found)) :]
    if found and rest:
        found[-1] += rest
    return found


def thoughts(count: int) -> list[str]:
    """``count`` tokens of pretended reasoning."""
    words = itertools.islice(itertools.cycle(_THOUGHTS), count)
    return [word if index == 0 else f" {word}" for index, word in enumerate(words)]


def prose(prompt: str, fingerprint: str, pictures: Sequence[str] = ()) -> str:
    """A short Markdown answer to ``prompt``; ``fingerprint`` chooses the words, ``pictures`` are told of."""
    digest = hashlib.sha256(fingerprint.encode("utf-8", "replace")).digest()
    words = prompt.split()
    longest = max(words, key=len, default="")
    facts = [
        f"- **{len(words)}** {'word' if len(words) == 1 else 'words'}, {len(prompt)} characters",
        f"- longest word: *{_quoted(longest, 40) or '—'}*",
        *(f"- picture {number}: {_quoted(picture, _QUOTED)}" for number, picture in enumerate(pictures, 1)),
        f"- a number that only this request gets: `{digest[3:7].hex()}`",
    ]
    lines = [
        _BEGINNINGS[digest[0] % len(_BEGINNINGS)],
        f"> {_quoted(prompt, _QUOTED) or '(an empty prompt)'}",
        _MIDDLES[digest[1] % len(_MIDDLES)],
        "\n".join(facts),
        _ENDS[digest[2] % len(_ENDS)],
    ]
    return "\n\n".join(lines)


def _quoted(text: str, length: int) -> str:
    """The beginning of ``text`` on one line, with nothing in it that Markdown or HTML would act on."""
    shown = " ".join(text[: 4 * length].split())
    if len(shown) > length or len(text) > 4 * length:
        shown = shown[: length - 1].rstrip() + "…"
    shown = "".join([character if character.isprintable() else "�" for character in shown])
    return shown.translate(_HARMLESS)
