"""The simulator behind a real socket: starting, stopping, hanging clients, and chaos with exact books."""

from __future__ import annotations

import asyncio
import collections
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request

import httpx
import pytest

from llmkit.reply import Usage
from llmkit.testing import FakeClock, Fault, Simulator
from llmkit.testing.books import added
from tests.testing.asking import ask, blocks, connected, request


def test_the_url_is_a_base_url_on_loopback() -> None:
    async def main():
        async with Simulator().serve() as url:
            assert url.startswith("http://127.0.0.1:")
            assert url.endswith("/v1")
            async with httpx.AsyncClient(trust_env=False) as client:
                for address in (url, url + "/v1", url.removesuffix("/v1")):
                    assert (await client.get(address + "/models")).json()["data"][0]["id"] == "simulator"

    asyncio.run(main())


def test_a_port_that_is_taken_is_an_os_error() -> None:
    simulator = Simulator()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]

        async def main():
            async with simulator.serve(port=port):
                pass

        with pytest.raises(OSError):
            asyncio.run(main())
        with pytest.raises(OSError), simulator.server(port=port):
            pass
        with pytest.raises(OSError):
            simulator.run_forever(port=port)


def test_for_code_without_a_loop() -> None:
    simulator = Simulator(answer="Hello.")
    before = threading.active_count()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with simulator.server() as url:
        for _ in range(2):
            with opener.open(url + "/models", timeout=10) as response:
                assert response.status == 200
        with httpx.Client(trust_env=False, timeout=10) as client:
            assert client.post(url + "/messages", json=request("anthropic")).json()["content"][0]["text"] == "Hello."
        simulator.wait_until(lambda books: books.calls == 1)
    assert threading.active_count() == before
    with pytest.raises(httpx.ConnectError), httpx.Client(trust_env=False) as client:
        client.get(url + "/models")


def test_an_error_in_the_block_stops_the_server_as_well() -> None:
    before = threading.active_count()
    with pytest.raises(KeyError), Simulator().server():
        raise KeyError
    assert threading.active_count() == before


@pytest.mark.parametrize("fault", [Fault.hang(), Fault.stall(after=1), Fault.endless()], ids=repr)
def test_stopping_ends_what_hangs(fault) -> None:
    simulator = Simulator(clock=FakeClock(auto=False))
    simulator.fail(fault)

    async def main():
        async with httpx.AsyncClient(trust_env=False) as client:
            async with simulator.serve() as url:
                task = asyncio.create_task(client.post(url + "/chat/completions", json=request(stream=True)))
                await simulator.arrived(1)
            with pytest.raises(httpx.TransportError):
                await asyncio.wait_for(task, 10)
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())
    assert (simulator.open, simulator.disconnects) == (0, 0)
    assert simulator.requests[0].state == "stopped"


def test_a_stall_has_sent_what_came_before_it() -> None:
    simulator = Simulator(answer="one two three", clock=FakeClock(auto=False))
    simulator.fail(Fault.stall(after=2))

    async def scenario():
        async with connected(simulator, socket=True) as client:
            stream = client.stream("POST", "/chat/completions", json=request(stream=True))
            async with stream as response:
                content = b""
                async for block in response.aiter_raw():
                    content += block
                    if b" two" in content:
                        break
            await simulator.until(lambda books: books.disconnects == 1)

    asyncio.run(asyncio.wait_for(scenario(), 20))
    assert simulator.billed.output_tokens == 2


def test_a_body_that_is_too_large_is_refused(monkeypatch) -> None:
    monkeypatch.setattr("llmkit.testing.server._MOST_BODY", 1000)

    async def scenario():
        async with connected(Simulator(), socket=True) as client:
            return await ask(client, prompt="x" * 2000)

    assert asyncio.run(scenario()).status_code == 413


def test_run_forever_ends_on_an_interrupt() -> None:
    code = "from llmkit.testing import Simulator; Simulator().run_forever(on_start=lambda url: print(url, flush=True))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        url = process.stdout.readline().strip()
        with httpx.Client(trust_env=False, timeout=10) as client:
            assert client.post(url + "/chat/completions", json=request()).status_code == 200
        os.kill(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=10)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, errors) == (0, "")


CHAOS = [
    Fault.status(503, retry_after=1),
    Fault.status(429),
    Fault.quota(),
    Fault.auth(),
    Fault.html(),
    Fault.garbage(),
    Fault.empty(),
    Fault.reset(),
    Fault.refused(),
    Fault.hang(30),
    Fault.stall(after=1, seconds=30),
    Fault.slow(1, 0.1),
    Fault.cut(after=2),
    Fault.no_done(),
    Fault.garbage_frame(after=1),
    Fault.error_in_stream(after=2),
    Fault.usage("none"),
    Fault.framing("halves", "crlf"),
    Fault.refusal(),
    Fault.content_filter(after=1),
    Fault.reasoning_only(),
]


def test_chaos_with_exact_books() -> None:
    from aiohttp import ClientError, ClientSession

    simulator = Simulator(answer="one two three four", clock=FakeClock(), keep=5000)
    simulator.fail_rate(0.2, CHAOS, seed=3)
    received = collections.Counter()

    async def one(session, url, number):
        body = request(prompt=f"number {number}", stream=number % 2 == 0)
        try:
            async with session.post(url + "/chat/completions", json=body) as response:
                await response.read()
                received["whole"] += 1
        except ClientError:
            received["broken"] += 1

    async def main():
        gate, tasks = asyncio.Semaphore(64), asyncio.all_tasks()

        async def guarded(session, url, number):
            async with gate:
                await one(session, url, number)

        async with simulator.serve() as url, ClientSession() as session:
            await asyncio.gather(*(guarded(session, url, number) for number in range(2000)))
        assert asyncio.all_tasks() == tasks

    asyncio.run(asyncio.wait_for(main(), 60))
    # aiohttp itself sends an idempotent request again when a kept connection turns out to be gone; POST is not one.
    assert simulator.calls == received["whole"] + received["broken"] == 2000
    assert (simulator.open, simulator.disconnects) == (0, 0)
    states = collections.Counter(each.state for each in simulator.requests)
    assert states == {"complete": received["whole"], "broken": received["broken"]}
    assert 300 <= sum(each.fault is not None for each in simulator.requests) <= 500
    assert {each.fault.kind for each in simulator.requests if each.fault} == {fault.kind for fault in CHAOS}
    assert simulator.billed == added(each.billed for each in simulator.requests)
    assert all(each.billed == Usage(2, 4) for each in simulator.requests if each.fault is None)


def test_a_thread_serves_while_loops_ask() -> None:
    simulator = Simulator(answer="one two")

    async def many(url):
        async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=20) as client:
            for _ in range(10):
                found, error = await blocks(client)
                assert error is None
                assert found

    with simulator.server() as url:
        threads = [threading.Thread(target=lambda: asyncio.run(many(url))) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert simulator.calls == 30
    assert simulator.billed.output_tokens == 60
