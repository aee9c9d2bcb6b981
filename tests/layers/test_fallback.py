"""llmkit.layers.fallback: which link answers, which are skipped, and why."""

from __future__ import annotations

from decimal import Decimal

import pytest

from llmkit import errors
from llmkit.endpoint import Link
from llmkit.events import FellBack
from llmkit.layers.fallback import Fallback
from llmkit.reply import Reply
from llmkit.testing import FakeClock
from tests.layers.script import HANG, Script, call_for, chain, endpoint, outcomes, run

DOWN = errors.ProviderOverloaded("503", status=503)
A, B, C = (endpoint(name) for name in "abc")


class Fleet:
    """A script for each model."""

    def __init__(self, clock: FakeClock, **scripts: object) -> None:
        self.scripts = {name: Script(clock, step) for name, step in scripts.items()}

    async def __call__(self, call) -> Reply:
        return await self.scripts[call.endpoint.model](call)

    @property
    def asked(self) -> str:
        return "".join(name * len(script.calls) for name, script in self.scripts.items())


async def ask(layer: Fallback, clock: FakeClock, fleet: Fleet, *links: object, **changes: object):
    return await outcomes(chain(layer, fleet), call_for(clock, *links, **changes))


def skipped(reply: Reply) -> list[tuple[str, str]]:
    return [(each.endpoint, each.reason) for each in reply.skipped]


@pytest.mark.parametrize(
    "error",
    [
        DOWN,
        errors.ProviderUnreachable("refused"),
        errors.FirstTokenTimeout("late", limit=1),
        errors.AuthenticationError("no key"),
        errors.QuotaExhausted("no credit"),
        errors.ModelNotFound("404"),
        errors.BadResponse("HTML"),
        errors.EmptyReply("nothing"),
        errors.Refused("no", reason="no"),
        errors.CircuitOpen("open", endpoint="a", state="open", retry_after=1),
        errors.PriceUnknown("?", model="a"),
        errors.BudgetExceeded("dear", scope="request", limit=Decimal(1), needed=Decimal(2)),
    ],
)
def test_what_another_link_may_do_better_goes_to_it(error: errors.LLMKitError) -> None:
    async def main() -> None:
        clock, events = FakeClock(), []
        reply, raised, seen = await ask(Fallback(clock), clock, Fleet(clock, a=error, b=["ok"]), A, B, events=events)
        assert raised is None
        assert (reply.text, reply.model) == ("ok", "b")
        assert skipped(reply) == [("test:a", f"{type(error).__name__}: {error.message}")]
        assert [(e.endpoint, e.to) for e in events if isinstance(e, FellBack)] == [("test:a", "test:b")]
        assert seen == ["complete"]

    run(main)


@pytest.mark.parametrize(
    "error",
    [
        errors.InvalidRequest("400"),
        errors.TotalTimeout("late", limit=1),
        errors.GuardrailBlocked("no", stage="input", guard="g", reason="r"),
        errors.BudgetExceeded("day", scope="day", limit=Decimal(1), needed=Decimal(2)),
        ValueError("foreign"),
    ],
)
def test_what_is_wrong_everywhere_is_raised_at_once(error: Exception) -> None:
    async def main() -> None:
        clock = FakeClock()
        fleet = Fleet(clock, a=error, b=["ok"])
        _, raised, _ = await ask(Fallback(clock), clock, fleet, A, B)
        assert raised is error
        assert fleet.asked == "a"

    run(main)


def test_nothing_is_left_after_the_first_token() -> None:
    async def main() -> None:
        clock = FakeClock()
        fleet = Fleet(clock, a=["half", errors.StreamBroken("cut")], b=["ok"])
        reply, raised, _ = await ask(Fallback(clock), clock, fleet, A, B)
        assert isinstance(raised, errors.StreamBroken)
        assert (reply.text, fleet.asked) == ("half", "a")

    run(main)


def test_all_out_is_one_error_that_lists_them_all() -> None:
    async def main() -> None:
        clock = FakeClock()
        late = errors.FirstTokenTimeout("late", limit=1)
        _, raised, _ = await ask(Fallback(clock), clock, Fleet(clock, a=DOWN, b=late), A, B)
        assert isinstance(raised, errors.AllModelsFailed)
        assert raised.exceptions == (DOWN, late)
        assert "503" in raised.block()
        assert "late" in raised.block()

    run(main)


def test_a_single_link_raises_its_own_error() -> None:
    async def main() -> None:
        clock = FakeClock()
        _, raised, _ = await ask(Fallback(clock), clock, Fleet(clock, a=DOWN), A)
        assert raised is DOWN

    run(main)


def test_a_disabled_link_is_never_used_but_named() -> None:
    async def main() -> None:
        clock = FakeClock()
        fleet = Fleet(clock, a=["no"], b=["ok"])
        reply, _, _ = await ask(Fallback(clock), clock, fleet, Link(endpoint=A, disabled=True), B)
        assert (reply.text, skipped(reply)) == ("ok", [("test:a", "disabled")])
        _, raised, _ = await ask(Fallback(clock), clock, fleet, Link(endpoint=A, disabled=True))
        assert isinstance(raised, errors.CallRejected)
        assert "disabled" in raised.message

    run(main)


def test_a_link_that_is_too_slow_is_left() -> None:
    async def main() -> None:
        clock = FakeClock()
        fleet = Fleet(clock, a=HANG, b=["ok"])
        reply, _, _ = await ask(Fallback(clock), clock, fleet, Link(endpoint=A, max_latency_s=8), B)
        assert (reply.text, clock.now()) == ("ok", 8)
        assert "max_latency_s of 8 s" in reply.skipped[0].reason

    run(main)


