"""``--schema``: variables, the short form, what is shown and bound, what is refused before anything is sent."""

from __future__ import annotations

import json
import threading

import pytest
from pydantic import BaseModel

from llmkit.errors import ConfigError, SchemaMismatch
from llmkit.events import Checking
from llmkit.notebook.asking import Interrupted, Progress
from llmkit.notebook.schemas import schema_of
from llmkit.schema import Schema
from tests.notebook.server import Gone, said
from tests.notebook.test_magics import interrupt_at, run

GOOD = '{"name": "Ana", "age": 3}'
CLASS = """
from pydantic import BaseModel
class Person(BaseModel):
    name: str
    age: int
"""


class Person(BaseModel):
    name: str
    age: int


class Models:
    short = "name, age int"


# -- what it means -----------------------------------------------------------------------------------------------------


def test_a_variable_comes_first_and_the_last_mapping_wins() -> None:
    outer, inner = {"thing": "a", "other": "b"}, {"thing": "c"}
    assert list(schema_of("thing", (outer, inner)).shape["properties"]) == ["c"]
    assert list(schema_of(" other ", (outer, inner)).shape["properties"]) == ["b"]
    assert list(schema_of("models.short", ({"models": Models},)).shape["properties"]) == ["name", "age"]
    made = Schema.of("x")
    assert schema_of("made", ({"made": made},)) is made
    assert schema_of("thing", ({"thing": {"type": "array", "items": {}}},)).is_wrapped


def test_a_list_of_a_variable() -> None:
    names = {"Person": Person}
    assert [person.name for person in schema_of("list[Person]", (names,)).read(f"[{GOOD}]")] == ["Ana"]
    assert schema_of("list[int]", (names,)).read("[1]") == [1]


def test_what_is_no_variable_is_the_short_form() -> None:
    assert list(schema_of("name, age int", ({"name": "Ana"},)).shape["properties"]) == ["name", "age"]
    assert list(schema_of("name str", ({"name": "Ana"},)).shape["properties"]) == ["name"]
    assert list(schema_of("mood", ({"name": "Ana"},)).shape["properties"]) == ["mood"]
    assert schema_of('{"type": "array"}', ()).is_wrapped


def test_a_file(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "person.json").write_text(json.dumps(Schema.of("name").shape), "utf-8")
    assert list(schema_of("person.json", ({"person": 1},)).shape["properties"]) == ["name"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("Persn", "there is no such variable; did you mean Person?"),
        ("persn", "there is no such variable; did you mean person?"),
        ("Thing", "there is no such variable"),
        ("other.Thing", "there is no such variable"),
        ("models.none", "it has no none"),
        ("name, age itn", "did you mean int?"),
        ("number", "not a int"),
        ("list[number]", "no JSON schema"),
        ("", "no fields"),
    ],
)
def test_what_means_nothing_is_said(text, message) -> None:
    names = {"number": 5, "models": Models, "person": {"type": "object"}, "Person": Person}
    with pytest.raises(ConfigError) as raised:
        schema_of(text, (names,))
    assert message in raised.value.message


# -- in a cell ---------------------------------------------------------------------------------------------------------


def test_a_class_gives_an_instance_in_the_variable(shell, server) -> None:
    run(shell, CLASS)
    server.next(said(GOOD))
    shown = run(shell, "%%llm people << --schema Person\nwho?")
    assert shown.error is None
    people = shell.user_ns["people"]
    assert people.data == shell.user_ns["Person"](name="Ana", age=3)
    assert shell.user_ns["_"] is people
    described = server.requests[-1]["response_format"]["json_schema"]
    assert (described["name"], described["strict"]) == ("Person", True)


def test_the_short_form_is_shown_as_json(shell, server) -> None:
    server.next(said("Here you are:\n", f"```json\n{GOOD}\n```"))
    shown = run(shell, "%%llm ana << --schema 'name, age int' --no-stream\nwho?")
    assert shown.error is None
    assert shell.user_ns["ana"].data == {"name": "Ana", "age": 3}
    told = "".join(str(output.data) for output in shown.outputs) + shown.stdout
    assert '"name": "Ana"' in told
    assert "Here you are" not in told


def test_a_wrong_schema_sends_nothing(shell, server) -> None:
    for line, message in [("--schema Persn", "no such variable"), ("--schema 'a itn'", "did you mean int?")]:
        shown = run(shell, f"%%llm {line}\nwho?")
        assert isinstance(shown.error, ConfigError)
        assert message in shown.error.message
    assert not server.requests


def test_what_does_not_fit_twice_fails_the_cell_and_keeps_the_text(shell, server) -> None:
    server.next(said("no"), said('{"name": 1}'))
    shown = run(shell, "%%llm x << --schema 'name'\nwho?")
    assert isinstance(shown.error, SchemaMismatch)
    assert shell.user_ns["x"].text == '{"name": 1}'
    assert 'name: 1 is not of type "string"' in shown.error.block()
    assert len(server.requests) == 2


def test_a_repair_is_said_below_the_answer(shell, server) -> None:
    server.next(said("no"), said('{"name": "Ana"}'))
    shown = run(shell, "%%llm x << --schema 'name'\nwho?")
    assert shown.error is None
    assert shell.user_ns["x"].data == {"name": "Ana"}
    told = "".join(str(output.data) for output in shown.outputs) + shown.stdout
    assert "asked again to fit its schema" in told
    assert "retry" not in told


def test_an_interrupt_keeps_what_had_arrived_of_an_answer_still_to_be_checked(shell, server, monkeypatch) -> None:
    gone, seen, hear = Gone(), threading.Event(), Progress.hear

    def heard(progress, news) -> None:
        hear(progress, news)
        if isinstance(news, Checking):
            seen.set()

    monkeypatch.setattr(Progress, "hear", heard)
    server.next(said('{"name": ', gone))
    interrupt_at(seen)
    shown = run(shell, "%%llm x << --schema 'name'\nwho?")
    assert isinstance(shown.result.error_in_exec, Interrupted)
    assert shell.user_ns["x"].text == '{"name": '
    assert gone.left.wait(30)


@pytest.mark.parametrize("text", ["list[Person|Other]", "Person | Other", "Optional[Person]", "dict[str, int]"])
def test_an_annotation_is_not_read_as_words(text) -> None:
    """`list[Person|Other]` in short would be a list of the words Person and Other, and paid for."""
    with pytest.raises(ConfigError) as raised:
        schema_of(text, ({"Person": Person, "Other": type("Other", (BaseModel,), {})},))
    assert raised.value.next_step == f"a variable can hold it: Answer = {text}; then --schema Answer"
    assert schema_of("list[good|bad]", ({"Person": Person},)).read('["good"]') == ["good"]
    assert schema_of("answer", ({"answer": Person | None},)).read("null") is None
