"""The store in a SQLite file, shared by threads, kernels and whatever else opens it."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING, Any

from llmkit.state.database import PATIENCE_S, Database
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
    from collections.abc import Sequence
    from concurrent.futures import Future
    from pathlib import Path

    from llmkit.state.store import Change

__all__ = ["SQLiteStore"]

Row = dict[str, Any]


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
        self.database = Database(
            path,
            migrations=MIGRATIONS,
            application_id=APPLICATION_ID,
            private_folder=private_folder,
            patience_s=patience_s,
        )

    # -- writing -----------------------------------------------------------------------------------------------------

    def commit(self, changes: Sequence[Change]) -> Future[None] | None:
        return self.database.run(
            lambda connection: self._apply(connection, changes),
            lambda connection: self._apply(connection, [fitting(change) for change in changes]),
        )

    def _apply(self, connection: sqlite3.Connection, changes: Sequence[Change]) -> None:
        execute = connection.execute
        try:
            for change in changes:
                execute(_SQL[type(change)], tuple(change))  # a plain tuple is bound without a call for each value
        except sqlite3.IntegrityError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY:
                raise
            raise DuplicateCall(f"the ledger {self.path} has a call of this request_id already") from error

    # -- reading -----------------------------------------------------------------------------------------------------

    def calls(self, *, limit: int | None = None, since: float | None = None) -> list[Row]:
        where, given = ("", []) if since is None else (" WHERE started >= ?", [since])
        order = " ORDER BY started DESC, request_id DESC LIMIT ?"
        rows = self.database.read(_SELECT_CALLS + where + order, [*given, -1 if limit is None else limit])
        return [dict(zip(CALL_COLUMNS, row, strict=True)) for row in reversed(rows)]

    def attempts(self, request_id: str) -> list[Row]:
        sql = f"{_SELECT_ATTEMPTS} WHERE request_id = ? ORDER BY number"
        return [
            dict(zip(ATTEMPT_COLUMNS, row, strict=True)) for row in self.database.read(sql, [fitting_text(request_id)])
        ]

    def owners(self) -> dict[str, float]:
        sql = "SELECT owner, max(started) FROM calls WHERE status = 'in_flight' GROUP BY owner"
        return dict(self.database.read(sql))

    # -- endings -----------------------------------------------------------------------------------------------------

    def mark_lost(self, owner: str) -> int:
        return self.database.run_patiently(lambda connection: _lose(connection, owner))

    def close(self) -> None:
        self.database.close()


def _lose(connection: sqlite3.Connection, owner: str) -> int:
    connection.execute(_LOSE_ATTEMPTS, [owner])
    return connection.execute(_LOSE_CALLS, [LOST_MESSAGE, owner]).rowcount
