"""llmkit.plan and llmkit.planner: what a plan says is what the call then does, and nothing is done for it."""

from __future__ import annotations

import asyncio
import sqlite3
from decimal import Decimal

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import llmkit
from llmkit import errors
from llmkit.call import digest_of
from llmkit.layers.schema import most_added
from llmkit.models import prices
from llmkit.models.prices import from_nanos
from llmkit.plan import Expectation, Plan, PlannedLink
from llmkit.planner import NEWEST, USUAL_OUTPUT
from llmkit.schema import Schema
from llmkit.testing import FakeClock, Fault, Simulator

PRICE = {"input": 1, "output": 2}
NOON = 1_767_268_800.0


def config(url="memory", **more):
    models = {
        "m": {"provider": "own", "model": "m-1", "price": PRICE},
        "cheap": {"provider": "own", "model": "m-2", "price": {"input": 0.1, "output": 0.1}},
        "unpriced": {"provider": "own", "model": "m-3"},
        "keyless": {"provider": "locked", "model": "m-4", "price": PRICE},
        "chain": {"chain": ["m", "cheap"]},
    }
    fields = {
        "environ": {},
        "model": "m",
        "models": models | more.pop("models", {}),
        "providers": {
            "own": {"base_url": "http://127.0.0.1:9/v1"},
            "locked": {"base_url": "http://127.0.0.1:9/v1", "api_key_env": "NO_SUCH_KEY"},
        },
        "state": {"url": url},
        **more,
    }
    return llmkit.Config.of(**fields)


def client(simulator=None, url="memory", **more):
    clock = FakeClock(NOON)
    return llmkit.Client(
        transport=simulator or Simulator("one two three", clock=clock), clock=clock, config=config(url, **more)
    )


@pytest.fixture
def simulator():
    return Simulator("one two three", clock=FakeClock())


# -- nothing is done -----------------------------------------------------------------------------------------------------


def rows_of(path):
    """All that stands in a database."""
    connection = sqlite3.connect(path)
    try:
        names = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {name: connection.execute(f"SELECT * FROM {name}").fetchall() for name in names}
    finally:
        connection.close()


def test_nothing_is_sent_and_nothing_is_written(tmp_path) -> None:
    clock = FakeClock(NOON)
    simulator = Simulator("one two three", clock=clock)
    heard = []
    with simulator.server() as url:
        made = config(
            f"sqlite:///{tmp_path}/ledger.sqlite3", providers={"own": {"base_url": url}, "locked": {"base_url": url}}
        )
        with llmkit.Client(config=made, clock=clock) as asking:
            asking.complete("older")
            asking.complete("known")
            files = ["ledger.sqlite3", "ledger.cache.sqlite3"]
            before, requests = {name: rows_of(tmp_path / name) for name in files}, len(simulator.requests)
            cache, circuits = asking._client.cache, len(list(asking.circuits))
            hits = cache.hits, cache.misses
            used, copies = dict(cache._entries._used), list(cache._copies)
            for options in ({}, {"cache": "refresh"}, {"model": "chain"}, {"max_cost": 1e-6}, {"cache": "only"}):
                for prompt in ("known", "unknown", "older"):
                    asking.plan(prompt, on_event=heard.append, **options)
            assert len(simulator.requests) == requests
            assert {name: rows_of(tmp_path / name) for name in files} == before
            assert (cache.hits, cache.misses, dict(cache._entries._used)) == (*hits, used)
            assert list(cache._copies) == copies, "looking is no use"
            assert len(list(asking.circuits)) == circuits, "a model that was only planned for is not in use"
            assert heard == []
            assert asking._client.ledger._open_calls == {}
            assert asking._client._budgets.line._lines == {}


def test_a_plan_in_a_cold_client_reaches_no_server() -> None:
    with client() as asking:
        plan = asking.plan("hi", max_tokens=10)
        assert asking.calls().empty
    assert (plan.source, plan.refusal, plan.cache) == ("provider", None, "miss")


# -- the plan is what happens -------------------------------------------------------------------------------------------


