from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import textwrap
import threading
import time
from datetime import UTC, datetime
from decimal import Decimal

import pandas as pd
import pytest

from llmkit.account import Account, Hold, HoldRefused
from llmkit.call import Attempt, Call
from llmkit.endpoint import Endpoint
from llmkit.errors import AllModelsFailed, BudgetExceeded, CircuitOpen, ConfigError, ProviderOverloaded, StoreError
from llmkit.layers.meter import Meter
from llmkit.layers.record import Record
from llmkit.ledger import Ledger
from llmkit.models.prices import Cost
from llmkit.pipeline import Pipeline
from llmkit.reply import Outcome, Usage
from llmkit.rows import COLUMNS
from llmkit.state.database import Database
from llmkit.state.memory import MemoryStore
from llmkit.state.owner import current_owner
from llmkit.state.sqlite import SQLiteStore
from llmkit.testing import FakeClock
from tests.layers.script import Script, call_for

ENDPOINT = Endpoint(provider="openai", model="gpt-5-mini", base_url="https://api.openai.com/v1")
OTHER = Endpoint(provider="anthropic", model="claude-haiku-4-5", base_url="https://api.anthropic.com/v1")


class Answer:
    """What the ledger asks of a reply."""

    model = "gpt-5-mini-2026-08-07"
    provider = "openai"
    source = "provider"
    finish_reason = "stop"
    latency_s = 0.5
    time_to_first_token_s = 0.1


@pytest.fixture
def path(tmp_path):
    return tmp_path / "llmkit-data" / "ledger.sqlite3"


@pytest.fixture(params=["sqlite", "memory"])
def ledger(request):
    opened = Ledger.open(request.param)
    yield opened
    opened.close()


@pytest.fixture
def on_disk():
    opened = Ledger.open("sqlite")
    yield opened
    opened.close()


def new_call(request_id="a", started_at=1000.0, **fields):
    return Call(
        request_id=request_id,
        messages=(),
        model="smart",
        route=(),
        started=time.monotonic(),
        started_at=started_at,
        **fields,
    )


def new_attempt(number=1, *, cost_usd=Decimal("0.00123"), usage=Usage(12, 30, cached_input_tokens=2), **fields):  # noqa: B008 - frozen
    known = {"provider": "openai", "model": "gpt-5-mini", "status": "complete", "started": 1000.5, "latency_s": 0.5}
    return Attempt(number=number, usage=usage, cost_usd=cost_usd, **{**known, **fields})


async def attempted(ledger, call, attempt=None, endpoint=ENDPOINT):
    """One attempt from its beginning to its end."""
    attempt = attempt or new_attempt()
    await ledger.attempt_began(call, attempt.number, endpoint, attempt.started)
    call.trail.attempts.append(attempt)
    ledger.attempt_ended(call, attempt, Cost(attempt.cost_usd, "config") if attempt.cost_usd is not None else None)


async def completed(ledger, call):
    ledger.call_began(call)
    await attempted(ledger, call)
    await ledger.call_ended(call, Outcome("complete", None, Answer()))


# -- what is in it ---------------------------------------------------------------------------------------------------


def test_a_call_that_went_well(ledger):
    asyncio.run(completed(ledger, new_call(user="ana", tags={"app": "docs"})))
    (row,) = ledger.calls()
    assert row.pop("owner")
    assert row == {
        "request_id": "a",
        "started": 1000.0,
        "user": "ana",
        "tags": {"app": "docs"},
        "model": "smart",
        "template": None,
        "status": "complete",
        "response_model": "gpt-5-mini-2026-08-07",
        "provider": "openai",
        "source": "provider",
        "input_tokens": 12,
        "cached_input_tokens": 2,
        "cache_write_tokens": 0,
        "output_tokens": 30,
        "reasoning_tokens": 0,
        "estimated": False,
        "cost_usd": Decimal("0.00123"),
        "saved_usd": None,
        "latency_s": 0.5,
        "time_to_first_token_s": 0.1,
        "attempts": 1,
        "retries": 0,
        "finish_reason": "stop",
        "error": None,
        "message": None,
    }
    (attempt,) = ledger.attempts("a")
    assert (attempt["status"], attempt["provider"], attempt["model"]) == ("complete", "openai", "gpt-5-mini")
    assert (attempt["cost_usd"], attempt["price_source"]) == (Decimal("0.00123"), "config")
    assert (attempt["maybe_billed"], attempt["started"], attempt["base_url"]) == (False, 1000.5, ENDPOINT.base_url)


def test_the_cost_of_a_call_is_that_of_its_attempts(ledger):
    async def scenario():
        call = new_call()
        ledger.call_began(call)
        error = {"status": "failed", "error": "ProviderOverloaded", "message": "x" * 1000, "http_status": 503}
        await attempted(ledger, call, new_attempt(1, cost_usd=Decimal(0), usage=None, **error))
        await attempted(
            ledger, call, new_attempt(2, cost_usd=Decimal("0.0000000001"), usage=Usage(5, 1, estimated=True), **error)
        )
        await attempted(ledger, call, new_attempt(3), OTHER)
        await ledger.call_ended(call, Outcome("complete", None, Answer()))

    asyncio.run(scenario())
    (row,) = ledger.calls()
    assert (row["attempts"], row["retries"]) == (3, 1)
    assert (row["input_tokens"], row["output_tokens"], row["estimated"]) == (17, 31, True)
    attempts = ledger.attempts("a")
    assert row["cost_usd"] == sum(attempt["cost_usd"] for attempt in attempts) == Decimal("0.001230001")
    assert [attempt["provider"] for attempt in attempts] == ["openai", "openai", "anthropic"]
    assert [attempt["http_status"] for attempt in attempts] == [503, 503, None]
    assert attempts[0]["message"] == "x" * 500
    assert attempts[0]["input_tokens"] is None


def test_an_unknown_price_makes_the_cost_unknown_and_not_less(ledger):
    async def scenario():
        call = new_call()
        ledger.call_began(call)
        await attempted(ledger, call, new_attempt(1))
        await attempted(ledger, call, new_attempt(2, cost_usd=None))
        await ledger.call_ended(call, Outcome("complete", None, Answer()))

    asyncio.run(scenario())
    assert ledger.calls()[0]["cost_usd"] is None
    assert [attempt["cost_usd"] for attempt in ledger.attempts("a")] == [Decimal("0.00123"), None]


