"""Calls in flight on several machines, on a real server."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import subprocess
import sys
import textwrap
import time

import pytest

from llmkit.clock import SystemClock
from llmkit.state.redis import flights as module
from llmkit.state.redis.connection import Server
from llmkit.state.redis.flights import RedisFlights
from llmkit.state.shared import FlightFailed

pytestmark = pytest.mark.redis


@contextlib.asynccontextmanager
async def opened(server):
    flights = RedisFlights(Server(server.url), SystemClock())
    try:
        yield flights
    finally:
        await flights.aclose()


def with_two(server, scenario):
    async def run():
        async with opened(server) as ours, opened(server) as theirs:
            await scenario(ours, theirs)

    asyncio.run(asyncio.wait_for(run(), 60))


async def followed(flights, key):
    return [piece async for pieces in flights.follow(key) for piece in pieces]


async def until(condition):
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("never")


def test_one_of_all_machines_makes_the_call(redis_server):
    async def scenario(ours, theirs):
        claims = await asyncio.gather(*((ours, theirs)[each % 2].claim("k") for each in range(20)))
        (claim,) = [each for each in claims if each is not None]
        other = await theirs.claim("another")
        assert other is not None
        await claim.release()
        await claim.release()
        again = await theirs.claim("k")
        assert again is not None
        await claim.release()  # it is not his any more
        assert await ours.claim("k") is None

    with_two(redis_server, scenario)


def test_followers_see_everything_from_the_first_chunk_as_it_arrives(redis_server):
    async def scenario(ours, theirs):
        claim = await ours.claim("k")
        await claim.publish([("a", ""), ("", "hm")])
        assert not claim.followed
        seen = []

        async def follow():
            async for pieces in theirs.follow("k"):
                seen.extend(pieces)

        following = [asyncio.create_task(follow()), asyncio.create_task(followed(theirs, "k"))]
        await until(lambda: len(seen) == 2)
        assert claim.followed
        await claim.publish([("b\n\0🐴\ud83d", "")])
        await until(lambda: len(seen) == 3)
        for each in range(500):
            await claim.publish([(str(each), "")])
        await claim.release()
        _, all_of_it = await asyncio.gather(*following)
        assert all_of_it == seen
        assert seen[:3] == [("a", ""), ("", "hm"), ("b\n\0🐴\ud83d", "")]
        assert [text for text, _ in seen[3:]] == [str(each) for each in range(500)]

    with_two(redis_server, scenario)


def test_nothing_is_published_while_nobody_follows(redis_server):
    async def scenario(ours, theirs):
        claim = await ours.claim("k")
        for _ in range(20):
            await claim.publish([("x" * 100, "")])
            await asyncio.sleep(0.01)
        assert not claim.followed
        assert [key for key in redis_server.names() if "chunks" in key] == []

    with_two(redis_server, scenario)


def test_following_what_nobody_makes_ends_at_once(redis_server):
    async def scenario(ours, theirs):
        assert await followed(theirs, "k") == []

    with_two(redis_server, scenario)


def test_a_failure_is_handed_on(redis_server):
    async def scenario(ours, theirs):
        claim = await ours.claim("k")
        await claim.publish([("a", "")])
        following = asyncio.create_task(followed(theirs, "k"))
        await until(lambda: claim.followed)
        await claim.release("it said no")
        with pytest.raises(FlightFailed, match="it said no"):
            await following
        assert await followed(theirs, "k") == []  # it is over: who asks now asks anew

    with_two(redis_server, scenario)


def test_what_is_much_is_bounded(redis_server, monkeypatch):
    monkeypatch.setattr(module, "MOST_BYTES", 1000)

    async def scenario(ours, theirs):
        claim = await ours.claim("k")
        following = asyncio.create_task(followed(theirs, "k"))
        await claim.publish([("a", "")])
        await until(lambda: claim.followed)
        for _ in range(100):
            await claim.publish([("x" * 100, "")])
        await claim.release()
        assert 1 < len(await following) < 20

    with_two(redis_server, scenario)


MAKER = """
    import asyncio, sys
    from llmkit.clock import SystemClock
    from llmkit.state.redis.connection import Server
    from llmkit.state.redis.flights import RedisFlights

    async def main():
        claim = await RedisFlights(Server(sys.argv[1]), SystemClock()).claim("k")
        await claim.publish([("a", "")])
        print("ready", flush=True)
        await asyncio.sleep(600)

    asyncio.run(main())
