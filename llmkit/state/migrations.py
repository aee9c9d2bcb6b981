"""The schema of the SQLite store, as the ordered list of the steps that led to it. Forward only.

A step is never changed once it has been released; a new one is added at the end. The number of steps taken is in
``PRAGMA user_version``.
"""

from __future__ import annotations

__all__ = ["APPLICATION_ID", "MIGRATIONS"]

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

MIGRATIONS: tuple[tuple[str, ...], ...] = (_LEDGER,)
