"""The line under an answer."""

from __future__ import annotations

from decimal import Decimal
from types import SimpleNamespace

import pytest

from llmkit.call import Attempt, Skipped, Trail
from llmkit.notebook.footer import Part, as_html, as_text, metadata, notes, of_attempts, of_reply, status_html
from llmkit.reply import Outcome, Usage


def attempt(number=1, *, provider="openai", model="gpt-5-mini", status="complete", cost="0.000481", **fields):
    usage = fields.pop("usage", Usage(input_tokens=12, output_tokens=240))
    cost_usd = None if cost is None else Decimal(cost)
    return Attempt(
        number=number,
        provider=provider,
        model=model,
        status=status,
        started=0.0,
        latency_s=1.0,
        usage=usage,
        cost_usd=cost_usd,
        **fields,
    )


def failed(number=1, *, status=503, model="gpt-5-mini", **fields):
    return attempt(
        number,
        status="failed",
        cost="0",
        usage=None,
        http_status=status,
        model=model,
        error="ProviderOverloaded",
        **fields,
    )


def reply(*attempts, **fields):
    """A reply as the footer sees it."""
    attempts = attempts or (attempt(),)
    costs = [each.cost_usd for each in attempts]
    given = {
        "attempts": attempts,
        "request_id": "r1",
        "model": "gpt-5-mini-2025-08-07",
        "provider": "openai",
        "usage": attempts[-1].usage,
        "cost_usd": None if None in costs else sum(costs, Decimal(0)),
        "latency_s": 1.94,
        "time_to_first_token_s": 0.4,
        "source": "provider",
        "skipped": (),
        "cut": None,
        "finish_reason": "stop",
        "outcome": Outcome("complete"),
        "call": SimpleNamespace(max_cost_usd=Decimal("0.01"), trail=Trail()),
    }
    return SimpleNamespace(**given | fields)


def line(*attempts, **fields):
    return as_text(of_reply(reply(*attempts, **fields)))


def test_an_ordinary_answer() -> None:
    assert line() == "gpt-5-mini-2025-08-07 · 12 → 240 tokens · $0.000481 · 1.9 s (first token 400 ms) · openai"


def test_without_timings_it_is_the_same_each_time() -> None:
    text = as_text(of_reply(reply(), timings=False))
    assert text == "gpt-5-mini-2025-08-07 · 12 → 240 tokens · $0.000481 · openai"


def test_cached_and_reasoning_tokens_are_said() -> None:
    usage = Usage(input_tokens=1200, output_tokens=340, cached_input_tokens=1000, reasoning_tokens=200)
    assert "1,200 → 340 tokens (1,000 cached, 200 reasoning)" in line(attempt(usage=usage))


def test_estimates_are_marked() -> None:
    text = line(attempt(usage=Usage(input_tokens=12, output_tokens=34, estimated=True)))
    assert "≈12 → ≈34 tokens · ≈$0.000481" in text


def test_an_unknown_cost_is_said_and_never_nothing() -> None:
    parts = of_reply(reply(attempt(cost=None)))
    assert Part("cost unknown: no price for openai:gpt-5-mini", warns=True) in parts


def test_the_simulator_says_so() -> None:
    text = line(attempt(provider="simulator", cost="0"), source="simulated", provider="simulator", model="simulator")
    assert "· $0 ·" in text
    assert text.endswith("· simulated")


def test_retries_are_counted_although_the_server_names_its_model_otherwise() -> None:
    assert line(failed(), failed(2, status=429), attempt(3, model="gpt-5-mini-2025-08-07")).endswith(
        "openai · 2 retries (429, 503)"
    )


def test_a_fallback_is_no_retry() -> None:
    skipped = (Skipped("openai:gpt-5", "ProviderOverloaded: openai:gpt-5 answered 503"),)
    text = line(failed(model="gpt-5"), attempt(2), skipped=skipped)
    assert text.endswith("openai · fell back from openai:gpt-5 (ProviderOverloaded)")


def test_retries_and_fallbacks_together() -> None:
    skipped = (Skipped("openai:gpt-5", "ProviderOverloaded: x"), Skipped("openai:off", "disabled"))
    text = line(failed(model="gpt-5"), failed(2, model="gpt-5"), attempt(3), skipped=skipped)
    assert text.endswith("openai · 1 retry (503) · fell back from openai:gpt-5 (ProviderOverloaded)")


def test_a_link_whose_circuit_is_open_was_not_tried() -> None:
    skipped = (Skipped("openai:gpt-5", "CircuitOpen: open"),)
    assert "retry" not in line(attempt(), skipped=skipped)


