"""Which calls are in flight in other processes, by files: real processes, really killed."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
import time

import pytest

from llmkit.clock import SystemClock
from llmkit.state import flights as module
from llmkit.state.flights import FileFlights
from llmkit.state.shared import FlightFailed

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="kills and file modes of POSIX")


@pytest.fixture
def place(tmp_path):
    yield tmp_path / "ledger.sqlite3"
    gc.collect()
    assert not [path for path in module._OPEN.files if path.startswith(os.path.realpath(tmp_path) + os.sep)]


@contextlib.asynccontextmanager
async def opened(place):
    flights = FileFlights(place, SystemClock())
    try:
        yield flights
    finally:
        await flights.aclose()


def with_one(place, scenario):
    async def main():
        async with opened(place) as flights:
            await scenario(flights)

    asyncio.run(asyncio.wait_for(main(), 60))


async def until(condition):
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("never")


async def followed(flights, key):
    return [piece async for pieces in flights.follow(key) for piece in pieces]


def spools(place):
    return sorted((place.parent / (place.name + ".spool")).glob("*"))


# A process that does what it is told on its standard input, line by line, and says what came of it.
MAKER = """
    import asyncio, json, sys
    from pathlib import Path
    from llmkit.clock import SystemClock
    from llmkit.state.flights import FileFlights

    flights = FileFlights(Path(sys.argv[1]), SystemClock())
    claims = {}

    async def do(what, key, *rest):
        if what == "claim":
            claims[key] = await flights.claim(key)
            return claims[key] is not None
        if what == "publish":
            await claims[key].publish([tuple(piece) for piece in rest[0]])
            return claims[key].followed
        if what == "release":
            await claims[key].release(*rest)
        if what == "close":
            await flights.aclose()

    for line in sys.stdin:
        print(json.dumps(asyncio.run(do(*json.loads(line)))), flush=True)