@pytest.mark.parametrize(
    ("outcome", "status", "error"),
    [
        (Outcome("failed", BudgetExceeded("no", scope="request", limit=1, needed=2)), "rejected", "BudgetExceeded"),
        (Outcome("failed", ProviderOverloaded("busy " * 200)), "failed", "ProviderOverloaded"),
        (Outcome("aborted", asyncio.CancelledError()), "aborted", "CancelledError"),
        (Outcome("failed", KeyError("sk-secret")), "failed", "KeyError"),
        (
            Outcome("failed", AllModelsFailed("all", [CircuitOpen("x", endpoint="e", state="open", retry_after=1.0)])),
            "rejected",
            "AllModelsFailed",
        ),
        (Outcome("failed", AllModelsFailed("all", [ProviderOverloaded("x")])), "failed", "AllModelsFailed"),
    ],
)
def test_a_call_that_was_never_sent_is_there_too(ledger, outcome, status, error):
    async def scenario():
        call = new_call()
        ledger.call_began(call)
        await ledger.call_ended(call, outcome)

    asyncio.run(scenario())
    (row,) = ledger.calls()
    assert (row["status"], row["error"], row["attempts"], row["source"]) == (status, error, 0, None)
    assert row["cost_usd"] == 0
    assert row["input_tokens"] is None
    assert row["latency_s"] >= 0
    assert len(row["message"] or "") <= 500
    assert "secret" not in repr(row)
    assert ledger.attempts("a") == []


def test_an_attempt_that_ended_before_it_could_begin_is_there(ledger):
    async def scenario():
        call = new_call()
        ledger.call_began(call)
        ledger.attempt_ended(call, new_attempt(status="failed", error="AuthenticationError"))
        await ledger.call_ended(call, Outcome("failed", ProviderOverloaded("x")))

    asyncio.run(scenario())
    assert [attempt["error"] for attempt in ledger.attempts("a")] == ["AuthenticationError"]


def test_no_key_in_a_url_is_kept(ledger):
    endpoint = Endpoint(provider="mine", model="m", base_url="https://ana:hunter2@example.com:8443/v1?key=sk-secret#x")

    async def scenario():
        call = new_call()
        ledger.call_began(call)
        await ledger.attempt_began(call, 1, endpoint, 1.0)

    asyncio.run(scenario())
    assert ledger.attempts("a")[0]["base_url"] == "https://example.com:8443/v1"


# -- how it is written -----------------------------------------------------------------------------------------------


def test_a_good_call_costs_two_transactions_and_never_suspends(on_disk, path):
    on_disk.calls()  # opens it
    seen = []
    trace(on_disk, seen)
    call = new_call()
    on_disk.call_began(call)
    assert seen == []

    async def scenario():
        driven(on_disk.attempt_began(call, 1, ENDPOINT, 1000.5))
        assert [sql.split()[0] for sql in seen] == ["BEGIN", "INSERT", "INSERT", "COMMIT"]
        assert stored_status(path) == ("in_flight", "in_flight")
        seen.clear()
        on_disk.attempt_ended(call, new_attempt())
        assert seen == []
        driven(on_disk.call_ended(call, Outcome("complete", None, Answer())))
        assert [sql.split()[0] for sql in seen] == ["BEGIN", "UPDATE", "UPDATE", "COMMIT"]
        await asyncio.sleep(0)
        assert len(seen) == 4  # the turn of the loop in which nothing was left to write

    asyncio.run(scenario())
    assert stored_status(path) == ("complete", "complete")
    assert not on_disk._open_calls


def trace(ledger, seen):
    """Put each statement into ``seen``; the triggers of one are told as repeats of it."""
    ledger._store.database._connection.set_trace_callback(lambda sql: seen[-1:] == [sql] or seen.append(sql))


def driven(coroutine):
    """Run a coroutine that must not wait for anything."""
    with pytest.raises(StopIteration):
        coroutine.send(None)


def stored_status(path):
    """What another process would see: the status of the one call and of its last attempt."""
    raw = sqlite3.connect(path)
    call = raw.execute("SELECT status FROM calls").fetchone()
    attempt = raw.execute("SELECT status FROM attempts ORDER BY number DESC").fetchone()
    raw.close()
    return call and call[0], attempt and attempt[0]


def test_an_attempt_is_written_when_nothing_follows_it(on_disk, path):
    async def scenario():
        call = new_call()
        on_disk.call_began(call)
        await attempted(on_disk, call, new_attempt(status="failed"))
        assert stored_status(path) == ("in_flight", "in_flight")
        await asyncio.sleep(0)
        assert stored_status(path) == ("in_flight", "failed")  # as during the minute before a retry
        await attempted(on_disk, call, new_attempt(2))
        await on_disk.call_ended(call, Outcome("complete", None, Answer()))

    asyncio.run(scenario())
    assert [row["status"] for row in on_disk.attempts("a")] == ["failed", "complete"]


def test_what_is_not_written_yet_is_read(ledger):
    async def scenario():
        call = new_call()
        ledger.call_began(call)
        assert [row["status"] for row in ledger.calls()] == ["in_flight"]
        await attempted(ledger, call)
        assert [row["status"] for row in ledger.attempts("a")] == ["complete"]
        assert [row["status"] for row in ledger.calls()] == ["in_flight"]
        await ledger.call_ended(call, Outcome("complete", None, Answer()))
        assert [row["status"] for row in ledger.calls()] == ["complete"]

    asyncio.run(scenario())


def test_a_request_id_is_used_once(ledger):
    asyncio.run(completed(ledger, new_call()))

    async def again():
        call = new_call()
        ledger.call_began(call)
        try:
            with pytest.raises(StoreError, match="request_id"):
                await ledger.attempt_began(call, 1, ENDPOINT, 2.0)
        finally:
            await ledger.call_ended(call, Outcome("failed", StoreError("x")))

    asyncio.run(again())
    assert [row["status"] for row in ledger.calls()] == ["complete"]
    assert len(ledger.attempts("a")) == 1
    assert ledger.notice is None
    assert not ledger._open_calls


def test_a_call_that_was_never_sent_cannot_take_anothers_place(ledger):
    asyncio.run(completed(ledger, new_call()))
    asyncio.run(
        ledger.call_ended(new_call(), Outcome("failed", CircuitOpen("x", endpoint="e", state="open", retry_after=1.0)))
    )
    assert [row["status"] for row in ledger.calls()] == ["complete"]
    assert ledger.notice is None


