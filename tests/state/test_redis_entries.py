"""Answers on a real server."""

from __future__ import annotations

import asyncio
import contextlib
import os

import pytest

from llmkit.errors import StoreError
from llmkit.state.redis.connection import Server
from llmkit.state.redis.entries import MAX_VALUE, RedisEntries
from llmkit.state.shared import Contents
from llmkit.testing import FakeClock

pytestmark = pytest.mark.redis

COUNTS = {"llmkit:{v1}:entries:tick", "llmkit:{v1}:entries:totals"}  # all that is left of what is gone


@contextlib.asynccontextmanager
async def opened(server, max_bytes=10_000, clock=None):
    entries = RedisEntries(Server(server.url), max_bytes=max_bytes, clock=clock or FakeClock())
    try:
        yield entries
    finally:
        await entries.aclose()


def with_two(server, scenario, **options):
    async def run():
        clock = FakeClock()
        async with opened(server, clock=clock, **options) as ours, opened(server, clock=clock, **options) as theirs:
            await scenario(ours, theirs, clock)

    asyncio.run(run())


def put(entries, key, value=b"x", namespace="", expires=None):
    return entries.put(key, value, namespace=namespace, expires=expires)


def test_what_one_machine_stores_another_finds(redis_server):
    value = bytes(range(256)) * 3

    async def scenario(ours, theirs, clock):
        assert await theirs.get("k") is None
        await put(ours, "k", value, expires=clock.time() + 60)
        assert await theirs.get("k") == (value, clock.time() + 60)
        await put(theirs, "k", b"new")
        assert await ours.get("k") == (b"new", None)
        assert await ours.contents() == Contents(1, 3)
        await ours.delete("k")
        await ours.delete("k")
        assert await theirs.get("k") is None
        assert await ours.contents() == Contents(0, 0)

    with_two(redis_server, scenario)
    assert [key for key in redis_server.names() if key not in COUNTS] == []


def test_what_has_expired_is_not_there(redis_server):
    async def scenario(ours, theirs, clock):
        await put(ours, "k", expires=clock.time() + 60)
        await clock.advance(61)
        assert await theirs.get("k") is None
        assert await ours.contents() == Contents(0, 0)

    with_two(redis_server, scenario)


def test_the_server_forgets_it_by_itself(redis_server):
    async def scenario(ours, theirs, clock):
        await put(ours, "short", b"12345", expires=clock.time() + 0.05)
        await put(ours, "long", b"12", expires=clock.time() + 1000)
        while redis_server.ask("EXISTS", "llmkit:{v1}:entry:short"):  # noqa: ASYNC110 - only the server can tell
            await asyncio.sleep(0.01)
        assert await theirs.contents() == Contents(1, 2)

    with_two(redis_server, scenario)


def test_the_least_recently_used_go_first(redis_server):
    async def scenario(ours, theirs, _):
        for each in range(10):
            await put(ours, f"k{each}", b"x" * 1000)
        await theirs.get("k0")
        await put(theirs, "more", b"x" * 2500)
        left = [each for each in range(10) if await ours.get(f"k{each}") is not None]
        assert left == [0, 4, 5, 6, 7, 8, 9]
        assert await ours.contents() == Contents(8, 9500)
        await put(ours, "k4", b"x" * 10_000)
        assert await ours.contents() == Contents(1, 10_000)

    with_two(redis_server, scenario)


def test_what_is_too_large_is_not_stored_and_what_it_replaces_is_gone(redis_server):
    async def scenario(ours, theirs, _):
        await put(ours, "k")
        await put(ours, "k", b"x" * 10_001)
        assert await theirs.get("k") is None
        async with opened(redis_server, max_bytes=10**9) as large:
            await put(large, "k", bytes(MAX_VALUE + 1))
            assert await large.get("k") is None
            await put(large, "k", bytes(MAX_VALUE))
            assert (await large.get("k"))[0] == bytes(MAX_VALUE)

    with_two(redis_server, scenario)


def test_namespaces_are_counted_and_cleared_apart(redis_server):
    async def scenario(ours, theirs, _):
        for each in range(700):
            await put(ours, f"a{each}", b"xy", "user:ana")
        await put(ours, "b", b"xyz", "")
        await put(ours, "b2", b"xyz", "user:žluť \udc80\n")
        assert await theirs.contents("user:ana") == Contents(700, 1400)
        assert await theirs.contents("") == Contents(1, 3)
        assert await theirs.contents() == Contents(702, 1406)
        before = await theirs.generation()
        assert await theirs.clear("user:ana") == 700
        assert await ours.generation() == before + 1
        assert await ours.get("a1") is None
        assert await ours.get("b") is not None
        assert await ours.clear("user:žluť \udc80\n") == 1
        assert await ours.clear() == 1
        assert await ours.contents() == Contents(0, 0)
        assert await ours.clear() == 0
        await theirs.renew()
        assert await ours.generation() == before + 5

    with_two(redis_server, scenario)


def test_many_at_once(redis_server):
    async def scenario(ours, theirs, _):
        await asyncio.gather(
            *(
                (ours, theirs)[each % 2].put(f"k{each % 50}", os.urandom(300), namespace="", expires=None)
                for each in range(500)
            )
        )
        found = await ours.contents()
        assert found.size == found.entries * 300 <= 10_000
        sizes = [await theirs.get(f"k{each}") for each in range(50)]
        assert sum(each is not None for each in sizes) == found.entries

    with_two(redis_server, scenario)


def test_keys_of_another_type_are_a_miss_and_one_warning(redis_server, caplog):
    async def scenario(ours, theirs, _):
        redis_server.ask("SET", "llmkit:{v1}:entry:k", "hello")
        assert await ours.get("k") is None
        assert await ours.get("k") is None
        await put(ours, "k", b"mine")
        assert await theirs.get("k") == (b"mine", None)
        redis_server.ask("SET", "llmkit:{v1}:entries:used", "hello")
        assert await ours.get("k") is None
        await put(ours, "other")

    with_two(redis_server, scenario)
    assert caplog.text.count("somebody else writes") == 1


@pytest.mark.parametrize("expires", ["soon", "nan", "-inf", "1e999x", "[]"])
def test_an_end_that_is_no_time_has_passed(redis_server, expires):
    async def scenario(ours, theirs, _):
        await put(ours, "k")
        redis_server.ask("HSET", "llmkit:{v1}:entry:k", "expires", expires)
        assert await theirs.get("k") is None

    with_two(redis_server, scenario)


def test_a_value_that_somebody_made_huge_is_not_read(redis_server):
    async def scenario(ours, theirs, _):
        await put(ours, "k")
        redis_server.ask("HSET", "llmkit:{v1}:entry:k", "value", bytes(MAX_VALUE + 1))
        assert await theirs.get("k") is None
        assert await theirs.contents() == Contents(0, 0)

    with_two(redis_server, scenario)


def test_a_server_that_is_away_is_an_error(own_redis):
    server = own_redis()

    async def scenario(ours, theirs, _):
        await put(ours, "k")
        server.kill()
        for asking in (ours.get("k"), put(ours, "k"), ours.clear(), ours.generation(), ours.contents(), ours.renew()):
            with pytest.raises(StoreError, match="cannot be used"):
                await asking

    with_two(server, scenario)
