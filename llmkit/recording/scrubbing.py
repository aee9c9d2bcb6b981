"""What must not stand in a file that is handed on: keys always, personal data where that is asked for."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from llmkit.recording.personal import personal
from llmkit.redaction import REDACTED, keylike

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

__all__ = ["Scrub", "secrets_in"]

_SHORTEST_SECRET = 8  # shorter "keys" are placeholders for servers that need none, and also plain words
_SHORTEST = 6  # of anything that goes: an e-mail address
_SHORTEST_UNNAMED = 16
_SECRET_NAME = re.compile(r"(?i)(?:^|.*_)(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|PWD)$")


def secrets_in(environ: Mapping[str, str], named: Iterable[str | None]) -> frozenset[str]:
    """The values of the variables ``named``, and of those whose name and value both look like a key's."""
    known = {environ.get(name, "").strip() for name in named if name}
    found = {value for value in known if len(value) >= _SHORTEST_SECRET}
    for name in environ:
        value = environ[name].strip()
        if _SECRET_NAME.match(name) and len(value) >= _SHORTEST_UNNAMED and re.search(r"\d", value):
            found.add(value)
    return frozenset(found)


class Scrub:
    """Takes keys out of texts, and personal data where ``of_people``. ``secrets``: the keys that are known."""

    def __init__(self, secrets: Callable[[], Iterable[str]], *, of_people: bool = False) -> None:
        self._secrets = secrets
        self._known: frozenset[str] = frozenset()
        self.of_people = of_people
        self.look()

    def look(self) -> None:
        """Learn the keys that there are by now; those that there were stay known."""
        self._known |= frozenset(self._secrets())

    def text(self, text: str) -> str:
        """A text that people write or read."""
        return _with(text, self._spans(text, prose=True))

    def pieces(self, pieces: Sequence[str]) -> list[str]:
        """A text in pieces, cut at the same places as before; what is scrubbed is in one piece."""
        text = "".join(pieces)
        spans = self._spans(text, prose=True)
        if not spans:
            return list(pieces)
        out, begin, at = [], 0, 0
        for piece in pieces:
            at += len(piece)
            end = next((end for start, end, _ in spans if start < at < end), at)
            out.append(
                _with(text, [each for each in spans if begin <= each[0] < end], begin, end) if end > begin else ""
            )
            begin = max(begin, end)
        return out

    def tree(self, value: Any, *, prose: bool = True) -> Any:
        """Every text in plain JSON, names included; without ``prose`` it is names and numbers, and only keys go."""
        if isinstance(value, str):
            return _with(value, self._spans(value, prose=prose))
        if isinstance(value, dict):
            return {self.tree(name, prose=prose): self.tree(each, prose=prose) for name, each in value.items()}
        if isinstance(value, list):
            return [self.tree(each, prose=prose) for each in value]
        return value

    def _spans(self, text: str, *, prose: bool) -> list[tuple[int, int, str]]:
        """What goes, in its order and without overlaps; of two that overlap the one that begins first."""
        if len(text) < _SHORTEST:
            return []
        found = [(*span, REDACTED) for secret in self._known if secret in text for span in _all(text, secret)]
        found += [(*span, REDACTED) for span in keylike(text)]
        if self.of_people and prose:
            found += personal(text)
        kept: list[tuple[int, int, str]] = []
        for begin, end, word in sorted(found, key=lambda each: (each[0], -each[1])):
            if kept and begin < kept[-1][1]:
                if end > kept[-1][1]:
                    kept[-1] = (kept[-1][0], end, kept[-1][2])
            else:
                kept.append((begin, end, word))
        return kept


def _all(text: str, secret: str) -> Iterator[tuple[int, int]]:
    at = text.find(secret)
    while at >= 0:
        yield at, at + len(secret)
        at = text.find(secret, at + len(secret))


def _with(text: str, spans: Sequence[tuple[int, int, str]], begin: int = 0, end: int | None = None) -> str:
    if not spans:
        return text[begin:end]
    out, at = [], begin
    for start, stop, word in spans:
        out += [text[at:start], word]
        at = stop
    return "".join([*out, text[at:end]])
