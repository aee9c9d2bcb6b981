"""Answers on a Redis server, for several machines.

Beside each value stand its size and namespace, in one hash for all, so that sums are right even when the server has
dropped a value by itself. What was used last is counted, not timed: two uses in one millisecond have an order.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from llmkit.errors import StoreError
from llmkit.state.redis.connection import Script, ServerAway, short
from llmkit.state.shared import Contents

if TYPE_CHECKING:
    from llmkit.clock import Clock
    from llmkit.state.redis.connection import Server

__all__ = ["MAX_VALUE", "RedisEntries"]

log = logging.getLogger("llmkit")

MAX_VALUE = 16 * 2**20
"""Bytes of one value; a larger one is not stored: it would hold up everybody else's."""

_LANE = "answers"
_FOREVER_MS = 400 * 86_400_000  # an entry without an end goes when it is the least recently used, or after this
_AT_ONCE = 500  # entries that one command removes

_SHELF = """
local USED, EXPIRY, META = P .. 'entries:used', P .. 'entries:expiry', P .. 'entries:meta'
local TOTALS, GENERATION, TICK = P .. 'entries:totals', P .. 'entries:generation', P .. 'entries:tick'

local function remove(key)
    redis.call('UNLINK', P .. 'entry:' .. key)
    redis.call('ZREM', USED, key)
    redis.call('ZREM', EXPIRY, key)
    local meta = redis.call('HGET', META, key)
    if not meta then return false end
    redis.call('HDEL', META, key)
    local size, space = string.match(meta, '^(%d+) (.*)$')
    if not size then return false end
    redis.call('HINCRBY', TOTALS, 'size', -tonumber(size))
    if redis.call('HINCRBY', TOTALS, 'size:' .. space, -tonumber(size)) <= 0 then
        redis.call('HDEL', TOTALS, 'size:' .. space)
    end
    redis.call('SREM', P .. 'entries:of:' .. space, key)
    return true
end

local function expire()
    for _, key in ipairs(redis.call('ZRANGEBYSCORE', EXPIRY, '-inf', int(NOW), 'LIMIT', 0, 100)) do remove(key) end
end

local function use(key) redis.call('ZADD', USED, redis.call('INCR', TICK), key) end
"""

_GET = Script(
    "get an answer",
    _SHELF
    + """
local name = P .. 'entry:' .. ARGV[1]
local size = redis.call('HSTRLEN', name, 'value')
if size == 0 or size > tonumber(ARGV[2]) then
    if redis.call('HEXISTS', META, ARGV[1]) == 1 then remove(ARGV[1]) end
    return false
end
use(ARGV[1])
return redis.call('HMGET', name, 'value', 'expires')
""",
)

_PEEK = Script(
    "look at an answer",
    _SHELF
    + """
local name = P .. 'entry:' .. ARGV[1]
local size = redis.call('HSTRLEN', name, 'value')
if size == 0 or size > tonumber(ARGV[2]) then return false end
return redis.call('HMGET', name, 'value', 'expires')
""",
)

_PUT = Script(
    "put an answer",
    _SHELF
    + """
local key, value, space, expires, keep, most = ARGV[1], ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5]), tonumber(ARGV[6])
remove(key)
expire()
if #value > most then return 0 end
local size = tonumber(redis.call('HGET', TOTALS, 'size') or '0') or 0
while size + #value > most do
    local oldest = redis.call('ZRANGE', USED, 0, 0)[1]
    if not oldest then
        redis.call('HSET', TOTALS, 'size', '0')
        break
    end
    remove(oldest)
    size = tonumber(redis.call('HGET', TOTALS, 'size') or '0') or 0
end
redis.call('HSET', P .. 'entry:' .. key, 'value', value, 'expires', expires)
redis.call('PEXPIRE', P .. 'entry:' .. key, int(keep))
redis.call('ZADD', EXPIRY, int(NOW + keep), key)
redis.call('HSET', META, key, #value .. ' ' .. space)
redis.call('HINCRBY', TOTALS, 'size', #value)
redis.call('HINCRBY', TOTALS, 'size:' .. space, #value)
redis.call('SADD', P .. 'entries:of:' .. space, key)
use(key)
return 1
""",
)

_DELETE = Script("delete an answer", _SHELF + "return remove(ARGV[1]) and 1 or 0")

# The generation first: nobody is to use a copy of what is about to go.
_CLEAR = Script(
    "clear answers",
    _SHELF
    + """
local most, first = tonumber(ARGV[1]), ARGV[2]
if first == '1' then redis.call('INCR', GENERATION) end
expire()
local keys = ARGV[3] and redis.call('SRANDMEMBER', P .. 'entries:of:' .. ARGV[3], most)
    or redis.call('ZRANGE', USED, 0, most - 1)
local removed = 0
for _, key in ipairs(keys) do
    if remove(key) then removed = removed + 1
    elseif ARGV[3] then redis.call('SREM', P .. 'entries:of:' .. ARGV[3], key) end
end
return {removed, #keys}
""",
)

