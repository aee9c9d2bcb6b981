"""Time, sleep and chance, through one door, so that no test ever sleeps.

`SystemClock` is the real one; `llmkit.testing.FakeClock` is the one tests (yours, too) move by hand.
"""

from __future__ import annotations

import asyncio
import random
import time
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["Clock", "SystemClock", "TimerHandle", "within"]

T = TypeVar("T")


class TimerHandle(Protocol):
    """What `Clock.call_later` returns."""

    def cancel(self) -> None:
        """Forget the timer; harmless when it has already fired."""


class Clock(Protocol):
    """Everything llmkit knows of time and chance."""

    def now(self) -> float:
        """Monotonic seconds; only differences mean anything."""

    def time(self) -> float:
        """Seconds since the epoch (UTC)."""

    def random(self) -> float:
        """A number in [0, 1)."""

    async def sleep(self, seconds: float) -> None:
        """Wait that long."""

    def call_later(self, seconds: float, callback: Callable[[], object]) -> TimerHandle:
        """Call ``callback`` on the running loop after that long."""


class SystemClock:
    """The machine's clock and the operating system's randomness."""

    def __init__(self) -> None:
        self._random = random.SystemRandom()

    # Staticmethods, not wrappers: they are called several times a chunk.
    now = staticmethod(time.monotonic)
    time = staticmethod(time.time)

    def random(self) -> float:
        return self._random.random()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def call_later(self, seconds: float, callback: Callable[[], object]) -> TimerHandle:
        return asyncio.get_running_loop().call_later(seconds, callback)


async def within(clock: Clock, seconds: float, waiting: Awaitable[T], error: Callable[[], BaseException]) -> T:
    """Await ``waiting``; when ``seconds`` run out first, cancel it and raise ``error()``.

    `asyncio.timeout` on our own clock: a cancellation from outside stays a cancellation. The one from here carries
    the error, so that what is cancelled can tell the two apart.
    """
    task = asyncio.current_task()
    if task is None:
        raise RuntimeError("within() needs a running task")
    before = task.cancelling()
    expired: BaseException | None = None

    def expire() -> None:
        nonlocal expired
        expired = error()
        task.cancel(expired)

    timer = clock.call_later(seconds, expire)
    try:
        return await waiting
    except asyncio.CancelledError:
        if expired is None or task.uncancel() > before:
            raise
    finally:
        timer.cancel()
    raise expired  # out here, so that it does not hold the cancellation and what its frames were reading
