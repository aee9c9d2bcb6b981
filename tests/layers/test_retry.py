"""llmkit.layers.retry: the set, the wait, the bound, the first token."""

from __future__ import annotations

import pytest

from llmkit import errors
from llmkit.call import Timeouts
from llmkit.config import RetrySettings
from llmkit.events import Waiting
from llmkit.layers.retry import FLOOR_S, Retry
from llmkit.testing import FakeClock
from tests.layers.script import Script, call_for, chain, outcomes, run

OVERLOADED = errors.ProviderOverloaded("503", provider="test", model="m", status=503)


def retrying(clock: FakeClock, **settings: float) -> Retry:
    return Retry(RetrySettings(**{"attempts": 4, "initial": 0.5, "maximum": 60.0, **settings}), clock)


def test_it_asks_again_until_it_is_answered() -> None:
    async def main() -> None:
        clock, events = FakeClock(), []
        below = Script(clock, OVERLOADED, OVERLOADED, ["ok"])
        reply, raised, _ = await outcomes(chain(retrying(clock), below), call_for(clock, events=events))
        assert raised is None
        assert reply.text == "ok"
        assert len(below.calls) == 3
        waits = [event.seconds for event in events if isinstance(event, Waiting)]
        assert waits == clock.sleeps
        assert reply.call.trail.waited_s == pytest.approx(sum(waits))

    run(main)


def test_it_gives_up_with_the_last_error() -> None:
    async def main() -> None:
        clock = FakeClock()
        below = Script(clock, OVERLOADED)
        _, raised, seen = await outcomes(chain(retrying(clock), below), call_for(clock))
        assert raised is OVERLOADED
        assert len(below.calls) == 4
        assert seen == ["failed"]

    run(main)


@pytest.mark.parametrize(
    "error",
    [
        errors.InvalidRequest("400"),
        errors.AuthenticationError("401"),
        errors.ModelNotFound("404"),
        errors.QuotaExhausted("429, but no credit"),
        errors.BadResponse("HTML"),
        errors.EmptyReply("nothing"),
        errors.Refused("no", reason="no"),
        errors.TotalTimeout("late", limit=1),
        errors.CircuitOpen("open", endpoint="e", state="open", retry_after=1),
        errors.ProviderOverloaded("x-should-retry: false", retryable=False),
        ValueError("foreign"),
    ],
)
def test_what_cannot_get_better_is_not_asked_again(error: Exception) -> None:
    async def main() -> None:
        clock = FakeClock()
        below = Script(clock, error)
        _, raised, _ = await outcomes(chain(retrying(clock), below), call_for(clock))
        assert raised is error
        assert len(below.calls) == 1

    run(main)


def test_nothing_is_retried_after_the_first_token() -> None:
    async def main() -> None:
        clock = FakeClock()
        broken = errors.StreamBroken("cut", retryable=True)
        below = Script(clock, ["half", broken], ["never asked"])
        reply, raised, _ = await outcomes(chain(retrying(clock), below), call_for(clock))
        assert raised is broken
        assert broken.text_so_far == reply.text == "half"
        assert len(below.calls) == 1

    run(main)


def test_the_wait_is_exponential_with_full_jitter_a_floor_and_a_cap() -> None:
    class Chance(FakeClock):
        def random(self) -> float:
            return self.chance

    async def main(chance: float) -> list[float]:
        clock = Chance()
        clock.chance = chance
        layer = retrying(clock, attempts=10, maximum=8.0)
        await outcomes(chain(layer, Script(clock, OVERLOADED)), call_for(clock, timeouts=Timeouts(total=None)))
        return clock.sleeps

    assert run(lambda: main(0.0)) == [FLOOR_S] * 9
    assert run(lambda: main(1.0)) == [0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0, 8.0, 8.0]


def test_what_the_server_asks_for_wins() -> None:
    async def main() -> None:
        clock = FakeClock()
        busy = errors.ProviderRateLimited("429", retry_after=17.0)
        below = Script(clock, busy, errors.ProviderRateLimited("429", retry_after=0.0), ["ok"])
        await outcomes(chain(retrying(clock), below), call_for(clock))
        assert clock.sleeps == [17.0, FLOOR_S]

    run(main)


def test_a_wait_beyond_the_deadline_is_not_begun() -> None:
    async def main() -> None:
        clock = FakeClock()
        busy = errors.ProviderRateLimited("429", retry_after=200.0)
        below = Script(clock, busy)
        _, raised, _ = await outcomes(chain(retrying(clock), below), call_for(clock))
        assert raised is busy
        assert clock.sleeps == []
        assert "200.0 s" in raised.next_step
        assert "120.0 s" in raised.next_step

    run(main)


def test_one_attempt_means_one() -> None:
    async def main() -> None:
        clock = FakeClock()
        below = Script(clock, OVERLOADED)
        await outcomes(chain(retrying(clock, attempts=1), below), call_for(clock))
        assert len(below.calls) == 1

    run(main)
