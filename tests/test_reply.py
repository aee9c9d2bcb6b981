"""llmkit.reply: it exists from its first token on, and ends exactly once."""

from __future__ import annotations

import asyncio
import gc
import json

import pytest

from llmkit import errors
from llmkit.reply import Chunk, Outcome, Reply, Usage, settled
from llmkit.testing import FakeClock
from tests.layers.script import HANG, Script, call_for, run


async def begun(clock: FakeClock, *pieces: object) -> tuple[Reply, Script, list[Outcome]]:
    below = Script(clock, list(pieces))
    seen: list[Outcome] = []

    async def hook(outcome: Outcome) -> None:
        seen.append(outcome)

    reply = await settled(below(call_for(clock)), hook)
    return reply, below, seen


def test_it_is_there_at_the_first_token_and_complete_at_its_end() -> None:
    async def main() -> None:
        reply, below, seen = await begun(FakeClock(), "a", "b", "c")
        assert (reply.outcome, reply.text, below.open, seen) == (None, "a", 1, [])
        assert [chunk.text async for chunk in reply] == ["a", "b", "c"]
        assert reply.outcome.status == "complete"
        assert [outcome.status for outcome in seen] == ["complete"]
        assert (below.open, below.closed) == (0, 1)
        assert [chunk.text async for chunk in reply] == ["a", "b", "c"]
        assert await reply.read() == str(reply) == "abc"
        assert below.closed == 1

    run(main)


def test_two_readers_at_once_both_get_everything() -> None:
    async def main() -> None:
        reply, _, seen = await begun(FakeClock(), *"abcdef")

        async def collect() -> str:
            return "".join([chunk.text async for chunk in reply])

        assert await asyncio.gather(collect(), collect(), reply.read()) == ["abcdef"] * 3
        assert len(seen) == 1

    run(main)


def test_closed_early_it_is_aborted_and_keeps_what_had_arrived() -> None:
    async def main() -> None:
        reply, below, seen = await begun(FakeClock(), "a", "b", "c")
        await reply.aclose()
        await reply.aclose()
        assert [outcome.status for outcome in seen] == ["aborted"]
        assert (reply.text, below.open) == ("a", 0)
        assert await reply.read() == "a"

    run(main)


def test_closing_frees_a_reader_that_waits() -> None:
    async def main() -> None:
        reply, below, seen = await begun(FakeClock(auto=False), "a", HANG)
        reading = asyncio.create_task(reply.read())
        await asyncio.sleep(0)
        await reply.aclose()
        assert await reading == "a"
        assert not reading.cancelled()
        assert (below.open, seen[0].status) == (0, "aborted")

    run(main)


def test_a_cancelled_reader_aborts_it() -> None:
    async def main() -> None:
        reply, below, seen = await begun(FakeClock(auto=False), "a", HANG)
        reading = asyncio.create_task(reply.read())
        await asyncio.sleep(0)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert (below.open, [outcome.status for outcome in seen]) == (0, ["aborted"])

    run(main)


def test_left_without_closing_it_is_aborted() -> None:
    async def main() -> None:
        reply, below, seen = await begun(FakeClock(), "a", "b", "c")
        async for _ in reply:
            break
        del reply
        gc.collect()
        for _ in range(10):
            await asyncio.sleep(0)
        assert (below.open, [outcome.status for outcome in seen]) == (0, ["aborted"])

    run(main)


def test_broken_it_raises_what_broke_it_and_keeps_the_text() -> None:
    async def main() -> None:
        broken = errors.StreamBroken("cut")
        reply, below, seen = await begun(FakeClock(), "a", "b", broken)
        with pytest.raises(errors.StreamBroken) as caught:
            await reply.read()
        assert caught.value is broken
        assert (broken.text_so_far, broken.reply, broken.request_id) == ("ab", reply, "r1")
        assert "2 characters" in broken.block()
        assert (seen[0].status, seen[0].error, below.open) == ("failed", broken, 0)
        arrived = []
        with pytest.raises(errors.StreamBroken):
            async for chunk in reply:
                arrived.append(chunk.text)
        assert arrived == ["a", "b"]

    run(main)


