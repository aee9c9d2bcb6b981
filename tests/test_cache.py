"""llmkit.cache, llmkit.answer and `client.cache`: tiers, poison, other processes, faults of the store."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from decimal import Decimal
from hashlib import sha256
from pathlib import Path

import pytest

import llmkit
from llmkit.answer import MAX_BYTES, Answer, Unreadable
from llmkit.cache import CHECK_S, COPY_BYTES, LOOK_S, REST_S, AnswerCache
from llmkit.config import CacheSettings, Config
from llmkit.errors import NotCached, StoreError
from llmkit.reply import Usage
from llmkit.state.entries import MemoryEntries, SQLiteEntries
from llmkit.testing import FakeClock, Simulator

KEY, OTHER = "a" * 64, "b" * 64
USAGE = Usage(1, 2, 3, 4, 5, 6, estimated=True)
TOOLS = json.dumps([{"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"é": 1}'}}])
ANSWER = Answer("téxt\n\0", "thoughts", "m-1", "own", "stop", USAGE, TOOLS, Decimal("0.000001"), 1e9)

# -- the stored form -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        ANSWER,
        ANSWER._replace(usage=None, cost=None, tool_calls="", reasoning=""),
        ANSWER._replace(text="", cost=Decimal(0)),
        ANSWER._replace(text="x" * 10**6, tool_calls=""),
    ],
    ids=["all", "little", "no text", "long"],
)
def test_what_is_stored_is_read_again(answer) -> None:
    assert Answer.read(answer.stored(KEY), KEY) == answer


def sealed(head, key=KEY, version=b"llmkit-answer/1 ", text=b"text"):
    """An entry with a checksum that fits: what somebody writes who knows the form."""
    body = (head if isinstance(head, bytes) else json.dumps(head).encode()) + b"\n" + text
    return version + sha256(key.encode() + b"\n" + body).hexdigest().encode() + b"\n" + body


FIELDS = json.loads(ANSWER.stored(KEY).split(b"\n")[1])
POISON = {
    "nothing": b"",
    "garbage": os.urandom(500),
    "pickle": b"\x80\x04\x95\x10\x00cos\nsystem\n(S'echo'\ntR.",
    "json alone": json.dumps(FIELDS).encode(),
    "cut": ANSWER.stored(KEY)[:-1],
    "longer": ANSWER.stored(KEY) + b" ",
    "another key's": ANSWER.stored(OTHER),
    "a flipped bit": ANSWER.stored(KEY)[:-9] + bytes([ANSWER.stored(KEY)[-9] ^ 1]) + ANSWER.stored(KEY)[-8:],
    "another version": sealed(FIELDS, version=b"llmkit-answer/2 "),
    "not json": sealed(b"{"),
    "not utf-8": sealed(b'{"model": "\xff"}'),
    "text that is not utf-8": sealed(FIELDS, text=b"a\xff"),
    "half a pair": sealed(FIELDS, text="\ud800".encode("utf-8", "surrogatepass")),
    "deep": sealed(b"[" * 100_000),
    "a list": sealed([]),
    "null": sealed(None),
    "no fields": sealed({}),
    **{f"no {name}": sealed({n: v for n, v in FIELDS.items() if n != name}) for name in FIELDS},
    **{
        f"{name} is {value!r:.20}": sealed({**FIELDS, name: value})
        for name, values in {
            "reasoning": [None, 5, "\udfff"],
            "model": [None, 3, "x" * 1000, "a\nb", "\x1b[31m"],
            "provider": [None, "\u2028"],
            "finish_reason": [None, "", "length", "content_filter", "refusal", 1],
            "usage": [[], [1] * 7, [1, 2, 3, 4, 5, 6], [-1, 2, 3, 4, 5, 6, True], [1.5, 2, 3, 4, 5, 6, True], [10**13, 2, 3, 4, 5, 6, True], {}, "abcdefg", 3],
            "tool_calls": [None, "[", "{}", "[]", "[1]", '[{"id": "x"}]', json.dumps(json.loads(TOOLS) * 129), '[{"id": 1, "type": "function", "function": {"name": "a", "arguments": ""}}]', '[{"id": "1", "type": "shell", "function": {"name": "a", "arguments": ""}}]'],
            "cost_nanos": [-1, 1.5, "1", True, 10**30],
            "created": [None, 5, -1.0, float("nan"), float("inf"), "now"],
        }.items()
        for value in values
    },
    "empty": sealed({**FIELDS, "tool_calls": ""}, text=b""),
}  # fmt: skip


@pytest.mark.parametrize("stored", POISON.values(), ids=POISON.keys())
def test_what_anybody_may_have_written_is_not_believed(stored) -> None:
    with pytest.raises(Unreadable) as raised:
        Answer.read(stored, KEY)
    assert "téxt" not in str(raised.value)


def test_what_is_too_long_is_not_even_looked_at(monkeypatch) -> None:
    assert MAX_BYTES > 32 * 2**20  # more than any provider may send
    monkeypatch.setattr("llmkit.answer.MAX_BYTES", 100)
    with pytest.raises(Unreadable, match="more than"):
        Answer.read(sealed(FIELDS), KEY)


# -- tiers ---------------------------------------------------------------------------------------------------------------


class Counting:
    """Entries in memory that count what is asked of them, and fail when told to."""

    def __init__(self, clock, location="elsewhere"):
        self.inner = MemoryEntries(max_bytes=10**6, clock=clock)
        self.location = location
        self.asked = []
        self.failure = None

    def __getattr__(self, name):
        method = getattr(self.inner, name)

        async def counted(*given, **named):
            self.asked.append(name)
            if self.failure is not None:
                raise self.failure
            return await method(*given, **named)

        return counted


class Tiers:
    def __init__(self, **settings):
        self.clock = FakeClock()
        self.below = Counting(self.clock)
        self.cache = self.another(**settings)

    def another(self, **settings):
        return AnswerCache(CacheSettings(**settings), self.clock, lambda: self.below)

    async def keep(self, cache=None, key=KEY, answer=ANSWER, **options):
        await (cache or self.cache).keep(key, answer, namespace="", **options)


def test_what_is_kept_is_at_hand_without_asking_anybody() -> None:
    async def main() -> None:
        tiers = Tiers()
        await tiers.keep()
        assert tiers.cache.copy_of(KEY) is None  # nobody has been asked yet whether it is still good
        assert await tiers.cache.find(KEY) == ANSWER
        asked = len(tiers.below.asked)
        assert tiers.cache.copy_of(KEY) is ANSWER
        assert (len(tiers.below.asked), tiers.below.asked.count("get")) == (asked, 0)

    asyncio.run(main())


def test_what_is_found_below_is_copied_up() -> None:
    async def main() -> None:
        tiers = Tiers()
        await tiers.keep(tiers.another())
        assert await tiers.cache.find(KEY) == ANSWER
        assert tiers.below.asked.count("get") == 1
        assert tiers.cache.copy_of(KEY) == ANSWER
        assert await tiers.cache.find(OTHER) is None

    asyncio.run(main())


@pytest.mark.parametrize("change", ["clear", "refresh"])
def test_a_clear_or_a_refresh_elsewhere_is_seen_within_a_second(change) -> None:
    async def main() -> None:
        tiers = Tiers()
        other = tiers.another()
        await tiers.keep()
        await tiers.cache.find(KEY)
        if change == "clear":
            assert await other.clear() == 1
        else:
            await tiers.keep(other, answer=ANSWER._replace(text="new"), renew=True)
        await tiers.clock.advance(CHECK_S)
        assert tiers.cache.copy_of(KEY) is None
        found = await tiers.cache.find(KEY)
        assert (found and found.text) == (None if change == "clear" else "new")

    asyncio.run(main())


def test_an_ordinary_answer_stored_elsewhere_drops_no_copy() -> None:
    async def main() -> None:
        tiers = Tiers()
        await tiers.keep()
        await tiers.cache.find(KEY)
        await tiers.keep(tiers.another(), key=OTHER)
        await tiers.clock.advance(CHECK_S)
        await tiers.cache.find(KEY)
        assert tiers.below.asked.count("get") == 0

    asyncio.run(main())


def test_copies_expire_like_what_they_are_copies_of() -> None:
    async def main() -> None:
        tiers = Tiers(ttl_s=10)
        await tiers.keep()
        await tiers.clock.advance(9.5)
        assert await tiers.cache.find(KEY) == ANSWER
        await tiers.clock.advance(0.6)
        assert tiers.cache.copy_of(KEY) is None
        assert await tiers.cache.find(KEY) is None
        forever = Tiers(ttl_s=None)
        await forever.keep()
        await forever.clock.advance(10**9)
        assert await forever.cache.find(KEY) == ANSWER

    asyncio.run(main())


def test_a_copy_is_looked_up_again_now_and_then_so_that_the_store_knows_it_is_used() -> None:
    async def main() -> None:
        tiers = Tiers()
        await tiers.keep()
        for _ in range(3):
            await tiers.clock.advance(LOOK_S)
            await tiers.cache.find(KEY)
            await tiers.cache.find(KEY)
        assert tiers.below.asked.count("get") == 3
        await tiers.below.inner.delete(KEY)  # evicted there
        await tiers.clock.advance(LOOK_S)
        assert await tiers.cache.find(KEY) is None

    asyncio.run(main())


def test_copies_are_bounded_and_the_least_used_go_first() -> None:
    async def main() -> None:
        size = len(ANSWER.stored(KEY)) + COPY_BYTES
        tiers = Tiers(memory_bytes=3 * size)
        await tiers.cache.find(KEY)  # it may be used from now on
        for number in range(3):
            await tiers.keep(key=str(number) * 64)
        assert tiers.cache.copy_of("0" * 64) is ANSWER
        await tiers.keep(key="3" * 64)
        assert [tiers.cache.copy_of(str(number) * 64) is ANSWER for number in range(4)] == [True, False, True, True]
        await tiers.keep(key="0" * 64, answer=ANSWER._replace(text="x" * 4 * size))  # larger than all of it
        assert tiers.cache.copy_of("0" * 64) is None
        assert (await tiers.cache.find("0" * 64)).text == "x" * 4 * size
        await tiers.cache.clear()
        assert (tiers.cache._size, len(tiers.cache._copies)) == (0, 0)

    asyncio.run(main())


def test_answers_that_are_in_memory_anyway_are_there_once() -> None:
    async def main() -> None:
        clock = FakeClock()
        cache = AnswerCache(CacheSettings(), clock, lambda: MemoryEntries(max_bytes=10**6, clock=clock))
        for _ in range(2):
            await cache.find(OTHER)
            await cache.keep(KEY, ANSWER, namespace="")
        assert await cache.find(KEY) == ANSWER
        assert len(cache._copies) == 0

    asyncio.run(main())


@pytest.mark.parametrize("stored", [POISON["garbage"], POISON["another key's"], POISON["cut"]])
def test_poison_is_a_miss_and_one_warning_and_goes(stored, caplog) -> None:
    async def main() -> None:
        tiers = Tiers()
        await tiers.below.inner.put(KEY, stored, namespace="", expires=None)
        for _ in range(3):
            assert await tiers.cache.find(KEY) is None
        assert await tiers.below.inner.get(KEY) is None

    with caplog.at_level(logging.WARNING, "llmkit"):
        asyncio.run(main())
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "téxt" not in caplog.text


@pytest.mark.parametrize("failure", [StoreError("away"), RuntimeError("a bug"), OSError(5, "I/O error")])
def test_a_store_that_fails_fails_no_call_is_said_once_and_left_alone_for_a_while(failure, caplog) -> None:
    async def main() -> None:
        tiers = Tiers()
        await tiers.keep()
        tiers.below.failure = failure
        for _ in range(5):
            assert await tiers.cache.find(OTHER) is None
            assert await tiers.cache.find(KEY) == ANSWER  # what is at hand is still used
            await tiers.keep(key=OTHER + "c")
        assert len(tiers.below.asked) == 2  # what was stored at first, and the one that failed
        tiers.below.failure = None
        await tiers.clock.advance(REST_S)
        await tiers.keep(key=OTHER)
        assert (await tiers.cache.contents()).entries == 2

    with caplog.at_level(logging.WARNING, "llmkit"):
        asyncio.run(main())
    assert len(caplog.records) == 1


def test_a_store_that_cannot_be_opened_is_said_and_answers_are_kept_in_memory(caplog) -> None:
    def opening():
        raise StoreError("no room", next_step="make room")

    async def main() -> None:
        cache = AnswerCache(CacheSettings(), FakeClock(), opening)
        await cache.keep(KEY, ANSWER, namespace="")
        assert await cache.find(KEY) == ANSWER
        assert cache.location == "memory"

    with caplog.at_level(logging.WARNING, "llmkit"):
        asyncio.run(main())
    assert "no room" in caplog.text
    assert "make room" in caplog.text


# -- a client ------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _servers():
    with contextlib.ExitStack() as stack:
        SERVERS.update(stack=stack, urls={})
        yield


SERVERS = {}


def url_of(simulator):
    """Where a simulator is served in this test; one that is a client's transport has its answers kept to that client."""
    if simulator not in SERVERS["urls"]:
        SERVERS["urls"][simulator] = SERVERS["stack"].enter_context(simulator.server())
    return SERVERS["urls"][simulator]


