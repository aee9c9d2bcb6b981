"""Circuits that processes on one machine share: a breaker that opened in one kernel is open in all."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from llmkit.circuit import CircuitState
from llmkit.lock import new_lock
from llmkit.state.owner import is_gone
from llmkit.state.store import fitting_text

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable

    from llmkit.clock import Clock
    from llmkit.state.database import Database, Work

__all__ = ["MemoryCircuits", "SQLiteCircuits"]

log = logging.getLogger("llmkit")

T = TypeVar("T")

LONGEST_PROBE_S = 3600.0  # a probe that seems to last longer was claimed by a clock that has been put right since
MOST = 1000  # circuits that are read

_SELECT = f"SELECT {', '.join(CircuitState._fields)} FROM circuits"  # noqa: S608 - all names are our own
_REPLACE = f"INSERT OR REPLACE INTO circuits ({', '.join(CircuitState._fields)}) VALUES (?, ?, ?, ?, ?, ?, ?)"  # noqa: S608


class MemoryCircuits:
    """`llmkit.state.shared.Circuits` for breakers of one process."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = new_lock()
        self._states: dict[str, CircuitState] = {}
        self._probes: dict[str, dict[str, float]] = {}

    async def read(self, endpoint: str) -> CircuitState | None:
        return self._states.get(endpoint)

    async def read_all(self) -> list[CircuitState]:
        return list(self._states.values())

    async def write(self, state: CircuitState) -> bool:
        with self._lock:
            before = self._states.get(state.endpoint)
            if (before.version if before is not None else 0) != state.version - 1:
                return False
            self._states[state.endpoint] = state
            return True

    async def claim_probe(self, endpoint: str, owner: str, until: float, probes: int) -> bool:
        now = self._clock.time()
        with self._lock:
            claims = self._probes.setdefault(endpoint, {})
            claims.pop(owner, None)
            for each in [each for each, ends in claims.items() if not now < ends <= now + LONGEST_PROBE_S]:
                del claims[each]
            if until > now and len(claims) >= probes:
                return False
            if until > now:
                claims[owner] = until
            return True

    async def aclose(self) -> None:
        """There is nothing to let go of."""


class SQLiteCircuits:
    """`llmkit.state.shared.Circuits` in the ledger's file. Reading one takes about 10 µs, on the caller's thread.

    Args:
        database: gives the file, opened if it is not yet; None where rows go to no file: then nothing is shared, and
            every write and every claim succeeds.
    """

    def __init__(self, database: Callable[[], Database | None], clock: Clock) -> None:
        self._database = database
        self._clock = clock
        self._warned = False

    async def read(self, endpoint: str) -> CircuitState | None:
        found = self._glance(f"{_SELECT} WHERE endpoint = ?", fitting_text(endpoint))
        return self._state(found[0]) if found else None

    async def read_all(self) -> list[CircuitState]:
        found = [self._state(row) for row in self._glance(f"{_SELECT} LIMIT ?", MOST)]
        return [state for state in found if state is not None]

    async def write(self, state: CircuitState) -> bool:
        last = None if state.last_failure is None else fitting_text(state.last_failure)
        fitted = state._replace(endpoint=fitting_text(state.endpoint), last_failure=last)
        return await self._run(lambda connection: self._write(connection, fitted), otherwise=True)

    def _write(self, connection: sqlite3.Connection, state: CircuitState) -> bool:
        row = connection.execute(f"{_SELECT} WHERE endpoint = ?", (state.endpoint,)).fetchone()
        before = None if row is None else self._state(row)
        if (before.version if before is not None else 0) != state.version - 1:
            return False
        connection.execute(_REPLACE, tuple(state))
        return True

    async def claim_probe(self, endpoint: str, owner: str, until: float, probes: int) -> bool:
        endpoint = fitting_text(endpoint)
        claimed = await self._claim(endpoint, owner, until, probes, gone=())
        if not claimed and (gone := await self._gone(endpoint)):
            claimed = await self._claim(endpoint, owner, until, probes, gone=gone)
        return claimed

    async def _claim(self, endpoint: str, owner: str, until: float, probes: int, *, gone: tuple[str, ...]) -> bool:
        now = self._clock.time()

        def claim(connection: sqlite3.Connection) -> bool:
            execute = connection.execute
            execute(
                "DELETE FROM probes WHERE endpoint = ? AND (owner = ? OR NOT (until > ? AND until <= ?))",
                (endpoint, owner, now, now + LONGEST_PROBE_S),
            )
            for each in gone:
                execute("DELETE FROM probes WHERE endpoint = ? AND owner = ?", (endpoint, each))
            if until <= now:
                return True
            taken = execute("SELECT count(*) FROM probes WHERE endpoint = ?", (endpoint,)).fetchone()[0]
            if taken >= probes:
                return False
            execute("INSERT INTO probes (endpoint, owner, until) VALUES (?, ?, ?)", (endpoint, owner, until))
            return True

        return await self._run(claim, otherwise=True)

    async def _gone(self, endpoint: str) -> tuple[str, ...]:
        """The probes whose processes have died."""
        owners = [
            str(row[0]) for row in self._glance("SELECT owner FROM probes WHERE endpoint = ? LIMIT 100", endpoint)
        ]
        return await asyncio.to_thread(_those_gone, owners)  # some systems take their time to tell

    async def aclose(self) -> None:
        """The file is the ledger's."""

    def _glance(self, sql: str, *given: Any) -> list[Any]:
        database = self._database()
        return [] if database is None else database.glance(sql, given)

    async def _run(self, work: Work[T], *, otherwise: T) -> T:
        database = self._database()
        if database is None:
            return otherwise
        done = database.run(work)
        return await asyncio.wrap_future(done) if isinstance(done, Future) else done

    def _state(self, row: tuple[Any, ...]) -> CircuitState | None:
        state = CircuitState.checked(*row)
        if state is None and not self._warned:
            self._warned = True
            log.warning("a circuit in the ledger is not what llmkit wrote; passed over")
        return state


def _those_gone(owners: list[str]) -> tuple[str, ...]:
    return tuple(owner for owner in owners if is_gone(owner.partition("#")[0]))
