"""Where answers are kept on one machine: in a SQLite file beside the ledger's, or in memory.

A file of its own, so that what was said can be deleted without touching the books, and a damaged one harms nothing
else: it is moved aside, and a new one is begun.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from llmkit.errors import StoreError
from llmkit.lock import new_lock
from llmkit.state.damage import aside, files, is_damage, move_aside
from llmkit.state.database import Database
from llmkit.state.shared import Contents
from llmkit.state.store import fitting_text, is_in_own_folder, path_beside

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable
    from pathlib import Path

    from llmkit.clock import Clock
    from llmkit.state.database import Work
    from llmkit.state.shared import Entries

__all__ = ["APPLICATION_ID", "MIGRATIONS", "MemoryEntries", "SQLiteEntries", "cache_path", "open_entries"]

log = logging.getLogger("llmkit")

T = TypeVar("T")

APPLICATION_ID = 0x6C6C6D63  # "llmc"

# An answer that is stored is three pages of the log, and each of them costs as much as all the rest: hence no index but
# the key's. Rows stand in the order in which they were last used, since one that was used is moved to the end when it
# matters. The triggers keep the sums whatever changes a row, in the same transaction. ``value`` stands last: what is
# asked of the other columns alone does not read it.
_CACHE = (
    """
    CREATE TABLE entries (
        key TEXT PRIMARY KEY NOT NULL,
        namespace TEXT NOT NULL,
        size INTEGER NOT NULL,
        expires REAL,
        value BLOB NOT NULL
    )
    """,
    "CREATE TABLE sums (entries INTEGER NOT NULL, size INTEGER NOT NULL, generation INTEGER NOT NULL)",
    "INSERT INTO sums VALUES (0, 0, 0)",
    """
    CREATE TRIGGER entry_made AFTER INSERT ON entries
    BEGIN UPDATE sums SET entries = entries + 1, size = size + NEW.size; END
    """,
    """
    CREATE TRIGGER entry_gone AFTER DELETE ON entries
    BEGIN UPDATE sums SET entries = entries - 1, size = size - OLD.size; END
    """,
)
MIGRATIONS: tuple[tuple[str, ...], ...] = (_CACHE,)

_SETTINGS = (
    "PRAGMA secure_delete = ON",  # what is deleted is overwritten
    "PRAGMA recursive_triggers = ON",  # what is replaced is deleted, for the sums
)
_GET = "SELECT value, expires FROM entries WHERE key = ?"
_PUT = "REPLACE INTO entries (key, namespace, size, expires, value) VALUES (?, ?, ?, ?, ?)"
_MOVE = "UPDATE entries SET rowid = (SELECT max(rowid) + 1 FROM entries) WHERE key = ?"
_SWEEP = "DELETE FROM entries WHERE rowid IN (SELECT rowid FROM entries ORDER BY rowid LIMIT ?) AND expires <= ?"
_RENEW = "UPDATE sums SET generation = generation + 1"

PATIENCE_S = 2.0  # an answer is not worth a longer wait
_TIMES = {float, type(None)}
_MOST_USED = 4_096  # entries of which it is remembered, and not yet written, that they were used
_ROWS_A_CHECKPOINT = 1_000  # answers are long
_PUTS_A_SWEEP = 64  # after so many, the oldest rows are looked through for those that have expired
_ROWS_A_SWEEP = 256


def cache_path(url: str) -> Path | None:
    """The file of answers that belongs to the ledger at ``url``; None where nothing is kept in files."""
    return path_beside(url, "cache")


def open_entries(url: str, *, max_bytes: int, clock: Clock) -> Entries:
    """The entries that belong to the ledger at ``url``; waits for files, so not for an event loop's thread.

    Raises:
        ConfigError: there is no such store.
        StoreError: it cannot be opened.
    """
    path = cache_path(url)
    if path is None:
        return MemoryEntries(max_bytes=max_bytes, clock=clock)
    return SQLiteEntries(path, max_bytes=max_bytes, clock=clock, private_folder=is_in_own_folder(url))


class MemoryEntries:
    """Entries that end with the process; the least recently used go first."""

    location = "memory"

    def __init__(self, *, max_bytes: int, clock: Clock) -> None:
        self._max_bytes = max_bytes
        self._clock = clock
        self._rows: dict[str, tuple[bytes, float | None, str]] = {}  # the least recently used first
        self._size = 0
        self._generation = 0
        self._lock = new_lock()

    async def get(self, key: str) -> tuple[bytes, float | None] | None:
        with self._lock:
            row = self._rows.pop(key, None)
            if row is None:
                return None
            value, expires, _ = row
            if expires is not None and expires <= self._clock.time():
                self._size -= len(value)
                return None
            self._rows[key] = row
            return value, expires

    async def peek(self, key: str) -> tuple[bytes, float | None] | None:
        with self._lock:
            value, expires, _ = self._rows.get(key, (None, None, ""))
        return None if value is None or (expires is not None and expires <= self._clock.time()) else (value, expires)

    async def put(self, key: str, value: bytes, *, namespace: str, expires: float | None) -> None:
        with self._lock:
            self._remove(key)
            if len(value) > self._max_bytes:
                return
            self._rows[key] = (bytes(value), expires, namespace)
            self._size += len(value)
            while self._size > self._max_bytes:
                self._remove(next(iter(self._rows)))

    async def delete(self, key: str) -> None:
        with self._lock:
            self._remove(key)

    def _remove(self, key: str) -> None:
        row = self._rows.pop(key, None)
        if row is not None:
            self._size -= len(row[0])

    async def clear(self, namespace: str | None = None) -> int:
        with self._lock:
            keys = [key for key, row in self._rows.items() if namespace is None or row[2] == namespace]
            for key in keys:
                self._remove(key)
            self._generation += 1
            return len(keys)

    async def renew(self) -> None:
        with self._lock:
            self._generation += 1

    async def generation(self) -> int:
        return self._generation

    async def contents(self, namespace: str | None = None) -> Contents:
        with self._lock:
            sizes = [len(row[0]) for row in self._rows.values() if namespace is None or row[2] == namespace]
        return Contents(len(sizes), sum(sizes))

    async def aclose(self) -> None:
        """There is nothing to let go of."""


class SQLiteEntries:
    """Entries in the SQLite file ``path``, shared by every process that opens it.

    Looking up and storing happen on the caller's thread: a few µs, and no lock to wait for. A hit writes nothing: that
    an entry was used is written with the next one that is stored, and only in a store that fills up.

    Args:
        max_bytes: of all values together; the file is a little larger.

    Raises:
        StoreError: it cannot be opened.
    """

    def __init__(
        self,
        path: Path,
        *,
        max_bytes: int,
        clock: Clock,
        private_folder: bool = False,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.location = str(path)
        self._path = path
        self._max_bytes = max_bytes
        self._clock = clock
        self._used: dict[str, None] = {}  # the last one used at the end
        self._puts = 0
        self._groups: dict[asyncio.AbstractEventLoop, list[tuple[Work[Any], asyncio.Future[Any]]]] = {}
        self._mending = new_lock()
        self._open: Callable[[], Database] = partial(
            Database,
            path,
            migrations=MIGRATIONS,
            application_id=APPLICATION_ID,
            what="cache",
            private_folder=private_folder,
            patience_s=patience_s,
            changes_a_checkpoint=_ROWS_A_CHECKPOINT,
            settings=_SETTINGS,
        )
        try:
            self._database = self._open()
        except StoreError as error:
            if not is_damage(error):
                raise
            self._database = self._begun_anew(error)

    # -- one entry ---------------------------------------------------------------------------------------------------

    async def get(self, key: str) -> tuple[bytes, float | None] | None:
        try:
            rows = self._database.glance(_GET, (key,))
        except StoreError as error:
            await self._mend(error)
            return None
        if not rows:
            return None
        value, expires = rows[0]
        if type(value) is not bytes or type(expires) not in _TIMES:
            log.warning("an answer in the cache %s cannot be used: its row is damaged; it is removed", self._path)
            expires = 0.0
        if expires is not None and not expires > self._clock.time():
            await self.delete(key)
            return None
        used = self._used
        used.pop(key, None)
        used[key] = None
        if len(used) > _MOST_USED:
            self._used = {}  # in a store that is nowhere near full, where nobody needs to know
        return value, expires

    async def peek(self, key: str) -> tuple[bytes, float | None] | None:
        for value, expires in self._database.glance(_GET, (key,)):
            if type(value) is bytes and type(expires) in _TIMES and (expires is None or expires > self._clock.time()):
                return value, expires
        return None

    async def put(self, key: str, value: bytes, *, namespace: str, expires: float | None) -> None:
        size = len(value)
        if size > self._max_bytes:
            await self.delete(key)
            return
        row = (key, fitting_text(namespace), size, None if expires is None else float(expires), value)
        self._puts += 1
        now = self._clock.time() if self._puts % _PUTS_A_SWEEP == 1 else None
        used = list(self._used)

        def work(connection: sqlite3.Connection) -> bool:
            execute = connection.execute
            execute(_PUT, row)
            if now is not None:
                execute(_SWEEP, (_ROWS_A_SWEEP, now))
            total = execute("SELECT size FROM sums").fetchone()[0]
            if total <= self._max_bytes // 2:
                return False
            if used:
                connection.executemany(_MOVE, [(each,) for each in (*used, key)])
            if total > self._max_bytes:
                _evict(connection, total - self._max_bytes)
            return True

        if await self._run_with_others(work):
            for each in used:
                self._used.pop(each, None)

    async def delete(self, key: str) -> None:
        await self._run(lambda connection: connection.execute("DELETE FROM entries WHERE key = ?", (key,)))

    # -- all entries -------------------------------------------------------------------------------------------------

    async def clear(self, namespace: str | None = None) -> int:
        removed: int = await self._run(partial(_clear, None if namespace is None else fitting_text(namespace)))
        await asyncio.to_thread(self._database.scrub, shrink=namespace is None)
        if namespace is None:
            for path in files(aside(self._path)):
                with contextlib.suppress(OSError):
                    path.unlink()
        return removed

    async def renew(self) -> None:
        await self._run(lambda connection: connection.execute(_RENEW))

    async def generation(self) -> int:
        try:
            rows = self._database.glance("SELECT generation FROM sums")
            generation = rows[0][0] if rows else 0
        except StoreError as error:
            await self._mend(error)
            generation = -1
        return generation if type(generation) is int else 0

    async def contents(self, namespace: str | None = None) -> Contents:
        if namespace is None:
            rows = self._database.glance("SELECT entries, size FROM sums")
            return Contents(*rows[0])
        sql = "SELECT count(*), coalesce(sum(size), 0) FROM entries WHERE namespace = ?"
        rows = await asyncio.to_thread(self._database.read, sql, (fitting_text(namespace),))
        return Contents(*rows[0])

    async def aclose(self) -> None:
        self._database.close()  # not in a thread: at the interpreter's end there are none to be had

    # -- the file ----------------------------------------------------------------------------------------------------

    async def _run(self, work: Work[Any]) -> Any:
        try:
            return await _done(self._database.run(work))
        except StoreError as error:
            await self._mend(error)
            return await _done(self._database.run(work))

    async def _run_with_others(self, work: Work[T]) -> T:
        """Do it now; but with all others that come in the same turn of the loop in one transaction, if there are any."""
        loop = asyncio.get_running_loop()
        group = self._groups.get(loop)
        if group is not None:
            done: asyncio.Future[T] = loop.create_future()
            group.append((work, done))
            return await done
        self._groups[loop] = []
        loop.call_soon(self._flush, loop)
        ended: T = await self._run(work)
        return ended

    def _flush(self, loop: asyncio.AbstractEventLoop) -> None:
        group = self._groups.pop(loop)
        if group:
            task = loop.create_task(self._run_group(group))
            _FLUSHING.add(task)  # a loop keeps only weak references to its tasks
            task.add_done_callback(_FLUSHING.discard)

    async def _run_group(self, group: list[tuple[Work[Any], asyncio.Future[Any]]]) -> None:
        def work(connection: sqlite3.Connection) -> list[Any]:
            return [each(connection) for each, _ in group]

        failure: BaseException | None = None
        ends: list[Any] = []
        try:
            ends = await self._run(work)
        except BaseException as error:  # noqa: BLE001 - whoever waits for it must hear of it
            failure = error
        for index, (_, done) in enumerate(group):
            if done.done():  # whoever waited was cancelled
                continue
            if failure is None:
                done.set_result(ends[index])
            else:
                done.set_exception(failure)

    async def _mend(self, error: StoreError) -> None:
        """Begin a new file where the old one is damaged; raise ``error`` where something else is wrong."""
        if not is_damage(error):
            raise error
        await asyncio.to_thread(self._replace, self._database, error)

    def _replace(self, damaged: Database, error: StoreError) -> None:
        with self._mending:
            if self._database is damaged:
                damaged.close()
                self._database = self._begun_anew(error)

    def _begun_anew(self, error: StoreError) -> Database:
        """A new file in place of the damaged one, which is moved aside."""
        move_aside(self._path, error, "cache")
        return self._open()


_FLUSHING: set[asyncio.Task[None]] = set()


async def _done(result: Any) -> Any:
    return await asyncio.shield(asyncio.wrap_future(result)) if isinstance(result, Future) else result


def _evict(connection: sqlite3.Connection, excess: int) -> None:
    """Remove the first rows, until ``excess`` bytes are gone."""
    while excess > 0:
        rows = connection.execute("SELECT rowid, size FROM entries ORDER BY rowid LIMIT 64").fetchall()
        for rowid, size in rows:
            connection.execute("DELETE FROM entries WHERE rowid = ?", (rowid,))
            excess -= size
            if excess <= 0:
                return
        if not rows:
            return


def _clear(namespace: str | None, connection: sqlite3.Connection) -> int:
    if namespace is None:
        removed = connection.execute("DELETE FROM entries").rowcount
    else:
        removed = connection.execute("DELETE FROM entries WHERE namespace = ?", (namespace,)).rowcount
    connection.execute(_RENEW)
    return removed
