"""What a ledger's rows are made of, and what is made of them again.

Pure functions: from calls, attempts and outcomes to the changes that a store takes, and from a store's rows to the
dictionaries and the DataFrame that people get.
"""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING, Any

from llmkit.account import Release, Settle
from llmkit.errors import AllModelsFailed, CallRejected, LLMKitError, SchemaMismatch
from llmkit.models.prices import from_nanos, to_nanos
from llmkit.reply import Usage
from llmkit.state.store import AttemptBegun, AttemptEnded, CallBegun, CallEnded, CallServed

if TYPE_CHECKING:
    import pandas as pd

    from llmkit.account import Hold
    from llmkit.call import Attempt, Call
    from llmkit.endpoint import Endpoint
    from llmkit.models.prices import Cost
    from llmkit.reply import Outcome, Reply

__all__ = [
    "COLUMNS",
    "FREE_SOURCES",
    "Row",
    "attempt_began",
    "attempt_ended",
    "attempt_row",
    "call_began",
    "call_ended",
    "call_row",
    "call_served",
    "frame",
    "hold_ended",
]

Row = dict[str, Any]

MESSAGE_LENGTH = 500
FREE_SOURCES = frozenset({"cache", "coalesced"})
"""Where an answer comes from when nobody was asked for it."""
NOTHING_USED = Usage()

COLUMNS = {
    "request_id": "string",
    "started": "datetime64[us, UTC]",
    "user": "string",
    "tags": "object",
    "model": "string",
    "provider": "string",
    "status": "string",
    "source": "string",
    "input_tokens": "Int64",
    "cached_input_tokens": "Int64",
    "output_tokens": "Int64",
    "reasoning_tokens": "Int64",
    "estimated": "boolean",
    "cost_usd": "float64",
    "latency_s": "float64",
    "time_to_first_token_s": "float64",
    "attempts": "Int64",
    "retries": "Int64",
    "error": "string",
}


def call_began(call: Call, owner: str) -> CallBegun:
    """A call came in; ``owner`` is the process that makes it."""
    return CallBegun(call.request_id, call.started_at, call.user, _tags(call), call.model, owner, call.template)


def attempt_began(call: Call, number: int, endpoint: Endpoint, started_at: float) -> AttemptBegun:
    """Attempt ``number`` is about to be sent (``started_at`` in epoch seconds)."""
    base_url = _without_secrets(endpoint.base_url)
    return AttemptBegun(call.request_id, number, started_at, endpoint.provider, endpoint.model, base_url)


def attempt_ended(request_id: str, attempt: Attempt, cost: Cost | None) -> AttemptEnded:
    """How an attempt ended; ``cost`` is None where its price is unknown."""
    return AttemptEnded(
        attempt.status,
        *_tokens(attempt.usage),
        None if attempt.cost_usd is None else to_nanos(attempt.cost_usd),
        None if cost is None else cost.source,
        None if cost is None else cost.price,
        None if cost is None else cost.price_date,
        attempt.latency_s,
        attempt.time_to_first_token_s,
        attempt.http_status,
        attempt.provider_request_id,
        attempt.finish_reason,
        int(attempt.maybe_billed),
        attempt.error,
        attempt.message[:MESSAGE_LENGTH] if attempt.message else None,
        request_id,
        attempt.number,
    )


def hold_ended(hold: Hold, attempt: Attempt) -> Settle | Release:
    """What becomes of the hold of an attempt that has ended.

    Where it may be billed and nobody reported or could count how much, or where the price is unknown, the worst case
    stays booked as unknown.
    """
    name, usage = (hold.request_id, hold.number), attempt.usage
    if usage is None:
        return Settle(*name, None, None) if attempt.maybe_billed else Release(*name)
    nanos = None if attempt.cost_usd is None else to_nanos(attempt.cost_usd)
    return Settle(*name, nanos, max(0, usage.total_tokens))


def call_ended(call: Call, outcome: Outcome, *, now: float, attempts: int, retries: int) -> CallEnded:
    """How a call ended. ``now`` is on `Clock.now`'s scale; ``attempts`` and ``retries`` are how many there were."""
    error, made = outcome.error, call.trail.attempts
    reply = error.reply if isinstance(error, SchemaMismatch) else outcome.reply
    latency = reply.latency_s if reply is not None else None
    usage = NOTHING_USED if reply is not None and reply.source in FREE_SOURCES and not made else _summed(made)
    return CallEnded(
        "rejected" if _is_rejection(error) else outcome.status,
        reply.model if reply is not None else None,
        reply.provider if reply is not None else made[-1].provider if made else None,
        reply.source if reply is not None else None,
        *_tokens(usage),
        _summed_nanos(made),
        None if call.trail.saved is None else to_nanos(call.trail.saved),
        now - call.started if latency is None else latency,
        reply.time_to_first_token_s if reply is not None else None,
        attempts,
        retries,
        reply.finish_reason if reply is not None else None,
        None if error is None else type(error).__name__,
        error.message[:MESSAGE_LENGTH] if isinstance(error, LLMKitError) else None,
        call.request_id,
    )


