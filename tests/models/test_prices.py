from __future__ import annotations

import decimal
import json
import warnings
from dataclasses import replace
from datetime import UTC, date, datetime
from decimal import Decimal

import genai_prices
import pytest
from genai_prices.data_snapshot import get_snapshot
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.call import Message
from llmkit.endpoint import Endpoint, Price
from llmkit.models import prices, table
from llmkit.reply import Usage

NOVEMBER = datetime(2026, 11, 20, 12, tzinfo=UTC).timestamp()
SELLERS = {seller.id: seller for seller in get_snapshot().providers}
ADDRESSES = {
    "openai": "https://api.openai.com/v1",
    "anthropic": "https://api.anthropic.com/v1",
    "openrouter": "https://openrouter.ai/api/v1",
    "deepseek": "https://api.deepseek.com/v1",
}


def at(provider, model, **fields):
    wire = "anthropic" if provider == "anthropic" else "openai"
    fields.setdefault("base_url", ADDRESSES.get(provider, "http://proxy.example/v1"))
    return Endpoint(provider=provider, model=model, wire=wire, **fields)


def theirs(endpoint, usage, when, **context):
    return genai_prices.calc_price(
        genai_prices.Usage(
            input_tokens=usage.input_tokens,
            cache_read_tokens=usage.cached_input_tokens,
            cache_write_tokens=usage.cache_write_tokens,
            cache_write_1h_tokens=usage.cache_write_1h_tokens,
            output_tokens=usage.output_tokens,
            output_reasoning_tokens=usage.reasoning_tokens,
        ),
        endpoint.model,
        provider_id=endpoint.provider,
        genai_request_timestamp=datetime.fromtimestamp(when, UTC),
        price_context=context or None,
    ).total_price


def ours(endpoint, usage, when=NOVEMBER, **options):
    found = prices.cost(endpoint, usage, at=when, **options)
    return None if found is None else found.usd


@st.composite
def usages(draw, most=2_000_000):
    total = draw(st.integers(0, most))
    write = draw(st.integers(0, total))
    output = draw(st.integers(0, most))
    return Usage(
        input_tokens=total,
        output_tokens=output,
        cached_input_tokens=draw(st.integers(0, total - write)),
        cache_write_tokens=write,
        cache_write_1h_tokens=draw(st.integers(0, write)),
        reasoning_tokens=draw(st.integers(0, output)),
    )


# Flat, tiered, dated, by the time of day, with a price for reasoning, and without one for cached input.
MODELS = st.sampled_from(
    [
        at("openai", "gpt-4o"),
        at("openai", "gpt-4o-mini-2024-07-18"),
        at("openai", "gpt-5-mini"),
        at("openai", "gpt-5.4"),
        at("openai", "gpt-5.6-luna"),
        at("openai", "o3"),
        at("openai", "gpt-4"),
        at("anthropic", "claude-haiku-4-5"),
        at("anthropic", "claude-sonnet-4-5-20250929"),
        at("anthropic", "claude-opus-4-6"),
        at("deepseek", "deepseek-chat"),
        at("perplexity", "sonar-deep-research"),
    ]
)
TIMES = st.floats(datetime(2025, 1, 1, tzinfo=UTC).timestamp(), datetime(2027, 2, 1, tzinfo=UTC).timestamp())


@settings(deadline=None, max_examples=300)
@given(MODELS, usages(), TIMES)
def test_a_cost_is_to_the_last_digit_what_genai_prices_says(endpoint, usage, when):
    assert ours(endpoint, usage, when) == theirs(endpoint, usage, when)


@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from(["gpt-5-mini", "gpt-5.4", "gpt-4o", "o3"]), usages(), TIMES, st.sampled_from(["flex", "priority"])
)
def test_a_service_tier_that_the_table_knows_has_its_own_price(model, usage, when, tier):
    endpoint = at("openai", model)
    assert ours(endpoint, usage, when, service_tier=tier) == theirs(endpoint, usage, when, service_tier=tier)


