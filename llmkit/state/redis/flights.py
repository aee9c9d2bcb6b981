"""Calls in flight on several machines: who makes one holds a lease on its key, and renews it while it lives.

What arrives is handed on only where somebody follows. A follower says so by a key of its own, for which the machine
that makes the calls looks from time to time, for all its calls in one command.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import threading
import weakref
from typing import TYPE_CHECKING, Any

from llmkit.errors import StoreError
from llmkit.redaction import tidy
from llmkit.state.redis.connection import Script, ServerAway, short
from llmkit.state.shared import FlightFailed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from llmkit.clock import Clock
    from llmkit.state.redis.connection import Server

__all__ = ["RedisFlights"]

log = logging.getLogger("llmkit")

LEASE_S = 10.0
RENEW_S = 3.0
LOOK_S = 0.1  # for followers
POLL_S = 0.03  # a follower asks for more
LONGEST_POLL_S = 0.25  # when nothing has come for a while
RELEASE_S = 0.25  # no call waits longer for its end to be known
LEFT_S = 10.0  # what was published, and a failure, stay so long after the end
MOST_BYTES = 4 * 2**20  # of one call that are handed on
PIECE_BYTES = 64 * 2**10
MOST_READ = 200  # batches of chunks that one look brings
MOST_FAILURE = 20_000  # characters

_LANE = "flights"

_NAMES = """
local FLIGHT, FOLLOWED = P .. 'flight:' .. ARGV[1], P .. 'followed:' .. ARGV[1]
local CHUNKS, FAILURE = P .. 'chunks:' .. ARGV[1] .. ':', P .. 'failure:' .. ARGV[1] .. ':'
"""
_CLAIM = Script(
    "claim a call",
    _NAMES
    + """
local holder = redis.call('GET', FLIGHT)
if holder and holder ~= ARGV[2] then return 0 end
redis.call('SET', FLIGHT, ARGV[2], 'PX', ARGV[3])
return 1
""",
)
# Pairs of key and token, after how long each is good from now on. What another has taken meanwhile is his.
_BEAT = Script(
    "renew claims",
    """
