"""What one text says otherwise than another, word by word; line by line where they are long.

The work is bounded, whatever the texts are: a model's answer must not be able to hold up a cell.
"""

from __future__ import annotations

import re
from collections import Counter
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["Difference", "Differences", "Piece"]

MOST_CHARACTERS = 50_000
"""Of texts that are compared at all."""
MOST_UNITS = 600
"""Words of either text, beside what both begin and end with, that are compared; of more than that, so many lines."""
MOST_WORK = 40_000_000
"""Steps that all comparisons of one grid may take, at worst: below two seconds of texts made for it, else a tenth of one."""
LEAST_SHARED = 0.25
"""Of two texts that share less than this part of their characters, nothing is marked: they have nothing to do with one another."""

_WORD = re.compile(r"\S+\s*|\s+")


class Piece(NamedTuple):
    """A stretch of text that is in both, ``added`` in the second, or ``removed`` with the first."""

    kind: Literal["same", "added", "removed"]
    text: str


class Difference(NamedTuple):
    """How a text differs from the first.

    Attributes:
        note: in a few words. pieces: what to mark; None where nothing can be.
    """

    note: str
    pieces: list[Piece] | None = None


class Differences:
    """Of several texts from the ``first``."""

    def __init__(self, first: str, name: str) -> None:
        self._first = first
        self._name = name
        self._work = MOST_WORK

    def of(self, text: str) -> Difference:
        """How ``text`` differs from the first."""
        if text == self._first:
            return Difference(f"the same as {self._name}")
        if max(len(text), len(self._first)) > MOST_CHARACTERS:
            return self._unmarked()
        for units in (_WORD.findall, _lines):
            before, after = units(self._first), units(text)
            start, end = _shared_ends(before, after)
            middle = before[start : len(before) - end], after[start : len(after) - end]
            if max(map(len, middle)) > MOST_UNITS:
                continue
            self._work -= _work(*middle)
            if self._work < 0:
                break
            tail = after[len(after) - end :]
            return self._marked([*_same(after[:start]), *_pieces(*middle), *_same(tail)], len(text))
        return self._unmarked()

    def _unmarked(self) -> Difference:
        return Difference(f"differs from {self._name}; too long to mark where")

    def _marked(self, pieces: list[Piece], length: int) -> Difference:
        shared = sum(len(piece.text) for piece in pieces if piece.kind == "same")
        if shared < LEAST_SHARED * max(len(self._first), length):
            return Difference(f"differs from {self._name} throughout")
        counts = Counter({"added": 0, "removed": 0})
        for piece in pieces:
            counts[piece.kind] += len(piece.text.split())
        return Difference(f"against {self._name}: +{counts['added']} -{counts['removed']} words", pieces)


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def _shared_ends(before: Sequence[str], after: Sequence[str]) -> tuple[int, int]:
    """How many units both begin with, and how many of the others both end with."""
    most = min(len(before), len(after))
    start = next((at for at in range(most) if before[at] != after[at]), most)
    most -= start
    end = next((at for at in range(most) if before[-1 - at] != after[-1 - at]), most)
    return start, end


def _work(before: Sequence[str], after: Sequence[str]) -> int:
    """What comparing takes at worst: each match that is found splits the rest, which is gone through again."""
    counts = Counter(after)
    popular = len(after) // 100 + 1 if len(after) >= 200 else len(after)
    pairs = sum(count for unit in before if (count := counts[unit]) <= popular)
    return (len(before) + pairs) * min(len(before), len(after), max(1, pairs))


def _pieces(before: Sequence[str], after: Sequence[str]) -> Iterator[Piece]:
    for kind, i, j, k, m in SequenceMatcher(None, before, after).get_opcodes():
        if kind == "equal":
            yield from _same(after[k:m])
            continue
        if i < j:
            yield Piece("removed", "".join(before[i:j]))
        if k < m:
            yield Piece("added", "".join(after[k:m]))


def _same(units: Sequence[str]) -> Iterator[Piece]:
    if units:
        yield Piece("same", "".join(units))
