"""llmkit.layers.budget: refused before anything is sent, or cut while it runs; never a false refusal."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal

import pytest

from llmkit import errors
from llmkit.call import Attempt, Params
from llmkit.endpoint import Link, Price
from llmkit.layers.budget import Budget
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
