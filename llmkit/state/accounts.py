"""Accounts and holds in SQLite: what a transaction does to them.

An account is one row, which is opened at its first use with what the ledger has for it. A hold looks at all its accounts
with one statement, and writes their rows and its own. (RETURNING would cost more than looking first.)
"""

from __future__ import annotations

import functools
import json
import math
from typing import TYPE_CHECKING, Any

from llmkit.account import Balance, Settle
from llmkit.state.holds import (
    HELD,
    NOTHING,
    RELEASED,
    Amounts,
    Held,
    abandoned,
    added,
    amount,
    check,
    counted,
    ended,
    is_whole,
    tag_of,
)
from llmkit.state.migrations import counted as counted_in_sql
from llmkit.state.sums import quarter_of, summing

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Iterable, Sequence

    from llmkit.account import Account, Hold, Release, Sent
    from llmkit.state.store import WasSent

    Query = Callable[[str, Sequence[Any]], Iterable[Any]]

__all__ = ["KEPT_S", "OwnHolds", "abandon", "balance_of", "end", "hold", "purge", "select", "sent"]

OwnHolds = dict[tuple[str, int], tuple[tuple[str, ...], str, int, int]]
"""What this process has put into holds and not ended: their accounts, the same as text, nano-dollars and tokens."""

MOST_OWN = 10_000
KEPT_S = 60 * 86_400.0  # how long an account is kept after its window

_AMOUNTS = Balance._fields[1:]
_HOLD = ", ".join(Held._fields)
_INSERT_HOLD = f"INSERT INTO holds ({_HOLD}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"  # noqa: S608 - all names are our own
_DELETE_OWN = f"DELETE FROM holds WHERE request_id = ? AND number = ? AND accounts = ? AND state = '{HELD}'"  # noqa: S608
_FIND_HOLD = f"SELECT {_HOLD} FROM holds WHERE request_id = ? AND number = ?"  # noqa: S608
_SENT = "UPDATE holds SET slot = NULL WHERE request_id = ? AND number = ?"
_OPEN = f"INSERT INTO accounts (key, {', '.join(_AMOUNTS)}, resets_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"  # noqa: S608
_MOVE = f"UPDATE accounts SET {', '.join(f'{name} = {name} + ?' for name in _AMOUNTS)} WHERE key = ?"  # noqa: S608
_TAKE = "UPDATE accounts SET held_nanos = held_nanos + ?, held_tokens = held_tokens + ? WHERE key = ?"
_BALANCE = ", ".join(Balance._fields)
_ABANDONED = f"SELECT {_HOLD} FROM holds WHERE owner = ? AND state = '{HELD}' AND expires < ?"  # noqa: S608
_NEVER_SENT = """
    UPDATE attempts SET status = 'lost', maybe_billed = 0, cost_nanos = 0
    WHERE request_id = ? AND number = ? AND status = 'in_flight'
"""
# An attempt that is in the sums of the ledger already is not counted by its hold as well.
_COUNTING = f"""
    SELECT {", ".join(f"holds.{name}" for name in Held._fields)}
    FROM holds CROSS JOIN calls USING (request_id) CROSS JOIN attempts USING (request_id, number)
    WHERE (holds.state = '{HELD}' AND attempts.status = 'in_flight'
        OR holds.state NOT IN ('{HELD}', '{RELEASED}') AND attempts.cost_nanos IS NULL AND attempts.input_tokens IS NULL)
"""  # noqa: S608


@functools.cache
def select(count: int) -> str:
    """The query for the balances of so many keys; for a few this is twice as fast as IN, or as statements of their own."""
    one = f"SELECT {_BALANCE} FROM accounts WHERE key = ?"  # noqa: S608 - all names are our own
    return " UNION ALL ".join([one] * count)


# -- holding ---------------------------------------------------------------------------------------------------------


