"""llmkit.layers.degraded: the template, when every link is out, and only then."""

from __future__ import annotations

from decimal import Decimal

import pytest

from llmkit import errors
from llmkit.layers.degraded import Degraded
from llmkit.testing import FakeClock
from tests.layers.script import Script, call_for, chain, outcomes, run

DOWN = errors.ProviderOverloaded("503")
OUTAGES = [
    DOWN,
    errors.ProviderUnreachable("refused"),
    errors.FirstTokenTimeout("late", limit=1),
    errors.QuotaExhausted("no credit"),
    errors.CircuitOpen("open", endpoint="e", state="open", retry_after=1),
    errors.AllModelsFailed("both", [errors.AuthenticationError("401"), DOWN]),
]
MISTAKES = [
    errors.InvalidRequest("400"),
    errors.AuthenticationError("401"),
    errors.ModelNotFound("404"),
    errors.PriceUnknown("?", model="m"),
    errors.BudgetExceeded("cap", scope="request", limit=Decimal(1), needed=Decimal(2)),
    errors.AllModelsFailed("both", [errors.AuthenticationError("401"), errors.ModelNotFound("404")]),
    ValueError("foreign"),
]


@pytest.mark.parametrize("error", OUTAGES)
def test_an_outage_is_answered_with_the_template_marked_and_at_no_cost(error: Exception) -> None:
    async def main() -> None:
        clock = FakeClock()
        call = call_for(clock, degraded_text="please try again in a minute")
        reply, raised, seen = await outcomes(chain(Degraded(clock), Script(clock, error)), call)
        assert raised is None
        assert (reply.text, reply.source, reply.cost_usd) == ("please try again in a minute", "degraded", 0)
        assert seen == ["complete"]

    run(main)


@pytest.mark.parametrize("error", OUTAGES)
def test_without_a_template_the_error_stays(error: Exception) -> None:
    async def main() -> None:
        clock = FakeClock()
        _, raised, _ = await outcomes(chain(Degraded(clock), Script(clock, error)), call_for(clock))
        assert raised is error

    run(main)


@pytest.mark.parametrize("error", MISTAKES)
def test_a_mistake_is_never_hidden(error: Exception) -> None:
    async def main() -> None:
        clock = FakeClock()
        call = call_for(clock, degraded_text="busy")
        _, raised, _ = await outcomes(chain(Degraded(clock), Script(clock, error)), call)
        assert raised is error

    run(main)


def test_a_reply_that_breaks_later_is_not_replaced() -> None:
    async def main() -> None:
        clock = FakeClock()
        broken = errors.StreamBroken("cut")
        call = call_for(clock, degraded_text="busy")
        reply, raised, _ = await outcomes(chain(Degraded(clock), Script(clock, ["half", broken])), call)
        assert (raised, reply.text) == (broken, "half")

    run(main)
