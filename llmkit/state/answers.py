"""What the cells of notebooks asked and were answered, kept so that it can be shown again.

In a SQLite file of its own beside the ledger's, so that what was said can be deleted without touching the books; or in
memory. The oldest go first. What a record holds is its maker's matter; here it is bytes.
"""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from llmkit.errors import StoreError
from llmkit.state.damage import aside, files, is_damage, move_aside
from llmkit.state.database import Database
from llmkit.state.store import fitting_text, is_in_own_folder, path_beside

if TYPE_CHECKING:
    import sqlite3
    from pathlib import Path

    from llmkit.state.database import Work

__all__ = [
    "APPLICATION_ID",
    "MAX_BYTES",
    "MIGRATIONS",
    "MOST",
    "Answers",
    "MemoryAnswers",
    "Record",
    "SQLiteAnswers",
    "answers_path",
    "open_answers",
]

APPLICATION_ID = 0x6C6C6D61  # "llma"
MOST = 1_000
"""Answers that are kept."""
MAX_BYTES = 64_000_000
"""Of all of them together; one that is larger than that by itself is not kept."""

_ANSWERS = (
    """
    CREATE TABLE answers (
        request_id TEXT PRIMARY KEY NOT NULL,
        size INTEGER NOT NULL,
        record BLOB NOT NULL
    )
    """,
)
MIGRATIONS: tuple[tuple[str, ...], ...] = (_ANSWERS,)

_SETTINGS = ("PRAGMA secure_delete = ON",)  # what is deleted is overwritten
_PUT = "REPLACE INTO answers (request_id, size, record) VALUES (?, ?, ?)"
_TOTALS = "SELECT count(*), coalesce(sum(size), 0) FROM answers"
_NEWEST = "SELECT request_id, record FROM answers ORDER BY rowid DESC LIMIT 1"
_FIND = "SELECT request_id, record FROM answers WHERE substr(request_id, 1, ?) = ? ORDER BY rowid DESC LIMIT ?"
PATIENCE_S = 2.0


class Record(NamedTuple):
    """One answer, as its maker wrote it. Of a file: whatever it is that stands there."""

    request_id: str
    record: bytes


class Answers(Protocol):
    """Where answers are kept. Safe from any thread; waits for files, so not for an event loop's thread."""

    location: str

    def put(self, request_id: str, record: bytes) -> None:
        """Keep it, in place of one of the same id, and drop the oldest beyond what there is room for.

        Raises:
            StoreError: it cannot be written.
        """

    def find(self, beginning: str, limit: int = 10) -> list[Record]:
        """Those whose id begins so, the newest first. Raises `StoreError`."""

    def newest(self) -> Record | None:
        """The last one; None where there is none. Raises `StoreError`."""

    def clear(self) -> int:
        """Remove them all, from the disk as well; how many there were. Raises `StoreError`."""

    def close(self) -> None:
        """Let go of files. A later use opens them again."""


def answers_path(url: str) -> Path | None:
    """The file that belongs to the ledger at ``url``; None where nothing is kept in files."""
    return path_beside(url, "answers")


def open_answers(url: str) -> Answers:
    """The answers that belong to the ledger at ``url``.

    Raises:
        ConfigError: there is no such store.
        StoreError: it cannot be opened.
    """
    path = answers_path(url)
    if path is None:
        return MemoryAnswers()
    return SQLiteAnswers(path, private_folder=is_in_own_folder(url))


class MemoryAnswers:
    """Answers that end with the process."""

    location = "memory"

    def __init__(self, *, most: int = MOST, max_bytes: int = MAX_BYTES) -> None:
        self._most = most
        self._max_bytes = max_bytes
        self._records: dict[str, bytes] = {}  # the oldest first
        self._size = 0
        self._lock = threading.Lock()

    def put(self, request_id: str, record: bytes) -> None:
        with self._lock:
            self._remove(request_id)
            if len(record) > self._max_bytes:
                return
            self._records[request_id] = record
            self._size += len(record)
            while len(self._records) > self._most or self._size > self._max_bytes:
                self._remove(next(iter(self._records)))

    def _remove(self, request_id: str) -> None:
        self._size -= len(self._records.pop(request_id, b""))

    def find(self, beginning: str, limit: int = 10) -> list[Record]:
        with self._lock:
            found = [Record(*item) for item in self._records.items() if item[0].startswith(beginning)]
        return found[::-1][:limit]

    def newest(self) -> Record | None:
        return next(iter(self.find("", 1)), None)

    def clear(self) -> int:
        with self._lock:
            removed = len(self._records)
            self._records.clear()
            self._size = 0
            return removed

    def close(self) -> None:
        """There is nothing to let go of."""


class SQLiteAnswers:
    """Answers in the SQLite file ``path``, shared by every process that opens it.

    Raises:
        StoreError: it cannot be opened.
    """

    def __init__(
        self, path: Path, *, private_folder: bool = False, most: int = MOST, max_bytes: int = MAX_BYTES
    ) -> None:
        self.location = str(path)
        self._path = path
        self._most = most
        self._max_bytes = max_bytes
        self._open = partial(
            Database,
            path,
            migrations=MIGRATIONS,
            application_id=APPLICATION_ID,
            what="answers",
            private_folder=private_folder,
            patience_s=PATIENCE_S,
            settings=_SETTINGS,
        )
        try:
            self._database = self._open()
        except StoreError as error:
            self._mend(error)

    def put(self, request_id: str, record: bytes) -> None:
        if len(record) > self._max_bytes:
            return
        row = (fitting_text(request_id), len(record), record)

        def work(connection: sqlite3.Connection) -> None:
            connection.execute(_PUT, row)
            number, size = connection.execute(_TOTALS).fetchone()
            while number > self._most or size > self._max_bytes:
                rowid, each = connection.execute("SELECT rowid, size FROM answers ORDER BY rowid LIMIT 1").fetchone()
                connection.execute("DELETE FROM answers WHERE rowid = ?", (rowid,))
                number, size = number - 1, size - each

        self._run(work)

    def find(self, beginning: str, limit: int = 10) -> list[Record]:
        beginning = fitting_text(beginning)
        return self._read(_FIND, (len(beginning), beginning, limit))

    def newest(self) -> Record | None:
        return next(iter(self._read(_NEWEST)), None)

    def clear(self) -> int:
        removed: int = self._run(lambda connection: connection.execute("DELETE FROM answers").rowcount)
        self._database.scrub(shrink=True)
        for path in files(aside(self._path)):
            with contextlib.suppress(OSError):
                path.unlink()
        return removed

    def close(self) -> None:
        self._database.close()

    def _read(self, sql: str, given: tuple[Any, ...] = ()) -> list[Record]:
        try:
            rows = self._database.read(sql, given)
        except StoreError as error:
            self._mend(error)
            return []
        return [Record(*row) for row in rows if type(row[0]) is str and type(row[1]) is bytes]

    def _run(self, work: Work[Any]) -> Any:
        try:
            return _done(self._database.run(work))
        except StoreError as error:
            self._mend(error)
            return _done(self._database.run(work))

    def _mend(self, error: StoreError) -> None:
        """Begin a new file where the old one is damaged; raise ``error`` where something else is wrong."""
        if not is_damage(error):
            raise error
        if "_database" in vars(self):
            self._database.close()
        move_aside(self._path, error, "answers")
        self._database = self._open()


def _done(result: Any) -> Any:
    return result.result() if isinstance(result, Future) else result
