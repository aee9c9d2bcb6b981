"""Accounts on a Redis server, in the shape that the contract of all accounts asks for."""

from __future__ import annotations

import asyncio
from unittest.mock import patch

from llmkit.state.redis import accounts as module
from llmkit.state.redis.accounts import RedisAccounts
from llmkit.state.redis.connection import Server
from llmkit.testing import FakeClock

LEASES = "llmkit:{v1}:leases"


class ServedAccounts:
    """What the ledger does for accounts in a store, it does for these as well: it says what has been sent."""

    def __init__(self, server, now):
        self._server = server
        self._now = now
        self._accounts = RedisAccounts(Server(server.url), FakeClock(start=now))
        self._holds = {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        asyncio.run(self._accounts.aclose())

    async def hold(self, hold):
        await self._accounts.hold(hold)
        self._holds[hold[:2]] = hold

    async def sent(self, request_id, number=1):
        await self._accounts.sent(self._holds[request_id, number])

    async def end(self, *endings):
        for each in endings:
            self._accounts.end(each)
        await self._accounts._endings.flush()

    async def balances(self, accounts):
        return await self._accounts.balances(accounts)

    async def reap(self, now, is_gone, was_sent=lambda owner, slot: False):
        """The server's clock runs on to ``now``. Returns how many holds end."""
        before = self._server.ask("ZCARD", LEASES)
        for hold in self._holds.values():
            if was_sent(hold.owner, hold.slot):
                await self._accounts.sent(hold)
        self._server.age(now - self._now)
        self._now = now
        with patch.object(module, "is_gone", is_gone):
            await self._accounts.balances([])
        return before - self._server.ask("ZCARD", LEASES)
