"""An error of a recorded call as plain JSON, and back: its kind, its sentence and its fields."""

from __future__ import annotations

import math
import re
from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from llmkit import errors
from llmkit.errors import AllModelsFailed, LLMKitError
from llmkit.reply import Usage

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Malformed", "error_of", "number", "of_error", "text_of", "usage_of", "written_usage"]

_LONGEST = 100_000  # of an error's texts
_MOST_ERRORS = 64
_DEEPEST = 4
_MOST_TOKENS = 10**12
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_ALWAYS = ("input_tokens", "output_tokens")
_COUNTS = (*_ALWAYS, "cached_input_tokens", "cache_write_tokens", "cache_write_1h_tokens", "reasoning_tokens")

_FIELD = re.compile(r"[a-z][a-z_]{0,60}")

# Of the call and of its reply, which are made anew; and where a file stood, which is this machine's business.
_LEFT_OUT = frozenset({"reply", "request_id", "latency_s", "errors", "file", "line", "_render_traceback_", "args"})


class Malformed(ValueError):
    """A recorded call is not what this version writes. Says why, and repeats nothing of it."""


def of_error(error: BaseException) -> dict[str, Any]:
    """``error``, an `LLMKitError`, as plain JSON."""
    told: dict[str, Any] = {"type": type(error).__name__, "message": str(error)}
    for name, value in sorted(vars(error).items()):
        if name not in _LEFT_OUT and value is not None and (written := _written(value)) is not None:
            told[name] = written
    if error.__dict__.get("request_id") is not None:
        told["booked"] = True
    if told.get("text_so_far"):  # it is the answer's text
        told["text_so_far"] = ""
    if isinstance(error, AllModelsFailed):
        told["errors"] = [of_error(each) for each in error.errors[:_MOST_ERRORS]]
    return told


def _written(value: Any) -> Any:
    if isinstance(value, Decimal):
        return {"decimal": f"{value:f}"}
    if isinstance(value, datetime):
        return {"time": value.isoformat()}
    if isinstance(value, Usage):
        return {"usage": written_usage(value)}
    if isinstance(value, tuple | list) and all(isinstance(each, str) for each in value):
        return list(value)
    if isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return None


def error_of(told: Any, request_id: str, depth: int = 0) -> LLMKitError:
    """The error that `of_error` wrote.

    Raises:
        Malformed: it is none.
    """
    name, message = told["type"], _CONTROL.sub(" ", text_of(told["message"], _LONGEST))
    kind = getattr(errors, name) if isinstance(name, str) and name in errors.__all__ else None
    if kind is None or depth > _DEEPEST:
        raise Malformed("an error of an unknown kind")
    if kind is AllModelsFailed:
        each = [error_of(one, request_id, depth + 1) for one in told["errors"][:_MOST_ERRORS]]
        error: LLMKitError = AllModelsFailed(message, each)
    else:
        error = kind.__new__(kind, message)
        LLMKitError.__init__(error, message)
    for field, value in told.items():
        if field not in _LEFT_OUT and field not in {"type", "message", "usage", "booked"} and _FIELD.fullmatch(field):
            setattr(error, field, _read(value))
    _fill(error, told)
    error.request_id = request_id if told.get("booked") is True else None
    return error


def _read(value: Any) -> Any:
    if isinstance(value, str):
        return _CONTROL.sub(" ", text_of(value, _LONGEST))
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, list):
        return tuple(_CONTROL.sub(" ", text_of(each, _LONGEST)) for each in value[:_MOST_ERRORS])
    ((kind, inner),) = value.items()
    if kind == "decimal":
        amount = Decimal(text_of(inner))
        if not amount.is_finite():
            raise Malformed("an amount is no amount")
        return amount
    if kind == "time":
        return datetime.fromisoformat(text_of(inner))
    if kind == "usage":
        return usage_of(inner)
    raise Malformed("a field of an error is of an unknown kind")


def _fill(error: LLMKitError, told: Mapping[str, Any]) -> None:
    """What its kind has and nobody wrote is None; what every block shows is of its kind."""
    for kind in type(error).__mro__:
        code = getattr(vars(kind).get("__init__"), "__code__", None)
        if code is not None and issubclass(kind, LLMKitError):
            for name in code.co_varnames[code.co_argcount :][: code.co_kwonlyargcount]:
                if not hasattr(error, name):
                    setattr(error, name, None)
    text_of(error.next_step)
    if type(error.unseen) is not int or not isinstance(error.spent, Decimal | None):
        raise Malformed("what an error says of money is of the wrong kind")
    if isinstance(error, errors.ProviderError):
        error.usage = usage_of(told["usage"]["usage"]) if "usage" in told else None


def text_of(value: Any, longest: int = 64 * 1024 * 1024) -> str:
    """``value``, which is a text that can be printed.

    Raises:
        Malformed: it is none.
    """
    if not isinstance(value, str) or len(value) > longest:
        raise Malformed("a text is missing, or too long")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Malformed("a text holds half of a character") from None
    return value


def number(value: Any) -> float | None:
    """``value``, which is a finite number or None.

    Raises:
        Malformed: it is neither.
    """
    if value is None:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return value
    raise Malformed("a number is of the wrong kind")


def written_usage(usage: Usage | None) -> dict[str, Any] | None:
    """Tokens by their names; those of which there were none are left out."""
    if usage is None:
        return None
    counts = {name: getattr(usage, name) for name in _COUNTS}
    told: dict[str, Any] = {name: count for name, count in counts.items() if count or name in _ALWAYS}
    return {**told, "estimated": True} if usage.estimated else told


def usage_of(told: Any) -> Usage | None:
    """What `written_usage` wrote.

    Raises:
        Malformed: it did not.
    """
    if told is None:
        return None
    counts = {name: told[name] for name in _COUNTS if name in told}
    if any(type(count) is not int or not 0 <= count <= _MOST_TOKENS for count in counts.values()):
        raise Malformed("a count of tokens is of the wrong kind")
    return Usage(**counts, estimated=told.get("estimated") is True)
