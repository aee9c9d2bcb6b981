"""What any database of llmkit does, whatever its tables: transactions that never wait, in order, each for itself.

Who may read the file, what becomes of it, and what several processes do to it is tried with the ledger (test_sqlite).
"""

from __future__ import annotations

import sqlite3
import threading
from concurrent.futures import Future

import pytest

from llmkit.errors import StoreError
from llmkit.state.database import Database

STEPS = (("CREATE TABLE notes (key TEXT PRIMARY KEY NOT NULL, value INTEGER)",),)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "notes.sqlite3"


@pytest.fixture
def database(path):
    opened = Database(path, migrations=STEPS, application_id=7, what="notebook")
    yield opened
    opened.close()


def put(key, value=1):
    def work(connection):
        connection.execute("INSERT INTO notes VALUES (?, ?)", (key, value))
        return f"put {key}"

    return work


def stumble(connection):
    connection.execute("INSERT INTO notes VALUES ('half', 1)")
    raise ZeroDivisionError


def keys(database):
    return [key for (key,) in database.read("SELECT key FROM notes ORDER BY rowid")]


class Locked:
    """Another program that holds the file's lock."""

    def __init__(self, path) -> None:
        self.connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)

    def __enter__(self):
        self.connection.execute("BEGIN IMMEDIATE")

    def __exit__(self, *_):
        self.connection.execute("ROLLBACK")
        self.connection.close()


def test_work_is_done_at_once_and_gives_what_it_returns(database):
    assert database.run(put("a")) == "put a"
    assert database.run_patiently(put("b")) == "put b"
    assert keys(database) == ["a", "b"]


@pytest.mark.parametrize("how", ["run", "run_patiently"])
def test_work_that_raises_is_undone_and_its_error_is_the_callers(database, how):
    with pytest.raises(ZeroDivisionError):
        getattr(database, how)(stumble)
    assert keys(database) == []
    database.run(put("a"))
    assert keys(database) == ["a"]


def test_an_error_of_sqlite_is_a_store_error_that_names_the_file(database, path):
    with pytest.raises(StoreError, match=r"the notebook .*notes.sqlite3 cannot be used") as caught:
        database.run(lambda connection: connection.execute("nonsense"))
    assert isinstance(caught.value.__cause__, sqlite3.Error)
    with pytest.raises(StoreError, match=str(path)):
        database.read("SELECT * FROM missing")
    with pytest.raises(StoreError, match=str(path)):
        database.glance("SELECT * FROM missing")


def test_while_the_file_is_locked_work_waits_in_order_and_nothing_overtakes_it(database, path):
    with Locked(path):
        waiting = [database.run(put(key)) for key in "abc"]
        assert all(isinstance(each, Future) and not each.done() for each in waiting)
        assert keys(database) == []
    assert [each.result(10) for each in waiting] == ["put a", "put b", "put c"]
    assert keys(database) == ["a", "b", "c"]


def test_of_waiting_work_each_fails_for_itself(database, path):
    database.run(put("taken"))
    with Locked(path):
        good, stumbles, taken, unfit, last = (
            database.run(work) for work in (put("a"), stumble, put("taken"), put("big", 10**30), put("b"))
        )
    assert (good.result(10), last.result(10)) == ("put a", "put b")
    with pytest.raises(ZeroDivisionError):
        stumbles.result(10)
    with pytest.raises(StoreError, match="UNIQUE"):
        taken.result(10)
    with pytest.raises(OverflowError):
        unfit.result(10)
    assert keys(database) == ["taken", "a", "b"]


def test_waiting_work_shares_transactions(database, path):
    seen = []
    with Locked(path):
        database._connection.set_trace_callback(seen.append)
        waiting = [database.run(put(str(number))) for number in range(100)]
    for each in waiting:
        each.result(10)
    assert len(keys(database)) == 100
    assert 1 <= seen.count("COMMIT") <= 4


@pytest.mark.parametrize("busy", [False, True])
def test_a_value_that_fits_no_column_is_brought_to_one_that_does(database, path, busy):
    def work(value):
        def both(connection):
            connection.execute("INSERT INTO notes VALUES ('first', 0)")
            connection.execute("INSERT INTO notes VALUES ('a', ?)", (value,))

        return both

    if busy:
        with Locked(path):
            waiting = [database.run(work(10**30), work(5)), database.run(put("b"))]
        for each in waiting:
            each.result(10)
    else:
        database.run(work(10**30), work(5))
    assert database.glance("SELECT value FROM notes WHERE key = 'a'") == [(5,)]
    assert keys(database)[:2] == ["first", "a"]
    with pytest.raises(OverflowError):
        database.run(put("b2", 10**30))


def test_whoever_is_patient_waits_for_the_lock(database, path):
    holder = Locked(path)
    holder.__enter__()
    timer = threading.Timer(0.05, holder.__exit__)
    timer.start()
    assert database.run_patiently(put("a")) == "put a"
    timer.join()


def test_patience_ends(path):
    database = Database(path, migrations=STEPS, application_id=7, what="notebook", patience_s=0.05)
    with Locked(path):
        with pytest.raises(StoreError, match=r"the notebook .* has been locked by another program for 0.05 s"):
            database.run_patiently(put("a"))
        waiting = [database.run(put("a")), database.run(put("b"))]
        for each in waiting:
            with pytest.raises(StoreError, match="locked by another program"):
                each.result(10)
    database.run(put("c"))
    assert keys(database) == ["c"]
    database.close()


def test_a_glance_sees_what_was_written_and_waits_for_no_writer(database, path):
    database.run(put("a", 3))
    with Locked(path):
        assert database.glance("SELECT value FROM notes WHERE key = ?", ("a",)) == [(3,)]
        assert database.glance("SELECT value FROM notes WHERE key = ?", ["b"]) == []


def test_a_long_read_holds_up_no_writer(database):
    reading, go_on = threading.Event(), threading.Event()

    def pause():
        reading.set()
        go_on.wait(10)
        return 1

    connect = database._connect

    def connected():
        connection = connect()
        connection.create_function("pause", 0, pause)
        return connection

    database._connect = connected
    found = []
    reader = threading.Thread(target=lambda: found.extend(database.read("SELECT pause()")))
    reader.start()
    assert reading.wait(10)
    assert database.run(put("a")) == "put a"
    go_on.set()
    reader.join(10)
    assert found == [(1,)]


def test_the_file_of_another_kind_is_left_alone(database, path):
    database.close()
    with pytest.raises(StoreError, match="not a ledger of llmkit"):
        Database(path, migrations=STEPS, application_id=8)
    with pytest.raises(StoreError, match=r"the notebook .* newer llmkit"):
        Database(path, migrations=(), application_id=7, what="notebook")


def test_many_threads(database):
    def write(name):
        for number in range(50):
            done = database.run(put(f"{name}-{number}"))
            if isinstance(done, Future):
                done.result(10)

    threads = [threading.Thread(target=write, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(keys(database)) == 200


def test_what_is_left_open_at_the_end_of_the_process_ends_quietly(monkeypatch) -> None:
    """As the interpreter leaves it: its module's names are gone before it."""
    from llmkit.state import database

    left = database.Database.__new__(database.Database)
    monkeypatch.setattr(database, "contextlib", None)
    left.__del__()
