"""llmkit.flight: identical calls in flight reach the provider once, and nobody is left without an end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import threading
from decimal import Decimal

import pytest

from llmkit import errors
from llmkit.answer import Answer
from llmkit.call import Attempt, Timeouts
from llmkit.clock import SystemClock
from llmkit.failure import copied, read_back, written_out
from llmkit.flight import _STATE, FlightFailed, SingleFlight
from llmkit.reply import Chunk, Head, Reply, Usage, settled
from llmkit.state.flights import FileFlights
from llmkit.testing import FakeClock
from tests.layers.script import call_for, run


@pytest.fixture(autouse=True)
def no_flight_is_left_over():
    yield
    assert _STATE.flights == {}


class Wire:
    """A provider whose answers arrive when the test says so. One item an attempt: `Attempt`'s events by its number."""

    def __init__(self):
        self.asked = 0
        self.closed = []
        self._queues = {}

    def queue(self, number):
        return self._queues.setdefault(number, asyncio.Queue())

    def say(self, *pieces, attempt=1):
        for piece in pieces:
            self.queue(attempt).put_nowait(piece)

    async def __call__(self, call, clock):
        self.asked += 1
        number = self.asked
        queue = self.queue(number)
        head = Head()
        call.trail.attempts_begun += 1
        started = clock.now()

        def booked(status):
            call.trail.attempts.append(
                Attempt(
                    number=1,
                    provider="test",
                    model="m",
                    status=status,
                    started=started,
                    latency_s=0.0,
                    cost_usd=Decimal("0.01"),
                )
            )

        try:
            first = await queue.get()
            if isinstance(first, BaseException):
                raise first  # noqa: TRY301 - it is booked below, like any other
        except BaseException:
            booked("failed")
            self.closed.append(number)
            raise

        async def rest():
            while (piece := await queue.get()) != "END":
                if isinstance(piece, BaseException):
                    raise piece
                yield [Chunk(piece)]
            head.finish_reason, head.model = "stop", "m-1"
            head.usage = Usage(input_tokens=3, output_tokens=7)

        async def close():
            self.closed.append(number)

        reply = Reply(call, rest(), head=head, clock=clock, first=[Chunk(first)], provider="test", close=close)

        async def ended(outcome):
            booked(outcome.status)
            reply.usage = head.usage

        await reply.at_end(ended)
        return reply


class Asking:
    def __init__(self, kitchen, call):
        self.kitchen, self.call = kitchen, call

    async def look(self):
        answer = self.kitchen.stored.get(self.kitchen.key)
        if answer is None:
            return None
        self.call.trail.saved = answer.cost
        return answer.reply(self.call, self.kitchen.clock)

    async def ask(self):
        return await self.kitchen.wire(self.call, self.kitchen.clock)

    async def store(self, outcome):
        if (answer := Answer.of(outcome, 0.0)) is not None and self.kitchen.stores:
            self.kitchen.stored[self.kitchen.key] = answer


class Kitchen:
    """Where identical calls are asked: one key, answers in a dict, and a wire."""

    def __init__(self, *, clock=None, flights=None, location="here", key="k", wire=None, stored=None, stores=True):
        self.clock = clock or FakeClock(auto=False)
        self.single = SingleFlight(location, self.clock, flights)
        self.key = key
        self.wire = wire or Wire()
        self.stored = {} if stored is None else stored
        self.stores = stores
        self.outcomes = []

    def call(self, **changes):
        return call_for(self.clock, **changes)

    async def opened(self, **changes):
        """A reply, as a client has it: recorded, and from its first token on."""
        call = self.call(**changes)

        async def hook(outcome):
            self.outcomes.append(outcome.status)

        async def asked():
            reply = await self.single.share(self.key, call, Asking(self, call))
            if reply is None:
                raise errors.NotCached("not there")
            return reply

        return await settled(asked(), hook)

    async def answered(self, **changes):
        """A reply at its end."""
        reply = await self.opened(**changes)
        await reply.read()
        return reply

    def start(self, *, whole=True, **changes):
        return asyncio.create_task(self.answered(**changes) if whole else self.opened(**changes))


async def turns(number=20):
    for _ in range(number):
        await asyncio.sleep(0)


async def texts(reply):
    return [chunk.text async for chunk in reply]


# -- followers ---------------------------------------------------------------------------------------------------------


