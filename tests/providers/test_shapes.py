"""A schema on the wire: in each format, where it is not taken, and where a server says so itself."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

import llmkit
from llmkit.call import Params
from llmkit.errors import ContextTooLong, InvalidRequest, ProviderOverloaded
from llmkit.providers.anthropic import AnthropicWire
from llmkit.providers.catalog import CATALOG
from llmkit.providers.openai import OpenAIWire
from llmkit.providers.shapes import Shapes
from llmkit.schema import Schema
from llmkit.testing import Fault, Simulator
from tests.providers.loopback import call, endpoint

FIELDS = Schema.of("name, age int?")
LOOSE = Schema.of(
    {"type": "object", "properties": {"a": {"type": "object", "additionalProperties": {"type": "integer"}}}}
)
STRICT = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": ["integer", "null"]}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
GOOD = '{"name": "Ana", "age": 3}'


def openai(schema: Schema, *quirks: str, **options: Any) -> dict[str, Any]:
    to = endpoint(quirks=frozenset(quirks))
    return OpenAIWire().body(call(to, **options).to(schema=schema), to)


def anthropic(schema: Schema, *quirks: str, **options: Any) -> dict[str, Any]:
    to = endpoint("anthropic", quirks=frozenset(quirks))
    return AnthropicWire().body(call(to, **options).to(schema=schema), to)


# -- each format -------------------------------------------------------------------------------------------------------


def test_openai_is_told_a_strict_schema_where_it_can_be_one() -> None:
    body = openai(FIELDS)
    described = {"name": "answer", "schema": STRICT, "strict": True}
    assert body["response_format"] == {"type": "json_schema", "json_schema": described}
    assert body["messages"] == [{"role": "user", "content": "hi"}]


def test_openai_is_told_one_that_is_not_strict_as_it_is() -> None:
    described = {"name": "answer", "schema": LOOSE.shape, "strict": False}
    assert openai(LOOSE)["response_format"] == {"type": "json_schema", "json_schema": described}


def test_a_server_that_enforces_all_is_told_all() -> None:
    described = openai(FIELDS, "any_json_schema")["response_format"]["json_schema"]
    assert described == {"name": "answer", "schema": FIELDS.shape, "strict": False}


def test_what_takes_no_schema_is_asked_in_words_and_for_json() -> None:
    body = openai(FIELDS, "no_json_schema", system="Be brief.")
    assert body["response_format"] == {"type": "json_object"}
    assert body["messages"][0] == {"role": "system", "content": f"Be brief.\n\n{FIELDS.instruction}"}
    assert len(body["messages"]) == 2


def test_what_takes_neither_is_asked_in_words() -> None:
    body = openai(FIELDS, "no_json_schema", "no_json_object")
    assert "response_format" not in body
    assert body["messages"][0] == {"role": "system", "content": FIELDS.instruction}


def test_anthropic_is_told_a_schema_beside_what_else_is_set_there() -> None:
    body = anthropic(FIELDS)
    assert body["output_config"] == {"format": {"type": "json_schema", "schema": STRICT}}
    assert "system" not in body
    effort = Params(extra={"output_config": {"effort": "low"}})
    assert anthropic(FIELDS, params=effort)["output_config"] == {
        "effort": "low",
        "format": {"type": "json_schema", "schema": STRICT},
    }


@pytest.mark.parametrize("schema, quirks", [(LOOSE, ()), (FIELDS, ("no_json_schema",))])
def test_anthropic_is_told_in_words_what_it_does_not_take(schema, quirks) -> None:
    body = anthropic(schema, *quirks, system="Be brief.")
    assert "output_config" not in body
    assert body["system"] == f"Be brief.\n\n{schema.instruction}"


def test_without_a_schema_nothing_changes() -> None:
    assert "response_format" not in openai(None)
    assert anthropic(None).keys() == {"model", "max_tokens", "messages"}


def test_services_that_are_known_not_to_take_one() -> None:
    assert "no_json_schema" in CATALOG["deepseek"].quirks
    assert {"no_json_schema", "no_json_object"} <= CATALOG["transformers"].quirks
    assert "no_json_schema" not in CATALOG["openai"].quirks | CATALOG["vllm"].quirks | CATALOG["anthropic"].quirks


# -- a server that refuses it ------------------------------------------------------------------------------------------

OPENAI_REFUSALS = [
    ("Unrecognized request argument supplied: response_format", "words"),
    ("This response_format type is unavailable now", "words"),
    ("response_format: response_format.type `json_schema` is unavailable now at line 1 column 12440", "json"),
    ("response_format: Extra inputs are not permitted", "words"),
    ("This model does not support response format `json_schema`. response_format is json_object", "json"),
    ("Invalid parameter: 'response_format' of type 'json_schema' is not supported with this model", "json"),
    ("Invalid schema for response_format 'answer': In context=(), 'format' is not permitted", "json"),
    ("Invalid JSON payload received. Unknown name \"$defs\" at 'generation_config.response_schema'", "json"),
    ("Failed to generate JSON. Please adjust your prompt. See 'failed_generation' for more details.", "words"),
    ("The provided JSON schema contains features not supported by xgrammar", "json"),
    ("Schema is too complex for compilation. Try simplifying it.", "json"),
    ("Schemas contains too many optional parameters (30)", "json"),
]


def client_of(simulator: Simulator, wire: str = "openai", **settings: Any) -> llmkit.AsyncClient:
    own = {"base_url": "http://127.0.0.1:9/v1", "wire": wire}
    return llmkit.AsyncClient(transport=simulator, model="own:m", providers={"own": own}, **settings)


def bodies(simulator: Simulator) -> list[dict[str, Any]]:
    return [received.body for received in simulator.requests]


@pytest.mark.parametrize("message, form", OPENAI_REFUSALS)
def test_a_refusal_that_names_it_is_asked_again_in_other_words_and_remembered(message, form) -> None:
    simulator = Simulator(answer=GOOD)
    simulator.fail(Fault.status(400, message=message))

    async def main() -> None:
        async with client_of(simulator) as client:
            reply = await client.complete("who?", schema=FIELDS)
            assert reply.data == {"name": "Ana", "age": 3}
            assert [attempt.http_status for attempt in reply.attempts] == [400, 200]
            assert reply.cost_usd in (0, None)
            again = await client.complete("who else?", schema=FIELDS)
            assert len(again.attempts) == 1
            other = await client.complete("who?", schema="name, age int")  # another schema may be one that it takes
            assert len(other.attempts) == 1

    asyncio.run(main())
    first, second, third, fourth = bodies(simulator)
    assert first["response_format"]["type"] == fourth["response_format"]["type"] == "json_schema"
    for body in (second, third):
        assert body.get("response_format") == ({"type": "json_object"} if form == "json" else None)
        assert body["messages"][0]["content"] == FIELDS.instruction


def test_a_server_that_takes_json_only_in_words_is_found_out_in_two_steps() -> None:
    simulator = Simulator(answer=GOOD)
    simulator.fail(Fault.status(422, message="json_schema is not supported in response_format"))
    simulator.fail(Fault.status(422, message="response_format json_object is not supported"))

    async def main() -> None:
        async with client_of(simulator) as client:
            assert (await client.complete("who?", schema=FIELDS)).data["name"] == "Ana"

    asyncio.run(main())
    assert [body.get("response_format", {}).get("type") for body in bodies(simulator)] == [
        "json_schema",
        "json_object",
        None,
    ]


def test_one_that_refuses_it_for_ever_is_asked_no_more_than_that() -> None:
    simulator = Simulator()
    simulator.fail(Fault.status(400, message="response_format is not supported"), times=None)

    async def main() -> None:
        async with client_of(simulator) as client:
            with pytest.raises(InvalidRequest) as raised:
                await client.complete("who?", schema=FIELDS)
            assert not raised.value.retryable

    asyncio.run(main())
    assert len(bodies(simulator)) == 2


def test_anthropics_refusal_is_asked_again_in_words() -> None:
    simulator = Simulator(answer=GOOD)
    simulator.fail(Fault.status(400, message="output_config.format: Extra inputs are not permitted"))

    async def main() -> None:
        async with client_of(simulator, "anthropic") as client:
            reply = await client.complete("who?", schema=FIELDS)
            assert reply.data == {"name": "Ana", "age": 3}

    asyncio.run(main())
    first, second = bodies(simulator)
    assert "output_config" in first
    assert "output_config" not in second
    assert second["system"] == FIELDS.instruction


def test_any_other_refusal_stays_one() -> None:
    simulator = Simulator()
    simulator.fail(Fault.status(400, message="temperature is not supported with this model"))

    async def main() -> None:
        async with client_of(simulator) as client:
            with pytest.raises(InvalidRequest, match="temperature"):
                await client.complete("who?", schema=FIELDS)

    asyncio.run(main())
    assert len(bodies(simulator)) == 1


def test_a_refusal_of_a_call_without_a_schema_is_not_touched() -> None:
    simulator = Simulator()
    simulator.fail(Fault.status(400, message="response_format is not supported"))

    async def main() -> None:
        async with client_of(simulator) as client:
            with pytest.raises(InvalidRequest):
                await client.complete("who?", extra={"response_format": {"type": "json_object"}})

    asyncio.run(main())
    assert len(bodies(simulator)) == 1


def test_without_retries_the_next_call_is_asked_in_words() -> None:
    simulator = Simulator(answer=GOOD)
    simulator.fail(Fault.status(400, message="response_format is not supported"))

    async def main() -> None:
        async with client_of(simulator, retry={"attempts": 1}) as client:
            with pytest.raises(InvalidRequest) as raised:
                await client.complete("who?", schema=FIELDS)
            assert "run it again" in raised.value.next_step
            assert (await client.complete("who?", schema=FIELDS)).data["name"] == "Ana"

    asyncio.run(main())


def test_what_is_learned_does_not_change_the_key_of_an_answer() -> None:
    simulator = Simulator(answer=GOOD)
    simulator.fail(Fault.status(400, message="response_format is not supported"))

    async def main() -> None:
        async with client_of(simulator) as client:
            await client.complete("who?", schema=FIELDS)
            assert (await client.complete("who?", schema=FIELDS)).source == "cache"

    asyncio.run(main())


def test_only_what_refuses_the_request_is_heard() -> None:
    shapes, to = Shapes(), endpoint()
    asked = call(to).to(schema=FIELDS)
    for error in (
        ProviderOverloaded("response_format"),
        ContextTooLong("json_schema", tokens=1, window=1),
        ValueError("grammar"),
    ):
        shapes.hear(asked, to, error)
    assert shapes.seen(asked, to) is to
    shapes.hear(asked, to, InvalidRequest("json_schema"))
    assert shapes.seen(asked, to).quirks == {"no_json_schema"}
    assert shapes.seen(asked.to(schema=LOOSE), to) is to
    assert shapes.seen(asked.to(schema=None), to) is to


def test_what_is_remembered_is_bounded() -> None:
    shapes, to = Shapes(), endpoint()
    for number in range(1100):
        asked = call(to).to(schema=Schema.of(f"f{number}"))
        shapes.hear(asked, to, InvalidRequest("json_schema"))
        assert shapes.seen(asked, to).quirks
    assert len(shapes._learned) <= 512


# -- the simulator -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wire", ["openai", "anthropic"])
@pytest.mark.parametrize("stream", [False, True])
def test_the_simulator_answers_in_the_shape_in_both_formats(wire, stream) -> None:
    simulator = Simulator()
    said = "name, age int, mood good|bad, tags list of int, note?"

    async def main() -> None:
        async with client_of(simulator, wire) as client:
            if stream:
                async with client.stream("x", schema=said) as reply:
                    text = "".join([chunk.text async for chunk in reply])
            else:
                reply = await client.complete("x", schema=said)
                text = reply.text
            assert reply.data == json.loads(text)
            assert reply.data["mood"] == "good"
            assert len(reply.attempts) == 1

    asyncio.run(main())
