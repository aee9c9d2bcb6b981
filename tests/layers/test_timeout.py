"""llmkit.layers.timeout: a hang at any point ends on time."""

from __future__ import annotations

import asyncio

import pytest

from llmkit.call import Timeouts
from llmkit.errors import FirstTokenTimeout, IdleTimeout, TotalTimeout
from llmkit.layers.timeout import Timeout
from llmkit.testing import FakeClock
from tests.layers.script import HANG, Script, call_for, chain, outcomes, run


@pytest.mark.parametrize(
    ("script", "limits", "error", "limit"),
    [
        (HANG, Timeouts(first_token=3, total=60), FirstTokenTimeout, 3),
        (HANG, Timeouts(first_token=None, total=60), TotalTimeout, 60),
        (HANG, Timeouts(first_token=90, total=60), TotalTimeout, 60),
        (["a", HANG], Timeouts(first_token=3, idle=7, total=60), IdleTimeout, 7),
        (["a", "b", "c", HANG], Timeouts(first_token=3, idle=7, total=60), IdleTimeout, 7),
        (["a", HANG], Timeouts(idle=None, total=60), TotalTimeout, 60),
    ],
)
def test_a_hang_ends_on_time(script: object, limits: Timeouts, error: type, limit: float) -> None:
    async def main() -> None:
        clock = FakeClock()
        below = Script(clock, script)
        reply, raised, seen = await outcomes(chain(Timeout(clock), below), call_for(clock, timeouts=limits))
        assert type(raised) is error
        assert raised.limit == limit
        assert clock.now() == pytest.approx(limit)
        assert seen == ["failed"]
        assert below.open == 0
        if reply is not None:
            assert reply.text
            assert raised.reply is reply

    run(main)


def test_an_unstreamed_call_may_think_until_its_total_unless_the_user_set_the_limit() -> None:
    async def main() -> None:
        for chosen, kind, when in ((False, TotalTimeout, 120), (True, FirstTokenTimeout, 30)):
            clock = FakeClock()
            limits = Timeouts(first_token_set=chosen)
            call = call_for(clock, timeouts=limits, stream=False)
            _, raised, _ = await outcomes(chain(Timeout(clock), Script(clock, HANG)), call)
            assert type(raised) is kind
            assert clock.now() == pytest.approx(when)

    run(main)


def test_slow_chunks_within_the_limit_are_no_hang() -> None:
    async def main() -> None:
        clock = FakeClock()
        call = call_for(clock, timeouts=Timeouts(first_token=3, idle=5, total=None))

        async def slow(call):  # a chunk every 4 s, many times the first-token limit in all
            reply = await Script(clock, ["0"])(call)

            async def rest():
                for i in range(1, 10):
                    await clock.sleep(4)
                    from llmkit.reply import Chunk

                    yield [Chunk(str(i))]

            reply._batches = rest()
            return reply

        reply, raised, _ = await outcomes(chain(Timeout(clock), slow), call)
        assert raised is None
        assert reply.text == "0123456789"

    run(main)


def test_a_reader_who_dawdles_is_not_an_idle_provider_but_the_deadline_frees_the_connection() -> None:
    async def main() -> None:
        clock = FakeClock()
        below = Script(clock, ["a", "b", "c"])
        reply = await chain(Timeout(clock), below)(call_for(clock, timeouts=Timeouts(idle=5, total=60)))
        await clock.sleep(50)
        assert reply.outcome is None
        await clock.sleep(20)
        assert reply.outcome.status == "failed"
        assert isinstance(reply.outcome.error, TotalTimeout)
        assert below.open == 0

    run(main)


def test_a_cancellation_from_outside_stays_one() -> None:
    async def main() -> None:
        clock = FakeClock(auto=False)
        below = Script(clock, ["a", HANG])
        reply = await chain(Timeout(clock), below)(call_for(clock))
        reading = asyncio.create_task(reply.read())
        await clock.settle()
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert reply.outcome.status == "aborted"
        assert below.open == 0

    run(main)


def test_a_quick_reply_leaves_no_timer_behind() -> None:
    async def main() -> None:
        clock = FakeClock()
        reply, raised, seen = await outcomes(chain(Timeout(clock), Script(clock, ["a", "b"])), call_for(clock))
        assert (reply.text, raised, seen) == ("ab", None, ["complete"])
        await clock.sleep(1e6)
        assert reply.outcome.status == "complete"

    run(main)