def test_a_degraded_reply_counts_what_it_took() -> None:
    text = line(failed(), failed(2), source="degraded", usage=None)
    assert text.startswith("$0 ·")
    assert "degraded" in text
    assert "1 retry (503)" in text


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"cut": "max_cost"}, "cut at the cap of $0.0100"),
        ({"cut": "max_tokens"}, "cut at the limit of tokens"),
        ({"finish_reason": "length"}, "ended at the limit of output tokens"),
        ({"finish_reason": "max_tokens"}, "ended at the limit of output tokens"),
        ({"outcome": Outcome("failed")}, "broken off"),
    ],
)
def test_an_answer_that_is_not_whole_says_so(fields, words) -> None:
    assert of_reply(reply(**fields))[-1] == Part(words, warns=True)


def test_an_interrupted_answer_says_so() -> None:
    assert of_reply(reply(outcome=Outcome("aborted")), interrupted=True)[-1] == Part("interrupted", warns=True)


def test_what_may_be_billed_on_top_is_said() -> None:
    parts = of_reply(reply(failed(maybe_billed=True), attempt(2, maybe_billed=True)))
    assert parts[-1] == Part("1 attempt without an end may be billed", warns=True)


def test_a_call_without_an_answer() -> None:
    assert as_text(of_attempts([failed(), failed(2)], 7.31)) == "openai:gpt-5-mini · 2 attempts · 7.3 s"
    assert as_text(of_attempts([failed()], 7.31, timings=False)) == "openai:gpt-5-mini · 1 attempt"
    assert of_attempts([], 1.0) == []


def stored(source, saved):
    """A reply that was not paid for."""
    call = SimpleNamespace(max_cost_usd=None, trail=Trail(saved=saved))
    found = reply(source=source, call=call, latency_s=0.0004, cost_usd=Decimal(0))
    found.attempts = ()
    return found


@pytest.mark.parametrize(
    "source, saved, words",
    [
        ("cache", Decimal("0.0012"), "cache, saved $0.0012"),
        ("cache", None, "cache"),
        ("cache", Decimal(0), "cache"),
        ("coalesced", Decimal("1.5"), "coalesced, saved $1.50"),
    ],
)
def test_an_answer_that_was_not_paid_for_says_what_it_saved(source, saved, words) -> None:
    text = as_text(of_reply(stored(source, saved)))
    first = "" if source == "cache" else " (first token 400 ms)"
    assert text == f"gpt-5-mini-2025-08-07 · 12 → 240 tokens · $0 · under 1 ms{first} · {words}"


def test_notes_are_lines_of_their_own_each_once() -> None:
    parts = [Part("tiny"), *notes(["80 % of the day is <b>spent</b>", "alert", "alert"]), Part("$0")]
    assert as_text(parts) == "tiny · $0\n80 % of the day is <b>spent</b>\nalert"
    shown = as_html(parts)
    assert shown.count("<br>") == 2
    assert "<b>" not in shown
    assert "&lt;b&gt;spent" in shown
    assert as_text(notes(["only this"])) == "only this"


def test_amounts_are_no_formula() -> None:
    """JupyterLab sets what stands between two dollars as one, in HTML as well."""
    parts = of_reply(stored("cache", Decimal("0.0012")))
    assert as_text(parts).count("$") == 2
    shown = as_html([*parts, *notes([r"\(x\) $1"])]) + status_html("$1 of $2")
    assert "$" not in shown
    assert "\\" not in shown
    assert shown.count("<span>&#36;</span>") == 5


def test_a_note_is_short_and_on_one_line() -> None:
    (part,) = notes(["x\n\x1b[2J" + "y" * 10_000])
    assert len(part.text) <= 300
    assert "\n" not in part.text
    assert "\x1b" not in part.text


def test_everything_is_escaped() -> None:
    hostile = "<img src=x onerror=alert(1)>\x1b[31m\n"
    shown = as_html(of_reply(reply(model=hostile, provider=hostile)))
    assert "<img" not in shown
    assert "&lt;img" in shown
    assert "\x1b" not in shown
    assert "<b>" not in status_html("<b>")


def test_metadata_holds_what_an_audit_needs() -> None:
    about = metadata(reply())["llmkit"]
    assert set(about) == {"request_id", "model", "usage", "cost_usd", "source"}
    assert about["cost_usd"] == "0.000481"
    assert about["usage"]["input_tokens"] == 12
    assert metadata(reply(attempt(cost=None, usage=None)))["llmkit"]["usage"] is None
