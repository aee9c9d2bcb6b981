"""What is special to the file: who may read it, who holds its lock, and what becomes of it."""

from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from llmkit.errors import StoreError
from llmkit.state.database import Database
from llmkit.state.migrations import APPLICATION_ID, MIGRATIONS
from llmkit.state.sqlite import SQLiteStore
from llmkit.state.store import AttemptBegun, CallBegun, CallEnded, DuplicateCall


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "ledger.sqlite3"


@pytest.fixture
def store(path):
    opened = SQLiteStore(path)
    yield opened
    opened.close()


def begun(request_id, started=1.0):
    return [
        CallBegun(request_id, started, None, "{}", "m", "host:1:a"),
        AttemptBegun(request_id, 1, started, "openai", "m", None),
    ]


def ended(request_id, status="complete"):
    return [CallEnded(status, *[None] * 13, 1, 0, *[None] * 3, request_id)]


def locked(path):
    """A connection that holds the write lock."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.execute("BEGIN IMMEDIATE")
    return connection


def ids(store):
    return [row["request_id"] for row in store.calls()]


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


# -- who may read it -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o377])
def test_folder_and_files_are_their_owners_alone(path, umask):
    before = os.umask(umask)
    try:
        store = SQLiteStore(path)
        store.commit(begun("a"))
        files = {each.name: mode(each) for each in path.parent.iterdir()}
        store.close()
    finally:
        os.umask(before)
    assert files == {"ledger.sqlite3": 0o600, "ledger.sqlite3-wal": 0o600, "ledger.sqlite3-shm": 0o600}
    assert mode(path.parent) == 0o700


def test_the_file_is_made_closed_and_not_closed_afterwards(path, monkeypatch):
    modes = []
    connect = sqlite3.connect

    def watching(*args, **options):
        modes.append((mode(path), path.stat().st_size))
        return connect(*args, **options)

    monkeypatch.setattr(sqlite3, "connect", watching)
    SQLiteStore(path).close()
    assert modes == [(0o600, 0)]


def test_an_open_file_is_closed_to_others(path):
    SQLiteStore(path).close()
    path.chmod(0o644)
    SQLiteStore(path).close()
    assert mode(path) == 0o600


def test_llmkits_own_folder_is_closed_and_another_is_left_alone(path):
    path.parent.mkdir(mode=0o755)
    path.parent.chmod(0o755)
    SQLiteStore(path).close()
    assert mode(path.parent) == 0o755
    SQLiteStore(path, private_folder=True).close()
    assert mode(path.parent) == 0o700


@pytest.mark.parametrize("target", ["missing.db", "there.db"])
def test_a_symbolic_link_is_refused(path, target):
    path.parent.mkdir()
    aim = path.parent / target
    if target == "there.db":
        SQLiteStore(aim).close()
    path.symlink_to(aim)
    with pytest.raises(StoreError, match="symbolic link"):
        SQLiteStore(path)
    assert aim.exists() == (target == "there.db")


# -- what it is ------------------------------------------------------------------------------------------------------


def test_an_empty_file_becomes_a_ledger(store, path):
    with sqlite3.connect(path) as raw:
        assert raw.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)
        assert raw.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)
        assert raw.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    raw.close()


@pytest.mark.parametrize("version", range(len(MIGRATIONS)))
def test_every_earlier_version_is_brought_to_this_one(path, version):
    path.parent.mkdir()
    raw = sqlite3.connect(path, isolation_level=None)
    for step in MIGRATIONS[:version]:
        for statement in step:
            raw.execute(statement)
    raw.execute(f"PRAGMA user_version = {version}")
    raw.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    raw.close()
    migrated = SQLiteStore(path)
    migrated.commit(begun("a"))
    assert ids(migrated) == ["a"]
    migrated.close()


def test_a_migration_that_fails_changes_nothing(path, monkeypatch):
    monkeypatch.setattr("llmkit.state.sqlite.MIGRATIONS", (*MIGRATIONS, ("CREATE TABLE more (x)", "nonsense")))
    with pytest.raises(StoreError, match="syntax error"):
        SQLiteStore(path)
    raw = sqlite3.connect(path)
    assert raw.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)
    raw.close()


def test_a_newer_ledger_is_left_alone(path):
    SQLiteStore(path).close()
    raw = sqlite3.connect(path)
    raw.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    raw.close()
    before = path.read_bytes()
    with pytest.raises(StoreError, match="newer llmkit") as caught:
        SQLiteStore(path)
    assert str(path) in str(caught.value)
    assert "update llmkit" in caught.value.next_step
    assert path.read_bytes() == before


def test_the_database_of_something_else_is_left_alone(path):
    path.parent.mkdir()
    raw = sqlite3.connect(path)
    raw.execute("CREATE TABLE theirs (x)")
    raw.close()
    before = path.read_bytes()
    with pytest.raises(StoreError, match="not a ledger"):
        SQLiteStore(path)
    assert path.read_bytes() == before


def test_a_file_that_is_no_database_is_one_clear_error(path):
    path.parent.mkdir()
    path.write_bytes(b"some notes of mine " * 100)
    with pytest.raises(StoreError, match="not a database") as caught:
        SQLiteStore(path)
    assert str(path) in str(caught.value)
    assert "move it away" in caught.value.next_step


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be opened") as caught:
        SQLiteStore(tmp_path / "file" / "ledger.sqlite3")
    assert "LLMKIT_DATA_DIR" in caught.value.next_step


def test_a_full_disk_is_one_clear_error_and_the_commit_is_undone(store):
    store.commit(begun("a"))
    connection = store.database._connection
    connection.execute(f"PRAGMA max_page_count = {connection.execute('PRAGMA page_count').fetchone()[0]}")
    with pytest.raises(StoreError, match="full") as caught:
        for number in range(100):
            store.commit(begun(f"{number:0>500}"))
    assert "room" in caught.value.next_step
    connection.execute("PRAGMA max_page_count = 100000")
    store.commit(begun("b"))
    assert set(ids(store)) >= {"a", "b"}


def test_a_drive_without_shared_locks_is_one_clear_error(path, monkeypatch):
    class NoWal(sqlite3.Connection):
        def execute(self, sql, *given):
            return super().execute("PRAGMA journal_mode = DELETE" if "WAL" in sql else sql, *given)

    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **options: connect(*args, **options, factory=NoWal))
    with pytest.raises(StoreError, match="without shared locks"):
        SQLiteStore(path)


def test_a_ledger_taken_away_is_begun_anew(store, path, monkeypatch):
    monkeypatch.setattr("llmkit.state.database.LOOK_AGAIN_S", 0.0)
    store.commit(begun("a"))
    for each in path.parent.iterdir():
        each.unlink()
    store.commit(begun("b"))
    assert ids(store) == ["b"]
    assert mode(path) == 0o600


# -- who holds its lock ----------------------------------------------------------------------------------------------


def test_a_busy_file_is_waited_for_on_another_thread_in_order(store, path):
    store.commit(begun("a"))
    holder = locked(path)
    waiting = [store.commit(begun("b")), store.commit(ended("a")), store.commit(ended("b"))]
    assert all(each is not None and not each.done() for each in waiting)
    assert not waiting[0].cancel()
    holder.execute("ROLLBACK")
    holder.close()
    for each in waiting:
        each.result(10)
    assert [(row["request_id"], row["status"]) for row in store.calls()] == [("a", "complete"), ("b", "complete")]
    deadline = time.monotonic() + 10
    while store.database._queue and time.monotonic() < deadline:
        time.sleep(0.001)
    assert store.commit(begun("c")) is None  # what is free again is written at once


def test_nothing_overtakes_what_waits_even_when_the_file_is_free(store, path, monkeypatch):
    pausing, go_on = threading.Event(), threading.Event()

    def pause():
        pausing.set()
        go_on.wait(10)

    monkeypatch.setattr("llmkit.state.database._pause", pause)
    holder = locked(path)
    first = store.commit(begun("a"))
    assert pausing.wait(10)
    holder.execute("ROLLBACK")
    holder.close()
    second = store.commit(ended("a"))
    go_on.set()
    first.result(10)
    assert second is not None
    second.result(10)
    assert store.calls()[0]["status"] == "complete"


def test_one_that_spoils_a_shared_transaction_fails_alone(store, path):
    store.commit(begun("a"))
    holder = locked(path)
    first, spoiler, last = store.commit(begun("b")), store.commit(begun("a")), store.commit(begun("c"))
    holder.execute("ROLLBACK")
    holder.close()
    first.result(10)
    last.result(10)
    with pytest.raises(DuplicateCall):
        spoiler.result(10)
    assert ids(store) == ["a", "b", "c"]


def test_patience_ends_with_one_clear_error(path):
    store = SQLiteStore(path, patience_s=0.05)
    holder = locked(path)
    with pytest.raises(StoreError, match="locked by another program") as caught:
        store.commit(begun("a")).result(10)
    assert "database is locked" not in str(caught.value)
    with pytest.raises(StoreError, match="locked by another program"):
        store.mark_lost("x")
    holder.execute("ROLLBACK")
    holder.close()
    store.commit(begun("b"))
    assert ids(store) == ["b"]
    store.close()


def test_reading_does_not_wait_for_a_writer(store, path):
    store.commit(begun("a"))
    holder = locked(path)
    assert ids(store) == ["a"]
    holder.close()


def test_closing_finishes_what_waits(store, path):
    holder = locked(path)
    waiting = store.commit(begun("a"))
    timer = threading.Timer(0.05, holder.execute, ["ROLLBACK"])
    timer.start()
    store.close()
    assert waiting.done()
    assert ids(store) == ["a"]
    timer.join()
    holder.close()


# -- how it stays small ----------------------------------------------------------------------------------------------


def test_the_log_is_moved_into_the_database_off_the_writers_thread(path, monkeypatch):
    monkeypatch.setattr("llmkit.state.database.CHANGES_A_CHECKPOINT", 5)
    monkeypatch.setattr("llmkit.state.database.PAGES_OF_LOG", 20)
    threads = set()

    checkpoint = Database._checkpoint

    def watched(self):
        threads.add(threading.current_thread())
        checkpoint(self)

    monkeypatch.setattr(Database, "_checkpoint", watched)
    store = SQLiteStore(path)
    log = path.with_name(path.name + "-wal")
    sizes = []
    for number in range(200):
        waiting = store.commit(begun(f"{number:05}"))
        if waiting is not None:
            waiting.result(10)
        if number % 5 == 4:
            store.database._threads().submit(int).result(10)  # both threads have come by
            store.database._threads().submit(int).result(10)
        sizes.append(log.stat().st_size)
    assert len(store.calls()) == 200
    store.close()
    assert threads
    assert threading.current_thread() not in threads
    assert max(sizes) < 100 * 4096  # 200 commits write about a thousand pages


def test_a_checkpoint_that_fails_stops_nobody(store, path, monkeypatch):
    monkeypatch.setattr(store.database, "_changes_a_checkpoint", 1)

    def fail(self):
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(Database, "_connect", fail)
    store.commit(begun("a"))
    store.database._threads().shutdown()
    store.database._worker = None
    assert store.commit(begun("b")) is None


# -- several processes -----------------------------------------------------------------------------------------------


WRITER = """
    import sys
    from pathlib import Path
    from llmkit.state.sqlite import SQLiteStore
    from llmkit.state.store import AttemptBegun, CallBegun, CallEnded

    name, path = sys.argv[1:]
    store = SQLiteStore(Path(path))
    print("ready", flush=True)
    sys.stdin.readline()
    for number in range(500):
        key = f"{name}-{number}"
        changes = [CallBegun(key, 1.0, None, "{}", "m", "host:1:a"), AttemptBegun(key, 1, 1.0, "openai", "m", None)]
        for commit in (changes, [CallEnded("complete", *[None] * 13, 1, 0, *[None] * 3, key)]):
            waiting = store.commit(commit)
            if waiting is not None:
                waiting.result(30)
    store.close()
