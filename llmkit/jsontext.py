"""The one JSON value in an answer, which models like to wrap in words.

Looked for in this order: the whole text; the inside of the one Markdown fence; what stands between words. Text before
``</think>`` is no part of an answer. An answer with two values in it is none: which of them is meant cannot be known.
What JSON itself does not have (NaN, a name twice, a number beyond all bounds) is refused, and so is a value nested
deeper than `DEEPEST`. What has begun as a value and breaks off is not searched for smaller ones. Nothing is ever
evaluated, and the text is gone through a bounded number of times.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple, NoReturn

__all__ = ["DEEPEST", "NoValue", "Value", "value_in"]

DEEPEST = 100
MOST_TRIES = 50  # brackets at which a value may begin
_FENCE = "```"
_OPENING = re.compile(r"[{\[]")


class NoValue(ValueError):
    """There is no JSON value, or not one alone; the text says why."""


class Value(NamedTuple):
    """A value and the text that it was written as."""

    value: Any
    text: str


def value_in(text: str, openings: str = "{[") -> Value:
    """The value in ``text``. Between words only one that begins with one of ``openings`` is looked for.

    Raises:
        NoValue: why there is none.
    """
    text = _answered(text).strip()
    if not text:
        raise NoValue("the answer has no text")
    for piece in (text, _fenced(text)):
        if piece is not None:
            try:
                return Value(_checked(_DECODER.decode(piece), piece), piece)
            except _Refused as error:
                raise NoValue(f"the answer is not JSON: {error}") from None
            except (ValueError, RecursionError):
                continue
    return _between_words(text, openings)


def _answered(text: str) -> str:
    if text.lstrip()[:7] == "<think>" and "</think>" in text:
        return text.rpartition("</think>")[2]
    return text


def _fenced(text: str) -> str | None:
    """What stands in the fence, where there is one."""
    parts = text.split(_FENCE, 4)
    if len(parts) != 3:
        return None
    first, newline, rest = parts[1].partition("\n")
    inside = rest if newline and first.strip().isalnum() else parts[1]
    return inside.strip()


def _between_words(text: str, openings: str) -> Value:
    found: Value | None = None
    start = 0
    why = ""
    for _ in range(MOST_TRIES):
        opening = _OPENING.search(text, start)
        if opening is None:
            break
        at = opening.start()
        try:
            value, end = _DECODER.raw_decode(text, at)
            _checked(value, text[at:end])
        except json.JSONDecodeError as error:
            why = why or f"{error.msg} at line {error.lineno}, column {error.colno}"
            start = max(at + 1, error.pos)  # never inside what has begun well: a part of a value is another value
            continue
        except RecursionError:
            raise NoValue("the answer is not JSON: it is nested too deep") from None
        except ValueError as error:
            raise NoValue(
                f"the answer is not JSON: {error if isinstance(error, _Refused) else 'a number is too long'}"
            ) from None
        start = end
        if text[at] in openings:
            if found is not None:
                raise NoValue("the answer holds more than one JSON value")
            found = Value(value, text[at:end])
    if found is None:
        raise NoValue(f"the answer is not JSON: {why or 'there is none in the text'}")
    return found


class _Refused(ValueError):
    """What Python's parser takes and JSON does not have."""


def _constant(name: str) -> NoReturn:
    raise _Refused(f"{name} is no JSON number")


def _float(digits: str) -> float:
    number = float(digits)
    if number in {float("inf"), float("-inf")}:
        raise _Refused("a number is too large")
    return number


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        left = iter(fields)  # in their first order: where the two part, a name stands for the second time
        twice = next(name for name, _ in pairs if name != next(left, None))
        raise _Refused(f"the name {twice!r:.60} stands twice in one object")
    return fields


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_float, parse_constant=_constant)


def _checked(value: Any, text: str) -> Any:
    """``value``, which was read out of ``text``, if it is not nested too deep and all of its texts can be written."""
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise _Refused("a text in it has half a character") from None
    level = [value]
    for _ in range(DEEPEST):
        level = [
            inner
            for each in level
            if isinstance(each, dict | list)
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return value
    raise _Refused(f"it is nested deeper than {DEEPEST} levels")