"""


class Process:
    def __init__(self, place):
        command = [sys.executable, "-c", textwrap.dedent(MAKER), str(place)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def do(self, *what):
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def kill(self):
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(30)
        self._process.stdin.close()
        self._process.stdout.close()


@pytest.fixture
def other(place):
    with contextlib.ExitStack() as stack:

        def started():
            process = Process(place)
            stack.callback(process.kill)
            return process

        yield started


# -- claims ------------------------------------------------------------------------------------------------------------


def test_one_claim_a_key_in_one_process_whoever_asks(place) -> None:
    async def scenario(flights):
        async with opened(place) as also:
            claim = await flights.claim("k")
            assert claim is not None
            assert await flights.claim("k") is None
            assert await also.claim("k") is None
            other = await also.claim("another")
            assert other is not None
            await claim.release()
            await claim.release()
            again = await also.claim("k")
            assert again is not None
            await claim.release()  # not his any longer
            assert await flights.claim("k") is None
            await again.release()
            await other.release()

    with_one(place, scenario)


def test_one_claim_a_key_over_all_processes_until_it_is_released_or_its_process_killed(place, other) -> None:
    async def scenario(flights):
        first, second = other(), other()
        assert first.do("claim", "k") is True
        assert second.do("claim", "k") is False
        assert await flights.claim("k") is None
        assert await flights.claim("of my own") is not None
        assert first.do("release", "k") is None
        assert second.do("claim", "k") is True
        assert await flights.claim("k") is None
        second.kill()
        claim = await flights.claim("k")
        assert claim is not None
        assert first.do("claim", "k") is False
        await claim.release()

    with_one(place, scenario)


def test_a_claim_that_is_dropped_is_released(place, other) -> None:
    async def scenario(flights):
        claim = await flights.claim("k")
        process = other()
        assert process.do("claim", "k") is False
        del claim
        gc.collect()
        assert process.do("claim", "k") is True

    with_one(place, scenario)


def test_one_who_leaves_does_not_free_what_others_of_his_process_hold(place, other) -> None:
    async def scenario(flights):
        claim = await flights.claim("k")
        async with opened(place) as also:
            await (await also.claim("another")).release()
        process = other()
        assert process.do("claim", "k") is False
        await flights.aclose()
        assert process.do("claim", "k") is False
        await claim.release()
        assert process.do("claim", "k") is True

    with_one(place, scenario)


def test_the_files_are_private_and_the_lock_file_stays_empty(place) -> None:
    async def scenario(flights):
        os.umask(0)
        claim = await flights.claim("k")
        following = flights.follow("k").__aiter__()
        task = asyncio.create_task(anext(following))
        await until(lambda: spools(place))
        locks = place.with_name(place.name + ".locks")
        assert stat.S_IMODE(locks.stat().st_mode) == 0o600
        assert locks.stat().st_size == 0
        (spool,) = spools(place)
        assert stat.S_IMODE(spool.stat().st_mode) == 0o600
        assert stat.S_IMODE(spool.parent.stat().st_mode) == 0o700
        await claim.release()
        await asyncio.gather(task, return_exceptions=True)
        assert spools(place) == []

    mask = os.umask(0o022)
    try:
        with_one(place, scenario)
    finally:
        os.umask(mask)


def test_a_lock_file_that_somebody_removed_is_made_anew(place, other, monkeypatch) -> None:
    monkeypatch.setattr(module, "LOOK_AGAIN_S", 0.0)

    async def scenario(flights):
        await (await flights.claim("k")).release()
        place.with_name(place.name + ".locks").unlink()
        claim = await flights.claim("k")
        assert other().do("claim", "k") is False
        await claim.release()

    with_one(place, scenario)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_child_has_no_claim_and_takes_none_away(place, other) -> None:
    async def scenario(flights):
        claim = await flights.claim("k")
        child = os.fork()
        if not child:
            code = 1
            with contextlib.suppress(BaseException):
                work = flights.claim("k")  # a loop runs here already; the claim waits for nothing
                with contextlib.suppress(StopIteration):
                    work.send(None)
                    os._exit(2)
                inherited = claim.release()
                with contextlib.suppress(StopIteration):
                    inherited.send(None)
                free = flights.claim("another")
                try:
                    free.send(None)
                except StopIteration as done:
                    code = 0 if done.value is not None else 3
            os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0  # noqa: ASYNC222
        assert other().do("claim", "k") is False
        await claim.release()

    with_one(place, scenario)


@pytest.mark.parametrize("obstacle", ["a folder", "a link", "a pipe", "no locks"])
def test_where_there_can_be_no_locks_everybody_gets_a_claim_and_one_warning_says_so(
    place, caplog, monkeypatch, obstacle
) -> None:
    locks = place.with_name(place.name + ".locks")
    if obstacle == "a folder":
        locks.mkdir()
    elif obstacle == "a link":
        locks.symlink_to(place.with_name("elsewhere"))
    elif obstacle == "a pipe":
        os.mkfifo(locks)
    else:

        def no_locks(file, place):
            raise OSError(37, "No locks available")

        monkeypatch.setattr(module, "_lock", no_locks)

    async def scenario(flights):
        for key in "abc":
            claim = await flights.claim(key)
            assert claim is not None
            await claim.publish([("x", "")])
            await claim.release()
        assert [pieces async for pieces in flights.follow("a")] == []

    with_one(place, scenario)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "cannot be locked" in warning
    assert not place.with_name("elsewhere").exists()


# -- following ---------------------------------------------------------------------------------------------------------


def test_a_follower_gets_what_was_there_before_and_what_comes(place, other) -> None:
    async def scenario(flights):
        maker = other()
        assert maker.do("claim", "k")
        assert maker.do("publish", "k", [["one ", ""], ["", "hm"]]) is False
        assert spools(place) == []
        got = []

        async def follow():
            async for pieces in flights.follow("k"):
                got.extend(pieces)

        task = asyncio.create_task(follow())
        await until(lambda: spools(place))
        assert maker.do("publish", "k", []) is True
        await until(lambda: len(got) == 2)
        maker.do("publish", "k", [["zwei\n\U0001f600", ""]])
        await until(lambda: len(got) == 3)
        maker.do("publish", "k", [["three", ""]])
        maker.do("release", "k")
        await task
        assert got == [("one ", ""), ("", "hm"), ("zwei\n\U0001f600", ""), ("three", "")]
        assert spools(place) == []

    with_one(place, scenario)


def test_several_followers_and_one_that_leaves(place, other) -> None:
    async def scenario(flights):
        maker = other()
        maker.do("claim", "k")
        tasks = [asyncio.create_task(followed(flights, "k")) for _ in range(3)]
        await until(lambda: len(spools(place)) == 3)
        maker.do("publish", "k", [["one", ""]])
        tasks[0].cancel()
        await asyncio.gather(tasks[0], return_exceptions=True)
        assert len(spools(place)) == 2
        maker.do("publish", "k", [["two", ""]])
        maker.do("release", "k")
        assert await asyncio.gather(*tasks[1:]) == [[("one", ""), ("two", "")]] * 2

    with_one(place, scenario)


def test_following_ends_when_the_maker_is_killed(place, other) -> None:
    async def scenario(flights):
        maker = other()
        maker.do("claim", "k")
        task = asyncio.create_task(followed(flights, "k"))
        await until(lambda: spools(place))
        maker.do("publish", "k", [["one", ""]])
        await asyncio.sleep(0)
        maker.kill()
        killed = time.monotonic()
        assert await task == [("one", "")]
        assert time.monotonic() - killed < 2

    with_one(place, scenario)


def test_following_what_nobody_makes_ends_at_once(place) -> None:
    async def scenario(flights):
        assert await followed(flights, "k") == []

    with_one(place, scenario)


def test_a_failure_is_raised_for_who_follows(place, other) -> None:
    async def scenario(flights):
        maker = other()
        maker.do("claim", "k")
        task = asyncio.create_task(followed(flights, "k"))
        await until(lambda: spools(place))
        maker.do("release", "k", '{"kind": "BadResponse"}')
        with pytest.raises(FlightFailed) as caught:
            await task
        assert caught.value.args == ('{"kind": "BadResponse"}',)

    with_one(place, scenario)


def test_the_next_maker_is_told_from_the_last(place, other) -> None:
    """One is killed and another claims before the follower has looked: what the two say is not mixed."""

    async def scenario(flights):
        first, second = other(), other()
        first.do("claim", "k")
        following = flights.follow("k")
        task = asyncio.create_task(anext(following))
        await until(lambda: spools(place))
        first.do("publish", "k", [["one", ""]])
        assert await task == [("one", "")]
        first.kill()
        assert second.do("claim", "k") is True
        second.do("publish", "k", [["another", ""]])
        assert [pieces async for pieces in following] == []
        assert second.do("publish", "k", []) is False

    with_one(place, scenario)


def test_what_followers_that_died_have_left_is_removed(place) -> None:
    folder = place.with_name(place.name + ".spool")
    folder.mkdir(0o755)
    dead = folder / f"{module._name('k')}.dead"
    dead.write_text("x")
    os.utime(dead, (time.time() - 60, time.time() - 60))

    async def scenario(flights):
        claim = await flights.claim("k")
        assert not dead.exists()
        dead.write_text("x")
        os.utime(dead, (time.time() - 60, time.time() - 60))
        await claim.publish([("one", "")])
        assert not claim.followed
        task = asyncio.create_task(followed(flights, "k"))
        await until(lambda: spools(place) and dead not in spools(place))
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        await claim.publish([("two", "")])
        assert claim.followed
        await claim.release()
        assert await task == [("one", ""), ("two", "")]

    with_one(place, scenario)


@pytest.mark.parametrize(
    "line",
    [
        b"garbage\n",
        b"[]\n",
        b'{"by": 1, "pieces": []}\n',
        b'{"by": "x", "pieces": [["a"]]}\n',
        b'{"by": "x", "pieces": [["a", 5]]}\n',
        b'{"by": "x", "pieces": {"a": 1}}\n',
        b"\xff\xfe\n",
        b"[" * 100_000 + b"\n",
    ],
)
def test_what_another_process_wrote_is_not_trusted(place, other, line) -> None:
    async def scenario(flights):
        maker = other()
        maker.do("claim", "k")
        task = asyncio.create_task(followed(flights, "k"))
        await until(lambda: spools(place))
        with spools(place)[0].open("ab") as spool:
            spool.write(line)
        assert await task == []

    with_one(place, scenario)


def test_half_a_surrogate_pair_is_made_printable(place, other) -> None:
    async def scenario(flights):
        maker = other()
        maker.do("claim", "k")
        task = asyncio.create_task(followed(flights, "k"))
        await until(lambda: spools(place))
        maker.do("publish", "k", [["a\ud800b", ""]])
        maker.do("release", "k")
        assert await task == [("a?b", "")]

    with_one(place, scenario)


def test_a_spool_that_is_no_private_file_is_not_written_to(place, tmp_path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")

    async def scenario(flights):
        folder = place.with_name(place.name + ".spool")
        folder.mkdir(0o700)
        (folder / f"{module._name('k')}.link").symlink_to(victim)
        os.mkfifo(folder / f"{module._name('k')}.pipe")
        (folder / f"{module._name('k')}.folder").mkdir()
        claim = await flights.claim("k")
        await claim.publish([("one", "")])
        await claim.publish([("two", "")])
        await claim.release()

    with_one(place, scenario)
    assert victim.read_text() == "precious"


def test_a_folder_that_cannot_be_made_leaves_the_end_to_wait_for(place, other) -> None:
    place.with_name(place.name + ".spool").write_text("in the way")

    async def scenario(flights):
        maker = other()
        maker.do("claim", "k")
        task = asyncio.create_task(followed(flights, "k"))
        maker.do("publish", "k", [["one", ""]])
        assert not task.done()
        maker.do("release", "k")
        assert await task == []

    with_one(place, scenario)


def test_a_full_disk_stops_what_is_published_and_nothing_else(place, monkeypatch) -> None:
    async def scenario(flights):
        claim = await flights.claim("k")
        task = asyncio.create_task(followed(flights, "k"))
        await until(lambda: spools(place))

        def full(file, data):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(module.os, "write", full)
        await claim.publish([("one", "")])
        await claim.publish([("two", "")])
        await claim.release()
        assert await task == []

    with_one(place, scenario)


def test_a_lone_maker_writes_nothing(place) -> None:
    async def scenario(flights):
        claim = await flights.claim("k")
        for number in range(100):
            await claim.publish([(str(number), "")])
        await claim.release()
        assert [path.name for path in place.parent.iterdir()] == [place.name + ".locks"]
        assert place.with_name(place.name + ".locks").stat().st_size == 0

    with_one(place, scenario)
