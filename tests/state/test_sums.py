"""Sums of spending: always what the rows add up to, whoever wrote them and however often a call ends."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest

from llmkit.errors import StoreError
from llmkit.state.memory import MemoryStore
from llmkit.state.sqlite import SQLiteStore
from llmkit.state.store import SPEND_KEYS, SPEND_SUMS, AttemptBegun, AttemptEnded, CallBegun, CallEnded

DAY = 86_400


@pytest.fixture(params=["memory", "sqlite"])
def store(request, tmp_path):
    opened = MemoryStore() if request.param == "memory" else SQLiteStore(tmp_path / "ledger.sqlite3")
    yield opened
    opened.close()


def call_begun(request_id, started=0.0, user=None, tags=None, model="asked", owner="o"):
    return CallBegun(request_id, started, user, json.dumps(tags or {}), model, owner)


def attempt_begun(request_id, number=1, provider="openai", model="m"):
    return AttemptBegun(request_id, number, 5.0, provider, model, None)


def attempt_ended(request_id, number=1, nanos=10, counts=(1, 2, 3, 4, 5), maybe_billed=0, status="complete"):
    return AttemptEnded(
        status, *counts, 0, nanos, *[None] * 3, 0.5, *[None] * 4, maybe_billed, None, None, request_id, number
    )


def call_ended(request_id, saved=None, provider="openai", answered="m-2026", status="complete"):
    unknown = CallEnded._make([None] * len(CallEnded._fields))
    known = {"status": status, "response_model": answered, "provider": provider, "request_id": request_id}
    return unknown._replace(saved_nanos=saved, attempts=0, retries=0, **known)


def made(store, request_id, nanos=10, provider="openai", model="m", **more):
    store.commit([call_begun(request_id, **more), attempt_begun(request_id, 1, provider, model)])
    store.commit([attempt_ended(request_id, 1, nanos), call_ended(request_id)])


def by(store, *columns, sums=("cost_nanos",), **how):
    return dict(
        sorted(
            ((row[: -len(sums)], row[-len(sums) :][0]) for row in store.spend(by=columns, sums=sums, **how)),
            key=str,
        )
    )


def test_a_call_that_ended_is_in_its_quarter_and_one_in_flight_is_not(store):
    store.commit([call_begun("a", 1799.9, "ana", {"b": "2", "a": "1"}), attempt_begun("a")])
    assert store.spend() == []
    store.commit([attempt_ended("a"), call_ended("a", saved=7)])
    (row,) = store.spend()
    assert dict(zip((*SPEND_KEYS, *SPEND_SUMS), row, strict=True)) == {
        "quarter": 900,
        "model": "openai:m",
        "user": "ana",
        "tags": '{"b": "2", "a": "1"}',
        "calls": 1,
        "attempts": 1,
        "input_tokens": 1,
        "cached_input_tokens": 2,
        "cache_write_tokens": 3,
        "output_tokens": 4,
        "reasoning_tokens": 5,
        "cost_nanos": 10,
        "saved_nanos": 7,
        "unpriced": 0,
        "maybe_billed": 0,
    }


def test_each_attempt_is_under_its_own_endpoint_and_the_call_under_the_last(store):
    store.commit([call_begun("a"), attempt_begun("a")])
    store.commit([attempt_ended("a", nanos=None, counts=[None] * 5, maybe_billed=1, status="failed")])
    assert by(store, "model", sums=("calls",)) == {("openai:m",): 0}
    store.commit([attempt_begun("a", 2, "anthropic", "n")])
    store.commit([attempt_ended("a", 2), call_ended("a", provider="anthropic", answered="n")])
    assert by(store, "model", sums=("calls",)) == {("anthropic:n",): 1, ("openai:m",): 0}
    assert by(store, "model", sums=("unpriced",)) == {("anthropic:n",): 0, ("openai:m",): 1}
    assert by(store, "model", sums=("maybe_billed",)) == {("anthropic:n",): 0, ("openai:m",): 1}


def test_what_came_from_the_cache_is_under_the_model_that_had_answered(store):
    store.commit([call_begun("a")])
    store.commit([call_ended("a", saved=500)])
    store.commit([call_begun("b"), call_ended("b", saved=40, provider=None, answered=None)])
    assert by(store, "model", sums=("saved_nanos",)) == {("asked",): 40, ("openai:m-2026",): 500}
    assert by(store, sums=("attempts",)) == {(): 0}


def test_a_call_that_ends_again_is_counted_once(store):
    store.commit([call_begun("a", owner="dead"), attempt_begun("a")])
    store.commit([call_begun("b", owner="dead")])
    store.mark_lost("dead")
    assert by(store, "model", sums=("calls",)) == {("asked",): 1, ("openai:m",): 1}
    assert by(store, sums=("unpriced",)) == {(): 1}
    store.commit([attempt_ended("a", nanos=5), call_ended("a")])
    store.commit([attempt_begun("b", 1, "openai", "late")])
    store.commit([attempt_ended("b", nanos=6), call_ended("b", saved=3)])
    store.commit([attempt_ended("b", nanos=7), call_ended("b", saved=4)])
    assert by(store, "model", sums=("calls",)) == {("asked",): 0, ("openai:late",): 1, ("openai:m",): 1}
    assert by(store, sums=("unpriced",)) == {(): 0}
    assert by(store, sums=("saved_nanos",)) == {(): 4}
    assert by(store) == {(): 12}


def test_a_commit_that_failed_is_in_no_sum(store):
    made(store, "a")
    with pytest.raises(StoreError):
        store.commit([attempt_ended("a", nanos=999), call_begun("b"), call_ended("b"), call_begun("a")])
    assert by(store) == {(): 10}
    assert by(store, sums=("calls",)) == {(): 1}


def test_numbers_that_no_server_can_mean_stop_no_sum(store):
    for number in range(20):
        store.commit([call_begun(str(number)), attempt_begun(str(number))])
        store.commit([attempt_ended(str(number), 1, 10**30, (10**30, -5, -(10**30), 2**63 - 1, 0))])
    assert by(store) == {(): 20 * 10**15}
    assert by(store, sums=("input_tokens",)) == {(): 20 * 10**15}
    assert by(store, sums=("cache_write_tokens",)) == {(): 0}


def test_sums_by_any_columns_and_times(store):
    made(store, "a", 1, started=10 * DAY, user="ana", tags={"app": "x"})
    made(store, "b", 10, started=10 * DAY + 899, user="bob", model="n")
    made(store, "c", 100, started=10 * DAY + 900, user="ana")
    made(store, "d", 1_000, started=11 * DAY, user="ana")
    made(store, "e", 10_000, started=12 * DAY - 1)
    assert by(store, "user") == {("",): 10_000, ("ana",): 1_101, ("bob",): 10}
    assert by(store, "user", "model") == {
        ("", "openai:m"): 10_000,
        ("ana", "openai:m"): 1_101,
        ("bob", "openai:n"): 10,
    }
    assert by(store, "tags") == {('{"app": "x"}',): 1, ("{}",): 11_110}
    assert by(store, "quarter") == {
        (10 * DAY,): 11,
        (10 * DAY + 900,): 100,
        (11 * DAY,): 1_000,
        (12 * DAY - 900,): 10_000,
    }
    assert by(store, "user", since=10 * DAY + 900, until=11 * DAY + 900) == {("ana",): 1_100}
    assert by(store, since=11 * DAY) == {(): 11_000}
    assert by(store, until=11 * DAY) == {(): 111}
    assert by(store, since=13 * DAY) in ({}, {(): None})
    days = [9 * DAY, 10 * DAY, 11 * DAY, 12 * DAY, 13 * DAY]
    assert by(store, windows=days) == {(10 * DAY,): 111, (11 * DAY,): 11_000}
    assert by(store, windows=days, since=10 * DAY + 900) == {(10 * DAY,): 100, (11 * DAY,): 11_000}
    assert by(store, "user", windows=days) == {
        (10 * DAY, "ana"): 101,
        (10 * DAY, "bob"): 10,
        (11 * DAY, ""): 10_000,
        (11 * DAY, "ana"): 1_000,
    }
    # Days of a place whose clocks are half an hour beside the hour: only the edges come from quarters.
    odd = [10 * DAY + 900, 11 * DAY + 900, 12 * DAY + 900]
    assert by(store, windows=odd) == {(10 * DAY + 900,): 1_100, (11 * DAY + 900,): 10_000}
    assert by(store, windows=[]) == by(store, windows=[0]) == {}


@pytest.mark.parametrize(
    "wrong",
    [
        {"by": ["day"]},
        {"by": ["model; DROP TABLE spend"]},
        {"sums": ["cost"]},
        {"sums": []},
        {"windows": [900, 0]},
        {"windows": [0] * 20_001},
    ],
)
def test_what_cannot_be_summed_is_said(store, wrong):
    with pytest.raises(ValueError, match=r"columns|windows"):
        store.spend(**wrong)


def test_more_sums_than_anybody_can_read_are_refused(store, monkeypatch):
    for number in range(5):
        made(store, str(number), user=str(number))
    monkeypatch.setattr("llmkit.state.memory.MOST_SUMS", 4)
    monkeypatch.setattr("llmkit.state.sqlite.MOST_SUMS", 4)
    with pytest.raises(StoreError, match="more than 4 sums") as caught:
        store.spend()
    assert "shorter time" in caught.value.next_step
    assert len(store.spend(by=("model",))) == 1


def test_many_windows(store):
    made(store, "a", 1, started=900.0)
    made(store, "b", 2, started=3600.0 * 9_000)
    hours = [hour * 3600 for hour in range(10_001)]
    assert by(store, windows=hours) == {(0,): 1, (3600 * 9_000,): 2}


def anything(store, chance, key, attempts):
    """One thing that may happen to a call; ``attempts`` counts those of each that has begun."""
    action = chance.choice(["begin", "attempt", "end attempt", "end call", "lose"])
    if action == "begin" and key not in attempts:
        store.commit([call_begun(key, chance.uniform(0, 3 * DAY), chance.choice([None, "ana"]), owner=key)])
        attempts[key] = 0
    elif action == "attempt" and key in attempts:
        attempts[key] += 1
        store.commit([attempt_begun(key, attempts[key], "openai", chance.choice("mn"))])
    elif action == "end attempt" and attempts.get(key):
        counts = [chance.choice([None, chance.randrange(100)]) for _ in range(5)]
        nanos, maybe_billed = chance.choice([None, chance.randrange(1_000)]), chance.randint(0, 1)
        store.commit([attempt_ended(key, chance.randint(1, attempts[key]), nanos, counts, maybe_billed)])
    elif action == "end call":
        store.commit([call_ended(key, chance.choice([None, chance.randrange(100)]))])
    elif action == "lose":
        store.mark_lost(key)


def added_up(store):
    """The sums by quarter, user and column, as the rows have them."""
    sums = Counter()
    for call in store.calls():
        key = (int(call["started"] // 900 * 900), call["user"] or "")
        if call["status"] != "in_flight":
            sums[*key, "calls"] += 1
            sums[*key, "saved_nanos"] += call["saved_nanos"] or 0
        for row in store.attempts(call["request_id"]):
            if row["status"] != "in_flight":
                sums[*key, "attempts"] += 1
                sums[*key, "unpriced"] += row["cost_nanos"] is None
                sums[*key, "maybe_billed"] += bool(row["maybe_billed"])
                for name in SPEND_SUMS[2:8]:
                    sums[*key, name] += row[name] or 0
    return {key: value for key, value in sums.items() if value}


def test_whatever_happens_the_sums_are_what_the_rows_add_up_to(store):
    chance, attempts = random.Random(11), {}
    for _ in range(600):
        anything(store, chance, str(chance.randrange(30)), attempts)
    found = Counter()
    for quarter, user, *counts in store.spend(by=("quarter", "user")):
        for name, value in zip(SPEND_SUMS, counts, strict=True):
            found[quarter, user, name] += value
    expected = added_up(store)
    assert sum(attempts.values()) > 50
    assert {key: value for key, value in found.items() if value} == expected
    for column in SPEND_SUMS:
        assert by(store, sums=(column,)) == {(): sum(value for key, value in expected.items() if key[2] == column)}
        assert min(row[-1] for row in store.spend(sums=(column,))) >= 0


def test_rows_that_somebody_else_put_there_are_counted(tmp_path):
    store = SQLiteStore(tmp_path / "ledger.sqlite3")

    def write(connection):
        connection.execute(
            "INSERT INTO calls (request_id, started, model, owner, status) VALUES ('x', 5.0, 'm', 'o', 'complete')"
        )
        connection.execute(
            "INSERT INTO attempts (request_id, number, started, provider, model, status, cost_nanos, input_tokens)"
            " VALUES ('x', 1, 5.0, 'p', 'm', 'complete', 'rubbish', 7)"
        )

    store.database.run_patiently(write)
    assert by(store, sums=("calls",)) == {(): 1}
    assert by(store, sums=("input_tokens",)) == {(): 7}
    assert by(store) in ({(): 0}, {(): 10**15})
    store.close()