def test_a_row_that_ended_is_not_hidden_by_a_later_one_with_its_request_id(ledger):
    asyncio.run(completed(ledger, new_call()))
    ledger.call_began(new_call())
    assert [row["status"] for row in ledger.calls()] == ["complete"]


def test_of_two_in_flight_with_one_request_id_the_first_is_kept(ledger):
    async def scenario():
        first, second = new_call(), new_call()
        ledger.call_began(first)
        await ledger.attempt_began(first, 1, ENDPOINT, 1.0)
        ledger.call_began(second)
        assert [row["status"] for row in ledger.calls()] == ["in_flight"]
        ledger.attempt_ended(second, new_attempt(status="failed"))
        await asyncio.sleep(0)  # written by itself, and refused
        await ledger.call_ended(second, Outcome("failed", ProviderOverloaded("x")))
        assert [row["status"] for row in ledger.attempts("a")] == ["in_flight"]
        await ledger.call_ended(first, Outcome("complete", None, Answer()))

    asyncio.run(scenario())
    assert [row["status"] for row in ledger.calls()] == ["complete"]
    assert ledger.notice is None


def test_a_busy_file_does_not_stop_the_event_loop(on_disk, path):
    on_disk.calls()
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")

    async def scenario():
        calling = asyncio.create_task(completed(on_disk, new_call()))
        for _ in range(100):
            await asyncio.sleep(0.001)
        # Had the loop stood still, the lock would have been waited for until the ledger gave up.
        assert not calling.done()
        assert stored_status(path) == (None, None)
        holder.execute("ROLLBACK")
        await asyncio.wait_for(calling, 10)

    asyncio.run(scenario())
    holder.close()
    assert stored_status(path) == ("complete", "complete")
    assert on_disk.notice is None


def test_a_call_cancelled_while_the_file_is_busy_is_written_in_order(on_disk, path):
    on_disk.calls()
    holder = sqlite3.connect(path, isolation_level=None)

    async def scenario():
        call = new_call()
        on_disk.call_began(call)
        holder.execute("BEGIN IMMEDIATE")
        beginning = asyncio.create_task(on_disk.attempt_began(call, 1, ENDPOINT, 1000.5))
        await asyncio.sleep(0.01)
        beginning.cancel()
        await asyncio.gather(beginning, return_exceptions=True)
        assert beginning.cancelled()
        ending = asyncio.create_task(on_disk.call_ended(call, Outcome("aborted", asyncio.CancelledError())))
        await asyncio.sleep(0.01)
        holder.execute("ROLLBACK")
        await asyncio.wait_for(ending, 10)

    asyncio.run(scenario())
    holder.close()
    assert on_disk.calls()[0]["status"] == "aborted"
    assert stored_status(path) == ("aborted", "in_flight")


def test_several_event_loops_share_it(ledger):
    def work(thread):
        async def scenario():
            await asyncio.gather(*(completed(ledger, new_call(f"{thread}-{number}")) for number in range(40)))

        asyncio.run(scenario())

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    rows = ledger.calls()
    assert len(rows) == 160
    assert {row["status"] for row in rows} == {"complete"}
    assert ledger.notice is None


# -- a process that dies ---------------------------------------------------------------------------------------------


VICTIM = """
    import asyncio, sys, time
    from decimal import Decimal
    from llmkit.call import Attempt, Call
    from llmkit.endpoint import Endpoint
    from llmkit.ledger import Ledger
    from llmkit.reply import Outcome, Usage

    endpoint = Endpoint(provider="openai", model="m", base_url="https://example.com")
    ledger = Ledger.open("sqlite")

    async def call(number, ends):
        call = Call(request_id=f"call {number}", messages=(), model="m", route=(), started=time.monotonic(), started_at=time.time())
        ledger.call_began(call)
        await ledger.attempt_began(call, 1, endpoint, time.time())
        print(call.request_id, flush=True)
        if not ends:
            await asyncio.sleep(600)
        attempt = Attempt(number=1, provider="openai", model="m", status="complete", started=time.time(), latency_s=0.1,
                          usage=Usage(1, 2), cost_usd=Decimal(1))
        call.trail.attempts.append(attempt)
        ledger.attempt_ended(call, attempt)
        await ledger.call_ended(call, Outcome("complete"))

    async def main():
        for number in range(5):
            await call(number, True)
        await call(5, False)

    asyncio.run(main())
"""


