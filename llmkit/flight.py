"""Identical calls in flight at once: one of them asks, the others follow it.

The first caller of a key *leads*: it asks the provider, pays, and what arrives is shared as it arrives. The others
*follow*: a streaming follower streams, one that waits for the whole waits for the end. If the leader dies, exactly one
follower takes over and asks. In one process that works across tasks, threads, event loops and clients; across
processes through the `Flights` that is handed in (`llmkit.state.shared`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from llmkit.call import Call
    from llmkit.clock import Clock
    from llmkit.reply import Outcome, Reply
    from llmkit.state.shared import Flights

__all__ = ["Asking", "FlightFailed", "SingleFlight"]


class FlightFailed(Exception):
    """The call that was followed has failed. ``args[0]`` is what it was released with, unchecked."""


class Asking(Protocol):
    """What the caller of `SingleFlight.share` knows of its one call."""

    async def look(self) -> Reply | None:
        """A hit, as the reply to this call, if the answer has been stored meanwhile. Never fails."""

    async def ask(self) -> Reply:
        """Ask below; this is where money is spent."""

    async def store(self, outcome: Outcome) -> None:
        """Store the answer if it is worth it: the reply of `ask` has ended, and followers are told next. Never fails."""


class SingleFlight:
    """Calls that are shared while they are in flight.

    Args:
        location: what store the answers are in: callers with the same location and key share.
        flights: the calls in flight in other processes; None where there are none to share with.
    """

    def __init__(self, location: str, clock: Clock, flights: Flights | None = None) -> None:
        self._location = location
        self._clock = clock
        self._flights = flights

    async def share(self, key: str, call: Call, asking: Asking) -> Reply | None:
        """Lead or follow, after a miss; for ``call.cache`` of ``use``, ``refresh`` and ``only``.

        A follower's reply has the source ``coalesced``, no attempts and no cost, and ``trail.saved`` is
        what the leader's call had cost. None for ``only``, where the answer is
        not stored and nobody is asking for it.

        Raises:
            LLMKitError: what `Asking.ask` raised, here or with the leader; a time limit of this call's own.
        """
        raise NotImplementedError

    async def aclose(self) -> None:
        """End what is read on for others although its own reader has left. Before providers and ledger are closed."""
