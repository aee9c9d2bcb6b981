"""What booking a call costs, against two bare transactions of one narrow row each on the same disk."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from decimal import Decimal
from itertools import count

from llmkit.call import Attempt, Call
from llmkit.endpoint import Endpoint
from llmkit.ledger import Ledger
from llmkit.models.prices import Cost
from llmkit.reply import Outcome, Usage
from tests.benchmarks.conftest import in_turn

ENDPOINT = Endpoint(provider="openai", model="gpt-5-mini", base_url="https://api.openai.com/v1")
COST = Cost(Decimal("0.00123"), "config")
NUMBERS = count()


async def booked(ledger: Ledger) -> None:
    """A call that goes well, as the record and meter layers book it."""
    call = Call(
        request_id=f"{time.time_ns():x}{next(NUMBERS):x}",
        messages=(),
        model="smart",
        route=(),
        started=time.monotonic(),
        started_at=time.time(),
    )
    attempt = Attempt(
        number=1,
        provider="openai",
        model="gpt-5-mini",
        status="complete",
        started=call.started_at,
        latency_s=0.5,
        usage=Usage(12, 30),
        cost_usd=COST.usd,
    )
    ledger.call_began(call)
    await ledger.attempt_began(call, 1, ENDPOINT, attempt.started)
    call.trail.attempts.append(attempt)
    ledger.attempt_ended(call, attempt, COST)
    await ledger.call_ended(call, Outcome("complete"))


def bare(path):
    """Two transactions, as plain as they can be."""
    connection = sqlite3.connect(path, isolation_level=None, timeout=0)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("CREATE TABLE rows (id INTEGER PRIMARY KEY, a, b, c, d, e)")

    def pair() -> None:
        for _ in range(2):
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("INSERT INTO rows (a, b, c, d, e) VALUES (?, ?, ?, ?, ?)", (1, "x" * 20, 1.0, 2, 3))
            connection.execute("COMMIT")

    return connection, pair


def test_booking_a_call(benchmark, tmp_path, state) -> None:
    ledger = Ledger.open(f"sqlite://{tmp_path}/ledger.sqlite3")
    connection, pair = bare(tmp_path / "bare.sqlite3")

    async def ours() -> None:
        for _ in range(500):
            await booked(ledger)
            await asyncio.sleep(0)

    async def theirs() -> None:
        for _ in range(500):
            pair()
            await asyncio.sleep(0)

    ours_times, bare_times = benchmark.pedantic(lambda: asyncio.run(in_turn(ours, theirs, 500)), rounds=1)
    ledger.close()
    connection.close()
    state("booking a call against two bare transactions, wall", ours_times.wall, bare_times.wall, 5)
    state("booking a call against two bare transactions, CPU", ours_times.cpu, bare_times.cpu, 5)