def test_two_hundred_identical_calls_are_asked_once_and_all_get_the_answer() -> None:
    async def main() -> None:
        kitchen = Kitchen()
        tasks = [kitchen.start(stream=number % 2 == 0) for number in range(200)]
        await turns()
        kitchen.wire.say("one ", "two", "END")
        replies = await asyncio.gather(*tasks)
        assert kitchen.wire.asked == 1
        assert {reply.text for reply in replies} == {"one two"}
        assert sorted(reply.source for reply in replies) == ["coalesced"] * 199 + ["provider"]
        assert kitchen.outcomes == ["complete"] * 200
        follower = replies[-1]
        assert (follower.cost_usd, follower.attempts, follower.call.trail.saved) == (Decimal(0), (), Decimal("0.01"))
        assert (follower.usage, follower.model, follower.provider) == (
            Usage(input_tokens=3, output_tokens=7),
            "m-1",
            "test",
        )
        assert (follower.finish_reason, replies[0].cost_usd) == ("stop", Decimal("0.01"))

    run(main)


def test_different_keys_places_and_what_is_refreshed_are_asked_each() -> None:
    async def main() -> None:
        wire = Wire()
        kitchens = [Kitchen(key=f"k{number}", wire=wire) for number in range(50)]
        kitchens.append(Kitchen(location="elsewhere", key="k0", wire=wire))
        tasks = [kitchen.start() for kitchen in kitchens]
        tasks.append(kitchens[0].start(cache="refresh"))
        await turns()
        assert wire.asked == 52
        for number in range(1, 53):
            wire.say("x", "END", attempt=number)
        assert [reply.source for reply in await asyncio.gather(*tasks)] == ["provider"] * 52

    run(main)


def test_one_that_streams_gets_each_piece_as_it_arrives_and_what_was_before_it_joined() -> None:
    async def main() -> None:
        kitchen = Kitchen()
        leader = kitchen.start(whole=False)
        await turns()
        kitchen.wire.say("one ", "two ")
        leading = await leader
        early = await asyncio.wait_for(kitchen.opened(), 5)
        assert (early.text, early.source, leading.source) == ("one ", "coalesced", "provider")
        reading = early.__aiter__()
        assert [(await anext(reading)).text, (await anext(reading)).text] == ["one ", "two "]
        late = await kitchen.opened()
        assert late.text == "one two "
        kitchen.wire.say("three", "END")
        assert (await anext(reading)).text == "three"
        assert (await late.read(), await early.read(), await leading.read()) == ("one two three",) * 3
        assert kitchen.wire.asked == 1

    run(main)


def test_one_that_wants_the_whole_waits_for_the_end() -> None:
    async def main() -> None:
        kitchen = Kitchen()
        leader = kitchen.start()
        await turns()
        whole = kitchen.start(stream=False, whole=False)
        kitchen.wire.say("one ")
        await turns()
        assert not whole.done()
        kitchen.wire.say("two", "END")
        assert ((await whole).text, (await leader).text) == ("one two", "one two")

    run(main)


def test_a_leader_whose_reader_pauses_does_not_hold_up_who_follows() -> None:
    async def main() -> None:
        kitchen = Kitchen()
        leader = kitchen.start(whole=False)
        await turns()
        kitchen.wire.say("one ", "two", "END")
        paused = await leader  # and nobody reads on
        follower = await asyncio.wait_for(kitchen.answered(), 5)
        assert follower.text == "one two"
        assert paused.outcome is not None
        assert await texts(paused) == ["one ", "two"]

    run(main)


def test_across_threads_and_loops() -> None:
    clock, wire, stored = SystemClock(), Wire(), {}
    began, joined = threading.Event(), threading.Barrier(4)
    results = {}

    async def lead() -> None:
        kitchen = Kitchen(clock=clock, wire=wire, stored=stored)
        task = kitchen.start()
        await turns()
        began.set()
        await asyncio.to_thread(joined.wait, 10)
        wire.say("one ")
        await turns()
        wire.say("two", "END")
        results["lead"] = (await task).source

    async def follow(number: int) -> None:
        kitchen = Kitchen(clock=clock, wire=wire, stored=stored)
        task = kitchen.start(stream=bool(number % 2))
        await turns()
        await asyncio.to_thread(joined.wait, 10)
        reply = await task
        results[number] = (reply.source, reply.text)

    threads = [threading.Thread(target=asyncio.run, args=(lead(),))]
    threads[0].start()
    assert began.wait(10)
    threads += [threading.Thread(target=asyncio.run, args=(follow(number),)) for number in range(3)]
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert wire.asked == 1
    assert results == {"lead": "provider", **dict.fromkeys(range(3), ("coalesced", "one two"))}


