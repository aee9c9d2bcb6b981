"""llmkit.state.circuits: the contract that every store of circuits keeps, and what the ledger's file adds."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sqlite3
import subprocess
import sys
import threading

import pytest

from llmkit.circuit import CircuitState
from llmkit.errors import StoreError
from llmkit.state.circuits import MemoryCircuits, SQLiteCircuits
from llmkit.state.owner import current_owner
from llmkit.state.redis.circuits import RedisCircuits
from llmkit.state.redis.connection import Server
from llmkit.state.sqlite import SQLiteStore
from llmkit.testing import FakeClock

NAME = "openai https://api.openai.com/v1 gpt-5-mini"
OPEN = CircuitState(NAME, "open", 1, 1060.0, 5, 0, "ProviderOverloaded: 503")
ME = current_owner()


def run(work):
    return asyncio.run(work)


@pytest.fixture(params=["memory", "sqlite", pytest.param("redis", marks=pytest.mark.redis)])
def circuits(request, tmp_path):
    """Two handles on one store, as two processes have them; and their clock, which begins at 1000."""
    clock = FakeClock(start=1000.0)
    if request.param == "redis":
        url = request.getfixturevalue("redis_server").url
        machines = [RedisCircuits(Server(url), clock) for _ in range(2)]
        yield *machines, clock
        for each in machines:
            run(each.aclose())
        return
    if request.param == "memory":
        store = MemoryCircuits(clock)
        yield store, store, clock
        return
    stores = [SQLiteStore(tmp_path / "ledger.sqlite3") for _ in range(2)]
    one, two = (SQLiteCircuits(lambda store=store: store.database, clock) for store in stores)
    yield one, two, clock
    for store in stores:
        store.close()


def test_what_one_wrote_the_other_reads(circuits) -> None:
    one, two, _ = circuits
    assert run(two.read(NAME)) is None
    assert run(one.write(OPEN))
    assert run(two.read(NAME)) == OPEN
    other = OPEN._replace(endpoint="other", state="isolated", reopens_at=0.0, last_failure=None)
    assert run(two.write(other))
    assert sorted(run(one.read_all())) == sorted([OPEN, other])
    assert run(one.read("unheard of")) is None


def test_a_change_is_only_taken_over_the_version_that_it_was_made_from(circuits) -> None:
    one, two, _ = circuits
    assert not run(one.write(OPEN._replace(version=2))), "there is no first"
    assert run(one.write(OPEN))
    assert not run(two.write(OPEN._replace(state="closed"))), "another one has written the first"
    assert not run(two.write(OPEN._replace(version=3)))
    assert run(two.write(OPEN._replace(state="half_open", version=2)))
    assert run(one.read(NAME)).state == "half_open"


def test_of_many_who_change_it_at_once_one_does(circuits) -> None:
    one, two, _ = circuits
    written: list[str] = []

    def work(store, number: int) -> None:
        if run(store.write(OPEN._replace(last_failure=str(number)))):
            written.append(str(number))

    threads = [threading.Thread(target=work, args=((one, two)[n % 2], n)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [run(one.read(NAME)).last_failure] == written


@pytest.mark.parametrize("text", ["", "a\nb", "ü \ud800", "x" * 1000, "'; DROP TABLE circuits; --"])
def test_any_name_and_any_failure_can_be_kept(circuits, text) -> None:
    one, two, _ = circuits
    assert run(one.write(OPEN._replace(endpoint=text, last_failure=text)))
    assert run(two.read(text)) is not None
    assert not run(two.write(OPEN._replace(endpoint=text)))


def test_no_more_probes_are_out_than_may_be(circuits) -> None:
    one, two, _ = circuits
    assert run(one.claim_probe(NAME, f"{ME}#1", 1010.0, 2))
    assert run(two.claim_probe(NAME, f"{ME}#2", 1010.0, 2))
    assert not run(one.claim_probe(NAME, f"{ME}#3", 1010.0, 2))
    assert run(one.claim_probe(NAME, f"{ME}#1", 1020.0, 2)), "it may be renewed"
    assert run(one.claim_probe("another", f"{ME}#3", 1010.0, 2)), "each circuit has its own"


def test_a_probe_that_is_given_back_can_be_had_at_once(circuits) -> None:
    one, two, _ = circuits
    assert run(one.claim_probe(NAME, f"{ME}#1", 1010.0, 1))
    run(two.claim_probe(NAME, f"{ME}#2", 0.0, 1))
    assert not run(two.claim_probe(NAME, f"{ME}#2", 1010.0, 1)), "what one never had, one cannot give back"
    run(one.claim_probe(NAME, f"{ME}#1", 0.0, 1))
    assert run(two.claim_probe(NAME, f"{ME}#2", 1010.0, 1))


def test_a_probe_lapses(circuits) -> None:
    one, two, clock = circuits
    assert run(one.claim_probe(NAME, f"{ME}#1", 1010.0, 1))
    run(clock.advance(9))
    assert not run(two.claim_probe(NAME, f"{ME}#2", 1030.0, 1))
    run(clock.advance(2))
    assert run(two.claim_probe(NAME, f"{ME}#2", 1030.0, 1))


def test_a_claim_of_a_clock_that_was_far_ahead_does_not_stay_for_ever(circuits) -> None:
    one, two, clock = circuits
    ahead = 1000.0 + 86_400
    run(clock.advance(86_400))
    assert run(one.claim_probe(NAME, f"{ME}#1", ahead + 60, 1))
    clock._now = 0.0  # put right
    assert run(two.claim_probe(NAME, f"{ME}#2", 1060.0, 1))


# -- the ledger's file ---------------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.sqlite3"


@pytest.fixture
def opened(path):
    store = SQLiteStore(path)
    yield SQLiteCircuits(lambda: store.database, FakeClock(start=1000.0))
    store.close()


CLAIM = """
import asyncio, sys
from pathlib import Path
from llmkit.clock import SystemClock
from llmkit.state.circuits import SQLiteCircuits
from llmkit.state.owner import current_owner
from llmkit.state.sqlite import SQLiteStore