def config(tmp_path, simulator, **settings):
    return Config.of(
        environ={"TEST_KEY": "sk-test-key-of-nobody-1234"},
        model="m",
        models={"m": {"provider": "own", "model": "m-1", "price": {"input": 1, "output": 2}}},
        providers={"own": {"base_url": url_of(simulator), "api_key_env": "TEST_KEY"}},
        state={"url": f"sqlite:///{tmp_path}/ledger.sqlite3"},
        **settings,
    )


def on_disk(tmp_path):
    return b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def client_of(tmp_path, simulator, **settings):
    return llmkit.Client(config=config(tmp_path, simulator, **settings))


def test_run_it_again_and_pay_nothing(tmp_path) -> None:
    simulator = Simulator("one two three", clock=FakeClock())
    with client_of(tmp_path, simulator) as client:
        first = client.complete("hi", user="ana")
        with client.stream("hi") as again:
            assert [chunk.text for chunk in again] == ["one two three"]
        assert (again.source, again.cost_usd, again.saved_usd) == ("cache", 0, first.cost_usd)
        assert first.cost_usd > 0
        assert (again.usage, again.model, again.provider) == (first.usage, first.model, first.provider)
        assert (again.attempts, again.outcome.status) == ((), "complete")
        assert simulator.calls == 1
        assert (client.cache.hits, client.cache.misses, client.cache.saved_usd) == (1, 1, first.cost_usd)
        assert client.cache.location == str(tmp_path / "ledger.cache.sqlite3")
        rows = client.calls()
        assert list(rows["source"]) == ["provider", "cache"]
        assert list(rows["cost_usd"]) == [float(first.cost_usd), 0]
    with client_of(tmp_path, simulator) as client:  # the kernel was restarted
        assert client.complete("hi").source == "cache"
        assert client.cache.contents().entries == 1
        assert client.cache.clear() == 1
        assert client.cache.contents() == (0, 0)
        assert client.complete("hi").source == "provider"
    assert simulator.calls == 2


