"""llmkit.state.entries: the contract of every store of answers, and what is special to the SQLite file."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from llmkit.errors import ConfigError, StoreError
from llmkit.state.database import Database
from llmkit.state.entries import APPLICATION_ID, MIGRATIONS, MemoryEntries, SQLiteEntries, cache_path, open_entries
from llmkit.testing import FakeClock

LONG = 10**10  # epoch seconds


class Opener:
    """Opens stores of one kind; all of one test share what they keep, except in memory."""

    def __init__(self, kind, request, path):
        self.kind = kind
        self.path = path
        self.clock = FakeClock(start=1_700_000_000.0) if kind != "redis" else None
        self.server = request.getfixturevalue("redis_server") if kind == "redis" else None

    @contextlib.asynccontextmanager
    async def __call__(self, max_bytes=10_000):
        if self.kind == "redis":
            from tests.state.test_redis_entries import opened

            async with opened(self.server, max_bytes=max_bytes) as entries:
                yield entries
            return
        made = (
            MemoryEntries(max_bytes=max_bytes, clock=self.clock)
            if self.kind == "memory"
            else SQLiteEntries(self.path, max_bytes=max_bytes, clock=self.clock)
        )
        try:
            yield made
        finally:
            await made.aclose()


@pytest.fixture(params=["memory", "sqlite", pytest.param("redis", marks=pytest.mark.redis)])
def opener(request, tmp_path):
    return Opener(request.param, request, tmp_path / "l.cache.sqlite3")


def test_what_is_put_is_got_until_it_is_deleted(opener):
    async def main():
        async with opener() as entries:
            assert await entries.get("a") is None
            await entries.put("a", b"one", namespace="", expires=None)
            assert await entries.get("a") == (b"one", None)
            await entries.put("a", b"\0two\xff", namespace="", expires=LONG)
            assert await entries.get("a") == (b"\0two\xff", LONG)
            assert await entries.contents() == (1, 5)
            await entries.delete("a")
            await entries.delete("a")
            assert (await entries.get("a"), await entries.contents()) == (None, (0, 0))

    asyncio.run(main())


def test_looking_finds_what_getting_would_and_is_no_use(opener):
    async def main():
        async with opener(max_bytes=30) as entries:
            assert await entries.peek("a") is None
            await entries.put("a", b"0" * 10, namespace="", expires=LONG)
            await entries.put("b", b"1" * 10, namespace="", expires=None)
            for _ in range(3):
                assert await entries.peek("a") == (b"0" * 10, LONG)
            await entries.put("c", b"2" * 20, namespace="", expires=None)
            found = [await entries.peek(key) is not None for key in "abc"]
            assert found == [False, True, True], "looking at the oldest one kept it"

    asyncio.run(main())


def test_looking_removes_nothing_that_has_expired(opener):
    async def main():
        async with opener() as entries:
            if opener.clock is None:  # a server, which lets it go by itself
                await entries.put("a", b"one", namespace="", expires=entries._clock.time() - 1)
                assert await entries.peek("a") is None
                return
            await entries.put("a", b"one", namespace="", expires=opener.clock.time() + 1)
            await opener.clock.advance(2)
            assert await entries.peek("a") is None
            assert await entries.contents() == (1, 3)

    asyncio.run(main())


def test_namespaces_are_counted_and_cleared_apart(opener):
    async def main():
        async with opener() as entries:
            await entries.put("a", b"12", namespace="user:ana", expires=None)
            await entries.put("b", b"345", namespace="user:ana", expires=None)
            await entries.put("c", b"6789", namespace="user:bob \ud800", expires=None)
            await entries.put("d", b"x", namespace="", expires=None)
            assert await entries.contents() == (4, 10)
            assert await entries.contents("user:ana") == (2, 5)
            assert await entries.contents("nobody") == (0, 0)
            assert await entries.clear("user:ana") == 2
            assert await entries.contents() == (2, 5)
            assert (await entries.get("a"), (await entries.get("d"))[0]) == (None, b"x")
            assert await entries.clear("user:bob \ud800") == 1
            assert await entries.clear() == 1
            assert await entries.contents() == (0, 0)

    asyncio.run(main())


def test_the_generation_grows_with_each_clear_and_renewal(opener):
    async def main():
        async with opener() as entries:
            seen = [await entries.generation()]
            for change in (entries.clear, entries.renew, lambda: entries.clear("nobody")):
                await change()
                seen.append(await entries.generation())
            await entries.put("a", b"1", namespace="", expires=None)
            await entries.get("a")
            assert seen == sorted(set(seen))
            assert await entries.generation() == seen[-1]

    asyncio.run(main())


def test_the_least_recently_used_go_first(opener):
    async def main():
        async with opener(max_bytes=1000) as entries:
            for key in "abcd":
                await entries.put(key, b"x" * 250, namespace="", expires=None)
            await entries.get("a")
            await entries.put("c", b"y" * 250, namespace="", expires=None)  # replaced counts as used
            await entries.put("e", b"x" * 400, namespace="", expires=None)
            left = [key for key in "abcde" if await entries.get(key) is not None]
            assert left == ["a", "c", "e"]
            assert await entries.contents() == (3, 900)

    asyncio.run(main())


def test_what_is_larger_than_the_store_is_not_stored_and_what_it_replaces_is_gone(opener):
    async def main():
        async with opener(max_bytes=1000) as entries:
            await entries.put("a", b"x" * 1000, namespace="", expires=None)
            await entries.put("b", b"x" * 1001, namespace="", expires=None)
            assert await entries.contents() == (1, 1000)
            await entries.put("a", b"x" * 1001, namespace="", expires=None)
            assert await entries.contents() == (0, 0)

    asyncio.run(main())


@pytest.mark.parametrize("opener", ["memory", "sqlite"], indirect=True)  # a server has a clock of its own
def test_what_has_expired_is_not_there(opener):
    async def main():
        async with opener() as entries:
            now = opener.clock.time()
            await entries.put("a", b"1", namespace="", expires=now + 10)
            await opener.clock.advance(9.9)
            assert (await entries.get("a"))[0] == b"1"
            await opener.clock.advance(0.2)
            assert await entries.get("a") is None
            assert await entries.contents() == (0, 0)
            await entries.put("a", b"2", namespace="", expires=None)
            await opener.clock.advance(10**9)
            assert await entries.get("a") == (b"2", None)

    asyncio.run(main())


def test_the_sums_are_right_whatever_happens(opener):
    async def main():
        chance = random.Random(7)
        async with opener(max_bytes=2000) as entries:
            known = {}
            for _ in range(400):
                key = f"k{chance.randrange(30)}"
                what = chance.choice(["put", "put", "put", "get", "delete", "clear"])
                if what == "put":
                    known[key] = chance.randbytes(chance.randrange(1, 300))
                    await entries.put(key, known[key], namespace=chance.choice("ab"), expires=None)
                elif what == "get":
                    found = await entries.get(key)
                    assert found is None or found[0] == known[key]
                elif what == "delete":
                    await entries.delete(key)
                elif chance.random() < 0.1:
                    await entries.clear("a")
            stored = [found[0] for key in known if (found := await entries.get(key)) is not None]
            assert await entries.contents() == (len(stored), sum(map(len, stored)))
            assert sum(map(len, stored)) <= 2000
            assert stored

    asyncio.run(main())


def test_many_at_once_are_all_stored(opener):
    async def main():
        async with opener(max_bytes=10**6) as entries:
            puts = [entries.put(f"k{n}", b"%d" % n, namespace="", expires=None) for n in range(300)]
            await asyncio.gather(*puts)
            found = await asyncio.gather(*[entries.get(f"k{n}") for n in range(300)])
            assert [value for value, _ in found] == [b"%d" % n for n in range(300)]
            assert (await entries.contents()).entries == 300

    asyncio.run(main())


def test_a_store_is_known_by_its_url(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMKIT_DATA_DIR", str(tmp_path))
    assert cache_path("sqlite") == tmp_path / "ledger.cache.sqlite3"
    assert cache_path(f"sqlite:///{tmp_path}/my.db") == tmp_path / "my.cache.sqlite3"
    assert cache_path("memory") is None
    assert open_entries("memory", max_bytes=1, clock=FakeClock()).location == "memory"
    with pytest.raises(ConfigError):
        open_entries("postgres://x", max_bytes=1, clock=FakeClock())


# -- the file ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path):
    return tmp_path / "l.cache.sqlite3"


def files_of(path):
    return sorted(each for each in path.parent.iterdir() if each.name.startswith(path.name))


def bytes_on_disk(path):
    return b"".join(each.read_bytes() for each in files_of(path))


def run_with(path, work, **options):
    async def main():
        entries = SQLiteEntries(path, **{"max_bytes": 10**6, "clock": FakeClock(), **options})
        try:
            return await work(entries)
        finally:
            await entries.aclose()

    return asyncio.run(main())


async def put(entries, key, value=b"value", namespace=""):
    await entries.put(key, value, namespace=namespace, expires=None)


def test_only_its_owner_may_read_the_file(path):
    async def work(entries):
        await put(entries, "a")
        return [stat.S_IMODE(each.stat().st_mode) for each in files_of(path)]

    assert set(run_with(path, work)) == {0o600}


def test_what_was_put_is_there_for_the_next_process(path):
    run_with(path, lambda entries: put(entries, "a"))
    assert run_with(path, lambda entries: entries.get("a")) == (b"value", None)


def test_what_is_cleared_deleted_replaced_or_evicted_is_on_no_disk(path):
    secret = b"the secret of the answer "

    async def work(entries):
        for number in range(200):
            await put(entries, f"k{number}", secret * 20 + b"<%d>" % number, namespace=f"n{number % 2}")
        assert secret in bytes_on_disk(path)
        await put(entries, "k0", b"harmless", namespace="n1")
        await entries.delete("k1")
        await entries.clear("n0")
        still = bytes_on_disk(path)
        assert [n for n in (0, 1, 2, 4, 198) if secret + b"<%d>" % n in still] == []
        assert secret * 20 + b"<199>" in still
        await entries.clear()
        assert b"secret" not in bytes_on_disk(path)
        assert (await entries.contents()).entries == 0
        await put(entries, "a")
        return path.stat().st_size

    assert run_with(path, work) < 100_000  # the room was given back


def test_use_counts_over_processes_once_the_store_fills_up(path):
    async def fill(entries):
        for key in "abc":
            await put(entries, key, b"x" * 300)

    async def use(entries):
        await entries.get("a")
        await put(entries, "d", b"x" * 300)  # evicts

    run_with(path, fill, max_bytes=1000)
    run_with(path, use, max_bytes=1000)

    async def left(entries):
        return [key for key in "abcd" if await entries.get(key)]

    assert run_with(path, left, max_bytes=1000) == ["a", "c", "d"]


def test_what_has_expired_is_swept_out(path):
    clock = FakeClock()

    async def work(entries):
        for number in range(100):
            await entries.put(f"old{number}", b"x", namespace="", expires=clock.time() + 5)
        await clock.advance(10)
        for number in range(100):
            await entries.put(f"new{number}", b"x", namespace="", expires=None)
        return await entries.contents()

    assert run_with(path, work, clock=clock) == (100, 100)


def test_puts_of_one_turn_of_the_loop_share_a_transaction(path, monkeypatch):
    transactions = []
    original = Database.run

    def counted(self, work, *rest):
        transactions.append(work)
        return original(self, work, *rest)

    async def work(entries):
        monkeypatch.setattr(Database, "run", counted)
        await asyncio.gather(*[put(entries, f"k{n}") for n in range(50)])
        return len(transactions)

    assert run_with(path, work) == 2  # the first by itself, the rest together


def test_a_cancelled_put_spoils_none_of_the_others(path):
    async def work(entries):
        tasks = [asyncio.ensure_future(put(entries, f"k{n}")) for n in range(10)]
        await asyncio.sleep(0)
        tasks[5].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return [n for n in range(10) if await entries.get(f"k{n}") is not None]

    assert set(run_with(path, work)) >= set(range(10)) - {5}


# -- damage ------------------------------------------------------------------------------------------------------------


def damage_header(path):
    path.write_bytes(b"this is no database" * 1000)


def damage_pages(path):
    content = bytearray(path.read_bytes())
    content[4096 : len(content)] = os.urandom(len(content) - 4096)
    path.write_bytes(bytes(content))


def lose_a_table(path):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TABLE entries")
        connection.commit()


def cut(path):
    path.write_bytes(path.read_bytes()[:5000])


@pytest.mark.parametrize("harm", [damage_header, damage_pages, lose_a_table, cut])
def test_a_damaged_file_is_moved_aside_and_a_new_one_begun(path, harm, caplog):
    async def fill(entries):
        for number in range(50):
            await put(entries, f"k{number}", os.urandom(500))

    run_with(path, fill)
    harm(path)

    async def work(entries):
        found = [await entries.get(f"k{number}") for number in range(50)]
        await put(entries, "a")
        return found, await entries.get("a"), await entries.contents()

    with caplog.at_level(logging.WARNING, "llmkit"):
        found, new, contents = run_with(path, work)
    assert set(found) == {None}
    assert (new, contents) == ((b"value", None), (1, 5))
    assert len([record for record in caplog.records if "a new one is begun" in record.message]) == 1
    aside = path.with_name(f"{path.name}.damaged")
    assert stat.S_IMODE(aside.stat().st_mode) == 0o600
    run_with(path, lambda entries: entries.clear())
    assert not aside.exists()  # a cleared cache leaves nothing behind


def test_damage_that_comes_while_it_is_open_is_mended(path, caplog):
    async def work(entries):
        for number in range(200):
            await put(entries, f"k{number}", os.urandom(500))
        await entries.aclose()  # all into the file
        damage_pages(path)
        with caplog.at_level(logging.WARNING, "llmkit"):
            assert await entries.get("k1") is None
            await put(entries, "k1", b"again")
        return await entries.get("k1")

    assert run_with(path, work) == (b"again", None)


@pytest.mark.parametrize("schema", [f"PRAGMA application_id = {0x6C6C6D6B}", "CREATE TABLE diary (text)"])
def test_a_file_of_somebody_else_is_left_alone(path, schema):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE mine (a)")
        connection.execute(schema)
        connection.commit()
    before = path.read_bytes()
    with pytest.raises(StoreError, match="not a cache of llmkit"):
        run_with(path, lambda entries: entries.get("a"))
    assert path.read_bytes() == before


def test_a_file_of_a_newer_llmkit_is_left_alone(path):
    run_with(path, lambda entries: put(entries, "a"))
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    with pytest.raises(StoreError, match="newer llmkit"):
        run_with(path, lambda entries: entries.get("a"))


def test_the_file_says_what_it_is(path):
    run_with(path, lambda entries: put(entries, "a"))
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA application_id").fetchone()[0] == APPLICATION_ID
        assert connection.execute("PRAGMA user_version").fetchone()[0] == len(MIGRATIONS)
        assert connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal"


@pytest.mark.parametrize("value, expires", [("text", None), (None, None), (5, None), (b"v", "soon"), (b"v", b"x")])
def test_a_row_of_the_wrong_kind_is_not_there_and_goes(path, value, expires):
    run_with(path, lambda entries: put(entries, "a"))
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript(
            "ALTER TABLE entries RENAME TO old; CREATE TABLE entries (key, namespace, size, expires, value)"
        )
        connection.execute("INSERT INTO entries VALUES ('a', '', 1, ?, ?)", (expires, value))
        connection.commit()
    assert run_with(path, lambda entries: entries.get("a")) is None
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM entries").fetchone()[0] == 0


# -- processes -----------------------------------------------------------------------------------------------------------

WRITER = """
import asyncio, sys
from pathlib import Path
from llmkit.clock import SystemClock
from llmkit.state.entries import SQLiteEntries

