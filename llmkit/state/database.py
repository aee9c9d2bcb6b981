"""A SQLite file shared by threads, kernels and whatever else opens it: the machinery, whatever its tables are.

A transaction happens on the caller's own thread, which takes a few tens of microseconds and never waits for a lock.
Only when another process holds the lock does it move to a worker thread; there it is tried again after short random
pauses, which is fair where SQLite's own busy handler lets one process starve. What comes in meanwhile queues behind it,
so transactions happen in the order in which they were asked for. Checkpoints, which wait for the disk (0.5 s was seen),
are made on a worker thread, too.
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
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from llmkit.errors import StoreError
from llmkit.lock import new_lock

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["Database"]

log = logging.getLogger("llmkit")

T = TypeVar("T")
Work = Callable[[sqlite3.Connection], T]

PATIENCE_S = 10.0
LOOK_AGAIN_S = 1.0  # how often a transaction checks that the file is still the one at its path
FORK_S = 10.0  # how long a fork waits for a transaction or a reader; SQLite in the child would take it for its own
GROUP = 64  # most waiting pieces of work that share one transaction
CHANGES_A_CHECKPOINT = 5_000  # rows; about four thousand pages
PAGES_OF_LOG = 4000  # beyond them the log is begun anew; 16 MB
PAGES_OF_LOG_AT_MOST = 20_000  # beyond them a commit does it by itself, on whatever thread it is

_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL}
_UNFIT = (OverflowError, UnicodeError, sqlite3.InterfaceError, sqlite3.ProgrammingError)  # a value that no column holds
_NEXT_STEP = {
    sqlite3.SQLITE_BUSY: "another program holds it locked: close that one",
    sqlite3.SQLITE_FULL: "the disk is full: make room",
    sqlite3.SQLITE_CORRUPT: "the file is damaged: move it away, and a new one is made",
}
_ELSEWHERE = "use a local folder that can be written: LLMKIT_DATA_DIR, or [state] url in llmkit.toml"


class Database:
    """The SQLite file ``path``, made with mode 0600 where it is not there yet, and brought to its newest schema.

    A folder that has to be made gets 0700. WAL with ``synchronous=NORMAL``: what was committed survives the death of
    the process; a power cut may take the last moments, but tears nothing. Safe from any thread, and across a fork.

    Work is a function of the connection. It is done within one transaction, undone whole if it raises, and may be
    done again when that happened, so it changes nothing but the database. What it raises, its caller gets; errors of
    SQLite become `StoreError`.

    Args:
        path: absolute, and not a symbolic link.
        migrations: the steps that lead to the schema; the number of steps taken is in ``PRAGMA user_version``.
        application_id: what tells such a file from those of others.
        what: the file's name for people: ``ledger``.
        private_folder: the folder is llmkit's own, so it is brought to 0700 even if it was there.
        patience_s: how long work waits for a lock before it fails.
        changes_a_checkpoint: after how many changed rows the log is moved into the database.
        settings: further PRAGMAs of the connection that writes.

    Raises:
        StoreError: it cannot be opened: not writable, damaged, of a newer llmkit, on a drive without locks.
    """

    def __init__(
        self,
        path: Path,
        *,
        migrations: Sequence[Sequence[str]],
        application_id: int,
        what: str = "ledger",
        private_folder: bool = False,
        patience_s: float = PATIENCE_S,
        changes_a_checkpoint: int | None = None,
        settings: Sequence[str] = (),
    ) -> None:
        self.path = path
        self.what = what
        self._migrations = migrations
        self._application_id = application_id
        self._private_folder = private_folder
        self._patience_s = patience_s
        self._settings = tuple(settings)
        self._changes_a_checkpoint = CHANGES_A_CHECKPOINT if changes_a_checkpoint is None else changes_a_checkpoint
        self._start_afresh()
        with _BEGINNING:
            _DATABASES.add(self)
        self._patiently(self._open)

    def _start_afresh(self) -> None:
        """With nothing open and nothing waiting: at first, and in a forked child."""
        self._lock = threading.Lock()  # held for each transaction on the one connection
        self._reading = threading.Lock()  # held while a reader's connection is open
        self._checkpointing = threading.Lock()  # held while a checkpoint's connection is open
        self._held: list[threading.Lock] = []
        self._connection: sqlite3.Connection | None = None
        self._changes_before = 0  # of the connection, when the log was last moved into the database
        self._identity = (0, 0)
        self._looked = 0.0
        self._queue: deque[tuple[Work[Any], Work[Any] | None, Future[Any]]] = deque()
        self._queueing = threading.Lock()
        self._worker: ThreadPoolExecutor | None = None

    # -- writing -----------------------------------------------------------------------------------------------------

    def run(self, work: Work[T], fitted: Work[T] | None = None) -> T | Future[T]:
        """Do ``work`` in one transaction, without ever waiting for a lock that another process holds.

        Args:
            work: see the class.
            fitted: the same with values that every column holds; done in its place where a value of ``work`` fits none.

        Returns:
            What it returned, which is the rule; else a future of that: the file is busy, and a thread of its own goes
            on trying, in the order in which work came. Cancelling the future does nothing.

        Raises:
            StoreError: it cannot be done. The future fails with the same.
        """
        if self._queue or not self._lock.acquire(blocking=False):
            return self._enqueue(work, fitted)
        try:
            return self._transact(work, fitted)
        except sqlite3.Error as error:
            if not _is_busy(error):
                raise self._failure(error) from error
        finally:
            self._lock.release()
        return self._enqueue(work, fitted)

    def run_aside(self, work: Work[T], fitted: Work[T] | None = None) -> Future[T]:
        """The same in the thread that goes on trying, from the first: for what nobody waits for. See `run`."""
        return self._enqueue(work, fitted)

    def run_patiently(self, work: Work[T]) -> T:
        """Do ``work`` in one transaction on this thread, however long it has to wait for a lock.

        Raises:
            StoreError: it cannot be done, or the lock did not come free within ``patience_s``.
        """
        return self._patiently(lambda: self._transact(work))

    def _transact(self, work: Work[T], fitted: Work[T] | None = None) -> T:
        """One transaction; the lock is held."""
        connection = self._ready()
        execute = connection.execute
        execute("BEGIN IMMEDIATE")
        try:
            done = work(connection)
            execute("COMMIT")
        except _UNFIT:
            # A server said 10**30 tokens, or a name is no valid Unicode: so rare that it is looked for only now.
            _roll_back(connection)
            if fitted is None:
                raise
            return self._transact(fitted)
        except BaseException:
            _roll_back(connection)
            raise
        self._checkpoint_sometimes(connection)
        return done

    def _transact_together(self, group: list[tuple[Work[Any], Work[Any] | None]]) -> list[tuple[Any, Exception | None]]:
        """One transaction for all, of which one that fails is left out; the lock is held. What each returned or raised."""
        connection = self._ready()
        connection.execute("BEGIN IMMEDIATE")
        try:
            ends = [self._within(connection, work, fitted) for work, fitted in group]
            connection.execute("COMMIT")
        except BaseException:
            _roll_back(connection)
            raise
        self._checkpoint_sometimes(connection)
        return ends

    def _within(
        self, connection: sqlite3.Connection, work: Work[Any], fitted: Work[Any] | None
    ) -> tuple[Any, Exception | None]:
        """Do ``work`` as a part of the transaction that can be undone by itself."""
        connection.execute("SAVEPOINT part")
        try:
            done = work(connection)
        except Exception as error:
            if not connection.in_transaction or (isinstance(error, sqlite3.Error) and _is_busy(error)):
                raise  # the whole transaction is gone
            connection.execute("ROLLBACK TO part")
            connection.execute("RELEASE part")
            if fitted is not None and isinstance(error, _UNFIT):
                return self._within(connection, fitted, None)
            return None, self._failure(error) if isinstance(error, sqlite3.Error) else error
        connection.execute("RELEASE part")
        return done, None

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

    def _enqueue(self, work: Work[T], fitted: Work[T] | None) -> Future[T]:
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()  # from here on nobody can cancel it
        with self._queueing:
            self._queue.append((work, fitted, future))
            if len(self._queue) > 1:  # work stays in the queue until it is done, so the worker is at it
                return future
        try:
            self._threads().submit(self._drain)
        except RuntimeError:  # the interpreter is going down and starts no more work: wait here
            self._drain()
        return future

    def _drain(self) -> None:
        """Do what waits, several pieces at a time, until nothing does."""
        while True:
            group = [self._queue[index] for index in range(min(len(self._queue), GROUP))]
            ends = self._run_group([(work, fitted) for work, fitted, _ in group])
            with self._queueing:
                for _ in group:
                    self._queue.popleft()
                done = not self._queue
            for (_, _, future), (result, error) in zip(group, ends, strict=True):
                if error is None:
                    future.set_result(result)
                else:
                    future.set_exception(error)
            if done:
                return

    def _run_group(self, group: list[tuple[Work[Any], Work[Any] | None]]) -> list[tuple[Any, BaseException | None]]:
        """One transaction for all; where that fails as a whole, one for each. What each returned or raised."""
        try:
            if len(group) > 1:
                return list(self._patiently(lambda: self._transact_together(group)))
            return [(self._patiently(lambda: self._transact(*group[0])), None)]
        except Exception as error:  # noqa: BLE001 - whoever waits for it must hear of it
            if len(group) == 1 or (isinstance(error.__cause__, sqlite3.Error) and _is_busy(error.__cause__)):
                return [(None, error)] * len(group)
            return [self._run_group([each])[0] for each in group]

    def _threads(self) -> ThreadPoolExecutor:
        with self._queueing:
            if self._worker is None:  # one thread for what waits, one for checkpoints
                self._worker = ThreadPoolExecutor(2, thread_name_prefix=f"llmkit-{self.what}")
            return self._worker

    def _checkpoint_sometimes(self, connection: sqlite3.Connection) -> None:
        changes = connection.total_changes
        if changes - self._changes_before >= self._changes_a_checkpoint:
            self._changes_before = changes
            with contextlib.suppress(RuntimeError):  # the interpreter is going down; closing makes the last checkpoint
                self._threads().submit(self._checkpoint)

    def _checkpoint(self) -> None:
        """Move what is in the log into the database."""
        try:
            with self._checkpointing, contextlib.closing(self._connect()) as connection:
                _, pages, _ = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
                if pages > PAGES_OF_LOG:
                    self._begin_new_log(connection)
        except sqlite3.Error as error:
            log.debug("a checkpoint of %s failed: %s", self.path, error)

    def _begin_new_log(self, connection: sqlite3.Connection) -> None:
        """Under load a checkpoint never catches up with the writers, so they have to stand back a moment.

        Without a busy timeout: a checkpoint that waits for readers keeps the writers out all the while.
        """
        for _ in range(20):
            busy, _, _ = connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()
            if not busy:
                self._touch(connection)
                return
            _pause()

    def scrub(self, *, shrink: bool = False) -> None:
        """Empty the log, which still holds what was deleted from the database; ``shrink`` gives back free pages, too.

        Waits for the disk, and for whoever reads or writes just now.

        Raises:
            StoreError: somebody reads or writes without a pause, or it cannot be written.
        """
        try:
            with self._checkpointing, contextlib.closing(self._connect()) as connection:
                connection.execute(f"PRAGMA busy_timeout = {int(self._patience_s * 1000)}")
                if shrink:
                    connection.execute("VACUUM")
                busy, _, _ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        except sqlite3.Error as error:
            raise self._failure(error) from error
        if busy:
            message = f"what was removed from the {self.what} {self.path} may still be in its log: it is in use"
            raise StoreError(message, next_step="try it again in a moment")

    # -- reading -----------------------------------------------------------------------------------------------------

    def read(self, sql: str, given: Sequence[Any] = ()) -> list[Any]:
        """The rows, on a connection of its own: a reader of a million rows must not hold up the writers.

        Raises:
            StoreError: it cannot be read.
        """
        try:
            with self._reading, contextlib.closing(self._connect()) as connection:
                connection.execute(f"PRAGMA busy_timeout = {int(self._patience_s * 1000)}")
                return connection.execute(sql, given).fetchall()
        except sqlite3.Error as error:
            raise self._failure(error) from error

    def glance(self, sql: str, given: Sequence[Any] = ()) -> list[Any]:
        """The few rows that a key finds, on the writers' own connection: about 10 µs, and no lock to wait for.

        Raises:
            StoreError: it cannot be read.
        """
        if self._lock.acquire(blocking=False):
            try:
                return self._ready().execute(sql, given).fetchall()
            except sqlite3.Error as error:
                if not _is_busy(error):
                    raise self._failure(error) from error
            finally:
                self._lock.release()
        return self._patiently(lambda: self._ready().execute(sql, given).fetchall())

    # -- the file ----------------------------------------------------------------------------------------------------

    def _ready(self) -> sqlite3.Connection:
        """The connection, looked after now and then; the lock is held."""
        connection = self._connection
        if connection is None or time.monotonic() - self._looked > LOOK_AGAIN_S:
            return self._open()
        return connection

    def _open(self) -> sqlite3.Connection:
        """The connection to the file that is at the path now; the lock is held."""
        self._looked = time.monotonic()
        connection = self._connection
        if connection is not None:
            if _identity(self.path) == self._identity:
                return connection
            message = "the %s %s was taken away or replaced; a new one is begun where it is missing"
            log.warning(message, self.what, self.path)
            self._let_go()
        self._make_file()
        connection = self._connect()
        try:
            self._look_at(connection)
            self._share(connection)
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute(f"PRAGMA wal_autocheckpoint = {PAGES_OF_LOG_AT_MOST}")
            for setting in self._settings:
                connection.execute(setting)
            self._migrate(connection)
            self._touch(connection)
        except BaseException:
            connection.close()
            raise
        self._connection, self._identity = connection, _identity(self.path)
        self._changes_before = connection.total_changes
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
                _make_private(self.path, self.what)
        except OSError as error:
            reason = error.strerror or str(error)
            message = f"the {self.what} {self.path} cannot be opened: {reason}"
            raise StoreError(message, next_step=_ELSEWHERE) from error

    def _look_at(self, connection: sqlite3.Connection) -> None:
        """Check the file before anything is changed in it."""
        connection.execute("BEGIN")  # one view of it: another process may be making it just now
        try:
            self._check(connection)
        finally:
            _roll_back(connection)

    def _check(self, connection: sqlite3.Connection) -> None:
        """That the file is what it should be, or empty, and not of a newer llmkit; in a transaction."""
        version, known = _version(connection), len(self._migrations)
        if connection.execute("PRAGMA application_id").fetchone()[0] != self._application_id:
            if version or connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                message = f"the file {self.path} is not a {self.what} of llmkit"
                raise StoreError(message, next_step=self._next_step(sqlite3.SQLITE_NOTADB))
        elif version > known:
            message = (
                f"the {self.what} {self.path} was written by a newer llmkit (schema {version}, known here: {known})"
            )
            raise StoreError(message, next_step="update llmkit, or choose another file ([state] url in llmkit.toml)")

    def _share(self, connection: sqlite3.Connection) -> None:
        """Let readers and a writer work at once, in any number of processes."""
        if connection.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
            message = f"the {self.what} {self.path} is on a drive without shared locks"
            raise StoreError(message, next_step=_ELSEWHERE)

    def _touch(self, connection: sqlite3.Connection) -> None:
        """Make the first write to a new log, since that one waits for the disk. It shows, too, if writing is possible."""
        connection.execute(f"PRAGMA application_id = {self._application_id}")

    def _migrate(self, connection: sqlite3.Connection) -> None:
        """Take the steps that the file has not taken yet, all or none."""
        if _version(connection) == len(self._migrations):
            return
        connection.execute("BEGIN IMMEDIATE")
        try:
            self._check(connection)  # again, now that nobody else can change it
            for step in self._migrations[_version(connection) :]:
                for statement in step:
                    connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {self._application_id}")
            connection.execute(f"PRAGMA user_version = {len(self._migrations)}")
            connection.execute("COMMIT")
        except BaseException:
            _roll_back(connection)
            raise

    def _failure(self, error: sqlite3.Error) -> StoreError:
        if _is_busy(error):
            message = f"the {self.what} {self.path} has been locked by another program for {self._patience_s:g} s"
        else:
            message = f"the {self.what} {self.path} cannot be used: {error}"
        return StoreError(message, next_step=self._next_step(sqlite3.SQLITE_BUSY if _is_busy(error) else _code(error)))

    def _next_step(self, code: int) -> str:
        if code == sqlite3.SQLITE_NOTADB:
            return f"the file is no {self.what}: move it away, or choose another one ([state] url in llmkit.toml)"
        return _NEXT_STEP.get(code, _ELSEWHERE)

    def _let_go(self) -> None:
        """Close the connection, if there is one; the lock is held."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def close(self) -> None:
        """Finish what waits, and let go of files and threads. A later use opens it again."""
        with self._queueing:
            worker, self._worker = self._worker, None
        if worker is not None:
            worker.shutdown()
        with self._lock:
            self._let_go()

    def __del__(self) -> None:
        # Not contextlib: at the interpreter's end a module's names may be gone before its objects.
        try:  # noqa: SIM105
            self._let_go()
        except Exception:  # noqa: BLE001, S110  nobody is left to be told
            pass

    # -- forking -----------------------------------------------------------------------------------------------------

    # SQLite forbids to carry an open database across a fork, even to close it there. So nothing is open meanwhile.

    def _before_fork(self) -> None:
        locks = (self._lock, self._reading, self._checkpointing)
        self._held = [lock for lock in locks if lock.acquire(timeout=FORK_S)]
        if self._lock in self._held:
            self._let_go()

    def _after_fork(self, *, child: bool) -> None:
        if child:
            if self._connection is not None:  # somebody held the lock for all that time
                _CARRIED_OVER.append(self._connection)
            self._start_afresh()
            return
        for lock in self._held:
            lock.release()


_DATABASES: weakref.WeakSet[Database] = weakref.WeakSet()
_CARRIED_OVER: list[sqlite3.Connection] = []
_MAKING = new_lock()
_BEGINNING = new_lock()  # held during a fork, which none may be opened in the midst of


def _each_before_fork() -> None:
    _BEGINNING.acquire(timeout=FORK_S)
    for database in list(_DATABASES):
        database._before_fork()


def _each_after_fork(*, child: bool) -> None:
    for database in list(_DATABASES):
        database._after_fork(child=child)
    if _BEGINNING.locked():
        _BEGINNING.release()


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


def _version(connection: sqlite3.Connection) -> int:
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    return version


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


def _make_private(path: Path, what: str) -> None:
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
            raise StoreError(f"the {what} {path} is {kind}", next_step=_ELSEWHERE) from None
    for each in (path, path.with_name(path.name + "-wal"), path.with_name(path.name + "-shm")):
        with contextlib.suppress(OSError):  # another user's: theirs to decide
            if each.lstat().st_mode & 0o077 and not each.is_symlink():
                each.chmod(0o600)


def _pause() -> None:
    time.sleep(random.uniform(50e-6, 300e-6))  # noqa: S311 - not a secret, only unlike the others' pauses
