"""What happens, as frozen records. Displays, metrics and logs listen; no layer knows of them.

A listener runs on the event loop's thread and must not block. One that raises is logged, and the call goes on.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from decimal import Decimal

    from llmkit.call import Attempt, Call

__all__ = [
    "AlertRaised",
    "AttemptEnded",
    "AttemptStarted",
    "BudgetWarning",
    "CircuitChanged",
    "Event",
    "FellBack",
    "Waiting",
    "emit",
]

log = logging.getLogger("llmkit")


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to the call ``request_id``."""

    request_id: str


@dataclass(frozen=True, slots=True)
class AttemptStarted(Event):
    """Attempt ``number`` goes to ``endpoint``."""

    endpoint: str
    number: int


@dataclass(frozen=True, slots=True)
class AttemptEnded(Event):
    """An attempt ended, well or not."""

    attempt: Attempt


@dataclass(frozen=True, slots=True)
class Waiting(Event):
    """The call waits ``seconds`` before its next attempt, because of ``reason``."""

    seconds: float
    reason: str
    endpoint: str


@dataclass(frozen=True, slots=True)
class FellBack(Event):
    """The call leaves ``endpoint`` for ``to``, because of ``reason``."""

    endpoint: str
    to: str
    reason: str


@dataclass(frozen=True, slots=True)
class CircuitChanged(Event):
    """The breaker of ``endpoint`` went from ``before`` to ``after``."""

    endpoint: str
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class BudgetWarning(Event):
    """A budget is used up to a part that deserves a word: ``message`` says which, how far, and when it resets."""

    scope: str
    message: str


@dataclass(frozen=True, slots=True)
class AlertRaised(Event):
    """Spending is unusual. ``kind``: ``call``, ``hour``, ``day`` or ``jump``; amounts in USD."""

    kind: str
    message: str
    spent: Decimal
    threshold: Decimal


def emit(call: Call, event: Event) -> None:
    """Tell the call's listener, if it has one."""
    listener = call.trail.listener
    if listener is None:
        return
    try:
        listener(event)
    except Exception:
        log.exception("a listener failed; the call goes on")
