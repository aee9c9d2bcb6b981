"""What a call reports while it goes on: its whole life, through the real chain, and nothing where nobody listens."""

from __future__ import annotations

import asyncio
from dataclasses import FrozenInstanceError, fields
from decimal import Decimal
from threading import Barrier, Thread

import httpx
import pytest

import llmkit
from llmkit import events
from llmkit.errors import BudgetExceeded, LLMKitError
from llmkit.testing import FakeClock, Fault, Simulator
from tests.test_client import settings


def kinds(heard):
    return [type(event).__name__ for event in heard]


def only(heard, kind):
    return [event for event in heard if isinstance(event, kind)]


def asked(client, prompt="a question", **options):
    """What the call reported, and its reply, or its error."""
    heard = []
    try:
        return heard, client.complete(prompt, on_event=heard.append, **options)
    except LLMKitError as error:
        return heard, error


@pytest.fixture
def simulator():
    return Simulator("one two three", clock=FakeClock())


@pytest.fixture
def client(tmp_path, simulator):
    with llmkit.Client(transport=simulator, **settings(tmp_path)) as made:
        yield made


def test_events_are_frozen_records_of_one_call(client) -> None:
    heard, reply = asked(client)
    assert {event.request_id for event in heard} == {reply.request_id}
    with pytest.raises(FrozenInstanceError):
        heard[0].request_id = "other"
    assert all(hasattr(event, each.name) for event in heard for each in fields(event))


def test_a_call_is_looked_up_held_sent_and_settled(client) -> None:
    heard, reply = asked(client)
    assert kinds(heard) == ["CacheLooked", "Held", "AttemptStarted", "AttemptEnded", "Settled"]
    looked, held, _, ended, settled = heard
    assert (looked.mode, looked.found) == ("use", "miss")
    assert [(share.scope, share.unit, share.limit) for share in held.shares] == [
        ("session", "usd", Decimal(5)),
        ("day", "usd", Decimal(20)),
    ]
    assert all(share.spent == 0 and share.held == held.usd > 0 for share in held.shares)
    assert held.tokens > 0
    assert (settled.usd, settled.tokens) == (reply.cost_usd, 5)
    assert ended.attempt.cost_usd == settled.usd


def test_where_an_answer_was_found_is_told(client, tmp_path, simulator) -> None:
    asked(client)
    heard, _ = asked(client)
    (looked,) = heard
    assert (looked.found, looked.saved) == ("store", Decimal("0.000008"))  # of such a client it is in memory
    assert kinds(asked(client, cache="refresh")[0])[0] == "CacheLooked"
    assert asked(client, cache="refresh")[0][0].found == "refresh"
    assert [(e.mode, e.found) for e in only(asked(client, cache="off")[0], events.CacheLooked)] == [("off", "off")]
    client.cache.enabled = False
    heard, _ = asked(client)
    assert (heard[0].mode, heard[0].found) == ("use", "off")


def test_only_and_nothing_there(client) -> None:
    heard, error = asked(client, cache="only")
    assert isinstance(error, llmkit.LLMKitError)
    assert [(event.mode, event.found) for event in heard] == [("only", "miss")]


def test_links_that_are_left_are_told(client, simulator) -> None:
    simulator.fail(Fault.auth())
    heard, _ = asked(client, model="chain")
    (fell,) = only(heard, events.FellBack)
    assert (fell.endpoint, fell.to) == ("own:m-1", "own:m-2")
    assert only(heard, events.LinkSkipped) == []
    first, second = only(heard, events.Settled)
    assert (first.number, first.usd, first.tokens) == (1, 0, 0)
    assert second.usd > 0


def test_what_a_budget_refused_is_told(tmp_path, simulator) -> None:
    with llmkit.Client(transport=simulator, **settings(tmp_path, budget={"day": {"tokens": 1}})) as client:
        heard, error = asked(client)
    assert isinstance(error, BudgetExceeded)
    refused = only(heard, events.NoRoom)[-1]
    assert (refused.share.scope, refused.share.unit, refused.share.limit, refused.share.spent) == (
        "day",
        "tokens",
        1,
        0,
    )
    assert refused.needed > 1
    assert only(heard, events.Held) == only(heard, events.AttemptStarted) == []


def test_the_text_for_outages_is_told(tmp_path, simulator) -> None:
    simulator.fail(Fault.status(503), times=None)
    with llmkit.Client(
        transport=simulator, clock=FakeClock(), **settings(tmp_path, degraded={"text": "Later."}, retry={"attempts": 1})
    ) as client:
        heard, reply = asked(client)
    assert reply.text == "Later."
    assert "ProviderOverloaded" in only(heard, events.Degraded)[0].reason


def test_a_call_that_follows_another_says_so(tmp_path) -> None:
    async def main():
        followed, lives = asyncio.Event(), [[] for _ in range(3)]

        def heard_by(life):
            def hear(event):
                life.append(event)
                if sum(isinstance(each, events.Following) for life in lives for each in life) == 2:
                    followed.set()

            return hear

        async def answer(_):
            await followed.wait()  # an answer that is there already is followed by nobody
            choice = {"index": 0, "message": {"content": "one two three"}, "finish_reason": "stop"}
            usage = {"prompt_tokens": 1, "completion_tokens": 3}
            return httpx.Response(200, json={"model": "tiny", "choices": [choice], "usage": usage})

        async with llmkit.AsyncClient(transport=httpx.MockTransport(answer), **settings(tmp_path)) as client:
            asking = [client.complete("same", on_event=heard_by(life)) for life in lives]
            await asyncio.wait_for(asyncio.gather(*asking), 60)
            return lives

    leading, *followers = sorted(asyncio.run(main()), key=len, reverse=True)
    assert "Held" in kinds(leading)
    for life in followers:
        assert kinds(life) == ["CacheLooked", "Following"]
        assert life[1].elsewhere is False


def test_nobody_listens_and_nothing_is_made(client, monkeypatch) -> None:
    """No call pays for a life that nobody hears."""

    def made(*_, **__):
        raise AssertionError("an event was made for nobody")

    for name in ("CacheLooked", "Held", "Settled", "Share", "LinkSkipped", "NoRoom", "AttemptStarted", "AttemptEnded"):
        for module in ("cache", "meter", "fallback", "budget"):
            monkeypatch.setattr(f"llmkit.layers.{module}.{name}", made, raising=False)
    assert client.complete("a question").text == "one two three"
    assert client.complete("a question").source == "cache"


def test_a_listener_that_fails_harms_no_call(client, caplog) -> None:
    def listener(_):
        raise RuntimeError("no")

    assert client.complete("a question", on_event=listener).text == "one two three"
    assert caplog.text.count("a listener failed") == 5


def test_two_threads_each_hear_their_own(client) -> None:
    gate, lives = Barrier(2), {}

    def ask(name):
        gate.wait(30)
        lives[name] = asked(client, name)

    threads = [Thread(target=ask, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for heard, reply in lives.values():
        assert {event.request_id for event in heard} == {reply.request_id}
