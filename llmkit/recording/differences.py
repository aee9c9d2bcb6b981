"""A question that is not in a recording: which recorded one is nearest, and where the two differ first."""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any, NamedTuple

from llmkit.recording.machine import MARK, Neutral
from llmkit.redaction import tidy

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from llmkit.recording.file import Take

__all__ = ["Nearest", "nearest"]

_MOST_COMPARED = 12  # recorded questions, those with the most words in common
_MOST_WORDS = 1_500  # of a text that are compared
_ALIKE_IN_CHARACTERS = 0.5  # any two texts have some in common
_FEW_WORDS = 20
_MOST_READ = 8_000_000  # characters of all recorded questions, to choose those that are compared
_FEWEST_READ = 400  # of one of them
_PLACE = re.compile(f"{MARK}([a-z]+(?: \\d+)?){MARK}")
_BEFORE, _AFTER = 30, 50  # characters shown round a difference
_LEAST_ALIKE = 0.3  # below it, no prompt is near


class Nearest(NamedTuple):
    """The recorded question that is most like another.

    Attributes:
        place: its place in the recording, from 1; of how many.
        alike: 0 to 1. where: what differs first. lines: how, as two lines.
    """

    place: int
    of: int
    alike: float
    where: str
    lines: tuple[str, str]


def nearest(form: Mapping[str, Any], takes: Iterable[Take]) -> Nearest | None:
    """The recorded question nearest to ``form``, which is scrubbed as the recorded ones are; None where none is near."""
    known = list(takes)
    most = max(_FEWEST_READ, _MOST_READ // (len(known) or 1))
    bag = _features(form, most)
    rough = sorted(range(len(known)), key=lambda index: -_in_common(bag, _features(known[index].asked, most)))
    words = _words(form)
    best: tuple[float, float, int] | None = None
    for index in rough[:_MOST_COMPARED]:
        other = known[index].asked
        alike = _alike(words, _words(other))
        same = sum(form.get(name) == other.get(name) for name in {*form, *other})
        score = alike + 0.001 * same  # of two alike prompts, the one that was asked in the same way
        if alike >= _LEAST_ALIKE and (best is None or score > best[0]):
            best = (score, alike, index)
    if best is None:
        return None
    _, alike, index = best
    where, lines = _first(form, known[index].asked)
    return Nearest(index + 1, len(known), alike, where, lines)


def _alike(words: list[str], other: list[str]) -> float:
    """From 0 to 1, in words; of short texts, where a word is much, in characters if that is more."""
    alike = SequenceMatcher(None, words, other, autojunk=False).ratio()
    if max(len(words), len(other)) > _FEW_WORDS:
        return alike
    in_characters = SequenceMatcher(None, " ".join(words), " ".join(other), autojunk=False).ratio()
    return max(alike, in_characters) if in_characters >= _ALIKE_IN_CHARACTERS else alike


def _features(form: Mapping[str, Any], most: int) -> set[str]:
    """What a rough look compares: the words of the beginning and the end, and of a short text its groups of letters."""
    half = most // 2
    text = "\n".join(_raw(message) for message in _messages(form))
    text = text if len(text) <= most else f"{text[:half]} {text[-half:]}"
    found = text.split()
    if len(found) <= _FEW_WORDS:
        short = text[: 20 * _FEW_WORDS]
        found += [short[at : at + 2] for at in range(len(short) - 1)]
    return set(found)


def _in_common(bag: set[str], other: set[str]) -> float:
    return len(bag & other) / (len(bag | other) or 1)


def _words(form: Mapping[str, Any]) -> list[str]:
    """The words of its messages; of long ones, those at the beginning and the end."""
    words = [word for message in _messages(form) for word in _text(message).split()]
    half = _MOST_WORDS // 2
    return words if len(words) <= _MOST_WORDS else [*words[:half], *words[-half:]]


def _messages(form: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    messages = form.get("messages")
    return [each for each in messages if isinstance(each, dict)] if isinstance(messages, list) else []


def _text(message: Mapping[str, Any]) -> str:
    """Its text, with what differs from machine to machine as words."""
    return _PLACE.sub(r"[\1]", Neutral().out_of(_raw(message)))


def _raw(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    return "\n".join(_part(each) for each in content) if isinstance(content, list) else str(content)


def _part(part: Any) -> str:
    return str(part["text"]) if isinstance(part, dict) and part.get("type") == "text" and "text" in part else str(part)


def _first(form: Mapping[str, Any], recorded: Mapping[str, Any]) -> tuple[str, tuple[str, str]]:
    for where, was, asked in _sides(form, recorded):
        if was != asked:
            if isinstance(was, str) and isinstance(asked, str):
                return _in_text(where, was, asked)
            return where, (_value(was), _value(asked))
    return "what was scrubbed, or stands for a place on the machine", ("[not kept]", "[something else]")


def _sides(form: Mapping[str, Any], recorded: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """What can differ, in the order in which people look for it: (where, recorded, asked)."""
    ours, theirs = _messages(form), _messages(recorded)
    for index in range(max(len(ours), len(theirs))):
        asked = ours[index] if index < len(ours) else None
        was = theirs[index] if index < len(theirs) else None
        if asked is None or was is None:
            yield f"message {index + 1}", _described(was), _described(asked)
            continue
        role = str(was.get("role"))
        name = f"the {role} message" if _count(theirs, role) == 1 else f"message {index + 1} ({role})"
        yield f"the role of message {index + 1}", role, str(asked.get("role"))
        yield name, _text(was), _text(asked)
    for field in sorted({*form, *recorded} - {"messages"}, key=lambda each: (each != "model", each)):
        yield field, recorded.get(field), form.get(field)


def _count(messages: Sequence[Mapping[str, Any]], role: str) -> int:
    return sum(each.get("role") == role for each in messages)


def _described(message: Mapping[str, Any] | None) -> Any:
    return None if message is None else {"role": message.get("role"), "text": _text(message)[:_AFTER]}


def _in_text(where: str, was: str, asked: str) -> tuple[str, tuple[str, str]]:
    at = next((i for i, (a, b) in enumerate(zip(was, asked, strict=False)) if a != b), min(len(was), len(asked)))
    before = asked[:at]
    line, column = before.count("\n") + 1, at - (before.rfind("\n") + 1) + 1
    place = where if where == "model" or where.startswith("the role") else f"{where}, line {line}, column {column}"
    return place, (_around(was, at), _around(asked, at))


def _around(text: str, at: int) -> str:
    begin, end = max(0, at - _BEFORE), min(len(text), at + _AFTER)
    shown = text[begin:end].replace("\n", "⏎")
    return f"{'…' if begin else ''}{tidy(shown) or '(nothing)'}{'…' if end < len(text) else ''}"


def _value(value: Any) -> str:
    return "(not set)" if value is None else tidy(str(value), limit=120)
