"""The schema of the SQLite store, as the ordered list of the steps that led to it. Forward only.

A step is never changed once it has been released; a new one is added at the end. The number of steps taken is in
``PRAGMA user_version``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["APPLICATION_ID", "LAST_ENDPOINT", "MIGRATIONS", "MOST", "counted"]

APPLICATION_ID = 0x6C6C6D6B  # "llmk", so that a database of something else is not taken for a ledger

# WITHOUT ROWID: request ids grow with time, so rows are appended and one page less is written per call.
_LEDGER = (
    """
    CREATE TABLE calls (
        request_id TEXT PRIMARY KEY NOT NULL,
        started REAL NOT NULL,
        user TEXT,
        tags TEXT NOT NULL DEFAULT '{}',
        model TEXT NOT NULL,
        owner TEXT NOT NULL,
        status TEXT NOT NULL DEFAULT 'in_flight',
        response_model TEXT,
        provider TEXT,
        source TEXT,
        input_tokens INTEGER,
        cached_input_tokens INTEGER,
        cache_write_tokens INTEGER,
        output_tokens INTEGER,
        reasoning_tokens INTEGER,
        estimated INTEGER,
        cost_nanos INTEGER,
        latency_s REAL,
        time_to_first_token_s REAL,
        attempts INTEGER,
        retries INTEGER,
        finish_reason TEXT,
        error TEXT,
        message TEXT
    ) WITHOUT ROWID
    """,
    """
    CREATE TABLE attempts (
        request_id TEXT NOT NULL,
        number INTEGER NOT NULL,
        started REAL NOT NULL,
        provider TEXT NOT NULL,
        model TEXT NOT NULL,
        base_url TEXT,
        status TEXT NOT NULL DEFAULT 'in_flight',
        input_tokens INTEGER,
        cached_input_tokens INTEGER,
        cache_write_tokens INTEGER,
        output_tokens INTEGER,
        reasoning_tokens INTEGER,
        estimated INTEGER,
        cost_nanos INTEGER,
        price_source TEXT,
        latency_s REAL,
        time_to_first_token_s REAL,
        http_status INTEGER,
        provider_request_id TEXT,
        finish_reason TEXT,
        maybe_billed INTEGER,
        error TEXT,
        message TEXT,
        PRIMARY KEY (request_id, number)
    ) WITHOUT ROWID
    """,
    "CREATE INDEX calls_started ON calls (started)",
    "CREATE INDEX calls_in_flight ON calls (owner) WHERE status = 'in_flight'",
)

# Sums of what has ended, kept by triggers, so that no writer can forget them and none is wrong when a row ends twice: a
# call that was thought lost. Each adds what the new row makes, and takes away what the old one made.
_TOKENS = ("input_tokens", "cached_input_tokens", "cache_write_tokens", "output_tokens", "reasoning_tokens")


MOST = 10**15
"""Nano-dollars or tokens that one attempt can have cost: a million dollars, or more tokens than there are."""


def counted(value: str) -> str:
    """Unknown counts nothing; what only a broken or hostile server can have sent is cut, so that no sum overflows."""
    return f"CASE WHEN {value} BETWEEN 0 AND {MOST} THEN {value} WHEN {value} > {MOST} THEN {MOST} ELSE 0 END"


LAST_ENDPOINT = """
    SELECT provider || ':' || model FROM attempts WHERE attempts.request_id = calls.request_id ORDER BY number DESC LIMIT 1
"""


def _of_attempt(row: str) -> dict[str, str]:
    """What an attempt adds to the sums, by column."""
    return {
        "model": f"{row}.provider || ':' || {row}.model",
        "attempts": "1",
        **{column: counted(f"{row}.{column}") for column in _TOKENS},
        "cost_nanos": counted(f"{row}.cost_nanos"),
        "unpriced": f"{row}.cost_nanos IS NULL",
        "maybe_billed": f"coalesce({row}.maybe_billed, 0) <> 0",
    }


def _of_call(row: str, endpoint: str | None = None) -> dict[str, str]:
    """What a call adds to the sums of the ``endpoint`` that it came to last; of the model that answered without one."""
    return {
        "model": f"coalesce({endpoint or f'{row}.endpoint'}, {row}.provider || ':' || {row}.response_model, {row}.model)",
        "calls": "1",
        "saved_nanos": counted(f"{row}.saved_nanos"),
    }


def _added(values: dict[str, str], source: str, sign: str = "+", call: str = "calls") -> tuple[str, str]:
    """Statements that add ``values`` to the sums of the time, user and tags of ``call``, for each row of ``source``."""
    sums = [name for name in values if name != "model"]
    added = ", ".join(f"{sign} ({values[name]})" for name in sums)
    changed = ", ".join(f"{name} = {name} + excluded.{name}" for name in sums)
    return (
        f"""
        INSERT INTO spend (quarter, user, tags, model, {", ".join(sums)})
        SELECT CAST({call}.started / 900 AS INTEGER), coalesce({call}.user, ''), {call}.tags, {values["model"]}, {added}
        {source}
        ON CONFLICT (quarter, model, user, tags) DO UPDATE SET {changed}
        """,
        f"""
        INSERT INTO spend_hours (hour, {", ".join(sums)})
        SELECT CAST({call}.started / 3600 AS INTEGER), {added} {source}
        ON CONFLICT (hour) DO UPDATE SET {changed}
        """,
    )


def _kept(table: str, of: Callable[[str], dict[str, str]]) -> tuple[str, ...]:
    if table == "calls":  # its row is at hand
        add = "; ".join(_added(of("NEW"), "WHERE true", call="NEW"))
        take = "; ".join(_added(of("OLD"), "WHERE true", "-", call="OLD"))
    else:
        source = "FROM calls WHERE calls.request_id = {}.request_id"
        add = "; ".join(_added(of("NEW"), source.format("NEW")))
        take = "; ".join(_added(of("OLD"), source.format("OLD"), "-"))
    return (
        f"CREATE TRIGGER {table}_ended AFTER UPDATE ON {table} WHEN NEW.status <> 'in_flight' BEGIN {add}; END",
        f"CREATE TRIGGER {table}_changed AFTER UPDATE ON {table} WHEN OLD.status <> 'in_flight' BEGIN {take}; END",
        f"CREATE TRIGGER {table}_added AFTER INSERT ON {table} WHEN NEW.status <> 'in_flight' BEGIN {add}; END",
    )


_SUMS = """
        calls INTEGER NOT NULL DEFAULT 0,
        attempts INTEGER NOT NULL DEFAULT 0,
        input_tokens INTEGER NOT NULL DEFAULT 0,
        cached_input_tokens INTEGER NOT NULL DEFAULT 0,
        cache_write_tokens INTEGER NOT NULL DEFAULT 0,
        output_tokens INTEGER NOT NULL DEFAULT 0,
        reasoning_tokens INTEGER NOT NULL DEFAULT 0,
        cost_nanos INTEGER NOT NULL DEFAULT 0,
        saved_nanos INTEGER NOT NULL DEFAULT 0,
        unpriced INTEGER NOT NULL DEFAULT 0,
        maybe_billed INTEGER NOT NULL DEFAULT 0
