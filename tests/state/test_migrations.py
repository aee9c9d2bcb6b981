"""Files of every earlier schema, with rows in them: nothing is lost, and sums begin with what is there."""

from __future__ import annotations

import sqlite3

import pytest

from llmkit.account import Account, Hold
from llmkit.state.migrations import APPLICATION_ID, LAST_ENDPOINT, MIGRATIONS
from llmkit.state.sqlite import SQLiteStore
from llmkit.state.store import (
    ATTEMPT_COLUMNS,
    CALL_COLUMNS,
    SPEND_SUMS,
    AttemptBegun,
    AttemptEnded,
    CallBegun,
    CallEnded,
)

# What a file of the first schema held: the names of the columns at that time, and rows of every kind.
CALLS = (
    "request_id, started, user, tags, model, owner, status, response_model, provider, source, input_tokens, "
    "output_tokens, cost_nanos, latency_s, attempts, retries"
)
ATTEMPTS = (
    "request_id, number, started, provider, model, status, input_tokens, cached_input_tokens, cache_write_tokens, "
    "output_tokens, reasoning_tokens, cost_nanos, maybe_billed"
)
HUGE = 2**63 - 1
FIRST = {
    "calls": [
        (
            "a",
            900.0,
            "ana",
            '{"app": "docs"}',
            "smart",
            "o",
            "complete",
            "m-1",
            "openai",
            "provider",
            12,
            3,
            70,
            1.0,
            2,
            1,
        ),
        ("b", 901.5, None, "{}", "openai:m", "o", "complete", "m", "openai", "provider", 1, 1, 5, 1.0, 1, 0),
        ("c", 1799.9, None, "{}", "openai:m", "o", "failed", None, None, None, None, None, None, 1.0, 1, 0),
        ("d", 4000.0, None, "{}", "openai:m", "o", "rejected", None, None, None, None, None, 0, 1.0, 0, 0),
        ("e", 4000.0, None, "{}", "openai:m", "o", "in_flight", None, None, None, None, None, None, None, None, None),
        ("f", 4001.0, None, "{}", "openai:m", "o", "complete", None, None, None, HUGE, HUGE, HUGE, 1.0, 1, 0),
    ],
    "attempts": [
        ("a", 1, 900.1, "openai", "m", "failed", None, None, None, None, None, None, 1),
        ("a", 2, 950.0, "anthropic", "n", "complete", 12, 2, 1, 3, 1, 70, 0),
        ("b", 1, 901.5, "openai", "m", "complete", 1, 0, 0, 1, 0, 5, 0),
        ("c", 1, 1800.5, "openai", "m", "failed", None, None, None, None, None, 0, 0),
        ("e", 1, 4000.5, "openai", "m", "in_flight", None, None, None, None, None, None, None),
        ("f", 1, 4001.0, "openai", "m", "complete", HUGE, 0, 0, HUGE, -5, HUGE, 0),
    ],
}
MOST = 10**15
SUMS = {
    (900, "openai:m", "ana", '{"app": "docs"}'): {"attempts": 1, "unpriced": 1, "maybe_billed": 1},
    (900, "anthropic:n", "ana", '{"app": "docs"}'): {
        "calls": 1,
        "attempts": 1,
        "input_tokens": 12,
        "cached_input_tokens": 2,
        "cache_write_tokens": 1,
        "output_tokens": 3,
        "reasoning_tokens": 1,
        "cost_nanos": 70,
    },
    (900, "openai:m", "", "{}"): {"calls": 2, "attempts": 2, "input_tokens": 1, "output_tokens": 1, "cost_nanos": 5},
    (3600, "openai:m", "", "{}"): {
        "calls": 2,
        "attempts": 1,
        "input_tokens": MOST,
        "output_tokens": MOST,
        "cost_nanos": MOST,
    },
}


def made(path, version):
    """A file as an llmkit of that schema left it; the rows are written by hand, with the columns of that time.

    From the second schema on, triggers sum what ends, and a call that ends is given the endpoint it came to last.
    """
    raw = sqlite3.connect(path, isolation_level=None)
    raw.execute("PRAGMA journal_mode = WAL")
    for step in MIGRATIONS[:version]:
        for statement in step:
            raw.execute(statement)
    if version:
        for table, columns in (("calls", CALLS), ("attempts", ATTEMPTS)):
            places = ", ".join("?" * len(columns.split(",")))
            rows = FIRST[table]
            if version >= 2 and table == "calls":
                rows = [(*row[:6], "in_flight", *row[7:]) for row in rows]
            raw.executemany(f"INSERT INTO {table} ({columns}) VALUES ({places})", rows)
        if version >= 2:
            end = f"UPDATE calls SET status = ?, endpoint = ({LAST_ENDPOINT}) WHERE request_id = ?"
            raw.executemany(end, [(row[6], row[0]) for row in FIRST["calls"] if row[6] != "in_flight"])
    raw.execute(f"PRAGMA user_version = {version}")
    raw.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    before = {table: raw.execute(f"SELECT * FROM {table}").fetchall() for table in FIRST} if version else {}
    raw.close()
    return before