class Books:
    """What a client really holds for a call, and what comes of it."""

    def __init__(self, asking):
        self.holds = []
        ledger = asking._client.ledger
        told = ledger.on_held
        ledger.on_held = lambda hold: (self.holds.append(hold), told(hold))


LIMITS = st.one_of(st.none(), st.sampled_from([1e-6, 1e-5, 0.0001, 0.001, 1]))
COUNTS = st.one_of(st.none(), st.sampled_from([1, 50, 200, 400, 100_000]))


@st.composite
def tables(draw):
    """``[budget]`` at random: some limits are wide, some would refuse, some only shorten the answer."""
    found = {"request": {"usd": draw(LIMITS) or "off", "tokens": draw(COUNTS) or "off"}}
    for window in ("session", "day", "month"):
        found[window] = {"usd": draw(LIMITS) or "off", "tokens": draw(COUNTS) or "off"}
    found["user"] = {"ana": {"day": {"usd": draw(LIMITS) or "off"}}}
    found["at_limit"] = draw(st.sampled_from(["error", "warn", "downgrade"]))
    return found


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    budget=tables(),
    model=st.sampled_from(["m", "cheap", "chain", "unpriced", "simulator"]),
    max_tokens=st.one_of(st.none(), st.sampled_from([1, 10, 1000])),
    max_cost=LIMITS,
    prompt=st.sampled_from(["hi", "word " * 60, "größer 😀 " * 20]),
    user=st.sampled_from([None, "ana"]),
    before=st.integers(0, 2),
)
def test_what_is_planned_is_what_is_held_refused_and_spent(
    budget, model, max_tokens, max_cost, prompt, user, before
) -> None:
    wanted = {"model": model, "max_tokens": max_tokens, "max_cost": max_cost, "user": user}
    options = {name: value for name, value in wanted.items() if value is not None}
    with client(budget=budget, retry={"attempts": 1}) as asking:
        for number in range(before):
            try:
                asking.complete(f"earlier {number}", model="m", max_tokens=5, user=user or "bob")
            except errors.CallRejected:
                break
        books, plan = Books(asking), asking.plan(prompt, **options)
        try:
            reply = asking.complete(prompt, **options)
        except errors.CallRejected as refused:
            assert plan.refusal is not None, refused
            assert type(plan.refusal) is type(refused)
            if isinstance(refused, errors.BudgetExceeded):
                assert plan.refused_by == refused.scope
                assert (plan.refusal.limit, plan.refusal.needed, plan.refusal.unit) == (
                    refused.limit,
                    refused.needed,
                    refused.unit,
                )
                assert [each.scope for each in plan.budgets if each.refuses] == [refused.scope]
            return
        assert plan.refusal is None, plan.refusal
        assert plan.link.endpoint == f"{reply.provider}:{reply.attempts[-1].model}" or plan.source == "simulated"
        for hold in books.holds[-1:]:
            assert plan.worst_usd in (None, from_nanos(hold.nanos))
            assert plan.link.most_input_tokens + plan.link.most_output_tokens == hold.tokens
        assert reply.usage.output_tokens <= plan.link.most_output_tokens
        assert reply.usage.input_tokens <= plan.link.most_input_tokens
        if reply.cost_usd is None:
            assert plan.worst_usd is plan.expected_usd is None
        else:
            assert reply.cost_usd <= plan.worst_usd <= plan.worst_in_all_usd


@pytest.mark.parametrize(
    "prompt", ["hi", "word " * 500, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]
)
@pytest.mark.parametrize(
    "more", [{}, {"max_tokens": 7}, {"extra": {"tools": [{"name": "f" * 300}]}}, {"system": "be brief"}]
)
def test_the_hold_is_the_plans_worst_case_to_the_nano_dollar(prompt, more) -> None:
    with client(budget={"day": {"usd": 5, "tokens": 10**7}}) as asking:
        books, plan = Books(asking), asking.plan(prompt, **more)
        asking.complete(prompt, **more)
    (hold,) = books.holds
    assert (plan.worst_usd, hold.tokens) == (
        from_nanos(hold.nanos),
        plan.link.most_input_tokens + plan.link.most_output_tokens,
    )
    rows = {(each.scope, each.unit): each for each in plan.budgets}
    assert rows["day", "usd"].after_worst == from_nanos(hold.nanos)
    assert rows["day", "tokens"].after_worst == hold.tokens


