"""`llmkit.schema.Schema`: what it can be said in, what is refused, how an answer is read."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from datetime import date
from typing import Any

import pydantic
import pytest
from pydantic import BaseModel, Field, field_validator
from typing_extensions import TypedDict

from llmkit.call import Message
from llmkit.errors import ConfigError
from llmkit.schema import MAX_BYTES, MOST_PROBLEMS, Misfit, Schema, _compiled


class Address(BaseModel):
    city: str
    number: int = Field(ge=1)


class Person(BaseModel):
    """Somebody."""

    name: str
    age: int | None = None
    home: Address | None = None

    @field_validator("name")
    @classmethod
    def known(cls, name: str) -> str:
        if name == "nobody":
            raise ValueError("nobody is not known")
        if name == "bug":
            raise RuntimeError("a bug of the user's own")
        return name


OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def problems(schema: Schema, text: str) -> tuple[str, ...]:
    with pytest.raises(Misfit) as raised:
        schema.read(text)
    return raised.value.problems


# -- what it is said in ------------------------------------------------------------------------------------------------


def test_a_pydantic_class_gives_instances() -> None:
    schema = Schema.of(Person)
    assert schema.name == "Person"
    assert not schema.is_wrapped
    assert schema.read('{"name": "Ana", "home": {"city": "x", "number": 2}}') == Person(
        name="Ana", home=Address(city="x", number=2)
    )
    assert "Somebody" in schema.instruction
    assert '"title":"Name"' not in schema.instruction


def test_a_list_of_a_class_is_wrapped_and_unwrapped() -> None:
    schema = Schema.of(list[Person])
    assert schema.asked["required"] == ["items"]
    ana = [Person(name="Ana")]
    assert schema.read('{"items": [{"name": "Ana"}]}') == ana
    assert schema.read('[{"name": "Ana"}]') == ana
    assert schema.read('Here:\n```json\n[{"name": "Ana"}]\n```') == ana


def test_dataclasses_and_typed_dicts() -> None:
    @dataclasses.dataclass
    class Point:
        x: float
        on: date

    class Named(TypedDict):
        name: str

    assert Schema.of(Point).read('{"x": 1, "on": "2026-01-02"}') == Point(1.0, date(2026, 1, 2))
    assert Schema.of(Named).read('{"name": "x"}') == {"name": "x"}


def test_a_json_schema_gives_plain_values() -> None:
    for said in (OBJECT, json.dumps(OBJECT), f"  {json.dumps(OBJECT, indent=1)}\n"):
        schema = Schema.of(said)
        assert schema.name == "answer"
        assert schema.read('{"a": 1, "b": 2}') == {"a": 1, "b": 2}
    assert Schema.of({**OBJECT, "title": "My thing!"}).name == "My_thing"
    assert Schema.of({"name": "x", "schema": OBJECT, "strict": True}).shape == OBJECT
    assert Schema.of({"properties": {"a": {"type": "integer"}}}).shape["type"] == "object"


def test_a_file(tmp_path, monkeypatch) -> None:
    (tmp_path / "thing.json").write_text(json.dumps(OBJECT), "utf-8")
    monkeypatch.chdir(tmp_path)
    assert Schema.of("thing.json").shape == OBJECT
    (tmp_path / "marked.json").write_text(json.dumps(OBJECT), "utf-8-sig")  # as some editors of Windows write it
    assert Schema.of("marked.json").shape == OBJECT
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "large.json").write_text(" " * (4 * MAX_BYTES + 1), "utf-8")
    (tmp_path / "odd.json").write_bytes(b"\xff\xfe{")
    for name, said in [
        ("none.json", "there is no file none.json"),
        ("pipe.json", "pipe.json is no file"),
        ("large.json", "too large"),
        ("odd.json", "cannot be read"),
        ("..json", "there is no file"),
    ]:
        with pytest.raises(ConfigError, match=said):
            Schema.of(name)


def test_the_short_form() -> None:
    assert Schema.of("name, age int").read('{"name": "Ana", "age": 3}') == {"name": "Ana", "age": 3}
    assert Schema.of("[] name").read('{"items": [{"name": "Ana"}]}') == [{"name": "Ana"}]


def test_one_that_is_made_already_is_itself_and_what_it_was_made_of_may_change_later() -> None:
    said = {"type": "object", "properties": {"a": {"type": "integer"}}}
    schema = Schema.of(said)
    assert Schema.of(schema) is schema
    said["properties"]["b"] = {"type": "string"}
    assert "b" not in schema.shape["properties"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        schema.name = "x"


deep: dict[str, Any] = {"type": "string"}
for _ in range(80):
    deep = {"type": "object", "properties": {"a": deep}}


@pytest.mark.parametrize(
    "said, message",
    [
        (5, "not a int"),
        (None, "not a NoneType"),
        (b"name", "not a bytes"),
        ([OBJECT], "not a list"),
        (Person(name="x"), "give the class Person itself"),
        ({}, "neither type nor properties"),
        ({"tpye": "object"}, "did you mean type?"),
        ({"name": "str"}, "neither type nor properties"),
        ({"type": "objekt"}, "wrong at type"),
        ({"type": "object", "properties": {"a": {"pattern": "(x"}}}, "properties/a/pattern"),
        ({"type": "object", "properties": {"a": {"enum": {1, 2}}}}, "cannot be written as JSON"),
        ({"type": "number", "minimum": float("nan")}, "cannot be written as JSON"),
        ({"$ref": "https://example.invalid/person.json"}, "nothing is ever fetched"),
        ({"type": "array", "items": {"$ref": "person.json"}}, "nothing is ever fetched"),
        ({"$schema": "https://example.invalid/meta", "type": "object"}, "meta"),
        ({"$ref": "#/$defs/none"}, "does not exist"),
        ({"type": "string", "description": "x" * MAX_BYTES}, "bytes of JSON"),
        (deep, "nested deeper"),
        ('{"type": "object"', "not JSON"),
        ("{" * 100_000, "not JSON"),
        ("name, age itn", "did you mean int?"),
        (lambda: None, "not a function"),
    ],
)
def test_what_is_no_schema_is_an_error_before_anything_is_sent(said, message) -> None:
    with pytest.raises(ConfigError) as raised:
        Schema.of(said)
    assert message in raised.value.message
    assert len(raised.value.block()) < 1000


def test_nothing_is_fetched_even_where_a_reference_gets_past_the_first_look() -> None:
    with pytest.raises(ConfigError, match="is not fetched"):
        _compiled({"$ref": "http://127.0.0.1:9/person.json"})


def test_a_class_that_pydantic_cannot_read() -> None:
    class Odd:
        x: Any

        def __init__(self, x):
            self.x = x

    class Bare(BaseModel, arbitrary_types_allowed=True):
        odd: Odd

    with pytest.raises(ConfigError, match="Bare has no JSON schema"):
        Schema.of(Bare)


def test_without_pydantic_classes_are_refused_and_the_rest_works() -> None:
    program = """