def nonzero(store, **how):
    rows = store.spend(**how)
    return {row[: -len(SPEND_SUMS)]: {n: v for n, v in zip(SPEND_SUMS, row[-11:], strict=True) if v} for row in rows}


@pytest.fixture(params=range(1, len(MIGRATIONS)))
def migrated(request, tmp_path):
    """A store over a file of each schema that there was, with what stood in it before."""
    path = tmp_path / "ledger.sqlite3"
    before = made(path, request.param)
    store = SQLiteStore(path)
    store.before = before
    yield store
    store.close()


def test_the_first_step_is_as_it_was_released():
    statements = "".join("".join(statement.split()) for statement in MIGRATIONS[0])
    assert len(MIGRATIONS[0]) == 4
    assert statements.count("saved_nanos") == statements.count("price_date") == 0
    assert statements.startswith("CREATETABLEcalls(request_idTEXTPRIMARYKEYNOTNULL,startedREALNOTNULL,")


def test_every_row_is_kept_as_it_was(migrated):
    for table, rows in migrated.before.items():
        now = migrated.database.read(f"SELECT * FROM {table}")
        assert [row[: len(rows[0])] for row in now] == rows
    calls = {row["request_id"]: row for row in migrated.calls()}
    assert tuple(calls["a"]) == CALL_COLUMNS
    assert tuple(migrated.attempts("a")[1]) == ATTEMPT_COLUMNS
    assert calls["a"]["saved_nanos"] is calls["a"]["template"] is None
    assert (migrated.attempts("a")[1]["price"], migrated.attempts("a")[1]["price_date"]) == (None, None)


def test_sums_begin_with_all_that_has_ended(migrated):
    assert nonzero(migrated) == SUMS
    hours = {row[0]: row[1] for row in nonzero_hours(migrated)}
    assert hours == {0: 3, 3600: 2}


def nonzero_hours(store):
    return store.spend(by=(), sums=("calls",), windows=[0, 3600, 7200])


def test_what_was_in_flight_is_counted_when_it_ends(migrated):
    usage = (1, 0, 0, 2, 0, 0)
    ended = AttemptEnded("complete", *usage, 30, *[None] * 3, 0.5, *[None] * 4, 0, None, None, "e", 1)
    call = CallEnded("complete", *[None] * 9, 30, None, 0.5, None, 1, 0, None, None, None, "e")
    migrated.commit([ended, call])
    sums = SUMS[3600, "openai:m", "", "{}"]
    after = {"calls": 3, "attempts": 2, "input_tokens": MOST + 1, "output_tokens": MOST + 2, "cost_nanos": MOST + 30}
    assert nonzero(migrated) == {**SUMS, (3600, "openai:m", "", "{}"): {**sums, **after}}


def test_an_account_begins_with_what_was_spent_before(migrated):
    ana = Account("ana", "user ana", since=900.0, resets_at=1800.0, user="ana")
    hold = Hold("new", 1, (ana,), 1, 1, "o", 0.0, None, [])
    migrated.commit([hold])
    assert hold.balances[0][1:] == (70, 1, 0, 15, 1, 0)


def test_a_file_that_cannot_be_migrated_stays_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "ledger.sqlite3"
    made(path, 1)
    broken = (MIGRATIONS[0], (*MIGRATIONS[1], "INSERT INTO missing VALUES (1)"))
    monkeypatch.setattr("llmkit.state.sqlite.MIGRATIONS", broken)
    with pytest.raises(Exception, match="no such table: missing"):
        SQLiteStore(path)
    raw = sqlite3.connect(path)
    assert raw.execute("PRAGMA user_version").fetchone() == (1,)
    assert raw.execute("SELECT count(*) FROM sqlite_master WHERE name = 'spend'").fetchone() == (0,)
    assert raw.execute("SELECT count(*) FROM calls").fetchone() == (len(FIRST["calls"]),)
    raw.close()


def test_what_was_answered_before_tells_what_to_expect_of_the_model(migrated):
    """No call of an earlier schema has a template; the first schema did not keep its endpoint, either."""
    knew = {row["request_id"] for row in migrated.calls() if row["status"] == "complete" and row["output_tokens"]}
    found = migrated.outputs("openai:m", None, 10)
    assert knew == {"a", "b", "f"}
    assert found in ([(4001.0, HUGE), (901.5, 1)], [])
    assert migrated.outputs("openai:m", "t", 10) == []
    begun = CallBegun("z", 5000.0, None, "{}", "openai:m", "o", "t")
    attempt = AttemptBegun("z", 1, 5000.0, "openai", "m", None)
    ended = CallEnded(
        "complete", "m", "openai", "provider", 1, 0, 0, 9, *[None] * 5, 1.0, 1, 0, "stop", None, None, "z"
    )
    migrated.commit([begun, attempt])
    migrated.commit([ended])
    assert migrated.outputs("openai:m", "t", 10) == [(5000.0, 9)]
    assert migrated.outputs("openai:m", None, 1) == [(5000.0, 9)]