_RENEW = Script("renew the generation", _SHELF + "return redis.call('INCR', GENERATION)")
_GENERATION = Script("read the generation", _SHELF + "return redis.call('GET', GENERATION) or '0'")

_CONTENTS = Script(
    "count answers",
    _SHELF
    + """
expire()
if ARGV[1] then
    return {redis.call('SCARD', P .. 'entries:of:' .. ARGV[1]), redis.call('HGET', TOTALS, 'size:' .. ARGV[1]) or '0'}
end
return {redis.call('HLEN', META), redis.call('HGET', TOTALS, 'size') or '0'}
""",
)


class RedisEntries:
    """`llmkit.state.shared.Entries` on a Redis server. ``max_bytes``: of all values together."""

    def __init__(self, server: Server, *, max_bytes: int, clock: Clock) -> None:
        self._server = server
        self._max_bytes = max_bytes
        self._clock = clock
        self._warned = False
        self.location = server.location
        server.join(self)

    def _start_afresh(self) -> None:
        """A forked child has nothing of its own to forget."""

    async def get(self, key: str) -> tuple[bytes, float | None] | None:
        try:
            found = await self._server.run(_GET, short(key), str(MAX_VALUE), lane=_LANE)
        except StoreError as error:
            self._pass_over(error)
            return None
        read = _read(found)
        if read is not None and self._is_over(read[1]):
            await self.delete(key)
            return None
        return read

    async def peek(self, key: str) -> tuple[bytes, float | None] | None:
        read = _read(await self._server.run(_PEEK, short(key), str(MAX_VALUE), lane=_LANE))
        return None if read is None or self._is_over(read[1]) else read

    def _is_over(self, expires: float | None) -> bool:
        return expires is not None and not expires > self._clock.time()

    async def put(self, key: str, value: bytes, *, namespace: str, expires: float | None) -> None:
        if len(value) > min(MAX_VALUE, self._max_bytes):
            await self.delete(key)
            return
        keep = _FOREVER_MS
        if expires is not None:
            keep = max(1, min(keep, int((expires - self._clock.time()) * 1000)))
        words = (short(key), value, short(namespace), "" if expires is None else repr(float(expires)))
        try:
            await self._server.run(_PUT, *words, str(keep), str(self._max_bytes), lane=_LANE)
        except StoreError as error:
            self._pass_over(error)

    async def delete(self, key: str) -> None:
        try:
            await self._server.run(_DELETE, short(key), lane=_LANE)
        except StoreError as error:
            self._pass_over(error)

    async def clear(self, namespace: str | None = None) -> int:
        removed, first = 0, "1"
        space = () if namespace is None else (short(namespace),)
        while True:
            reply = await self._server.run(_CLEAR, str(_AT_ONCE), first, *space, lane=_LANE)
            some, seen = _two_counts(reply)
            removed, first = removed + some, "0"
            if not seen:
                return removed

    async def renew(self) -> None:
        await self._server.run(_RENEW, lane=_LANE)

    async def generation(self) -> int:
        reply = await self._server.run(_GENERATION, lane=_LANE)
        return int(reply) if isinstance(reply, bytes) and reply.isdigit() and len(reply) < 19 else 0

    async def contents(self, namespace: str | None = None) -> Contents:
        space = () if namespace is None else (short(namespace),)
        return Contents(*_two_counts(await self._server.run(_CONTENTS, *space, lane=_LANE)))

    async def aclose(self) -> None:
        await self._server.leave(self)

    def _pass_over(self, error: StoreError) -> None:
        """Keys that hold something else are no reason to stop. Raises ``error`` where the server itself is not well."""
        if isinstance(error, ServerAway) or "WRONGTYPE" not in error.message:
            raise error
        if not self._warned:
            self._warned = True
            log.warning("%s; somebody else writes to llmkit's keys there", error.message)


def _seconds(text: Any) -> float | None:
    """Epoch seconds as they were stored; None for never; 0, long ago, for what is no number."""
    if text in {None, b""}:
        return None
    try:
        return float(text)
    except (TypeError, ValueError):
        return 0.0


def _read(found: Any) -> tuple[bytes, float | None] | None:
    """The value and when it expires, as the server gave them."""
    if not isinstance(found, list) or len(found) != 2 or not isinstance(found[0], bytes):
        return None
    return found[0], _seconds(found[1])


def _two_counts(reply: Any) -> tuple[int, int]:
    try:
        first, second = (int(each) for each in reply)
    except (TypeError, ValueError):
        return 0, 0
    return max(0, first), max(0, second)
