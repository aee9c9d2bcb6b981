"""Clients that share a Redis server: several machines with one budget, one cache, one state of each breaker."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import subprocess
import sys
import textwrap
from decimal import Decimal

import httpx
import pytest

import llmkit
from llmkit.errors import BudgetExceeded, ConfigError, StoreError
from llmkit.testing import Fault, Simulator

pytestmark = pytest.mark.redis

KEY = "sk-fake-0123456789abcdefghijklmnop"  # no key of anything


def config(server, **more):
    return llmkit.Config.of(
        environ={"TEST_KEY": KEY, **more.pop("environ", {})},
        model="m",
        models={
            "m": {"provider": "own", "model": "m-1", "price": {"input": 1, "output": 2}},
            "free": {"provider": "own", "model": "m-2", "price": {"input": 0, "output": 0}},
        },
        providers={"own": {"base_url": more.pop("url", "http://127.0.0.1:9/v1"), "api_key_env": "TEST_KEY"}},
        **{"state": {"url": server.url}, "budget": {"day": {"usd": 1}}, **more},
    )


class Gate(httpx.AsyncBaseTransport):
    """Lets requests pass when the test says so."""

    def __init__(self, behind):
        self._behind = behind
        self.waiting = 0
        self.open = asyncio.Event()
        self.open.set()

    async def handle_async_request(self, request):
        self.waiting += 1
        await self.open.wait()
        return await self._behind.handle_async_request(request)


async def until(condition):
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("never")


async def day(client):
    frame = await client.budgets()
    return frame[frame["scope"] == "day"].iloc[0]


@pytest.mark.parametrize("persistence", [True, False])
def test_a_server_that_is_killed_under_calls_loses_none_of_them(own_redis, persistence):
    server = own_redis(persistence=persistence)

    async def scenario():
        simulator = Simulator("one two three")
        gate = Gate(simulator)
        async with llmkit.AsyncClient(transport=gate, config=config(server)) as client:
            first = await client.complete("before", max_tokens=50)
            gate.open.clear()
            calls = [asyncio.create_task(client.complete(f"question {n}", max_tokens=50)) for n in range(20)]
            await until(lambda: gate.waiting == 21)
            server.kill()
            gate.open.set()
            replies = await asyncio.gather(*calls)
            assert {reply.text for reply in replies} == {"one two three"}
            rows = client.ledger.calls()
            assert [row["status"] for row in rows] == ["complete"] * 21
            spent = sum(reply.cost_usd for reply in replies)
            assert sum(row["cost_usd"] for row in rows) == first.cost_usd + spent

            with pytest.raises(StoreError) as refused:
                await client.complete("paid", max_tokens=50)
            assert f"127.0.0.1:{server.port}" in refused.value.message
            assert simulator.calls == 21
            assert (await client.complete("hello", model="simulator")).text
            assert (await client.complete("hello", model="free")).text

            server.start()
            await until(lambda: not client._shared.accounts._endings)
            while True:
                try:
                    after = await client.complete("paid at last", max_tokens=50)
                    break
                except StoreError:  # within the second in which nobody asks again
                    await asyncio.sleep(0.05)
            await until(lambda: not client._shared.accounts._endings)
            seen = await day(client)
            # Without persistence the server has forgotten what had been settled before.
            known = spent + after.cost_usd + (first.cost_usd if persistence else 0)
            assert round(Decimal(seen["spent"]), 9) == known
            assert seen["held"] == 0

    asyncio.run(scenario())


def test_with_continue_paid_calls_go_on_without_the_server(own_redis, caplog):
    server = own_redis()

    async def scenario():
        simulator = Simulator("one two three")
        state = {"url": server.url, "on_failure": "continue"}
        async with llmkit.AsyncClient(transport=simulator, config=config(server, state=state)) as client:
            await client.complete("a", max_tokens=50)
            server.kill()
            for each in range(5):
                assert (await client.complete(f"b{each}", max_tokens=50)).text == "one two three"
            assert [row["status"] for row in client.ledger.calls()] == ["complete"] * 6
            server.start()

    asyncio.run(scenario())
    assert "of this machine alone" in caplog.text


def test_one_client_serves_loops_that_end(redis_server):
    client = llmkit.AsyncClient(transport=Simulator("one two three"), config=config(redis_server))
    for each in range(5):
        assert asyncio.run(client.complete(f"question {each}", max_tokens=50)).text == "one two three"
    seen = asyncio.run(day(client))
    assert seen["held"] == 0
    assert seen["spent"] > 0
    asyncio.run(client.aclose())


def test_nothing_shows_the_password(own_redis, caplog):
    secret = "hunter2-and-more-of-it"
    server = own_redis(password=secret)
    caplog.set_level(logging.DEBUG)

    async def scenario(url, environ, password_is_right):
        async with llmkit.AsyncClient(
            transport=Simulator("one two three"), config=config(server, state={"url": url}, environ=environ)
        ) as client:
            if password_is_right:
                assert (await client.complete("a", max_tokens=50)).text == "one two three"
            else:
                with pytest.raises(StoreError, match="password") as refused:
                    await client.complete("a", max_tokens=50)
                texts.append(refused.value.block())
            texts.extend([repr(client), repr(client.config), repr(client._shared._server), client._shared.location])
            texts.append(client.cache.location)

    texts = []
    plain = f"redis://127.0.0.1:{server.port}/0"
    asyncio.run(scenario(plain, {"LLMKIT_REDIS_PASSWORD": secret}, True))
    asyncio.run(scenario(f"redis://:{secret}@127.0.0.1:{server.port}/0", {}, True))
    asyncio.run(scenario(plain, {"LLMKIT_REDIS_PASSWORD": "wrong-" + secret}, False))
    asyncio.run(scenario(plain, {}, False))
    server.kill()
    assert secret not in "\n".join([*texts, caplog.text])


@pytest.mark.parametrize(
    "url", ["redis://h:port", "redis://h/x", "redis://h:1/0?password=hunter2", "redis://:p@[::1/0"]
)
def test_an_address_that_is_none_is_one_clear_error(url):
    with pytest.raises(ConfigError) as refused:
        llmkit.AsyncClient(config=llmkit.Config.of(environ={}, state={"url": url}))
    assert "hunter2" not in refused.value.block()


def test_a_missing_package_is_one_clear_error():
    code = """
        import sys
        sys.modules["redis"] = None
        import llmkit
        try:
            llmkit.AsyncClient(config=llmkit.Config.of(environ={}, state={"url": "redis://127.0.0.1:1"}))
        except llmkit.ConfigError as error:
            print(error.block())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert 'pip install "llmkit[redis]"' in done.stdout