def test_every_model_of_the_table_costs_what_genai_prices_says_or_nothing_is_said():
    usage = Usage(
        input_tokens=300_000, output_tokens=7_001, cached_input_tokens=1_003, cache_write_tokens=90, reasoning_tokens=17
    )
    priced = 0
    for seller in SELLERS.values():
        for model in seller.models:
            # By the record itself: one name may stand for several, and only the first can be found.
            entry = prices.table.Entry(model, True, False, 0)
            tariff = prices._table_tariff(entry, NOVEMBER, None, "openai")
            if tariff is None or (cost := tariff.at(usage.input_tokens).of(usage)) is None:
                continue
            with warnings.catch_warnings(action="ignore"):
                expected = model.calc_price(
                    genai_prices.Usage(
                        input_tokens=usage.input_tokens,
                        output_tokens=usage.output_tokens,
                        cache_read_tokens=usage.cached_input_tokens,
                        cache_write_tokens=usage.cache_write_tokens,
                        output_reasoning_tokens=usage.reasoning_tokens,
                    ),
                    seller,
                    genai_request_timestamp=datetime.fromtimestamp(NOVEMBER, UTC),
                ).total_price
            assert prices._usd(cost) == expected, (seller.id, model.id)
            priced += 1
    assert priced > 1500


def test_the_price_is_that_of_the_date_of_the_call():
    usage = Usage(input_tokens=1_000_000)
    before, after = (datetime(2025, 6, day, 23, 59, tzinfo=UTC).timestamp() for day in (9, 10))
    assert ours(at("openai", "o3"), usage, before) == 10
    assert ours(at("openai", "o3"), usage, after) == 2


def test_anthropic_bills_cache_writes_by_how_long_they_last():
    usage = Usage(input_tokens=1_000_000, cache_write_tokens=1_000_000, cache_write_1h_tokens=400_000)
    assert ours(at("anthropic", "claude-haiku-4-5"), usage) == Decimal("0.6") * Decimal("1.25") + Decimal("0.4") * 2
    own = at("anthropic", "claude-next", price=Price(input=Decimal(1), output=Decimal(5)))
    assert ours(own, usage) == Decimal("0.6") * Decimal("1.25") + Decimal("0.4") * 2
    assert ours(replace(own, wire="openai"), usage) == 1


def test_the_model_that_answered_is_billed_if_it_is_known():
    usage = Usage(input_tokens=1_000_000)
    endpoint = at("openai", "gpt-4o")
    assert ours(endpoint, usage, model="gpt-4o-mini-2024-07-18") == Decimal("0.15")
    assert ours(endpoint, usage, model="no-such-model") == Decimal("2.5")
    assert ours(endpoint, usage, model="x" * 100_000) == Decimal("2.5")
    assert ours(endpoint, usage, model="") == Decimal("2.5")


def test_a_price_in_the_settings_wins_over_everything():
    price = Price(
        input=Decimal("0.10"), output=Decimal("0.30"), cached_input=Decimal("0.01"), cache_write=Decimal("0.2")
    )
    usage = Usage(
        input_tokens=1_000_000, output_tokens=1_000_000, cached_input_tokens=500_000, cache_write_tokens=100_000
    )
    expected = Decimal("0.4") * Decimal("0.1") + Decimal("0.5") * Decimal("0.01") + Decimal("0.1") * Decimal("0.2")
    for endpoint in (at("openai", "gpt-4o"), at("vllm", "q", local=True), at("simulator", "s", simulated=True)):
        found = prices.cost(replace(endpoint, price=price), usage, at=NOVEMBER, model="gpt-4o", service_tier="priority")
        assert (found.usd, found.source) == (expected + Decimal("0.3"), "config")


def test_nothing_is_paid_at_home():
    usage = Usage(input_tokens=10, output_tokens=10)
    local, simulated = at("vllm", "gpt-4o", local=True), at("simulator", "gpt-4o", simulated=True)
    assert prices.cost(local, usage, at=NOVEMBER) == prices.Cost(Decimal(0), "local")
    assert prices.cost(simulated, usage, at=NOVEMBER) == prices.Cost(Decimal(0), "simulated")
    for endpoint in (local, simulated):
        assert prices.is_free(endpoint)
        assert prices.worst_case(endpoint, 10**6, 10**6, at=NOVEMBER) == 0
        assert prices.affordable_output(endpoint, 10**6, Decimal(0), at=NOVEMBER) == prices.UNLIMITED
    priced = replace(local, price=Price(input=Decimal(0), output=Decimal("0.1")))
    assert not prices.is_free(priced)
    assert prices.is_free(replace(local, price=Price(input=Decimal(0), output=Decimal(0))))
    assert not prices.is_free(at("openai", "gpt-4o"))


def test_an_unknown_price_is_none_and_not_nothing():
    endpoint = at("somewhere", "mystery-1")
    assert prices.cost(endpoint, Usage(input_tokens=1), at=NOVEMBER) is None
    assert prices.worst_case(endpoint, 1, 1, at=NOVEMBER) is None
    assert prices.affordable_output(endpoint, 1, Decimal(1), at=NOVEMBER) is None
    assert not prices.is_known(endpoint, at=NOVEMBER)
    assert prices.is_known(at("openai", "gpt-4o"), at=NOVEMBER)