def test_each_budget_is_shown_before_and_after() -> None:
    with client(budget={"day": {"usd": 1}, "request": {"usd": 0.5}}) as asking:
        spent = asking.complete("hello there", max_tokens=10).cost_usd
        plan = asking.plan("hi", max_tokens=10)
    rows = {(each.scope, each.unit): each for each in plan.budgets}
    day, request = rows["day", "usd"], rows["request", "usd"]
    assert (day.limit, day.spent, day.held, day.refuses) == (1, spent, 0, False)
    assert (day.after_expected, day.after_worst) == (spent + plan.expected_usd, spent + plan.worst_usd)
    assert day.resets_at == NOON + 12 * 3600
    assert (request.limit, request.spent, request.after_worst) == (Decimal("0.5"), 0, plan.worst_usd)


def test_what_others_hold_is_waited_for_and_said() -> None:
    async def main():
        clock = FakeClock(NOON)
        made = config(budget={"day": {"usd": 0.0004}, "session": {"usd": "off"}})
        simulator = Simulator("one two", clock=clock)
        async with llmkit.AsyncClient(transport=simulator, clock=clock, config=made) as asking:
            reply = await asking.stream("hi", max_tokens=100)
            plan = await asking.plan("another", max_tokens=100)
            await reply.aclose()
            return plan

    plan = asyncio.run(main())
    assert plan.refusal is None
    assert plan.waits.startswith("day: ")
    assert "held by calls in flight" in str(plan)


# -- what to expect ------------------------------------------------------------------------------------------------------


def test_what_to_expect_is_learnt_from_the_template_then_from_the_model() -> None:
    with client() as asking:
        assert asking.plan("hi").link.expected == Expectation(USUAL_OUTPUT, "default")
        assert asking.plan("hi", max_tokens=31).link.expected == Expectation(16, "max_tokens")
        asking.complete("a b", template="say {{ x }}")
        asking.complete("c d", template="say {{ x }}")
        asking.complete("c d", template="say {{ x }}")  # from the cache: nobody was asked
        expected = asking.plan("e f", template="say {{ x }}").link.expected
        assert expected == Expectation(3, "template", 2, 3, 3)
        assert asking.plan("e f", template="another").link.expected == Expectation(3, "model", 2, 3, 3)
        assert asking.plan("e f").link.expected.basis == "model"
        assert asking.plan("e f", model="cheap").link.expected.basis == "default"
        assert asking.plan("e f", template="say {{ x }}", max_tokens=2).link.expected.tokens == 2
        assert "mean of the last 2 answers of this template" in str(asking.plan("e f", template="say {{ x }}"))


def test_the_mean_of_the_newest_answers_is_expected_and_its_spread_told() -> None:
    with client() as asking:
        ledger = asking._client.ledger
        asking.complete("hi")
        ledger.outputs = lambda endpoint, template, limit: [3, 4, 10][:limit]
        expected = asking.plan("e f").link.expected
    assert expected == Expectation(6, "model", 3, 3, 10)  # 17 / 3, rounded up
    assert "mean of the last 3 answers" in expected.why
    assert "3 to 10" in expected.why


def test_no_text_of_a_template_is_in_the_ledger(tmp_path) -> None:
    with client(url=f"sqlite:///{tmp_path}/ledger.sqlite3") as asking:
        asking.complete("hi", template="a very secret template")
        (row,) = asking._client.ledger.calls()
    assert row["template"] == digest_of("a very secret template\n")
    assert b"very secret" not in b"".join(path.read_bytes() for path in tmp_path.iterdir() if path.is_file())


def test_only_so_many_answers_are_looked_at() -> None:
    asked = []
    with client() as asking:
        asking._client.ledger.outputs = lambda *given, limit: asked.append((given, limit)) or []
        asking.plan("hi", template="t")
    assert asked == [(("own:m-1", digest_of("t")), NEWEST), (("own:m-1", None), NEWEST)]