def test_what_is_stored_between_the_miss_and_the_flight_is_a_hit() -> None:
    async def main() -> None:
        kitchen = Kitchen()
        first = kitchen.start()
        await turns()
        kitchen.wire.say("one", "END")
        await first
        again = await kitchen.answered()
        assert (again.source, again.text, kitchen.wire.asked) == ("cache", "one", 1)

    run(main)


def test_only_follows_and_never_asks() -> None:
    async def main() -> None:
        kitchen = Kitchen()
        with pytest.raises(errors.NotCached):
            await kitchen.opened(cache="only")
        leader = kitchen.start()
        await turns()
        followers = [kitchen.start(cache="only"), kitchen.start(cache="only", stream=False)]
        await turns()
        kitchen.wire.say("one", "END")
        assert [(await each).source for each in followers] == ["coalesced"] * 2
        await leader
        assert kitchen.wire.asked == 1

    run(main)


def test_only_is_told_when_nobody_asks_any_longer() -> None:
    async def main() -> None:
        kitchen = Kitchen()
        leader = kitchen.start()
        await turns()
        silent, showing = kitchen.start(cache="only", stream=False), kitchen.start(cache="only", whole=False)
        kitchen.wire.say("one ", errors.TotalTimeout("the leader's own", limit=1.0))
        reply = await showing
        with pytest.raises(errors.TotalTimeout):
            await leader
        with pytest.raises(errors.NotCached):
            await silent
        with pytest.raises(errors.StreamBroken) as caught:
            await reply.read()
        assert (caught.value.text_so_far, kitchen.wire.asked) == ("one ", 1)

    run(main)


# -- who leaves --------------------------------------------------------------------------------------------------------


def test_a_follower_that_is_cancelled_or_closed_touches_nobody() -> None:
    async def main() -> None:
        kitchen = Kitchen()
        leader = kitchen.start()
        await turns()
        waiting, other = kitchen.start(stream=False), kitchen.start()
        streaming = kitchen.start(whole=False)
        kitchen.wire.say("one ")
        closing = await streaming
        waiting.cancel()
        await closing.aclose()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert (closing.outcome.status, closing.text) == ("aborted", "one ")
        kitchen.wire.say("two", "END")
        assert ((await leader).text, (await other).text, kitchen.wire.asked) == ("one two", "one two", 1)
        assert kitchen.wire.closed == [1]

    run(main)


def test_a_follower_has_a_deadline_of_its_own() -> None:
    async def main() -> None:
        clock = FakeClock(auto=False)
        kitchen = Kitchen(clock=clock)
        leader = kitchen.start()
        await turns()
        short = Timeouts(total=5.0, first_token=None)
        silent, whole = kitchen.start(timeouts=short), kitchen.start(timeouts=short, stream=False)
        await clock.advance(4.0)
        kitchen.wire.say("one ")
        await clock.settle()
        unread = await kitchen.opened(timeouts=Timeouts(total=3.0))
        await clock.advance(1.5)
        for task in (silent, whole):
            with pytest.raises(errors.TotalTimeout, match=r"total of 5 s; an identical call") as caught:
                await task
            assert not caught.value.maybe_billed
        assert unread.outcome is None
        await clock.advance(2.0)
        assert (unread.outcome.status, type(unread.outcome.error)) == ("failed", errors.TotalTimeout)
        kitchen.wire.say("two", "END")
        assert ((await leader).text, kitchen.wire.asked) == ("one two", 1)

    run(main)