def test_options_reach_the_cache(tmp_path) -> None:
    simulator = Simulator("fine", clock=FakeClock())
    with client_of(tmp_path, simulator) as client:
        with pytest.raises(NotCached) as raised:
            client.complete("hi", cache="only")
        assert raised.value.spent == 0
        sources = [client.complete("hi", **each).source for each in ({}, {"repeat": 1}, {"repeat": 1}, {"cache": "off"}, {"cache": "refresh"}, {"cache": "only"}, {"temperature": 0}, {"seed": 1}, {"stop": "x"}, {"system": "s"}, {"extra": {"min_p": 1}}, {"user": "ana", "tags": {"a": "b"}, "max_cost": 0.2, "timeout": 5})]  # fmt: skip
        assert sources == ["provider", "provider", "cache", "provider", "provider", "cache", *["provider"] * 5, "cache"]
        assert client.calls()["status"].iloc[0] == "rejected"


@pytest.mark.parametrize(
    "setting, same, other",
    [
        ("user", {"user": "ana"}, {"user": "bob"}),
        ("user", {"user": "ana"}, {}),
        ("tag:app", {"tags": {"app": "docs"}}, {"tags": {"app": "chat"}}),
        ("tag:app", {"tags": {"app": "docs"}}, {"tags": {"ap": "docs"}}),
    ],
)
def test_namespaces(tmp_path, setting, same, other) -> None:
    simulator = Simulator("x", clock=FakeClock())
    with client_of(tmp_path, simulator, cache={"namespace": setting}) as client:
        sources = [client.complete("hi", **options).source for options in (same, other, same, other)]
        assert sources == ["provider", "provider", "cache", "cache"]
        name = f"{setting.removesuffix(':app')}:" + ("app=docs" if setting == "tag:app" else "ana")
        assert client.cache.contents(name).entries == 1
        assert client.cache.clear(name) == 1
        assert [client.complete("hi", **options).source for options in (other, same)] == ["cache", "provider"]