import sys
sys.modules["pydantic"] = None
from llmkit.errors import ConfigError
from llmkit.schema import Schema
assert Schema.of("a int").read('{"a": 1}') == {"a": 1}
try:
    Schema.of(list[int])
except ConfigError as error:
    print(error.next_step)
"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "pip install pydantic" in said


def test_pydantic_is_imported_only_for_classes() -> None:
    program = "import sys; from llmkit.schema import Schema; Schema.of('a int').read('{\"a\": 1}'); print('pydantic' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "False\n"
    )


# -- how an answer is read ---------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_said_by_its_place() -> None:
    schema = Schema.of("name, age int, tags list of int")
    assert problems(schema, '{"name": 1, "tags": [1, "x"], "more": 1}') == (
        '"age" is a required property',
        'name: 1 is not of type "string"',
        'tags.1: "x" is not of type "integer"',
        "Additional properties are not allowed ('more' was unexpected)",
    )
    person = Schema.of(Person)
    assert problems(person, '{"name": 1, "home": {"number": 0}}') == (
        "name: Input should be a valid string",
        "home.city: Field required",
        "home.number: Input should be greater than or equal to 1",
    )
    assert problems(person, '{"name": "nobody"}') == ("name: Value error, nobody is not known",)
    assert problems(person, '{"name": "bug"}') == (
        "the class's own check failed: RuntimeError: a bug of the user's own",
    )
    assert problems(person, "hello") == ("the answer is not JSON: there is none in the text",)


