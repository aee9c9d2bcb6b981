"""What kernels and machines share beside the ledger: answers, calls in flight, circuits.

Protocols only. Each is kept by files on one machine (`llmkit.state.entries`, `llmkit.state.flights`), and by Redis
between several (`llmkit.state.redis`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from llmkit.circuit import CircuitState
from llmkit.flight import FlightFailed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

__all__ = ["CircuitState", "Circuits", "Claim", "Contents", "Entries", "FlightFailed", "Flights"]


class Contents(NamedTuple):
    """How much is stored: ``entries`` in number, ``size`` in bytes."""

    entries: int
    size: int


class Entries(Protocol):
    """Answers by key. Values are opaque bytes; a value that cannot be read is not there.

    Every method raises `llmkit.StoreError` where the store cannot be used. Safe from any thread and event loop.
    """

    location: str

    async def get(self, key: str) -> tuple[bytes, float | None] | None:
        """The value and when it expires (epoch seconds; None never); None where there is none, or it has expired."""

    async def peek(self, key: str) -> tuple[bytes, float | None] | None:
        """What `get` would give. Nothing is changed by it: it is no use of the value, and nothing is removed."""

    async def put(self, key: str, value: bytes, *, namespace: str, expires: float | None) -> None:
        """Store it, in place of what was there, and remove the least recently used while the store is over its size.

        A value larger than the whole store may be is not stored.
        """

    async def delete(self, key: str) -> None:
        """Remove it, if it is there."""

    async def clear(self, namespace: str | None = None) -> int:
        """Remove all, or all of one namespace, so that nothing of it can be read from the disk. Returns how many."""

    async def renew(self) -> None:
        """Begin a new `generation`: copies that others keep in memory are not to be used any more."""

    async def generation(self) -> int:
        """Grows with each `clear` and `renew`, by whatever process."""

    async def contents(self, namespace: str | None = None) -> Contents: ...

    async def aclose(self) -> None: ...


class Claim(Protocol):
    """The right to make a call that others wait for. Ends with `release`, or with the process that holds it."""

    async def publish(self, pieces: list[tuple[str, str]]) -> None:
        """Hand chunks (text, reasoning), in their order, to whoever follows; cheap where nobody does. Never fails."""

    @property
    def followed(self) -> bool:
        """Whether somebody in another process is known to follow."""

    async def release(self, failure: str | None = None) -> None:
        """The call has ended, well or not; what is worth it has been stored. Never fails. Harmless when repeated.

        ``failure``: what followers should fail with, too, where it would be no use to ask again; opaque to the store.
        """


class Flights(Protocol):
    """Which calls are in flight in other processes, by key."""

    async def claim(self, key: str) -> Claim | None:
        """The right to make this call; None where another process makes it just now.

        Where claims cannot be kept (no lock file, no server) everybody gets one, and a warning is logged once.
        """

    def follow(self, key: str) -> AsyncIterator[list[tuple[str, str]]]:
        """What its maker publishes, from the first chunk on; ends when the claim does, for whatever reason.

        The pieces may be fewer than were made, when the end came before the rest was seen: the answer is in the entries.

        Raises:
            FlightFailed: its maker released it with a ``failure``.
        """

    async def aclose(self) -> None: ...


class Circuits(Protocol):
    """The circuits of endpoints, by `llmkit.endpoint.Endpoint.key` joined with spaces. Each method raises `StoreError`."""

    async def read(self, endpoint: str) -> CircuitState | None: ...

    async def read_all(self) -> list[CircuitState]: ...

    async def write(self, state: CircuitState) -> bool:
        """Store it if the stored version is ``state.version - 1`` (0 where there is none); else return False."""

    async def claim_probe(self, endpoint: str, owner: str, until: float, probes: int) -> bool:
        """One of ``probes`` rights to try a circuit that is half open; it lapses at ``until`` (epoch seconds).

        ``owner`` is the process, a ``#``, and what tells its probes apart. An ``until`` that has passed gives it back.
        """

    async def aclose(self) -> None: ...
