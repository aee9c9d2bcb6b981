"""A JSON schema in the dialects that services enforce while a model writes.

A service takes only a part of JSON schema. What it does not take and what only narrows a value (``minLength``,
``default``) goes into the description, where the model reads it; the whole schema is checked here afterwards. What
cannot be said at all (``additionalProperties`` of any name, ``allOf``, an optional field that may not be null) makes
the schema one that this dialect cannot say.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

__all__ = ["ANTHROPIC", "OPENAI", "Dialect", "references", "said_in", "wrapped", "wrapper_of"]

MOST_PROPERTIES = 5000
_DROPPED = frozenset({"$schema", "$id", "$comment", "discriminator", "deprecated", "readOnly", "writeOnly"})
_KEPT = frozenset({"type", "title", "description", "enum", "const", "$ref"})
_SAYING = frozenset({"type", "enum", "const", "$ref", "anyOf"})
_MAPS = frozenset(
    {"properties", "patternProperties", "dependentSchemas", "$defs", "definitions"}
)  # by names of one's own
_REFERRING = frozenset({"$ref", "$dynamicRef", "$recursiveRef"})
_DATA = frozenset({"enum", "const", "default", "examples"})  # values, in which a "$ref" is no reference
_NOTED = frozenset(
    {"default", "examples", "format", "pattern", "minLength", "maxLength", "minimum", "maximum", "exclusiveMinimum",
     "exclusiveMaximum", "multipleOf", "minItems", "maxItems", "uniqueItems", "minProperties", "maxProperties"}
)  # fmt: skip
_LOOKING_AROUND = re.compile(r"\(\?<?[=!]")
_FORMATS = frozenset({"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid"})


class Dialect(NamedTuple):
    """What a service takes beside types, properties, enumerations and references.

    Attributes:
        keeps: keywords that narrow a value and are enforced.
        recursive: whether a schema may refer to itself.
        deepest: how deep objects may stand in each other.
    """

    keeps: frozenset[str]
    recursive: bool
    deepest: int


OPENAI = Dialect(
    frozenset(
        {"format", "pattern", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minItems"}
        | {"maxItems"}
    ),
    recursive=True,
    deepest=10,
)
ANTHROPIC = Dialect(frozenset({"format"}), recursive=False, deepest=10)


class _Unsayable(Exception):
    """This dialect has no word for it."""


def wrapper_of(shape: dict[str, Any]) -> str:
    """The name of the one field of the object around a schema whose root is no object."""
    return "items" if shape.get("type") == "array" else "value"


def wrapped(shape: dict[str, Any]) -> dict[str, Any]:
    """``shape`` as the one field of an object; what it refers to stays where it was, seen from its references."""
    name = wrapper_of(shape)
    inside = _moved({key: value for key, value in shape.items() if key not in {"$defs", "definitions"}}, name)
    defined = {key: _moved(shape[key], name) for key in ("$defs", "definitions") if key in shape}
    schema = {"type": "object", "properties": {name: inside}, "required": [name], "additionalProperties": False}
    return schema | defined


def _moved(node: Any, wrapper: str) -> Any:
    if isinstance(node, list):
        return [_moved(each, wrapper) for each in node]
    if not isinstance(node, dict):
        return node
    moved: dict[str, Any] = {}
    for name, value in node.items():
        if name == "$ref" and isinstance(value, str) and not value.startswith(("#/$defs/", "#/definitions/")):
            moved[name] = f"#/properties/{wrapper}{value.removeprefix('#')}"
        elif name in _MAPS and isinstance(value, dict):
            moved[name] = {key: _moved(each, wrapper) for key, each in value.items()}
        else:
            moved[name] = value if name in _DATA else _moved(value, wrapper)
    return moved


def said_in(dialect: Dialect, schema: dict[str, Any]) -> dict[str, Any] | None:
    """``schema``, whose root is an object, in the strict form of ``dialect``; None where it cannot be said there."""
    if not dialect.recursive and _is_recursive(schema):
        return None
    try:
        return _Writer(dialect).root(schema)
    except _Unsayable:
        return None


class _Writer:
    """Writes one schema, and counts its properties."""

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        self._properties = 0

    def root(self, schema: dict[str, Any]) -> dict[str, Any]:
        body = {name: value for name, value in schema.items() if name not in {"$defs", "definitions"}}
        written = self.node(body, 0)
        for name in ("$defs", "definitions"):
            if name in schema:
                written[name] = {key: self.node(value, 1) for key, value in schema[name].items()}
        return written

    def node(self, node: Any, depth: int) -> dict[str, Any]:
        if not isinstance(node, dict) or depth > self._dialect.deepest:
            raise _Unsayable
        written: dict[str, Any] = {}
        notes = []
        for name, value in node.items():
            if self._is_taken(name, value):
                written[name] = value
            elif name in _NOTED:
                notes.append(f"{name}: {json.dumps(value, ensure_ascii=False)}")
            else:
                self._nested(name, value, written, depth)
        self._object(node, written, depth)
        if notes:
            written["description"] = " ".join(filter(None, [written.get("description", ""), f"({'; '.join(notes)})"]))
        if not written.keys() & _SAYING:
            raise _Unsayable
        return _alone(written)

    def _is_taken(self, name: str, value: Any) -> bool:
        if name == "pattern" and isinstance(value, str) and _LOOKING_AROUND.search(value):
            return False  # an expression that services refuse, and the whole schema with it
        return name in _KEPT or (name in self._dialect.keeps and (name != "format" or value in _FORMATS))

    def _nested(self, name: str, value: Any, written: dict[str, Any], depth: int) -> None:
        if name in {"anyOf", "oneOf"} and "anyOf" not in written:
            written["anyOf"] = [self.node(each, depth) for each in value]
        elif name == "items":
            written[name] = self.node(value, depth)
        elif name not in _DROPPED | {"properties", "required", "additionalProperties"}:
            raise _Unsayable

    def _object(self, node: dict[str, Any], written: dict[str, Any], depth: int) -> None:
        """Its fields: all of them demanded, and no others."""
        if "properties" not in node and node.get("type") != "object":
            if node.get("additionalProperties") is not None or node.get("required"):
                raise _Unsayable
            return
        properties = node.get("properties", {})
        if node.get("additionalProperties", False) is not False or not properties:
            raise _Unsayable
        self._properties += len(properties)
        required = node.get("required", [])
        left_out = [each for name, each in properties.items() if name not in required and not _may_be_null(each)]
        if self._properties > MOST_PROPERTIES or any("default" not in each for each in left_out):
            raise _Unsayable
        if any(name not in properties for name in required):
            raise _Unsayable
        written["properties"] = {name: self.node(each, depth + 1) for name, each in properties.items()}
        written["required"] = list(properties)
        written["additionalProperties"] = False


def _alone(node: dict[str, Any]) -> dict[str, Any]:
    """A reference has no neighbours: what stands beside it goes round it."""
    if "$ref" not in node or len(node) == 1:
        return node
    rest = {name: value for name, value in node.items() if name != "$ref"}
    if not rest.keys() <= {"description", "title"}:
        raise _Unsayable
    return {"anyOf": [{"$ref": node["$ref"]}], **rest}


def _may_be_null(node: Any) -> bool:
    if not isinstance(node, dict):
        return False
    kind = node.get("type")
    if kind == "null" or (isinstance(kind, list) and "null" in kind and None in node.get("enum", [None])):
        return True
    return any(_may_be_null(each) for name in ("anyOf", "oneOf") for each in node.get(name, ()))


def _is_recursive(schema: dict[str, Any]) -> bool:
    """Whether a definition can be reached from itself. Any reference to something else than a definition counts."""
    defined = {
        f"#/{kind}/{name}": node for kind in ("$defs", "definitions") for name, node in schema.get(kind, {}).items()
    }
    reaches = {name: references(node) for name, node in defined.items()}
    if not set().union(references({**schema, "$defs": {}, "definitions": {}}), *reaches.values()) <= set(defined):
        return True
    left = dict(reaches)
    while left:  # take away what refers to nothing that is left, until nothing is
        ends = [name for name, others in left.items() if not others & left.keys()]
        if not ends:
            return True
        for name in ends:
            del left[name]
    return False


def references(node: Any) -> set[str]:
    """What a schema refers to, by ``$ref`` and its relatives, anywhere in it."""
    if isinstance(node, list):
        return set().union(*map(references, node)) if node else set()
    if not isinstance(node, dict):
        return set()
    found = {value for name, value in node.items() if name in _REFERRING and isinstance(value, str)}
    for name, value in node.items():
        if name in _MAPS and isinstance(value, dict):
            found = found.union(*map(references, value.values()))
        elif name not in _DATA:
            found |= references(value)
    return found