def test_the_first_token_is_awaited_as_long_as_of_each_attempt_of_the_leader() -> None:
    async def main() -> None:
        clock = FakeClock(auto=False)
        kitchen = Kitchen(clock=clock)
        leading = kitchen.call(timeouts=Timeouts(total=None, first_token=None))
        leader = asyncio.create_task(kitchen.single.share("k", leading, Asking(kitchen, leading)))
        await turns()
        follower = kitchen.start(timeouts=Timeouts(total=None, first_token=10.0))
        await clock.advance(9.0)
        leading.trail.attempts_begun += 1  # the leader tries again
        await clock.advance(9.0)
        assert not follower.done()
        await clock.advance(2.1)
        with pytest.raises(errors.FirstTokenTimeout, match=r"no first token within 10 s"):
            await follower
        kitchen.wire.say("one", "END")
        assert await (await leader).read() == "one"

    run(main)


def test_a_leader_that_is_closed_is_read_on_for_its_followers() -> None:
    async def main() -> None:
        kitchen = Kitchen()
        leader = kitchen.start(whole=False)
        await turns()
        kitchen.wire.say("one ")
        leading = await leader
        follower = kitchen.start()
        await turns()
        await leading.aclose()
        assert (leading.outcome, leading.is_left, kitchen.wire.closed) == (None, True, [])
        kitchen.wire.say("two", "END")
        assert ((await follower).text, kitchen.wire.asked) == ("one two", 1)
        assert (leading.outcome.status, leading.cost_usd) == ("complete", Decimal("0.01"))

    run(main)


def test_a_leader_whose_reader_is_cancelled_in_mid_stream_is_read_on_for_its_followers() -> None:
    async def main() -> None:
        kitchen = Kitchen()
        leader = kitchen.start(stream=False)
        await turns()
        kitchen.wire.say("one ")
        await turns()
        follower = kitchen.start()
        await turns()
        kitchen.wire.say("two ")
        await turns()
        leader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leader
        assert kitchen.wire.closed == []
        kitchen.wire.say("three", "END")
        assert ((await follower).text, kitchen.wire.asked) == ("one two three", 1)
        assert kitchen.outcomes == ["complete"] * 2

    run(main)


def test_a_leader_whose_reader_is_cancelled_when_its_followers_have_left_ends_at_once() -> None:
    async def main() -> None:
        kitchen = Kitchen()
        leader = kitchen.start(stream=False)
        await turns()
        kitchen.wire.say("one ")
        await turns()
        follower = await kitchen.opened()
        kitchen.wire.say("two ")
        await turns()
        await follower.aclose()
        leader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leader
        assert (kitchen.wire.closed, kitchen.outcomes) == ([1], ["aborted"] * 2)

    run(main)


def test_a_leader_that_is_left_ends_with_its_last_follower() -> None:
    async def main() -> None:
        kitchen = Kitchen()
        leader = kitchen.start(whole=False)
        await turns()
        kitchen.wire.say("one ")
        leading = await leader
        follower = await kitchen.opened()
        await leading.aclose()
        assert leading.outcome is None
        await follower.aclose()
        await turns()
        assert (leading.outcome.status, kitchen.wire.closed, kitchen.outcomes) == ("aborted", [1], ["aborted"] * 2)

    run(main)


def test_a_leader_without_followers_ends_at_once_when_it_is_closed_cancelled_or_dropped() -> None:
    async def main() -> None:
        kitchen = Kitchen()
        for number, how in enumerate(("close", "cancel", "drop"), 1):
            leader = kitchen.start(whole=False)
            await turns()
            kitchen.wire.say("one ", attempt=number)
            reply = await leader
            del leader
            if how == "close":
                await reply.aclose()
            elif how == "cancel":
                reading = asyncio.create_task(reply.read())
                await turns()
                reading.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await reading
                del reading
            await turns()  # what runs now was woken by the task, and holds it
            del reply
            gc.collect()
            await turns()
            assert kitchen.wire.closed == list(range(1, number + 1)), how
        assert kitchen.outcomes == ["aborted"] * 3

    run(main)


def test_a_follower_that_is_dropped_follows_no_longer() -> None:
    async def main() -> None:
        kitchen = Kitchen()
        leader = kitchen.start(whole=False)
        await turns()
        kitchen.wire.say("one ")
        leading = await leader
        follower = await kitchen.opened()
        await turns()
        assert len(_STATE.flights[("here", "k")].followers) == 1
        del follower
        gc.collect()
        await turns()
        assert _STATE.flights[("here", "k")].followers == []
        await leading.aclose()
        assert kitchen.wire.closed == [1]

    run(main)


