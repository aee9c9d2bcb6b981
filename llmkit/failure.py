"""The failure of a call as others hear of it who followed it: in this process a copy, in another one what was written.

What comes from another process is not trusted: its kind, its texts and its numbers are checked, and its size is bounded.
"""

from __future__ import annotations

import copy
import json
from typing import Any

from llmkit import errors
from llmkit.errors import AllModelsFailed, CircuitOpen, LLMKitError, ProviderError, StreamBroken
from llmkit.redaction import tidy

__all__ = ["copied", "is_shared", "read_back", "written_out"]

MOST_ERRORS = 32  # of an AllModelsFailed that comes from another process


def is_shared(error: LLMKitError) -> bool:
    """Whether asking again would fail in the same way. What was the leader's own, its deadline or its cap, would not."""
    if isinstance(error, AllModelsFailed):
        return all(is_shared(each) or isinstance(each, CircuitOpen) for each in error.errors)
    return isinstance(error, ProviderError) and not isinstance(error, errors.TotalTimeout)


def copied(error: LLMKitError) -> LLMKitError:
    """The same failure for another call, which has spent nothing on it."""
    if isinstance(error, AllModelsFailed):
        return AllModelsFailed(error.message, [copied(each) for each in error.errors])
    twin = copy.copy(error)
    twin.request_id, twin.spent, twin.unseen = None, None, 0
    if isinstance(twin, ProviderError):
        twin.maybe_billed, twin.usage = False, None
    if isinstance(twin, StreamBroken):
        twin.text_so_far = ""
    return twin


_TEXTS = ("message", "provider", "model", "provider_request_id", "next_step", "reason")
_NUMBERS = ("status", "retry_after", "limit", "reasoning_tokens")
_LONGEST = 2000


def written_out(error: LLMKitError) -> str | None:
    """A failure for another process; None where only this one can say it."""
    return json.dumps(_fields(error))


def _fields(error: LLMKitError) -> dict[str, Any]:
    fields = {name: getattr(error, name) for name in (*_TEXTS, *_NUMBERS, "retryable") if hasattr(error, name)}
    if isinstance(error, AllModelsFailed):
        fields["errors"] = [_fields(each) for each in error.errors[:MOST_ERRORS]]
    return {"kind": type(error).__name__, **fields}


def read_back(failure: Any) -> LLMKitError | None:
    """The failure that another process wrote; None where it cannot be read."""
    try:
        fields = json.loads(failure)
        if fields["kind"] != "AllModelsFailed":
            return _revived(fields)
        each = [_revived(one) for one in fields["errors"][:MOST_ERRORS]]
        return AllModelsFailed(_text(fields["message"]), each)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _revived(fields: dict[str, Any]) -> LLMKitError:
    kind = getattr(errors, fields["kind"]) if fields["kind"] in errors.__all__ else None
    if kind is CircuitOpen:
        return CircuitOpen(_text(fields["message"]), endpoint="", state="open", retry_after=None)
    if kind is None or not issubclass(kind, ProviderError):
        raise ValueError(fields["kind"])
    error: ProviderError = kind.__new__(kind)
    ProviderError.__init__(error, _text(fields["message"]), retryable=fields.get("retryable") is True)
    for name in _TEXTS[1:]:
        if isinstance(value := fields.get(name), str):
            setattr(error, name, _text(value))
    for name in _NUMBERS:
        if name in fields:
            value = fields[name]
            setattr(error, name, value if type(value) in {int, float} and 0 <= value < 1e9 else None)
    if isinstance(error, StreamBroken):
        error.text_so_far = ""
    return error


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return tidy(value, limit=_LONGEST)
