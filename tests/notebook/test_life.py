"""A call's life in words."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

import pytest

from llmkit import events
from llmkit.call import Attempt
from llmkit.notebook import life
from llmkit.notebook.life import Life, Moment
from llmkit.reply import Usage

USD = events.Share("day", "usd", Decimal(20), Decimal("1.5"), Decimal("0.25"))
TOKENS = events.Share("user ana, month", "tokens", 1000, 900, 50)
MADE = Attempt(
    number=2,
    provider="vllm",
    model="tiny",
    status="complete",
    started=0.0,
    latency_s=1.25,
    time_to_first_token_s=0.5,
    usage=Usage(7, 5, estimated=True),
    cost_usd=Decimal("0.000017"),
    http_status=200,
    finish_reason="stop",
)


@pytest.mark.parametrize(
    "event, text",
    [
        (events.CacheLooked("r", "use", "miss"), "cache: a miss (use)"),
        (events.CacheLooked("r", "use", "off"), "cache: not looked up (it is switched off)"),
        (events.CacheLooked("r", "off", "off"), "cache: not looked up (this call neither looks nor stores)"),
        (events.CacheLooked("r", "refresh", "refresh"), "cache: not looked up (refresh: asked anew, and stored)"),
        (events.CacheLooked("r", "only", "memory", Decimal("0.5")), "cache: a hit in memory (only), saved $0.5000"),
        (events.CacheLooked("r", "use", "store"), "cache: a hit in the store (use)"),
        (
            events.Following("r", elsewhere=False),
            "single-flight: an identical call is in flight; this one gets its answer",
        ),
        (
            events.Held("r", 1, Decimal("0.01"), 500, (USD, TOKENS)),
            (
                "budget: $0.0100 and 500 tokens held for attempt 1 (day: $1.50 of $20 spent, $0.2500 held; "
                "user ana, month: 900 tokens of 1,000 tokens spent, 50 tokens held)"
            ),
        ),
        (
            events.NoRoom("r", TOKENS, 200),
            (
                "budget: no room for 200 tokens in user ana, month: 900 tokens of 1,000 tokens spent, "
                "50 tokens held by other calls"
            ),
        ),
        (events.Settled("r", 1, Decimal("0.02"), 1), "budget: attempt 1 settled at $0.0200, 1 token"),
        (events.Settled("r", 1, Decimal(0), 0), "budget: what was held for attempt 1 is given back"),
        (
            events.Settled("r", 1, None, None),
            "budget: attempt 1 may be billed and nobody knows how much; what was held stays booked",
        ),
        (
            events.Settled("r", 1, None, 12),
            "budget: attempt 1 settled at an unknown price (what was held in USD stays booked), 12 tokens",
        ),
        (events.LinkSkipped("r", "a:b", "disabled"), "choice: a:b is passed over: disabled"),
        (events.FellBack("r", "a:b", "c:d", "X: y"), "choice: a:b is left for c:d: X: y"),
        (events.AttemptStarted("r", "a:b", 1), "attempt 1: sent to a:b"),
        (
            events.AttemptEnded("r", MADE),
            (
                "attempt 2: vllm:tiny complete, HTTP 200 after 1.25 s (first token after 0.50 s), ≈7 → ≈5 tokens, "
                "$0.000017, finish reason stop"
            ),
        ),
        (events.Waiting("r", 2.0, "busy", "a:b"), "waiting 2.0 s: busy"),
        (events.Waiting("r", 9.0, "full", "a:b", for_room=True), "waiting for room, at most 9.0 s: full"),
        (events.CircuitChanged("r", "a:b", "closed", "open"), "circuit of a:b: from closed to open"),
        (events.BudgetWarning("r", "day", "80 %"), "budget: 80 %"),
        (
            events.Repairing("r", ("no name", "age is no number")),
            "schema: it does not fit (no name; age is no number); it is asked for once more",
        ),
    ],
    ids=lambda each: type(each).__name__ if not isinstance(each, str) else "",
)
def test_each_event_has_words(event, text) -> None:
    lived = Life(iter([0.0, 1.0]).__next__)
    lived.hear(event)
    assert lived.told() == [Moment(1.0, text)]
    assert lived.request_id == "r"


def test_every_kind_of_event_has_words_of_its_own() -> None:
    kinds = [each for each in vars(events).values() if isinstance(each, type) and issubclass(each, events.Event)]
    assert len(kinds) > 10
    assert [each.__name__ for each in kinds if each is not events.Event and each not in life._WORDS] == []


def test_one_that_is_new_is_told_all_the_same() -> None:
    @dataclass(frozen=True)
    class GuardFailed(events.Event):
        guard: str
        text: str

    lived = Life()
    lived.hear(GuardFailed("r", "pii", "a\x1b[2Jb sk-proj-abcdEFGH1234567890abcd"))
    (moment,) = lived.told()
    assert moment.text == "guard failed: guard pii, text a b [redacted]"


def test_a_life_is_bounded_and_repeats_nothing() -> None:
    lived = Life()
    for number in range(life.MOST + 50):
        lived.hear(events.Waiting("r", number, "x" * 5_000, "a"))
    assert len(lived.told()) == life.MOST
    assert lived.told()[-1].text.startswith(f"waiting {life.MOST + 49}.0 s")
    assert max(len(moment.text) for moment in lived.told()) <= 400
    twice = Life()
    twice.hear(events.Waiting("r", 1.0, "busy", "a"))
    twice.hear(events.Waiting("r", 1.0, "busy", "a"))
    assert len(twice.told()) == 1
