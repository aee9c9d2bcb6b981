"""Circuits on a Redis server: a breaker that opened on one machine is open on all.

One hash has them all, by endpoint: the version, and the rest as JSON. Times are those of the machines that write them,
as everywhere in `llmkit.state.shared.CircuitState`.
"""

from __future__ import annotations

import asyncio
import json
import logging
from typing import TYPE_CHECKING, Any

from llmkit.circuit import CircuitState
from llmkit.state.owner import is_gone
from llmkit.state.redis.connection import Script, short

if TYPE_CHECKING:
    from llmkit.clock import Clock
    from llmkit.state.redis.connection import Server

__all__ = ["RedisCircuits"]

log = logging.getLogger("llmkit")

_LANE = "circuits"
_LONGEST = 2_000  # bytes of one circuit
_MOST = 1_000  # circuits that are read
_LONGEST_PROBE_S = 3600

_READ = Script(
    "read a circuit",
    f"""
local name = P .. 'circuits'
if redis.call('HSTRLEN', name, ARGV[1]) > {_LONGEST} then return false end
return redis.call('HGET', name, ARGV[1])
""",
)
_READ_ALL = Script(
    "read circuits",
    f"""
local found, cursor = {{}}, '0'
repeat
    local part = redis.call('HSCAN', P .. 'circuits', cursor, 'COUNT', 100)
    cursor = part[1]
    for i = 2, #part[2], 2 do
        if #part[2][i] <= {_LONGEST} then found[#found + 1] = part[2][i] end
    end
until cursor == '0' or #found >= {_MOST}
return found
""",
)
_WRITE = Script(
    "write a circuit",
    """
local name, endpoint, version, text = P .. 'circuits', ARGV[1], tonumber(ARGV[2]), ARGV[3]
local before = redis.call('HGET', name, endpoint)
if before == text then return 1 end  -- this very write, whose answer was lost
local stored = tonumber(before and string.match(before, '^(%d+) ') or '0') or 0
if stored ~= version - 1 and before ~= ARGV[4] then return before or 0 end
redis.call('HSET', name, endpoint, text)
return 1
""",
)
# An owner whose end has passed gives its probe back. What was claimed for longer than any call takes was claimed by a
# clock that has been put right since. Refused, it says who has the probes.
_PROBE = Script(
    "claim a probe",
    f"local LONGEST = {_LONGEST_PROBE_S}"
    """
local name, owner, now, ends, probes = P .. 'probes:' .. ARGV[1], ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5])
for i = 6, #ARGV do redis.call('ZREM', name, ARGV[i]) end
redis.call('ZREM', name, owner)
redis.call('ZREMRANGEBYSCORE', name, '-inf', now)
redis.call('ZREMRANGEBYSCORE', name, '(' .. int(math.ceil(tonumber(now) + LONGEST)), '+inf')
if tonumber(ends) <= tonumber(now) then return 1 end
if redis.call('ZCARD', name) >= probes then return redis.call('ZRANGE', name, 0, 99) end
redis.call('ZADD', name, ends, owner)
redis.call('PEXPIRE', name, LONGEST * 1000)
return 1
""",
)


class RedisCircuits:
    """`llmkit.state.shared.Circuits` on a Redis server."""

    def __init__(self, server: Server, clock: Clock) -> None:
        self._server = server
        self._clock = clock
        self._warned = False
        self.location = server.location
        server.join(self)

    def _start_afresh(self) -> None:
        """A forked child has nothing of its own to forget."""

    async def read(self, endpoint: str) -> CircuitState | None:
        reply = await self._server.run(_READ, short(endpoint), lane=_LANE)
        state = self._state(reply)
        return state if state is not None and state.endpoint == endpoint else None

    async def read_all(self) -> list[CircuitState]:
        reply = await self._server.run(_READ_ALL, lane=_LANE)
        states = [self._state(each) for each in reply] if isinstance(reply, list) else []
        return [state for state in states if state is not None]

    async def write(self, state: CircuitState) -> bool:
        fields = (
            state.endpoint,
            state.state,
            state.reopens_at,
            state.failures_in_row,
            state.successes,
            None if state.last_failure is None else state.last_failure[:300],
        )
        text = f"{state.version} {json.dumps(fields)}"
        words = (short(state.endpoint), str(state.version), text)
        reply = await self._server.run(_WRITE, *words, lane=_LANE)
        if isinstance(reply, bytes) and state.version == 1 and _parsed(reply) is None:
            reply = await self._server.run(_WRITE, *words, reply, lane=_LANE)  # instead of what is no circuit
        return bool(reply == 1)

    async def claim_probe(self, endpoint: str, owner: str, until: float, probes: int) -> bool:
        now = self._clock.time()
        words = (short(endpoint), short(owner), repr(now), repr(float(until)), str(probes))
        reply = await self._server.run(_PROBE, *words, lane=_LANE)
        if isinstance(reply, list) and (gone := await asyncio.to_thread(_those_gone, reply)):
            reply = await self._server.run(_PROBE, *words, *gone, lane=_LANE)
        return bool(reply == 1)

    async def aclose(self) -> None:
        await self._server.leave(self)

    def _state(self, stored: Any) -> CircuitState | None:
        """What was stored; None, and one warning, where it is no circuit."""
        if stored is None:
            return None
        state = _parsed(stored)
        if state is None and not self._warned:
            self._warned = True
            log.warning("a circuit on the Redis server %s is not what llmkit wrote; passed over", self.location)
        return state


def _parsed(stored: Any) -> CircuitState | None:
    try:
        version, _, text = stored.decode().partition(" ")
        endpoint, state, *rest = json.loads(text)
        return CircuitState.checked(endpoint, state, int(version), *rest)
    except (AttributeError, TypeError, ValueError, RecursionError):
        return None


def _those_gone(claims: list[Any]) -> list[bytes]:
    """The claims of processes that have ended. On a host of the same name they may live: then one probe is too many."""
    return [
        each
        for each in claims
        if isinstance(each, bytes) and is_gone(each.decode("utf-8", "replace").partition("#")[0])
    ]
