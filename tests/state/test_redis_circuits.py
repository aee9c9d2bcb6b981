"""Circuits on a real server."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time

import pytest

from llmkit.circuit import CircuitState
from llmkit.errors import StoreError
from llmkit.state.owner import current_owner
from llmkit.state.redis.circuits import RedisCircuits
from llmkit.state.redis.connection import Server
from llmkit.testing import FakeClock

pytestmark = pytest.mark.redis

OPEN = CircuitState("openai https://api.openai.com/v1 gpt-5", "open", 1, 1700000060.25, 5, 0, "ProviderOverloaded: 503")
KEY = "llmkit:{v1}:circuits"


@contextlib.asynccontextmanager
async def opened(server, clock=None):
    circuits = RedisCircuits(Server(server.url), clock or FakeClock())
    try:
        yield circuits
    finally:
        await circuits.aclose()


def with_two(server, scenario):
    async def run():
        clock = FakeClock()
        async with opened(server, clock) as ours, opened(server, clock) as theirs:
            await scenario(ours, theirs, clock)

    asyncio.run(run())


def test_a_circuit_that_opened_on_one_machine_is_open_on_another(redis_server):
    async def scenario(ours, theirs, _):
        assert await theirs.read(OPEN.endpoint) is None
        assert await ours.write(OPEN)
        assert await theirs.read(OPEN.endpoint) == OPEN
        other = OPEN._replace(endpoint="b", last_failure=None)
        assert await theirs.write(other)
        assert sorted(await ours.read_all()) == sorted([OPEN, other])

    with_two(redis_server, scenario)


def test_a_change_is_only_taken_over_the_version_it_was_made_from(redis_server):
    async def scenario(ours, theirs, _):
        assert not await ours.write(OPEN._replace(version=2))
        assert await ours.write(OPEN)
        assert await ours.write(OPEN)  # the same once more: its answer may have been lost
        assert not await theirs.write(OPEN._replace(state="closed"))
        assert await theirs.write(OPEN._replace(version=2, state="closed"))
        assert not await ours.write(OPEN._replace(version=2, state="half_open"))
        assert (await ours.read(OPEN.endpoint)).state == "closed"

    with_two(redis_server, scenario)


def test_of_many_writers_one_wins(redis_server):
    async def scenario(ours, theirs, _):
        states = [OPEN._replace(failures_in_row=each) for each in range(20)]
        taken = await asyncio.gather(*((ours, theirs)[each % 2].write(state) for each, state in enumerate(states)))
        assert sum(taken) == 1
        assert await ours.read(OPEN.endpoint) == states[taken.index(True)]

    with_two(redis_server, scenario)


def test_probes_are_counted_over_all_machines_and_lapse(redis_server):
    async def scenario(ours, theirs, clock):
        until = clock.time() + 30
        assert await ours.claim_probe("e", "a#1", until, 2)
        assert await theirs.claim_probe("e", "b#1", until, 2)
        assert not await ours.claim_probe("e", "a#2", until, 2)
        assert await ours.claim_probe("other", "a#2", until, 2)
        assert await theirs.claim_probe("e", "b#1", clock.time() - 1, 2)  # given back
        assert await ours.claim_probe("e", "a#2", until, 2)
        await clock.advance(31)
        assert await theirs.claim_probe("e", "b#2", clock.time() + 30, 1)

    with_two(redis_server, scenario)


def test_the_probe_of_a_process_that_is_gone_is_free(redis_server):
    host, _, _ = current_owner().split(":")

    async def scenario(ours, theirs, clock):
        assert await ours.claim_probe("e", f"{host}:{os.getpid()}:neverborn#1", clock.time() + 30, 1)
        assert await theirs.claim_probe("e", f"{current_owner()}#2", clock.time() + 30, 1)
        assert not await ours.claim_probe("e", f"{current_owner()}#3", clock.time() + 30, 1)

    with_two(redis_server, scenario)


@pytest.mark.parametrize(
    "value",
    [
        "",
        "x",
        "5 x",
        '5 ["a"]',
        "1 " + "[" * 5000,
        '9 ["e", "open", NaN, 1, 1, null]',
        '1 ["e", "ajar", 1, 1, 1, null]',
        "7",
    ],
)
def test_what_is_no_circuit_is_passed_over_and_replaced(redis_server, value, caplog):
    async def scenario(ours, theirs, _):
        redis_server.ask("HSET", KEY, "e", value)
        assert await ours.read("e") is None
        assert await ours.read_all() == []
        assert await theirs.write(OPEN._replace(endpoint="e"))
        assert (await ours.read("e")).state == "open"

    with_two(redis_server, scenario)


def test_a_server_that_is_away_is_an_error(own_redis):
    server = own_redis()
    server.kill()

    async def scenario(ours, _, clock):
        for asking in (ours.read("e"), ours.read_all(), ours.write(OPEN), ours.claim_probe("e", "a", time.time(), 1)):
            with pytest.raises(StoreError):
                await asking

    with_two(server, scenario)
