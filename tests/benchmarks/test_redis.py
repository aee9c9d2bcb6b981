"""What a hold and its settlement cost on a Redis server, against two bare scripts through redis-py's own client."""

from __future__ import annotations

import asyncio
import time
from itertools import count

import pytest

from llmkit.account import Account, Hold, Settle
from llmkit.clock import SystemClock
from llmkit.state.owner import current_owner
from llmkit.state.redis.accounts import RedisAccounts
from llmkit.state.redis.connection import Server
from tests.benchmarks.conftest import in_turn
from tests.state.redis_server import RedisServer, needs_redis

pytestmark = [pytest.mark.redis, needs_redis]

PAIRS = 400
ACCOUNTS = (Account("day", "day", 10**15), Account("session", "session", None, 10**12))
NUMBERS = count()


async def held_and_settled(accounts: RedisAccounts) -> None:
    hold = Hold(f"{next(NUMBERS):x}", 1, ACCOUNTS, 1000, 50, current_owner(), time.time() + 60, None, [])
    await accounts.hold(hold)
    accounts.end(Settle(hold.request_id, 1, 300, 20))


@pytest.mark.parametrize(("tasks", "target"), [(1, 4), (16, 4)])
def test_a_hold_and_its_settlement(benchmark, tmp_path, state, tasks, target) -> None:
    import redis.asyncio

    server = RedisServer(tmp_path).start()

    async def main():
        accounts = RedisAccounts(Server(server.url), SystemClock())
        client = redis.asyncio.Redis(port=server.port)
        script = client.register_script("return redis.call('HINCRBY', KEYS[1], 'a', 1)")

        async def many(work) -> None:
            left = iter(range(PAIRS))

            async def one() -> None:
                for _ in left:
                    await work()

            await asyncio.gather(*(one() for _ in range(tasks)))

        async def ours() -> None:
            await many(lambda: held_and_settled(accounts))
            await accounts._endings.flush()

        async def bare() -> None:
            await script(keys=["bare"])
            await script(keys=["bare"])

        times = await in_turn(ours, lambda: many(bare), PAIRS)
        await client.aclose()
        await accounts.aclose()
        return times

    try:
        ours_times, bare_times = benchmark.pedantic(lambda: asyncio.run(main()), rounds=1)
    finally:
        server.kill()
    state(f"hold and settle against two bare scripts, {tasks} at once", ours_times.wall, bare_times.wall, target)
