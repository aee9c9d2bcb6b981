"""How a command of ``%llm`` is written, read out of the very forms that its help shows.

A form is ``%llm NAME`` and what follows: a word in small letters stands for itself, ``a|b`` for one of several, a word
in capitals for something to be put in, brackets for what may be left out, ``…`` for more of the same.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

__all__ = ["Slot", "fits", "following", "slots"]

_TOKEN = re.compile(r"\[[^\[\]]*(?:\[[^\[\]]*\][^\[\]]*)*\](?=\s|$)|\S+")
_CAPITALS = re.compile(r"[A-Z][A-Z_]*")
_MORE = "…"
_PATTERNS = {"N": r"\d+", "SINCE": r"\d+[smhdw]", "NAME=AMOUNT": r"[^=\s]+=\S+", "NAME=off": r"[^=\s]+=off"}


class Slot(NamedTuple):
    """One word of a form.

    Attributes:
        words: what may stand there as it is. kind: what is to be put in, in capitals; empty where nothing is.
        optional: it may be left out. repeated: it may stand there several times.
    """

    words: tuple[str, ...] = ()
    kind: str = ""
    optional: bool = False
    repeated: bool = False

    def admits(self, word: str) -> bool:
        """Whether ``word`` may stand here."""
        if word in self.words:
            return True
        return bool(self.kind) and re.fullmatch(_PATTERNS.get(self.kind, r"(?s).+"), word) is not None


def slots(form: str) -> tuple[Slot, ...]:
    """What may follow the first two words of ``form``."""
    return tuple(_slots(" ".join(form.split()[2:])))


def _slots(text: str, *, optional: bool = False) -> Iterator[Slot]:
    found: list[Slot] = []
    for token in _TOKEN.findall(text):
        if token == _MORE and found:
            found[-1] = found[-1]._replace(repeated=True)
        elif token.startswith("["):
            found += _slots(token[1:-1], optional=True)
        elif token in _PATTERNS:
            found.append(Slot(kind=token, optional=optional))
        else:
            parts = token.split("|") if not _CAPITALS.match(token) else [token]
            kind = next((match[0] for part in parts if (match := _CAPITALS.match(part))), "")
            words = tuple(part for part in parts if not _CAPITALS.match(part))
            found.append(Slot(words, kind, optional=optional))
    return iter(found)


def fits(form: str, words: Sequence[str]) -> bool:
    """Whether ``words``, those behind the command's name, are written as ``form`` says."""
    return any(not left or all(slot.optional for slot in left) for left in _left(slots(form), words))


def following(forms: Iterable[str], words: Sequence[str]) -> list[Slot]:
    """What may stand behind ``words``."""
    found: list[Slot] = []
    for form in forms:
        for left in _left(slots(form), words):
            for slot in left:
                found.append(slot)
                if not slot.optional:
                    break
    return list(dict.fromkeys(found))


def _left(given: tuple[Slot, ...], words: Sequence[str]) -> Iterator[tuple[Slot, ...]]:
    """What is left of the slots when ``words`` are taken out, in each way in which they can be."""
    if not words:
        yield given
        return
    for index, slot in enumerate(given):
        if slot.admits(words[0]):
            again = (slot._replace(optional=True),) if slot.repeated else ()
            yield from _left((*again, *given[index + 1 :]), words[1:])
        if not slot.optional:
            return
