"""Accounts on a Redis server: one budget for several machines.

Each hold is a hash with the accounts that it is in; a sorted set has the ends of all leases by the server's clock, so
that clocks of machines may differ. Whoever takes a hold first ends those whose lease has run out. Accounts begin at
nothing on the server, and are forgotten `KEPT_S` after they were last used or their window has ended.

A hold has a token. If its answer is lost, nobody knows whether it was taken: then it is *dropped* by its token, so that
it neither stays, nor can be taken by a command that arrives late. Should the call go on and spend all the same, that is
counted when it is settled.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import os
import secrets
import uuid
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.account import Balance, Hold, HoldRefused, Release, Settle
from llmkit.errors import StoreError
from llmkit.state.holds import amount
from llmkit.state.owner import current_owner, is_gone
from llmkit.state.redis.connection import Script, ServerAway, short
from llmkit.state.redis.endings import Ending, Endings, Known
from llmkit.state.store import DuplicateCall

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llmkit.account import Account
    from llmkit.clock import Clock
    from llmkit.state.redis.connection import Server

__all__ = ["RedisAccounts"]

LARGEST = 9 * 10**18  # of a sum: what the server's whole numbers hold
KEPT_S = 60 * 86_400
ENDED_S = 86_400  # what has ended is remembered so long, so that an ending that is delivered twice counts once
MOST_KNOWN = 50_000

_SIZES = f"local LARGEST, KEPT, ENDED = {LARGEST}, {KEPT_S * 1000}, {ENDED_S * 1000}"
_BOOKS = (
    _SIZES
    + """
local FIELDS = {'settled_nanos', 'held_nanos', 'unknown_nanos', 'settled_tokens', 'held_tokens', 'unknown_tokens'}
-- Of a hold: its worst case, what was booked when it ended, and what of that nobody knows.
local AMOUNTS = {'nanos', 'tokens', 'booked_nanos', 'booked_tokens', 'unknown_nanos', 'unknown_tokens'}

-- A count as it was stored; nil for what is none.
local function whole(text)
    if not text then return 0 end
    local number = string.match(text, '^%d+$') and tonumber(text)
    if not number or number > LARGEST then return nil end
    return number
end

-- The six counts of an account, and whether there is one; nil where something else stands there. Lua has doubles alone,
-- which count one by one up to 9 million dollars; ``exact`` is what is stored.
local function read(key)
    local found = redis.call('HMGET', P .. 'account:' .. key, unpack(FIELDS))
    local account, there = {exact = {}}, false
    for i, name in ipairs(FIELDS) do
        there = there or found[i]
        account[name], account.exact[i] = whole(found[i]), found[i] or '0'
        if not account[name] then return nil end
    end
    return account, there
end

-- Add what ``change`` says to an account, in the store. Added up by the server, which is exact.
local function add(key, account, change)
    local name = P .. 'account:' .. key
    for i, field in ipairs(FIELDS) do
        local by = change[field] or 0
        if by ~= 0 then
            local sum = math.max(0, math.min(LARGEST, account[field] + by))
            if sum == account[field] + by then redis.call('HINCRBY', name, field, int(by))
            else redis.call('HSET', name, field, int(sum)) end
            account[field] = sum
            account.exact[i] = sum < 2 ^ 53 and int(sum) or redis.call('HGET', name, field)
        end
    end
end

-- An account that is not used for that long is forgotten. An hour more or less is not worth a write.
local function keep(key, long)
    local name = P .. 'account:' .. key
    if redis.call('PTTL', name) < long - 3600000 then redis.call('PEXPIRE', name, int(long)) end
end