local found = {}
for i = 2, #ARGV, 2 do
    local name, holder = P .. 'flight:' .. ARGV[i], redis.call('GET', P .. 'flight:' .. ARGV[i])
    if ARGV[1] ~= '' and (not holder or holder == ARGV[i + 1]) then
        redis.call('SET', name, ARGV[i + 1], 'PX', ARGV[1])
    end
    found[#found + 1] = redis.call('EXISTS', P .. 'followed:' .. ARGV[i])
end
return found
""",
)
_PUBLISH = Script(
    "publish chunks",
    _NAMES
    + """
for i = 4, #ARGV do redis.call('RPUSH', CHUNKS .. ARGV[2], ARGV[i]) end
redis.call('PEXPIRE', CHUNKS .. ARGV[2], ARGV[3])
return 1
""",
)
_RELEASE = Script(
    "release a call",
    _NAMES
    + """
if redis.call('GET', FLIGHT) == ARGV[2] then redis.call('DEL', FLIGHT) end
if ARGV[4] and redis.call('EXISTS', FOLLOWED) == 1 then redis.call('SET', FAILURE .. ARGV[2], ARGV[4], 'PX', ARGV[3]) end
redis.call('PEXPIRE', CHUNKS .. ARGV[2], ARGV[3])
return 1
""",
)
_FOLLOW = Script(
    "follow a call",
    _NAMES
    + """
local token, from, most, keep = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[5]
local holder = redis.call('GET', FLIGHT)
if token == '' then
    if not holder then return {false} end
    token = holder
end
redis.call('SET', FOLLOWED, '1', 'PX', keep)
local alive = holder == token and 1 or 0
local chunks = redis.call('LRANGE', CHUNKS .. token, from, from + most - 1)
return {token, alive, chunks, redis.call('GET', FAILURE .. token)}
""",
)


class RedisFlights:
    """`llmkit.state.shared.Flights` on a Redis server."""

    def __init__(self, server: Server, clock: Clock) -> None:
        self._server = server
        self._clock = clock
        self.location = server.location
        self._start_afresh()
        server.join(self)

    def _start_afresh(self) -> None:
        self._calls: dict[str, _Flight] = {}
        self._beating = False
        self._warned = False

    async def claim(self, key: str) -> RedisClaim | None:
        flight = _Flight(short(key))
        try:
            claimed = await self._server.run(_CLAIM, flight.key, flight.token, _ms(LEASE_S), lane=_LANE)
        except asyncio.CancelledError:
            self._end(flight)
            raise
        except StoreError as error:
            self._warn(error)
            claimed = 1  # the call is made, if perhaps twice
        if claimed != 1:
            return None
        self._calls[flight.token] = flight
        self._begin_beating()
        return RedisClaim(self, flight)

    async def follow(self, key: str) -> AsyncIterator[list[tuple[str, str]]]:
        token: bytes = b""
        seen, pause = 0, POLL_S
        while True:
            words = (short(key), token, str(seen), str(MOST_READ), _ms(LEASE_S))
            try:
                reply = await self._server.run(_FOLLOW, *words, lane=_LANE)
            except StoreError as error:
                self._warn(error)
                return
            if not isinstance(reply, list) or len(reply) != 4 or not isinstance(reply[0], bytes):
                return
            token, alive, batches, failure = reply
            for batch in batches:
                seen += 1
                if pieces := _pieces(batch):
                    yield pieces
            if failure is not None:
                raise FlightFailed(failure[:MOST_FAILURE].decode("utf-8", "replace"))
            if batches:
                pause = POLL_S
            elif alive != 1:
                return
            else:
                await self._clock.sleep(pause)
                pause = min(LONGEST_POLL_S, pause * 1.3)

    async def aclose(self) -> None:
        for flight in list(self._calls.values()):
            self._end(flight)
        await self._server.leave(self)

    # -- what claims ask for -----------------------------------------------------------------------------------------

    def _publish(self, flight: _Flight) -> None:
        batches = flight.take()
        if batches:
            with contextlib.suppress(StoreError):
                self._server.post(_PUBLISH, flight.key, flight.token, _ms(600), *batches, lane=_LANE)

    def _end(self, flight: _Flight) -> None:
        self._calls.pop(flight.token, None)
        self._server.post(_RELEASE, flight.key, flight.token, _ms(LEFT_S), lane=_LANE)

    async def _release(self, flight: _Flight, failure: str | None) -> None:
        """The same, and wait a moment for it: whoever asks next is to find the key free."""
        self._calls.pop(flight.token, None)
        words = () if failure is None else (failure[:MOST_FAILURE].encode("utf-8", "backslashreplace"),)
        with contextlib.suppress(StoreError, TimeoutError):
            async with asyncio.timeout(RELEASE_S):
                await self._server.run(_RELEASE, flight.key, flight.token, _ms(LEFT_S), *words, lane=_LANE)

    def _warn(self, error: StoreError) -> None:
        if not self._warned:
            self._warned = True
            log.warning("%s; identical calls on several machines may each be made", tidy(error.message))

    # -- renewing ----------------------------------------------------------------------------------------------------

    def _begin_beating(self) -> None:
        if not self._beating:
            self._beating = True
            self._server.engine.start(_beats(weakref.ref(self)))

    async def _beat(self, *, renew: bool) -> None:
        flights = [flight for flight in list(self._calls.values()) if renew or (flight.waiting and not flight.followed)]
        if not flights:
            return
        words = [word for flight in flights for word in (flight.key, flight.token)]
        try:
            reply = await self._server.run(_BEAT, _ms(LEASE_S) if renew else "", *words, lane=_LANE)
        except ServerAway:
            return
        except StoreError as error:
            self._warn(error)
            return
        for flight, followed in zip(flights, reply if isinstance(reply, list) else (), strict=False):
            if followed == 1 and not flight.followed:
                flight.followed = True
                self._publish(flight)


def _beats(of: weakref.ref[RedisFlights]) -> Any:
    """The work of renewing, as long as there is something to renew; it keeps nothing alive."""

    async def beat() -> None:
        due = 0.0
        try:
            while (flights := of()) is not None and flights._calls:
                now = asyncio.get_running_loop().time()
                if renew := now >= due:
                    due = now + RENEW_S
                await flights._beat(renew=renew)
                del flights
                await asyncio.sleep(LOOK_S)
        finally:
            flights = of()
            if flights is not None:
                flights._beating = False
        if flights is not None and flights._calls:  # one has just come
            flights._begin_beating()

    return beat


class _Flight:
    """One call: what of it has not been handed on yet, from the first chunk on."""

    __slots__ = ("_full", "_lock", "_pieces", "_size", "followed", "key", "token")

    def __init__(self, key: bytes) -> None:
        self.key = key
        self.token = secrets.token_hex(8)
        self.followed = False
        self._pieces: list[tuple[str, str]] = []
        self._size = 0
        self._full = False
        self._lock = threading.Lock()

    @property
    def waiting(self) -> bool:
        return bool(self._pieces)

    def add(self, pieces: list[tuple[str, str]]) -> None:
        with self._lock:
            if self._full:
                return
            self._pieces += pieces
            self._size += sum(len(text) + len(reasoning) + 8 for text, reasoning in pieces)
            self._full = self._size > MOST_BYTES

    def take(self) -> list[bytes]:
        """What waits, as JSON in batches of a size that a follower can read."""
        with self._lock:
            pieces, self._pieces = self._pieces, []
        batches: list[bytes] = []
        some: list[tuple[str, str]] = []
        size = 0
        for piece in pieces:
            some.append(piece)
            size += len(piece[0]) + len(piece[1])
            if size > PIECE_BYTES:
                batches.append(json.dumps(some).encode())
                some, size = [], 0
        if some:
            batches.append(json.dumps(some).encode())
        return batches


class RedisClaim:
    """`llmkit.state.shared.Claim`. One that is dropped without `release` is released."""

    def __init__(self, flights: RedisFlights, flight: _Flight) -> None:
        self._flights = flights
        self._flight = flight
        self._drop = weakref.finalize(self, flights._end, flight)
        self._drop.atexit = False

    @property
    def followed(self) -> bool:
        return self._flight.followed

    async def publish(self, pieces: list[tuple[str, str]]) -> None:
        self._flight.add(pieces)
        if self._flight.followed:
            self._flights._publish(self._flight)

    async def release(self, failure: str | None = None) -> None:
        if self._drop.detach() is not None:
            if self._flight.followed:
                self._flights._publish(self._flight)
            await self._flights._release(self._flight, failure)


def _pieces(batch: Any) -> list[tuple[str, str]]:
    """The chunks of one batch; none where it is not what llmkit wrote."""
    try:
        found = [(text, reasoning) for text, reasoning in json.loads(batch)]
    except (TypeError, ValueError, RecursionError):
        return []
    return found if all(isinstance(each, str) for pair in found for each in pair) else []


def _ms(seconds: float) -> str:
    return str(int(seconds * 1000))
