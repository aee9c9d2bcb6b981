"""llmkit.portal: one loop, many threads, and waits that can be interrupted."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading

import pytest

from llmkit import portal
from llmkit.testing import FakeClock
from tests.layers.script import HANG, Script, call_for


def interrupt() -> None:
    """What a kernel does: a signal to the main thread. (`_thread.interrupt_main` does not wake one that waits.)"""
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


@pytest.fixture
def bridge():
    made = portal.Portal()
    yield made
    made.close()


def test_it_runs_work_and_hands_back_what_it_gives_or_raises(bridge) -> None:
    async def gives() -> int:
        await asyncio.sleep(0)
        return 42

    async def raises() -> None:
        raise KeyError("x")

    assert bridge.run(gives()) == 42
    with pytest.raises(KeyError, match="x"):
        bridge.run(raises())


def test_many_threads_share_it(bridge) -> None:
    async def who(number: int) -> int:
        await asyncio.sleep(0)
        return number

    results: list[int] = []
    threads = [threading.Thread(target=lambda n=n: results.append(bridge.run(who(n)))) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == list(range(20))


def test_on_its_own_loop_it_refuses_instead_of_waiting_for_itself(bridge) -> None:
    async def inner() -> None:
        pass

    async def outer() -> None:
        bridge.run(inner())

    with pytest.raises(RuntimeError, match="AsyncClient"):
        bridge.run(outer())


def test_an_interrupt_cancels_the_work_and_waits_until_it_has_settled(bridge) -> None:
    steps: list[str] = []

    async def work() -> None:
        interrupt()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            steps.append("settled")

    with pytest.raises(KeyboardInterrupt):
        bridge.run(work())
    assert steps == ["settled"]


async def begun(clock: FakeClock, below: Script):
    return await below(call_for(clock))


def test_a_reply_is_read_without_await(bridge) -> None:
    clock = FakeClock()
    below = Script(clock, list("abc"))
    reply = bridge.run(begun(clock, below))
    reply._portal = bridge
    assert [chunk.text for chunk in reply] == ["a", "b", "c"]
    assert [chunk.text for chunk in reply] == ["a", "b", "c"]
    assert (reply.outcome.status, below.open) == ("complete", 0)


def test_a_break_or_the_end_of_with_aborts_it(bridge) -> None:
    clock = FakeClock(auto=False)
    below = Script(clock, ["a", "b", HANG])
    reply = bridge.run(begun(clock, below))
    reply._portal = bridge
    with reply:
        for chunk in reply:
            assert chunk.text == "a"
            break
    assert (reply.outcome.status, below.open) == ("aborted", 0)


def test_an_interrupted_reader_aborts_it_and_keeps_the_text(bridge) -> None:
    clock = FakeClock(auto=False)
    below = Script(clock, ["a", "b", HANG])
    reply = bridge.run(begun(clock, below))
    reply._portal = bridge
    arrived = []

    def read() -> None:
        for chunk in reply:
            arrived.append(chunk.text)
            if len(arrived) == 2:
                bridge.loop.call_soon_threadsafe(interrupt)

    with pytest.raises(KeyboardInterrupt):
        read()
    assert (arrived, reply.text, reply.outcome.status, below.open) == (["a", "b"], "ab", "aborted", 0)


def test_closing_cancels_what_still_runs() -> None:
    made = portal.Portal()
    ended = threading.Event()

    async def endless() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    job = made.start(endless())
    made.close()
    assert ended.is_set()
    assert made.loop.is_closed()
    with pytest.raises(asyncio.CancelledError):
        job.result()
    made.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_gets_its_own() -> None:
    code = """
import os, sys, warnings
warnings.simplefilter("ignore")
from llmkit import portal
async def pid(): return os.getpid()
assert portal.shared().run(pid()) == os.getpid()
child = os.fork()
if not child:
    os._exit(0 if portal.shared().run(pid()) == os.getpid() else 1)
assert os.waitpid(child, 0)[1] == 0
assert portal.shared().run(pid()) == os.getpid()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