def test_a_closed_client_ends_what_is_read_on() -> None:
    async def main() -> None:
        kitchen = Kitchen()
        leader = kitchen.start(whole=False)
        await turns()
        kitchen.wire.say("one ")
        leading = await leader
        follower = kitchen.start(timeouts=Timeouts(total=None))
        await turns()
        await leading.aclose()
        await kitchen.single.aclose()
        assert leading.outcome.status == "aborted"
        kitchen.wire.say("one two", "END", attempt=2)
        assert ((await follower).text, kitchen.wire.asked) == ("one two", 2)

    run(main)


# -- who takes over ----------------------------------------------------------------------------------------------------


def dies_cancelled(kitchen, leader):
    leader.cancel()


def dies_of_its_deadline(kitchen, leader):
    kitchen.wire.say(errors.TotalTimeout("the leader's own deadline", limit=1.0))


def dies_of_its_cap(kitchen, leader):
    error = errors.BudgetExceeded("the leader's own cap", scope="request", limit=1, needed=2)
    kitchen.wire.say(error)


def dies_of_a_bug(kitchen, leader):
    kitchen.wire.say(ZeroDivisionError("a bug"))


DEATHS = [dies_cancelled, dies_of_its_deadline, dies_of_its_cap, dies_of_a_bug]


@pytest.mark.parametrize("dies", DEATHS)
def test_before_the_first_token_one_takes_over_and_the_others_follow_it(dies) -> None:
    async def main() -> None:
        kitchen = Kitchen()
        leader = kitchen.start()
        await turns()
        followers = [kitchen.start(stream=number % 2 == 0) for number in range(20)]
        await turns()
        dies(kitchen, leader)
        with contextlib.suppress(BaseException):
            await leader
        await turns()
        assert kitchen.wire.asked == 2
        kitchen.wire.say("one ", "two", "END", attempt=2)
        replies = await asyncio.gather(*followers)
        assert kitchen.wire.asked == 2
        assert {reply.text for reply in replies} == {"one two"}
        assert sorted(reply.source for reply in replies) == ["coalesced"] * 19 + ["provider"]
        assert sum(reply.cost_usd for reply in replies) == Decimal("0.01")

    run(main)


@pytest.mark.parametrize("dies", DEATHS[1:])
def test_in_mid_stream_one_that_has_shown_nothing_takes_over(dies) -> None:
    async def main() -> None:
        kitchen = Kitchen()
        leader = kitchen.start()
        await turns()
        showing, silent = kitchen.start(whole=False), kitchen.start(stream=False)
        kitchen.wire.say("one ", "two ")
        shown = await showing
        await turns()
        dies(kitchen, leader)
        with contextlib.suppress(BaseException):
            await leader
        await turns()
        kitchen.wire.say("one t", "wo three", "END", attempt=2)
        assert await shown.read() == "one two three"
        taken = await silent
        assert (taken.text, taken.source, shown.source, kitchen.wire.asked) == (
            "one two three",
            "provider",
            "coalesced",
            2,
        )

    run(main)


def test_what_one_has_shown_goes_on_seamlessly_where_the_new_answer_begins_with_it() -> None:
    async def main() -> None:
        kitchen = Kitchen()
        leader = kitchen.start()
        await turns()
        showing = kitchen.start(whole=False)
        kitchen.wire.say("one ", "two ")
        shown = await showing
        reading = asyncio.create_task(texts(shown))
        await turns()
        dies_of_its_deadline(kitchen, leader)
        with pytest.raises(errors.TotalTimeout):
            await leader
        await turns()
        kitchen.wire.say("one two th", "ree", "END", attempt=2)
        assert await reading == ["one ", "two ", "th", "ree"]
        assert (shown.text, shown.source, shown.cost_usd) == ("one two three", "provider", Decimal("0.01"))
        assert (shown.usage.output_tokens, shown.finish_reason, shown.outcome.status) == (7, "stop", "complete")
        assert kitchen.stored["k"].text == "one two three"

    run(main)


