"""A schema in short: ``name, age int, tags list, bio: a few words``.

::

    schema = ["[]" | "list of"] field {"," field}     one object, or a list of such objects; a line break is a comma
    field  = name ["?"] [type] ["?"] [":" description]
    type   = str | int | float | bool | A|B|C | list | list of TYPE | list[TYPE]

A field without a type is a text; ``list`` alone is a list of texts; ``A|B|C`` is one of these words. ``?`` lets a field
be null or left out. A description ends at the next comma, or at the end of its line where there are several lines.
"""

from __future__ import annotations

import difflib
import re
from typing import Any

from llmkit.errors import ConfigError

__all__ = ["from_short"]

TYPES = {
    "str": "string",
    "string": "string",
    "text": "string",
    "int": "integer",
    "integer": "integer",
    "float": "number",
    "number": "number",
    "bool": "boolean",
    "boolean": "boolean",
}
MOST_FIELDS = 200
EXAMPLE = "such as 'name, age int, tags list, mood good|bad, note?: why'; or use a Pydantic class, or a JSON schema"

_MANY = re.compile(r"(?:\[\s*\]|list\s+of\b)\s*(?P<rest>.*)", re.DOTALL | re.IGNORECASE)
_NAME = re.compile(r"[^\W\d][\w-]{0,63}")
_LIST = re.compile(r"list\s*(?:\[\s*(?P<inside>[^\[\]]*)\]|of\s+(?P<of>.+))", re.IGNORECASE)
_WORD = re.compile(r"[\w.+-]{1,64}")


def from_short(text: str) -> dict[str, Any]:
    """The JSON schema that ``text`` is short for.

    Raises:
        ConfigError: which field is wrong, and the nearest type.
    """
    text = text.strip()
    many = _MANY.fullmatch(text)
    rest = many["rest"].strip() if many else text
    inside = _LIST.fullmatch(rest) if not many else None
    if many and rest.lower() in TYPES:
        return {"type": "array", "items": {"type": TYPES[rest.lower()]}}
    if inside and inside["inside"] is not None:
        return _type(rest, rest)
    shape = _object(rest)
    return {"type": "array", "items": shape} if many else shape


def _object(text: str) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    required = []
    fields = _fields(text)
    if not fields:
        raise ConfigError("the schema has no fields", next_step=EXAMPLE)
    if len(fields) > MOST_FIELDS:
        raise ConfigError(f"the schema has {len(fields)} fields; at most {MOST_FIELDS} can be written in short")
    for number, (said, description) in enumerate(fields, 1):
        where = f"field {number} of the schema, {said!r:.60}"
        name, optional, shape = _field(said, where)
        if name in properties:
            raise ConfigError(f"{where}: there is a field {name} already")
        if optional:
            shape = _nullable(shape)
        else:
            required.append(name)
        properties[name] = {**shape, "description": description} if description else shape
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _fields(text: str) -> list[tuple[str, str]]:
    """Each field as it was written, and its description."""
    found = []
    lines = text.splitlines()
    # On one line a comma ends a description as well; on several, only the end of the line does.
    for line in lines if len(lines) > 1 else _split(text):
        head, _, description = line.partition(":")
        heads = [head.strip() for head in _split(head)]
        if not any(heads) and not description.strip():
            continue
        found += [(head, "") for head in heads[:-1]]
        found.append((heads[-1], " ".join(description.split())))
    if found and len(lines) <= 1 and not found[-1][0]:
        found.pop()
    return found


def _split(text: str) -> list[str]:
    return re.split(r",(?![^\[]*\])", text)


def _field(said: str, where: str) -> tuple[str, bool, dict[str, Any]]:
    name, _, kind = said.replace("?", " ? ").strip().partition(" ")
    if not name:
        raise ConfigError(f"{where}: a name is missing", next_step=EXAMPLE)
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{where}: {name!r:.60} cannot be the name of a field", next_step=EXAMPLE)
    words = kind.split()
    optional = "?" in words
    kind = " ".join(word for word in words if word != "?")
    if not kind and name.lower() in {*TYPES, "list"} and not optional:
        raise ConfigError(f"{where}: that is a type and not the name of a field", next_step=EXAMPLE)
    return name, optional, _type(kind or "str", where)


def _type(kind: str, where: str) -> dict[str, Any]:
    if kind.lower() in TYPES:
        return {"type": TYPES[kind.lower()]}
    if kind.lower() == "list":
        return {"type": "array", "items": {"type": "string"}}
    if several := _LIST.fullmatch(kind):
        inside = (several["inside"] if several["inside"] is not None else several["of"]).strip()
        return {"type": "array", "items": _type(inside or "str", where)}
    if "|" in kind:
        words = [word.strip() for word in kind.split("|")]
        if all(_WORD.fullmatch(word) for word in words) and len(set(words)) == len(words):
            return {"type": "string", "enum": words}
        raise ConfigError(f"{where}: the words between | must be different, and of letters and digits")
    near = difflib.get_close_matches(kind.lower(), [*TYPES, "list"], 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(
        f"{where}: there is no type {kind!r:.60}{hint}",
        next_step="types are str, int, float, bool, list, list of int, and words with | between; a description stands after a colon",
    )


def _nullable(shape: dict[str, Any]) -> dict[str, Any]:
    nullable = {**shape, "type": [shape["type"], "null"]}
    return {**nullable, "enum": [*shape["enum"], None]} if "enum" in shape else nullable