def test_a_link_that_failed_three_times_in_five_seconds_is_skipped_until_they_are_over() -> None:
    async def main() -> None:
        clock = FakeClock()
        layer, fleet = Fallback(clock), Fleet(clock, a=DOWN, b=["ok"])
        for _ in range(4):
            await ask(layer, clock, fleet, A, B)
        assert fleet.asked == "aaabbbb"
        reply, _, _ = await ask(layer, clock, fleet, A, B)
        assert skipped(reply) == [("test:a", "failed 3 times within 5 s")]
        await clock.sleep(6)
        await ask(layer, clock, fleet, A, B)
        assert fleet.asked == "aaaabbbbbb"

    run(main)


def test_sick_links_are_asked_after_all_when_no_other_is_left() -> None:
    async def main() -> None:
        clock = FakeClock()
        layer, fleet = Fallback(clock), Fleet(clock, a=DOWN, b=DOWN)
        for _ in range(5):
            await ask(layer, clock, fleet, A, B)
        assert fleet.asked == "aaaaabbbbb"
        fleet.scripts["a"].steps = [["back"]]
        reply, _, _ = await ask(layer, clock, fleet, A, B)
        assert reply.text == "back"

    run(main)


def test_too_long_a_context_goes_to_a_larger_window() -> None:
    async def main() -> None:
        clock = FakeClock()
        small, same, large = (endpoint(n, window=w) for n, w in (("a", 8_000), ("b", 8_000), ("c", 100_000)))
        long = errors.ContextTooLong("9000 > 8000", tokens=9_000, window=8_000)
        fleet = Fleet(clock, a=long, b=["no"], c=["ok"])
        reply, _, _ = await ask(Fallback(clock), clock, fleet, small, same, large)
        assert (reply.model, fleet.asked) == ("c", "ac")
        assert skipped(reply)[1] == ("test:b", "its window of 8000 tokens is too small")

    run(main)


def test_a_link_for_one_kind_of_error_is_used_for_no_other() -> None:
    async def main() -> None:
        clock = FakeClock()
        special = Link(endpoint=B, only_on=frozenset({"refused"}))
        fleet = Fleet(clock, a=errors.Refused("no", reason="no"), b=["ok"])
        reply, _, _ = await ask(Fallback(clock), clock, fleet, A, special)
        assert reply.model == "b"
        fleet = Fleet(clock, a=DOWN, b=["ok"])
        _, raised, _ = await ask(Fallback(clock), clock, fleet, A, special)
        assert raised is DOWN
        assert fleet.asked == "a"

    run(main)


def test_all_too_dear_is_a_budget_error() -> None:
    async def main() -> None:
        clock = FakeClock()
        dear = errors.BudgetExceeded("dear", scope="request", limit=Decimal(1), needed=Decimal(3))
        less = errors.BudgetExceeded("less", scope="link", limit=Decimal(1), needed=Decimal(2))
        _, raised, _ = await ask(Fallback(clock), clock, Fleet(clock, a=dear, b=less), A, B)
        assert raised is less

    run(main)


def test_a_reader_who_leaves_and_a_cancelled_call_end_it() -> None:
    async def main() -> None:
        clock = FakeClock(auto=False)
        fleet = Fleet(clock, a=DOWN, b=["x", HANG])
        reply = await chain(Fallback(clock), fleet)(call_for(clock, A, B))
        await reply.aclose()
        assert reply.outcome.status == "aborted"
        assert fleet.scripts["b"].open == 0

    run(main)


def test_a_prompt_known_not_to_fit_is_not_sent_there() -> None:
    async def main() -> None:
        clock = FakeClock()
        small = endpoint("a", window=5, simulated=True)
        fleet = Fleet(clock, a=["no"], b=["ok"])
        reply, _, _ = await ask(Fallback(clock), clock, fleet, small, endpoint("b", window=1000), prompt="w " * 50)
        assert (reply.model, fleet.asked) == ("b", "b")
        assert "50 tokens do not fit its window of 5" in reply.skipped[0].reason
        _, raised, _ = await ask(Fallback(clock), clock, fleet, small, prompt="w " * 50)
        assert isinstance(raised, errors.ContextTooLong)
        assert (raised.tokens, raised.window, fleet.asked) == (50, 5, "b")
        reply, raised, _ = await ask(Fallback(clock), clock, fleet, small, prompt="w " * 5)
        assert (raised, reply.text) == (None, "no")

    run(main)


def test_an_estimate_alone_refuses_nothing() -> None:
    async def main() -> None:
        clock = FakeClock()
        small = endpoint("a", window=5)
        fleet = Fleet(clock, a=["it fits"], b=["ok"])
        reply, _, _ = await ask(Fallback(clock), clock, fleet, small, prompt="w " * 50)
        assert reply.text == "it fits"
        reply, _, _ = await ask(Fallback(clock), clock, fleet, small, endpoint("b"), prompt="w " * 50)
        assert reply.model == "b"
        assert "(estimated)" in reply.skipped[0].reason

    run(main)


def test_pictures_that_nobody_can_count_pass_no_model_over() -> None:
    """Their bound is far above what they take: a local model with three small ones would be left for a paid one."""

    async def main() -> None:
        clock = FakeClock()
        own = endpoint("a", window=32_000)
        fleet = Fleet(clock, a=["it sees"], b=["ok"])
        for text, model in (("What is it?", "a"), ("w " * 200_000, "b")):
            parts = [{"type": "image_url", "image_url": {"url": "https://x.test/a.png"}}] * 3
            prompt = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
            reply, _, _ = await ask(Fallback(clock), clock, fleet, own, endpoint("b"), prompt=prompt)
            assert reply.model == model

    run(main)
