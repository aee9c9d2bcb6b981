"""llmkit.layers.budget: refused before anything is sent, or cut while it runs; never a false refusal."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit import errors
from llmkit.budgets import Budgets
from llmkit.call import Attempt, Params, Timeouts
from llmkit.clock import within
from llmkit.config import BudgetSettings, Limit, RetrySettings
from llmkit.endpoint import Link, Price
from llmkit.events import BudgetWarning, Event, Waiting
from llmkit.layers.budget import Budget
from llmkit.layers.fallback import Fallback
from llmkit.layers.meter import Meter
from llmkit.layers.record import Record
from llmkit.layers.retry import Retry
from llmkit.ledger import Ledger
from llmkit.models import prices, tokens
from llmkit.pipeline import Pipeline
from llmkit.reply import Usage
from llmkit.testing import FakeClock
from tests.layers.script import HANG, Script, call_for, chain, endpoint, outcomes, run

DEAR = Price(input=Decimal(1000), output=Decimal(1000))  # a tenth of a cent a token
WORDS = [f"word{n} " for n in range(100)]


def dear(**changes):
    """Exactly countable (one token a word), and priced all the same."""
    return endpoint(simulated=True, price=DEAR, **changes)


async def ask(step: object, *links: object, **changes: object):
    clock = FakeClock()
    below = Script(clock, step)
    link = links[0] if links else dear()
    call = call_for(clock, link, **changes)
    return *(await outcomes(chain(Budget(clock), below), call)), below


def test_without_a_cap_nothing_is_touched() -> None:
    async def main() -> None:
        reply, raised, _, below = await ask(WORDS)
        assert (raised, reply.text, below.calls[0].params) == (None, "".join(WORDS), Params())

    run(main)


def test_a_worst_case_over_the_cap_is_refused_before_anything_is_sent() -> None:
    async def main() -> None:
        _, raised, seen, below = await ask(
            WORDS, prompt="one two three", params=Params(max_tokens=10), max_cost_usd=Decimal("0.012")
        )
        assert isinstance(raised, errors.BudgetExceeded)
        assert (raised.scope, raised.limit, raised.needed) == ("request", Decimal("0.012"), Decimal("0.013"))
        assert "0.013" in raised.message
        assert (below.calls, seen) == ([], ["failed"])

    run(main)


@pytest.mark.parametrize("cap, said", [("1E-7", "$0.0000001"), ("0.01299999", "$0.01299999")])
def test_a_refusal_says_its_amounts_as_people_write_them_and_to_their_last_digit(cap, said) -> None:
    async def main() -> None:
        cent = {"prompt": "one two three", "params": Params(max_tokens=10), "max_cost_usd": Decimal(cap)}
        _, raised, _, _ = await ask(WORDS, **cent)
        assert "could cost $0.013 for" in raised.message
        assert f"the request's cap leaves {said} of {said}" in raised.message

    run(main)


def test_a_worst_case_that_just_fits_is_sent() -> None:
    async def main() -> None:
        reply, raised, _, below = await ask(
            ["ok"], prompt="one two three", params=Params(max_tokens=10), max_cost_usd=Decimal("0.013")
        )
        assert (raised, reply.text, len(below.calls)) == (None, "ok", 1)

    run(main)


def test_without_max_tokens_the_provider_is_told_what_the_cap_affords() -> None:
    async def main() -> None:
        _, raised, _, below = await ask(["ok"], prompt="one two three", max_cost_usd=Decimal("0.013"))
        assert raised is None
        assert below.calls[0].params.max_tokens == 10

    run(main)


def test_a_provider_that_does_not_keep_its_limit_is_cut_at_the_cap() -> None:
    async def main() -> None:
        reply, raised, seen, below = await ask(WORDS, prompt="one two three", max_cost_usd=Decimal("0.013"))
        assert raised is None
        assert reply.text == "".join(WORDS[:11])  # what had arrived when it passed the cap was paid for, and is kept
        assert (reply.finish_reason, reply.outcome.status, seen) == ("max_cost", "aborted", ["aborted"])
        assert below.open == 0

    run(main)


def test_a_token_limit_that_is_not_kept_is_cut_too() -> None:
    async def main() -> None:
        reply, _, _, below = await ask(WORDS, params=Params(max_tokens=5))
        assert (reply.text, reply.finish_reason, below.open) == ("".join(WORDS[:6]), "max_tokens", 0)

    run(main)


def test_an_estimate_never_cuts_a_token_limit_early() -> None:
    async def main() -> None:
        pieces = ["{[<%$#@!~^&*>]}"] * 10  # estimated at many tokens a piece
        reply, _, _, _ = await ask(pieces, endpoint(), params=Params(max_tokens=10))
        assert (reply.text, reply.finish_reason) == ("".join(pieces), "stop")
        reply, _, _, _ = await ask(pieces, endpoint(), params=Params(max_tokens=5))
        assert (reply.text, reply.finish_reason) == ("".join(pieces[:6]), "max_tokens")

    run(main)


def test_an_estimate_never_lets_more_chunks_through_than_a_cap_affords() -> None:
    async def main() -> None:
        short = ["w "] * 400  # estimated at a quarter of a token a piece; no server sends less than a token
        dear = endpoint(price=Price(input=Decimal(0), output=Decimal(1000)))
        reply, _, _, _ = await ask(short, dear, max_cost_usd=Decimal("0.05"))
        assert (reply.text, reply.finish_reason) == ("w " * 51, "max_cost")
        reply, _, _, _ = await ask(short, dear, params=Params(max_tokens=50))
        assert (reply.text, reply.finish_reason) == ("w " * 51, "max_tokens")

    run(main)


def test_a_token_cap_counts_the_prompt_as_well() -> None:
    async def main() -> None:
        _, raised, _, below = await ask(WORDS, prompt="one two three", max_total_tokens=3)
        assert isinstance(raised, errors.BudgetExceeded)
        assert (raised.unit, raised.limit, below.calls) == ("tokens", 3, [])
        reply, raised, _, below = await ask(WORDS, prompt="one two three", max_total_tokens=10)
        assert raised is None
        assert below.calls[0].params.max_tokens == 7
        assert reply.finish_reason == "max_tokens"

    run(main)


def test_what_earlier_attempts_spent_is_gone() -> None:
    async def main() -> None:
        clock = FakeClock()
        call = call_for(clock, dear(), prompt="one two three", max_cost_usd=Decimal("0.020"))
        spent = Attempt(
            number=1, provider="p", model="m", status="failed", started=0, latency_s=0,
            usage=Usage(3, 5), cost_usd=Decimal("0.008"),
        )  # fmt: skip
        call.trail.attempts.append(spent)
        below = Script(clock, ["ok"])
        await outcomes(chain(Budget(clock), below), call)
        assert below.calls[0].params.max_tokens == 9  # 20 - 8 spent - 3 for the prompt
        call.trail.attempts.append(replace(spent, cost_usd=Decimal("0.010")))
        _, raised, _ = await outcomes(chain(Budget(clock), below), call)
        assert isinstance(raised, errors.BudgetExceeded)
        assert raised.spent_before == Decimal("0.018")

    run(main)


def test_an_unknown_price_is_an_error_under_a_cap_that_was_asked_for_and_only_then() -> None:
    async def main() -> None:
        unknown = endpoint("no-such-model-anywhere", price=None)
        _, raised, _, below = await ask(["ok"], unknown, max_cost_usd=Decimal(1))
        assert isinstance(raised, errors.PriceUnknown)
        assert "price" in raised.next_step
        assert below.calls == []
        _, raised, _, _ = await ask(["ok"], unknown, max_cost_usd=Decimal(1), max_cost_is_default=True)
        assert raised is None
        link = Link(endpoint=unknown, max_cost_usd=Decimal(2))
        _, raised, _, _ = await ask(["ok"], link, max_cost_usd=None)
        assert isinstance(raised, errors.PriceUnknown)

    run(main)


def test_what_is_free_has_no_cost_cap() -> None:
    async def main() -> None:
        for free in (endpoint(price=None, local=True), endpoint(price=None, simulated=True)):
            reply, raised, _, below = await ask(WORDS, free, max_cost_usd=Decimal("0.000001"))
            assert (raised, reply.finish_reason, below.calls[0].params.max_tokens) == (None, "stop", None)

    run(main)


def test_a_links_own_cap_is_named_as_such() -> None:
    async def main() -> None:
        link = Link(endpoint=dear(), max_cost_usd=Decimal("0.001"))
        _, raised, _, _ = await ask(WORDS, link, prompt="one two three", max_cost_usd=Decimal(1))
        assert isinstance(raised, errors.BudgetExceeded)
        assert (raised.scope, raised.limit) == ("link", Decimal("0.001"))

    run(main)


@pytest.mark.parametrize("step", [errors.ProviderOverloaded("503"), ["half", errors.StreamBroken("cut")]])
def test_failures_pass_through_as_they_are(step: object) -> None:
    async def main() -> None:
        _, raised, seen, below = await ask(step, prompt="x", max_cost_usd=Decimal(1))
        assert isinstance(raised, errors.ProviderError)
        assert (seen, below.open) == (["failed"], 0)

    run(main)


def test_a_reader_who_leaves_closes_it() -> None:
    async def main() -> None:
        clock = FakeClock(auto=False)
        below = Script(clock, ["a", HANG])
        reply = await chain(Budget(clock), below)(call_for(clock, dear(), max_cost_usd=Decimal("0.1")))
        await reply.aclose()
        assert (below.open, reply.outcome.status) == (0, "aborted")

    run(main)


def test_where_the_limit_of_the_model_is_unknown_the_answer_is_streamed_so_that_it_can_be_cut() -> None:
    async def main() -> None:
        priced = endpoint("custom", price=Price(input=Decimal(1), output=Decimal(10)))
        _, _, _, below = await ask(["ok"], priced, stream=False, max_cost_usd=Decimal("0.5"))
        assert (below.calls[0].stream, below.calls[0].params.max_tokens) == (True, None)
        _, _, _, below = await ask(["ok"], priced, stream=False, max_cost_usd=Decimal(50))
        assert (below.calls[0].stream, below.calls[0].params.max_tokens) == (False, None)
        known = replace(priced, max_output=8_000)
        _, _, _, below = await ask(["ok"], known, stream=False, max_cost_usd=Decimal("0.5"))
        assert (below.calls[0].stream, below.calls[0].params.max_tokens) == (False, None)
        _, _, _, below = await ask(["ok"], known, stream=False, max_cost_usd=Decimal("0.05"))
        assert (below.calls[0].stream, below.calls[0].params.max_tokens < 8_000) == (False, True)

    run(main)


# -- budgets of several scopes ---------------------------------------------------------------------------------------


class Holding:
    """The layer over a ledger in memory, as it stands in the chain: retry, budget, meter."""

    def __init__(self, *steps: object, limits: tuple[Limit, ...], auto: bool = True, **settings: object) -> None:
        self.clock = FakeClock(auto=auto)
        self.ledger = Ledger.open("memory", self.clock)
        self.budgets = Budgets(BudgetSettings(limits=limits, **settings))
        self.ledger.on_held, self.ledger.on_ended = self.budgets.held, self.budgets.ended
        self.below = Script(self.clock, *steps)
        self.events: list[Event] = []
        layers = [
            Record(self.ledger),
            Fallback(self.clock),
            Retry(RetrySettings(), self.clock),
            Budget(self.clock, self.budgets, self.ledger),
            Meter(self.ledger, self.clock),
        ]
        self.chain = Pipeline(layers, self.below)

    def call(self, *links: object, **fields: object):
        return call_for(self.clock, *(links or (dear(),)), events=self.events, **fields)

    async def ask(self, *links: object, **fields: object):
        return await outcomes(self.chain, self.call(*links, **fields))

    async def balance(self, index: int = 0):
        accounts = [account for *_, account in self.budgets.accounts(self.clock.time(), {})]
        return (await self.ledger.balances(accounts))[index]

    async def open_holds(self) -> tuple[int, int]:
        balance = await self.balance()
        return balance.held_nanos, balance.held_tokens


def usd(amount: str, window: str = "day", **fields: object) -> Limit:
    return Limit(window, Decimal(amount), **fields)


CENT = 10**7  # nano-dollars; DEAR is a tenth of a cent a token


def scenarios():
    return {
        "ok": (["a", "b"], None),
        "fails before the first token": (errors.InvalidRequest("no", status=400), None),
        "fails and is retried": (errors.ProviderOverloaded("503", status=503), None),
        "breaks": (["a", errors.StreamBroken("cut", maybe_billed=True)], None),
        "leaves": (["a", HANG], "leave"),
        "is cancelled": (HANG, "cancel"),
        "is cancelled while it streams": (["a", HANG], "cancel"),
        "times out after it was sent": (errors.FirstTokenTimeout("slow", limit=1, maybe_billed=True), None),
    }


@pytest.mark.parametrize("name", scenarios())
def test_no_hold_is_open_when_a_call_is_over(name: str) -> None:
    step, how = scenarios()[name]

    async def main() -> None:
        book = Holding(step, limits=(usd("10"), usd("10", "session"), Limit("month", None, 100_000)), auto=how is None)
        if how is None:
            await book.ask(params=Params(max_tokens=20))
        elif how == "leave":
            reply = await book.chain(book.call(params=Params(max_tokens=20)))
            assert (await book.open_holds())[0] > 0
            await reply.aclose()
        else:
            task = asyncio.create_task(book.ask(params=Params(max_tokens=20)))
            await book.clock.settle()
            assert (await book.open_holds())[0] > 0
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        assert await book.open_holds() == (0, 0)
        attempts = book.ledger.attempts("r1")
        known = sum(prices.to_nanos(each["cost_usd"]) for each in attempts)
        balance = await book.balance()
        assert balance.settled_nanos - balance.unknown_nanos == known
        nobody_knows = [each for each in attempts if each["maybe_billed"] and each["input_tokens"] is None]
        assert bool(balance.unknown_nanos) is bool(nobody_knows)
        assert book.budgets.line.before(tuple(a for *_, a in book.budgets.accounts(book.clock.time(), {}))) is None

    run(main)


def test_what_was_sent_and_never_answered_counts_at_its_worst_case() -> None:
    async def main() -> None:
        lost = errors.FirstTokenTimeout("slow", limit=1, maybe_billed=True)
        book = Holding(lost, lost, ["ok"], limits=(usd("1"),))
        await book.ask(prompt="one two three", params=Params(max_tokens=7))
        balance = await book.balance()
        worst = prices.worst_nanos(dear(), tokens.upper_bound(book.call(prompt="one two three").messages), 7, at=0)
        assert balance.unknown_nanos == 2 * worst
        assert balance.settled_nanos == 2 * worst + prices.to_nanos(book.ledger.attempts("r1")[2]["cost_usd"])

    run(main)


def test_an_attempt_that_does_not_fit_leaves_no_row_and_says_all_about_it() -> None:
    async def main() -> None:
        book = Holding(["ok"], limits=(usd("0.012"),), timezone="Europe/Berlin")
        _, raised, seen = await book.ask(prompt="one two three", params=Params(max_tokens=10))
        assert isinstance(raised, errors.BudgetExceeded)
        assert (raised.scope, raised.unit, raised.limit, raised.needed) == (
            "day",
            "usd",
            Decimal("0.012"),
            Decimal("0.013"),
        )
        assert (raised.spent_before, raised.held, raised.unknown, raised.downgrade) == (0, 0, 0, False)
        assert raised.resets_at.isoformat() == "2026-01-02T00:00:00+01:00"
        assert "it resets 2026-01-02 00:00 CET" in raised.message
        assert "%llm budget day=AMOUNTusd" in raised.next_step
        assert raised.spent == 0
        assert (seen, book.below.calls, book.ledger.attempts("r1")) == (["failed"], [], [])
        (row,) = book.ledger.calls()
        assert (row["status"], row["attempts"], row["error"]) == ("rejected", 0, "BudgetExceeded")
        assert (await book.balance())[1:] == (0,) * 6

    run(main)


def test_the_last_of_a_budget_makes_a_short_answer() -> None:
    async def main() -> None:
        book = Holding(["ok"], WORDS, limits=(usd("0.050"),))
        await book.ask(prompt="one two three", request_id="first", params=Params(max_tokens=40))
        assert book.below.calls[0].params.max_tokens == 40
        left = 50 - 11  # tenths of cents: the script says 10 in, 1 out
        reply, raised, _ = await book.ask(prompt="one two three", request_id="second")
        told = book.below.calls[1].params.max_tokens
        assert raised is None
        assert left - 3 - 16 <= told <= left - 3
        assert (reply.finish_reason, len(reply.text.split())) == ("max_cost", told + 1)
        balance = await book.balance()
        assert balance.settled_nanos <= 5 * CENT
        assert balance.held_nanos == 0

    run(main)


def test_tokens_are_limited_like_usd_and_for_what_is_free_too() -> None:
    async def main() -> None:
        free = endpoint(price=None, simulated=True)
        book = Holding(WORDS, limits=(Limit("day", None, 60, kind="user", name="ana"),))
        reply, raised, _ = await book.ask(free, prompt="one two three", user="ana")
        assert raised is None
        assert reply.finish_reason == "max_tokens"
        accounts = book.budgets.of(book.call(free, user="ana"), free).accounts
        (balance,) = await book.ledger.balances(accounts)
        assert 50 <= balance.settled_tokens <= 60
        _, raised, _ = await book.ask(free, prompt="one two three " * 9, user="ana", request_id="r2")
        assert (raised.scope, raised.unit, raised.limit) == ("user ana, day", "tokens", 60)
        assert "of 60" in raised.message
        _, raised, _ = await book.ask(free, prompt="one two three", user="bob", request_id="r3")
        assert raised is None

    run(main)


def test_what_others_hold_is_waited_for_oldest_first() -> None:
    async def main() -> None:
        book = Holding(["a", HANG], ["b"], ["c"], limits=(usd("0.020"),), auto=False)
        first = await book.chain(book.call(request_id="first", prompt="one", params=Params(max_tokens=15)))
        order = []

        async def one(name: str, most: int) -> None:
            _, raised, _ = await book.ask(request_id=name, prompt="one", params=Params(max_tokens=most))
            assert raised is None
            order.append(name)

        waiting = [asyncio.create_task(one("big", 12))]
        await book.clock.settle()
        waiting.append(asyncio.create_task(one("small", 2)))  # it would fit, and stands behind all the same
        await book.clock.settle()
        assert len(book.below.calls) == 1
        assert not [event for event in book.events if isinstance(event, Waiting)]
        for _ in range(30):
            await asyncio.sleep(0.001)  # somebody who has died is looked for on a thread
            await book.clock.advance(0.1)
        said = {event.request_id: event.reason for event in book.events if isinstance(event, Waiting)}
        assert said.keys() == {"big", "small"}
        assert all(event.for_room for event in book.events if isinstance(event, Waiting))
        assert "held by calls in flight" in said["big"]
        assert "others wait" in said["small"]
        await first.aclose()
        for _ in range(10):
            await asyncio.sleep(0.001)
            await book.clock.settle()
        await asyncio.gather(*waiting)
        assert order == ["big", "small"]
        assert book.ledger.calls()[1]["latency_s"] >= 2.9
        assert await book.open_holds() == (0, 0)

    run(main)


def test_a_wait_ends_with_the_deadline_of_the_call_and_says_so() -> None:
    async def main() -> None:
        book = Holding(["a", HANG], ["b"], limits=(usd("0.020"),))
        first = await book.chain(book.call(request_id="first", prompt="one", params=Params(max_tokens=15)))
        before = book.clock.now()
        _, raised, _ = await book.ask(
            request_id="second", prompt="one", params=Params(max_tokens=15), timeouts=Timeouts(total=7)
        )
        assert isinstance(raised, errors.BudgetExceeded)
        assert book.clock.now() - before == pytest.approx(7, abs=0.3)
        assert raised.held == Decimal("0.016")
        assert "no room within 7 s" in raised.message
        await first.aclose()
        assert await book.open_holds() == (0, 0)

    run(main)


def test_who_is_cancelled_while_he_waits_lets_the_next_one_go() -> None:
    async def main() -> None:
        book = Holding(["a", HANG], ["b"], limits=(usd("0.020"),), auto=False)
        first = await book.chain(book.call(request_id="first", prompt="one", params=Params(max_tokens=15)))
        tasks = [
            asyncio.create_task(book.ask(request_id=name, prompt="one", params=Params(max_tokens=12))) for name in "xy"
        ]
        await book.clock.settle()
        tasks[0].cancel()
        await asyncio.gather(tasks[0], return_exceptions=True)
        await first.aclose()
        for _ in range(20):
            await asyncio.sleep(0.001)
            await book.clock.settle()
        reply, raised, _ = await tasks[1]
        assert (raised, reply.text) == (None, "b")
        assert await book.open_holds() == (0, 0)

    run(main)


def test_a_cheaper_link_takes_over_where_that_is_asked_for() -> None:
    async def main() -> None:
        cheap = endpoint("cheap", simulated=True, price=Price(input=Decimal(1), output=Decimal(1)))
        book = Holding(WORDS[:3], limits=(usd("0.010"),), at_limit="downgrade")
        reply, raised, _ = await book.ask(dear(), cheap, prompt="one two three", params=Params(max_tokens=20))
        assert (raised, reply.call.endpoint.model) == (None, "cheap")
        assert reply.skipped[0].reason.startswith("BudgetExceeded")
        _, raised, _ = await book.ask(dear(), prompt="one two three", params=Params(max_tokens=20), request_id="r2")
        assert isinstance(raised, errors.BudgetExceeded)  # there is no other link
        assert raised.downgrade is False
        book = Holding(WORDS[:3], limits=(usd("0.010"),))
        _, raised, _ = await book.ask(dear(), cheap, prompt="one two three", params=Params(max_tokens=20))
        assert isinstance(raised, errors.BudgetExceeded)  # nobody asked for another model

    run(main)


def test_where_a_warning_is_asked_for_it_goes_on_and_counts() -> None:
    async def main() -> None:
        book = Holding(WORDS[:3], limits=(usd("0.010"),), at_limit="warn")
        for name in ("r1", "r2"):
            reply, raised, _ = await book.ask(prompt="one two three", params=Params(max_tokens=20), request_id=name)
            assert (raised, reply.text) == (None, "".join(WORDS[:3]))
            assert "went on all the same" in reply.call.trail.warnings[0]
        said = [event for event in book.events if isinstance(event, BudgetWarning)]
        assert {event.scope for event in said} == {"day"}
        balance = await book.balance()
        assert balance.settled_nanos == 26 * CENT // 10
        assert balance.held_nanos == 0

    run(main)


def test_each_threshold_is_said_once() -> None:
    async def main() -> None:
        book = Holding(["ok"], limits=(usd("0.100"),))
        said = {}
        for number in range(9):  # 11 tenths of cents each
            reply, raised, _ = await book.ask(prompt="one", params=Params(max_tokens=5), request_id=f"r{number}")
            assert raised is None
            said[number] = reply.call.trail.warnings
        assert {number for number, each in said.items() if each} == {7}  # 88 of 100: the call that crossed it
        assert said[7] == ["day: $0.0880 of $0.10 spent (88%); resets 2026-01-02 00:00 UTC"]
        events = [event for event in book.events if isinstance(event, BudgetWarning)]
        assert [(event.request_id, event.scope) for event in events] == [("r7", "day")]

    run(main)


def test_a_worst_case_that_is_far_above_what_is_spent_warns_nobody() -> None:
    async def main() -> None:
        book = Holding(["ok"], limits=(usd("0.100"),))
        reply, _, _ = await book.ask(prompt="one", params=Params(max_tokens=95))
        assert reply.call.trail.warnings == []
        reply, _, _ = await book.ask(prompt="one", request_id="r2")
        assert reply.call.trail.warnings == []

    run(main)


def test_an_unknown_price_under_a_budget() -> None:
    async def main() -> None:
        unknown = endpoint("no-such-model-anywhere", price=None)
        book = Holding(["ok"], limits=(usd("1", is_default=True),))
        _, raised, _ = await book.ask(unknown)
        assert raised is None
        book = Holding(["ok"], limits=(usd("1"),))
        _, raised, _ = await book.ask(unknown)
        assert isinstance(raised, errors.PriceUnknown)
        assert "price" in raised.next_step
        assert book.below.calls == []
        book = Holding(["ok"], limits=(Limit("day", Decimal(1), 1000, is_default=True),))
        _, raised, _ = await book.ask(unknown)
        assert raised is None
        assert (await book.balance()).settled_tokens == 11

    run(main)


def test_each_attempt_holds_its_own_worst_case_after_the_one_before_is_settled() -> None:
    async def main() -> None:
        wasted = errors.ProviderOverloaded("503", status=503)
        wasted.usage = Usage(3, 0)
        held = []
        book = Holding(
            lambda call: held.append(call.hold) or (wasted if len(held) < 3 else ["ok"]), limits=(usd("0.020"),)
        )
        _, raised, _ = await book.ask(prompt="one two three", params=Params(max_tokens=10))
        assert raised is None
        assert [hold.number for hold in held] == [1, 2, 3]
        assert [balance.settled_nanos // (CENT // 10) for hold in held for balance in hold.balances] == [0, 3, 6]
        assert (await book.balance()).settled_nanos == 17 * CENT // 10

    run(main)


def test_a_budget_stops_retries_too() -> None:
    async def main() -> None:
        wasted = errors.ProviderOverloaded("503", status=503)
        wasted.usage = Usage(3, 5)
        book = Holding(wasted, limits=(usd("0.022"),))
        _, raised, _ = await book.ask(prompt="one two three", params=Params(max_tokens=10))
        assert isinstance(raised, errors.BudgetExceeded)
        assert raised.spent_before == Decimal("0.016")
        assert raised.spent == Decimal("0.016")
        assert [row["status"] for row in book.ledger.attempts("r1")] == ["failed", "failed"]
        assert await book.open_holds() == (0, 0)

    run(main)


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 12), st.sampled_from("okfbc")), min_size=1, max_size=25),
    st.integers(15, 80),
)
@settings(max_examples=60, deadline=None)
def test_whatever_happens_at_once_no_account_is_ever_passed(asked, limit) -> None:
    """Calls of any size that go well, fail, break or are cancelled, all at once; looked at whenever one is sent."""

    async def main() -> None:
        book = Holding(["ok"], limits=(usd(f"0.{limit:03}"), Limit("month", None, 500)))
        most = 0

        def step(call):
            nonlocal most
            for balance in call.hold.balances[:1]:
                most = max(most, balance.settled_nanos + balance.held_nanos)
            return {
                "o": ["ok"],
                "k": ["a ", "b "],
                "f": errors.InvalidRequest("no", status=400),
                "b": ["a", errors.StreamBroken("cut", maybe_billed=True)],
                "c": HANG,
            }[call.request_id[0]]

        book.below.steps = [step]

        async def one(number, wait, most_tokens, kind):
            await book.clock.sleep(wait)
            call = book.call(
                request_id=f"{kind}{number}",
                prompt="one",
                params=Params(max_tokens=most_tokens + 11),  # the script says ten more in than there are
                timeouts=Timeouts(total=500),
            )
            with contextlib.suppress(errors.LLMKitError, TimeoutError):
                await (await within(book.clock, 40, book.chain(call), TimeoutError)).read()

        await asyncio.gather(*[one(n, *each) for n, each in enumerate(asked)])
        assert most <= limit * CENT // 10
        assert await book.open_holds() == (0, 0)
        balance = await book.balance()
        assert balance.settled_nanos <= limit * CENT // 10
        rows = book.ledger.calls()
        assert {row["status"] for row in rows} <= {"complete", "failed", "aborted", "rejected"}

    run(main)
