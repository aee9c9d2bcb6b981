"""llmkit.layers.schema: what fits is handed on, what does not is asked for once more, within one call."""

from __future__ import annotations

import asyncio
import json
from decimal import Decimal

import pytest
from pydantic import BaseModel

import llmkit
from llmkit import errors
from llmkit.call import Message
from llmkit.events import AttemptStarted, Checking, Repairing
from llmkit.layers.schema import LONGEST_REPEATED, SchemaCheck, most_added
from llmkit.models import tokens
from llmkit.schema import LONGEST_PROBLEM, MOST_PROBLEMS, Misfit, Schema
from llmkit.testing import FakeClock, Fault, Simulator
from tests.layers.script import HANG, Script, call_for, chain, outcomes, run


class Person(BaseModel):
    name: str
    age: int


SCHEMA = Schema.of(Person)
ANA = Person(name="Ana", age=3)
GOOD = '{"name": "Ana", "age": 3}'
BAD = '{"name": "Ana", "age": "three"}'


async def asked(*steps, **changes):
    """What a script under the layer comes to: the script, the reply, what was raised, what was heard."""
    clock = FakeClock()
    script, events = Script(clock, *steps), []
    reply, raised, seen = await outcomes(
        chain(SchemaCheck(), script), call_for(clock, events=events, **{"schema": SCHEMA, **changes})
    )
    assert len(seen) == 1
    assert script.open == 0
    return script, reply, raised, events


# -- one call, by a script ---------------------------------------------------------------------------------------------


def test_a_call_without_a_schema_passes_untouched() -> None:
    async def main() -> None:
        script, reply, raised, events = await asked(["any ", "text"], schema=None)
        assert (reply.text, raised, events) == ("any text", None, [])
        assert len(script.calls) == 1
        with pytest.raises(ValueError, match="no schema was asked for"):
            _ = reply.data

    run(main)


def test_an_answer_that_fits_is_handed_on_whole() -> None:
    async def main() -> None:
        script, reply, raised, events = await asked([GOOD[:5], GOOD[5:]])
        assert raised is None
        assert reply.data == ANA
        assert [chunk.text async for chunk in reply] == [GOOD[:5], GOOD[5:]]
        assert reply.outcome.status == "complete"
        assert len(script.calls) == 1
        assert [type(event) for event in events] == [Checking]

    run(main)


@pytest.mark.parametrize(
    "first, problem",
    [
        (BAD, "age: Input should be a valid integer, unable to parse string as an integer"),
        ('{"name": "Ana"}', "age: Field required"),
        ("Ana is three.", "the answer is not JSON: there is none in the text"),
        (GOOD[:-1], "the answer is not JSON: Expecting ',' delimiter at line 1, column 25"),
        (f"{GOOD} {GOOD}", "the answer holds more than one JSON value"),
    ],
)
def test_what_does_not_fit_is_asked_for_once_more_with_what_is_wrong(first, problem) -> None:
    async def main() -> None:
        script, reply, raised, events = await asked(first, f"Sorry!\n```json\n{GOOD}\n```")
        assert raised is None
        assert reply.data == ANA
        assert (reply.as_json, reply.json()) == (GOOD, json.loads(GOOD))
        second = script.calls[1]
        assert second.messages[0] == Message("user", "hi")
        assert second.messages[1] == Message("assistant", first)
        assert f"\n- {problem}\n" in second.messages[2].text
        assert SCHEMA.instruction in second.messages[2].text
        assert second.request_id == script.calls[0].request_id
        assert second.trail is script.calls[0].trail
        assert second.deadline == script.calls[0].deadline
        assert events[1] == Repairing("r1", (problem,))
        assert second.trail.repairs == 1

    run(main)


def test_an_answer_that_does_not_fit_twice_is_an_error_with_its_text() -> None:
    async def main() -> None:
        script, reply, raised, _ = await asked(BAD, '{"age": 3}', GOOD)
        assert reply is None
        assert isinstance(raised, errors.SchemaMismatch)
        assert isinstance(raised, errors.BadResponse)
        assert raised.problems == ("name: Field required",)
        assert raised.repaired
        assert not raised.transient
        assert not raised.retryable
        assert raised.reply.text == '{"age": 3}'
        assert "  - name: Field required\n" in raised.block()
        assert "kept: 10 characters" in raised.block()
        assert len(script.calls) == 2
        with pytest.raises(ValueError, match="does not fit its schema"):
            _ = raised.reply.data

    run(main)