local function hold_of(id)
    local found = redis.call('HMGET', P .. 'hold:' .. id, 'state', 'token', 'owner', 'sent', 'accounts', unpack(AMOUNTS))
    local hold = {id = id, state = found[1], token = found[2], owner = found[3], sent = found[4], keys = {}}
    for i, name in ipairs(AMOUNTS) do hold[name] = whole(found[5 + i]) or 0 end
    if not found[5] then return hold end
    local fine, keys = pcall(cjson.decode, found[5])
    if fine and type(keys) == 'table' then
        for _, key in ipairs(keys) do if type(key) == 'string' then hold.keys[#hold.keys + 1] = key end end
    end
    return hold
end

-- Book on every account of a hold what ``change`` says. With ``known``, only where there is something already.
local function book(hold, change, known)
    for _, key in ipairs(hold.keys) do
        local account, there = read(key)
        if account and (there or not known) then
            add(key, account, change)
            if not there then keep(key, KEPT) end
        end
    end
end

local function close(hold, state)
    local name = P .. 'hold:' .. hold.id
    if state == 'unknown' then
        redis.call('HSET', name, 'state', state,
            'booked_nanos', int(hold.booked_nanos), 'booked_tokens', int(hold.booked_tokens),
            'unknown_nanos', int(hold.unknown_nanos), 'unknown_tokens', int(hold.unknown_tokens))
    else
        redis.call('HSET', name, 'state', state)
    end
    redis.call('PEXPIRE', name, int(state == 'unknown' and KEPT or ENDED))
    redis.call('ZREM', P .. 'leases', hold.id)
end

-- What was spent, nil where nobody knows it. ``held``: whether the worst case is still held in the accounts.
local function settle(hold, nanos, tokens, held)
    local open = held and 1 or 0
    hold.booked_nanos, hold.unknown_nanos = nanos or hold.nanos, nanos and 0 or hold.nanos
    hold.booked_tokens, hold.unknown_tokens = tokens or hold.tokens, tokens and 0 or hold.tokens
    book(hold, {
        held_nanos = -open * hold.nanos, held_tokens = -open * hold.tokens,
        settled_nanos = hold.booked_nanos, settled_tokens = hold.booked_tokens,
        unknown_nanos = hold.unknown_nanos, unknown_tokens = hold.unknown_tokens,
    })
    close(hold, (nanos and tokens) and 'settled' or 'unknown')
end

local function release(hold, state)
    book(hold, {held_nanos = -hold.nanos, held_tokens = -hold.tokens})
    close(hold, state)
end

-- The owner says at last what had been booked at its worst case.
local function correct(hold, nanos, tokens)
    local change = {}
    if nanos then
        change.settled_nanos, change.unknown_nanos = nanos - hold.booked_nanos, -hold.unknown_nanos
        hold.booked_nanos, hold.unknown_nanos = nanos, 0
    end
    if tokens then
        change.settled_tokens, change.unknown_tokens = tokens - hold.booked_tokens, -hold.unknown_tokens
        hold.booked_tokens, hold.unknown_tokens = tokens, 0
    end
    book(hold, change, true)
    close(hold, (nanos and tokens) and 'settled' or 'unknown')
end

-- Its owner is gone, or its lease has run out.
local function lapse(id)
    local hold = hold_of(id)
    if hold.state ~= 'open' then redis.call('ZREM', P .. 'leases', id)
    elseif hold.sent == '1' then settle(hold, nil, nil, true)
    else release(hold, 'dropped') end
end

local function reap(most)
    for _, id in ipairs(redis.call('ZRANGEBYSCORE', P .. 'leases', '-inf', int(NOW), 'LIMIT', 0, most)) do lapse(id) end
end
"""
)

_HOLD = Script(
    "hold",
    _BOOKS
    + """
local id, token, owner, machine, sent, lease = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], tonumber(ARGV[6])
local nanos, tokens, count = tonumber(ARGV[7]), tonumber(ARGV[8]), tonumber(ARGV[9])
reap(50)
local before = redis.call('HMGET', P .. 'hold:' .. id, 'state', 'token', 'owner')
local again = before[1] == 'open' and before[2] == token
if before[1] == 'open' and not again then
    if before[3] ~= owner then return {'taken'} end
    release(hold_of(id), 'dropped')  -- asked for before, and the answer was lost