def hold(connection: sqlite3.Connection, change: Hold, own: OwnHolds) -> None:
    """Take the hold, and fill its balances.

    Raises:
        HoldRefused: it does not fit; the transaction is to be undone.
    """
    keys, text = _keys_of(change.accounts)
    if not keys:
        change.balances.clear()
        return
    nanos, tokens = amount(change.nanos), amount(change.tokens)
    rows = connection.execute(select(len(keys)), keys).fetchall()
    if len(rows) < len(keys):
        known = {row[0] for row in rows}
        for account in {account.key: account for account in change.accounts if account.key not in known}.values():
            _open(connection, account)
        rows = connection.execute(select(len(keys)), keys).fetchall()
    balances = [
        Balance(key, settled, held + nanos, unknown, settled_tokens, held_tokens + tokens, unknown_tokens)
        for key, settled, held, unknown, settled_tokens, held_tokens, unknown_tokens in rows  # in the order of the keys
    ]
    if len(keys) < len(change.accounts):  # one is named twice
        balances = [balances[keys.index(account.key)] for account in change.accounts]
    check(change, balances)
    connection.executemany(_TAKE, [(nanos, tokens, key) for key in keys])
    row = (change.request_id, change.number, text, nanos, tokens, change.owner, change.expires, change.slot, HELD)
    connection.execute(_INSERT_HOLD, row)
    if len(own) >= MOST_OWN:
        own.clear()
    own[change.request_id, change.number] = (keys, text, nanos, tokens)
    change.balances[:] = balances


def sent(connection: sqlite3.Connection, change: Sent, _: OwnHolds) -> None:
    """Note it with the hold, where nobody can look at the owner's board."""
    connection.execute(_SENT, change)


# -- ending ----------------------------------------------------------------------------------------------------------


def end(connection: sqlite3.Connection, ending: Settle | Release, own: OwnHolds) -> None:
    """Settle or release the hold, if there is one that is still held or that may be corrected."""
    where = (ending.request_id, ending.number)
    mine = own.pop(where, None)
    if mine is not None and isinstance(ending, Settle) and ending.nanos is not None and ending.tokens is not None:
        keys, text, nanos, tokens = mine
        if connection.execute(_DELETE_OWN, (*where, text)).rowcount == 1:  # as it was made, so it need not be read
            _move(connection, keys, (amount(ending.nanos), -nanos, 0, amount(ending.tokens), -tokens, 0))
            return
    for row in connection.execute(_FIND_HOLD, where).fetchall():
        held = _held(row)
        change, kept = ended(held, ending)
        _move(connection, held.accounts, change)
        connection.execute("DELETE FROM holds WHERE request_id = ? AND number = ?", where)
        if kept is not None:
            connection.execute(_INSERT_HOLD, kept._replace(accounts=row[2]))


def abandon(connection: sqlite3.Connection, owner: str, expired: float, was_sent: WasSent | None) -> int:
    """End the holds of ``owner`` whose lease was over at ``expired``; all of them, if that is infinite. Returns how many.

    The attempts of those that were never sent are lost, and cost nothing, where all are ended.
    """
    abandoned_holds = [_held(row) for row in connection.execute(_ABANDONED, (owner, expired)).fetchall()]
    for held in abandoned_holds:
        went_out = held.slot is None or was_sent is None or was_sent(owner, held.slot)
        change, kept = abandoned(held, sent=went_out)
        _move(connection, held.accounts, change)
        key = (held.request_id, held.number)
        connection.execute("UPDATE holds SET state = ? WHERE request_id = ? AND number = ?", (kept.state, *key))
        if not went_out and expired == math.inf:
            connection.execute(_NEVER_SENT, key)
    return len(abandoned_holds)


def _move(connection: sqlite3.Connection, keys: tuple[str, ...], change: Amounts) -> None:
    if change != NOTHING:
        connection.executemany(_MOVE, [(*change, key) for key in keys])


def purge(connection: sqlite3.Connection, now: float) -> None:
    """Remove accounts whose windows ended long ago, and what was kept of holds that were released.

    Used again, an account is opened anew with all that it had: holds that ended as unknown stay on record for that.
    """
    connection.execute(f"DELETE FROM holds WHERE state = '{RELEASED}' AND expires < ?", (now - KEPT_S,))  # noqa: S608
    connection.execute(
        "DELETE FROM accounts WHERE resets_at < ? AND held_nanos = 0 AND held_tokens = 0",
        (now - KEPT_S,),
    )


# -- opening ---------------------------------------------------------------------------------------------------------


def balance_of(query: Query, account: Account) -> Balance:
    """What an account that nobody has used yet begins with."""
    amounts = _in_ledger(query, account)
    for held in _counting(query, account):
        amounts = added(amounts, counted(held))
    return Balance(account.key, *amounts)