"""


def run(code, *args):
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def at_once(processes):
    """Start them together, and see each to a good end."""
    for process in processes:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        _, complaint = process.communicate(timeout=60)
        assert (process.returncode, complaint) == (0, "")


def test_two_processes_write_at_once(path):
    at_once([run(WRITER, name, path) for name in "ab"])
    store = SQLiteStore(path)
    rows = store.calls()
    assert len(rows) == 1000
    assert {row["status"] for row in rows} == {"complete"}
    store.close()
    raw = sqlite3.connect(path)
    assert raw.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    raw.close()


MAKER = """
    import sys
    from pathlib import Path
    from llmkit.state.sqlite import SQLiteStore

    print("ready", flush=True)
    sys.stdin.readline()
    for number in range(50):
        SQLiteStore(Path(sys.argv[1], str(number), "ledger.sqlite3")).close()
"""


def test_several_processes_make_it_at_once(tmp_path):
    at_once([run(MAKER, tmp_path) for _ in range(3)])


FORKER = """
    import os, sys, warnings
    from pathlib import Path
    from llmkit.state.sqlite import SQLiteStore
    from llmkit.state.store import CallBegun

    warnings.simplefilter("ignore", DeprecationWarning)
    store = SQLiteStore(Path(sys.argv[1]))

    def write(key):
        waiting = store.commit([CallBegun(key, 1.0, None, "{}", "m", "host:1:a")])
        if waiting is not None:
            waiting.result(30)

    write("before")
    children = []
    for child in range(3):
        pid = os.fork()
        if pid == 0:
            if sys.platform == "linux":
                files = [os.readlink(f"/proc/self/fd/{fd}") for fd in range(100) if os.path.exists(f"/proc/self/fd/{fd}")]
                assert not any("ledger" in file for file in files), files
            for number in range(50):
                write(f"child {child} {number}")
            store.close()
            os._exit(0)
        children.append(pid)
        write(f"parent {child}")
    assert all(os.waitpid(pid, 0)[1] == 0 for pid in children)
    write("after")
    store.close()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_writes_beside_its_parent(path):
    process = run(FORKER, path)
    _, complaint = process.communicate(timeout=60)
    assert (process.returncode, complaint) == (0, "")
    store = SQLiteStore(path)
    assert len(store.calls()) == 1 + 3 * 50 + 3 + 1
    store.close()
    raw = sqlite3.connect(path)
    assert raw.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    raw.close()


@pytest.mark.parametrize(("template", "index"), [("t", "calls_of_template"), (None, "calls_started")])
def test_what_to_expect_is_looked_up_in_an_index_and_not_sorted(tmp_path, monkeypatch, template, index):
    store = SQLiteStore(tmp_path / "ledger.sqlite3")
    asked = []
    read = store.database.read
    monkeypatch.setattr(store.database, "read", lambda sql, given=(): asked.append((sql, given)) or read(sql, given))
    store.outputs("openai:m", template, 10)
    ((sql, given),) = asked
    steps = [row[3] for row in read(f"EXPLAIN QUERY PLAN {sql}", given)]
    store.close()
    assert sum("SCAN calls" in step or "SEARCH calls" in step for step in steps) == 1
    assert any(f"INDEX {index}" in step for step in steps), steps