def test_it_can_be_switched_off_by_one_line(tmp_path) -> None:
    simulator = Simulator("x", clock=FakeClock())
    with client_of(tmp_path, simulator, cache={"enabled": False}) as client:
        assert [client.complete("hi").source for _ in range(2)] == ["provider"] * 2
    assert not list(tmp_path.glob("*.cache.*"))


def test_content_need_not_be_on_disk(tmp_path) -> None:
    simulator = Simulator("the secret of the answer", clock=FakeClock())
    with client_of(tmp_path, simulator, cache={"persist": False}) as client:
        assert [client.complete("hi").source for _ in range(2)] == ["provider", "cache"]
        assert client.cache.location == "memory"
    assert b"secret" not in on_disk(tmp_path)
    with client_of(tmp_path, simulator, cache={"persist": False}) as client:
        assert client.complete("hi").source == "provider"


def test_no_key_and_no_prompt_is_on_disk(tmp_path) -> None:
    simulator = Simulator("you sent sk-test-key-of-nobody-1234, did you?", clock=FakeClock())
    with client_of(tmp_path, simulator) as client:
        client.complete("a prompt that is nobody's business")
        assert client.complete("a prompt that is nobody's business").source == "cache"
        content = on_disk(tmp_path)
    assert b"did you?" in content
    assert b"sk-test-key" not in content
    assert b"nobody's business" not in content