# -- several machines ------------------------------------------------------------------------------------------------------

# One line of JSON in, one out: what to ask, and what came of it. Each has a data folder of its own, as on machines apart.
MACHINE = """
    import asyncio, json, sys
    import llmkit

    settings = json.loads(sys.argv[1])
    client = llmkit.AsyncClient(config=llmkit.Config.of(environ={"TEST_KEY": "sk-fake-0123456789abcdefghijklmnop"}, **settings))

    async def one(asked):
        try:
            reply = await client.complete(asked.pop("prompt"), **asked)
            return {"text": reply.text, "source": reply.source, "cost": str(reply.cost_usd)}
        except llmkit.LLMKitError as error:
            return {"error": type(error).__name__, "message": error.message}

    async def main():
        loop = asyncio.get_running_loop()
        print(json.dumps("ready"), flush=True)
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            print(json.dumps(await asyncio.gather(*map(one, json.loads(line)))), flush=True)
        await client.aclose()

    asyncio.run(main())
"""


class Machine:
    def __init__(self, folder, monkeypatch, settings):
        folder.mkdir()
        monkeypatch.setenv("LLMKIT_DATA_DIR", str(folder))
        self._process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(MACHINE), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert json.loads(self._process.stdout.readline()) == "ready"

    def begin(self, *asked):
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()

    def answers(self):
        return json.loads(self._process.stdout.readline())

    def ask(self, *asked):
        self.begin(*asked)
        return self.answers()

    def kill(self):
        self._process.kill()
        self._process.wait()

    def close(self):
        self._process.communicate()
        assert self._process.returncode in {0, -9}


