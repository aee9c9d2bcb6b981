"""What is shared, and by what: one line of configuration decides it.

With ``sqlite`` the files of this machine do, with ``memory`` this process alone, and with ``redis://…`` a server does
for several machines. The ledger's rows stay on this machine whatever is chosen (`llmkit.state.store.ledger_path`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmkit.state.store import is_redis

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llmkit.account import Accounts
    from llmkit.clock import Clock
    from llmkit.state.redis.connection import Server
    from llmkit.state.shared import Circuits, Entries, Flights

__all__ = ["Shared", "open_shared"]


class Shared:
    """What is shared through one Redis server, over one way to it. Nothing connects before it is used.

    Attributes:
        location: the server's address, without user and password.
    """

    def __init__(self, server: Server, clock: Clock) -> None:
        from llmkit.state.redis.accounts import RedisAccounts
        from llmkit.state.redis.circuits import RedisCircuits
        from llmkit.state.redis.flights import RedisFlights

        self._server = server
        self._clock = clock
        self.location = server.location
        self.accounts: Accounts = RedisAccounts(server, clock)
        self.flights: Flights = RedisFlights(server, clock)
        self.circuits: Circuits = RedisCircuits(server, clock)

    def entries(self, *, max_bytes: int) -> Entries:
        """The answers on the server, at most ``max_bytes`` of them."""
        from llmkit.state.redis.entries import RedisEntries

        return RedisEntries(self._server, max_bytes=max_bytes, clock=self._clock)

    async def aclose(self) -> None:
        """Deliver what waits, for a few seconds, and let go of connections. A later use connects again."""
        await self.accounts.aclose()
        await self.flights.aclose()
        await self.circuits.aclose()
        await self._server.aclose()


def open_shared(url: str, clock: Clock, environ: Mapping[str, str]) -> Shared | None:
    """What machines share through the server at ``url``; None where that is no server's.

    A password is looked for in ``url``, then in ``environ``.

    Raises:
        ConfigError: ``url`` is no address of a server, or the package for it is missing.
    """
    if not is_redis(url):
        return None
    from llmkit.state.redis.connection import Server

    return Shared(Server(url, environ), clock)