def damaged(path: Path) -> None:
    path.write_bytes(os.urandom(20_000))


def test_a_damaged_cache_harms_neither_a_call_nor_the_ledger(tmp_path, caplog) -> None:
    simulator = Simulator("x", clock=FakeClock())
    with client_of(tmp_path, simulator) as client:
        client.complete("hi")
    damaged(tmp_path / "ledger.cache.sqlite3")
    with caplog.at_level(logging.WARNING, "llmkit"), client_of(tmp_path, simulator) as client:
        assert [client.complete("hi").source for _ in range(2)] == ["provider", "cache"]
        assert len(client.calls()) == 3
        assert client._client.ledger.notice is None
    assert len(caplog.records) == 1


def test_a_poisoned_entry_is_asked_anew(tmp_path, caplog) -> None:
    simulator = Simulator("x", clock=FakeClock())
    with client_of(tmp_path, simulator) as client:
        client.complete("hi")
    with contextlib.closing(sqlite3.connect(tmp_path / "ledger.cache.sqlite3")) as connection:
        connection.execute("UPDATE entries SET value = replace(value, 'stop', 'spot')")
        connection.commit()
    with caplog.at_level(logging.WARNING, "llmkit"), client_of(tmp_path, simulator) as client:
        assert [client.complete("hi").source for _ in range(3)] == ["provider", "cache", "cache"]
    assert len(caplog.records) == 1


