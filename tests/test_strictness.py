"""Schemas in the dialects of services: what is said, what is noted, what cannot be said."""

from __future__ import annotations

import json
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field

from llmkit.schema import Schema
from llmkit.strictness import ANTHROPIC, OPENAI, references, said_in, wrapped
from llmkit.testing.instances import instance


def of(**properties: Any) -> dict[str, Any]:
    required = properties.pop("required", list(properties))
    return {"type": "object", "properties": properties, "required": required}


TEXT = {"type": "string"}


def test_all_fields_are_demanded_and_no_others() -> None:
    assert said_in(OPENAI, of(a=TEXT, b=of(c=TEXT))) == {
        "type": "object",
        "properties": {
            "a": TEXT,
            "b": {"type": "object", "properties": {"c": TEXT}, "required": ["c"], "additionalProperties": False},
        },
        "required": ["a", "b"],
        "additionalProperties": False,
    }


@pytest.mark.parametrize(
    "optional",
    [
        {"type": ["string", "null"]},
        {"anyOf": [TEXT, {"type": "null"}]},
        {"type": "null"},
        {"type": "integer", "default": 3},
    ],
)
def test_what_may_be_null_or_has_a_default_can_be_demanded(optional) -> None:
    written = said_in(OPENAI, of(a=TEXT, b=optional, required=["a"]))
    assert written is not None
    assert written["required"] == ["a", "b"]


@pytest.mark.parametrize(
    "schema",
    [
        of(a=TEXT, b=TEXT, required=["a"]),  # the service would have something made up for b
        of(a={"type": ["string", "null"], "enum": ["x"]}, required=[]),
        of(a={"type": "object", "additionalProperties": {"type": "integer"}}),
        of(a={"type": "object", "properties": {"b": TEXT}, "required": ["b"], "additionalProperties": True}),
        of(a={"type": "object"}),
        of(a={}),
        of(a=True),
        of(a={"allOf": [TEXT]}),
        of(a={"type": "array", "prefixItems": [TEXT]}),
        of(a={"not": TEXT}),
        of(a={"type": "string", "x-unheard-of": 1}),
        {**of(a=TEXT), "patternProperties": {"^x": TEXT}},
        {**of(a=TEXT), "required": ["a", "b"]},
    ],
)
def test_what_cannot_be_said_is_not(schema) -> None:
    assert said_in(OPENAI, schema) is None
    assert said_in(ANTHROPIC, schema) is None


def test_what_is_not_enforced_stands_in_the_description() -> None:
    schema = of(
        a={"type": "string", "minLength": 2, "pattern": "^x", "description": "a name"},
        b={"type": "integer", "minimum": 1, "default": 3},
        c={"type": "string", "format": "uri"},
    )
    openai, anthropic = said_in(OPENAI, schema), said_in(ANTHROPIC, schema)
    assert openai is not None
    assert anthropic is not None
    assert openai["properties"]["a"] == {"type": "string", "pattern": "^x", "description": "a name (minLength: 2)"}
    assert openai["properties"]["b"] == {"type": "integer", "minimum": 1, "description": "(default: 3)"}
    assert openai["properties"]["c"] == {"type": "string", "description": '(format: "uri")'}
    assert anthropic["properties"]["a"]["description"] == 'a name (minLength: 2; pattern: "^x")'
    assert anthropic["properties"]["b"] == {"type": "integer", "description": "(minimum: 1; default: 3)"}


def test_a_reference_stands_alone_and_one_of_is_any_of() -> None:
    schema = {
        **of(a={"$ref": "#/$defs/A", "description": "first"}, b={"oneOf": [TEXT, {"type": "integer"}]}),
        "$defs": {"A": of(x=TEXT)},
    }
    written = said_in(OPENAI, schema)
    assert written is not None
    assert written["properties"]["a"] == {"anyOf": [{"$ref": "#/$defs/A"}], "description": "first"}
    assert written["properties"]["b"] == {"anyOf": [TEXT, {"type": "integer"}]}
    assert written["$defs"]["A"]["additionalProperties"] is False