@pytest.mark.parametrize("answer", [("another",), ("on",), ("one tw",)])
def test_a_new_answer_that_begins_differently_breaks_what_was_shown_and_says_so(answer) -> None:
    async def main() -> None:
        kitchen = Kitchen()
        leader = kitchen.start()
        await turns()
        showing = kitchen.start(whole=False)
        kitchen.wire.say("one ", "two ")
        shown = await showing
        reading = asyncio.create_task(shown.read())
        await turns()
        dies_of_its_deadline(kitchen, leader)
        with pytest.raises(errors.TotalTimeout):
            await leader
        await turns()
        kitchen.wire.say(*answer, "END", attempt=2)
        with pytest.raises(errors.StreamBroken, match="begins differently") as caught:
            await reading
        assert (caught.value.text_so_far, shown.text) == ("one two ", "one two ")
        assert kitchen.outcomes.count("failed") == 2
        assert kitchen.wire.closed == [1, 2]

    run(main)


def test_a_follower_that_took_over_and_died_is_followed_by_the_next() -> None:
    async def main() -> None:
        kitchen = Kitchen()
        tasks = [kitchen.start() for _ in range(5)]
        await turns()
        for number in range(4):
            tasks[number].cancel()
            await turns()
            assert kitchen.wire.asked == number + 2
        kitchen.wire.say("one", "END", attempt=5)
        assert (await tasks[4]).source == "provider"
        await asyncio.gather(*tasks, return_exceptions=True)

    run(main)


def test_a_leader_whose_loop_is_gone_without_a_word_is_taken_over() -> None:
    clock = FakeClock(auto=False)
    wire = Wire()
    loop = asyncio.new_event_loop()
    kitchen = Kitchen(clock=clock, wire=wire)
    kept = []

    async def lead() -> None:
        kept.append(kitchen.start())
        await turns()

    loop.run_until_complete(lead())  # and it stands still from now on

    async def main() -> None:
        follower = kitchen.start(timeouts=Timeouts(total=None, first_token=None))
        await clock.advance(4.5)
        assert wire.asked == 1
        await clock.advance(1.0)
        assert wire.asked == 2
        wire.say("one", "END", attempt=2)
        assert (await follower).source == "provider"

    run(main)
    kept.pop().cancel()
    loop.run_until_complete(turns())
    loop.close()


# -- failures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        errors.ProviderOverloaded("503", provider="p", model="m", status=503, retry_after=2.0),
        errors.AllModelsFailed("none of 2", [errors.ProviderOverloaded("a"), errors.Refused("b", reason="r")]),
        errors.FirstTokenTimeout("hangs", limit=30.0, maybe_billed=True),
    ],
)
def test_a_failure_of_the_provider_is_shared_at_once_and_each_gets_an_error_of_its_own(error) -> None:
    async def main() -> None:
        kitchen = Kitchen()
        tasks = [kitchen.start(stream=number % 2 == 0) for number in range(20)]
        await turns()
        kitchen.wire.say(error)
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert kitchen.wire.asked == 1
        assert {type(each) for each in found} == {type(error)}
        assert len({id(each) for each in found}) == 20
        assert found[0] is error
        assert {each.message for each in found} == {error.message}
        assert not any(getattr(each, "maybe_billed", False) for each in found[1:])
        assert kitchen.outcomes == ["failed"] * 20

    run(main)


def test_a_stream_that_breaks_breaks_for_all_with_the_text_that_each_has() -> None:
    async def main() -> None:
        kitchen = Kitchen()
        leader = kitchen.start()
        await turns()
        follower = kitchen.start()
        kitchen.wire.say("one ", errors.StreamBroken("cut", provider="p"))
        for task in (leader, follower):
            with pytest.raises(errors.StreamBroken) as caught:
                await task
            assert (caught.value.text_so_far, caught.value.reply.text) == ("one ", "one ")
        assert caught.value.spent == Decimal(0)
        assert kitchen.wire.asked == 1

    run(main)


def test_what_the_leaders_cap_has_cut_is_cut_for_all() -> None:
    async def main() -> None:
        kitchen = Kitchen()
        leader = kitchen.start(whole=False)
        await turns()
        kitchen.wire.say("one ")
        leading = await leader
        follower = kitchen.start()
        await turns()
        leading.cut = "max_cost"
        kitchen.wire.say("two", "END")
        reply = await follower
        assert (reply.text, reply.finish_reason, reply.outcome.status) == ("one two", "max_cost", "aborted")
        assert kitchen.stored == {}

    run(main)