"""


def test_the_claim_of_a_killed_process_lapses_and_its_followers_are_let_go(redis_server):
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(MAKER), redis_server.url], stdout=subprocess.PIPE, text=True
    )
    with contextlib.closing(child.stdout):
        assert child.stdout.readline() == "ready\n"

        async def scenario(ours, theirs):
            assert await ours.claim("k") is None
            following = asyncio.create_task(followed(theirs, "k"))
            await until(lambda: redis_server.ask("EXISTS", "llmkit:{v1}:followed:k"))
            child.kill()
            child.wait()
            redis_server.ask("PEXPIRE", "llmkit:{v1}:flight:k", 50)  # the lease, ten seconds later
            assert await following in ([("a", "")], [])
            claims = await asyncio.gather(ours.claim("k"), theirs.claim("k"))
            assert sum(each is not None for each in claims) == 1

        with_two(redis_server, scenario)


def test_a_claim_is_renewed_while_it_lives(redis_server, monkeypatch):
    monkeypatch.setattr(module, "RENEW_S", 0.05)

    async def scenario(ours, theirs):
        claim = await ours.claim("k")
        redis_server.ask("PEXPIRE", "llmkit:{v1}:flight:k", 2000)
        await until(lambda: redis_server.ask("PTTL", "llmkit:{v1}:flight:k") > 5000)
        await claim.release()
        await until(lambda: not redis_server.ask("EXISTS", "llmkit:{v1}:flight:k"))

    with_two(redis_server, scenario)


def test_a_claim_that_is_dropped_is_released(redis_server):
    async def scenario(ours, theirs):
        claim = await ours.claim("k")
        assert claim is not None
        del claim
        gc.collect()
        await until(lambda: not redis_server.ask("EXISTS", "llmkit:{v1}:flight:k"))

    with_two(redis_server, scenario)


def test_without_the_server_everybody_makes_his_call(own_redis, caplog):
    server = own_redis()
    server.kill()

    async def scenario(ours, theirs):
        for _ in range(3):
            claim = await ours.claim("k")
            await claim.publish([("a", "")])
            await claim.release()
        assert await theirs.claim("k") is not None
        assert await followed(theirs, "k") == []

    began = time.monotonic()
    with_two(server, scenario)
    assert caplog.text.count("may each be made") == 2  # once a client
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("batch", ["", "x", "5", "[1]", '[["a"]]', '[["a", 5]]', '{"a": "b"}', "[" * 50_000])
def test_chunks_that_somebody_else_wrote_are_passed_over(redis_server, batch):
    async def scenario(ours, theirs):
        claim = await ours.claim("k")
        following = asyncio.create_task(followed(theirs, "k"))
        await claim.publish([("a", "")])
        await until(lambda: claim.followed)
        (name,) = await names("chunks")
        redis_server.ask("RPUSH", name, batch)
        await claim.publish([("b", "")])
        await claim.release()
        assert await following == [("a", ""), ("b", "")]

    async def names(word):
        found = []
        while not found:
            found = [key for key in redis_server.names() if word in key]
            await asyncio.sleep(0.01)
        return found

    with_two(redis_server, scenario)


def test_everything_ends_by_itself(redis_server):
    async def scenario(ours, theirs):
        claim = await ours.claim("k")
        following = asyncio.create_task(followed(theirs, "k"))
        await claim.publish([("a", "")])
        await until(lambda: claim.followed)
        assert all(redis_server.ask("PTTL", key) > 0 for key in redis_server.names())
        await claim.release("no")
        with contextlib.suppress(FlightFailed):
            await following

    with_two(redis_server, scenario)
    assert all(0 < redis_server.ask("PTTL", key) <= 10_000 for key in redis_server.names())
