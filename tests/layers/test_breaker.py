"""llmkit.layers.breaker: when it opens, what it lets through, how it closes."""

from __future__ import annotations

import asyncio

import pytest

from llmkit import errors
from llmkit.config import BreakerSettings
from llmkit.events import CircuitChanged
from llmkit.layers.breaker import Breaker, Breakers
from llmkit.testing import FakeClock
from tests.layers.script import HANG, Script, call_for, chain, endpoint, outcomes, run

DOWN = errors.ProviderOverloaded("503", status=503)


def made(clock: FakeClock, **settings: float) -> tuple[Breakers, Breaker]:
    breakers = Breakers(BreakerSettings(**settings), clock)
    return breakers, Breaker(breakers)


async def times(n: int, layer: Breaker, clock: FakeClock, step: object) -> list[BaseException | None]:
    below = Script(clock, step)
    return [(await outcomes(chain(layer, below), call_for(clock)))[1] for _ in range(n)]


def test_five_failures_in_a_row_open_it_and_nothing_is_sent_any_more() -> None:
    async def main() -> None:
        clock, events = FakeClock(), []
        breakers, layer = made(clock)
        assert await times(4, layer, clock, DOWN) == [DOWN] * 4
        assert breakers.of(endpoint()).state == "closed"
        below = Script(clock, DOWN)
        await outcomes(chain(layer, below), call_for(clock, events=events))
        assert [(e.before, e.after) for e in events if isinstance(e, CircuitChanged)] == [("closed", "open")]
        _, refused, seen = await outcomes(chain(layer, below), call_for(clock))
        assert isinstance(refused, errors.CircuitOpen)
        assert refused.retry_after == 60
        assert "503" in refused.message
        assert seen == ["failed"]
        assert len(below.calls) == 1

    run(main)


def test_a_failure_rate_over_the_window_opens_it_too() -> None:
    async def main() -> None:
        clock = FakeClock()
        breakers, layer = made(clock, failures=100, rate=0.5, minimum_calls=5, window_s=60)
        for step in (["ok"], DOWN, ["ok"], DOWN):  # half of them fail, but four calls prove nothing
            await times(1, layer, clock, step)
        assert breakers.of(endpoint()).state == "closed"
        await times(1, layer, clock, DOWN)
        assert breakers.of(endpoint()).state == "open"

    run(main)


def test_failures_older_than_the_window_are_forgotten() -> None:
    async def main() -> None:
        clock = FakeClock()
        breakers, layer = made(clock, failures=100, rate=0.5, minimum_calls=5, window_s=60)
        for _ in range(4):
            await times(1, layer, clock, DOWN)
        await clock.sleep(61)
        await times(4, layer, clock, ["ok"])
        await times(1, layer, clock, DOWN)
        assert breakers.of(endpoint()).state == "closed"

    run(main)


def test_half_open_lets_one_probe_through_and_two_successes_close_it() -> None:
    async def main() -> None:
        clock = FakeClock()
        breakers, layer = made(clock)
        await times(5, layer, clock, DOWN)
        await clock.sleep(60)
        slow = Script(clock, ["a", "b"])
        probe = await chain(layer, slow)(call_for(clock))  # at its first token, not at its end
        circuit = breakers.of(endpoint())
        assert circuit.state == "half_open"
        (second,) = await times(1, layer, clock, ["ok"])
        assert isinstance(second, errors.CircuitOpen)
        assert second.state == "half_open"
        await probe.read()
        assert circuit.state == "half_open"
        assert await times(1, layer, clock, ["ok"]) == [None]
        assert circuit.state == "closed"

    run(main)


def test_a_failed_probe_opens_it_again() -> None:
    async def main() -> None:
        clock = FakeClock()
        breakers, layer = made(clock)
        await times(5, layer, clock, DOWN)
        await clock.sleep(60)
        await times(1, layer, clock, DOWN)
        circuit = breakers.of(endpoint())
        assert circuit.state == "open"
        assert circuit.retry_after == 60

    run(main)


