"""A clock that tests move: nothing waits, and everything happens in the order of its deadline."""

from __future__ import annotations

import asyncio
import functools
import heapq
import itertools
import math
import random
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["FakeClock"]

ROUNDS = 20  # turns of the event loop between two timers: what one timer wakes has run before the next one fires


class _Timer:
    """One entry of the clock's heap; also the handle that `FakeClock.call_later` returns."""

    __slots__ = ("callback", "loop", "when")

    def __init__(self, when: float, callback: Callable[[], object], loop: asyncio.AbstractEventLoop) -> None:
        self.when = when
        self.callback: Callable[[], object] | None = callback
        self.loop = loop

    def cancel(self) -> None:
        self.callback = None

    def fire(self) -> None:
        """Call back, on the loop the timer was set on."""
        try:
            here = asyncio.get_running_loop()
        except RuntimeError:
            here = None
        if here is self.loop:
            self._call()
        elif not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self._call)

    def _call(self) -> None:
        callback, self.callback = self.callback, None
        if callback is None:
            return
        try:
            callback()
        except Exception as error:  # noqa: BLE001 - as asyncio does: a bad callback does not stop the clock
            self.loop.call_exception_handler({"message": "a timer of FakeClock failed", "exception": error})


class FakeClock:
    """A `llmkit.clock.Clock` on which hours take microseconds.

    While any task sleeps on it, time runs: the earliest timer fires, the tasks it woke get their turn, then the next
    one fires, and so on. Timers alone do not make time run, so work that really takes a while (a socket, a thread)
    is not timed out behind its back. With ``auto=False`` time stands until the test calls `advance`.

    Args:
        start: epoch seconds that `time` begins at; the default is 2026-01-01 00:00 UTC. `now` begins at 0.
        seed: of `random`.
        auto: whether sleeping makes time run.

    Attributes:
        sleeps: every duration asked of `sleep`, in seconds, in order.
    """

    def __init__(self, start: float = 1_767_225_600.0, *, seed: int = 0, auto: bool = True) -> None:
        self.sleeps: list[float] = []
        self._start = start
        self._now = 0.0
        self._random = random.Random(seed)
        self._auto = auto
        self._timers: list[tuple[float, int, _Timer]] = []
        self._order = itertools.count()
        self._sleepers: dict[asyncio.AbstractEventLoop, int] = {}
        self._drivers: set[asyncio.AbstractEventLoop] = set()
        self._lock = threading.Lock()

    def now(self) -> float:
        """Seconds that passed on this clock."""
        return self._now

    def time(self) -> float:
        """Epoch seconds: ``start`` and what passed since."""
        return self._start + self._now

    def random(self) -> float:
        """The next number of the seeded sequence."""
        return self._random.random()

    @property
    def sleeping(self) -> int:
        """How many tasks sleep now."""
        return sum(self._sleepers.values())

    async def sleep(self, seconds: float) -> None:
        """Wait that long on this clock: no time at all, unless ``auto`` is off."""
        self.sleeps.append(seconds)
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        loop = asyncio.get_running_loop()
        woken = loop.create_future()
        timer = self._add(seconds, functools.partial(_wake, woken))
        with self._lock:
            self._sleepers[loop] = self._sleepers.get(loop, 0) + 1
        self._drive()
        try:
            await woken
        finally:
            timer.cancel()
            with self._lock:
                self._sleepers[loop] -= 1
                if not self._sleepers[loop]:
                    del self._sleepers[loop]

    def call_later(self, seconds: float, callback: Callable[[], object]) -> _Timer:
        """Call ``callback`` on the running loop when that much has passed on this clock."""
        timer = self._add(max(seconds, 0.0), callback)
        self._drive()
        return timer

    async def advance(self, seconds: float) -> None:
        """Let that much time pass: everything due until then happens, in order, and its tasks run."""
        target = self._now + seconds
        await self.settle()
        while (timer := self._due(target)) is not None:
            timer.fire()
            await self.settle()
        self._now = max(self._now, target)

    async def settle(self) -> None:
        """Let tasks that can run do so; no time passes."""
        for _ in range(ROUNDS):
            await asyncio.sleep(0)

    def _add(self, seconds: float, callback: Callable[[], object]) -> _Timer:
        timer = _Timer(self._now + seconds, callback, asyncio.get_running_loop())
        with self._lock:
            heapq.heappush(self._timers, (timer.when, next(self._order), timer))
        return timer

    def _due(self, until: float) -> _Timer | None:
        with self._lock:
            return self._pop(until)

    def _pop(self, until: float = math.inf) -> _Timer | None:
        """Take the earliest live timer off the heap and set the time to its moment. The lock is held."""
        while self._timers:
            when, _, timer = self._timers[0]
            dead = timer.callback is None or timer.loop.is_closed()
            if not dead and (when > until or math.isinf(when)):
                return None
            heapq.heappop(self._timers)
            if not dead:
                self._now = max(self._now, when)
                return timer
        return None

    def _drive(self) -> None:
        """See to it that every event loop on which something sleeps moves the time."""
        if not self._auto or not self._sleepers:
            return
        with self._lock:
            self._drivers = {loop for loop in self._drivers if not loop.is_closed()}
            idle = [loop for loop in self._sleepers if loop not in self._drivers and not loop.is_closed()]
            self._drivers.update(idle)
        for loop in idle:
            loop.call_soon_threadsafe(self._turn, loop, ROUNDS)

    # Plain callbacks, not a task: tests count the tasks that are left over.
    def _turn(self, loop: asyncio.AbstractEventLoop, rounds: int) -> None:
        if rounds:
            loop.call_soon(self._turn, loop, rounds - 1)
            return
        with self._lock:
            timer = self._pop() if loop in self._sleepers else None
            if timer is None:
                self._drivers.discard(loop)
                return
        timer.fire()
        loop.call_soon(self._turn, loop, ROUNDS)


def _wake(sleeper: asyncio.Future[None]) -> None:
    if not sleeper.done():
        sleeper.set_result(None)