def test_no_correction_adds_more_than_a_plan_allows_for() -> None:
    def picky(_):
        raise Misfit(["\U0001f600" * LONGEST_PROBLEM] * MOST_PROBLEMS)

    async def main() -> None:
        schema = Schema("answer", SCHEMA.shape, picky)
        script, _, raised, _ = await asked([BAD], [BAD], schema=schema)
        assert isinstance(raised, errors.SchemaMismatch)
        first, second = script.calls
        added = tokens.upper_bound(second.messages) - tokens.upper_bound(first.messages) - len(BAD)
        assert 4 * LONGEST_PROBLEM * MOST_PROBLEMS < added <= most_added(schema)

    run(main)


def test_a_very_long_answer_is_not_sent_back() -> None:
    async def main() -> None:
        script, reply, _, _ = await asked("x" * (LONGEST_REPEATED + 1), GOOD)
        assert reply.data == ANA
        assert [message.role for message in script.calls[1].messages] == ["user", "user"]

    run(main)


class Cut:
    """A reply that says why it ended; the text may fit all the same."""

    def __init__(self, text, *, finish="length", cut=None):
        self.text, self.finish, self.cut, self.calls = text, finish, cut, 0

    async def __call__(self, call):
        self.calls += 1
        reply = await Script(FakeClock(), self.text)(call)
        reply.head.finish_reason, reply.cut = self.finish, self.cut
        return reply


@pytest.mark.parametrize("how", [{"finish": "length"}, {"finish": "stop", "cut": "max_cost"}, {"finish": "max_tokens"}])
def test_an_answer_that_was_cut_is_not_asked_for_again(how) -> None:
    async def main() -> None:
        below = Cut(GOOD[:-3], **how)
        _, raised, _ = await outcomes(chain(SchemaCheck(), below), call_for(FakeClock(), schema=SCHEMA))
        assert isinstance(raised, errors.SchemaMismatch)
        assert "cut" in raised.message
        assert "--max-tokens" in raised.next_step
        assert raised.reply.text == GOOD[:-3]
        assert not raised.repaired
        assert below.calls == 1

    run(main)


def test_an_answer_that_was_cut_and_fits_is_an_answer() -> None:
    async def main() -> None:
        reply, raised, _ = await outcomes(chain(SchemaCheck(), Cut(GOOD)), call_for(FakeClock(), schema=SCHEMA))
        assert raised is None
        assert reply.data == ANA

    run(main)


@pytest.mark.parametrize("error", [errors.ProviderOverloaded("503"), errors.Refused("no", reason="r")])
def test_what_fails_before_the_first_token_is_that_error(error) -> None:
    async def main() -> None:
        script, reply, raised, events = await asked(error)
        assert (reply, raised, events) == (None, error, [])
        assert len(script.calls) == 1

    run(main)


def test_what_breaks_in_the_middle_is_that_error_and_keeps_its_text() -> None:
    async def main() -> None:
        broken = errors.StreamBroken("cut")
        script, reply, raised, _ = await asked([GOOD[:9], broken])
        assert raised is broken
        assert raised.reply.text == reply.text == GOOD[:9]
        assert len(script.calls) == 1

    run(main)


@pytest.mark.parametrize(
    "error", [errors.ProviderOverloaded("503", retryable=False), errors.ContextTooLong("long", tokens=9, window=5)]
)
def test_a_repair_that_cannot_be_asked_keeps_the_first_answer(error) -> None:
    async def main() -> None:
        _, _, raised, _ = await asked(BAD, error)
        assert raised is error
        assert raised.reply.text == BAD
        assert "could not be repaired" in raised.next_step
        assert "age: Input should be" in raised.next_step

    run(main)