def test_a_cancelled_probe_gives_its_place_back() -> None:
    async def main() -> None:
        clock = FakeClock(auto=False)
        _, layer = made(clock)
        await times(5, layer, clock, DOWN)
        await clock.advance(60)
        hanging = asyncio.create_task(chain(layer, Script(clock, HANG))(call_for(clock)))
        await clock.settle()
        assert isinstance((await times(1, layer, clock, ["ok"]))[0], errors.CircuitOpen)
        hanging.cancel()
        await asyncio.gather(hanging, return_exceptions=True)
        assert await times(2, layer, clock, ["ok"]) == [None, None]

    run(main)


def test_sustained_429_opens_it_for_as_long_as_the_server_asks() -> None:
    async def main() -> None:
        clock = FakeClock()
        breakers, layer = made(clock)
        await times(5, layer, clock, errors.ProviderRateLimited("429", retry_after=300.0))
        assert breakers.of(endpoint()).retry_after == 300
        breakers.reset()
        await times(5, layer, clock, errors.ProviderRateLimited("429", retry_after=1e9))
        assert breakers.of(endpoint()).retry_after == 600

    run(main)


@pytest.mark.parametrize(
    "step",
    [
        errors.InvalidRequest("400"),
        errors.AuthenticationError("401"),
        errors.Refused("no", reason="no"),
        errors.EmptyReply("nothing"),
        errors.ContextTooLong("long", tokens=1, window=1),
        errors.QuotaExhausted("no credit"),
        errors.BudgetExceeded("cap", scope="request", limit=1, needed=2),
        ValueError("foreign"),
    ],
)
def test_what_does_not_say_that_the_endpoint_is_unwell_does_not_open_it(step: Exception) -> None:
    async def main() -> None:
        clock = FakeClock()
        breakers, layer = made(clock)
        await times(20, layer, clock, step)
        assert breakers.of(endpoint()).state == "closed"

    run(main)


@pytest.mark.parametrize("error", [errors.StreamBroken("cut"), errors.IdleTimeout("silence", limit=3)])
def test_a_stream_that_breaks_counts(error: Exception) -> None:
    async def main() -> None:
        clock = FakeClock()
        breakers, layer = made(clock)
        await times(5, layer, clock, ["a", error])
        assert breakers.of(endpoint()).state == "open"

    run(main)


def test_a_success_between_failures_starts_the_count_anew() -> None:
    async def main() -> None:
        clock = FakeClock()
        breakers, layer = made(clock, rate=1.0)
        await times(4, layer, clock, DOWN)
        await times(1, layer, clock, ["ok"])
        await times(4, layer, clock, DOWN)
        assert breakers.of(endpoint()).state == "closed"

    run(main)


def test_isolated_by_hand_until_reset_by_hand() -> None:
    async def main() -> None:
        clock = FakeClock()
        breakers, layer = made(clock)
        breakers.of(endpoint()).isolate()
        await clock.sleep(1e6)
        (refused,) = await times(1, layer, clock, ["ok"])
        assert refused.state == "isolated"
        assert refused.retry_after is None
        breakers.of(endpoint()).reset()
        assert await times(1, layer, clock, ["ok"]) == [None]

    run(main)


def test_each_endpoint_has_its_own() -> None:
    async def main() -> None:
        clock = FakeClock()
        breakers, layer = made(clock)
        await times(5, layer, clock, DOWN)
        other = endpoint("other")
        _, raised, _ = await outcomes(chain(layer, Script(clock, ["ok"])), call_for(clock, other))
        assert raised is None
        assert [circuit.state for circuit in breakers] == ["open", "closed"]

    run(main)


def test_a_straggler_of_an_earlier_era_says_nothing() -> None:
    async def main() -> None:
        clock = FakeClock()
        breakers, layer = made(clock)
        straggler = await chain(layer, Script(clock, ["a", DOWN]))(call_for(clock))
        await times(5, layer, clock, DOWN)
        breakers.reset()
        with pytest.raises(errors.ProviderOverloaded):
            await straggler.read()
        assert breakers.of(endpoint()).failures_in_row == 0

    run(main)