def test_a_schema_that_refers_to_itself_is_for_some_services_only() -> None:
    node = of(v=TEXT, kids={"type": "array", "items": {"$ref": "#/$defs/N"}})
    schema = {**of(root={"$ref": "#/$defs/N"}), "$defs": {"N": node}}
    assert said_in(OPENAI, schema) is not None
    assert said_in(ANTHROPIC, schema) is None
    assert said_in(ANTHROPIC, of(a={"$ref": "#"})) is None
    chain = {**of(a={"$ref": "#/$defs/A"}), "$defs": {"A": of(b={"$ref": "#/$defs/B"}), "B": of(c=TEXT)}}
    assert said_in(ANTHROPIC, chain) is not None


def test_too_deep_and_too_wide() -> None:
    deep: dict[str, Any] = TEXT
    for _ in range(12):
        deep = of(a=deep)
    assert said_in(OPENAI, deep) is None
    assert said_in(OPENAI, of(**{f"p{n}": TEXT for n in range(5001)})) is None


def test_wrapping_leaves_references_true() -> None:
    shape = {
        "type": "array",
        "items": {"anyOf": [{"$ref": "#/$defs/A"}, {"$ref": "#"}, {"$ref": "#/items/anyOf/0"}]},
        "$defs": {"A": of(x={"const": {"$ref": "#/not/a/reference"}})},
    }
    schema = wrapped(shape)
    assert schema["required"] == ["items"]
    assert schema["properties"]["items"]["items"]["anyOf"] == [
        {"$ref": "#/$defs/A"},
        {"$ref": "#/properties/items"},
        {"$ref": "#/properties/items/items/anyOf/0"},
    ]
    assert schema["$defs"] == shape["$defs"]
    assert references(shape) == {"#/$defs/A", "#", "#/items/anyOf/0"}


def test_fields_that_are_called_like_keywords() -> None:
    schema = of(default={"$ref": "#/$defs/A"}, **{"$ref": TEXT, "enum": TEXT}) | {"$defs": {"A": TEXT}}
    assert references(schema) == {"#/$defs/A"}
    assert wrapped({"type": "array", "items": of(const={"$ref": "#"})})["properties"]["items"]["items"][
        "properties"
    ] == {"const": {"$ref": "#/properties/items"}}
    written = said_in(OPENAI, schema)
    assert written is not None
    assert list(written["properties"]) == ["default", "$ref", "enum"]


class Place(BaseModel):
    city: str = Field(min_length=1)
    at: tuple[float, float] | None = None


class Person(BaseModel):
    name: str
    kind: Literal["a", "b"] = "a"
    tags: list[str] = []
    age: int = Field(ge=0, le=150)


SCHEMAS = [Person, list[Person], dict[str, int], Place, int, "a, b int?, c x|y", "[] a, b list of float"]


@pytest.mark.parametrize("said", SCHEMAS, ids=str)
def test_what_fits_a_dialect_without_notes_fits_the_schema(said) -> None:
    schema = Schema.of(said)
    schema.read(instance(schema.asked))
    for form in (schema.strict, schema.plain):
        if form is not None:
            schema.read(instance(form))
            assert json.dumps(form).count('"additionalProperties": false') == json.dumps(form).count('"properties"')


@pytest.mark.parametrize("pattern", ["^(?!x)a$", "a(?=b)", "(?<=a)b", "(?<!a)b"])
def test_a_pattern_that_looks_around_is_only_noted(pattern) -> None:
    """OpenAI refuses the whole schema for it."""
    written = said_in(OPENAI, of(a={"type": "string", "pattern": pattern}, b={"type": "string", "pattern": "(?:a)"}))
    assert written is not None
    assert written["properties"]["a"] == {"type": "string", "description": f"(pattern: {json.dumps(pattern)})"}
    assert written["properties"]["b"] == {"type": "string", "pattern": "(?:a)"}
