"""llmkit.line: who waits for room, in which order, and for how long."""

from __future__ import annotations

import asyncio

from llmkit.account import Account
from llmkit.events import Waiting
from llmkit.line import LONGEST_WAIT_S, Line, Place
from llmkit.testing import FakeClock
from tests.layers.script import call_for


def test_the_oldest_of_a_line_is_woken_first_and_keeps_its_age_in_another_line() -> None:
    async def main() -> None:
        line = Line()
        here, there = Account("here", "here"), Account("there", "there")
        assert line.before((here, there)) is None
        first, second, third = (line.join(name, "here") for name in "abc")
        assert line.before((there, here)) == "here"
        assert (line.is_first(first), line.is_first(second)) == (True, False)
        line.ended((here,))
        await asyncio.sleep(0)
        assert [each.woken.is_set() for each in (first, second, third)] == [True, False, False]
        line.join("c", "there")
        line.join("b", "there")  # older than c, though it came later
        assert line.is_first(second)
        line.leave("b")
        line.leave("b")
        await asyncio.sleep(0)
        assert third.woken.is_set()
        line.leave("a")
        line.leave("c")
        assert line.before((here, there)) is None

    asyncio.run(main())


def test_a_loop_that_is_gone_does_not_block_the_line() -> None:
    line = Line()

    async def leave_one() -> None:
        line.join("gone", "k")

    asyncio.run(leave_one())

    async def main() -> None:
        ticket = line.join("here", "k")
        line.ended((Account("k", "k"),))
        await asyncio.sleep(0)
        assert ticket.woken.is_set()
        assert line.is_first(ticket)

    asyncio.run(main())


def test_a_place_is_given_up_when_the_time_is_up_and_says_once_that_it_waits() -> None:
    async def main() -> None:
        clock, line, reaped, events = FakeClock(), Line(), [], []

        async def reap() -> None:
            reaped.append(clock.now())

        call = call_for(clock, events=events, deadline=None)
        place = Place(clock, line, reap, call)
        began = clock.now()
        waits = 0
        while await place.wait("day", "day: full"):
            waits += 1
        assert clock.now() - began == place.waited_s == call.trail.waited_s == LONGEST_WAIT_S
        assert waits > 100
        assert len(reaped) == waits + 1  # each time: another process may have died with what it held
        said = [event for event in events if isinstance(event, Waiting)]
        assert [event.reason for event in said] == ["day: full"]

    asyncio.run(main())
