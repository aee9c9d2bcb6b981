"""Spending that somebody should hear of: a call, an hour or a day that cost a lot, an hour unlike those before.

Alerts only listen, after a call has been booked: nothing waits for them, and nothing is refused by them. What an hour or
a day has cost is the ledger's own sum, so that other kernels' calls count. It is looked up at most once a second; in
between this process's calls are added to it. That sum may be too high by a call that it held already, so no alert goes
out before the ledger has been asked again.
"""

from __future__ import annotations

import asyncio
import logging
import math
from decimal import Decimal
from typing import TYPE_CHECKING, NamedTuple

from llmkit.calendar import window
from llmkit.errors import StoreError
from llmkit.events import AlertRaised, emit
from llmkit.lock import new_lock
from llmkit.models.prices import from_nanos, to_nanos
from llmkit.money import amount, money

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from datetime import tzinfo

    from llmkit.call import Call
    from llmkit.clock import Clock
    from llmkit.config import AlertSettings
    from llmkit.reply import Outcome

__all__ = ["Alerts"]

log = logging.getLogger("llmkit")

LOOK_S = 1.0
PAUSE_S = 60.0  # after the ledger could not be read
AN_HOUR = 3600.0
WEEK_S = 7 * 86_400.0
FEWEST_HOURS = 3
"""With spending in fewer hours than these, nobody can say what is usual."""
LEAST_JUMP = to_nanos(Decimal("0.50"))
"""An hour that cost less is no alert, however cheap the others were."""


class _Sums(NamedTuple):
    """USD of one hour and its day, and of the hours with spending in the week before; in nano-dollars.

    ``hour`` and ``day`` are (begin, end) in epoch seconds. ``looked`` is on `Clock.now`'s scale.
    """

    hour: tuple[float, float]
    day: tuple[float, float]
    in_hour: int
    in_day: int
    before: int
    hours_before: int
    looked: float

    def plus(self, nanos: int) -> _Sums:
        return self._replace(in_hour=self.in_hour + nanos, in_day=self.in_day + nanos)