def _open(connection: sqlite3.Connection, account: Account) -> None:
    amounts = _in_ledger(connection.execute, account)
    for held in _counting(connection.execute, account):
        amounts = added(amounts, counted(held))
        if account.key not in held.accounts:  # from now on it counts here, too
            text = json.dumps([*held.accounts, account.key])
            where = (text, held.request_id, held.number)
            connection.execute("UPDATE holds SET accounts = ? WHERE request_id = ? AND number = ?", where)
    connection.execute(_OPEN, (account.key, *amounts, account.resets_at))


def _in_ledger(query: Query, account: Account) -> Amounts:
    """What the ended attempts cost that count towards the account."""
    if not is_whole(account):
        costs = f"sum({counted_in_sql('attempts.cost_nanos')})"
        tokens = f"sum({counted_in_sql('attempts.input_tokens')} + {counted_in_sql('attempts.output_tokens')})"
        where, given = _where(account, "calls.", "attempts.provider || ':' || attempts.model", "calls.started")
        sql = f"SELECT {costs}, {tokens} FROM calls JOIN attempts USING (request_id) WHERE attempts.status <> 'in_flight' "  # noqa: S608
        rows = list(query(sql + where, (*given,)))
    elif account.user is None and account.tag is None and account.model is None:
        sums = ("cost_nanos", "input_tokens", "output_tokens")
        rows = [(cost, i + o) for cost, i, o in query(summing((), sums, None, account.since, account.resets_at), ())]
    else:
        until = quarter_of(account.resets_at, 2**40)
        where, given = _where(account, "", "model", None)
        sql = "SELECT sum(cost_nanos), sum(input_tokens + output_tokens) FROM spend WHERE quarter >= ? AND quarter < ? "
        rows = list(query(sql + where, (quarter_of(account.since, 0), until, *given)))
    nanos, tokens_in_all = rows[0] if rows else (0, 0)
    return (nanos or 0, 0, 0, tokens_in_all or 0, 0, 0)


def _counting(query: Query, account: Account) -> list[Held]:
    """The holds of attempts that count towards the account and are not in the ledger's sums yet."""
    where, given = _where(account, "calls.", "attempts.provider || ':' || attempts.model", "calls.started")
    return [_held(row) for row in query(_COUNTING + where, (*given,))]


def _where(account: Account, of: str, model: str, started: str | None) -> tuple[str, list[Any]]:
    """The conditions that a call, and its attempt, counts towards the account, and their values."""
    conditions: list[tuple[str, tuple[Any, ...]]] = []
    if started is not None:
        conditions.append((f"{started} >= ?", (account.since,)))
        if account.resets_at is not None:
            conditions.append((f"{started} < ?", (account.resets_at,)))
    if account.user is not None:
        conditions.append((f"{of}user = ?", (account.user,)))
    if account.model is not None:
        conditions.append((f"{model} = ?", (account.model,)))
    if account.session is not None:
        conditions.append((f"{of}owner = ?", (account.session,)))
    if account.tag is not None:
        name, value = tag_of(account)
        each = f"SELECT 1 FROM json_each(CASE WHEN json_valid({of}tags) THEN {of}tags ELSE '{{}}' END) WHERE key = ?"  # noqa: S608
        if value:
            conditions.append((f"EXISTS ({each} AND value = ?)", (name, value)))
        else:
            conditions.append((f"NOT EXISTS ({each} AND value <> '')", (name,)))
    return "".join(f" AND {sql}" for sql, _ in conditions), [value for _, values in conditions for value in values]


# -- rows ------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)  # the accounts of one day are the same for call after call
def _keys_of(accounts: tuple[Account, ...]) -> tuple[tuple[str, ...], str]:
    keys = tuple(dict.fromkeys(account.key for account in accounts))
    return keys, json.dumps(keys)


@functools.lru_cache(maxsize=256)
def _keys_in(text: str) -> tuple[str, ...]:
    try:
        keys = json.loads(text)
    except ValueError:
        return ()
    return tuple(key for key in keys if isinstance(key, str)) if isinstance(keys, list) else ()


def _held(row: Sequence[Any]) -> Held:
    request_id, number, text, nanos, tokens, owner, expires, slot, state = row
    return Held(request_id, number, _keys_in(text), nanos, tokens, owner, expires, slot, state)