def test_a_ledger_that_cannot_be_read_teaches_nothing() -> None:
    def broken(*_, **__):
        raise errors.StoreError("gone")

    with client() as asking:
        asking._client.ledger.outputs = broken
        assert asking.plan("hi").link.expected.basis == "default"


# -- the cache -----------------------------------------------------------------------------------------------------------


def test_an_answer_in_the_cache_costs_nothing_and_says_what_it_saves() -> None:
    with client() as asking:
        cost = asking.complete("hi").cost_usd
        plan = asking.plan("hi")
        assert (plan.source, plan.cached, plan.cache, plan.saved_usd) == ("cache", True, "hit", cost)
        assert (plan.expected_usd, plan.worst_usd, plan.input_tokens, plan.output_tokens) == (0, 0, 0, 0)
        assert plan.link.endpoint == "own:m-1"
        assert all(each.after_worst == each.spent for each in plan.budgets)
        assert "the cache answers" in str(plan)
        assert (asking.plan("hi", repeat=1).cache, asking.plan("ho").cache) == ("miss", "miss")
        assert asking.plan("hi", cache="refresh").cache == "refresh"
        assert asking.plan("hi", cache="off").cache == "off"
        asking.cache.enabled = False
        assert asking.plan("hi").cache == "off"


def test_who_may_not_ask_is_refused_without_an_answer() -> None:
    with client() as asking:
        plan = asking.plan("hi", cache="only")
        assert (plan.source, type(plan.refusal)) == (None, errors.NotCached)
        asking.complete("hi")
        assert asking.plan("hi", cache="only").source == "cache"


def test_the_cache_answers_where_the_budget_would_refuse() -> None:
    with client() as asking:
        asking.complete("hi")
        asking.set_budgets(day={"usd": 0.000001})
        assert asking.plan("hi").source == "cache"
        assert asking.plan("ho").refused_by == "day"


def test_a_damaged_answer_is_none_and_is_left_where_it_is(tmp_path) -> None:
    clock = FakeClock(NOON)
    simulator = Simulator("one", clock=clock)
    with simulator.server() as url:
        made = config(
            f"sqlite:///{tmp_path}/ledger.sqlite3", providers={"own": {"base_url": url}, "locked": {"base_url": url}}
        )
        with llmkit.Client(config=made, clock=clock) as asking:
            asking.complete("hi")
        file = sqlite3.connect(tmp_path / "ledger.cache.sqlite3")
        file.execute("UPDATE entries SET value = x'00ff'")
        file.commit()
        with llmkit.Client(config=made, clock=clock) as asking:
            assert asking.plan("hi").cache == "miss"
        assert file.execute("SELECT count(*) FROM entries").fetchone() == (1,)
        file.close()


# -- one after the other -------------------------------------------------------------------------------------------------


def test_what_was_planned_before_counts_as_spent_and_as_stored() -> None:
    with client(budget={"day": {"usd": 0.0004}}) as asking:
        first = asking.plan("hi", max_tokens=80)
        again = asking.plan("hi", max_tokens=80, after=[first])
        second = asking.plan("ho", max_tokens=80, after=[first])
        third = asking.plan("hu", max_tokens=80, after=[first, second, second])
        fourth = asking.plan("he", max_tokens=80, after=[first, second, third])
    assert (again.source, again.cache, again.saved_usd) == ("cache", "before", first.expected_usd)
    (day,) = [each for each in second.budgets if each.scope == "day"]
    assert day.spent == first.expected_usd
    assert (second.refusal, second.late_refusal) == (None, "day")
    assert third.refused_by == "day"
    assert fourth.refused_by == "day"
    assert third.settles == {}


def test_each_repeat_is_an_answer_of_its_own() -> None:
    with client() as asking:
        first = asking.plan("hi", repeat=0)
        assert asking.plan("hi", repeat=1, after=[first]).cache == "miss"
        assert asking.plan("hi", repeat=0, after=[first]).cache == "before"
        assert asking.plan("hi", repeat=0, cache="refresh", after=[first]).cache == "refresh"
        off = asking.plan("hi", cache="off")
        assert asking.plan("hi", after=[off]).cache == "miss"


