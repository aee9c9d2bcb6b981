"""The life of one call, as it was reported while it went on, and in words afterwards."""

from __future__ import annotations

import re
import time
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NamedTuple

from llmkit import events
from llmkit.money import amount, money
from llmkit.redaction import tidy

if TYPE_CHECKING:
    from collections.abc import Callable
    from decimal import Decimal

    from llmkit.call import Attempt
    from llmkit.reply import Usage

__all__ = ["Life", "Moment", "after", "attempt", "counts"]

MOST = 1_000
"""Events that are remembered of one call; of a longer life the beginning and the last one."""
_LONGEST = 400


class Moment(NamedTuple):
    """Something that happened, ``at`` so many seconds after the cell began to ask."""

    at: float
    text: str


class Life:
    """Hears what one call reports, on whatever thread.

    Attributes:
        request_id: of the call; None until it has reported something.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._began = now()
        self._heard: list[tuple[float, events.Event]] = []

    def hear(self, event: events.Event) -> None:
        """Remember it, and when."""
        if len(self._heard) >= MOST:
            self._heard.pop()
        self._heard.append((self._now() - self._began, event))

    @property
    def request_id(self) -> str | None:
        return self._heard[0][1].request_id if self._heard else None

    @property
    def notes(self) -> list[str]:
        """What should be known of money although nothing failed."""
        said = (events.BudgetWarning, events.AlertRaised)
        return [event.message for _, event in self._heard if isinstance(event, said)]

    @property
    def attempts(self) -> list[Attempt]:
        """Those that have ended."""
        return [event.attempt for _, event in self._heard if isinstance(event, events.AttemptEnded)]

    @property
    def elapsed_s(self) -> float:
        """Since the cell began to ask."""
        return self._now() - self._began

    def told(self) -> list[Moment]:
        """In words, in order; the same thing said twice in a row is said once."""
        moments: list[Moment] = []
        for at, event in self._heard:
            text = tidy(_words(event), limit=_LONGEST)
            if not moments or moments[-1].text != text:
                moments.append(Moment(round(at, 3), text))
        return moments


# -- events in words ---------------------------------------------------------------------------------------------------


def _words(event: events.Event) -> str:
    say = _WORDS.get(type(event))
    return _unknown(event) if say is None else say(event)


def _unknown(event: events.Event) -> str:
    """One that this module has no words for: its name and what it holds."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(event).__name__).lower()
    said = (f"{each.name} {getattr(event, each.name)}" for each in fields(event) if each.name != "request_id")
    return f"{name}: {', '.join(said)}"


def _looked(event: events.CacheLooked) -> str:
    if event.found == "off":
        why = "this call neither looks nor stores" if event.mode == "off" else "it is switched off"
        return f"cache: not looked up ({why})"
    if event.found == "refresh":
        return "cache: not looked up (refresh: asked anew, and stored)"
    if event.found == "miss":
        return f"cache: a miss ({event.mode})"
    where = "in memory" if event.found == "memory" else "in the store"
    saved = f", saved {money(event.saved)}" if event.saved else ""
    return f"cache: a hit {where} ({event.mode}){saved}"


def _following(event: events.Following) -> str:
    where = " in another process" if event.elsewhere else ""
    return f"single-flight: an identical call is in flight{where}; this one gets its answer"


def _held(event: events.Held) -> str:
    parts = [f"{_share(each)} spent, {_amount(each.unit, each.held)} held" for each in event.shares]
    limits = "; ".join(parts) or "no limit there"
    held = f"{money(event.usd)} and {_tokens(event.tokens)}"
    return f"budget: {held} held for attempt {event.number} ({limits})"


def _no_room(event: events.NoRoom) -> str:
    share = event.share
    held = f", {_amount(share.unit, share.held)} held by other calls" if share.held else ""
    needed = _amount(share.unit, event.needed)
    return f"budget: no room for {needed} in {_share(share)} spent{held}"


def _settled(event: events.Settled) -> str:
    if event.usd is None and event.tokens is None:
        return f"budget: attempt {event.number} may be billed and nobody knows how much; what was held stays booked"
    cost = "an unknown price (what was held in USD stays booked)" if event.usd is None else money(event.usd)
    if not event.usd and not event.tokens and event.usd is not None:
        return f"budget: what was held for attempt {event.number} is given back"
    return f"budget: attempt {event.number} settled at {cost}, {_tokens(event.tokens or 0)}"


def _share(share: events.Share) -> str:
    limit = amount(share.limit) if share.unit == "usd" else _tokens(share.limit)  # type: ignore[arg-type]
    return f"{share.scope}: {_amount(share.unit, share.spent)} of {limit}"


def _amount(unit: str, number: Decimal | int) -> str:
    return money(number) if unit == "usd" else _tokens(number)  # type: ignore[arg-type]


def _tokens(number: Decimal | int) -> str:
    return f"{number:,} token{'' if number == 1 else 's'}"


def _ended(event: events.AttemptEnded) -> str:
    return attempt(event.attempt)


def attempt(made: Attempt) -> str:
    """An attempt that has ended: who, how, how long, how much."""
    status = f", HTTP {made.http_status}" if made.http_status is not None else ""
    first = made.time_to_first_token_s
    token = "" if first is None else f" (first token after {first:.2f} s)"
    parts = [*counts(made.usage), "cost unknown" if made.cost_usd is None else money(made.cost_usd)]
    if made.finish_reason:
        parts.append(f"finish reason {made.finish_reason}")
    if made.maybe_billed:
        parts.append("may be billed")
    if made.error and made.status != "aborted":
        parts.append(f"{made.error}: {made.message or ''}".removesuffix(": "))
    who = f"attempt {made.number}: {made.provider}:{made.model}"
    return f"{who} {made.status}{status}{after(made.latency_s)}{token}, {', '.join(parts)}"


def counts(usage: Usage | None) -> list[str]:
    """Tokens in and out, with a sign where they were counted here; nothing where nobody knows."""
    if usage is None:
        return []
    about = "≈" if usage.estimated else ""
    return [f"{about}{usage.input_tokens:,} → {about}{usage.output_tokens:,} tokens"]


def after(seconds: float | None) -> str:
    """`` after 1.25 s``; empty where nobody knows."""
    return "" if seconds is None else f" after {seconds:.2f} s"


_WORDS: dict[type[events.Event], Callable[[Any], str]] = {
    events.CacheLooked: _looked,
    events.Following: _following,
    events.LinkSkipped: lambda event: f"choice: {event.endpoint} is passed over: {event.reason}",
    events.FellBack: lambda event: f"choice: {event.endpoint} is left for {event.to}: {event.reason}",
    events.Held: _held,
    events.NoRoom: _no_room,
    events.Settled: _settled,
    events.AttemptStarted: lambda event: f"attempt {event.number}: sent to {event.endpoint}",
    events.AttemptEnded: _ended,
    events.Waiting: lambda event: (
        f"waiting {'for room, at most ' * event.for_room}{event.seconds:.1f} s: {event.reason}"
    ),
    events.BudgetWarning: lambda event: f"budget: {event.message}",
    events.AlertRaised: lambda event: f"alert: {event.message}",
    events.CircuitChanged: lambda event: f"circuit of {event.endpoint}: from {event.before} to {event.after}",
    events.Checking: lambda event: f"schema: an answer of {event.reply.model} arrives, and is checked when it is whole",
    events.Repairing: lambda event: f"schema: it does not fit ({'; '.join(event.problems)}); it is asked for once more",
    events.Degraded: lambda event: f"degraded: the text that is set for outages answers ({event.reason})",
}
