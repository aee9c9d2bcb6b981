"""llmkit.layers.cache: what is answered from the store, what is put there, and what never is."""

from __future__ import annotations

import asyncio
import dataclasses
from decimal import Decimal

import pytest

from llmkit import errors
from llmkit.cache import AnswerCache
from llmkit.call import Attempt, Params
from llmkit.config import CacheSettings
from llmkit.endpoint import Link
from llmkit.layers.cache import Cache
from llmkit.providers.canonical import RequestKeys
from llmkit.reply import Chunk, Head, Reply, Usage, settled
from llmkit.state.entries import MemoryEntries
from llmkit.testing import FakeClock
from tests.layers.script import HANG, Script, call_for, chain, endpoint, outcomes, run

keys = RequestKeys()
FIRST, SECOND, THIRD = endpoint("m"), endpoint("n"), endpoint("o")


class Scene:
    """The layer over a script, with a store in memory."""

    def __init__(self, *steps, **settings):
        self.clock = FakeClock()
        self.below = Script(self.clock, *steps)
        self.entries = MemoryEntries(max_bytes=10**6, clock=self.clock)
        self.answers = AnswerCache(CacheSettings(**settings), self.clock, lambda: self.entries)
        self.ask = chain(Cache(self.answers, keys, self.clock), self.below)

    async def asked(self, *links, **changes):
        """The reply and what was raised, read to the end."""
        reply, raised, seen = await outcomes(self.ask, call_for(self.clock, *links, **changes))
        assert len(seen) == 1
        return reply, raised

    async def text(self, *links, **changes):
        reply, raised = await self.asked(*links, **changes)
        assert raised is None
        return reply.text, reply.source


def test_the_second_time_it_is_answered_from_the_store_whole_and_at_once() -> None:
    async def main() -> None:
        scene = Scene(["one ", "two ", "three"])
        first, _ = await scene.asked()
        assert (first.source, first.saved_usd) == ("provider", None)
        call = call_for(scene.clock, stream=True, request_id="r2")
        reply = await settled(scene.ask(call), _nothing)
        assert [chunk.text async for chunk in reply] == ["one two three"]
        assert (reply.source, reply.cost_usd, reply.attempts) == ("cache", 0, ())
        assert (reply.usage, reply.finish_reason, reply.provider) == (first.head.usage, "stop", "test")
        assert (reply.outcome.status, reply.request_id) == ("complete", "r2")
        assert len(scene.below.calls) == 1
        assert (scene.answers.hits, scene.answers.misses) == (1, 1)

    run(main)


async def _nothing(_) -> None: ...


def test_streams_and_whole_replies_answer_for_each_other() -> None:
    async def main() -> None:
        scene = Scene(["a", "b"], ["never"])
        assert await scene.text(stream=True) == ("ab", "provider")
        assert await scene.text(stream=False) == ("ab", "cache")
        assert await scene.text(stream=True) == ("ab", "cache")

    run(main)


def test_a_hit_says_what_it_saved() -> None:
    def costing(usd):
        def step(call):
            attempt = Attempt(
                number=1, provider="test", model="m", status="complete", started=0, latency_s=0, cost_usd=usd
            )
            call.trail.attempts.append(attempt)
            return ["x"]

        return step

    async def main() -> None:
        scene = Scene(costing(Decimal("0.0125")), costing(None))
        for prompt in ("priced", "unpriced"):
            await scene.asked(prompt=prompt)
        priced, _ = await scene.asked(prompt="priced")
        unpriced, _ = await scene.asked(prompt="unpriced")
        assert (priced.saved_usd, priced.cost_usd, priced.call.trail.saved) == (
            Decimal("0.0125"),
            0,
            Decimal("0.0125"),
        )
        assert unpriced.saved_usd is None
        assert scene.answers.saved_usd == Decimal("0.0125")

    run(main)


def test_what_is_asked_below_knows_its_key() -> None:
    async def main() -> None:
        scene = Scene(["a"])
        await scene.asked()
        await scene.asked(prompt="other")
        await scene.asked(cache="off")
        one, two, three = (call.request_key for call in scene.below.calls)
        assert one != two
        assert len(one) == 64
        assert three is None

    run(main)


# -- modes -------------------------------------------------------------------------------------------------------------