"""

# Of a million calls by many users each may be a row of `spend`, while the hours stay few: a year's days are found in
# them within 50 ms.
_SPEND = (
    "ALTER TABLE calls ADD COLUMN saved_nanos INTEGER",
    "ALTER TABLE calls ADD COLUMN endpoint TEXT",
    "ALTER TABLE attempts ADD COLUMN price TEXT",
    "ALTER TABLE attempts ADD COLUMN price_date TEXT",
    f"""
    CREATE TABLE spend (
        quarter INTEGER NOT NULL,
        model TEXT NOT NULL,
        user TEXT NOT NULL,
        tags TEXT NOT NULL,
        {_SUMS},
        PRIMARY KEY (quarter, model, user, tags)
    ) WITHOUT ROWID
    """,
    f"CREATE TABLE spend_hours (hour INTEGER PRIMARY KEY NOT NULL, {_SUMS})",
    *_added(
        _of_attempt("attempts"), "FROM attempts JOIN calls USING (request_id) WHERE attempts.status <> 'in_flight'"
    ),
    *_added(_of_call("calls", f"({LAST_ENDPOINT})"), "FROM calls WHERE calls.status <> 'in_flight'"),
    *_kept("attempts", _of_attempt),
    *_kept("calls", _of_call),
)

# `state` of a hold is `held`; or how it was ended while nobody knew its end: `unknown`, with what then counts as
# settled, or `released`. Such a row stays, so that the owner can correct it.
_ACCOUNTS = (
    """
    CREATE TABLE accounts (
        key TEXT PRIMARY KEY NOT NULL,
        settled_nanos INTEGER NOT NULL,
        held_nanos INTEGER NOT NULL,
        unknown_nanos INTEGER NOT NULL,
        settled_tokens INTEGER NOT NULL,
        held_tokens INTEGER NOT NULL,
        unknown_tokens INTEGER NOT NULL,
        resets_at REAL
    ) WITHOUT ROWID
    """,
    """
    CREATE TABLE holds (
        request_id TEXT NOT NULL,
        number INTEGER NOT NULL,
        accounts TEXT NOT NULL,
        nanos INTEGER NOT NULL,
        tokens INTEGER NOT NULL,
        owner TEXT NOT NULL,
        expires REAL NOT NULL,
        slot INTEGER,
        state TEXT NOT NULL DEFAULT 'held',
        PRIMARY KEY (request_id, number)
    ) WITHOUT ROWID
    """,
)

_CIRCUITS = (
    """
    CREATE TABLE circuits (
        endpoint TEXT PRIMARY KEY NOT NULL,
        state TEXT NOT NULL,
        version INTEGER NOT NULL,
        reopens_at REAL NOT NULL,
        failures_in_row INTEGER NOT NULL,
        successes INTEGER NOT NULL,
        last_failure TEXT
    ) WITHOUT ROWID
    """,
    "CREATE TABLE probes (endpoint TEXT NOT NULL, owner TEXT NOT NULL, until REAL NOT NULL)",
)

# The answers to a template, newest first: a plan expects what they came to. An index costs a call as much as a fifth of
# all that is written for it, so only whole answers that were asked for, to prompts whose template was named, are in it.
_TEMPLATES = (
    "ALTER TABLE calls ADD COLUMN template TEXT",
    """
    CREATE INDEX calls_of_template ON calls (template, endpoint, started)
    WHERE template IS NOT NULL AND status = 'complete' AND attempts > 0
    """,
)

MIGRATIONS: tuple[tuple[str, ...], ...] = (_LEDGER, (*_SPEND, *_ACCOUNTS, *_CIRCUITS), _TEMPLATES)