def test_an_answer_that_is_not_worth_storing_is_shared_all_the_same() -> None:
    async def main() -> None:
        kitchen = Kitchen(stores=False)
        tasks = [kitchen.start() for _ in range(3)]
        await turns()
        kitchen.wire.say("one", "END")
        assert [reply.text for reply in await asyncio.gather(*tasks)] == ["one"] * 3
        assert (kitchen.wire.asked, kitchen.stored) == (1, {})

    run(main)


@pytest.mark.parametrize(
    "error",
    [
        errors.ProviderRateLimited("429", provider="p", model="m", status=429, retryable=True, retry_after=1.5),
        errors.FirstTokenTimeout("slow", limit=3.0),
        errors.StreamBroken("cut", text_so_far="secret of the leader"),
        errors.EmptyReply("nothing", reasoning_tokens=5),
        errors.Refused("no", reason="policy"),
        errors.AllModelsFailed(
            "none", [errors.BadResponse("x"), errors.CircuitOpen("o", endpoint="e", state="open", retry_after=1.0)]
        ),
    ],
)
def test_a_failure_survives_the_way_to_another_process(error) -> None:
    twin = read_back(written_out(error))
    assert (type(twin), twin.message, twin.next_step) == (type(error), error.message, error.next_step)
    for name in ("provider", "model", "status", "retryable", "retry_after", "limit", "reasoning_tokens", "reason"):
        assert getattr(twin, name, None) == getattr(error, name, None)
    assert getattr(twin, "text_so_far", "") == ""
    assert [type(each) for each in getattr(twin, "errors", ())] == [type(each) for each in getattr(error, "errors", ())]
    assert type(copied(twin)) is type(error)
    assert twin.block()


@pytest.mark.parametrize(
    "failure",
    [
        None,
        "",
        "{",
        "[]",
        '"x"',
        '{"kind": "ProviderOverloaded"}',
        '{"kind": "SystemExit", "message": "x"}',
        '{"kind": "__all__", "message": "x"}',
        '{"kind": ["x"], "message": "x"}',
        '{"kind": "ConfigError", "message": "x"}',
        '{"kind": "BadResponse", "message": 5}',
        '{"kind": "AllModelsFailed", "message": "x", "errors": []}',
        '{"kind": "AllModelsFailed", "message": "x", "errors": [{"kind": "AllModelsFailed"}]}',
        "[" * 100_000,
    ],
)
def test_a_failure_that_cannot_be_read_is_none(failure) -> None:
    assert read_back(failure) is None


def test_what_another_process_says_of_a_failure_is_bounded_and_printable() -> None:
    error = read_back(
        '{"kind": "BadResponse", "message": "a\\u001b[31m' + "x" * 9999 + '", "status": 1e400, "provider": 7}'
    )
    assert len(error.message) <= 2000
    assert error.message.isprintable()
    assert (error.status, error.provider) == (None, "")


# -- other processes ---------------------------------------------------------------------------------------------------


class Remote:
    """Another process's flights, as this one sees them."""

    def __init__(self):
        self.claimed = True
        self.published = asyncio.Queue()
        self.follows = 0
        self.released = []
        self.sent = []
        self.followed = False

    async def claim(self, key):
        return None if self.claimed else self

    async def publish(self, pieces):
        self.sent += pieces

    async def release(self, failure=None):
        self.released.append(failure)

    async def follow(self, key):
        self.follows += 1
        while (pieces := await self.published.get()) is not None:
            if isinstance(pieces, Exception):
                raise pieces
            yield pieces

    async def aclose(self):
        """Nothing is open."""


def test_where_another_process_asks_one_relays_and_all_follow() -> None:
    async def main() -> None:
        remote = Remote()
        kitchen = Kitchen(flights=remote)
        tasks = [kitchen.start(stream=number % 2 == 0) for number in range(10)]
        await turns()
        remote.published.put_nowait([("one ", "")])
        streaming = await kitchen.opened()
        assert streaming.text == "one "
        answer = Answer("one two", "", "m-1", "test", "stop", Usage(3, 7), "", Decimal("0.02"), 0.0)
        kitchen.stored["k"] = answer
        remote.published.put_nowait(None)
        replies = await asyncio.gather(*tasks)
        assert await streaming.read() == "one two"
        assert (kitchen.wire.asked, remote.follows) == (0, 1)
        assert {(reply.text, reply.source, reply.model) for reply in replies} == {("one two", "coalesced", "m-1")}
        assert {reply.call.trail.saved for reply in replies} == {Decimal("0.02")}

    run(main)