def test_modes() -> None:
    async def main() -> None:
        scene = Scene(["1"], ["2"], ["3"], ["4"])
        assert await scene.text(cache="off") == ("1", "provider")
        assert await scene.text() == ("2", "provider")
        assert await scene.text(cache="off") == ("3", "provider")
        assert await scene.text() == ("2", "cache")
        assert await scene.text(cache="only") == ("2", "cache")
        assert await scene.text(cache="refresh") == ("4", "provider")
        assert await scene.text() == ("4", "cache")
        assert await scene.text(cache="only") == ("4", "cache")

    run(main)


def test_only_sends_nothing_and_says_so() -> None:
    async def main() -> None:
        scene = Scene(["never"])
        for changes in ({}, {"params": _extra(x=float("nan"))}):
            _, raised = await scene.asked(cache="only", **changes)
            assert isinstance(raised, errors.NotCached)
            assert raised.next_step
        off = Scene(["never"], enabled=False)
        _, raised = await off.asked(cache="only")
        assert isinstance(raised, errors.NotCached)
        assert "off" in raised.message
        assert scene.below.calls == off.below.calls == []

    run(main)


def _extra(**extra):
    return Params(extra=extra)


def test_while_it_is_off_nothing_is_read_and_nothing_stored() -> None:
    async def main() -> None:
        scene = Scene(["1"], ["2"], ["3"], enabled=False)
        assert await scene.text() == ("1", "provider")
        assert await scene.text(cache="refresh") == ("2", "provider")
        assert await scene.entries.contents() == (0, 0)
        scene.answers.enabled = True
        assert await scene.text() == ("3", "provider")
        assert await scene.text() == ("3", "cache")

    run(main)


def test_a_refresh_that_fails_leaves_what_was_there() -> None:
    async def main() -> None:
        scene = Scene(["1"], errors.ProviderOverloaded("503"), ["half", errors.StreamBroken("cut")])
        await scene.asked()
        for _ in range(2):
            _, raised = await scene.asked(cache="refresh")
            assert raised is not None
        assert await scene.text() == ("1", "cache")

    run(main)


def test_a_request_that_has_no_key_is_asked_and_not_stored() -> None:
    async def main() -> None:
        scene = Scene(["1"], ["2"])
        odd = _extra(x={1, 2})
        assert await scene.text(params=odd) == ("1", "provider")
        assert await scene.text(params=odd) == ("2", "provider")
        assert (await scene.entries.contents()).entries == 0

    run(main)


def test_repeats_namespaces_and_prompts_have_answers_of_their_own() -> None:
    async def main() -> None:
        scene = Scene(*[[str(number)] for number in range(6)])
        kinds = [
            {},
            {"repeat": 1},
            {"repeat": 2},
            {"namespace": "user:ana"},
            {"namespace": "user:bob"},
            {"prompt": "x"},
        ]
        assert [await scene.text(**kind) for kind in kinds] == [(str(number), "provider") for number in range(6)]
        assert [await scene.text(**kind) for kind in kinds] == [(str(number), "cache") for number in range(6)]
        assert (await scene.entries.contents("user:ana")).entries == 1

    run(main)


# -- what is kept --------------------------------------------------------------------------------------------------------


class Ending:
    """A provider whose reply ends as it is told."""

    def __init__(self, clock, *, text="text", reasoning="", finish="stop", where="provider", cut=None, **head):
        self.clock = clock
        self.calls = 0
        self.how = (text, reasoning, finish, where, cut, head)

    async def __call__(self, call):
        self.calls += 1
        text, reasoning, finish, where, cut, fields = self.how
        head = Head()
        head.finish_reason = finish
        for name, value in fields.items():
            setattr(head, name, value)

        async def rest():
            head.usage = Usage(1, 2)
            if cut:
                reply.cut = cut
            return
            yield []

        first = [Chunk(text, reasoning)] if text or reasoning else []
        reply = Reply(call, rest(), head=head, clock=self.clock, first=first, provider="test", where=where)
        return reply


