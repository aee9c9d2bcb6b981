"""The store in a SQLite file, shared by threads, kernels and whatever else opens it.

A commit happens on the caller's own thread, which takes a few tens of microseconds and never waits for a lock. Only
when another process holds the lock does the commit move to the store's worker thread; there it is tried again after
short random pauses, which is fair where SQLite's own busy handler lets one process starve. What comes in meanwhile
queues behind it, so changes are applied in the order in which they were made. Checkpoints, which wait for the disk
(0.5 s was seen), are made on a worker thread, too.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import sqlite3
import stat
import threading
import time
import weakref
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from llmkit.errors import StoreError
from llmkit.state.migrations import APPLICATION_ID, MIGRATIONS
from llmkit.state.store import (
    ATTEMPT_COLUMNS,
    CALL_COLUMNS,
    LOST_MESSAGE,
    AttemptBegun,
    AttemptEnded,
    CallBegun,
    CallEnded,
    DuplicateCall,
    fitting,
    fitting_text,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from llmkit.state.store import Change

__all__ = ["SQLiteStore"]

log = logging.getLogger("llmkit")

T = TypeVar("T")
Row = dict[str, Any]

PATIENCE_S = 10.0
LOOK_AGAIN_S = 1.0  # how often a commit checks that the file is still the one at its path
GROUP = 64  # most waiting commits that share one transaction
CHANGES_A_CHECKPOINT = 2_000  # about four thousand pages
PAGES_OF_LOG = 4000  # beyond them the log is begun anew; 16 MB
PAGES_OF_LOG_AT_MOST = 20_000  # beyond them a commit does it by itself, on whatever thread it is

_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL}
_NEXT_STEP = {
    sqlite3.SQLITE_BUSY: "another program holds it locked: close that one",
    sqlite3.SQLITE_FULL: "the disk is full: make room",
    sqlite3.SQLITE_CORRUPT: "the file is damaged: move it away, and a new one is made",
    sqlite3.SQLITE_NOTADB: "the file is no ledger: move it away, or choose another one ([state] url in llmkit.toml)",
}
_ELSEWHERE = "use a local folder that can be written: LLMKIT_DATA_DIR, or [state] url in llmkit.toml"


def _insert(table: str, change: type[Any]) -> str:
    columns = change._fields
    return f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"  # noqa: S608 - all names are our own


def _update(table: str, change: type[Any], keys: int) -> str:
    values, where = change._fields[:-keys], change._fields[-keys:]
    return f"UPDATE {table} SET {', '.join(f'{c} = ?' for c in values)} WHERE {' AND '.join(f'{c} = ?' for c in where)}"  # noqa: S608


_SQL: dict[type[Change], str] = {
    CallBegun: _insert("calls", CallBegun),
    AttemptBegun: _insert("attempts", AttemptBegun),
    AttemptEnded: _update("attempts", AttemptEnded, 2),
    CallEnded: _update("calls", CallEnded, 1),
}
_SELECT_CALLS = f"SELECT {', '.join(CALL_COLUMNS)} FROM calls"  # noqa: S608
_SELECT_ATTEMPTS = f"SELECT {', '.join(ATTEMPT_COLUMNS)} FROM attempts"  # noqa: S608
_LOSE_ATTEMPTS = """
    UPDATE attempts SET status = 'lost', maybe_billed = 1 WHERE status = 'in_flight'
    AND request_id IN (SELECT request_id FROM calls WHERE status = 'in_flight' AND owner = ?)
"""
_LOSE_CALLS = """
    UPDATE calls SET status = 'lost', message = ?,
        attempts = (SELECT count(*) FROM attempts WHERE attempts.request_id = calls.request_id),
        cost_nanos = (SELECT CASE WHEN count(*) = count(cost_nanos) THEN coalesce(sum(cost_nanos), 0) END
                      FROM attempts WHERE attempts.request_id = calls.request_id)
    WHERE status = 'in_flight' AND owner = ?
