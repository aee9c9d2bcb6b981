"""What a leader's process hands to others: the pieces of its reply, a few times a second at most.

Publishing costs next to nothing while nobody follows: one timer of the event loop looks after all of its outlets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmkit.shield import begun

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from llmkit.clock import Clock, TimerHandle
    from llmkit.reply import Chunk
    from llmkit.state.shared import Claim

__all__ = ["NO_CLAIM", "NO_OUTLET", "Outlet", "Rounds"]

PUBLISH_S = 0.05  # between two looks whether another process follows, while there is something new
SILENT_S = 0.5  # the same while there is nothing new


class _NoClaim:
    """The claim where there is no other process to share with."""

    followed = False

    async def publish(self, pieces: list[tuple[str, str]]) -> None:
        """Nobody hears it."""

    async def release(self, failure: str | None = None) -> None:
        """Nobody waits for it."""


NO_CLAIM = _NoClaim()


class Rounds:
    """Looks after the outlets of one event loop, all of them in one timer."""

    __slots__ = ("_timer", "clock", "outlets")

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.outlets: set[Outlet] = set()
        self._timer: TimerHandle | None = None

    def add(self, outlet: Outlet) -> None:
        self.outlets.add(outlet)
        if self._timer is None:
            self._timer = self.clock.call_later(PUBLISH_S, self._round)

    def _round(self) -> None:
        self._timer = None
        now = self.clock.now()
        for outlet in list(self.outlets):
            if outlet.due <= now:
                outlet.look(now)
        if self.outlets and self._timer is None:
            self._timer = self.clock.call_later(PUBLISH_S, self._round)


def _nothing() -> int:
    """Nothing has arrived, and nobody is told."""
    return 0


class Outlet:
    """Publishes what arrives to other processes, a few times a second at most.

    Attributes:
        due: when to look again whether somebody follows.
    """

    __slots__ = ("_closed", "_looked", "_pause", "_pending", "_publishing", "_rounds", "_seen", "claim", "due")

    def __init__(self, claim: Claim, rounds: Rounds) -> None:
        self.claim = claim
        self.due = 0.0
        self._rounds = rounds
        self._pause = PUBLISH_S
        self._seen = -1
        self._looked: Callable[[], int] = _nothing
        self._pending: list[tuple[str, str]] = []
        self._publishing: asyncio.Task[None] | None = None
        self._closed = False

    def open(self, looked: Callable[[], int]) -> None:
        """The reply has begun: from now on, see whether somebody follows, and tell ``looked``, which says how much there
        is.
        """
        self._looked = looked
        self._rounds.add(self)

    def heard(self, batch: list[Chunk]) -> None:
        self._pending += [(chunk.text, chunk.reasoning) for chunk in batch]
        self.due = 0.0

    def look(self, now: float) -> None:
        """Publish what is new, and see whether somebody follows."""
        if self._publishing is None:
            pieces, self._pending = self._pending, []
            self._publishing = begun(self.claim.publish(pieces))
            if self._publishing is not None:
                self._publishing.add_done_callback(self._published)
        arrived = self._looked()
        self._pause = PUBLISH_S if arrived != self._seen else min(2 * self._pause, SILENT_S)
        self._seen = arrived
        self.due = now + self._pause - 1e-6 if not self._pending else 0.0

    def _published(self, _: asyncio.Task[None]) -> None:
        self._publishing = None

    async def close(self, failure: str | None = None) -> None:
        """It has ended: publish the rest, where somebody follows, and release the claim."""
        if self._closed:
            return
        self._closed = True
        self._rounds.outlets.discard(self)
        claim, self._looked = self.claim, _nothing
        if self._publishing is not None:
            await self._publishing
        if self._pending and claim.followed:
            await claim.publish(self._pending)
        await (claim.release() if failure is None else claim.release(failure))

    def drop(self) -> None:
        """Its event loop is gone: release the claim from this one."""
        self._closed = True
        self._rounds.outlets.discard(self)
        if (rest := begun(self.claim.release())) is not None:
            _RELEASES.add(rest)
            rest.add_done_callback(_RELEASES.discard)


class _NoOutlet(Outlet):
    """Where there is no other process to publish to."""

    def __init__(self) -> None:
        self.claim = NO_CLAIM

    def open(self, looked: Callable[[], int]) -> None:
        """Nobody follows."""

    def heard(self, batch: list[Chunk]) -> None:
        """Nobody hears it."""

    async def close(self, failure: str | None = None) -> None:
        """Nobody waits for it."""

    def drop(self) -> None:
        """There is nothing to release."""


NO_OUTLET = _NoOutlet()

_RELEASES: set[asyncio.Task[None]] = set()  # a loop keeps only weak references to its tasks
