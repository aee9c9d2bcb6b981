"""The store in a SQLite file, shared by threads, kernels and whatever else opens it.

A hold is one statement for all its accounts and one for itself, however large the ledger is: what an account has
counted stands in its row. Sums of spending are kept by triggers (`llmkit.state.migrations`).
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import sqlite3
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from llmkit.account import Balance, Hold, Release, Sent, Settle
from llmkit.errors import StoreError
from llmkit.state.accounts import KEPT_S, OwnHolds, abandon, balance_of, end, hold, purge, select, sent
from llmkit.state.database import PATIENCE_S, Database
from llmkit.state.holds import HELD
from llmkit.state.migrations import APPLICATION_ID, LAST_ENDPOINT, MIGRATIONS
from llmkit.state.store import (
    ATTEMPT_COLUMNS,
    CALL_COLUMNS,
    LOST_MESSAGE,
    MOST_SUMS,
    NEWEST_CALLS,
    SERVED,
    SPEND_KEYS,
    SPEND_SUMS,
    AttemptBegun,
    AttemptEnded,
    CallBegun,
    CallEnded,
    CallServed,
    DuplicateCall,
    fitting,
    fitting_account,
    fitting_text,
)
from llmkit.state.sums import summing

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future
    from pathlib import Path

    from llmkit.account import Account
    from llmkit.state.store import Change, IsGone, WasSent

__all__ = ["SQLiteStore"]

Row = dict[str, Any]

MANY = 32  # calls from the cache that are not written on the caller's thread: 10 µs each, and nobody waits for them
MOST_AT_ONCE = 256  # of them in one statement
KEYS_AT_ONCE = 100  # SQLite joins at most 500 queries in one


def _insert(table: str, change: type[Any]) -> str:
    columns = change._fields
    return f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"  # noqa: S608 - all names are our own


@functools.cache
def _serving(count: int) -> str:
    """So many `CallServed` in one statement."""
    known = "".join(f", {value!r}" for value in SERVED.values())
    row = f"({', '.join('?' * len(CallServed._fields))}{known})"
    return f"INSERT INTO calls ({', '.join((*CallServed._fields, *SERVED))}) VALUES {', '.join([row] * count)}"  # noqa: S608


def _update(table: str, change: type[Any], keys: int, *more: str) -> str:
    values, where = change._fields[:-keys], " AND ".join(f"{c} = ?" for c in change._fields[-keys:])
    return f"UPDATE {table} SET {', '.join((*(f'{c} = ?' for c in values), *more))} WHERE {where}"  # noqa: S608


_SQL: dict[type[Change], str] = {
    CallBegun: _insert("calls", CallBegun),
    AttemptBegun: _insert("attempts", AttemptBegun),
    AttemptEnded: _update("attempts", AttemptEnded, 2),
    CallServed: _serving(1),
    CallEnded: _update("calls", CallEnded, 1, f"endpoint = ({LAST_ENDPOINT})"),
}
_ACCOUNTING: dict[type[Change], Callable[[sqlite3.Connection, Any, OwnHolds], None]] = {
    Hold: hold,
    Sent: sent,
    Settle: end,
    Release: end,
}
_SELECT_CALLS = f"SELECT {', '.join(CALL_COLUMNS)} FROM calls"  # noqa: S608
_SELECT_ATTEMPTS = f"SELECT {', '.join(ATTEMPT_COLUMNS)} FROM attempts"  # noqa: S608
_LOSE_ATTEMPTS = """
    UPDATE attempts SET status = 'lost', maybe_billed = 1 WHERE status = 'in_flight'
    AND request_id IN (SELECT request_id FROM calls WHERE status = 'in_flight' AND owner = ?)
"""
_LOSE_CALLS = f"""
    UPDATE calls SET status = 'lost', message = ?, endpoint = ({LAST_ENDPOINT}),
        attempts = (SELECT count(*) FROM attempts WHERE attempts.request_id = calls.request_id),
        cost_nanos = (SELECT CASE WHEN count(*) = count(cost_nanos) THEN coalesce(sum(cost_nanos), 0) END
                      FROM attempts WHERE attempts.request_id = calls.request_id)
    WHERE status = 'in_flight' AND owner = ?