def test_hooks_run_innermost_first_after_the_source_is_closed_and_one_that_fails_stops_nothing() -> None:
    async def main() -> None:
        clock, order = FakeClock(), []
        below = Script(clock, ["a"])

        def hook(name: str, fails: bool = False):
            async def run(_: Outcome) -> None:
                order.append((name, below.open))
                if fails:
                    raise ValueError(name)

            return run

        inner = settled(below(call_for(clock)), hook("inner", fails=True))
        reply = await settled(settled(inner, hook("middle")), hook("outer"))
        await reply.read()
        assert order == [("inner", 0), ("middle", 0), ("outer", 0)]

    run(main)


def test_a_hook_runs_once_when_the_reply_never_begins() -> None:
    async def main() -> None:
        clock, seen = FakeClock(auto=False), []

        async def hook(outcome: Outcome) -> None:
            seen.append((outcome.status, type(outcome.error).__name__, outcome.reply))

        with pytest.raises(errors.ProviderOverloaded):
            await settled(Script(clock, errors.ProviderOverloaded("503"))(call_for(clock)), hook)
        waiting = asyncio.create_task(settled(Script(clock, HANG)(call_for(clock)), hook))
        await clock.settle()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert seen == [("failed", "ProviderOverloaded", None), ("aborted", "CancelledError", None)]

    run(main)


def test_a_hook_on_an_ended_reply_runs_at_once() -> None:
    async def main() -> None:
        reply, _, _ = await begun(FakeClock(), "a")
        await reply.read()
        seen = []

        async def hook(outcome: Outcome) -> None:
            seen.append(outcome.status)

        await reply.at_end(hook)
        assert seen == ["complete"]

    run(main)


@pytest.mark.parametrize(
    ("finish", "reasoning", "usage", "refusal", "error", "tokens"),
    [
        ("length", "thinking", Usage(1, 200, reasoning_tokens=199), None, errors.EmptyReply, 199),
        ("length", "", None, None, errors.EmptyReply, None),
        ("stop", "", None, None, errors.EmptyReply, None),
        ("stop", "", None, "I cannot", errors.Refused, None),
        ("content_filter", "", None, None, errors.Refused, None),
    ],
)
def test_an_end_without_an_answer_is_an_error_of_its_own(finish, reasoning, usage, refusal, error, tokens) -> None:
    async def main() -> None:
        from llmkit.reply import Head

        head = Head()
        head.finish_reason, head.usage, head.refusal = finish, usage, refusal

        async def nothing():
            return
            yield []

        clock = FakeClock()
        reply = Reply(call_for(clock), nothing(), head=head, clock=clock, first=[Chunk("", reasoning)], provider="test")
        with pytest.raises(error) as caught:
            await reply.read()
        if error is errors.EmptyReply:
            assert caught.value.reasoning_tokens == tokens
            assert tokens is None or str(tokens) in caught.value.message
            assert ("reasoning" in caught.value.message) == bool(reasoning)
            assert ("limit" in caught.value.message) == (finish == "length")
            assert ("--max-tokens" in caught.value.next_step) == (finish == "length")

    run(main)


def test_through_sees_every_chunk_the_first_one_too() -> None:
    async def main() -> None:
        reply, _, _ = await begun(FakeClock(), "a", "b", "c")

        async def shout(batches):
            async for batch in batches:
                yield [Chunk(chunk.text.upper()) for chunk in batch]

        assert await reply.through(shout).read() == "ABC"

    run(main)


def test_json_takes_a_fence_off() -> None:
    async def main() -> None:
        for text in ('{"a": [1]}', '```json\n{"a": [1]}\n```', '```\n{"a": [1]}\n```  '):
            reply, _, _ = await begun(FakeClock(), text)
            await reply.read()
            assert reply.json() == {"a": [1]}
        reply, _, _ = await begun(FakeClock(), "no")
        with pytest.raises(json.JSONDecodeError):
            reply.json()

    run(main)


def test_a_reply_of_an_async_client_says_how_to_be_read() -> None:
    async def main() -> None:
        reply, _, _ = await begun(FakeClock(), "a")
        with pytest.raises(TypeError, match="async for"):
            iter(reply)
        await reply.read()

    run(main)
