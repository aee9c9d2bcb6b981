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
    from llmkit.reply import Reply

__all__ = [
    "AlertRaised",
    "AttemptEnded",
    "AttemptStarted",
    "BudgetWarning",
    "CacheLooked",
    "Checking",
    "CircuitChanged",
    "Degraded",
    "Event",
    "FellBack",
    "Following",
    "Held",
    "LinkSkipped",
    "NoRoom",
    "Repairing",
    "Settled",
    "Share",
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
    """The call waits ``seconds`` before its next attempt, because of ``reason``.

    ``for_room``: until others give back what they hold of a budget, and ``seconds`` is the longest that this may take.
    """

    seconds: float
    reason: str
    endpoint: str
    for_room: bool = False


@dataclass(frozen=True, slots=True)
class FellBack(Event):
    """The call leaves ``endpoint`` for ``to``, because of ``reason``."""

    endpoint: str
    to: str
    reason: str


@dataclass(frozen=True, slots=True)
class CacheLooked(Event):
    """The cache was asked, or was not.

    ``mode`` is that of the call (`llmkit.call.CACHE_MODES`). ``found``: ``memory``, ``store`` or ``miss``; ``off`` where
    nothing was looked up, and ``refresh`` where it was not to be. ``saved``: USD that the answer had cost.
    """

    mode: str
    found: str
    saved: Decimal | None = None


@dataclass(frozen=True, slots=True)
class Following(Event):
    """The same question is in flight: this call waits for that answer. ``elsewhere``: in another process."""

    elsewhere: bool


@dataclass(frozen=True, slots=True)
class LinkSkipped(Event):
    """``endpoint`` is not used, or left with no other link to go to, because of ``reason``."""

    endpoint: str
    reason: str


@dataclass(frozen=True, slots=True)
class Share:
    """A limit as a hold found it: ``unit`` is ``usd`` or ``tokens``; ``held`` includes that hold."""

    scope: str
    unit: str
    limit: Decimal | int
    spent: Decimal | int
    held: Decimal | int


@dataclass(frozen=True, slots=True)
class Held(Event):
    """The worst case of attempt ``number``, in USD and tokens, is set aside in each of ``shares``."""

    number: int
    usd: Decimal
    tokens: int
    shares: tuple[Share, ...]


@dataclass(frozen=True, slots=True)
class NoRoom(Event):
    """What is ``needed`` does not fit into a limit just now. ``share.held`` is held by other calls."""

    share: Share
    needed: Decimal | int


@dataclass(frozen=True, slots=True)
class Settled(Event):
    """What was held for attempt ``number`` is no longer.

    ``usd`` and ``tokens`` are what was booked in its place; None where nobody knows, so that the worst case stays booked.
    """

    number: int
    usd: Decimal | None
    tokens: int | None


@dataclass(frozen=True, slots=True)
class Degraded(Event):
    """No link could answer for now, because of ``reason``: the text that is set for that answers."""

    reason: str


@dataclass(frozen=True, slots=True)
class Checking(Event):
    """An answer arrives that is handed on only when it is whole and fits its schema: ``reply``, still arriving."""

    reply: Reply


@dataclass(frozen=True, slots=True)
class Repairing(Event):
    """The answer does not fit its schema, because of ``problems``; it is asked for once more."""

    problems: tuple[str, ...]


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
