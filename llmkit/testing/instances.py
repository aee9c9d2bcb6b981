"""A small JSON document for a JSON schema, since a simulated model must answer in JSON where it is asked to."""

from __future__ import annotations

import json
import math
from typing import Any

__all__ = ["instance"]

_DEEPEST = 20
_MOST_PARTS = 2000
_LONGEST = 10_000
_GENEROUS = 3  # levels down to which optional parts are given, too; a schema that refers to itself ends below
_FORMATS = {
    "date": "2026-01-01",
    "date-time": "2026-01-01T00:00:00Z",
    "time": "00:00:00Z",
    "email": "simulated@example.invalid",
    "duration": "P1D",
    "hostname": "example.invalid",
    "ipv4": "192.0.2.1",
    "ipv6": "2001:db8::1",
    "uri": "https://example.invalid/",
    "uuid": "00000000-0000-4000-8000-000000000000",
}


def instance(schema: dict[str, Any] | None) -> str:
    """The text of a small document that fits ``schema``; for None, one that says it is simulated.

    ``pattern``, ``not`` and conditional keywords are not followed.
    """
    if schema is None:
        return json.dumps({"simulated": True, "answer": "No model was asked."})
    return json.dumps(_Builder(schema).of(schema, 0), ensure_ascii=False)


class _Builder:
    """Holds the whole schema, since its parts refer to each other, and counts what it has built."""

    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root
        self._parts = 0

    def of(self, schema: Any, depth: int) -> Any:
        """A value that fits; None where the schema is too large, too deep, or says nothing."""
        self._parts += 1
        if not isinstance(schema, dict) or depth > _DEEPEST or self._parts > _MOST_PARTS:
            return None
        if "$ref" in schema:
            return self.of(self._resolved(schema["$ref"]), depth + 1)
        if "const" in schema:
            return schema["const"]
        for values in (schema.get("enum"), schema.get("examples")):
            if isinstance(values, list) and values:
                return values[0]
        for choices in (schema.get("anyOf"), schema.get("oneOf")):
            if isinstance(choices, list) and choices:
                return self.of(choices[0], depth + 1)
        return self._typed(self._merged(schema), depth)

    def _typed(self, schema: dict[str, Any], depth: int) -> Any:
        kind = schema.get("type", "object" if "properties" in schema else None)
        if isinstance(kind, list):
            kind = next((each for each in kind if each != "null"), "null")
        builders = {"object": self._object, "array": self._array, "string": _string, "integer": _integer,
                    "number": _number, "boolean": _yes}  # fmt: skip
        return builders[kind](schema, depth) if isinstance(kind, str) and kind in builders else None

    def _object(self, schema: dict[str, Any], depth: int) -> dict[str, Any]:
        properties, required = _mapping(schema.get("properties")), _sequence(schema.get("required"))
        names = [name for name in properties if depth < _GENEROUS or name in required]
        built = {name: self.of(properties[name], depth + 1) for name in names}
        least = schema.get("minProperties")
        for number in range(len(built), min(least, _MOST_PARTS) if type(least) is int else 0):
            built[f"simulated{number}"] = self.of(schema.get("additionalProperties", {"type": "string"}), depth + 1)
        return built

    def _array(self, schema: dict[str, Any], depth: int) -> list[Any]:
        least, first = schema.get("minItems"), _sequence(schema.get("prefixItems"))[:_MOST_PARTS]
        count = least if type(least) is int else max(len(first), int(depth < _GENEROUS))
        built = [self.of(each, depth + 1) for each in first]
        rest = schema.get("items")
        further = range(len(first), min(count, _MOST_PARTS))
        if schema.get("uniqueItems") is True:
            return built + [self._another(rest, number, depth) for number in further]
        return built + [self.of(rest, depth + 1) for _ in further]

    def _another(self, schema: Any, number: int, depth: int) -> Any:
        """The value of this number, where no two may be the same."""
        found = self._resolved(schema["$ref"]) if isinstance(schema, dict) and "$ref" in schema else schema
        values = _sequence(_mapping(found).get("enum"))
        if number < len(values):
            return values[number]
        value = self.of(found, depth + 1)
        if type(value) is str:
            return f"{value}{number}" if number else value
        return value + number if type(value) in {int, float} else value

    def _merged(self, schema: dict[str, Any]) -> dict[str, Any]:
        """The schema with the parts of its ``allOf`` put into it."""
        properties, required = dict(_mapping(schema.get("properties"))), list(_sequence(schema.get("required")))
        merged = dict(schema)
        for part in _sequence(schema.get("allOf")):
            whole = self._resolved(part["$ref"]) if isinstance(part, dict) and "$ref" in part else part
            merged |= _mapping(whole)
            properties |= _mapping(_mapping(whole).get("properties"))
            required += _sequence(_mapping(whole).get("required"))
        return merged | {"properties": properties, "required": required} if properties else merged

    def _resolved(self, reference: Any) -> Any:
        found: Any = self._root
        if not isinstance(reference, str) or not reference.startswith("#"):
            return None
        for name in reference.removeprefix("#").strip("/").split("/"):
            if name:
                found = _mapping(found).get(name.replace("~1", "/").replace("~0", "~"))
        return found


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _sequence(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _yes(_schema: dict[str, Any], _depth: int) -> bool:
    return True


def _string(schema: dict[str, Any], _depth: int) -> str:
    text = _FORMATS.get(str(schema.get("format")), "simulated")
    least, most = _bound(schema, "minLength"), _bound(schema, "maxLength")
    if least is not None:
        text = text.ljust(min(int(least), _LONGEST), ".")
    return text if most is None else text[: max(int(most), 0)]


def _integer(schema: dict[str, Any], _depth: int) -> int:
    lower = [math.ceil(bound) for bound in [_bound(schema, "minimum")] if bound is not None]
    lower += [math.floor(bound) + 1 for bound in [_bound(schema, "exclusiveMinimum")] if bound is not None]
    upper = [math.floor(bound) for bound in [_bound(schema, "maximum")] if bound is not None]
    upper += [math.ceil(bound) - 1 for bound in [_bound(schema, "exclusiveMaximum")] if bound is not None]
    step = _bound(schema, "multipleOf")
    if step is not None and step >= 1 and step == int(step):
        return math.ceil(max(lower) / step) * int(step) if lower else math.floor(min([step, *upper]) / step) * int(step)
    return max(lower) if lower else min([1, *upper])


def _number(schema: dict[str, Any], depth: int) -> float:
    lower = [bound for name in ("minimum", "exclusiveMinimum") if (bound := _bound(schema, name)) is not None]
    upper = [bound for name in ("maximum", "exclusiveMaximum") if (bound := _bound(schema, name)) is not None]
    if lower and upper and "multipleOf" not in schema:
        return (max(lower) + min(upper)) / 2
    return _integer(schema, depth)


def _bound(schema: dict[str, Any], name: str) -> float | None:
    value = schema.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value
