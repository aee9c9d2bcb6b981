"""What of a prompt differs from machine to machine and from run to run, and says nothing: it becomes a placeholder.

Kept few and narrow, since two different questions must never look the same:

* the home folder, the folder for temporary files with a name made up by `tempfile` in it, and ipykernel's own files;
* the address in a ``<… at 0x7f…>``, as Python shows objects;
* the file name of a kernel's connection.

Addresses and made-up names are numbered in the order in which they appear, so "are these two the same object?" about one
object stays another question than about two. A placeholder holds a character that is doubled where a text has it, so
no text can be mistaken for one.
"""

from __future__ import annotations

import os
import re
import tempfile
from functools import lru_cache
from pathlib import Path

__all__ = ["MARK", "Neutral", "escaped"]

MARK = "\x1a"
_SHORTEST_HOME = 4  # "/root" is one; "/" would be in every path

_ADDRESS = r"(?<= at )0x[0-9A-Fa-f]{6,16}(?=[>,])"
_OPENED = re.compile(r"<[A-Za-z_](?:[^<>\n]|<[^<>\n]*>){0,300}? at 0x[0-9A-Fa-f]{6,16}[>,]")
_CONNECTION = r"\bkernel-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b"
_MADE_UP = r"tmp[a-z0-9_]{8}"


def escaped(text: str) -> str:
    """``text`` so that nothing in it can be taken for a placeholder."""
    return text.replace(MARK, MARK * 2)


def _home() -> str:
    try:
        home = str(Path.home())
    except RuntimeError:  # a process without a home
        return ""
    return home if len(home) >= _SHORTEST_HOME else ""


@lru_cache(maxsize=4)
def _pattern(home: str, temporary: str) -> re.Pattern[str]:
    known = sorted({temporary, os.path.realpath(temporary), "/tmp"}, key=len)  # noqa: S108  a name to look for
    folders = "|".join(re.escape(each) for each in reversed(known))
    # Not within a longer name: /home/ana is no part of /home/anatole, nor of /backup/home/ana.
    at_home = rf"(?<![\w./\\-]){re.escape(home)}(?![\w.-])" if home else r"(?!)"
    return re.compile(
        rf"(?P<kernel>(?:{folders})[/\\]ipykernel_\d+(?=[/\\]))|(?P<made>(?:{folders})[/\\]{_MADE_UP}(?![\w-]))"
        rf"|(?P<home>{at_home})|(?P<connection>{_CONNECTION})|(?P<address>{_ADDRESS})"
    )


class Neutral:
    """Takes the placeholders' place in the texts of one question; what it has numbered stays so in all of them."""

    def __init__(self) -> None:
        self._pattern = _pattern(_home(), tempfile.gettempdir())
        self._numbers: dict[tuple[str, str], int] = {}

    def out_of(self, text: str) -> str:
        """``text`` with placeholders."""
        text = escaped(text)
        shown = [match.span() for match in _OPENED.finditer(text)] if " at 0x" in text else []

        def placeholder(match: re.Match[str]) -> str:
            kind, found = str(match.lastgroup), match.group()
            if kind == "address" and not any(begin < match.start() < end for begin, end in shown):
                return found
            if kind in {"home", "kernel"}:
                return f"{MARK}{kind}{MARK}"
            number = self._numbers.setdefault((kind, found), len(self._numbers) + 1)
            return f"{MARK}{kind} {number}{MARK}"

        return self._pattern.sub(placeholder, text)
