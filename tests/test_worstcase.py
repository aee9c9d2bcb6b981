"""llmkit.worstcase: what is held for an attempt."""

from __future__ import annotations

import asyncio
from decimal import Decimal

import pytest

from llmkit.account import Account
from llmkit.allowance import Allowance
from llmkit.call import Params
from llmkit.endpoint import Price
from llmkit.models import tokens
from llmkit.testing import FakeClock
from llmkit.worstcase import GRACE_S, LEASE_S, WorstCase
from tests.layers.script import call_for, endpoint

PRICED = endpoint("gpt-4o", price=Price(input=Decimal(1000), output=Decimal(2000)))
DAY = Account("day", "day", limit_nanos=10, limit_tokens=20)


def worst(allowance=None, **changes):
    clock = FakeClock()
    return WorstCase(call_for(clock, PRICED, prompt="one two three " * 20, **changes), allowance, (DAY,), clock.time())


@pytest.mark.parametrize(
    "allowance, wanted, out",
    [
        (None, None, 16_384),  # as much as that model gives
        (None, 7, 7),
        (Allowance(5, "max_cost"), 7, 5),
        (Allowance(5, "max_cost", held=6), 7, 6),  # what is on its way while it is cut is held as well
    ],
)
def test_the_output_is_the_least_of_what_bounds_it(allowance, wanted, out) -> None:
    case = worst(allowance, params=Params(max_tokens=wanted))
    nanos, given, most = case.size()
    assert most == out
    assert (
        nanos == given * 1_000_000 + out * 2_000_000
    )  # a thousand USD a million tokens are a million nano-dollars each
    assert (case.needed("usd"), case.needed("tokens")) == (nanos, given + out)


def test_what_is_affordable_leaves_room_for_the_input() -> None:
    case = worst()
    given = case.size()[1]
    assert case.affordable("tokens", given + 3) == 3
    assert case.affordable("usd", given * 1_000_000 + 3 * 2_000_000) == 3


def test_counting_makes_a_bound_less_and_only_once() -> None:
    async def main() -> None:
        case = worst()
        bound = case.size()[1]
        assert await case.count()
        assert not await case.count()
        call = call_for(FakeClock(), PRICED, prompt="one two three " * 20)
        assert case.size()[1] == await tokens.safe_count(PRICED, call.messages) < bound

    asyncio.run(main())


def test_a_hold_lasts_as_long_as_its_call_may_and_a_lifted_limit_counts_on() -> None:
    case = worst(deadline=90.0)
    case.lift(DAY, "usd")
    hold = case.hold("me")
    assert hold.accounts == (DAY._replace(limit_nanos=None),)
    assert (hold.nanos, hold.tokens, hold.owner) == (case.needed("usd"), case.needed("tokens"), "me")
    began = FakeClock().time()
    assert hold.expires - began == 90 + GRACE_S
    assert worst(deadline=None).hold("me").expires - began == LEASE_S
