"""Endings of holds on their way to the server: in their order, and however long it is away."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from llmkit.state.redis.connection import ServerAway

if TYPE_CHECKING:
    from llmkit.state.redis.connection import Script, Server

__all__ = ["Ending", "Endings", "Known"]

log = logging.getLogger("llmkit")

_LANE = "endings"  # one of their own: no hold waits for them
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
FLUSH_S = 3.0
TOGETHER = 100  # endings that are delivered at once


class Known(NamedTuple):
    """A hold of this process that has not been ended: its token, its worst case, and the accounts that it is in."""

    token: str
    nanos: int
    tokens: int
    keys: tuple[bytes, ...]


class Ending(NamedTuple):
    """What is to be said of a hold: ``settle``, ``release``, or ``drop`` of one that nobody knows to be there.

    ``nanos`` or ``tokens`` None: nobody knows how much was spent.
    """

    id: bytes
    how: str
    nanos: int | None
    tokens: int | None
    known: Known | None

    def words(self) -> tuple[str | bytes, ...]:
        """The arguments of the script that ends a hold."""
        known = self.known
        said = ("" if self.nanos is None else str(self.nanos), "" if self.tokens is None else str(self.tokens))
        if known is None:
            return (self.id, self.how, "", *said)
        return (self.id, self.how, known.token, *said, str(known.nanos), str(known.tokens), *known.keys)


class Endings:
    """The queue, and the task on the server's loop that empties it. What is put here was told to nobody yet."""

    def __init__(self, server: Server, script: Script) -> None:
        self._server = server
        self._script = script
        self._queue: deque[Ending] = deque()
        self._delivering = False
        self._hurry: asyncio.Event | None = None
        self._warned = False

    def __bool__(self) -> bool:
        return bool(self._queue)

    def put(self, ending: Ending) -> None:
        """From any thread; never waits."""
        self._queue.append(ending)
        self.begin()

    def begin(self) -> None:
        """Deliver what waits, unless somebody is at it."""
        if self._queue and not self._delivering:
            self._server.engine.start(self._deliver)

    def hurry(self) -> None:
        """The server has just answered: what waits for it need not wait any longer."""
        if self._queue:
            self._wake()

    def _wake(self) -> None:
        if self._hurry is not None:
            with contextlib.suppress(RuntimeError):
                self._server.engine.loop.call_soon_threadsafe(self._hurry.set)

    async def flush(self) -> None:
        """Deliver what waits, for at most `FLUSH_S`; what is left then is given up: its leases end it."""
        if self._queue or self._delivering:
            engine = self._server.engine
            delivered = asyncio.run_coroutine_threadsafe(self._flush(), engine.loop)
            with contextlib.suppress(TimeoutError, asyncio.CancelledError, RuntimeError):
                await asyncio.wrap_future(delivered)
        if self._queue:
            log.warning(
                "%d holds could not be ended on the Redis server %s; their leases end them, at the worst case",
                len(self._queue),
                self._server.location,
            )
            self._queue.clear()
            self._wake()

    async def _flush(self) -> None:
        if self._hurry is not None:
            self._hurry.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_S):
                while self._queue or self._delivering:
                    await self._deliver()
                    await asyncio.sleep(0.005)

    async def _deliver(self) -> None:
        if self._delivering:
            return
        self._delivering = True
        self._hurry = asyncio.Event()
        pause = FIRST_PAUSE_S
        try:
            while self._queue:
                if await self._deliver_some():
                    pause = FIRST_PAUSE_S
                    continue
                self._hurry.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause * random.uniform(0.75, 1.0)):  # noqa: S311 - unlike the others'
                        await self._hurry.wait()
                pause = min(LONGEST_PAUSE_S, 2 * pause)
        finally:
            self._delivering = False
        self.begin()  # one may have come in between

    async def _deliver_some(self) -> bool:
        """Whether the server could be asked. What it could not take stays, in its order."""
        some = [self._queue[i] for i in range(min(TOGETHER, len(self._queue)))]
        asked = [self._server.run(self._script, *each.words(), lane=_LANE) for each in some]
        replies = await asyncio.gather(*asked, return_exceptions=True)
        left = []
        for ending, reply in zip(some, replies, strict=True):
            self._queue.popleft()
            if isinstance(reply, ServerAway):
                left.append(ending)
            elif isinstance(reply, Exception) and not self._warned:
                self._warned = True
                log.warning("%s; the hold of this call ends with its lease", reply)
        self._queue.extendleft(reversed(left))
        return not left
