"""Where in a TOML source each setting stands, since tomllib does not say.

Only read when an error must name its line. The source has been read by tomllib before, so it is known to be valid TOML,
and the scanner need only follow it, not judge it.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["line_of", "lines"]

Place = tuple["str | int", ...]

_SPACE = re.compile(r"(?:[ \t\r\n]+|#[^\n]*)*")
_BARE = re.compile(r"[A-Za-z0-9_-]+")
_STRING = re.compile(r'"""(?:\\.|[^\\])*?"{3,5}|\'\'\'.*?\'{3,5}|"(?:\\.|[^"\\])*"|\'[^\']*\'', re.DOTALL)
_SCALAR = re.compile(r"[^,\]}#\r\n]+")


def line_of(text: str, path: Place) -> int | None:
    """The 1-based line of ``path`` (names of tables and keys, indices of arrays), or of what comes nearest above it."""
    places = lines(text)
    return next((places[path[:n]] for n in range(len(path), 0, -1) if path[:n] in places), None)


def lines(text: str) -> dict[Place, int]:
    """The line of every table, key and array item of a valid TOML source."""
    scanner = _Scanner(text)
    with suppress(IndexError, RecursionError):  # not valid after all: what was found until then still helps
        scanner.document()
    return scanner.found


class _Scanner:
    """One pass over the source."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.found: dict[Place, int] = {}
        self._starts = [0, *(match.end() for match in re.finditer("\n", text))]
        self._arrays: dict[Place, int] = {}

    def document(self) -> None:
        table: Place = ()
        self._skip()
        while self.at < len(self.text):
            if self.text[self.at] == "[":
                table = self._header()
            else:
                self._pair(table)
            self._skip()

    def _skip(self) -> None:
        match = _SPACE.match(self.text, self.at)
        self.at = match.end() if match else self.at

    def _note(self, path: Place, at: int) -> None:
        line = bisect_right(self._starts, at)
        for n in range(1, len(path) + 1):
            self.found.setdefault(path[:n], line)

    def _header(self) -> Place:
        start = self.at
        double = self.text.startswith("[[", start)
        self.at += 2 if double else 1
        path = self._inside_arrays(tuple(self._key()))
        if double:
            self._arrays[path] = self._arrays.get(path, -1) + 1
            path = (*path, self._arrays[path])
        self._note(path, start)
        self._skip()
        self.at += 2 if double else 1
        return path

    def _inside_arrays(self, names: Place) -> Place:
        """A header below an array of tables means the array's last item, except where it names the array itself."""
        path: Place = ()
        for index, name in enumerate(names):
            path = (*path, name)
            if index < len(names) - 1 and path in self._arrays:
                path = (*path, self._arrays[path])
        return path

    def _key(self) -> Iterator[str]:
        while True:
            self._skip()
            if self.text[self.at] in "\"'":
                yield _unquoted(self._string())
            else:
                match = _BARE.match(self.text, self.at)
                if match is None:
                    raise IndexError
                self.at = match.end()
                yield match[0]
            self._skip()
            if self.text[self.at] != ".":
                return
            self.at += 1

    def _string(self) -> str:
        match = _STRING.match(self.text, self.at)
        if match is None:
            raise IndexError
        self.at = match.end()
        return match[0]

    def _pair(self, table: Place) -> None:
        start = self.at
        path = (*table, *self._key())
        self._note(path, start)
        self.at += 1  # the equals sign
        self._skip()
        self._value(path)

    def _value(self, path: Place) -> None:
        char = self.text[self.at]
        if char == "[":
            self._items(path, "]")
        elif char == "{":
            self._items(path, "}")
        elif char in "\"'":
            self._string()
        else:
            match = _SCALAR.match(self.text, self.at)
            self.at = match.end() if match else self.at + 1

    def _items(self, path: Place, end: str) -> None:
        self.at += 1
        index = 0
        self._skip()
        while self.text[self.at] != end:
            if self.text[self.at] == ",":
                self.at += 1
            elif end == "}":
                self._pair(path)
            else:
                self._note((*path, index), self.at)
                self._value((*path, index))
                index += 1
            self._skip()
        self.at += 1


def _unquoted(key: str) -> str:
    import tomllib

    try:
        name = tomllib.loads(f"key = {key}")["key"]
    except ValueError:
        return key[1:-1]
    return str(name)