def test_a_killed_process_loses_the_call_in_flight_and_it_is_seen(path):
    command = [sys.executable, "-c", textwrap.dedent(VICTIM)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as victim:
        for line in victim.stdout:
            if line == "call 5\n":
                break
        before = Ledger.open("sqlite")  # while its owner lives, a call in flight is left alone
        assert [row["status"] for row in before.calls()] == ["complete"] * 5 + ["in_flight"]
        assert before.lost == 0
        before.close()
        victim.send_signal(signal.SIGKILL)
        victim.wait(10)
    after = Ledger.open("sqlite")
    rows = after.calls()
    assert [row["status"] for row in rows] == ["complete"] * 5 + ["lost"]
    assert after.lost == 1
    assert (rows[-1]["cost_usd"], rows[-1]["attempts"]) == (None, 1)
    (attempt,) = after.attempts("call 5")
    assert (attempt["status"], attempt["maybe_billed"]) == ("lost", True)
    assert [row["maybe_billed"] for row in after.attempts("call 4")] == [False]
    after.close()


def test_calls_of_another_host_are_lost_after_a_day():
    store = MemoryStore()
    past, now = Ledger(store=store), datetime.now(UTC).timestamp()
    for request_id, age in (("old", 90_000), ("new", 3_600)):
        past.call_began(new_call(request_id, now - age))
    for entry, owner in zip(past._open_calls.values(), ("elsewhere:1:a", "elsewhere:2:b"), strict=True):
        store.commit([past._entry_of(entry).changes[0]._replace(owner=owner)])
    later = Ledger(store=store)
    assert {row["request_id"]: row["status"] for row in later.calls()} == {"old": "lost", "new": "in_flight"}


FORKER = """
    import asyncio, os, sys, time, warnings
    from llmkit.call import Call
    from llmkit.ledger import Ledger
    from llmkit.reply import Outcome

    warnings.simplefilter("ignore", DeprecationWarning)
    ledger = Ledger.open("sqlite")

    def new_call(name):
        return Call(request_id=name, messages=(), model="m", route=(), started=time.monotonic(), started_at=time.time())

    async def call(name):
        made = new_call(name)
        ledger.call_began(made)
        await ledger.call_ended(made, Outcome("complete"))

    asyncio.run(call("parent"))
    ledger.call_began(new_call("the parent's, in flight"))
    pid = os.fork()
    if pid == 0:
        asyncio.run(call("child"))
        assert [row["request_id"] for row in ledger.calls()] == ["parent", "child"]
        assert len({row["owner"] for row in ledger.calls()}) == 2
        ledger.close()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert [row["request_id"] for row in ledger.calls()] == ["parent", "the parent's, in flight", "child"]
    ledger.close()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_is_an_owner_of_its_own():
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FORKER)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


# -- a store that cannot be used -------------------------------------------------------------------------------------


def test_a_store_that_cannot_be_opened_is_said_once_and_the_call_goes_on(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    ledger = Ledger.open(f"sqlite://{tmp_path}/file/ledger.sqlite3")
    asyncio.run(completed(ledger, new_call()))
    asyncio.run(completed(ledger, new_call("b")))
    assert str(tmp_path / "file") in ledger.notice
    assert "memory only" in ledger.notice
    assert len(caplog.records) == 1
    assert [(row["request_id"], row["status"]) for row in ledger.calls()] == [("a", "complete"), ("b", "complete")]
    ledger.close()


@pytest.mark.parametrize("late", [False, True])
def test_a_store_that_fails_in_mid_call_is_fallen_back_from(on_disk, path, late, monkeypatch):
    async def scenario():
        await completed(on_disk, new_call("before"))
        call = new_call()
        on_disk.call_began(call)
        if not late:
            break_store(monkeypatch)
        await on_disk.attempt_began(call, 1, ENDPOINT, 1000.5)
        if late:
            break_store(monkeypatch)
        call.trail.attempts.append(new_attempt())
        on_disk.attempt_ended(call, new_attempt())
        await asyncio.sleep(0)
        await on_disk.call_ended(call, Outcome("complete", None, Answer()))
        await completed(on_disk, new_call("later", 2000.0))

    asyncio.run(scenario())
    assert "disk I/O error" in on_disk.notice
    assert [row["status"] for row in on_disk.calls()] == ["complete"] * 3
    assert {row["request_id"] for row in on_disk.calls()} == {"before", "a", "later"}
    assert [row["request_id"] for row in on_disk.calls(limit=1)] == ["later"]
    assert [row["cost_usd"] for row in on_disk.attempts("a")] == [Decimal("0.00123")]
    assert stored_status(path)[0] == ("in_flight" if late else "complete")


def break_store(monkeypatch):
    def fail(self, work, fitted=None):
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorcode = sqlite3.SQLITE_IOERR
        raise error

    monkeypatch.setattr(Database, "_transact", fail)


def test_a_store_that_cannot_even_be_read_leaves_what_is_in_memory(on_disk, path, monkeypatch):
    asyncio.run(completed(on_disk, new_call("before")))
    break_store(monkeypatch)
    asyncio.run(completed(on_disk, new_call()))
    assert [row["request_id"] for row in on_disk.calls()] == ["a", "before"]
    for each in path.parent.iterdir():
        each.unlink()
    assert [row["request_id"] for row in on_disk.calls()] == ["a"]


def test_a_lock_that_is_never_released_ends_in_memory(tmp_path):
    store = SQLiteStore(tmp_path / "ledger.sqlite3", patience_s=0.05)
    ledger = Ledger(store=store)
    ledger.calls()
    holder = sqlite3.connect(tmp_path / "ledger.sqlite3", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")

    async def scenario():
        call = new_call("cancelled")
        ledger.call_began(call)
        beginning = asyncio.create_task(ledger.attempt_began(call, 1, ENDPOINT, 1.0))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        beginning.cancel()
        await asyncio.gather(beginning, return_exceptions=True)
        await ledger.call_ended(call, Outcome("aborted", asyncio.CancelledError()))
        await completed(ledger, new_call("b"))

    asyncio.run(scenario())
    assert "locked by another program" in ledger.notice
    assert {row["request_id"]: row["status"] for row in ledger.calls()} == {"cancelled": "aborted", "b": "complete"}
    assert len(ledger.attempts("cancelled")) == 1
    holder.execute("ROLLBACK")
    holder.close()
    ledger.close()


def test_a_beginning_that_failed_after_nobody_waited_for_it_is_not_lost(tmp_path):
    store = SQLiteStore(tmp_path / "ledger.sqlite3", patience_s=0.02)
    ledger = Ledger(store=store)
    ledger.calls()
    holder = sqlite3.connect(tmp_path / "ledger.sqlite3", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    complaints = []

    async def scenario():
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context["message"]))
        call = new_call()
        ledger.call_began(call)
        beginning = asyncio.create_task(ledger.attempt_began(call, 1, ENDPOINT, 1.0))
        await asyncio.sleep(0)
        beginning.cancel()
        await asyncio.gather(beginning, return_exceptions=True)
        del beginning
        await asyncio.to_thread(store.close)  # what waited has failed by then
        holder.execute("ROLLBACK")
        await ledger.call_ended(call, Outcome("aborted", asyncio.CancelledError()))
        gc.collect()

    asyncio.run(scenario())
    assert complaints == []
    assert [row["status"] for row in ledger.calls()] == ["aborted"]
    assert len(ledger.attempts("a")) == 1
    holder.close()
    ledger.close()


def test_a_wrong_url_is_said_at_once():
    with pytest.raises(ConfigError, match="postgres"):
        Ledger.open("postgres://localhost")


def test_nothing_is_opened_before_it_is_needed(path):
    ledger = Ledger.open("sqlite")
    ledger.call_began(new_call())
    ledger.close()
    assert not path.parent.exists()
    ledger.calls()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    ledger.close()


# -- how it is read --------------------------------------------------------------------------------------------------


def test_since_and_limit(ledger):
    for request_id, started_at in (("a", 1000.0), ("c", 3000.0), ("b", 2000.0)):
        asyncio.run(completed(ledger, new_call(request_id, started_at)))
    ledger.call_began(new_call("d", 4000.0))
    assert [row["request_id"] for row in ledger.calls()] == ["a", "b", "c", "d"]
    assert [row["request_id"] for row in ledger.calls(limit=2)] == ["c", "d"]
    assert [row["request_id"] for row in ledger.calls(since=2000.0)] == ["b", "c", "d"]
    assert [row["request_id"] for row in ledger.calls(since=datetime.fromtimestamp(2500, UTC))] == ["c", "d"]
    with pytest.raises(ValueError, match="limit is 0"):
        ledger.calls(limit=0)


def test_the_frame(ledger):
    asyncio.run(completed(ledger, new_call(user="ana", tags={"app": "docs"}, started_at=1_700_000_000.123456)))
    ledger.call_began(new_call("b", 1_700_000_001.0))
    frame = ledger.frame()
    assert list(frame.columns) == list(COLUMNS)
    assert {column: str(kind) for column, kind in frame.dtypes.items()} == COLUMNS
    first, second = (row for _, row in frame.iterrows())
    assert first["started"] == pd.Timestamp("2023-11-14T22:13:20.123456Z")
    assert (first["model"], second["model"]) == ("gpt-5-mini-2026-08-07", "smart")
    assert first["cost_usd"] == 0.00123
    assert first["tags"] == {"app": "docs"}
    assert (first["input_tokens"], first["attempts"], first["estimated"]) == (12, 1, False)
    unknown = ["user", "provider", "source", "input_tokens", "estimated", "cost_usd", "latency_s", "attempts", "error"]
    assert frame.loc[1, unknown].isna().all()
    assert frame["cost_usd"].sum() == 0.00123


def test_an_empty_frame_has_the_same_columns(ledger):
    frame = ledger.frame()
    assert len(frame) == 0
    assert {column: str(kind) for column, kind in frame.dtypes.items()} == COLUMNS


def test_tags_are_kept_as_they_are(ledger):
    tags = {"b": "'; --", "a": "é\ud800"}
    asyncio.run(completed(ledger, new_call(tags=tags)))
    assert ledger.calls()[0]["tags"] == tags
    assert json.loads(json.dumps(ledger.calls()[0]["tags"])) == tags


def test_calls_in_crowds_share_transactions_and_each_is_on_disk_when_it_has_ended(tmp_path):
    async def main():
        clock = FakeClock()
        ledger = Ledger.open(f"sqlite:///{tmp_path}/crowd.sqlite3", clock)
        await ledger.open_store()
        commits = []
        store = ledger._store
        commit = store.commit
        store.commit = lambda changes: commits.append(len(changes)) or commit(changes)
        reader = SQLiteStore(tmp_path / "crowd.sqlite3")
        below = Script(clock, list("abcd"))
        chain = Pipeline([Record(ledger), Meter(ledger, clock)], below)

        async def one(number):
            reply = await chain(call_for(clock, request_id=f"r{number}"))
            assert reader.calls(limit=None)[0]["status"]  # what began is on disk before the request is sent
            await reply.read()
            assert {row["request_id"]: row["status"] for row in reader.calls()}[f"r{number}"] == "complete"

        await asyncio.gather(*[one(number) for number in range(40)])
        assert len(reader.calls()) == 40
        assert len(commits) < 40, commits
        assert not ledger._open_calls
        ledger.close()
        reader.close()

    asyncio.run(main())


def test_a_duplicate_in_a_crowd_harms_no_other(tmp_path):
    async def main():
        clock = FakeClock()
        ledger = Ledger.open(f"sqlite:///{tmp_path}/crowd.sqlite3", clock)
        chain = Pipeline([Record(ledger), Meter(ledger, clock)], Script(clock, list("abcd")))

        async def one(request_id):
            reply = await chain(call_for(clock, request_id=request_id))
            return await reply.read()

        names = [*(f"r{n}" for n in range(20)), "r3"]
        results = await asyncio.gather(*[one(name) for name in names], return_exceptions=True)
        assert [type(each).__name__ for each in results].count("DuplicateCall") == 1
        assert len(ledger.calls()) == 20
        assert {row["status"] for row in ledger.calls()} == {"complete"}
        assert not ledger._open_calls
        ledger.close()

    asyncio.run(main())


# -- what is set aside -------------------------------------------------------------------------------------------------

DAY = Account("all//day/0", "day", limit_nanos=1000)


def held(call, nanos=400, *, number=1, accounts=(DAY,), tokens=7):
    return call.to(hold=Hold(call.request_id, number, accounts, nanos, tokens, current_owner(), 1e12, None, []))


async def begun(ledger, request_id, nanos=400, **fields):
    call = held(new_call(request_id), nanos, **fields)
    ledger.call_began(call)
    sending = await ledger.attempt_began(call, 1, ENDPOINT, 1.0)
    return call, sending


def balance(ledger, account=DAY):
    (found,) = asyncio.run(ledger.balances([account]))
    return found


def test_a_hold_is_taken_with_its_attempt_and_settled_with_its_end(ledger):
    async def scenario():
        call, sending = await begun(ledger, "a")
        assert call.hold.balances[0].held_nanos == 400
        assert sending() is None
        (while_open,) = await ledger.balances([DAY])
        ledger.attempt_ended(call, new_attempt(cost_usd=Decimal("0.00000025"), usage=Usage(3, 2)), None)
        await ledger.call_ended(call, Outcome("complete", None, Answer()))
        return while_open

    assert asyncio.run(scenario())[1:3] == (0, 400)
    assert balance(ledger)[1:] == (250, 0, 0, 5, 0, 0)
    assert not ledger._open_calls


@pytest.mark.parametrize(
    ("attempt", "expected"),
    [
        ({"usage": None, "cost_usd": Decimal(0), "status": "failed"}, (0, 0, 0, 0, 0, 0)),
        ({"usage": None, "cost_usd": Decimal(0), "status": "failed", "maybe_billed": True}, (400, 0, 400, 7, 0, 7)),
        ({"usage": Usage(3, 2), "cost_usd": None}, (400, 0, 400, 5, 0, 0)),
        ({"usage": Usage(3, 2), "cost_usd": Decimal("0.0000009"), "maybe_billed": True}, (900, 0, 0, 5, 0, 0)),
    ],
)
def test_what_becomes_of_a_hold_depends_on_how_the_attempt_ended(ledger, attempt, expected):
    async def scenario():
        call, _ = await begun(ledger, "a")
        ledger.attempt_ended(call, new_attempt(**attempt), None)
        await ledger.call_ended(call, Outcome("failed", ProviderOverloaded("x")))

    asyncio.run(scenario())
    assert balance(ledger)[1:] == expected


def test_a_hold_that_nobody_ended_counts_at_its_worst_case_when_the_call_is_over(ledger):
    async def scenario():
        call, _ = await begun(ledger, "a")
        await ledger.call_ended(call, Outcome("failed", KeyError("somewhere")))

    asyncio.run(scenario())
    assert balance(ledger)[1:4] == (400, 0, 400)


def test_a_refused_hold_leaves_nothing_of_its_attempt(ledger):
    async def scenario():
        call = held(new_call("a"), 1001)
        ledger.call_began(call)
        for _ in range(2):
            with pytest.raises(HoldRefused) as caught:
                await ledger.attempt_began(call, 1, ENDPOINT, 1.0)
            assert (caught.value.account, caught.value.settled, caught.value.held) == (DAY, 0, 0)
        await ledger.attempt_began(held(call, 1000), 1, ENDPOINT, 1.0)  # the number is free, and no retry is counted
        ledger.attempt_ended(call, new_attempt(cost_usd=Decimal("0.000001")), None)
        await ledger.call_ended(call, Outcome("complete", None, Answer()))

    asyncio.run(scenario())
    (row,) = ledger.calls()
    assert (row["status"], row["attempts"], row["retries"]) == ("complete", 1, 0)
    assert len(ledger.attempts("a")) == 1
    assert balance(ledger)[1:3] == (1000, 0)


def test_a_call_whose_hold_was_refused_is_recorded_without_an_attempt(on_disk):
    async def scenario():
        call = held(new_call("a"), 1001)
        on_disk.call_began(call)
        with pytest.raises(HoldRefused):
            await on_disk.attempt_began(call, 1, ENDPOINT, 1.0)
        await on_disk.call_ended(call, Outcome("failed", BudgetExceeded("no", scope="day", limit=1, needed=2)))

    asyncio.run(scenario())
    (row,) = on_disk.calls()
    assert (row["status"], row["attempts"], row["error"]) == ("rejected", 0, "BudgetExceeded")
    assert on_disk.attempts("a") == []


@pytest.mark.parametrize("busy", [False, True])
def test_in_a_crowd_those_that_fit_are_taken_and_the_others_refused(on_disk, path, busy):
    """Forty at 100 against 1000: ten of them, whoever shares a transaction with whom."""

    async def scenario():
        await on_disk.open_store()
        holder = sqlite3.connect(path, isolation_level=None)

        async def one(number):
            call = held(new_call(f"r{number}"), 100)
            on_disk.call_began(call)
            try:
                await on_disk.attempt_began(call, 1, ENDPOINT, 1.0)
            except HoldRefused:
                await on_disk.call_ended(call, Outcome("failed", BudgetExceeded("no", scope="day", limit=1, needed=2)))
                return False
            ledgered = new_attempt(cost_usd=Decimal("0.0000001"))
            await asyncio.sleep(0.01)
            on_disk.attempt_ended(call, ledgered, None)
            call.trail.attempts.append(ledgered)
            await on_disk.call_ended(call, Outcome("complete", None, Answer()))
            return True

        if busy:
            holder.execute("BEGIN IMMEDIATE")
            asyncio.get_running_loop().call_later(0.05, holder.execute, "ROLLBACK")
        taken = await asyncio.gather(*[one(number) for number in range(40)])
        holder.close()
        assert sum(taken) == 10

    asyncio.run(scenario())
    assert balance(on_disk)[1:4] == (1000, 0, 0)
    rows = on_disk.calls()
    assert sorted(row["status"] for row in rows) == ["complete"] * 10 + ["rejected"] * 30
    assert [len(on_disk.attempts(row["request_id"])) for row in rows if row["status"] == "rejected"] == [0] * 30
    assert not on_disk._open_calls
    assert on_disk.notice is None


@pytest.mark.parametrize("crowd", [0, 20])
@pytest.mark.parametrize("nanos", [400, 1001])
def test_who_is_cancelled_while_the_file_is_busy_holds_nothing_afterwards(on_disk, path, crowd, nanos):
    async def scenario():
        await on_disk.open_store()
        for number in range(crowd):
            on_disk.call_began(new_call(f"other{number}"))
        holder = sqlite3.connect(path, isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        call = held(new_call("a"), nanos)
        on_disk.call_began(call)
        beginning = asyncio.create_task(on_disk.attempt_began(call, 1, ENDPOINT, 1.0))
        await asyncio.sleep(0.02)
        beginning.cancel()
        await asyncio.gather(beginning, return_exceptions=True)
        on_disk.attempt_ended(call, new_attempt(status="aborted", usage=None, cost_usd=Decimal(0)), None)
        ending = asyncio.create_task(on_disk.call_ended(call, Outcome("aborted", asyncio.CancelledError())))
        await asyncio.sleep(0.02)
        holder.execute("ROLLBACK")
        holder.close()
        await asyncio.wait_for(ending, 10)

    asyncio.run(scenario())
    assert balance(on_disk)[1:4] == (0, 0, 0)
    row = next(row for row in on_disk.calls() if row["request_id"] == "a")
    assert row["status"] == "aborted"
    assert [each["status"] for each in on_disk.attempts("a")] == ["aborted"]
    assert on_disk.notice is None


def test_holds_do_not_cost_a_transaction_more(on_disk):
    on_disk.calls()
    seen = []
    on_disk._store.database._connection.set_trace_callback(seen.append)

    async def scenario():
        call, _ = await begun(on_disk, "a")
        on_disk.attempt_ended(call, new_attempt(cost_usd=Decimal("0.0000001")), None)
        await on_disk.call_ended(call, Outcome("complete", None, Answer()))

    asyncio.run(scenario())
    assert [sql for sql in seen if sql.startswith(("BEGIN", "COMMIT"))].count("COMMIT") == 2


def test_the_hold_of_a_process_that_was_killed_ends_as_it_had_been_sent_or_not(tmp_path):
    code = """
        import asyncio, os, sys
        from llmkit.ledger import Ledger
        from tests.test_ledger import begun

        async def main():
            ledger = Ledger.open(sys.argv[1])
            await begun(ledger, "unsent", 100)
            _, sending = await begun(ledger, "sent", 200)
            sending()
            os.kill(os.getpid(), 9)

        asyncio.run(main())
    """
    url = f"sqlite:///{tmp_path}/l.sqlite3"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), url], capture_output=True, timeout=60, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    ledger = Ledger.open(url)
    assert balance(ledger)[1:4] == (200, 0, 200)
    rows = {row["request_id"]: row for row in ledger.calls()}
    assert {name: row["status"] for name, row in rows.items()} == {"unsent": "lost", "sent": "lost"}
    assert [each["maybe_billed"] for each in ledger.attempts("sent")] == [True]
    assert [each["maybe_billed"] for each in ledger.attempts("unsent")] == [False]
    assert list((tmp_path / "l.sqlite3.boards").iterdir()) == []
    ledger.close()


class Unwritable(MemoryStore):
    """A store whose disk is gone."""

    def commit(self, changes):
        raise StoreError("the disk is full", next_step="make room")


def test_a_budget_that_somebody_set_is_not_kept_in_memory_alone():
    async def scenario():
        ledger = Ledger(store=Unwritable())
        ledger.is_strict = lambda hold: True
        call = held(new_call("a"))
        ledger.call_began(call)
        for _ in range(2):  # the first finds out, the second knows
            with pytest.raises(StoreError, match=r"nothing was sent.*the disk is full") as caught:
                await ledger.attempt_began(call, 1, ENDPOINT, 1.0)
            assert "on_failure" in caught.value.next_step
        await ledger.call_ended(call, Outcome("failed", caught.value))
        assert ledger.attempts("a") == []
        assert [row["status"] for row in ledger.calls()] == ["failed"]
        assert (await ledger.balances([DAY]))[0][1:3] == (0, 0)
        free = new_call("b")
        await completed(ledger, free)  # what costs nothing goes on
        return ledger

    ledger = asyncio.run(scenario())
    assert "in memory only" in ledger.notice


def test_accounts_go_on_in_memory_from_what_they_had_on_disk(on_disk, monkeypatch):
    async def scenario():
        first, _ = await begun(on_disk, "a", 600)
        on_disk.attempt_ended(first, new_attempt(cost_usd=Decimal("0.0000005")), None)
        await on_disk.call_ended(first, Outcome("complete", None, Answer()))
        in_flight, _ = await begun(on_disk, "b", 300)
        break_store(monkeypatch)
        with pytest.raises(HoldRefused) as refused:
            await begun(on_disk, "c", 501)
        assert (refused.value.settled, refused.value.held) == (500, 0)
        on_disk.attempt_ended(in_flight, new_attempt(cost_usd=Decimal("0.0000002")), None)
        await on_disk.call_ended(in_flight, Outcome("complete", None, Answer()))

    asyncio.run(scenario())
    assert "in memory only" in on_disk.notice
    assert balance(on_disk)[1:4] == (700, 0, 0)


@pytest.mark.parametrize("crowd", [0, 20])
def test_the_budgets_by_default_go_on_in_memory_and_count_there(crowd):
    async def scenario():
        ledger = Ledger(store=Unwritable())
        for number in range(crowd):
            ledger.call_began(new_call(f"other{number}"))
        call, _ = await begun(ledger, "a", 600)
        second = held(new_call("b"), 600)
        with pytest.raises(HoldRefused):
            await ledger.attempt_began(second, 1, ENDPOINT, 1.0)
        ledger.attempt_ended(call, new_attempt(cost_usd=Decimal("0.0000001")), None)
        await ledger.call_ended(call, Outcome("complete", None, Answer()))
        await ledger.attempt_began(second, 1, ENDPOINT, 1.0)
        return (await ledger.balances([DAY]))[0]

    assert asyncio.run(scenario())[1:3] == (100, 600)


def test_a_disk_that_fails_while_calls_are_out_loses_no_record_of_them():
    class Failing(MemoryStore):
        broken = False

        def commit(self, changes):
            if self.broken:
                raise StoreError("the disk is full")
            super().commit(changes)

    async def scenario():
        store = Failing()
        ledger = Ledger(store=store)
        ledger.is_strict = lambda hold: True
        calls = [(await begun(ledger, name, 500))[0] for name in "ab"]
        store.broken = True
        for call in calls:
            ledger.attempt_ended(call, new_attempt(cost_usd=Decimal("0.0000008")), None)
            await ledger.call_ended(call, Outcome("complete", None, Answer()))
        return ledger

    ledger = asyncio.run(scenario())
    assert {row["request_id"]: row["status"] for row in ledger.calls()} == {"a": "complete", "b": "complete"}
    assert balance(ledger)[1:3] == (1600, 0)  # more than the limit, and true


# -- accounts on a server ----------------------------------------------------------------------------------------------


class Elsewhere:
    """Accounts on a server, which can be away."""

    def __init__(self):
        self.store = MemoryStore()
        self.log = []
        self.away = False

    def _ask(self, *what):
        self.log.append(what)
        if self.away:
            raise StoreError("the server cannot be reached")

    async def hold(self, hold):
        self._ask("hold", hold.request_id)
        self.store.commit([hold])

    async def sent(self, hold):
        self._ask("sent", hold.request_id)

    def end(self, ending):
        self.log.append(("end", type(ending).__name__, ending.request_id))
        self.store.commit([ending])

    async def balances(self, accounts):
        self._ask("balances")
        return self.store.balances(accounts)

    async def aclose(self):
        pass


def test_accounts_on_a_server_are_asked_before_the_row_and_told_after_it():
    async def scenario():
        away = Elsewhere()
        ledger = Ledger("memory", accounts=away)
        call, sending = await begun(ledger, "a", 600)
        assert [row["status"] for row in ledger.attempts("a")] == ["in_flight"]
        await sending()
        with pytest.raises(HoldRefused):
            await begun(ledger, "b", 600)
        ledger.attempt_ended(call, new_attempt(cost_usd=Decimal("0.0000005")), None)
        assert away.log[-1] == ("hold", "b")
        await ledger.call_ended(call, Outcome("complete", None, Answer()))
        assert away.log == [("hold", "a"), ("sent", "a"), ("hold", "b"), ("end", "Settle", "a")]
        with pytest.raises(StoreError, match="request_id"):
            await begun(ledger, "a", 100)  # its row is refused, so nothing stays held
        return (await ledger.balances([DAY]))[0]

    assert asyncio.run(scenario())[1:3] == (500, 0)


def test_a_server_that_cannot_be_asked_stops_what_is_limited_unless_it_may_go_on():
    async def scenario():
        away = Elsewhere()
        ledger = Ledger("memory", accounts=away)
        ledger.is_strict = lambda hold: True
        away.away = True
        call = held(new_call("a"))
        ledger.call_began(call)
        with pytest.raises(StoreError, match="cannot be reached"):
            await ledger.attempt_began(call, 1, ENDPOINT, 1.0)
        assert ledger.attempts("a") == []
        assert ledger.notice is None
        ledger.is_strict = lambda hold: False
        await ledger.attempt_began(call, 1, ENDPOINT, 1.0)
        with pytest.raises(HoldRefused):  # the limit holds on this machine
            await begun(ledger, "b", 601)
        assert "budgets are those of this machine alone" in ledger.notice
        ledger.attempt_ended(call, new_attempt(cost_usd=Decimal("0.0000001")), None)
        await ledger.call_ended(call, Outcome("complete", None, Answer()))
        assert not [each for each in away.log if each[0] == "end"]  # it never had that hold
        return ledger._balances([DAY])[0]

    assert asyncio.run(scenario())[1:3] == (100, 0)


def test_a_server_that_goes_away_before_the_request_goes_out_stops_it():
    async def scenario():
        away = Elsewhere()
        ledger = Ledger("memory", accounts=away)
        ledger.is_strict = lambda hold: True
        _, sending = await begun(ledger, "a")
        away.away = True
        with pytest.raises(StoreError):
            await sending()
        ledger.is_strict = lambda hold: False
        await sending()

    asyncio.run(scenario())


# -- calls that cost nothing -------------------------------------------------------------------------------------------


class Stored(Answer):
    source = "cache"


async def served(ledger, request_id):
    call = new_call(request_id)
    call.trail.saved = Decimal("0.002")
    ledger.call_began(call)
    await ledger.call_ended(call, Outcome("complete", None, Stored()))


def committed(ledger):
    store, commits = ledger._store, []
    commit = store.commit
    store.commit = lambda changes: commits.append(len(changes)) or commit(changes)
    return commits


def test_what_came_from_the_cache_is_written_in_groups_and_costs_nothing(on_disk, path):
    async def scenario():
        await on_disk.open_store()
        commits = committed(on_disk)
        for number in range(255):
            driven(served(on_disk, f"r{number}"))
        assert commits == []
        await served(on_disk, "r255")
        assert commits == [256]
        await served(on_disk, "later")
        await asyncio.sleep(0.2)
        assert commits == [256, 1]
        await served(on_disk, "beside")
        await completed(on_disk, new_call("paid"))
        assert commits[2] == 1
        await served(on_disk, "read")
        return on_disk.calls()

    rows = asyncio.run(scenario())
    assert {row["request_id"] for row in rows} == {"later", "beside", "paid", "read"} | {f"r{n}" for n in range(256)}
    assert len(rows) == 260
    hit = next(row for row in rows if row["request_id"] == "read")
    assert (hit["status"], hit["source"], hit["attempts"]) == ("complete", "cache", 0)
    assert (hit["cost_usd"], hit["input_tokens"], hit["output_tokens"]) == (0, 0, 0)
    assert hit["saved_usd"] == Decimal("0.002")
    assert not on_disk._open_calls
    assert on_disk.spend(by=(), sums=("calls", "attempts", "saved_nanos")) == [(260, 1, 259 * 2_000_000)]


def test_a_call_that_is_paid_does_not_wait_for_many_from_the_cache(on_disk):
    async def scenario():
        await on_disk.open_store()
        commits = committed(on_disk)
        for number in range(40):
            await served(on_disk, f"r{number}")
        await completed(on_disk, new_call("paid"))
        assert 40 not in commits
        assert len(on_disk.calls()) == 41

    asyncio.run(scenario())


def test_many_with_a_duplicate_and_with_text_that_fits_no_column(on_disk):
    names = [f"r{number}" for number in range(100)] + ["r7", "odd\ud800"]

    async def scenario():
        await on_disk.open_store()
        for name in names:
            await served(on_disk, name)

    asyncio.run(scenario())
    on_disk._written()
    rows = on_disk.calls()
    assert {row["request_id"] for row in rows} == {*names[:100], "odd?"}
    assert on_disk.spend(by=(), sums=("calls", "saved_nanos")) == [(101, 101 * 2_000_000)]


def test_a_whole_group_goes_on_in_memory_where_the_disk_is_gone(on_disk, monkeypatch):
    async def scenario():
        await on_disk.open_store()
        store = on_disk._store

        def full(changes):
            raise StoreError("the disk is full")

        monkeypatch.setattr(store, "commit", full)
        for number in range(256):
            await served(on_disk, f"r{number}")

    asyncio.run(scenario())
    assert len(on_disk.calls()) == 256
    assert "the disk is full" in on_disk.notice


def test_an_answer_from_the_cache_that_nobody_read_to_its_end_is_recorded_as_that(on_disk):
    async def scenario():
        await on_disk.open_store()
        call = new_call("left")
        on_disk.call_began(call)
        await on_disk.call_ended(call, Outcome("aborted", None, Stored()))

    asyncio.run(scenario())
    (row,) = on_disk.calls()
    assert (row["status"], row["source"], row["cost_usd"], row["attempts"]) == ("aborted", "cache", 0, 0)
    assert not on_disk._open_calls


def test_a_duplicate_among_them_harms_no_other(on_disk):
    async def scenario():
        await on_disk.open_store()
        for request_id in ("a", "b", "a", "c"):
            await served(on_disk, request_id)

    asyncio.run(scenario())
    assert [row["request_id"] for row in on_disk.calls()] == ["a", "b", "c"]


@pytest.mark.parametrize("count", [1, 300, 350])  # of 350, a group is perhaps being written, and many still wait
def test_what_waits_is_written_when_the_interpreter_ends(tmp_path, count):
    code = """
        import asyncio, sys
        from llmkit.ledger import Ledger
        from tests.test_ledger import served

        async def main():
            global ledger
            ledger = Ledger.open(sys.argv[1])
            await ledger.open_store()
            for number in range(int(sys.argv[2])):
                await served(ledger, f"r{number}")

        asyncio.run(main())
    """
    url = f"sqlite:///{tmp_path}/l.sqlite3"
    subprocess.run([sys.executable, "-c", textwrap.dedent(code), url, str(count)], timeout=60, check=True)
    ledger = Ledger.open(url)
    assert [row["source"] for row in ledger.calls()] == ["cache"] * count
    ledger.close()


def test_what_was_saved_is_in_the_sums_of_spending(ledger):
    async def scenario():
        await ledger.open_store()
        for number in range(3):
            await served(ledger, f"r{number}\ud800")

    asyncio.run(scenario())
    assert ledger.spend(by=("model",), sums=("calls", "attempts", "cost_nanos", "saved_nanos")) == [
        ("openai:gpt-5-mini-2026-08-07", 3, 0, 0, 6_000_000)
    ]
    assert [row["saved_usd"] for row in ledger.calls()] == [Decimal("0.002")] * 3
