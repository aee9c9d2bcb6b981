"""A clock that tests move: nothing waits, and everything happens in the order of its deadline."""

from __future__ import annotations

import asyncio
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
        except Exception as error:  # as asyncio does: a bad callback does not stop the clock
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
        self._sleeping = 0
        self._driver: asyncio.AbstractEventLoop | None = None
        self._lock = threading.RLock()

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
        return self._sleeping

    async def sleep(self, seconds: float) -> None:
        """Wait that long on this clock: no time at all, unless ``auto`` is off."""
        self.sleeps.append(seconds)
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        woken = asyncio.get_running_loop().create_future()
        with self._lock:
            timer = self._add(seconds, lambda: woken.done() or woken.set_result(None))
            self._sleeping += 1
            self._drive()
        try:
            await woken
        finally:
            timer.cancel()
            with self._lock:
                self._sleeping -= 1

    def call_later(self, seconds: float, callback: Callable[[], object]) -> _Timer:
        """Call ``callback`` on the running loop when that much has passed on this clock."""
        timer = self._add(max(seconds, 0.0), callback)
        if self._sleeping:
            self._drive()
        return timer

    async def advance(self, seconds: float) -> None:
        """Let that much time pass: everything due until then happens, in order, and its tasks run."""
        target = self._now + seconds
        await self.settle()
        while (timer := self._pop(target)) is not None:
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

    def _pop(self, until: float = math.inf) -> _Timer | None:
        """Take the earliest live timer off the heap and set the time to its moment."""
        with self._lock:
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
        """See to it that one event loop moves the time, for as long as anything sleeps."""
        if not self._auto:
            return
        with self._lock:
            if self._driver is not None and self._driver.is_running():
                return
            self._driver = asyncio.get_running_loop()
        self._driver.call_soon(self._turn, ROUNDS)

    # Plain callbacks, not a task: tests count the tasks that are left over.
    def _turn(self, rounds: int) -> None:
        loop = asyncio.get_running_loop()
        if rounds:
            loop.call_soon(self._turn, rounds - 1)
            return
        with self._lock:
            timer = self._pop() if self._sleeping else None
            if timer is None:
                self._driver = None
                return
        timer.fire()
        loop.call_soon(self._turn, ROUNDS)
