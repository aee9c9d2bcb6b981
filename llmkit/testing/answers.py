"""What the simulated model says: the same to the same question, and plainly a simulation."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from typing import Any

__all__ = ["instance", "pieces", "prose", "thoughts"]

_PIECE = re.compile(r"\s*\S+")
_QUOTED = 160  # characters of the prompt that come back
_HARMLESS = str.maketrans({"<": "‹", ">": "›", "`": "'", "[": "(", "]": ")", "\\": "/", "$": "＄", "|": "/"})

_BEGINNINGS = (
    "This is a **simulated** answer: no model was asked, and nothing is billed.",
    "**Simulated answer.** No model read this, and it costs nothing.",
    "You are talking to the **simulator**: there is no model behind it, and no bill either.",
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
_THOUGHTS = [
    "Let",
    "me",
    "think",
    "this",
    "through",
    "step",
    "by",
    "step",
    "and",
    "pretend",
    "that",
    "it",
    "is",
    "hard",
    ".",
]


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


def prose(prompt: str, fingerprint: str) -> str:
    """A short Markdown answer to ``prompt``; ``fingerprint`` chooses the words."""
    digest = hashlib.sha256(fingerprint.encode("utf-8", "replace")).digest()
    words = prompt.split()
    longest = max(words, key=len, default="")
    facts = [
        f"- **{len(words)}** {'word' if len(words) == 1 else 'words'}, {len(prompt)} characters",
        f"- longest word: *{_quoted(longest, 40) or '—'}*",
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
    return shown.translate(_HARMLESS).replace("*", "∗").replace("_", " ")


def instance(schema: Any) -> str:
    """The text of a small JSON document that fits ``schema``; for no schema, one that says it is simulated.

    ``pattern``, ``not`` and conditional keywords are not followed.
    """
    if schema is None:
        return json.dumps({"simulated": True, "answer": "No model was asked."})
    return json.dumps(_Instance(schema).of(schema, 0), ensure_ascii=False)


class _Instance:
    """Builds the instance; holds the whole schema, since its parts refer to each other."""

    depth = 20
    most_items = 20
    formats = {
        "date": "2026-01-01",
        "date-time": "2026-01-01T00:00:00Z",
        "time": "00:00:00Z",
        "email": "simulated@example.invalid",
        "uri": "https://example.invalid/",
        "uuid": "00000000-0000-4000-8000-000000000000",
    }

    def __init__(self, root: Any) -> None:
        self._root = root

    def of(self, schema: Any, depth: int) -> Any:
        """A value that fits; None where the schema is too deep or says nothing."""
        if not isinstance(schema, dict) or depth > self.depth:
            return None
        if isinstance(schema.get("$ref"), str):
            return self.of(self._resolved(schema["$ref"]), depth + 1)
        if "const" in schema:
            return schema["const"]
        for name in ("enum", "examples"):
            if isinstance(schema.get(name), list) and schema[name]:
                return schema[name][0]
        for name in ("anyOf", "oneOf"):
            if isinstance(schema.get(name), list) and schema[name]:
                return self.of(schema[name][0], depth + 1)
        if isinstance(schema.get("allOf"), list):
            return self._object(self._merged(schema), depth)
        return self._typed(schema, depth)

    def _typed(self, schema: dict[str, Any], depth: int) -> Any:
        kind = schema.get("type")
        if isinstance(kind, list):
            kind = next((each for each in kind if each != "null"), "null")
        if kind == "object" or (kind is None and "properties" in schema):
            return self._object(schema, depth)
        if kind == "array":
            least = schema.get("minItems", 1)
            count = min(max(least if isinstance(least, int) else 1, 0), self.most_items)
            return [self.of(schema.get("items"), depth + 1) for _ in range(count)]
        if kind == "string":
            return self._string(schema)
        if kind in {"integer", "number"}:
            return self._number(schema, step=1)
        return True if kind == "boolean" else None

    def _object(self, schema: dict[str, Any], depth: int) -> dict[str, Any]:
        properties = schema.get("properties")
        if not isinstance(properties, dict):
            return {}
        # Optional ones, too, but not where schemas nest: a tree whose children are optional would never end.
        required = schema.get("required")
        required = required if isinstance(required, list) else []
        names = [name for name in properties if depth < 3 or name in required]
        return {name: self.of(properties[name], depth + 1) for name in names[:100]}

    def _merged(self, schema: dict[str, Any]) -> dict[str, Any]:
        properties: dict[str, Any] = dict(schema.get("properties") or {})
        required = list(schema.get("required") or [])
        for part in schema["allOf"][:100]:
            whole = self._resolved(part["$ref"]) if isinstance(part, dict) and "$ref" in part else part
            if isinstance(whole, dict):
                properties.update(whole.get("properties") or {})
                required += whole.get("required") or []
        return {"properties": properties, "required": required}

    def _string(self, schema: dict[str, Any]) -> str:
        text = self.formats.get(str(schema.get("format")), "simulated")
        least, most = schema.get("minLength"), schema.get("maxLength")
        if isinstance(least, int) and len(text) < least <= 10_000:
            text += "." * (least - len(text))
        return text[:most] if isinstance(most, int) and most >= 0 else text

    def _number(self, schema: dict[str, Any], step: int) -> Any:
        least, above = schema.get("minimum"), schema.get("exclusiveMinimum")
        most, below = schema.get("maximum"), schema.get("exclusiveMaximum")
        if isinstance(least, int | float):
            return least
        if isinstance(above, int | float):
            return above + step if not isinstance(below, int | float) else (above + below) / 2
        if isinstance(most, int | float):
            return min(most, 1)
        return min(below - step, 1) if isinstance(below, int | float) else 1

    def _resolved(self, reference: Any) -> Any:
        found = self._root
        if not isinstance(reference, str) or not reference.startswith("#"):
            return None
        for name in reference.removeprefix("#").strip("/").split("/"):
            if name:
                found = found.get(name.replace("~1", "/").replace("~0", "~")) if isinstance(found, dict) else None
        return found