def test_a_model_without_a_price_for_output_has_one_for_input_alone():
    endpoint = at("openai", "text-embedding-3-small")
    assert ours(endpoint, Usage(input_tokens=1_000_000)) == Decimal("0.02")
    assert ours(endpoint, Usage(input_tokens=1_000_000, output_tokens=1)) is None
    assert prices.worst_case(endpoint, 1_000_000, 0, at=NOVEMBER) == Decimal("0.02")
    assert prices.worst_case(endpoint, 1, 1, at=NOVEMBER) is None
    assert not prices.is_known(endpoint, at=NOVEMBER)


def test_what_is_sold_by_other_measures_than_tokens_is_unknown():
    assert ours(at("openai", "tts-1"), Usage(input_tokens=5)) is None
    assert ours(at("openai", "whisper-1"), Usage(input_tokens=5)) is None


def test_the_free_models_of_openrouter_are_free_and_the_unpriced_are_not():
    assert ours(at("openrouter", "deepseek/deepseek-r1:free"), Usage(input_tokens=5)) == 0
    assert ours(at("openrouter", "stealth/crouton-alpha"), Usage(input_tokens=5)) is None


def test_the_source_says_what_the_price_rests_on():
    usage = Usage(input_tokens=1)

    def source(endpoint, **options):
        return prices.cost(endpoint, usage, at=NOVEMBER, **options).source

    table = f"genai-prices {genai_prices.__version__}"
    assert source(at("openai", "gpt-4o")) == table
    assert source(at("openai", "gpt-4o"), service_tier="priority") == table
    assert source(at("openai", "gpt-4o"), service_tier="on_demand") == table
    assert source(at("litellm", "gpt-4o")) == f"{table}, list price"
    hostile = source(at("litellm", "gpt-4o"), service_tier="\x1b[31m" * 1000)
    assert hostile == f"{table}, list price, service tier unknown"


def test_a_usage_that_contradicts_itself_is_cut_to_its_totals():
    endpoint = at("openai", "gpt-4o")
    assert ours(endpoint, Usage(input_tokens=-5, output_tokens=-5, cached_input_tokens=-5)) == 0
    cached = Usage(input_tokens=100, cached_input_tokens=1_000_000)
    assert ours(endpoint, cached) == ours(endpoint, replace(cached, cached_input_tokens=100))
    more = Usage(input_tokens=100, output_tokens=10, cache_write_tokens=10**9, cache_write_1h_tokens=10**10)
    assert ours(endpoint, more) == ours(endpoint, replace(more, cache_write_tokens=100, cache_write_1h_tokens=100))
    endless = ours(endpoint, Usage(input_tokens=10**4000, output_tokens=10**4000))
    assert prices.to_nanos(endless) < 2**63


def test_the_users_decimal_context_changes_nothing():
    usage = Usage(input_tokens=123_456_789, output_tokens=987_654_321)
    endpoint = at("openai", "gpt-4o-mini")
    exact = ours(endpoint, usage)
    with decimal.localcontext(prec=3, Emax=4, Emin=-4):
        assert ours(endpoint, usage) == exact
    with decimal.localcontext(prec=3):
        nanos = prices.to_nanos(exact)
    assert nanos == 123_456_789 * 150 + 987_654_321 * 600
    with decimal.localcontext(prec=3):
        assert prices.from_nanos(nanos) == exact


# -- the worst case --------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=300)
@given(MODELS, usages(), TIMES, st.integers(0, 1000), st.integers(0, 1000))
def test_no_usage_within_the_bounds_costs_more_than_the_worst_case(endpoint, usage, when, more_input, more_output):
    worst = prices.worst_case(endpoint, usage.input_tokens + more_input, usage.output_tokens + more_output, at=when)
    assert worst >= ours(endpoint, usage, when)


@settings(deadline=None, max_examples=100)
@given(MODELS, usages(), TIMES)
def test_without_asked_for_caches_it_still_holds_for_what_is_written_unasked(endpoint, usage, when):
    if endpoint.wire == "anthropic":
        usage = replace(usage, cache_write_tokens=0, cache_write_1h_tokens=0)
    worst = prices.worst_case(endpoint, usage.input_tokens, usage.output_tokens, at=when, cache_writes=False)
    assert worst >= ours(endpoint, usage, when)


