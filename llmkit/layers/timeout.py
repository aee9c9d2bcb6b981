"""Time limits of one attempt: until the first token, between chunks, and what is left of the call's deadline.

The connect limit is kept by the transport, which alone knows when the connection stands.

One timer serves an attempt, however many chunks it has: it is moved by changing a number, and looks at that number
when it fires. A timer a chunk would cost more than all layers together.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

from llmkit.errors import FirstTokenTimeout, IdleTimeout, ProviderTimeout, TotalTimeout

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable

    from llmkit.call import Call
    from llmkit.clock import Clock, TimerHandle
    from llmkit.pipeline import CallNext
    from llmkit.reply import Chunk, Outcome, Reply

__all__ = ["Timeout"]

T = TypeVar("T")


class Timeout:
    """Keeps ``call.timeouts.first_token``, ``.idle`` and ``call.deadline``."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    async def __call__(self, call: Call, call_next: CallNext) -> Reply:
        limits = call.timeouts
        first_token = limits.first_token if call.stream or limits.first_token_set else None
        if first_token is None and limits.idle is None and call.deadline is None:
            return await call_next(call)
        watch = _Watch(self._clock, call)
        try:
            reply = await watch.wait(call_next(call), first_token, FirstTokenTimeout)
        except BaseException:
            watch.stop()
            raise
        watch.reply = reply
        await reply.at_end(watch.ended)
        return reply.watched(watch.over)


class _Watch:
    """Stands round every wait of one attempt."""

    __slots__ = ("_call", "_clock", "_due", "_expired", "_kind", "_limit", "_source", "_task", "_timer", "reply")

    def __init__(self, clock: Clock, call: Call) -> None:
        self._clock = clock
        self._call = call
        self._due: float | None = None
        self._kind: type[ProviderTimeout] = TotalTimeout
        self._limit = 0.0
        self._task: asyncio.Task[Any] | None = None
        self._timer: tuple[float, TimerHandle] | None = None
        self._expired: ProviderTimeout | None = None
        self._source: AsyncIterator[list[Chunk]] | None = None
        self.reply: Reply | None = None

    def over(self, source: AsyncIterator[list[Chunk]]) -> _Watch:
        self._source = source
        return self

    def __aiter__(self) -> _Watch:
        return self

    def __anext__(self) -> Awaitable[list[Chunk]]:
        assert self._source is not None
        return self.wait(self._source.__anext__(), self._call.timeouts.idle, IdleTimeout)

    async def wait(self, waiting: Awaitable[T], limit: float | None, kind: type[ProviderTimeout]) -> T:
        task = asyncio.current_task()
        assert task is not None
        before = task.cancelling()
        self._aim(limit, kind)
        self._task = task
        try:
            return await waiting
        except asyncio.CancelledError:
            if self._expired is None or task.uncancel() > before:
                raise
        finally:
            self._task = None
            # Between two reads only the deadline runs: silence is then the reader's, not the provider's.
            self._due = self._call.deadline
        raise self._expired  # out here, so that it does not hold the cancellation and what its frames were reading

    def _aim(self, limit: float | None, kind: type[ProviderTimeout]) -> None:
        """Point the timer at the nearer of ``limit`` seconds from now and the deadline."""
        due = None if limit is None else self._clock.now() + limit
        deadline = self._call.deadline
        if deadline is not None and (due is None or deadline <= due):
            due, kind, limit = deadline, TotalTimeout, self._call.timeouts.total
        self._due, self._kind, self._limit = due, kind, limit or 0.0
        if due is None:
            return
        if self._timer is None:
            idle = self._call.timeouts.idle
            # Set for the nearest limit there is: fired early, it only looks and is set anew.
            self._set(due if idle is None else min(due, self._clock.now() + idle))
        elif due < self._timer[0]:
            self._timer[1].cancel()
            self._set(due)

    def _set(self, due: float) -> None:
        self._timer = (due, self._clock.call_later(max(0.0, due - self._clock.now()), self._fire))

    def _fire(self) -> None:
        self._timer = None
        if self._due is None:
            return
        if self._clock.now() < self._due - 1e-6:
            self._set(self._due)
        elif self._task is not None:
            self._expired = self._error()
            self._task.cancel(self._expired)
        elif self.reply is not None and self.reply.outcome is None:
            # The reader is busy elsewhere while the deadline passes: free the connection all the same.
            self._kind, self._limit = TotalTimeout, self._call.timeouts.total or 0.0
            self.reply.fail_soon(self._error())

    def _error(self) -> ProviderTimeout:
        endpoint, sent = self._call.endpoint, self._call.trail.sent is not False
        what = {
            FirstTokenTimeout: "no first token within",
            IdleTimeout: "silent between chunks for",
            TotalTimeout: "not finished within the call's total of",
        }[self._kind]
        return self._kind(
            f"{endpoint.name}: {what} {self._limit:g} s{'' if sent else '; nothing of this attempt had been sent'}",
            limit=self._limit,
            provider=endpoint.provider,
            model=endpoint.model,
            maybe_billed=sent,
        )

    def stop(self) -> None:
        self._due = None
        if self._timer is not None:
            self._timer[1].cancel()
            self._timer = None

    async def ended(self, _: Outcome) -> None:
        self.stop()