async def main():
    entries = SQLiteEntries(Path(sys.argv[1]), max_bytes=300_000, clock=SystemClock())
    number = 0
    while True:
        key = f"{sys.argv[2]}-{number}"
        await entries.put(key, key.encode() * 50, namespace="", expires=None)
        print(number, flush=True)
        found = await entries.get(f"{sys.argv[2]}-{max(0, number - 3)}")
        assert found is not None
        number += 1

asyncio.run(main())
"""


def test_processes_share_it_and_a_kill_loses_nothing_that_was_stored(path):
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", textwrap.dedent(WRITER), str(path)]
    writers = [
        subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True, env=environ) for name in ("a", "b", "c")
    ]
    for writer in writers:
        for _ in range(60):
            assert writer.stdout.readline()
    stored = {}
    for name, writer in zip("abc", writers, strict=True):
        writer.send_signal(signal.SIGKILL)
        rest = writer.communicate()[0].split()
        stored[name] = int(rest[-1]) if rest else 59

    async def work(entries):
        for name, last in stored.items():
            key = f"{name}-{last}"  # what was said to be stored last, so what eviction takes last
            assert (await entries.get(key))[0] == key.encode() * 50
        contents = await entries.contents()
        rows = await asyncio.to_thread(entries._database.read, "SELECT count(*), sum(size) FROM entries")
        return contents, tuple(rows[0])

    contents, counted = run_with(path, work, max_bytes=300_000)
    assert contents == counted
    assert contents.size <= 300_000


def test_a_locked_file_holds_up_a_put_for_two_seconds_at_most_and_says_so(path):
    async def work(entries):
        await put(entries, "a")
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            assert await entries.get("a") == (b"value", None)  # readers wait for nobody
            with pytest.raises(StoreError, match="locked by another program"):
                await put(entries, "b")
            other.execute("ROLLBACK")
        await put(entries, "b")
        return await entries.get("b")

    assert run_with(path, work, patience_s=0.05) == (b"value", None)


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("x")
    with pytest.raises(StoreError, match=r"the cache .* cannot be opened"):
        SQLiteEntries(Path(blocked / "l.cache.sqlite3"), max_bytes=1, clock=FakeClock())