def test_a_repair_that_breaks_keeps_what_it_had_said() -> None:
    async def main() -> None:
        broken = errors.StreamBroken("cut")
        _, _, raised, _ = await asked(BAD, [GOOD[:9], broken])
        assert raised is broken
        assert raised.reply.text == GOOD[:9]

    run(main)


@pytest.mark.parametrize("steps", [[[GOOD[:3], HANG]], [BAD, [GOOD[:3], HANG]], [HANG], [BAD, HANG]])
def test_cancelled_it_leaves_nothing_open(steps) -> None:
    async def main() -> None:
        clock = FakeClock()
        script = Script(clock, *steps)
        call = call_for(clock, schema=SCHEMA)
        task = asyncio.ensure_future(outcomes(chain(SchemaCheck(), script), call))
        for _ in range(20):
            await asyncio.sleep(0)
        task.cancel()
        reply, raised, seen = await task
        assert (reply, type(raised), seen) == (None, asyncio.CancelledError, ["aborted"])
        assert script.open == 0

    run(main)


def test_the_texts_of_outages_fit_or_are_an_error_and_are_not_asked_for_again() -> None:
    async def main() -> None:
        clock = FakeClock()

        async def raised_for(text):
            calls = []

            async def degraded(call):
                calls.append(call)
                reply = await Script(clock, text)(call)
                reply.source = "degraded"
                return reply

            _, raised, _ = await outcomes(chain(SchemaCheck(), degraded), call_for(clock, schema=SCHEMA))
            assert len(calls) == 1
            return raised

        assert "[degraded]" in (await raised_for("busy")).message
        assert await raised_for(GOOD) is None

    run(main)


# -- through the whole chain -------------------------------------------------------------------------------------------


class Wire:
    """What a simulator was asked, and what it is to answer, one text a request; the last one for ever."""

    def __init__(self, *texts, **settings):
        self.texts = list(texts)
        self.bodies = []
        self.simulator = Simulator(answer=self.answer, **settings)

    def answer(self, body):
        self.bodies.append(body)
        return self.texts.pop(0) if len(self.texts) > 1 else self.texts[0]

    def client(self, **settings):
        model = {"provider": "own", "model": "m", "price": {"input": 1000, "output": 2000}}
        own = {"base_url": "http://127.0.0.1:9/v1"}
        given = {"model": "m", "models": {"m": model}, "providers": {"own": own}, **settings}
        return llmkit.AsyncClient(transport=self.simulator, **given)


def with_client(wire, work, **settings):
    async def main():
        async with wire.client(**settings) as client:
            await work(client)
            budgets = await client.budgets()
            assert not budgets["held"].any()

    asyncio.run(main())


PLENTY = {"request": {"usd": 50}, "session": {"usd": 1000}, "day": {"usd": 1000}}


@pytest.mark.parametrize("stream", [False, True])
def test_both_attempts_are_one_call_with_one_row(stream) -> None:
    wire = Wire(BAD, GOOD)

    async def work(client):
        if stream:
            async with client.stream("who?", schema=Person) as reply:
                assert "".join([chunk.text async for chunk in reply]) == GOOD
        else:
            reply = await client.complete("who?", schema=Person)
        assert reply.data == ANA
        first, second = reply.attempts
        assert reply.cost_usd == first.cost_usd + second.cost_usd > 0
        row = client.calls().iloc[-1]
        assert (row["status"], row["source"], row["attempts"]) == ("complete", "provider", 2)
        assert row["input_tokens"] == first.usage.input_tokens + second.usage.input_tokens
        assert row["cost_usd"] == float(reply.cost_usd)
        assert len(client.attempts(reply.request_id)) == 2

    with_client(wire, work, budget=PLENTY)
    assert [len(body["messages"]) for body in wire.bodies] == [1, 3]