elseif before[1] and before[2] == token and not again then
    return {'gone'}  -- dropped before it arrived
end
local keys, accounts = {}, {}
for i = 1, count do
    local key, nano_limit, token_limit = ARGV[6 + 4 * i], ARGV[7 + 4 * i], ARGV[8 + 4 * i]
    local account = accounts[key] or read(key)
    if not account then return {'garbage', key} end
    if not again then
        local all_nanos = account.settled_nanos + account.held_nanos + nanos
        local all_tokens = account.settled_tokens + account.held_tokens + tokens
        if nano_limit ~= '' and nanos > 0 and all_nanos > tonumber(nano_limit) then return {'refused', i, 'usd', account.exact} end
        if token_limit ~= '' and tokens > 0 and all_tokens > tonumber(token_limit) then return {'refused', i, 'tokens', account.exact} end
    end
    if not accounts[key] then keys[#keys + 1] = key end
    accounts[key] = account
end
local reply, change = {'held'}, {held_nanos = nanos, held_tokens = tokens}
for _, key in ipairs(keys) do
    if not again then add(key, accounts[key], change) end
end
for i = 1, count do
    local key = ARGV[6 + 4 * i]
    if not again then keep(key, tonumber(ARGV[9 + 4 * i])) end
    reply[i + 1] = accounts[key].exact
end
if again then return reply end
local name = P .. 'hold:' .. id
if before[1] then redis.call('DEL', name) end
redis.call('HSET', name, 'state', 'open', 'token', token, 'owner', owner, 'machine', machine, 'nanos', int(nanos),
    'tokens', int(tokens), 'sent', sent, 'accounts', count == 0 and '[]' or cjson.encode(keys))
redis.call('ZADD', P .. 'leases', int(NOW + lease), id)
return reply
""",
)

_SENT = Script(
    "note what was sent",
    """
local found = redis.call('HMGET', P .. 'hold:' .. ARGV[1], 'state', 'token')
if found[1] ~= 'open' or (ARGV[2] ~= '' and found[2] ~= ARGV[2]) then return 0 end
redis.call('HSET', P .. 'hold:' .. ARGV[1], 'sent', '1')
return 1
""",
)

_END = Script(
    "end a hold",
    _BOOKS
    + """
local id, how, token = ARGV[1], ARGV[2], ARGV[3]
local nanos, tokens = tonumber(ARGV[4]), tonumber(ARGV[5])
local hold = hold_of(id)
if hold.state and token ~= '' and hold.token ~= token then return 0 end
if how == 'release' then nanos, tokens = 0, 0 end
if hold.state == 'open' then
    if how == 'settle' then settle(hold, nanos, tokens, true)
    else release(hold, how == 'drop' and 'dropped' or 'released') end
    return 1
end
if hold.state == 'unknown' and how ~= 'drop' then
    correct(hold, nanos, tokens)
    return 1
end
if hold.state == 'dropped' then
    if how == 'settle' then settle(hold, nanos, tokens, false)
    elseif how == 'release' then close(hold, 'released') end
    return 1
end
if hold.state or token == '' then return 0 end
-- The server does not know it: it has lost what it had, or the hold has never arrived. Who held it says what it was.
hold.token, hold.nanos, hold.tokens = token, tonumber(ARGV[6]), tonumber(ARGV[7])
for i = 8, #ARGV do hold.keys[#hold.keys + 1] = ARGV[i] end
redis.call('HSET', P .. 'hold:' .. id, 'token', token, 'nanos', int(hold.nanos), 'tokens', int(hold.tokens),
    'accounts', #hold.keys == 0 and '[]' or cjson.encode(hold.keys))
if how == 'settle' then settle(hold, nanos, tokens, false)
else close(hold, 'dropped') end
return 1
""",
)

_BALANCES = Script(
    "read balances",
    _BOOKS
    + """
reap(200)
local found = {}
for i, key in ipairs(ARGV) do
    local account = read(key)
    found[i] = account and account.exact or {}
end
return found
""",
)

_MOST_OPEN = 5_000  # holds that are looked at for owners that are gone
_OWNERS = Script(
    "read owners",
    f"local MOST = {_MOST_OPEN}"
    """
local found, seen = {}, {}
for _, id in ipairs(redis.call('ZRANGE', P .. 'leases', 0, MOST - 1)) do
    local hold = redis.call('HMGET', P .. 'hold:' .. id, 'owner', 'machine')
    if hold[1] and hold[2] == ARGV[1] and not seen[hold[1]] then
        seen[hold[1]] = true
        found[#found + 1] = hold[1]
    end
end
return found
""",
)

_REAP = Script(
    "end the holds of owners that are gone",
    _BOOKS + f"local MOST = {_MOST_OPEN}"
    """
local gone, ended = {}, 0
for _, owner in ipairs(ARGV) do gone[owner] = true end
for _, id in ipairs(redis.call('ZRANGE', P .. 'leases', 0, MOST - 1)) do
    if gone[redis.call('HGET', P .. 'hold:' .. id, 'owner') or ''] then
        lapse(id)
        ended = ended + 1
    end
end
return ended
""",
)


class RedisAccounts:
    """`llmkit.account.Accounts` on a Redis server. Safe from any thread and event loop.

    ``clock`` tells how long a lease is, not when it ends: that is the server's business.
    """

    def __init__(self, server: Server, clock: Clock) -> None:
        self._server = server
        self._clock = clock
        self.location = server.location
        self._start_afresh()
        server.join(self)

    def _start_afresh(self) -> None:
        self._known: OrderedDict[tuple[str, int], Known] = OrderedDict()
        self._endings = Endings(self._server, _END)

    # -- holding -----------------------------------------------------------------------------------------------------

    async def hold(self, hold: Hold) -> None:
        known = Known(
            secrets.token_hex(8),
            amount(hold.nanos),
            amount(hold.tokens),
            tuple(short(each.key) for each in hold.accounts),
        )
        self._remember(hold, known)
        try:
            reply = await self._ask(hold, known)
            if reply[0] == b"refused" and await self._reap():
                reply = await self._ask(hold, known)
        except BaseException as error:  # cancelled, too: it may have been taken
            if not isinstance(error, ServerAway) or error.reached:
                self._endings.put(Ending(_id(hold), "drop", None, None, known))
            raise
        self._take(hold, reply)
        self._endings.hurry()

    def _ask(self, hold: Hold, known: Known) -> Any:
        now = self._clock.time()
        words: list[str | bytes] = [
            _id(hold),
            known.token,
            _text(hold.owner),
            _machine(),
            "1" if hold.slot is None else "0",
            str(max(1, int((hold.expires - now) * 1000))),
            str(known.nanos),
            str(known.tokens),
            str(len(hold.accounts)),
        ]
        for account, key in zip(hold.accounts, known.keys, strict=True):
            limits = (account.limit_nanos, account.limit_tokens)
            words += [key, *("" if limit is None else str(max(0, min(LARGEST, limit))) for limit in limits)]
            words.append(str(int((max(0.0, (account.resets_at or now) - now) + KEPT_S) * 1000)))
        return self._server.run(_HOLD, *words)

    def _take(self, hold: Hold, reply: Any) -> None:
        """What the server said about ``hold``.

        Raises:
            HoldRefused, StoreError: see `hold`.
        """
        kind = reply[0] if isinstance(reply, list) and reply else None
        if kind == b"held" and len(reply) == len(hold.accounts) + 1:
            hold.balances[:] = [_balance(each.key, found) for each, found in zip(hold.accounts, reply[1:], strict=True)]
            return
        self._known.pop((hold.request_id, hold.number), None)
        if kind == b"refused" and len(reply) == 4 and reply[1] in range(1, len(hold.accounts) + 1):
            account = hold.accounts[reply[1] - 1]
            raise HoldRefused(account, _balance(account.key, reply[3]), "usd" if reply[2] == b"usd" else "tokens")
        if kind == b"taken":
            raise DuplicateCall(f"another process has a call with the request_id {hold.request_id} in flight")
        if kind == b"gone":
            raise StoreError("the answer to a hold came too late; nothing is held", next_step="ask again")
        raise _strange(self.location)

    async def sent(self, hold: Hold) -> None:
        known = self._known.get((hold.request_id, hold.number))
        if await self._server.run(_SENT, _id(hold), "" if known is None else known.token) != 1:
            raise StoreError(
                f"the Redis server {self.location} does not have the hold of this attempt any more, so it was not sent",
                next_step="ask again; a server without persistence loses its data when it restarts",
            )

    def _remember(self, hold: Hold, known: Known) -> None:
        self._known[hold.request_id, hold.number] = known
        while len(self._known) > MOST_KNOWN:  # those that were asked for in vain, and never ended
            with contextlib.suppress(KeyError):
                self._known.popitem(last=False)

    # -- ending ------------------------------------------------------------------------------------------------------

    def end(self, ending: Settle | Release) -> None:
        known = self._known.pop((ending.request_id, ending.number), None)
        if isinstance(ending, Release):
            self._endings.put(Ending(_id(ending), "release", 0, 0, known))
            return
        nanos = None if ending.nanos is None else amount(ending.nanos)
        tokens = None if ending.tokens is None else amount(ending.tokens)
        self._endings.put(Ending(_id(ending), "settle", nanos, tokens, known))

    # -- looking -----------------------------------------------------------------------------------------------------

    async def balances(self, accounts: Sequence[Account]) -> list[Balance]:
        await self._reap()
        reply = await self._server.run(_BALANCES, *(short(each.key) for each in accounts))
        if not isinstance(reply, list) or len(reply) != len(accounts):
            raise _strange(self.location)
        return [_balance(each.key, found) for each, found in zip(accounts, reply, strict=True)]

    async def _reap(self) -> bool:
        """End the holds of owners on this machine that are gone. Returns whether there were any."""
        reply = await self._server.run(_OWNERS, _machine())
        here = _text(current_owner())
        owners = [owner for owner in reply if isinstance(owner, bytes) and owner != here] if reply else []
        gone = await asyncio.to_thread(_those_gone, owners) if owners else []
        return bool(gone) and await self._server.run(_REAP, *gone) != 0

    async def aclose(self) -> None:
        """Deliver what waits, for a few seconds; the rest is settled by its lease, at the worst case."""
        await self._endings.flush()
        await self._server.leave(self)


def _those_gone(owners: list[bytes]) -> list[bytes]:
    return [owner for owner in owners if is_gone(owner.decode("utf-8", "replace"))]


@functools.lru_cache(maxsize=2)
def _machine_of(pid: int) -> str:
    """Names of hosts repeat, and only on one machine does a process number mean the same process."""
    parts = [str(uuid.getnode()), *os.uname()[:2]] if hasattr(os, "uname") else [str(uuid.getnode())]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"))
        parts.append(str(Path(f"/proc/{pid}/ns/pid").readlink()))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _machine() -> str:
    return _machine_of(os.getpid())


def _id(of: Hold | Settle | Release) -> bytes:
    return short(f"{of.request_id}:{of.number}")


def _text(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")[:300]


def _balance(key: str, found: Any) -> Balance:
    """What the server said of an account. Raises `StoreError` where it is no balance."""
    if not isinstance(found, list) or len(found) != 6 or not all(isinstance(n, bytes) and n.isdigit() for n in found):
        raise StoreError(
            f"what the Redis server has under the account {key!r} is not what llmkit wrote",
            next_step="look at who else writes to that server; deleting the key begins the account anew",
        )
    return Balance(key, *(int(n) for n in found))


def _strange(location: str) -> StoreError:
    return StoreError(
        f"the Redis server {location} answers with something else than llmkit's scripts do",
        next_step="look at the server: what runs there, and in which version",
    )
