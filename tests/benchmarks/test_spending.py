"""Reports over a ledger of a million calls."""

from __future__ import annotations

import sqlite3
import statistics
import time

import pytest

from llmkit.client import AsyncClient

CALLS = 1_000_000
A_YEAR = 365 * 86_400
LIMIT_MS = 50.0
MODELS = ("gpt-5-mini", "gpt-5", "claude-haiku-4-5")
USERS = ("ana", "bo", None, "cy")

CALL = """
    INSERT INTO calls (request_id, started, user, tags, model, owner, status, source, cost_nanos, saved_nanos)
    VALUES (?, ?, ?, ?, 'smart', 'o:1:a', 'complete', 'provider', 1000, NULL)
"""
ATTEMPT = """
    INSERT INTO attempts (request_id, number, started, provider, model, status, input_tokens, output_tokens, cost_nanos)
    VALUES (?, 1, ?, 'openai', ?, 'complete', 10, 20, 1000)
"""


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """A year of calls, written as fast as SQLite takes them; the sums are kept by the store itself."""
    path = tmp_path_factory.mktemp("year") / "ledger.sqlite3"
    client = AsyncClient(model="simulator", state={"url": f"sqlite://{path}"})
    assert client.ledger.location == str(path)
    began = time.time() - A_YEAR
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        ids = [(f"{n:032x}", began + n * A_YEAR / CALLS) for n in range(CALLS)]
        tags = ('{"app": "docs"}', "{}", '{"app": "chat"}')
        connection.executemany(CALL, ((key, at, USERS[n % 4], tags[n % 3]) for n, (key, at) in enumerate(ids)))
        connection.executemany(ATTEMPT, ((key, at, MODELS[n % 3]) for n, (key, at) in enumerate(ids)))
    return client


@pytest.mark.parametrize("by, since", [("day", None), ("day", "30d"), ("hour", "7d"), ("month", None)])
def test_spending_by_time(benchmark, client, by, since) -> None:
    assert client.spend(by, since)["calls"].sum() > 10_000
    times = []

    def measure() -> None:
        for _ in range(9):
            began = time.perf_counter()
            client.spend(by, since)
            times.append((time.perf_counter() - began) * 1000)

    benchmark.pedantic(measure, rounds=1)
    middle = statistics.median(times)
    benchmark.extra_info["ms"] = round(middle, 1)
    print(f"\nspend(by={by!r}, since={since!r}) of {CALLS:,} calls: {middle:.1f} ms (target: at most {LIMIT_MS:g})")
    assert middle <= LIMIT_MS