"""


class SQLiteStore:
    """Calls and attempts in the SQLite file ``path``, made with mode 0600 where it is not there yet.

    A folder that has to be made gets 0700. WAL with ``synchronous=NORMAL``: what was committed survives the death of
    the process; a power cut may take the last moments, but tears nothing.

    Args:
        path: absolute, and not a symbolic link.
        private_folder: the folder is llmkit's own, so it is brought to 0700 even if it was there.
        patience_s: how long a commit or a read waits for a lock before it fails.

    Raises:
        StoreError: it cannot be opened: not writable, damaged, of a newer llmkit, on a drive without locks.
    """

    def __init__(self, path: Path, *, private_folder: bool = False, patience_s: float = PATIENCE_S) -> None:
        self.location = str(path)
        self.path = path
        self._private_folder = private_folder
        self._patience_s = patience_s
        self._start_afresh()
        _STORES.add(self)
        self._patiently(self._open)

    def _start_afresh(self) -> None:
        """With nothing open and nothing waiting: at first, and in a forked child."""
        self._lock = threading.Lock()  # held for each transaction on the one connection
        self._reading = threading.Lock()  # held while a reader's connection is open
        self._checkpointing = threading.Lock()  # held while a checkpoint's connection is open
        self._held: list[threading.Lock] = []
        self._since_checkpoint = 0
        self._connection: sqlite3.Connection | None = None
        self._identity = (0, 0)
        self._looked = 0.0
        self._queue: deque[tuple[Sequence[Change], Future[None]]] = deque()
        self._queueing = threading.Lock()
        self._worker: ThreadPoolExecutor | None = None

    # -- writing -----------------------------------------------------------------------------------------------------

    def commit(self, changes: Sequence[Change]) -> Future[None] | None:
        if self._queue or not self._lock.acquire(blocking=False):
            return self._enqueue(changes)
        try:
            self._write(changes)
        except sqlite3.Error as error:
            if not _is_busy(error):
                raise self._failure(error) from error
        else:
            return None
        finally:
            self._lock.release()
        return self._enqueue(changes)

    def _write(self, changes: Sequence[Change]) -> None:
        """One transaction; the lock is held."""
        try:
            self._transact(changes)
        except (OverflowError, UnicodeError, sqlite3.InterfaceError, sqlite3.ProgrammingError):
            # A server said 10**30 tokens, or a name is no valid Unicode: so rare that it is looked for only now.
            self._transact([fitting(change) for change in changes])

    def _transact(self, changes: Sequence[Change]) -> None:
        connection = self._connection
        if connection is None or time.monotonic() - self._looked > LOOK_AGAIN_S:
            connection = self._open()
        execute = connection.execute
        execute("BEGIN IMMEDIATE")
        try:
            for change in changes:
                execute(_SQL[type(change)], tuple(change))  # a plain tuple is bound without a call for each value
            execute("COMMIT")
        except BaseException:
            _roll_back(connection)
            raise
        self._since_checkpoint += len(changes)
        if self._since_checkpoint >= CHANGES_A_CHECKPOINT:
            self._since_checkpoint = 0
            with contextlib.suppress(RuntimeError):  # the interpreter is going down; closing makes the last checkpoint
                self._threads().submit(self._checkpoint)

    def _patiently(self, work: Callable[[], T]) -> T:
        """Do ``work`` with the lock held; while another process holds the file's lock, try again after short pauses."""
        deadline = time.monotonic() + self._patience_s
        while True:
            try:
                with self._lock:
                    return work()
            except sqlite3.Error as error:
                if not _is_busy(error) or time.monotonic() > deadline:
                    raise self._failure(error) from error
            _pause()

    def _enqueue(self, changes: Sequence[Change]) -> Future[None]:
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()  # from here on nobody can cancel it
        with self._queueing:
            self._queue.append((changes, future))
            if len(self._queue) > 1:  # a commit stays in the queue until it is done, so the worker is at work
                return future
        try:
            self._threads().submit(self._drain)
        except RuntimeError:  # the interpreter is going down and starts no more work: wait here
            self._drain()
        return future

    def _drain(self) -> None:
        """Commit what waits, several at a time, until nothing does."""
        while True:
            group = [self._queue[index] for index in range(min(len(self._queue), GROUP))]
            errors = self._commit_group([changes for changes, _ in group])
            with self._queueing:
                for _ in group:
                    self._queue.popleft()
                done = not self._queue
            for (_, future), error in zip(group, errors, strict=True):
                if error is None:
                    future.set_result(None)
                else:
                    future.set_exception(error)
            if done:
                return

    def _commit_group(self, commits: list[Sequence[Change]]) -> list[BaseException | None]:
        """One transaction for all; where one of them spoils it, one for each. The error of each, or None."""
        try:
            self._patiently(lambda: self._write([change for changes in commits for change in changes]))
        except DuplicateCall as error:
            return [error] if len(commits) == 1 else [self._commit_group([each])[0] for each in commits]
        except Exception as error:  # noqa: BLE001 - whoever waits for it must hear of it
            return [error] * len(commits)
        return [None] * len(commits)

    def _threads(self) -> ThreadPoolExecutor:
        with self._queueing:
            if self._worker is None:  # one thread for what waits, one for checkpoints
                self._worker = ThreadPoolExecutor(2, thread_name_prefix="llmkit-ledger")
            return self._worker

    def _checkpoint(self) -> None:
        """Move what is in the log into the database."""
        try:
            with self._checkpointing, contextlib.closing(self._connect()) as connection:
                _, pages, _ = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
                if pages > PAGES_OF_LOG:
                    _begin_new_log(connection)
        except sqlite3.Error as error:
            log.debug("a checkpoint of %s failed: %s", self.path, error)

    # -- the file ----------------------------------------------------------------------------------------------------

    def _open(self) -> sqlite3.Connection:
        """The connection to the file that is at the path now; the lock is held."""
        self._looked = time.monotonic()
        connection = self._connection
        if connection is not None:
            if _identity(self.path) == self._identity:
                return connection
            log.warning("the ledger %s was taken away or replaced; a new one is begun where it is missing", self.path)
            self._let_go()
        self._make_file()
        connection = self._connect()
        try:
            _look_at(connection, self.path)
            _share(connection, self.path)
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute(f"PRAGMA wal_autocheckpoint = {PAGES_OF_LOG_AT_MOST}")
            _migrate(connection, self.path)
            _touch(connection)
        except BaseException:
            connection.close()
            raise
        self._connection, self._identity = connection, _identity(self.path)
        return connection

    def _connect(self) -> sqlite3.Connection:
        # mode=rw: SQLite itself must not make the file, since it would be readable by others for a moment.
        return sqlite3.connect(
            f"{self.path.as_uri()}?mode=rw", uri=True, isolation_level=None, timeout=0, check_same_thread=False
        )

    def _make_file(self) -> None:
        """See that the file is there, and only its owner's."""
        try:
            with _MAKING:
                _make_folder(self.path.parent, private=self._private_folder)
                _make_private(self.path)
        except OSError as error:
            reason = error.strerror or str(error)
            raise StoreError(f"the ledger {self.path} cannot be opened: {reason}", next_step=_ELSEWHERE) from error

    def _failure(self, error: sqlite3.Error) -> StoreError:
        if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY:
            return DuplicateCall(f"the ledger {self.path} has a call of this request_id already")
        code = _code(error)
        if _is_busy(error):
            message = f"the ledger {self.path} has been locked by another program for {self._patience_s:g} s"
            return StoreError(message, next_step=_NEXT_STEP[sqlite3.SQLITE_BUSY])
        return StoreError(f"the ledger {self.path} cannot be used: {error}", next_step=_NEXT_STEP.get(code, _ELSEWHERE))

    def _let_go(self) -> None:
        """Close the connection, if there is one; the lock is held."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    # -- reading -----------------------------------------------------------------------------------------------------

    def calls(self, *, limit: int | None = None, since: float | None = None) -> list[Row]:
        where, given = ("", []) if since is None else (" WHERE started >= ?", [since])
        order = " ORDER BY started DESC, request_id DESC LIMIT ?"
        rows = self._read(_SELECT_CALLS + where + order, [*given, -1 if limit is None else limit])
        return [dict(zip(CALL_COLUMNS, row, strict=True)) for row in reversed(rows)]

    def attempts(self, request_id: str) -> list[Row]:
        rows = self._read(f"{_SELECT_ATTEMPTS} WHERE request_id = ? ORDER BY number", [fitting_text(request_id)])
        return [dict(zip(ATTEMPT_COLUMNS, row, strict=True)) for row in rows]

    def owners(self) -> dict[str, float]:
        return dict(self._read("SELECT owner, max(started) FROM calls WHERE status = 'in_flight' GROUP BY owner", []))

    def _read(self, sql: str, given: list[Any]) -> list[Any]:
        # On a connection of its own: a reader of a million rows must not hold up the writers.
        try:
            with self._reading, contextlib.closing(self._connect()) as connection:
                connection.execute(f"PRAGMA busy_timeout = {int(self._patience_s * 1000)}")
                return connection.execute(sql, given).fetchall()
        except sqlite3.Error as error:
            raise self._failure(error) from error

    # -- endings -----------------------------------------------------------------------------------------------------

    def mark_lost(self, owner: str) -> int:
        return self._patiently(lambda: self._lose(owner))

    def _lose(self, owner: str) -> int:
        connection = self._open()
        connection.execute("BEGIN IMMEDIATE")
        try:
            connection.execute(_LOSE_ATTEMPTS, [owner])
            lost = connection.execute(_LOSE_CALLS, [LOST_MESSAGE, owner]).rowcount
            connection.execute("COMMIT")
        except BaseException:
            _roll_back(connection)
            raise
        return lost

    def close(self) -> None:
        with self._queueing:
            worker, self._worker = self._worker, None
        if worker is not None:
            worker.shutdown()
        with self._lock:
            self._let_go()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self._let_go()

    # -- forking -----------------------------------------------------------------------------------------------------

    # SQLite forbids to carry an open database across a fork, even to close it there. So nothing is open meanwhile.

    def _before_fork(self) -> None:
        self._held = [lock for lock in (self._lock, self._reading, self._checkpointing) if lock.acquire(timeout=1)]
        if self._lock in self._held:
            self._let_go()

    def _after_fork(self, *, child: bool) -> None:
        if child:
            if self._connection is not None:  # somebody held the lock for a whole second
                _CARRIED_OVER.append(self._connection)
            self._start_afresh()
            return
        for lock in self._held:
            lock.release()


_STORES: weakref.WeakSet[SQLiteStore] = weakref.WeakSet()
_CARRIED_OVER: list[sqlite3.Connection] = []
_MAKING = threading.Lock()


def _each_before_fork() -> None:
    for store in list(_STORES):
        store._before_fork()


def _each_after_fork(*, child: bool) -> None:
    if child:
        global _MAKING  # noqa: PLW0603 - another thread may have held it, and is not here
        _MAKING = threading.Lock()
    for store in list(_STORES):
        store._after_fork(child=child)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_each_before_fork,
        after_in_parent=lambda: _each_after_fork(child=False),
        after_in_child=lambda: _each_after_fork(child=True),
    )


def _code(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF  # extended codes are in the higher bits


def _is_busy(error: sqlite3.Error) -> bool:
    return _code(error) in _BUSY


def _roll_back(connection: sqlite3.Connection) -> None:
    with contextlib.suppress(sqlite3.Error):
        if connection.in_transaction:
            connection.execute("ROLLBACK")


def _identity(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return (0, 0)
    return (found.st_dev, found.st_ino)


def _make_folder(folder: Path, *, private: bool) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = not folder.exists()
    folder.mkdir(mode=0o700, exist_ok=True)
    if made or (private and folder.stat().st_mode & 0o077):
        folder.chmod(0o700)


def _make_private(path: Path) -> None:
    """Make the file if it is missing; what is there already is closed to others.

    An existing file is never opened here: closing it again would drop the locks that SQLite holds on it for every
    connection of this process.
    """
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o600))
        path.chmod(0o600)
    except FileExistsError:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode):
            kind = "a symbolic link" if stat.S_ISLNK(found.st_mode) else "not a file"
            raise StoreError(f"the ledger {path} is {kind}", next_step=_ELSEWHERE) from None
    for each in (path, path.with_name(path.name + "-wal"), path.with_name(path.name + "-shm")):
        with contextlib.suppress(OSError):  # another user's: theirs to decide
            if each.lstat().st_mode & 0o077 and not each.is_symlink():
                each.chmod(0o600)


def _look_at(connection: sqlite3.Connection, path: Path) -> None:
    """Check the file before anything is changed in it."""
    connection.execute("BEGIN")  # one view of it: another process may be making it just now
    try:
        _check(connection, path)
    finally:
        _roll_back(connection)


def _check(connection: sqlite3.Connection, path: Path) -> None:
    """That the file is a ledger, or empty, and not of a newer llmkit; in a transaction."""
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        if version or connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            raise StoreError(f"the file {path} is not a ledger of llmkit", next_step=_NEXT_STEP[sqlite3.SQLITE_NOTADB])
    elif version > len(MIGRATIONS):
        message = f"the ledger {path} was written by a newer llmkit (schema {version}, known here: {len(MIGRATIONS)})"
        raise StoreError(message, next_step="update llmkit, or choose another file ([state] url in llmkit.toml)")


def _share(connection: sqlite3.Connection, path: Path) -> None:
    """Let readers and a writer work at once, in any number of processes."""
    if connection.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
        raise StoreError(f"the ledger {path} is on a drive without shared locks", next_step=_ELSEWHERE)


def _begin_new_log(connection: sqlite3.Connection) -> None:
    """Under load a checkpoint never catches up with the writers, so they have to stand back a moment.

    Without a busy timeout: a checkpoint that waits for readers keeps the writers out all the while.
    """
    for _ in range(20):
        busy, _, _ = connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()
        if not busy:
            _touch(connection)
            return
        _pause()


def _touch(connection: sqlite3.Connection) -> None:
    """Make the first write to a new log, since that one waits for the disk. It shows, too, whether writing is possible."""
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")


def _pause() -> None:
    time.sleep(random.uniform(50e-6, 300e-6))  # noqa: S311 - not a secret, only unlike the others' pauses


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    """Take the steps that the file has not taken yet, all or none."""
    if connection.execute("PRAGMA user_version").fetchone()[0] == len(MIGRATIONS):
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        _check(connection, path)  # again, now that nobody else can change it
        for step in MIGRATIONS[connection.execute("PRAGMA user_version").fetchone()[0] :]:
            for statement in step:
                connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        connection.execute("COMMIT")
    except BaseException:
        _roll_back(connection)
        raise
