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
from llmkit.ledger import Ledger
from llmkit.testing import FakeClock, Fault, Simulator
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


INHERITED = """
import os, sys, warnings

import llmkit

warnings.simplefilter("ignore", DeprecationWarning)  # forking beside threads, which is the point
client = llmkit.Client(config=llmkit.Config.of(model="simulator"))
reply = client.complete("hello")
arriving = client.stream("hello again, " * 50)
child = os.fork()
if child == 0:
    try:
        assert client.complete("hello").text == reply.text
        reply.close()  # it has ended: there is nothing to close
        try:
            arriving.close()
        except RuntimeError as error:
            assert "process" in str(error)
        else:
            os._exit(3)
        os._exit(0)
    except BaseException:
        os._exit(2)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="only POSIX forks")
def test_a_client_made_before_a_fork_answers_after_it() -> None:
    done = subprocess.run([sys.executable, "-c", INHERITED], capture_output=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr


UNCLOSED = """
import sys

import llmkit

config = llmkit.Config.of(models={"m": {"provider": "vllm", "model": "m", "base_url": sys.argv[1]}})
client = llmkit.Client(config=config, model="m")
reply = client.stream("hello")
"""


def test_a_script_that_closes_nothing_ends_quietly_and_settles_what_arrives(tmp_path) -> None:
    simulator = Simulator()
    simulator.fail(Fault.stall(after=1), times=1)
    with simulator.server() as url:
        environ = {**os.environ, "LLMKIT_DATA_DIR": str(tmp_path)}
        command = [sys.executable, "-c", UNCLOSED, url]
        done = subprocess.run(command, capture_output=True, timeout=30, check=False, env=environ)
    assert (done.returncode, done.stderr) == (0, b"")
    ledger = Ledger.open(f"sqlite:///{tmp_path}/ledger.sqlite3")
    assert [row["status"] for row in ledger.calls()] == ["aborted"]
    ledger.close()


DROPPED = """
import gc, sys

import llmkit

config = llmkit.Config.of(models={"m": {"provider": "vllm", "model": "m", "base_url": sys.argv[1]}})
for number in range(3):
    client = llmkit.Client(config=config, model="m")
    client.complete(f"hello {number}")
    del client
    gc.collect()
"""


def test_a_client_that_is_dropped_closes_its_connections_without_a_word(tmp_path) -> None:
    simulator = Simulator()
    with simulator.server() as url:
        environ = {**os.environ, "LLMKIT_DATA_DIR": str(tmp_path)}
        command = [sys.executable, "-W", "always::ResourceWarning", "-c", DROPPED, url]
        done = subprocess.run(command, capture_output=True, timeout=30, check=False, env=environ)
    assert (done.returncode, done.stderr) == (0, b"")
    assert simulator.calls == 3


def test_a_loop_is_kept_by_its_users_alone() -> None:
    class User:
        pass

    one, other = User(), User()
    loop = portal.shared(one)
    assert portal.shared(other) is loop
    portal.leave(one)
    assert not loop.loop.is_closed()
    portal.leave(other)
    assert loop.loop.is_closed()
    again = portal.shared(one)
    assert again is not loop
    with pytest.raises(RuntimeError, match="closed"):
        loop.run(_number())
    portal.leave(one)


async def _number():
    return 1