"""  # noqa: S608
_OUTPUTS = (
    "SELECT started, output_tokens FROM {} WHERE status = 'complete' AND attempts > 0 AND output_tokens IS NOT NULL "
    "AND source IS NOT 'degraded' AND endpoint = ? {} ORDER BY started DESC LIMIT ?"
)
# In the words of the index's own conditions, so that SQLite takes it.
_OF_TEMPLATE = _OUTPUTS.format("calls", "AND template IS NOT NULL AND template = ?")
_OF_ENDPOINT = _OUTPUTS.format(f"(SELECT * FROM calls ORDER BY started DESC LIMIT {NEWEST_CALLS})", "")  # noqa: S608
_HOLDING = f"SELECT owner, min(expires) FROM holds WHERE state = '{HELD}' GROUP BY owner"  # noqa: S608
_STALE = "SELECT 1 FROM accounts WHERE resets_at < ? AND held_nanos = 0 AND held_tokens = 0 LIMIT 1"


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
        self._own_holds: OwnHolds = {}
        self.database = Database(
            path,
            migrations=MIGRATIONS,
            application_id=APPLICATION_ID,
            private_folder=private_folder,
            patience_s=patience_s,
        )

    # -- writing -----------------------------------------------------------------------------------------------------

    def commit(self, changes: Sequence[Change]) -> Future[None] | None:
        if len(changes) >= MANY and all(type(change) is CallServed for change in changes):
            return self.database.run_aside(partial(self._serve_all, changes), partial(self._apply_fitted, changes))
        return self.database.run(partial(self._apply, changes), partial(self._apply_fitted, changes))

    def _apply_fitted(self, changes: Sequence[Change], connection: sqlite3.Connection) -> None:
        self._apply([fitting(change) for change in changes], connection)

    def _apply(self, changes: Sequence[Change], connection: sqlite3.Connection) -> None:
        execute = connection.execute
        try:
            for change in changes:
                sql = _SQL.get(type(change))
                if sql is None:
                    _ACCOUNTING[type(change)](connection, change, self._own_holds)
                else:
                    execute(sql, tuple(change))  # a plain tuple is bound without a call for each value
        except sqlite3.IntegrityError as error:
            self._refuse(error)
        except TypeError as error:  # a balance that is no number
            message = f"the ledger {self.path} has been changed by something else: {error}"
            raise StoreError(message, next_step="move the file away, and a new one is made") from error

    def _serve_all(self, changes: Sequence[Change], connection: sqlite3.Connection) -> None:
        """Many at once, in few statements: SQLite runs each without the GIL."""
        width = len(CallServed._fields)
        most = connection.getlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER) // width
        try:
            done = 0
            while done < len(changes):
                count = 1 << min(MOST_AT_ONCE, most, len(changes) - done).bit_length() - 1  # few statements to prepare
                part = changes[done : done + count]
                connection.execute(_serving(count), list(itertools.chain.from_iterable(part)))
                done += count
        except sqlite3.IntegrityError as error:
            self._refuse(error)

    def _refuse(self, error: sqlite3.IntegrityError) -> NoReturn:
        if error.sqlite_errorcode != sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY:
            raise error
        raise DuplicateCall(f"the ledger {self.path} has a call of this request_id already") from error

    # -- reading -----------------------------------------------------------------------------------------------------

    def calls(self, *, limit: int | None = None, since: float | None = None, beginning: str | None = None) -> list[Row]:
        terms: list[str] = []
        given: list[Any] = []
        if since is not None:
            terms, given = ["started >= ?"], [since]
        if beginning is not None:  # a range of the key: a ledger may hold millions
            begin = fitting_text(beginning)
            terms, given = [*terms, "request_id >= ? AND request_id < ?"], [*given, begin, begin + chr(0x10FFFF)]
        where = f" WHERE {' AND '.join(terms)}" if terms else ""
        order = " ORDER BY started DESC, request_id DESC LIMIT ?"
        rows = self.database.read(_SELECT_CALLS + where + order, [*given, -1 if limit is None else limit])
        return [dict(zip(CALL_COLUMNS, row, strict=True)) for row in reversed(rows)]

    def attempts(self, request_id: str) -> list[Row]:
        sql = f"{_SELECT_ATTEMPTS} WHERE request_id = ? ORDER BY number"
        return [
            dict(zip(ATTEMPT_COLUMNS, row, strict=True)) for row in self.database.read(sql, [fitting_text(request_id)])
        ]

    def outputs(self, endpoint: str, template: str | None, limit: int) -> list[tuple[float, int]]:
        if template is None:
            return self.database.read(_OF_ENDPOINT, [fitting_text(endpoint), limit])
        return self.database.read(_OF_TEMPLATE, [fitting_text(endpoint), fitting_text(template), limit])

    def page(self, after: tuple[float, str] | None, limit: int) -> list[tuple[Row, list[Row]]]:
        begin = (-math.inf, "") if after is None else (after[0], fitting_text(after[1]))
        order = " WHERE (started, request_id) > (?, ?) ORDER BY started, request_id LIMIT ?"
        calls = [
            dict(zip(CALL_COLUMNS, row, strict=True))
            for row in self.database.read(_SELECT_CALLS + order, [*begin, limit])
        ]
        made: dict[str, list[Row]] = {call["request_id"]: [] for call in calls}
        among = " WHERE request_id IN (SELECT value FROM json_each(?)) ORDER BY request_id, number"
        for row in self.database.read(_SELECT_ATTEMPTS + among, [json.dumps(list(made))]):
            made[row[0]].append(dict(zip(ATTEMPT_COLUMNS, row, strict=True)))
        return [(call, made[call["request_id"]]) for call in calls]

    def owners(self) -> dict[str, float]:
        sql = "SELECT owner, max(started) FROM calls WHERE status = 'in_flight' GROUP BY owner"
        return dict(self.database.read(sql))

    def balances(self, accounts: Sequence[Account]) -> list[Balance]:
        keys = [fitting_text(account.key) for account in accounts]
        parts = [keys[first : first + KEYS_AT_ONCE] for first in range(0, len(keys), KEYS_AT_ONCE)]
        rows = [row for part in parts for row in self.database.glance(select(len(part)), part)]
        known = {row[0]: Balance._make(row) for row in rows}
        return [
            known[key] if key in known else balance_of(self.database.read, fitting_account(account))
            for key, account in zip(keys, accounts, strict=True)
        ]

    def spend(
        self,
        *,
        by: Sequence[str] = SPEND_KEYS,
        sums: Sequence[str] = SPEND_SUMS,
        windows: Sequence[float] | None = None,
        since: float | None = None,
        until: float | None = None,
    ) -> list[tuple[Any, ...]]:
        sql = f"{summing(by, sums, windows, since, until)} LIMIT {MOST_SUMS + 1}"
        rows = self.database.read(sql)
        if len(rows) > MOST_SUMS:
            message = f"the ledger {self.path} has more than {MOST_SUMS:,} sums for that"
            raise StoreError(message, next_step="ask for a shorter time, or for sums by less")
        return rows

    # -- endings -----------------------------------------------------------------------------------------------------

    def mark_lost(self, owner: str, was_sent: WasSent | None = None) -> int:
        return self.database.run_patiently(lambda connection: _lose(connection, owner, was_sent)[0])

    def reap(self, now: float, *, is_gone: IsGone, was_sent: WasSent) -> int:
        gone, late = [], []
        for owner, first_expires in self.database.glance(_HOLDING):
            verdict = is_gone(owner)  # asked before the file is locked: it may take its time
            if verdict:
                gone.append(owner)
            elif verdict is None and first_expires < now:
                late.append(owner)
        if not gone and not late and not self.database.glance(_STALE, [now - KEPT_S]):
            return 0

        def work(connection: sqlite3.Connection) -> int:
            ended = sum(_lose(connection, owner, was_sent)[1] for owner in gone)
            ended += sum(abandon(connection, owner, now, was_sent) for owner in late)
            purge(connection, now)
            return ended

        return self.database.run_patiently(work)

    def close(self) -> None:
        self.database.close()


def _lose(connection: sqlite3.Connection, owner: str, was_sent: WasSent | None) -> tuple[int, int]:
    """End all that ``owner`` has begun. Returns how many calls were lost, and how many holds ended."""
    holds = abandon(connection, owner, math.inf, was_sent)
    connection.execute(_LOSE_ATTEMPTS, [owner])
    return connection.execute(_LOSE_CALLS, [LOST_MESSAGE, owner]).rowcount, holds