# -- the route -----------------------------------------------------------------------------------------------------------


def uses(plan):
    return [(link.endpoint, link.use) for link in plan.links]


def test_every_link_is_named_with_why_it_is_passed_over() -> None:
    chain = [
        {"model": "m", "disabled": True},
        "keyless",
        {"model": "m", "max_cost_usd": 0.000001},
        "cheap",
        {"model": "unpriced", "on": ["refused"]},
        "simulator",
    ]
    with client(models={"long": {"chain": chain}}) as asking:
        plan = asking.plan("hi", model="long", max_tokens=50)
        reply = asking.complete("hi", model="long", max_tokens=50)
    assert uses(plan) == [
        ("own:m-1", "skipped"),
        ("locked:m-4", "skipped"),
        ("own:m-1", "skipped"),
        ("own:m-2", "asked"),
        ("own:m-3", "fallback"),
        ("simulator:simulator", "fallback"),
    ]
    reasons = [link.reason or "" for link in plan.links]
    assert reasons[0] == "disabled"
    assert "NO_SUCH_KEY is not set" in reasons[1]
    assert reasons[4] == "only used after refused"
    assert reply.attempts[-1].model == "m-2"


def test_a_circuit_that_is_open_is_passed_over_and_left_as_it_is() -> None:
    simulator = Simulator("fine", clock=FakeClock(NOON))
    with client(simulator, retry={"attempts": 1}, breaker={"failures": 1}) as asking:
        simulator.fail(Fault.status(503))
        with pytest.raises(errors.ProviderOverloaded):
            asking.complete("hi")
        (circuit,) = asking.circuits
        plan = asking.plan("hi", model="chain")
        alone = asking.plan("hi")
        assert circuit.state == "open"
        assert uses(plan) == [("own:m-1", "skipped"), ("own:m-2", "asked")]
        assert "circuit" in plan.links[0].reason
        assert (alone.refused_by, type(alone.refusal)) == ("CircuitOpen", errors.CircuitOpen)
        asking._portal.run(asking._client.clock.advance(61))
        assert asking.plan("hi").refusal is None
        assert circuit.state == "open", "a plan is no probe"


def test_a_text_for_when_nobody_can_answer_costs_nothing() -> None:
    with client(degraded={"text": "later"}) as asking:
        for circuit in [asking.circuits.of(link.endpoint) for link in asking.config.route("m")]:
            circuit.isolate()
        plan = asking.plan("hi")
    assert (plan.source, plan.refusal, plan.worst_usd) == ("degraded", None, 0)


def test_no_call_leaves_the_machine_offline() -> None:
    remote = {"own": {"base_url": "http://203.0.113.1/v1"}, "locked": {"base_url": "http://203.0.113.1/v1"}}
    with client(offline=True, providers=remote) as asking:
        plan = asking.plan("hi", model="m")
    assert "offline" in plan.refusal.message


def test_an_unknown_price_under_a_cap_is_refused_and_without_one_is_said() -> None:
    with client() as asking:
        assert isinstance(asking.plan("hi", model="unpriced", max_cost=1).refusal, errors.PriceUnknown)
        plan = asking.plan("hi", model="unpriced")
        assert (plan.refusal, plan.expected_usd, plan.worst_usd, plan.worst_in_all_usd) == (None, None, None, None)
        assert "unknown" in str(plan)
        assert "unpriced" not in repr(plan)


def test_a_prompt_too_long_for_the_only_window_is_refused() -> None:
    small = {"small": {"provider": "simulator", "model": "s", "window": 5}}
    with client(models=small) as asking:
        plan = asking.plan("word " * 50, model="small")
    assert isinstance(plan.refusal, errors.ContextTooLong)