def call_served(call: Call, reply: Reply, owner: str) -> CallServed:
    """A call that was answered whole from what was stored or shared, without an attempt."""
    trail = call.trail
    return CallServed(
        call.request_id,
        call.started_at,
        call.user,
        _tags(call),
        call.model,
        owner,
        reply.model,
        reply.provider,
        reply.source,
        None if trail.saved is None else to_nanos(trail.saved),
        reply.latency_s,
        reply.time_to_first_token_s,
        reply.finish_reason,
        call.template,
    )


def call_row(row: Row) -> Row:
    """A row of calls as people get it: ``tags`` a dictionary, USD as Decimals. ``row`` is used up."""
    row["tags"] = json.loads(row["tags"])
    saved = row.pop("saved_nanos")
    row["saved_usd"] = None if saved is None else from_nanos(saved)
    return _with_python_types(row)


def attempt_row(row: Row) -> Row:
    """A row of attempts as people get it; see `call_row`."""
    row["maybe_billed"] = None if row["maybe_billed"] is None else bool(row["maybe_billed"])
    return _with_python_types(row)


def frame(calls: list[Row]) -> pd.DataFrame:
    """Rows of calls (as `call_row` makes them) as a DataFrame of `COLUMNS`."""
    import pandas as pd

    frame = pd.DataFrame.from_records(calls, columns=[*COLUMNS, "response_model"])
    frame["model"] = frame.pop("response_model").where(lambda model: model.notna(), frame["model"])
    frame["cost_usd"] = [float("nan") if cost is None else float(cost) for cost in frame["cost_usd"]]
    micros = (frame["started"].astype("float64") * 1e6).round().astype("int64")
    frame["started"] = pd.to_datetime(micros, unit="us", utc=True).astype("datetime64[us, UTC]")
    return frame.astype({column: kind for column, kind in COLUMNS.items() if column != "started"})


def _is_rejection(error: BaseException | None) -> bool:
    if isinstance(error, AllModelsFailed):
        return all(_is_rejection(each) for each in error.errors)
    return isinstance(error, CallRejected)


def _tokens(usage: Usage | None) -> tuple[int | None, int | None, int | None, int | None, int | None, int | None]:
    """In the order of the columns, from ``input_tokens`` to ``estimated``."""
    if usage is None:
        return (None, None, None, None, None, None)
    return (
        usage.input_tokens,
        usage.cached_input_tokens,
        usage.cache_write_tokens,
        usage.output_tokens,
        usage.reasoning_tokens,
        int(usage.estimated),
    )


def _summed(attempts: list[Attempt]) -> Usage | None:
    """The tokens of all attempts together, as the cost is that of all; None where none is known."""
    known = [attempt.usage for attempt in attempts if attempt.usage is not None]
    if len(known) < 2:
        return known[0] if known else None
    return Usage(
        input_tokens=sum(usage.input_tokens for usage in known),
        output_tokens=sum(usage.output_tokens for usage in known),
        cached_input_tokens=sum(usage.cached_input_tokens for usage in known),
        cache_write_tokens=sum(usage.cache_write_tokens for usage in known),
        reasoning_tokens=sum(usage.reasoning_tokens for usage in known),
        estimated=any(usage.estimated for usage in known),
    )


def _summed_nanos(attempts: list[Attempt]) -> int | None:
    """What the rows of the attempts add up to; None where the price of one is unknown."""
    nanos = 0
    for attempt in attempts:
        if attempt.cost_usd is None:
            return None
        nanos += to_nanos(attempt.cost_usd)
    return nanos


def _tags(call: Call) -> str:
    return json.dumps(dict(call.tags), sort_keys=True, default=str) if call.tags else "{}"


@functools.lru_cache(maxsize=256)
def _without_secrets(base_url: str) -> str:
    """A URL without what may be a key: user, password and query."""
    from urllib.parse import urlsplit, urlunsplit

    try:
        parts = urlsplit(base_url)
    except ValueError:
        return ""
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _with_python_types(row: Row) -> Row:
    nanos = row.pop("cost_nanos")
    row["cost_usd"] = None if nanos is None else from_nanos(nanos)
    row["estimated"] = None if row["estimated"] is None else bool(row["estimated"])
    return row
