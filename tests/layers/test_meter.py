"""llmkit.layers.meter and .record: every attempt and every call is booked, however it ends."""

from __future__ import annotations

import asyncio
from decimal import Decimal

import pytest

from llmkit import errors
from llmkit.config import RetrySettings
from llmkit.events import AttemptEnded, AttemptStarted
from llmkit.layers.meter import Meter
from llmkit.layers.record import Record
from llmkit.layers.retry import Retry
from llmkit.ledger import Ledger
from llmkit.pipeline import Pipeline
from llmkit.reply import Head, Reply, Usage
from llmkit.testing import FakeClock
from tests.layers.script import HANG, Script, call_for, endpoint, outcomes, run


class Book:
    """Record, retry and meter over a script, with a ledger in memory."""

    def __init__(self, *steps: object, auto: bool = True) -> None:
        self.clock = FakeClock(auto=auto)
        self.ledger = Ledger.open("memory", self.clock)
        self.below = Script(self.clock, *steps)
        layers = [Record(self.ledger), Retry(RetrySettings(), self.clock), Meter(self.ledger, self.clock)]
        self.chain = Pipeline(layers, self.below)

    async def ask(self, **changes: object):
        return await outcomes(self.chain, call_for(self.clock, **changes))

    @property
    def call(self) -> dict:
        (row,) = self.ledger.calls()
        return row

    @property
    def attempts(self) -> list[dict]:
        return self.ledger.attempts("r1")


def test_a_good_call_is_one_call_and_one_attempt_at_its_price() -> None:
    async def main() -> None:
        book, events = Book(["a", "b"]), []
        reply, _, _ = await book.ask(events=events, user="ana", tags={"app": "docs"})
        cost = Decimal("0.000014")  # 10 tokens in at $1, 2 out at $2 a million
        assert (reply.cost_usd, reply.usage) == (cost, Usage(10, 2))
        assert [type(event) for event in events] == [AttemptStarted, AttemptEnded]
        row = book.call
        assert (row["status"], row["user"], row["tags"]) == ("complete", "ana", {"app": "docs"})
        assert (row["cost_usd"], row["attempts"], row["retries"], row["estimated"]) == (cost, 1, 0, False)
        (attempt,) = book.attempts
        assert (attempt["status"], attempt["cost_usd"], attempt["maybe_billed"]) == ("complete", cost, False)

    run(main)


def test_attempts_that_a_retry_throws_away_are_booked_too() -> None:
    async def main() -> None:
        wasted = errors.ProviderOverloaded("503", status=503, provider_request_id="req-1")
        wasted.usage = Usage(100, 0)
        book = Book(wasted, ["ok"])
        reply, _, _ = await book.ask()
        first, second = book.attempts
        assert (first["status"], first["error"], first["http_status"]) == ("failed", "ProviderOverloaded", 503)
        assert (first["provider_request_id"], first["cost_usd"]) == ("req-1", Decimal("0.0001"))
        assert second["status"] == "complete"
        assert reply.cost_usd == book.call["cost_usd"] == first["cost_usd"] + second["cost_usd"]
        assert (book.call["attempts"], book.call["retries"]) == (2, 1)

    run(main)


def test_a_broken_stream_is_booked_at_what_arrived_and_marked_as_estimated() -> None:
    async def main() -> None:
        book = Book(["one ", "two ", errors.StreamBroken("cut")])
        simulated = endpoint(simulated=True)
        call = call_for(book.clock, simulated, prompt="a b c")
        reply, raised, _ = await outcomes(book.chain, call)
        assert reply.usage == Usage(3, 2, estimated=True)
        assert raised.spent == reply.cost_usd == Decimal("0.000007")
        (attempt,) = book.attempts
        assert (attempt["output_tokens"], attempt["estimated"], attempt["maybe_billed"]) == (2, True, True)
        assert (book.call["status"], book.call["error"]) == ("failed", "StreamBroken")

    run(main)


def test_of_a_broken_stream_each_chunk_is_booked_as_a_token_or_more() -> None:
    async def main() -> None:
        book = Book([*["w "] * 40, errors.StreamBroken("cut")])
        _, raised, _ = await outcomes(book.chain, call_for(book.clock))
        assert isinstance(raised, errors.StreamBroken)
        assert raised.unseen == 1
        (attempt,) = book.attempts
        assert (attempt["output_tokens"], attempt["estimated"]) == (40, True)

    run(main)


