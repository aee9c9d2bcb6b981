"""What a provider's response headers say about trying again. Nothing here ever raises."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["LONGEST_WAIT_S", "provider_request_id", "retry_after", "should_retry"]

LONGEST_WAIT_S = 86_400.0
"""A server that asks for more than a day is taken to have asked for a day."""

_GO_DURATION = re.compile(r"(\d{1,12}(?:\.\d{1,12})?)(h|ms|m|s|us|µs|μs|ns)")
_GO_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ns": 1e-9}
_ANTHROPIC_LIMITS = tuple(
    f"anthropic-ratelimit-{what}" for what in ("requests", "tokens", "input-tokens", "output-tokens")
)
_OPENAI_LIMITS = ("requests", "tokens")


def retry_after(headers: Mapping[str, str], now: float, *, status: int | None = None) -> float | None:
    """Seconds the server asks us to wait, in [0, `LONGEST_WAIT_S`]; None where it does not say.

    Read in this order: ``retry-after-ms``; ``retry-after`` as seconds or as an HTTP date (against the server's own
    ``Date`` where it sent one, else ``now``, epoch seconds); on a 429 the reset times of Anthropic (RFC 3339) and
    OpenAI (Go durations).
    """
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return _bounded(milliseconds / 1000)
    asked = headers.get("retry-after")
    if asked is not None:
        seconds = _number(asked)
        if seconds is None:
            seconds = _until(_http_date(asked), _server_time(headers, now))
        if seconds is not None:
            return _bounded(seconds)
    return _reset(headers, now) if status == 429 else None


def should_retry(headers: Mapping[str, str]) -> bool | None:
    """What ``x-should-retry`` says; None where it says nothing."""
    return {"true": True, "false": False}.get(headers.get("x-should-retry", "").strip().lower())


def provider_request_id(headers: Mapping[str, str]) -> str | None:
    """The provider's own id of the request, cut to 200 characters."""
    found = headers.get("x-request-id") or headers.get("request-id")
    return found[:200] if found else None


def _reset(headers: Mapping[str, str], now: float) -> float | None:
    """When the limit that ran out is renewed: the latest of those at zero, else the earliest of all."""
    spent: list[float] = []
    others: list[float] = []
    for name in _ANTHROPIC_LIMITS:
        wait = _until(_rfc3339(headers.get(f"{name}-reset")), _server_time(headers, now))
        _file(wait, headers.get(f"{name}-remaining"), spent, others)
    for what in _OPENAI_LIMITS:
        wait = _go_duration(headers.get(f"x-ratelimit-reset-{what}"))
        _file(wait, headers.get(f"x-ratelimit-remaining-{what}"), spent, others)
    if spent:
        return _bounded(max(spent))
    return _bounded(min(others)) if others else None


def _file(wait: float | None, remaining: str | None, spent: list[float], others: list[float]) -> None:
    if wait is not None:
        (spent if _number(remaining) == 0 else others).append(wait)


def _number(text: str | None) -> float | None:
    try:
        value = float(text) if text is not None and len(text) <= 40 else math.nan
    except ValueError:
        return None
    return None if math.isnan(value) else value


def _bounded(seconds: float) -> float:
    return min(max(seconds, 0.0), LONGEST_WAIT_S)


def _server_time(headers: Mapping[str, str], now: float) -> float:
    date = headers.get("date")
    told = _http_date(date) if date else None
    return now if told is None else told


def _until(moment: float | None, now: float) -> float | None:
    return None if moment is None else moment - now


def _http_date(text: str) -> float | None:
    try:
        return _epoch(parsedate_to_datetime(text[:60]))
    except (ValueError, TypeError, IndexError, OverflowError, OSError, AttributeError):
        return None


def _rfc3339(text: str | None) -> float | None:
    try:
        return _epoch(datetime.fromisoformat(text.strip()[:60])) if text else None
    except (ValueError, OverflowError, OSError):
        return None


def _epoch(moment: datetime) -> float:
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _go_duration(text: str | None) -> float | None:
    if text is None or len(text) > 60:
        return None
    text = text.strip()
    parts = _GO_DURATION.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        return _number(text)  # some proxies send plain seconds
    return sum(float(number) * _GO_UNITS[unit] for number, unit in parts)