def test_the_second_time_both_answers_come_from_the_cache_for_nothing() -> None:
    wire = Wire(BAD, GOOD)

    async def work(client):
        first = await client.complete("who?", schema=Person)
        again = await client.complete("who?", schema=Person)
        assert (again.data, again.source, again.attempts, again.cost_usd) == (ANA, "cache", (), 0)
        assert again.saved_usd == first.cost_usd
        row = client.calls().iloc[-1]
        assert (row["source"], row["attempts"], row["input_tokens"], row["cost_usd"]) == ("cache", 0, 0, 0)
        assert client.cache.saved_usd == first.cost_usd
        only = await client.complete("who?", schema=Person, cache="only")
        assert only.data == ANA

    with_client(wire, work, budget=PLENTY)
    assert len(wire.bodies) == 2


def test_a_first_answer_from_the_cache_and_a_repair_that_is_asked_are_booked_as_they_were() -> None:
    wire = Wire(BAD, BAD, GOOD)

    async def work(client):
        keys, keep = [], client.cache.keep

        async def noted(key, answer, **how):
            keys.append(key)
            await keep(key, answer, **how)

        client.cache.keep = noted
        with pytest.raises(errors.SchemaMismatch) as raised:
            await client.complete("who?", schema=Person)
        stored, of_repair = raised.value.reply.attempts
        row = client.calls().iloc[-1]
        assert (row["status"], row["error"], row["attempts"]) == ("failed", "SchemaMismatch", 2)
        assert (row["source"], raised.value.spent) == ("provider", stored.cost_usd + of_repair.cost_usd)
        # Of the two stored answers the second is forgotten, as by a store that is full.
        await client.cache.drop(keys[1])
        reply = await client.complete("who?", schema=Person)
        assert (reply.data, reply.source) == (ANA, "provider")
        (asked,) = reply.attempts
        assert (reply.cost_usd, reply.saved_usd) == (asked.cost_usd, stored.cost_usd)
        row = client.calls().iloc[-1]
        assert (row["source"], row["attempts"]) == ("provider", 1)
        assert (row["input_tokens"], row["cost_usd"]) == (asked.usage.input_tokens, float(asked.cost_usd))

    with_client(wire, work, budget=PLENTY)
    assert len(wire.bodies) == 3


def test_stored_answers_that_do_not_fit_are_an_error_that_says_how_to_ask_anew() -> None:
    wire = Wire(BAD, BAD, GOOD)

    async def work(client):
        with pytest.raises(errors.SchemaMismatch):
            await client.complete("who?", schema=Person)
        with pytest.raises(errors.SchemaMismatch) as raised:
            await client.complete("who?", schema=Person)
        assert (raised.value.spent, raised.value.reply.source) == (0, "cache")
        assert "--cache refresh" in raised.value.next_step
        assert client.calls().iloc[-1]["source"] == "cache"
        assert (await client.complete("who?", schema=Person, cache="refresh")).data == ANA

    with_client(wire, work, budget=PLENTY)
    assert len(wire.bodies) == 3


def test_a_cap_that_the_repair_would_break_keeps_the_first_answer() -> None:
    wire = Wire(BAD, GOOD)

    async def work(client):
        with pytest.raises(errors.BudgetExceeded) as raised:
            await client.complete("who?", schema=Person, max_cost=1, max_tokens=100)
        error = raised.value
        assert (error.scope, error.reply.text) == ("request", BAD)
        assert 0 < error.spent <= 1
        assert "could not be repaired" in error.next_step
        assert client.calls().iloc[-1]["error"] == "BudgetExceeded"

    with_client(wire, work, budget={"request": {"usd": 50}})
    assert len(wire.bodies) == 1