def test_a_cache_that_cannot_be_written_fails_no_call(tmp_path, caplog) -> None:
    (tmp_path / "ledger.cache.sqlite3").mkdir()
    simulator = Simulator("x", clock=FakeClock())
    with caplog.at_level(logging.WARNING, "llmkit"), client_of(tmp_path, simulator) as client:
        assert [client.complete("hi").source for _ in range(2)] == ["provider", "cache"]
        assert client.cache.location == "memory"
        assert client._client.ledger.notice is None
    assert len(caplog.records) == 1


def test_two_clients_of_one_ledger_share_answers_and_hear_of_clears(tmp_path) -> None:
    async def main() -> None:
        simulator = Simulator("x", clock=FakeClock())
        clock = FakeClock()
        one, two = (llmkit.AsyncClient(config=config(tmp_path, simulator), clock=clock) for _ in range(2))
        assert (await one.complete("hi")).source == "provider"
        assert (await two.complete("hi")).source == "cache"
        assert await one.cache.clear() == 1
        await clock.advance(CHECK_S)
        assert (await two.complete("hi")).source == "provider"
        await one.aclose()
        await two.aclose()

    asyncio.run(main())


def test_what_a_transport_of_ones_own_answers_is_nobody_elses_answer(tmp_path) -> None:
    simulator = Simulator("the real answer", clock=FakeClock())
    settings = config(tmp_path, simulator)
    for text in ("made up", "made up otherwise"):
        transport = Simulator(text, clock=FakeClock())
        with llmkit.Client(config=settings, transport=transport) as client:
            assert [(client.complete("hi").text, transport.calls) for _ in range(2)] == [(text, 1)] * 2
            assert client.cache.location == "memory"
    with llmkit.Client(config=settings) as client:
        assert client.complete("hi").text == "the real answer"
    assert not any(b"made up" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_a_closed_client_can_be_used_again(tmp_path) -> None:
    simulator = Simulator("x", clock=FakeClock())
    client = client_of(tmp_path, simulator)
    client.complete("hi")
    client.close()
    assert client.complete("hi").source == "cache"
    client.close()


KILLED = """
import os, signal, sys
import llmkit
models = {"m": {"provider": "vllm", "model": "m", "base_url": sys.argv[1]}}
client = llmkit.Client(model="m", models=models)
with client.stream("hi") as reply:
    for chunk in reply:
        pass
    os.kill(os.getpid(), signal.SIGKILL)  # the moment its end was seen
"""


def test_an_answer_that_landed_is_there_after_a_kill(tmp_path) -> None:
    simulator = Simulator("one two three")
    with simulator.server() as url:
        environ = {**os.environ, "LLMKIT_DATA_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", KILLED, url]
        done = subprocess.run(command, env=environ, cwd=tmp_path, timeout=60, check=False)
        assert done.returncode == -signal.SIGKILL
        models = {"m": {"provider": "vllm", "model": "m", "base_url": url}}
        settings = Config.of(model="m", models=models, state={"url": f"sqlite:///{tmp_path}/ledger.sqlite3"})
        with llmkit.Client(config=settings) as client:
            reply = client.complete("hi")
            assert (reply.source, reply.text) == ("cache", "one two three")
        assert simulator.calls == 1


def test_threads_and_loops_share_one_cache(tmp_path) -> None:
    failures = []

    async def main(cache) -> None:
        for number in range(100):
            key = f"{number % 7}" * 64
            await cache.keep(key, ANSWER, namespace="")
            assert await cache.find(key) == ANSWER

    clock = llmkit.clock.SystemClock()
    store = SQLiteEntries(tmp_path / "l.cache.sqlite3", max_bytes=10**6, clock=clock)
    cache = AnswerCache(CacheSettings(memory_bytes=5_000), clock, lambda: store)

    def work() -> None:
        try:
            asyncio.run(main(cache))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    asyncio.run(cache.aclose())
    assert failures == []
    assert cache._size == sum(copy[3] for copy in cache._copies.values())