@pytest.fixture
def machines(tmp_path, monkeypatch, redis_server):
    with contextlib.ExitStack() as stack:

        def make(url, count=2, **more):
            settings = {
                "model": "m",
                "models": {"m": {"provider": "own", "model": "m-1", "price": {"input": 1, "output": 2}}},
                "providers": {"own": {"base_url": url, "api_key_env": "TEST_KEY"}},
                "state": {"url": redis_server.url},
                **more,
            }
            made = [Machine(tmp_path / f"machine-{n}", monkeypatch, settings) for n in range(count)]
            for each in made:
                stack.callback(each.close)
            return made

        yield make


def test_machines_share_one_budget(machines):
    simulator = Simulator("one two three four five six seven eight nine ten")
    with simulator.server() as url:
        ours, theirs = machines(url, budget={"day": {"usd": 0.006}})
        results = []
        for each in range(12):
            for machine, name in ((ours, "ours"), (theirs, "theirs")):
                asked = [{"prompt": f"{name} {each} {n}", "max_tokens": 50, "cache": "off"} for n in range(16)]
                machine.begin(*asked)
            results += ours.answers() + theirs.answers()
        costs = [Decimal(each["cost"]) for each in results if "text" in each]
        refused = [each for each in results if "error" in each]
        assert {each["error"] for each in refused} == {BudgetExceeded.__name__}
        assert Decimal("0.95") < sum(costs) / Decimal("0.006") <= 1


def test_machines_share_answers(machines):
    simulator = Simulator("one two three")
    with simulator.server() as url:
        ours, theirs = machines(url)
        (first,) = ours.ask({"prompt": "hello"})
        (second,) = theirs.ask({"prompt": "hello"})
        assert (first["source"], second["source"]) == ("provider", "cache")
        assert first["text"] == second["text"]
        assert simulator.calls == 1


def test_machines_ask_once_for_what_both_ask_at_once(machines):
    simulator = Simulator("one two three", latency_s=1.0)
    with simulator.server() as url:
        ours, theirs = machines(url)
        ours.begin({"prompt": "hello"})
        theirs.begin({"prompt": "hello"})
        results = ours.answers() + theirs.answers()
        assert {each["text"] for each in results} == {"one two three"}
        assert simulator.calls == 1


def test_machines_share_the_state_of_a_breaker(machines):
    simulator = Simulator("one two three")
    with simulator.server() as url:
        ours, theirs = machines(url, retry={"attempts": 1}, breaker={"failures": 2})
        simulator.fail(Fault.status(503), times=2)
        assert [each["error"] for each in ours.ask({"prompt": "a"})] == ["ProviderOverloaded"]
        assert [each["error"] for each in ours.ask({"prompt": "b"})] == ["ProviderOverloaded"]
        (refused,) = theirs.ask({"prompt": "c"})
        assert refused["error"] == "CircuitOpen"
        assert simulator.calls == 2


def test_what_a_killed_machine_held_is_not_held_for_ever(machines, redis_server):
    simulator = Simulator("one two three")
    simulator.fail(Fault.hang(), times=1)
    with simulator.server() as url:
        ours, theirs = machines(url, budget={"day": {"usd": 0.0015}})
        ours.begin({"prompt": "hello", "max_tokens": 400})
        asyncio.run(until(lambda: simulator.calls == 1))
        (refused,) = theirs.ask({"prompt": "more", "max_tokens": 400, "timeout": 1})
        assert refused["error"] in {"BudgetExceeded", "TotalTimeout"}  # it waits for room as long as it may
        ours.kill()
        (small,) = theirs.ask({"prompt": "more", "max_tokens": 20})
        assert small["text"] == "one two three"  # the other one had been sent: it counts as spent
        (refused,) = theirs.ask({"prompt": "more still", "max_tokens": 400, "timeout": 1})
        assert refused["error"] == "BudgetExceeded"


def test_doctor_says_that_the_server_answers(redis_server, tmp_path, monkeypatch):
    from llmkit.doctor import examine

    monkeypatch.chdir(tmp_path)
    found = {each.subject: each for each in examine({"LLMKIT_STATE_URL": redis_server.url, "LLMKIT_OFFLINE": "1"})}
    assert found["server"].state == "ok"
    assert redis_server.url in found["server"].text
