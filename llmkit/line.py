"""Who waits for room in an account: the line of a process, and the place of a call in it.

Room comes when somebody's hold ends. Those of this process say so; other processes give back without a word, so the
first of a line looks again and again.
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
import os
import threading
import weakref
from typing import TYPE_CHECKING

from llmkit.events import Waiting, emit

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from llmkit.account import Account
    from llmkit.call import Call
    from llmkit.clock import Clock

__all__ = ["Line", "Place", "Ticket"]

LONGEST_WAIT_S = 60.0  # where the call has no deadline
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.005, 0.25  # between two tries: other processes give back without a word
SAID_AFTER_S = 1.0


class Ticket:
    """One call that waits."""

    __slots__ = ("key", "loop", "number", "woken")

    def __init__(self, number: int, key: str) -> None:
        self.number = number
        self.key = key
        self.loop = asyncio.get_running_loop()
        self.woken = asyncio.Event()


class Line:
    """Calls of this process that wait for room in an account, oldest first. Safe from any thread.

    Whoever comes later stands behind, even if he would fit, so that a call with a large worst case is not passed by small
    ones for ever. Only the first of a line tries.
    """

    def __init__(self) -> None:
        self._start_afresh()
        _LINES.add(self)

    def _start_afresh(self) -> None:
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._lines: dict[str, list[Ticket]] = {}
        self._tickets: dict[str, Ticket] = {}

    def before(self, accounts: tuple[Account, ...]) -> str | None:
        """The key of an account for which somebody waits already, if there is one."""
        if not self._lines:
            return None
        return next((account.key for account in accounts if account.key in self._lines), None)

    def join(self, request_id: str, key: str) -> Ticket:
        """Stand in the line of an account. Who moves from one to another keeps his age."""
        with self._lock:
            ticket = self._tickets.get(request_id)
            if ticket is None:
                ticket = self._tickets[request_id] = Ticket(next(self._numbers), key)
            elif ticket.key == key:
                return ticket
            else:
                self._remove(ticket)
                ticket.key = key
            bisect.insort(self._lines.setdefault(key, []), ticket, key=lambda each: each.number)
        return ticket

    def is_first(self, ticket: Ticket) -> bool:
        with self._lock:
            return self._lines.get(ticket.key, [None])[0] is ticket

    def leave(self, request_id: str) -> None:
        """It has got its room, or gives up: the next one's turn. Harmless where it did not wait."""
        if request_id not in self._tickets:
            return
        with self._lock:
            ticket = self._tickets.pop(request_id, None)
            if ticket is not None:
                self._remove(ticket)

    def ended(self, accounts: tuple[Account, ...]) -> None:
        """A hold on these accounts has ended, so there may be room."""
        if not self._lines:
            return
        with self._lock:
            for account in accounts:
                self._wake(account.key)

    def _remove(self, ticket: Ticket) -> None:
        line = self._lines.get(ticket.key, [])
        if ticket in line:
            line.remove(ticket)
        self._wake(ticket.key)

    def _wake(self, key: str) -> None:
        line = self._lines.get(key, [])
        while line:
            try:
                line[0].loop.call_soon_threadsafe(line[0].woken.set)
            except RuntimeError:  # its loop is closed, so nobody waits there any more
                del line[0]
            else:
                return
        self._lines.pop(key, None)


class Place:
    """The place of one call among those who wait for room in an account; ``waited_s``: how long it has.

    Args:
        reap: ends the holds of those who have died, which nobody else would give back.
    """

    def __init__(self, clock: Clock, line: Line, reap: Callable[[], Awaitable[None]], call: Call) -> None:
        self.waited_s = 0.0
        self._clock = clock
        self._line = line
        self._reap = reap
        self._call = call
        self._began: float | None = None
        self._pause = FIRST_PAUSE_S
        self._said = False

    async def stand_behind_others(self, accounts: tuple[Account, ...]) -> None:
        """Whoever waits already tries first, even where this call would fit."""
        key = self._line.before(accounts)
        if key is None:
            return
        ticket = self._line.join(self._call.request_id, key)
        scope = next(account.scope for account in accounts if account.key == key)
        while not self._line.is_first(ticket) and await self._woken(ticket, f"{scope}: others wait for room before it"):
            pass

    async def wait(self, key: str, reason: str) -> bool:
        """Until there may be room in the account ``key``, where others hold it. False: the time is up."""
        ticket = self._line.join(self._call.request_id, key)
        await self._reap()
        while await self._woken(ticket, reason):
            if self._line.is_first(ticket):
                return True
        return False

    async def _woken(self, ticket: Ticket, reason: str) -> bool:
        """Wait until somebody gives back, or for a while. False: the time is up."""
        call, now = self._call, self._clock.now()
        if self._began is None:
            self._began = now
            call.trail.sent = False
        until = call.deadline if call.deadline is not None else self._began + LONGEST_WAIT_S
        if now >= until:
            return False
        longest = until - now
        if self._line.is_first(ticket):  # the others are woken when it is their turn
            longest = min(longest, self._pause)
            self._pause = min(2 * self._pause, LONGEST_PAUSE_S)
        if not self._said:
            longest = min(longest, max(0.0, self._began + SAID_AFTER_S - now))
        await _either(ticket.woken.wait(), self._clock.sleep(longest))
        ticket.woken.clear()
        waited = self._clock.now() - now
        self.waited_s += waited
        call.trail.waited_s += waited
        if not self._said and self._clock.now() - self._began >= SAID_AFTER_S:
            self._said = True
            left = max(0.0, until - self._clock.now())
            emit(call, Waiting(call.request_id, left, reason, call.endpoint.name, for_room=True))
        return True


async def _either(first: Awaitable[object], second: Awaitable[object]) -> None:
    """Wait for one of the two; the other is given up."""
    tasks = [asyncio.ensure_future(first), asyncio.ensure_future(second)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


_LINES: weakref.WeakSet[Line] = weakref.WeakSet()


def _in_child() -> None:
    for line in list(_LINES):
        line._start_afresh()  # who waits there waits in the parent


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
