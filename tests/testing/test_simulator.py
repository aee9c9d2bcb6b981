"""The simulator as a good service: formats, limits, determinism, books."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.models.tokens import simulated_tokens
from llmkit.reply import Usage
from llmkit.testing import FakeClock, Fault, Simulator
from llmkit.testing.answers import pieces, thoughts
from llmkit.testing.instances import instance
from tests.testing.asking import BOTH, PROMPT, ask, blocks, connected, events, request, streamed, text_of


def run(scenario, simulator, **options):
    async def main():
        async with connected(simulator, **options) as client:
            return await scenario(client)

    return asyncio.run(main())


@pytest.mark.parametrize("socket", [False, True], ids=["in process", "over a socket"])
class TestFormats:
    def test_openai_whole(self, socket) -> None:
        simulator = Simulator(answer="Hello, dear world!")
        response = run(ask, simulator, socket=socket)
        assert response.status_code == 200
        assert response.headers["content-type"] == "application/json"
        assert response.headers["x-request-id"] == "req_sim_000001"
        document = response.json()
        assert document["object"] == "chat.completion"
        assert document["model"] == "m"
        assert document["choices"] == [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello, dear world!", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ]
        assert document["usage"]["prompt_tokens"] == simulated_tokens(PROMPT)
        assert document["usage"]["completion_tokens"] == 3
        assert document["usage"]["total_tokens"] == simulated_tokens(PROMPT) + 3

    def test_openai_streamed(self, socket) -> None:
        simulator = Simulator(answer="Hello, dear world!")
        found, error = run(blocks, simulator, socket=socket)
        assert error is None
        *chunks, done = events(found)
        assert done == "[DONE]"
        assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
        assert len({chunk["id"] for chunk in chunks}) == 1
        assert [chunk["choices"][0]["delta"].get("content") for chunk in chunks[:-1]] == [
            "",
            "Hello,",
            " dear",
            " world!",
            None,
        ]
        assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * 5
        assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"]["completion_tokens"] == 3

    def test_anthropic_whole(self, socket) -> None:
        simulator = Simulator(answer="Hello, dear world!", cached_tokens=2)
        response = run(lambda client: ask(client, "anthropic", system="Be brief."), simulator, socket=socket)
        assert response.status_code == 200
        assert response.headers["request-id"] == "req_sim_000001"
        document = response.json()
        assert document["type"] == "message"
        assert document["role"] == "assistant"
        assert document["content"] == [{"type": "text", "text": "Hello, dear world!"}]
        assert document["stop_reason"] == "end_turn"
        assert document["usage"] == {
            "input_tokens": simulated_tokens(PROMPT) + 2 - 2,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 2,
            "output_tokens": 3,
            "output_tokens_details": {"thinking_tokens": 0},
        }

    def test_anthropic_streamed(self, socket) -> None:
        simulator = Simulator(answer="Hello, dear world!")
        found, error = run(lambda client: blocks(client, "anthropic"), simulator, socket=socket)
        assert error is None
        happened = events(found)
        assert [event["type"] for event in happened] == [
            "message_start",
            "ping",
            "content_block_start",
            "content_block_delta",
            "content_block_delta",
            "content_block_delta",
            "content_block_stop",
            "message_delta",
            "message_stop",
        ]
        assert b"".join(found).startswith(b"event: message_start\ndata: {")
        assert happened[0]["message"]["usage"]["input_tokens"] == simulated_tokens(PROMPT)
        assert happened[0]["message"]["usage"]["output_tokens"] == 1
        assert streamed("anthropic", happened) == "Hello, dear world!"
        assert happened[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
        assert happened[-2]["usage"]["output_tokens"] == 3

    def test_what_is_no_call(self, socket) -> None:
        simulator = Simulator(models=("small", "large"), window=100)

        async def scenario(client):
            models = (await client.get("/models")).json()
            theirs = (await client.get("/models", headers={"anthropic-version": "2023-06-01"})).json()
            counted = await client.post("/messages/count_tokens", json=request("anthropic", model="small"))
            bad = await client.post("/messages/count_tokens", json=[])
            missing, wrong = await client.get("/nothing"), await client.get("/chat/completions")
            return models, theirs, counted, bad, missing, wrong

        models, theirs, counted, bad, missing, wrong = run(scenario, simulator, socket=socket)
        assert [(model["id"], model["max_model_len"]) for model in models["data"]] == [("small", 100), ("large", 100)]
        assert [model["id"] for model in theirs["data"]] == ["small", "large"]
        assert counted.json() == {"input_tokens": simulated_tokens(PROMPT)}
        assert [each.status_code for each in (bad, missing, wrong)] == [400, 404, 405]
        assert "Unknown URL" in missing.json()["error"]["message"]
        assert simulator.calls == 0
        assert simulator.billed == Usage()
        assert len(simulator.requests) == 6

    def test_keep_alive_and_many_at_once(self, socket) -> None:
        simulator = Simulator()

        async def scenario(client):
            return await asyncio.gather(*(ask(client, prompt=f"number {number}") for number in range(50)))

        replies = run(scenario, simulator, socket=socket)
        assert len({reply.content for reply in replies}) == 50
        assert (simulator.calls, simulator.open) == (50, 0)


class TestAnswers:
    def answer(self, simulator=None, wire="openai", **fields):
        return run(lambda client: ask(client, wire, **fields), simulator or Simulator())

    def text(self, simulator=None, **fields):
        return text_of("openai", self.answer(simulator, **fields).json())

    def test_the_same_request_gets_the_same_bytes(self) -> None:
        for wire in BOTH:
            assert self.answer(wire=wire).content == self.answer(wire=wire).content
            stream = [run(lambda client, wire=wire: blocks(client, wire), Simulator())[0] for _ in range(2)]
            assert stream[0] == stream[1]
            whole = text_of(wire, self.answer(wire=wire).json())
            assert streamed(wire, events(stream[0])) == whole

    @pytest.mark.parametrize(
        "change",
        [{"prompt": "Another one."}, {"model": "n"}, {"seed": 1}, {"temperature": 0.3}, {"top_p": 0.5}],
        ids=str,
    )
    def test_what_changes_the_answer(self, change) -> None:
        assert self.text(**change) != self.text()

    def test_the_simulators_own_seed_changes_it_too(self) -> None:
        assert self.text(Simulator(seed=1)) != self.text(Simulator(seed=2))

    def test_limits_do_not_change_its_words(self) -> None:
        assert self.text().startswith(self.text(max_tokens=5))

    def test_it_says_what_it_is_in_markdown(self) -> None:
        for seed in range(10):
            text = self.text(seed=seed)
            assert "simulated" in text.split("\n")[0].lower()
            assert f"> {PROMPT}" in text
            assert "**" in text
            assert "\n- " in text

    def test_what_it_quotes_is_short_and_harmless(self) -> None:
        prompt = "<script>alert(1)</script> [x](javascript:y) `$\\def$` *a* _b_ |c| \x1b[31m\u202e " + "long " * 5000
        text = self.text(prompt=prompt)
        assert len(text) < 1000
        quote = next(line for line in text.split("\n") if line.startswith("> "))
        assert not set("<`$[]\\*_|\x1b\u202e") & set(quote)
        assert self.text(prompt="").count("(an empty prompt)") == 1

    def test_odd_strings_get_an_answer(self) -> None:
        simulator = Simulator()

        async def scenario(client):
            body = '{"model": "\\ud800", "messages": [{"role": "user", "content": "\\udfff \\u0000 \\ud83d"}]}'
            return await client.post("/chat/completions", content=body)

        response = run(scenario, simulator)
        assert response.status_code == 200
        assert response.json()["model"] == "?"
        assert "\N{REPLACEMENT CHARACTER}" in text_of("openai", response.json())

    def test_own_answers(self) -> None:
        assert self.text(Simulator(answer="No.")) == "No."
        assert self.text(Simulator(answer=lambda body: f"You use {body['model']}.")) == "You use m."
        with pytest.raises(TypeError, match="gave int, not text"):
            self.text(Simulator(answer=lambda _body: 3))
        assert self.answer(Simulator(answer="")).json()["usage"]["completion_tokens"] == 0

    def test_the_prompt_is_the_last_of_the_user(self) -> None:
        messages = [
            {"role": "system", "content": "You are brief."},
            {"role": "user", "content": "first"},
            {"role": "assistant", "content": "answer"},
            {
                "role": "user",
                "content": [{"type": "text", "text": "look here"}, {"type": "input_audio", "input_audio": {}}],
            },
        ]
        response = self.answer(messages=messages).json()
        assert "> look here" in text_of("openai", response)
        assert response["usage"]["prompt_tokens"] == 3 + 1 + 1 + 2

    @pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
    def test_openais_limits(self, limit) -> None:
        document = self.answer(Simulator(answer="one two three four"), **{limit: 2}).json()
        assert text_of("openai", document) == "one two"
        assert document["choices"][0]["finish_reason"] == "length"
        assert document["usage"]["completion_tokens"] == 2

    def test_anthropics_limit(self) -> None:
        document = self.answer(Simulator(answer="one two three four"), "anthropic", max_tokens=2).json()
        assert (text_of("anthropic", document), document["stop_reason"]) == ("one two", "max_tokens")

    def test_a_limit_that_just_fits_is_no_limit(self) -> None:
        document = self.answer(Simulator(answer="one two"), max_tokens=2).json()
        assert document["choices"][0]["finish_reason"] == "stop"

    def test_stop_sequences(self) -> None:
        simulator = Simulator(answer="one two three four")
        document = self.answer(simulator, stop=["four", "three", ""]).json()
        assert text_of("openai", document) == "one two "
        assert document["choices"][0]["finish_reason"] == "stop"
        assert document["usage"]["completion_tokens"] == 2
        assert text_of("openai", self.answer(simulator, stop="wo").json()) == "one t"
        theirs = self.answer(simulator, "anthropic", stop_sequences=["three"]).json()
        assert (theirs["stop_reason"], theirs["stop_sequence"]) == ("stop_sequence", "three")

    def test_streams_without_usage_where_it_is_not_asked_for(self) -> None:
        found, _ = run(lambda client: blocks(client, stream_options=None), Simulator(answer="a b"))
        assert not any("usage" in event for event in events(found)[:-1])

    def test_reasoning(self) -> None:
        simulator = Simulator(answer="one two three", reasoning_tokens=4)
        document = self.answer(simulator).json()
        assert document["usage"]["completion_tokens"] == 7
        assert document["usage"]["completion_tokens_details"] == {"reasoning_tokens": 4}
        assert "reasoning" not in document["choices"][0]["message"]
        spent = self.answer(simulator, max_completion_tokens=3).json()
        assert spent["choices"][0]["message"]["content"] is None
        assert spent["choices"][0]["finish_reason"] == "length"
        theirs = self.answer(simulator, "anthropic").json()
        assert [block["type"] for block in theirs["content"]] == ["thinking", "text"]
        assert theirs["usage"]["output_tokens_details"] == {"thinking_tokens": 4}

    def test_reasoning_in_streams(self) -> None:
        hidden, _ = run(blocks, Simulator(answer="a b", reasoning_tokens=2))
        assert streamed("openai", events(hidden)) == "a b"
        assert events(hidden)[-2]["usage"]["completion_tokens"] == 4
        assert b"reasoning" not in b"".join(hidden[:-2])
        shown, _ = run(blocks, Simulator(answer="a b", reasoning_tokens=2, show_reasoning=True))
        deltas = [event["choices"][0]["delta"] for event in events(shown)[1:5]]
        assert deltas == [{"reasoning": "Let"}, {"reasoning": " me"}, {"content": "a"}, {"content": " b"}]
        theirs, _ = run(
            lambda client: blocks(client, "anthropic"), simulator := Simulator(answer="a b", reasoning_tokens=2)
        )
        kinds = [event["delta"]["type"] for event in events(theirs) if event["type"] == "content_block_delta"]
        assert kinds == ["thinking_delta"] * 2 + ["text_delta"] * 2
        assert simulator.billed.reasoning_tokens == 2

    def test_json_on_request(self) -> None:
        assert json.loads(self.text(response_format={"type": "json_object"}))["simulated"] is True
        schema = {
            "type": "object",
            "required": ["name", "age"],
            "properties": {
                "name": {"type": "string", "minLength": 12},
                "age": {"type": "integer", "exclusiveMinimum": 17},
                "tags": {"type": "array", "items": {"enum": ["x", "y"]}},
                "child": {"$ref": "#/$defs/child"},
            },
            "$defs": {"child": {"type": "object", "properties": {"ok": {"type": ["null", "boolean"]}}}},
        }
        wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
        expected = {"name": "simulated...", "age": 18, "tags": ["x"], "child": {"ok": True}}
        assert json.loads(self.text(response_format=wanted)) == expected
        config = {"format": {"type": "json_schema", "schema": schema}}
        assert json.loads(text_of("anthropic", self.answer(wire="anthropic", output_config=config).json())) == expected
        assert json.loads(self.text(structured_outputs={"json": schema})) == expected
        assert self.text(response_format={"type": "text"}) == self.text()


class TestBadRequests:
    @pytest.mark.parametrize(
        "fields, word",
        [
            ({"model": ""}, "model"),
            ({"messages": []}, "messages"),
            ({"messages": ["hi"]}, "messages"),
            ({"max_tokens": 0}, "max_tokens"),
            ({"max_tokens": "many"}, "max_tokens"),
            ({"max_tokens": True}, "max_tokens"),
            ({"temperature": 3}, "temperature"),
            ({"stop": [1]}, "stop"),
            ({"stop": 1}, "stop"),
            ({"n": 2}, "n"),
            ({"response_format": {"type": "json_schema"}}, "schema"),
        ],
        ids=str,
    )
    def test_openai_says_what_is_wrong(self, fields, word) -> None:
        simulator = Simulator()
        response = run(lambda client: ask(client, **fields), simulator)
        assert response.status_code == 400
        assert response.json()["error"]["type"] == "invalid_request_error"
        assert word in response.json()["error"]["message"]
        assert (simulator.calls, simulator.billed) == (1, Usage())

    def test_anthropic_wants_a_limit(self) -> None:
        response = run(lambda client: ask(client, "anthropic", max_tokens=None), Simulator())
        assert response.status_code == 400
        assert response.json()["error"] == {"type": "invalid_request_error", "message": "max_tokens: Field required"}

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000], ids=repr)
    def test_what_is_no_json_is_refused(self, content) -> None:
        simulator = Simulator()
        response = run(lambda client: client.post("/chat/completions", content=content), simulator)
        assert response.status_code == 400
        assert (simulator.calls, simulator.open) == (1, 0)

    def test_models_and_windows_that_are_set_hold(self) -> None:
        simulator = Simulator(models=("small",), window=5)
        assert run(lambda client: ask(client, model="small", prompt="hi"), simulator).status_code == 200
        unknown = run(lambda client: ask(client, model="other", prompt="hi"), simulator)
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
        long = run(lambda client: ask(client, model="small"), simulator)
        assert (long.status_code, long.json()["error"]["code"]) == (400, "context_length_exceeded")
        assert "maximum context length is 5 tokens" in long.json()["error"]["message"]

    def test_a_wrong_setting_is_said_at_once(self) -> None:
        with pytest.raises(ValueError, match="usage is one of right, none"):
            Simulator(usage="wrong")


class TestBooks:
    def test_what_is_billed(self) -> None:
        simulator = Simulator(answer="one two three", cached_tokens=2, reasoning_tokens=1)

        async def scenario(client):
            await ask(client)
            await blocks(client, "anthropic")
            simulator.fail(Fault.status(503))
            await ask(client)

        run(scenario, simulator)
        asked = simulated_tokens(PROMPT)
        assert simulator.billed == Usage(2 * asked, 8, cached_input_tokens=4, reasoning_tokens=2)
        assert [received.billed.output_tokens for received in simulator.requests] == [4, 4, 0]
        assert [received.status for received in simulator.requests] == [200, 200, 503]
        assert [received.state for received in simulator.requests] == ["complete"] * 3

    def test_a_stream_that_is_left_is_billed_as_far_as_it_came(self) -> None:
        simulator = Simulator(answer="one two three four")

        async def scenario(client):
            async with client.stream("POST", "/chat/completions", json=request(stream=True)) as response:
                incoming = response.aiter_raw()
                for _ in range(3):  # the role, and two tokens
                    await anext(incoming)
                assert (simulator.open, simulator.disconnects) == (1, 0)
                assert simulator.billed == Usage(simulated_tokens(PROMPT), 2)
            assert (simulator.open, simulator.disconnects) == (0, 1)

        run(scenario, simulator)
        assert simulator.billed == Usage(simulated_tokens(PROMPT), 2)
        assert simulator.requests[0].state == "left"

    def test_a_stream_that_is_never_read_is_left_as_well(self) -> None:
        simulator = Simulator()

        async def scenario(client):
            async with client.stream("POST", "/chat/completions", json=request(stream=True)):
                pass

        run(scenario, simulator)
        assert (simulator.open, simulator.disconnects, simulator.billed) == (0, 1, Usage())

    def test_a_client_that_stops_at_done_has_left_nothing(self) -> None:
        for wire, last in (("openai", b"[DONE]"), ("anthropic", b"message_stop")):
            simulator = Simulator(answer="one two")

            async def scenario(client, wire=wire, last=last):
                path = "/messages" if wire == "anthropic" else "/chat/completions"
                async with client.stream("POST", path, json=request(wire, stream=True)) as response:
                    async for block in response.aiter_raw():
                        if last in block:
                            break

            run(scenario, simulator)
            assert (simulator.disconnects, simulator.requests[0].state) == (0, "complete")

    def test_requests_can_be_looked_at_but_show_no_key(self) -> None:
        simulator = Simulator()
        headers = {"Authorization": "Bearer sk-secret", "X-Api-Key": "sk-secret", "X-Other": "seen"}
        run(lambda client: ask(client, headers=headers), simulator)
        received = simulator.requests[0]
        assert received.headers["authorization"] == "Bearer sk-secret"
        assert received.body["model"] == "m"
        assert (received.method, received.path, received.number) == ("POST", "/v1/chat/completions", 1)
        assert "sk-secret" not in repr(received) + repr(simulator) + str(received.headers)
        assert "seen" in repr(received)

    def test_only_the_latest_requests_are_kept(self) -> None:
        simulator = Simulator(keep=3)

        async def scenario(client):
            for _ in range(5):
                await ask(client)

        run(scenario, simulator)
        assert simulator.calls == 5
        assert [received.number for received in simulator.requests] == [3, 4, 5]

    def test_waiting_for_arrivals_takes_no_sleep(self) -> None:
        simulator = Simulator(clock=FakeClock(auto=False), latency_s=10)

        async def scenario(client):
            tasks = [asyncio.create_task(ask(client)) for _ in range(3)]
            await asyncio.wait_for(simulator.arrived(3), 5)
            assert simulator.open == 3
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.wait_for(simulator.until(lambda books: not books.open), 5)
            return simulator.disconnects

        assert run(scenario, simulator) == 3
        with pytest.raises(TimeoutError):
            simulator.wait_until(lambda books: books.calls > 3, timeout=0.01)


class TestTime:
    def test_waiting_goes_through_the_clock(self) -> None:
        clock = FakeClock()
        simulator = Simulator(answer="a b c d", clock=clock, latency_s=2, token_delay_s=0.5)
        run(blocks, simulator)
        assert clock.now() == 2 + 3 * 0.5
        run(ask, simulator)
        assert clock.now() == 3.5 + 2 + 4 * 0.5

    def test_a_long_stream_lets_others_run(self) -> None:
        turns = []

        async def scenario(client):
            async def other():
                while True:
                    turns.append(1)
                    await asyncio.sleep(0)

            task = asyncio.create_task(other())
            await blocks(client)
            task.cancel()

        run(scenario, Simulator(answer="word " * 1000))
        assert len(turns) > 50


class TestPieces:
    @given(st.text())
    def test_they_are_the_text_and_the_tokens(self, text) -> None:
        found = pieces(text)
        assert len(found) == simulated_tokens(text)
        if found:
            assert "".join(found) == text

    def test_thoughts_are_tokens(self) -> None:
        for count in (0, 1, 25):
            assert simulated_tokens("".join(thoughts(count))) == count


KEYWORDS = [
    "type",
    "$ref",
    "allOf",
    "anyOf",
    "properties",
    "required",
    "items",
    "minItems",
    "enum",
    "minimum",
    "maximum",
    "exclusiveMaximum",
    "minLength",
    "maxLength",
    "format",
    "a",
]


class TestInstances:
    @pytest.mark.parametrize(
        "schema, expected",
        [
            ({}, None),
            ({"const": 4}, 4),
            ({"type": "string", "format": "date"}, "2026-01-01"),
            ({"type": "string", "maxLength": 3}, "sim"),
            ({"type": "integer", "minimum": 2.5}, 3),
            ({"type": "integer", "maximum": -2}, -2),
            ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, 0.25),
            ({"type": "number"}, 1),
            ({"type": "array", "minItems": 2, "items": {"type": "boolean"}}, [True, True]),
            ({"type": "array", "items": {"type": "null"}}, [None]),
            ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, 1),
            ({"examples": ["this"]}, "this"),
            ({"type": "object"}, {}),
            ({"properties": {"a/b": {"$ref": "#/$defs/x~1y"}}, "$defs": {"x/y": {"const": 1}}}, {"a/b": 1}),
            (
                {
                    "allOf": [{"$ref": "#/$defs/a"}, {"properties": {"b": {"type": "integer"}}, "required": ["b"]}],
                    "$defs": {"a": {"type": "object", "properties": {"a": {"type": "string"}}}},
                },
                {"a": "simulated", "b": 1},
            ),
        ],
        ids=str,
    )
    def test_a_fitting_document(self, schema, expected) -> None:
        assert json.loads(instance(schema)) == expected

    def test_schemas_that_refer_to_themselves_end(self) -> None:
        tree = {
            "type": "object",
            "required": ["value"],
            "properties": {"value": {"type": "integer"}, "children": {"type": "array", "items": {"$ref": "#"}}},
        }
        assert json.loads(instance(tree))["children"][0]["value"] == 1
        wild = {"type": "object", "properties": {}, "required": [*"abcdefgh"]}
        wild["properties"] = {name: {"$ref": "#"} for name in "abcdefgh"}
        assert len(instance(wild)) < 100_000

    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["object", "#", "#/a", "string"]),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYWORDS), inner, max_size=4),
            max_leaves=12,
        )
    )
    @settings(max_examples=200, deadline=None)
    def test_no_schema_breaks_it(self, schema) -> None:
        if isinstance(schema, dict):
            json.loads(instance(schema))


def test_importing_it_is_cheap() -> None:
    heavy = "{'aiohttp', 'tiktoken', 'numpy', 'pandas', 'genai_prices', 'tenacity', 'jinja2'}"
    code = f"import sys, llmkit.testing; print(sorted({heavy} & set(sys.modules)))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


# -- repeats -------------------------------------------------------------------------------------------------------------


def asked_with(simulator, key, prompt="Hello there.", *, stream=False):
    """The status of a request under this ``Idempotency-Key``, and its body; None where it broke."""
    body = {"model": "m", "messages": [{"role": "user", "content": prompt}], "stream": stream}

    async def main():
        async with httpx.AsyncClient(transport=simulator, base_url="http://sim/v1") as client:
            try:
                response = await client.post("/chat/completions", json=body, headers={"Idempotency-Key": key})
            except httpx.HTTPError:
                return None
            return response.status_code, response.content

    return asyncio.run(main())


def idempotent(answer=None, **arguments):
    simulator = Simulator(answer, **arguments)
    simulator.idempotent = True
    return simulator


def test_a_repeated_key_is_answered_again_and_not_billed_again() -> None:
    simulator = idempotent()
    first = asked_with(simulator, "a")
    billed = simulator.billed
    assert billed.output_tokens
    assert asked_with(simulator, "a") == first
    assert simulator.billed == billed
    assert asked_with(simulator, "b")[0] == 200
    assert simulator.billed.output_tokens == 2 * billed.output_tokens


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_was_lost_on_its_way_is_billed_once(stream) -> None:
    simulator = idempotent("one two three four", reasoning_tokens=3)
    simulator.fail(Fault.cut(2))
    assert asked_with(simulator, "a", stream=stream) is None
    assert simulator.billed.output_tokens
    assert asked_with(simulator, "a", stream=stream)[0] == 200
    assert (simulator.billed.output_tokens, simulator.billed.reasoning_tokens) == (7, 3)
    once = Simulator("one two three four", reasoning_tokens=3)
    asked_with(once, "a", stream=stream)
    assert simulator.billed == once.billed


def test_a_key_that_comes_with_another_request_is_refused() -> None:
    simulator = idempotent()
    asked_with(simulator, "a")
    billed = simulator.billed
    assert asked_with(simulator, "a", "Something else.")[0] == 400
    assert asked_with(simulator, "a")[0] == 200
    assert simulator.billed == billed


def test_an_error_under_a_key_is_not_kept() -> None:
    simulator = idempotent()
    simulator.fail(Fault.status(503))
    assert asked_with(simulator, "a")[0] == 503
    assert asked_with(simulator, "a")[0] == 200


def test_unless_it_is_told_to_each_request_is_a_new_one() -> None:
    simulator = Simulator()
    asked_with(simulator, "a")
    billed = simulator.billed
    asked_with(simulator, "a")
    assert simulator.billed.output_tokens == 2 * billed.output_tokens