def test_who_relays_may_leave_and_another_one_relays() -> None:
    async def main() -> None:
        remote = Remote()
        kitchen = Kitchen(flights=remote)
        first, second = kitchen.start(), kitchen.start()
        await turns()
        first.cancel()
        await turns()
        assert remote.follows == 2
        remote.claimed = False
        remote.published.put_nowait(None)
        await turns()
        kitchen.wire.say("one", "END")
        assert (await second).source == "provider"
        assert (kitchen.wire.asked, remote.released) == (1, [None])
        await asyncio.gather(first, return_exceptions=True)

    run(main)


def test_a_failure_in_another_process_is_shared() -> None:
    async def main() -> None:
        remote = Remote()
        kitchen = Kitchen(flights=remote)
        tasks = [kitchen.start() for _ in range(5)]
        await turns()
        remote.published.put_nowait(FlightFailed(written_out(errors.ProviderOverloaded("503", status=503))))
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert [(type(each), each.status) for each in found] == [(errors.ProviderOverloaded, 503)] * 5
        assert kitchen.wire.asked == 0

    run(main)


def test_a_failure_here_is_told_to_other_processes_and_an_abandoned_call_is_not() -> None:
    async def main() -> None:
        remote = Remote()
        remote.claimed = False
        kitchen = Kitchen(flights=remote)
        leader = kitchen.start()
        await turns()
        kitchen.wire.say(errors.ProviderOverloaded("503", status=503))
        await asyncio.gather(leader, return_exceptions=True)
        leader = kitchen.start()
        await turns()
        leader.cancel()
        await asyncio.gather(leader, return_exceptions=True)
        assert [None if each is None else read_back(each).status for each in remote.released] == [503, None]

    run(main)


def test_followers_elsewhere_are_seen_a_few_times_a_second_and_a_left_leader_is_read_on_for_them() -> None:
    async def main() -> None:
        clock = FakeClock(auto=False)
        remote = Remote()
        remote.claimed = False
        kitchen = Kitchen(clock=clock, flights=remote)
        leader = kitchen.start(whole=False)
        await turns()
        kitchen.wire.say("one ")
        leading = await leader
        await clock.advance(0.6)
        assert remote.sent == []
        remote.followed = True
        await clock.advance(0.5)
        assert [text for text, _ in remote.sent] == ["one "]
        kitchen.wire.say("two ")
        await clock.advance(0.06)
        assert [text for text, _ in remote.sent] == ["one ", "two "]
        await leading.aclose()
        assert leading.is_left
        remote.followed = False
        await clock.advance(0.5)
        assert leading.outcome.status == "aborted"
        assert remote.released == [None]

    run(main)


def test_a_refresh_does_not_follow_another_process_and_only_never_asks() -> None:
    async def main() -> None:
        remote = Remote()
        kitchen = Kitchen(flights=remote)
        refreshing = kitchen.start(cache="refresh")
        await turns()
        kitchen.wire.say("one", "END")
        assert (await refreshing).source == "provider"
        kitchen.stored.clear()
        only = kitchen.start(cache="only")
        await turns()
        assert not only.done()
        remote.claimed = False
        remote.published.put_nowait(None)
        with pytest.raises(errors.NotCached):
            await only
        assert (kitchen.wire.asked, remote.released) == (1, [None])

    run(main)


def test_flights_that_fail_leave_a_call_to_itself(caplog) -> None:
    async def main() -> None:
        remote = Remote()
        kitchen = Kitchen(flights=remote)
        follower = kitchen.start()
        await turns()
        remote.claimed = False
        remote.published.put_nowait(OSError("gone"))
        await turns()
        kitchen.wire.say("one", "END")
        assert (await follower).source == "provider"

    run(main)
    assert "cannot be followed any longer" in caplog.text


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_child_follows_nobody_of_its_parent(tmp_path) -> None:
    async def main() -> None:
        kitchen = Kitchen(flights=FileFlights(tmp_path / "ledger", SystemClock()))
        leader = kitchen.start()
        await turns()
        child = os.fork()
        if not child:
            os._exit(len(_STATE.flights))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0  # noqa: ASYNC222
        kitchen.wire.say("one", "END")
        assert (await leader).text == "one"
        await kitchen.single.aclose()

    run(main)
