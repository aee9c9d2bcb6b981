"""The way to a server: any loop, any thread, forks; servers that are slow, strange or not there."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import threading
import time
import traceback

import pytest

from llmkit.errors import ConfigError, StoreError
from llmkit.state.redis import connection as module
from llmkit.state.redis.connection import Script, Server, ServerAway

pytestmark = pytest.mark.redis

ECHO = Script("echo", "return ARGV[1]")
SLOW = Script("be slow", "local n = 0 while n < tonumber(ARGV[1]) do n = n + 1 end return 'done'")
WRONG = Script("be wrong", "return redis.call('NOSUCH')")


async def ask(server, text="x"):
    return await server.run(ECHO, text)


def threads():
    return [each for each in threading.enumerate() if each.name == "llmkit-redis"]


async def once(server):
    try:
        return await ask(server)
    finally:
        await server.aclose()


def test_loops_end_and_the_connection_stays(redis_server):
    server = Server(redis_server.url)
    before = redis_server.ask("INFO", "stats")["total_connections_received"]
    assert [asyncio.run(ask(server, str(each))) for each in range(10)] == [str(each).encode() for each in range(10)]
    assert redis_server.ask("INFO", "stats")["total_connections_received"] == before + 2  # ours, and this question's
    assert len(threads()) == 1
    asyncio.run(server.aclose())
    assert threads() == []
    assert asyncio.run(ask(server)) == b"x"  # it opens again
    asyncio.run(server.aclose())


def test_many_threads_ask_at_once(redis_server):
    server = Server(redis_server.url)
    found = {}

    def work(number):
        async def some():
            return await asyncio.gather(*(ask(server, f"{number}-{each}") for each in range(50)))

        found[number] = asyncio.run(some())

    workers = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for each in workers:
        each.start()
    for each in workers:
        each.join()
    assert found == {number: [f"{number}-{each}".encode() for each in range(50)] for number in range(8)}
    asyncio.run(server.aclose())


def test_a_server_that_is_dropped_takes_its_thread_along(redis_server):
    server = Server(redis_server.url)
    asyncio.run(ask(server))
    (thread,) = threads()
    del server
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # that is what is tried
def test_a_forked_child_has_a_connection_of_its_own(redis_server):
    server = Server(redis_server.url)
    asyncio.run(ask(server))
    child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(BaseException):
            assert asyncio.run(once(server)) == b"x"
            status = 0
        os._exit(status)
    for _ in range(20):
        assert asyncio.run(ask(server, "parent")) == b"parent"
    assert os.waitpid(child, 0)[1] == 0
    assert asyncio.run(once(server)) == b"x"


def test_whoever_is_cancelled_spoils_nobody_elses_answer(redis_server):
    server = Server(redis_server.url)

    async def main():
        for _ in range(20):
            asked = [asyncio.create_task(ask(server, str(each))) for each in range(20)]
            await asyncio.sleep(0)
            for each in asked[::3]:
                each.cancel()
            done = await asyncio.gather(*asked, return_exceptions=True)
            for each, reply in enumerate(done):
                assert isinstance(reply, asyncio.CancelledError) if each % 3 == 0 else reply == str(each).encode()
        await server.aclose()

    asyncio.run(main())


def test_an_error_of_the_server_is_one_of_that_command_alone(redis_server):
    server = Server(redis_server.url)

    async def main():
        done = await asyncio.gather(ask(server), server.run(WRONG), ask(server), return_exceptions=True)
        assert (done[0], done[2]) == (b"x", b"x")
        assert isinstance(done[1], StoreError)
        assert not isinstance(done[1], ServerAway)
        assert "be wrong" in done[1].message
        await server.aclose()

    asyncio.run(main())


def test_what_must_not_be_written_now_may_be_later(own_redis):
    server = own_redis()
    put = Script("put", "return redis.call('SET', P .. 'x', ARGV[1])")

    async def main():
        shared = Server(server.url)
        server.ask("CONFIG", "SET", "maxmemory", "1")
        with pytest.raises(ServerAway, match="memory"):
            await shared.run(put, "y")
        server.ask("CONFIG", "SET", "maxmemory", "0")
        assert await shared.run(put, "y") == b"OK"
        await shared.aclose()

    asyncio.run(main())


def test_a_script_that_takes_too_long_is_given_up(own_redis, monkeypatch):
    monkeypatch.setattr(module, "COMMAND_S", 0.2)
    server = own_redis()

    async def main():
        shared = Server(server.url)
        with pytest.raises(ServerAway, match="no answer"):
            await shared.run(SLOW, str(10**12))
        server.ask("SCRIPT", "KILL")
        await shared.aclose()

    asyncio.run(main())


@pytest.fixture
def stranger():
    """A server that answers every connection with the same bytes, or not at all."""
    with contextlib.ExitStack() as stack:

        def make(answer):
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            taken = []
            stack.callback(lambda: [each.close() for each in taken])

            def serve():
                with contextlib.suppress(OSError):
                    while True:
                        sock, _ = listener.accept()
                        taken.append(sock)
                        if answer is not None:
                            sock.sendall(answer)

            worker = threading.Thread(target=serve, daemon=True)
            worker.start()
            stack.callback(lambda: listener.shutdown(socket.SHUT_RDWR))
            return f"redis://127.0.0.1:{listener.getsockname()[1]}/3"

        yield make


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n<html>no</html>",
        b"SSH-2.0-OpenSSH_9\r\n",
        b"$-7\r\n",
        b"*1000000000\r\n",
        b"+OK\r\n" * 3 + b"\xff\xfe\x00garbage\r\n",
        b"-ERR \x1b[31mred\x07 sk-fake-0123456789abcdefghijklmnop\r\n" * 9,
        None,
    ],
)
def test_whatever_answers_instead_of_a_server_is_one_clear_error_in_time(stranger, answer):
    server = Server(stranger(answer))

    async def main():
        began = time.monotonic()
        with pytest.raises(StoreError) as caught:
            await ask(server)
        assert time.monotonic() - began < 6
        text = "".join(traceback.format_exception(caught.value))
        assert "redis://127.0.0.1" in caught.value.message
        assert "sk-fake" not in caught.value.message + text
        assert "\x1b" not in caught.value.message
        await server.aclose()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://localhost", "redis://localhost:6379/0"),
        ("redis://ana:secret@host:7000/2", "redis://host:7000/2"),
        ("rediss://:s%2Fcret@[::1]:7000", "rediss://[::1]:7000/0"),
    ],
)
def test_an_address_shows_itself_without_its_password(url, shown):
    server = Server(url)
    assert (server.location, repr(server)) == (shown, f"<Server {shown}>")


@pytest.mark.parametrize(
    "url",
    [
        "redis://h:70000",
        "redis://h/first",
        "redis://h/-1",
        "redis://h?password=secret",
        "rediss://h?ssl_cert_reqs=none",
        "http://h:1/0",
    ],
)
def test_what_is_no_address_is_said_without_showing_it(url):
    with pytest.raises(ConfigError) as caught:
        Server(url)
    assert "secret" not in "".join(traceback.format_exception(caught.value))
