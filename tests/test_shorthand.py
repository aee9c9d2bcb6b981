"""A schema in short: what it comes to, and what is said of a wrong one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmkit.errors import ConfigError
from llmkit.schema import Schema
from llmkit.shorthand import MOST_FIELDS, from_short

TEXT, WHOLE = {"type": "string"}, {"type": "integer"}


def fields(text):
    return from_short(text)["properties"]


def test_names_types_lists_and_descriptions() -> None:
    assert from_short("name, age int, tags list, bio: a short bio") == {
        "type": "object",
        "properties": {
            "name": TEXT,
            "age": WHOLE,
            "tags": {"type": "array", "items": TEXT},
            "bio": {"type": "string", "description": "a short bio"},
        },
        "required": ["name", "age", "tags", "bio"],
        "additionalProperties": False,
    }


@pytest.mark.parametrize(
    "text, shape",
    [
        ("a", TEXT),
        ("a str", TEXT),
        ("a text", TEXT),
        ("a Int", WHOLE),
        ("a integer", WHOLE),
        ("a float", {"type": "number"}),
        ("a number", {"type": "number"}),
        ("a bool", {"type": "boolean"}),
        ("a list", {"type": "array", "items": TEXT}),
        ("a list of int", {"type": "array", "items": WHOLE}),
        ("a list[int]", {"type": "array", "items": WHOLE}),
        ("a list [ float ]", {"type": "array", "items": {"type": "number"}}),
        ("a list of list of int", {"type": "array", "items": {"type": "array", "items": WHOLE}}),
        ("a good|bad", {"type": "string", "enum": ["good", "bad"]}),
        ("a list of good|bad", {"type": "array", "items": {"type": "string", "enum": ["good", "bad"]}}),
    ],
)
def test_each_type(text, shape) -> None:
    assert fields(text) == {"a": shape}


@pytest.mark.parametrize("text", ["a? int", "a int?", "a int ?", "a ? int"])
def test_what_may_be_left_out_may_be_null(text) -> None:
    schema = from_short(f"b, {text}")
    assert schema["required"] == ["b"]
    assert schema["properties"]["a"] == {"type": ["integer", "null"]}
    assert Schema.of(f"b, {text}").read('{"b": "x"}') == {"b": "x"}
    assert Schema.of(f"b, {text}").read('{"b": "x", "a": null}') == {"b": "x", "a": None}


def test_words_that_may_be_left_out() -> None:
    assert fields("a good|bad?") == {"a": {"type": ["string", "null"], "enum": ["good", "bad", None]}}


def test_on_several_lines_a_description_may_have_commas() -> None:
    schema = from_short("name: first, then last\n age int, size float: in metres, as measured\n\n tags list\n")
    assert schema["required"] == ["name", "age", "size", "tags"]
    assert schema["properties"]["name"]["description"] == "first, then last"
    assert schema["properties"]["size"] == {"type": "number", "description": "in metres, as measured"}
    assert schema["properties"]["age"] == WHOLE


@pytest.mark.parametrize(
    "text", ["[] name, age int", "[]name, age int", "list of name, age int", "List of name,age int"]
)
def test_a_list_of_objects(text) -> None:
    assert from_short(text) == {"type": "array", "items": from_short("name, age int")}


@pytest.mark.parametrize("text", ["[] int", "list of int", "list[int]"])
def test_a_list_of_values(text) -> None:
    assert from_short(text) == {"type": "array", "items": WHOLE}


def test_a_comma_too_many_is_no_field() -> None:
    assert list(fields("a, , b,")) == ["a", "b"]


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "no fields"),
        (" , ", "no fields"),
        ("[]", "no fields"),
        ("name, age itn", "field 2 of the schema, 'age itn': there is no type 'itn'; did you mean int?"),
        ("name, tags lst", "did you mean list?"),
        ("a wide range", "there is no type 'wide range'"),
        ("a list of flot", "there is no type 'flot'; did you mean float?"),
        ("a, b, a int", "field 3 of the schema, 'a int': there is a field a already"),
        ("2nd int", "'2nd' cannot be the name of a field"),
        ("<script> int", "cannot be the name"),
        ("int", "that is a type and not the name of a field"),
        ("name: x\n: y", "a name is missing"),
        ("a x|x", "must be different"),
        ("a x|", "must be different"),
        (", ".join(f"f{n}" for n in range(MOST_FIELDS + 1)), "at most"),
    ],
)
def test_what_is_wrong_is_said_with_its_field_and_the_nearest_type(text, said) -> None:
    with pytest.raises(ConfigError) as raised:
        from_short(text)
    assert said in raised.value.message


@given(st.text(max_size=200))
def test_any_text_is_a_schema_or_one_clear_error(text) -> None:
    try:
        shape = from_short(text)
    except ConfigError as error:
        assert len(error.message) < 300
    else:
        assert Schema("answer", shape).strict is not None