def test_the_worst_of_all_attempts_stays_within_the_cap() -> None:
    with client(retry={"attempts": 3}) as asking:
        plan = asking.plan("hi", model="chain", max_tokens=100)
        capped = asking.plan("hi", model="chain", max_tokens=100, max_cost=0.0005)
    both = sum(link.worst_usd for link in plan.links)
    assert plan.worst_in_all_usd == 3 * both
    assert capped.worst_in_all_usd == Decimal("0.0005")


def test_the_worst_of_a_schema_bounds_its_repair_and_all_that_may_be_wrong() -> None:
    schema = Schema.of("name, age int")
    with client(retry={"attempts": 1}) as asking:
        plan = asking.plan("hi", schema=schema, max_tokens=100)
        (link,) = asking.config.route("m")
    first = plan.link
    repair = first.most_input_tokens + first.most_output_tokens + most_added(schema)
    at_worst = prices.worst_case(link.endpoint, repair, first.most_output_tokens, at=NOON)
    assert plan.worst_in_all_usd == first.worst_usd + at_worst


def test_an_impossible_call_is_an_error_and_no_plan() -> None:
    with client() as asking:
        with pytest.raises(errors.ConfigError, match="temperature"):
            asking.plan("hi", temperature=9)
        with pytest.raises(errors.ConfigError, match="mod"):
            asking.plan("hi", mod="m")
        with pytest.raises(ValueError, match="no message"):
            asking.plan([])


# -- in words ------------------------------------------------------------------------------------------------------------


def test_a_plan_is_data() -> None:
    with client(budget={"day": {"usd": 1}}) as asking:
        plan = asking.plan("hi", model="chain", max_tokens=10)
    links, limits = pd.DataFrame(plan.links), pd.DataFrame(plan.budgets)
    assert list(links["endpoint"]) == ["own:m-1", "own:m-2"]
    assert {"scope", "limit", "after_worst", "refuses"} <= set(limits.columns)
    assert repr(plan).startswith("<Plan own:m-1 1 → ≈5 tokens") or repr(plan).startswith("<Plan own:m-1 ")
    assert len(repr(plan)) < 150
    assert not hasattr(plan, "_repr_html_")
    with pytest.raises(AttributeError):
        plan.source = "cache"


def test_nothing_hostile_reaches_a_terminal() -> None:
    link = PlannedLink(
        "evil\x1b[31m:m\x07\nx",
        "skipped",
        "\x1b]0;t\x07no\nline",
        1,
        False,
        2,
        Expectation(1, "default"),
        2,
        None,
        None,
        1,
    )
    refusal = errors.BudgetExceeded("no\x1b[2J", scope="user \x1b[1m\n<b>", limit=1, needed=2)
    for plan in (
        Plan(model="m\x1b[0m", source=None, links=(link,), refusal=refusal),
        Plan(model="x\x07", source="provider", links=(link,)),
    ):
        for text in (str(plan), repr(plan)):
            assert not any(ord(letter) < 32 and letter != "\n" for letter in text), text


def test_the_async_client_has_it_as_well() -> None:
    async def main():
        clock = FakeClock(NOON)
        async with llmkit.AsyncClient(transport=Simulator("a", clock=clock), clock=clock, config=config()) as asking:
            return await asking.plan("hi"), await asking.plan("hi", after=[await asking.plan("hi")])

    first, second = asyncio.run(main())
    assert (first.cache, second.cache) == ("miss", "before")


def test_while_a_recording_answers_the_plan_says_whether_it_does(tmp_path) -> None:
    with client() as asking:
        asking.record(tmp_path / "calls.jsonl")
        asking.complete("known", max_tokens=50)
        asking.live()
        asking.replay(tmp_path / "calls.jsonl")
        known, unknown = asking.plan("known", max_tokens=50), asking.plan("unknown")
        asking.replay(tmp_path / "calls.jsonl", live=True)
        live = asking.plan("unknown")
    assert (known.source, known.refusal, known.expected_usd, known.worst_usd) == ("recording", None, 0, 0)
    assert "the recording answers" in str(known)
    assert "recording" in repr(known)
    assert isinstance(unknown.refusal, errors.ReplayMismatch)
    assert (live.source, live.links[0].endpoint) == ("provider", "own:m-1")