class Alerts:
    """Watches what calls cost, and tells ``on_alert`` and the listener of the call, each alert once.

    Args:
        settings: from where on spending is unusual.
        zone: gives the time zone in which hours and days begin.
        spent: the ledger's sums since some time (epoch seconds): nano-dollars by quarter of an hour, which is named by
            its beginning. Called in a thread. May raise `StoreError`.
        on_alert: called on the event loop's thread with an `llmkit.events.AlertRaised`; it must not block.
    """

    def __init__(
        self,
        settings: AlertSettings,
        zone: Callable[[], tzinfo],
        spent: Callable[[float], Mapping[int, int]],
        clock: Clock,
        on_alert: Callable[[AlertRaised], object] | None = None,
    ) -> None:
        self._settings = settings
        self._zone = zone
        self._spent = spent
        self._clock = clock
        self._on_alert = on_alert
        self._sums_matter = any(each is not None for each in (settings.hour_usd, settings.day_usd, settings.jump))
        self._lock = new_lock()
        self._sums: _Sums | None = None
        self._since = 0  # nano-dollars of calls that ended after the ledger was last asked
        self._looking = False
        self._not_before = -math.inf
        self._told: dict[str, float] = {}  # by kind, the beginning of the window of the last alert

    def are_heard(self, call: Call) -> bool:
        """Whether anybody listens."""
        return self._on_alert is not None or call.trail.listener is not None

    async def settled(self, call: Call, _: Outcome) -> None:
        """Look at what a call has cost; a hook for its end, after it has been booked."""
        cost = sum((attempt.cost_usd for attempt in call.trail.attempts if attempt.cost_usd is not None), Decimal(0))
        if not cost:
            return
        most = self._settings.call_usd
        if most is not None and cost > most:
            self._tell(call, "call", f"this call cost {money(cost)}, more than {amount(most)}", cost, most)
        if self._sums_matter and self._must_look(call.started_at, to_nanos(cost)):
            await self._look(call)

    def _must_look(self, at: float, nanos: int) -> bool:
        """Add a call to the sums; whether the ledger has to be asked, and by this one."""
        with self._lock:
            self._since += nanos
            sums = self._sums
            if sums is not None:
                sums = self._sums = sums.plus(nanos)
            if self._looking or self._clock.now() < self._not_before:  # whoever looks sees to this one, too
                return False
            fresh = sums is not None and sums.hour[0] <= at < sums.hour[1] and self._age(sums) < LOOK_S
            self._looking = not (fresh and sums is not None and not self._over(sums))
            return self._looking

    def _age(self, sums: _Sums) -> float:
        return self._clock.now() - sums.looked

    async def _look(self, call: Call) -> None:
        """Ask the ledger, until what is known of it is beyond no threshold that has not been told."""
        while True:
            with self._lock:
                self._since = 0
            try:
                sums = await asyncio.to_thread(self._read, call.started_at)
            except BaseException as error:
                with self._lock:
                    self._looking, self._not_before = False, self._clock.now() + PAUSE_S
                if not isinstance(error, StoreError):
                    raise
                log.warning("alerts cannot see what was spent: %s", error)
                return
            with self._lock:
                over = self._over(sums)
                self._told |= {kind: begin for kind, begin, *_ in over}
                self._sums = sums.plus(self._since)
                self._looking = bool(self._over(self._sums))
                again = self._looking
            for kind, _, message, spent, threshold in over:
                self._tell(call, kind, message, spent, threshold)
            if not again:
                return

    def _read(self, at: float) -> _Sums:
        zone = self._zone()
        hour, day = window("hour", at, zone), window("day", at, zone)
        looked = self._clock.now()
        first = hour[0] - WEEK_S
        slots = self._spent(min(first, day[0]))
        before: dict[float, int] = {}
        for slot, nanos in slots.items():
            if nanos and first <= slot < hour[0]:
                which = (hour[0] - slot - 1) // AN_HOUR
                before[which] = before.get(which, 0) + nanos
        return _Sums(
            hour,
            day,
            sum(nanos for slot, nanos in slots.items() if hour[0] <= slot < hour[1]),
            sum(nanos for slot, nanos in slots.items() if day[0] <= slot < day[1]),
            sum(before.values()),
            len(before),
            looked,
        )

    def _over(self, sums: _Sums) -> list[tuple[str, float, str, Decimal, Decimal]]:
        """What is beyond a threshold and has not been told: kind, beginning of the window, message, spent, threshold."""
        settings, found = self._settings, []
        in_hour, in_day = from_nanos(sums.in_hour), from_nanos(sums.in_day)
        hour, day = (self._clock_time(begin) for begin in (sums.hour[0], sums.day[0]))
        if settings.hour_usd is not None and in_hour > settings.hour_usd:
            text = f"{money(in_hour)} spent in the hour since {hour}, more than {amount(settings.hour_usd)}"
            found.append(("hour", sums.hour[0], text, in_hour, settings.hour_usd))
        if settings.day_usd is not None and in_day > settings.day_usd:
            text = f"{money(in_day)} spent in the day since {day}, more than {amount(settings.day_usd)}"
            found.append(("day", sums.day[0], text, in_day, settings.day_usd))
        if settings.jump is not None and sums.hours_before >= FEWEST_HOURS and sums.in_hour >= LEAST_JUMP:
            usual = from_nanos(sums.before) / sums.hours_before
            threshold = round(usual * Decimal(str(settings.jump)), 9)
            if in_hour > threshold:
                text = (
                    f"{money(in_hour)} spent in the hour since {hour}, {in_hour / usual:.1f} times the usual {money(usual)} "
                    f"(the mean of {sums.hours_before} hours with spending in the last 7 days)"
                )
                found.append(("jump", sums.hour[0], text, in_hour, threshold))
        return [each for each in found if self._told.get(each[0], -1.0) < each[1]]

    def _clock_time(self, at: float) -> str:
        from datetime import datetime

        return f"{datetime.fromtimestamp(at, self._zone()):%H:%M %Z}"

    def _tell(self, call: Call, kind: str, message: str, spent: Decimal, threshold: Decimal) -> None:
        alert = AlertRaised(call.request_id, kind, message, spent, threshold)
        emit(call, alert)
        if self._on_alert is None:
            return
        try:
            self._on_alert(alert)
        except Exception:
            log.exception("on_alert failed; the call goes on")