TOOL = [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]
KEPT = [
    {},
    {"finish": "STOP"},
    {"finish": "end_turn"},
    {"reasoning": "hm"},
    {"where": "simulated"},
    {"finish": "tool_calls", "tool_calls": TOOL, "text": ""},
    {"finish": "tool_calls", "tool_calls": TOOL},
]
NOT_KEPT = [
    {"finish": None},
    {"finish": "length"},
    {"finish": "max_tokens"},
    {"finish": "content_filter"},
    {"finish": "refusal"},
    {"finish": "error"},
    {"finish": "something new"},
    {"refusal": "I will not"},
    {"text": ""},
    {"text": " \n"},
    {"text": "", "reasoning": "only thoughts"},
    {"cut": "max_cost"},
    {"cut": "max_tokens"},
    {"where": "degraded"},
    {"where": "coalesced"},
    {"where": "cache"},
    {"model": "x" * 1000},
]


def scene_of(ending):
    scene = Scene("never")
    scene.below = Ending(scene.clock, **ending)
    scene.ask = chain(Cache(scene.answers, keys, scene.clock), scene.below)
    return scene


@pytest.mark.parametrize("ending", KEPT, ids=str)
def test_what_came_to_its_end_and_says_something_is_kept(ending) -> None:
    async def main() -> None:
        scene = scene_of(ending)
        first, raised = await scene.asked()
        assert raised is None
        scene.answers._forget()  # from the entries, through its stored form
        again, raised = await scene.asked()
        assert raised is None
        assert (again.source, scene.below.calls) == ("cache", 1)
        same = ("text", "reasoning", "finish_reason", "provider", "model")
        assert [getattr(again, name) for name in same] == [getattr(first, name) for name in same]
        assert again.head.tool_calls == first.head.tool_calls
        assert again.usage == first.head.usage == Usage(1, 2)

    run(main)


@pytest.mark.parametrize("ending", NOT_KEPT, ids=str)
def test_what_did_not_is_never_kept(ending) -> None:
    async def main() -> None:
        scene = scene_of(ending)
        for _ in range(2):
            await scene.asked()
        assert scene.below.calls == 2
        assert (await scene.entries.contents()).entries == 0

    run(main)


def test_every_error_is_raised_again_and_never_kept() -> None:
    async def main() -> None:
        failures = [
            errors.ProviderOverloaded("503"),
            errors.EmptyReply("none"),
            errors.Refused("no", reason="no"),
            errors.InvalidRequest("400"),
            ["half", errors.StreamBroken("cut")],
            ["half", errors.IdleTimeout("silence", limit=1)],
        ]
        scene = Scene(*failures, ["fine"])
        for _ in failures:
            _, raised = await scene.asked()
            assert raised is not None
        assert await scene.text() == ("fine", "provider")
        assert await scene.text() == ("fine", "cache")

    run(main)


def test_a_reader_who_leaves_leaves_nothing_in_the_store() -> None:
    async def main() -> None:
        scene = Scene(["half", HANG], ["whole"])
        reply = await settled(scene.ask(call_for(scene.clock)), _nothing)
        await reply.aclose()
        assert reply.outcome.status == "aborted"
        assert await scene.text() == ("whole", "provider")
        assert scene.below.open == 0

    run(main)


def test_it_is_stored_before_the_reply_is_said_to_have_ended() -> None:
    async def main() -> None:
        scene = Scene(["a", "b"])
        stored = []
        put = scene.entries.put

        async def slow(key, value, **options):
            assert reply.outcome is None
            await put(key, value, **options)
            stored.append(key)

        scene.entries.put = slow
        reply = await settled(scene.ask(call_for(scene.clock)), _nothing)
        await reply.read()
        assert len(stored) == 1

    run(main)


def test_tool_calls_of_a_hit_are_the_callers_own() -> None:
    async def main() -> None:
        scene = scene_of({"finish": "tool_calls", "tool_calls": [dict(TOOL[0])], "text": ""})
        await scene.asked()
        for _ in range(2):
            reply, _ = await scene.asked()
            assert reply.head.tool_calls == TOOL
            reply.head.tool_calls[0]["function"]["arguments"] = "changed"

    run(main)


def test_a_hit_can_be_left_closed_and_changed_like_any_reply() -> None:
    async def main() -> None:
        scene = Scene(["abc"])
        await scene.asked()
        left = await settled(scene.ask(call_for(scene.clock)), _nothing)
        await left.aclose()
        await left.aclose()
        assert left.outcome.status == "aborted"

        async def loud(batches):
            async for batch in batches:
                yield [Chunk(chunk.text.upper()) for chunk in batch]

        reply = (await settled(scene.ask(call_for(scene.clock)), _nothing)).through(loud)
        assert await reply.read() == "ABC"
        assert reply.outcome.status == "complete"
        first, second = await _both(await scene.ask(call_for(scene.clock)))
        assert first == second == "abc"

    run(main)