@settings(deadline=None, max_examples=300)
@given(MODELS, st.integers(0, 500_000), st.decimals(0, 20, places=9, allow_nan=False), TIMES, st.booleans())
def test_the_affordable_output_is_the_most_that_the_worst_case_allows(endpoint, tokens, usd, when, writes):
    def worst(output):
        return prices.worst_case(endpoint, tokens, output, at=when, cache_writes=writes)

    most = prices.affordable_output(endpoint, tokens, usd, at=when, cache_writes=writes)
    assert worst(most) <= usd or (most == 0 and worst(0) > usd)
    assert worst(most + 1) > usd


def test_the_worst_case_leaves_out_caches_that_nobody_asks_for():
    anthropic, openai = at("anthropic", "claude-haiku-4-5"), at("openai", "gpt-6.1-terra")
    assert prices.worst_case(anthropic, 10**5, 0, at=NOVEMBER) == Decimal("0.2")
    assert prices.worst_case(anthropic, 10**5, 0, at=NOVEMBER, cache_writes=False) == Decimal("0.1")
    assert prices.worst_case(openai, 10**5, 0, at=NOVEMBER, cache_writes=False) == Decimal("0.125")


def test_a_cap_without_end_or_sense():
    endpoint = at("openai", "gpt-4o")
    assert prices.affordable_output(endpoint, 10, Decimal("Infinity"), at=NOVEMBER) == prices.UNLIMITED
    assert prices.affordable_output(endpoint, 10, Decimal("NaN"), at=NOVEMBER) == 0
    assert prices.affordable_output(endpoint, 10, Decimal(-1), at=NOVEMBER) == 0


@pytest.mark.parametrize(
    "messages, extra, asks",
    [
        ([Message("user", "say cache_control")], {}, False),
        ([Message("user", [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}])], {}, True),
        ([Message("user", [{"type": "text", "text": "x"}])], {"top_k": 3}, False),
        ([Message("user", "x")], {"cache_control": {"type": "ephemeral", "ttl": "1h"}}, True),
        ([Message("user", "x")], {"tools": [{"name": "f", "cache_control": {"type": "ephemeral"}}]}, True),
    ],
)
def test_a_request_that_asks_for_a_cache_is_told_from_one_that_does_not(messages, extra, asks):
    assert prices.asks_for_cache(messages, extra) is asks


# -- stores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "usd, nanos",
    [
        ("0", 0),
        ("1", 10**9),
        ("0.000000001", 1),
        ("0.0000000001", 1),
        ("0.0000000019", 2),
        ("12.3456789012", 12_345_678_902),
    ],
)
def test_a_store_rounds_up(usd, nanos):
    assert prices.to_nanos(Decimal(usd)) == nanos


@given(st.integers(0, 2**63 - 1))
def test_nanos_come_back_as_they_went(nanos):
    assert prices.to_nanos(prices.from_nanos(nanos)) == nanos


def test_a_cost_reads_as_people_write_it():
    assert str(prices.from_nanos(20 * 10**9)) == "20"
    assert str(prices.from_nanos(1_500_000)) == "0.0015"


def test_a_cost_says_which_price_it_was_made_with() -> None:
    own = at(
        "openai", "gpt-5-mini", price=Price(input=Decimal("0.10"), output=Decimal(2), cached_input=Decimal("0.025"))
    )
    found = prices.cost(own, Usage(10, 5), at=NOVEMBER)
    assert json.loads(found.price) == {"input": "0.1", "cached_input": "0.025", "output": "2"}
    assert found.price_date is None
    listed = prices.cost(at("openai", "gpt-5-mini"), Usage(10, 5), at=NOVEMBER)
    assert set(json.loads(listed.price)) >= {"input", "output"}
    assert date.fromisoformat(listed.price_date) == table.newest_price()
    assert prices.cost(at("simulator", "s", simulated=True), Usage(10, 5), at=NOVEMBER).price is None


def test_the_worst_case_in_nanos_is_the_worst_case_rounded_up() -> None:
    for tokens in ((0, 0), (1, 1), (999, 7), (300_000, 128_000)):
        worst = prices.worst_case(at("openai", "gpt-5-mini"), *tokens, at=NOVEMBER)
        assert prices.worst_nanos(at("openai", "gpt-5-mini"), *tokens, at=NOVEMBER) == prices.to_nanos(worst)
    unknown = at("nobody", "no-such-model")
    assert prices.worst_nanos(unknown, 1, 1, at=NOVEMBER) is None