@pytest.mark.parametrize("reported", [None, Usage(), Usage(0, 7), Usage(9, 0)])
def test_a_report_that_counts_nothing_is_counted_here(reported) -> None:
    async def main() -> None:
        book = Book(["one two", " three"])

        async def counts_nothing(call):
            reply = await book.below(call)

            async def misreported(batches):
                async for batch in batches:
                    yield batch
                reply.head.usage = reported

            return reply.watched(misreported)

        book.chain = Pipeline([Record(book.ledger), Meter(book.ledger, book.clock)], counts_nothing)
        await book.ask(prompt="how many words are there?")
        (attempt,) = book.attempts
        assert attempt["estimated"] is True
        assert attempt["input_tokens"] >= 5
        assert attempt["output_tokens"] >= 3
        assert attempt["cost_usd"] > 0

    run(main)


def test_an_answer_without_a_word_is_billed_although_nobody_reports_it() -> None:
    async def main() -> None:
        refused = errors.Refused("no", reason="no")
        book = Book(refused)
        head = Head()
        head.refusal = "I would rather not."
        refused.reply = Reply(call_for(book.clock), None, head=head, clock=book.clock)
        await book.ask(prompt="how many words are there?")
        (attempt,) = book.attempts
        assert (attempt["status"], attempt["error"], attempt["estimated"]) == ("failed", "Refused", True)
        assert attempt["input_tokens"] >= 5
        assert attempt["output_tokens"] >= 4

    run(main)


def test_a_tool_call_is_output_too() -> None:
    async def main() -> None:
        book = Book(["a"])

        async def calls_a_tool(call):
            reply = await book.below(call)
            reply.head.tool_calls.append({"function": {"name": "weather", "arguments": '{"city": "Bern", "days": 3}'}})
            return reply.watched(silent)

        async def silent(_):
            return
            yield

        book.chain = Pipeline([Record(book.ledger), Meter(book.ledger, book.clock)], calls_a_tool)
        await book.ask()
        assert book.attempts[0]["output_tokens"] >= 8

    run(main)


def test_an_attempt_that_is_cancelled_while_it_is_written_down_ends_all_the_same() -> None:
    async def main() -> None:
        book = Book(["a"], auto=False)
        written, slow = book.ledger.attempt_began, asyncio.Event()

        async def slowly(*given):
            await written(*given)
            slow.set()
            await asyncio.Event().wait()

        book.ledger.attempt_began = slowly
        task = asyncio.create_task(book.ask())
        await slow.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        (attempt,) = book.attempts
        assert (book.call["status"], attempt["status"]) == ("aborted", "aborted")
        assert not book.below.calls

    run(main)


def test_an_unknown_price_is_unknown_and_not_nothing() -> None:
    async def main() -> None:
        book = Book(["ok"])
        reply, _, _ = await outcomes(book.chain, call_for(book.clock, endpoint("mystery", price=None)))
        assert reply.cost_usd is None
        assert book.call["cost_usd"] is None
        assert book.ledger.frame()["cost_usd"].isna().all()

    run(main)


def test_a_rejected_call_has_its_row_and_no_attempt() -> None:
    async def main() -> None:
        clock = FakeClock()
        ledger = Ledger.open("memory", clock)
        refusal = errors.BudgetExceeded("cap", scope="request", limit=Decimal(1), needed=Decimal(2))
        _, raised, _ = await outcomes(Pipeline([Record(ledger)], Script(clock, refusal)), call_for(clock))
        assert raised.spent == 0
        assert "nothing" in raised.block()
        (row,) = ledger.calls()
        assert (row["status"], row["error"], row["attempts"]) == ("rejected", "BudgetExceeded", 0)

    run(main)


@pytest.mark.parametrize(("step", "status"), [(HANG, "aborted"), (["a", HANG], "aborted")])
def test_a_cancelled_call_is_settled(step: object, status: str) -> None:
    async def main() -> None:
        book = Book(step, auto=False)
        task = asyncio.create_task(book.ask())
        await book.clock.settle()
        assert book.call["status"] == "in_flight"
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await book.clock.settle()
        (attempt,) = book.attempts
        assert (book.call["status"], attempt["status"], attempt["maybe_billed"]) == (status, status, True)
        assert book.below.open == 0

    run(main)


def test_a_reader_who_leaves_pays_for_what_arrived() -> None:
    async def main() -> None:
        book = Book(["one ", "two ", "three "])
        reply = await book.chain(call_for(book.clock, endpoint(simulated=True)))
        await reply.aclose()
        assert (book.call["status"], book.call["output_tokens"]) == ("aborted", 1)

    run(main)


def test_a_listener_that_fails_breaks_nothing() -> None:
    async def main() -> None:
        book = Book(["ok"])
        call = call_for(book.clock)

        def bad(_: object) -> None:
            raise ValueError("listener")

        call.trail.listener = bad
        reply, raised, _ = await outcomes(book.chain, call)
        assert (raised, reply.text) == (None, "ok")

    run(main)