async def _both(reply):
    return await asyncio.gather(reply.read(), reply.read())


# -- chains --------------------------------------------------------------------------------------------------------------

DOWN = errors.ProviderOverloaded("503")


class Chained:
    """What stands below: takes the first link that answers."""

    def __init__(self, clock, up):
        self.clock = clock
        self.up = up
        self.asked = 0

    async def __call__(self, call):
        self.asked += 1
        for link in call.route:
            if link.endpoint.model in self.up and not link.disabled:
                return await Script(self.clock, [f"from {link.endpoint.model}"])(call.to(link=link))
        raise DOWN


def chained(*up):
    scene = Scene("never")
    scene.below = Chained(scene.clock, set(up))
    scene.ask = chain(Cache(scene.answers, keys, scene.clock), scene.below)
    return scene


def test_what_the_first_link_answers_serves_everybody_who_asks_that_model() -> None:
    async def main() -> None:
        scene = chained("m")
        assert await scene.text(FIRST, SECOND) == ("from m", "provider")
        assert await scene.text(FIRST) == ("from m", "cache")
        assert await scene.text(FIRST, THIRD) == ("from m", "cache")
        _, raised = await scene.asked(SECOND)
        assert raised is DOWN

    run(main)


def test_what_a_fallback_answers_serves_the_same_chain_alone() -> None:
    async def main() -> None:
        scene = chained("n")
        assert await scene.text(FIRST, SECOND) == ("from n", "provider")
        assert await scene.text(FIRST, SECOND) == ("from n", "cache")
        assert scene.below.asked == 1
        _, raised = await scene.asked(FIRST)  # the premium model is not answered by the cheap one
        assert raised is DOWN
        assert await scene.text(SECOND) == ("from n", "provider")
        assert await scene.text(FIRST, SECOND, THIRD) == ("from n", "provider")
        scene.below.up = {"m"}
        assert await scene.text(FIRST) == ("from m", "provider")
        assert await scene.text(FIRST, SECOND) == ("from m", "cache")  # the better answer is there now

    run(main)


def test_a_refresh_that_a_fallback_answers_is_what_the_chain_says_from_then_on() -> None:
    async def main() -> None:
        scene = chained("m", "n")
        assert await scene.text(FIRST, SECOND) == ("from m", "provider")
        scene.below.up = {"n"}
        assert await scene.text(FIRST, SECOND, cache="refresh") == ("from n", "provider")
        assert await scene.text(FIRST, SECOND) == ("from n", "cache")

    run(main)


def test_links_that_are_not_used_in_turn_are_not_the_first() -> None:
    async def main() -> None:
        scene = chained("n")
        disabled, rescue = Link(endpoint=FIRST, disabled=True), Link(endpoint=THIRD, only_on=frozenset({"refused"}))
        assert await scene.text(disabled, SECOND) == ("from n", "provider")
        assert await scene.text(SECOND) == ("from n", "cache")
        assert await scene.text(rescue, SECOND) == ("from n", "cache")
        _, raised = await scene.asked(FIRST)
        assert raised is DOWN
        _, raised = await scene.asked(disabled)
        assert raised is DOWN

    run(main)


def test_the_order_of_a_chain_is_part_of_its_key() -> None:
    async def main() -> None:
        scene = chained("o")
        assert await scene.text(FIRST, SECOND, THIRD) == ("from o", "provider")
        assert await scene.text(FIRST, THIRD, SECOND) == ("from o", "provider")
        refusal = Link(endpoint=THIRD, only_on=frozenset({"refused"}))
        assert await scene.text(FIRST, SECOND, refusal) == ("from o", "provider")
        assert await scene.text(FIRST, SECOND, THIRD) == ("from o", "cache")

    run(main)


def test_an_endpoint_is_told_by_what_it_is() -> None:
    async def main() -> None:
        scene = chained("m")
        assert await scene.text(FIRST, SECOND) == ("from m", "provider")
        assert await scene.text(dataclasses.replace(FIRST), SECOND) == ("from m", "cache")

    run(main)
