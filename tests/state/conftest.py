"""Redis servers for the tests of what is kept there."""

from __future__ import annotations

import contextlib

import pytest

from tests.state.redis_server import PROGRAM, RedisServer


@pytest.fixture(scope="session")
def _redis(tmp_path_factory):
    if PROGRAM is None:
        pytest.skip("no redis-server is installed")
    server = RedisServer(tmp_path_factory.mktemp("redis")).start()
    yield server
    server.kill()


@pytest.fixture
def redis_server(_redis):
    """A server with nothing in it, shared by tests that leave it alive."""
    _redis.ask("FLUSHALL")
    return _redis


@pytest.fixture
def own_redis(tmp_path):
    """Makes servers of this test's own, to be killed and frozen."""
    if PROGRAM is None:
        pytest.skip("no redis-server is installed")
    with contextlib.ExitStack() as stack:

        def make(**options):
            folder = tmp_path / f"redis-{len(made)}"
            folder.mkdir()
            server = RedisServer(folder, **options)
            made.append(server)
            stack.callback(server.kill)
            return server.start()

        made = []
        yield make