def test_problems_are_few_short_and_of_plain_characters() -> None:
    schema = Schema.of("tags list of int")
    found = problems(schema, json.dumps({"tags": ["\x1b[31m" + "x" * 10_000] * 1000}))
    assert len(found) == MOST_PROBLEMS
    assert all(len(each) <= 200 and each.isprintable() for each in found)


def test_a_key_in_an_answer_is_not_told() -> None:
    assert "sk-" not in problems(Schema.of("a int"), '{"a": "sk-proj-key-of-nobody-at-all-0123456789"}')[0]


def test_a_pattern_comes_to_an_end_whatever_it_is_given() -> None:
    schema = Schema.of({"type": "object", "properties": {"a": {"type": "string", "pattern": "^(?:(?=a)a+)+$"}}})
    assert schema.read('{"a": "aaa"}') == {"a": "aaa"}
    assert "Max limit for backtracking" in problems(schema, json.dumps({"a": "a" * 5000 + "!"}))[0]


def test_formats_are_checked() -> None:
    schema = Schema.of({"type": "object", "properties": {"on": {"type": "string", "format": "date"}}})
    assert schema.read('{"on": "2026-01-02"}') == {"on": "2026-01-02"}
    assert problems(schema, '{"on": "tomorrow"}') == ('on: "tomorrow" is not a "date"',)


def test_a_schema_that_goes_round_in_circles_comes_to_an_end() -> None:
    schema = Schema.of({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}})
    assert schema.read('{"value": 1}') == 1


def test_an_answer_that_is_nested_too_deep() -> None:
    schema = Schema.of({"$ref": "#/$defs/n", "$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}}}})
    assert "nested" in problems(schema, "[" * 5000 + "]" * 5000)[0]


def test_numbers_that_are_out_of_bounds_are_a_problem_and_no_crash() -> None:
    schema = Schema.of("a int")
    assert schema.read('{"a": 123456789012345678901234567890}') == {"a": 123456789012345678901234567890}
    assert "too large" in problems(schema, '{"a": 1e400}')[0]


# -- how it is asked for -----------------------------------------------------------------------------------------------


def test_the_instruction_goes_into_the_system_message() -> None:
    schema = Schema.of("a")
    user = Message("user", "hi")
    assert schema.instructed((user,)) == (Message("system", schema.instruction), user)
    first, second = schema.instructed((Message("system", "Be brief."), user))
    assert first == Message("system", f"Be brief.\n\n{schema.instruction}")
    assert second is user
    parts = [{"type": "text", "text": "Be brief."}]
    assert schema.instructed((Message("developer", parts), user))[0].text == f"Be brief.\n{schema.instruction}"
    assert len(parts) == 1


def test_the_key_tells_schemas_apart_and_the_order_of_fields() -> None:
    said = ["a", "b", "a, b", "b, a", "a int", "a?", "a: x", "[] a", {"title": "T", **Schema.of("a").shape}]
    assert len({Schema.of(each).key for each in said}) == len(said)
    assert Schema.of("a, b").key == Schema.of("a,b str").key


def test_the_bound_holds_every_form() -> None:
    for said in (
        "a, b int?, c x|y: of these",
        Person,
        list[Person],
        {"type": "array", "items": {"type": "object", "minProperties": 1}},
    ):
        schema = Schema.of(said)
        for form in (schema.instruction, schema.strict, schema.plain, schema.asked):
            text = form if isinstance(form, str) else json.dumps(form, separators=(",", ":"), ensure_ascii=False)
            assert len(schema.bound) >= len(text) + len(schema.name)


def test_pydantic_1_classes_are_refused() -> None:
    if sys.version_info >= (3, 14):
        pytest.skip("pydantic.v1 does not support it")
    from pydantic.v1 import BaseModel as Old

    class Thing(Old):
        a: int

    with pytest.raises(ConfigError, match="Thing"):
        Schema.of(Thing)
    assert pydantic.VERSION.startswith("2")