class Clock(SystemClock):
    def time(self):
        return 1000.0

store = SQLiteStore(Path(sys.argv[1]))
circuits = SQLiteCircuits(lambda: store.database, Clock())
print(asyncio.run(circuits.claim_probe(sys.argv[2], current_owner() + "#1", 1600.0, 1)), flush=True)
sys.stdin.read()
"""


def test_the_probe_of_a_process_that_was_killed_is_free(opened, path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", CLAIM, str(path), NAME], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "True\n"
    assert not run(opened.claim_probe(NAME, f"{ME}#2", 1010.0, 1)), "it is alive"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert run(opened.claim_probe(NAME, f"{ME}#2", 1010.0, 1))
    assert not run(opened.claim_probe(NAME, f"{ME}#3", 1010.0, 1))


@pytest.mark.parametrize(
    "values",
    [
        "('x', 'ajar', 1, 1060.0, 5, 0, NULL)",
        "('x', 'open', 'one', 1060.0, 5, 0, NULL)",
        "('x', 'open', -1, 1060.0, 5, 0, NULL)",
        "('x', 'open', 1, 'soon', 5, 0, NULL)",
        "('x', 'open', 1, 9e999, 5, 0, NULL)",
        "('x', 'open', 1, 1060.0, x'00', 0, NULL)",
        "('x', 'open', 1, 1060.0, 5, 0.5, NULL)",
        "('x', 'open', 1, 1060.0, 5, 0, x'ff')",
    ],
)
def test_what_no_llmkit_wrote_is_passed_over_with_a_word_and_written_over(opened, path, caplog, values) -> None:
    assert run(opened.write(OPEN))
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(f"INSERT INTO circuits VALUES {values}")
    with caplog.at_level(logging.WARNING, logger="llmkit"):
        assert run(opened.read("x")) is None
        assert run(opened.read_all()) == [OPEN]
    assert len(caplog.records) == 1
    assert run(opened.write(OPEN._replace(endpoint="x")))
    assert run(opened.read("x")) == OPEN._replace(endpoint="x")


def test_nonsense_among_the_probes_blocks_nobody(opened, path) -> None:
    run(opened.read_all())
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("INSERT INTO probes VALUES (?, 'nobody', 'never')", (NAME,))
        connection.execute("INSERT INTO probes VALUES (?, x'00', 9e99)", (NAME,))
    assert run(opened.claim_probe(NAME, f"{ME}#1", 1010.0, 1))


def test_a_write_waits_for_another_process_that_writes_and_holds_up_no_loop(opened, path) -> None:
    run(opened.read_all())

    async def main():
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            writing = asyncio.create_task(opened.write(OPEN))
            await asyncio.sleep(0)  # the loop goes on
            assert not writing.done()
            assert await opened.read(NAME) is None, "and reading does not wait"
            other.execute("COMMIT")
            return await writing

    assert run(main())


def test_a_file_that_is_no_ledger_any_more_is_a_store_error(opened, path) -> None:
    run(opened.read_all())
    opened._database().close()
    path.write_bytes(b"not a database" * 1000)
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    with pytest.raises(StoreError):
        run(opened.read(NAME))
    with pytest.raises(StoreError):
        run(opened.write(OPEN))


def test_without_a_file_nothing_is_shared() -> None:
    circuits = SQLiteCircuits(lambda: None, FakeClock())
    assert run(circuits.read(NAME)) is None
    assert run(circuits.read_all()) == []
    assert run(circuits.write(OPEN._replace(version=7)))
    assert run(circuits.claim_probe(NAME, f"{ME}#1", 1e12, 0))
    run(circuits.aclose())