def test_the_cap_in_tokens_counts_both_attempts_and_the_schema() -> None:
    wire = Wire(BAD, GOOD)
    schema = Schema.of(Person)

    async def work(client):
        with pytest.raises(errors.BudgetExceeded, match="tokens in"):
            await client.complete("who?", schema=schema)
        assert not wire.bodies

    with_client(wire, work, budget={"request": {"usd": 50, "tokens": len(schema.bound) // 2}})


def test_identical_calls_at_once_are_asked_once_each_way() -> None:
    wire = Wire(BAD, GOOD, latency_s=0.02)

    async def work(client):
        replies = await asyncio.gather(*(client.complete("who?", schema=Person) for _ in range(4)))
        assert [reply.data for reply in replies] == [ANA] * 4
        assert sorted(len(reply.attempts) for reply in replies) in ([0, 0, 0, 2], [0, 0, 1, 1])

    with_client(wire, work, budget=PLENTY)
    assert len(wire.bodies) == 2


def test_what_is_cancelled_in_its_repair_is_booked_and_holds_nothing() -> None:
    wire = Wire(BAD, GOOD, token_delay_s=0.5)

    async def work(client):
        started = asyncio.Event()
        heard = []

        def hear(event):
            heard.append(event)
            if isinstance(event, AttemptStarted) and event.number == 2:
                started.set()

        task = asyncio.ensure_future(client.complete("who?", schema=Person, on_event=hear))
        await started.wait()
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        row = client.calls().iloc[-1]
        assert (row["status"], row["attempts"]) == ("aborted", 2)
        assert row["cost_usd"] > 0

    with_client(wire, work, budget=PLENTY)


def test_a_chain_asks_each_service_in_its_own_way() -> None:
    wire = Wire(GOOD)
    wire.simulator.fail(Fault.status(500))
    own = {"base_url": "http://127.0.0.1:9/v1"}
    providers = {
        "own": own,
        "words": {**own, "base_url": "http://127.0.0.1:10/v1", "quirks": ["no_json_schema", "no_json_object"]},
    }
    models = {
        "m": {"chain": ["own:a", "words:b"]},
    }

    async def work(client):
        reply = await client.complete("who?", schema=Person)
        assert (reply.data, reply.model) == (ANA, "b")

    with_client(wire, work, models=models, providers=providers, retry={"attempts": 1})
    first, second = (received.body for received in wire.simulator.requests)
    assert first["response_format"]["type"] == "json_schema"
    assert "response_format" not in second
    assert second["messages"][0]["content"] == SCHEMA.instruction


def test_all_links_failing_is_what_it_is_without_a_schema() -> None:
    wire = Wire(GOOD)
    wire.simulator.fail(Fault.status(500), times=2)
    own = {"base_url": "http://127.0.0.1:9/v1"}

    async def work(client):
        with pytest.raises(errors.AllModelsFailed) as raised:
            await client.complete("who?", schema=Person)
        assert [type(each) for each in raised.value.errors] == [errors.ProviderOverloaded] * 2

    settings = {"models": {"m": {"chain": ["own:a", "own:b"]}}, "providers": {"own": own}}
    with_client(wire, work, retry={"attempts": 1}, **settings)


def test_a_client_without_await_gives_data_as_well() -> None:
    with llmkit.Client(model="simulator") as client:
        assert client.complete("x", schema="name, age int").data == {"name": "simulated", "age": 1}
        assert client.complete("x", schema=list[Person]).data == [Person(name="simulated", age=1)]
        with client.stream("x", schema="[] mood good|bad") as reply:
            assert json.loads("".join(chunk.text for chunk in reply)) == {"items": [{"mood": "good"}]}
        assert reply.json() == [{"mood": "good"}]
        assert reply.data == [{"mood": "good"}]
        assert reply.cost_usd == Decimal(0)


@pytest.mark.parametrize("extra", [{"response_format": {"type": "json_object"}}, {"output_config": {"format": {}}}])
def test_a_schema_and_a_shape_of_ones_own_exclude_each_other(extra) -> None:
    with llmkit.Client(model="simulator") as client:
        with pytest.raises(errors.ConfigError, match=f"{next(iter(extra))}.* another"):
            client.complete("x", schema="a", extra=extra)
        assert client.complete("x", schema="a", extra={"output_config": {"effort": "low"}}).data == {"a": "simulated"}


def test_a_budget_that_has_no_room_for_the_repair_keeps_the_first_answer() -> None:
    wire = Wire(BAD, GOOD)

    async def work(client):
        with pytest.raises(errors.BudgetExceeded) as raised:
            await client.complete("who?", schema=Person, max_tokens=100)
        assert (raised.value.scope, raised.value.reply.text) == ("session", BAD)
        assert raised.value.spent > 0

    with_client(wire, work, budget={"request": {"usd": 50}, "session": {"usd": 1}, "day": {"usd": "off"}})
    assert len(wire.bodies) == 1
