"""Accounts on a real server: what holds of several machines do to one budget."""

from __future__ import annotations

import asyncio
import contextlib
import random
import subprocess
import sys
import textwrap
import time

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from llmkit.account import Account, Balance, Hold, HoldRefused, Release, Settle
from llmkit.clock import SystemClock
from llmkit.errors import StoreError
from llmkit.state.owner import current_owner
from llmkit.state.redis.accounts import RedisAccounts
from llmkit.state.redis.connection import Server, ServerAway
from llmkit.state.store import DuplicateCall

pytestmark = pytest.mark.redis

DAY = Account("day 2026-11-21", "day", limit_nanos=1_000)
ANA = Account("user ana, day", "user ana, day", limit_nanos=500, limit_tokens=100)
FREE = Account("session s", "session")


def hold(request_id="a", nanos=100, tokens=10, *, accounts=(DAY,), number=1, owner=None, lease=60.0, slot=None):
    return Hold(request_id, number, accounts, nanos, tokens, owner or current_owner(), time.time() + lease, slot, [])


@contextlib.asynccontextmanager
async def opened(server, **options):
    accounts = RedisAccounts(Server(server.url, **options), SystemClock())
    try:
        yield accounts
    finally:
        await accounts.aclose()


def with_accounts(server, scenario):
    async def run():
        async with opened(server) as accounts:
            return await scenario(accounts)

    return asyncio.run(run())


async def landed(accounts):
    """Every ending has been delivered."""
    await accounts._endings.flush()


async def balance(accounts, account=DAY):
    await landed(accounts)
    return (await accounts.balances([account]))[0]


def money(settled=0, held=0, unknown=0, *, tokens=(0, 0, 0), key=DAY.key):
    return Balance(key, settled, held, unknown, *tokens)


# -- the life of a hold ------------------------------------------------------------------------------------------------


def test_a_hold_is_in_every_account_and_says_what_they_have(redis_server):
    async def scenario(accounts):
        first, second = hold(accounts=(DAY, ANA, FREE)), hold("b", 50, 5, accounts=(FREE, ANA))
        await accounts.hold(first)
        await accounts.hold(second)
        assert first.balances == [money(held=100, tokens=(0, 10, 0), key=each.key) for each in (DAY, ANA, FREE)]
        assert second.balances == [money(held=150, tokens=(0, 15, 0), key=each.key) for each in (FREE, ANA)]
        accounts.end(Settle("a", 1, 30, 4))
        accounts.end(Release("b", 1))
        await landed(accounts)
        assert await accounts.balances([DAY, ANA, FREE]) == [
            money(30, tokens=(4, 0, 0), key=each.key) for each in (DAY, ANA, FREE)
        ]

    with_accounts(redis_server, scenario)


def test_what_nobody_has_used_has_counted_nothing(redis_server):
    async def scenario(accounts):
        assert await accounts.balances([DAY, FREE]) == [money(), money(key=FREE.key)]
        assert await accounts.balances([]) == []

    with_accounts(redis_server, scenario)


@pytest.mark.parametrize("spent", [0, 99, 100, 250])
def test_a_hold_is_settled_at_what_it_really_was_below_or_above(redis_server, spent):
    async def scenario(accounts):
        await accounts.hold(hold())
        accounts.end(Settle("a", 1, spent, 7))
        assert await balance(accounts) == money(spent, tokens=(7, 0, 0))

    with_accounts(redis_server, scenario)


def test_what_does_not_fit_into_one_account_is_taken_in_none(redis_server):
    async def scenario(accounts):
        await accounts.hold(hold("a", 450, 1, accounts=(DAY, ANA)))
        with pytest.raises(HoldRefused) as caught:
            await accounts.hold(hold("b", 60, 1, accounts=(DAY, ANA, FREE)))
        assert (caught.value.account, caught.value.unit) == (ANA, "usd")
        assert caught.value.balance == money(held=450, tokens=(0, 1, 0), key=ANA.key)
        assert (caught.value.limit, caught.value.settled, caught.value.held) == (500, 0, 450)
        assert await balance(accounts) == money(held=450, tokens=(0, 1, 0))
        assert await balance(accounts, FREE) == money(key=FREE.key)

    with_accounts(redis_server, scenario)


def test_the_last_unit_fits_and_one_more_does_not(redis_server):
    async def scenario(accounts):
        await accounts.hold(hold("a", 1_000, 0))
        with pytest.raises(HoldRefused):
            await accounts.hold(hold("b", 1, 0))
        await accounts.hold(hold("c", 0, 5))  # it cannot cost anything

    with_accounts(redis_server, scenario)


def test_tokens_have_limits_of_their_own(redis_server):
    async def scenario(accounts):
        await accounts.hold(hold("a", 1, 60, accounts=(ANA,)))
        with pytest.raises(HoldRefused) as caught:
            await accounts.hold(hold("b", 1, 41, accounts=(ANA,)))
        assert (caught.value.unit, caught.value.limit, caught.value.held) == ("tokens", 100, 60)

    with_accounts(redis_server, scenario)


def test_ends_are_counted_once(redis_server):
    async def scenario(accounts):
        await accounts.hold(hold())
        for ending in (Settle("a", 1, 40, 4), Settle("a", 1, 40, 4), Release("a", 1), Settle("a", 1, 99, 9)):
            accounts.end(ending)
        accounts.end(Settle("never held", 1, 500, 5))
        accounts.end(Release("never held", 1))
        assert await balance(accounts) == money(40, tokens=(4, 0, 0))
        await accounts.hold(hold("b"))
        accounts.end(Release("b", 1))
        accounts.end(Settle("b", 1, 99, 9))
        assert await balance(accounts) == money(40, tokens=(4, 0, 0))

    with_accounts(redis_server, scenario)


def test_an_end_that_nobody_knows_counts_its_worst_case_until_it_is_said(redis_server):
    async def scenario(accounts):
        await accounts.hold(hold())
        accounts.end(Settle("a", 1, None, None))
        assert await balance(accounts) == money(100, 0, 100, tokens=(10, 0, 10))
        accounts.end(Settle("a", 1, None, 3))
        assert await balance(accounts) == money(100, 0, 100, tokens=(3, 0, 0))
        accounts.end(Settle("a", 1, 30, 3))
        assert await balance(accounts) == money(30, tokens=(3, 0, 0))
        accounts.end(Settle("a", 1, 90, 9))
        assert await balance(accounts) == money(30, tokens=(3, 0, 0))
        await accounts.hold(hold("b"))
        accounts.end(Settle("b", 1, None, None))
        accounts.end(Release("b", 1))
        assert await balance(accounts) == money(30, tokens=(3, 0, 0))

    with_accounts(redis_server, scenario)


def test_another_process_may_end_it(redis_server):
    async def scenario(accounts):
        await accounts.hold(hold())
        async with opened(redis_server) as others:
            others.end(Settle("a", 1, 12, 1))
            assert await balance(others) == money(12, tokens=(1, 0, 0))

    with_accounts(redis_server, scenario)


def test_attempts_of_one_call_are_apart(redis_server):
    async def scenario(accounts):
        await accounts.hold(hold(number=1))
        accounts.end(Settle("a", 1, 10, 1))
        await accounts.hold(hold(number=2))
        assert await balance(accounts) == money(10, 100, tokens=(1, 10, 0))

    with_accounts(redis_server, scenario)


def test_two_machines_cannot_have_one_request_id_in_flight(redis_server):
    async def scenario(accounts):
        await accounts.hold(hold())
        async with opened(redis_server) as others:
            with pytest.raises(DuplicateCall):
                await others.hold(hold(owner="elsewhere:7:x"))
        assert await balance(accounts) == money(held=100, tokens=(0, 10, 0))

    with_accounts(redis_server, scenario)


def test_money_beyond_what_lua_can_count_is_not_mistaken_for_little(redis_server):
    async def scenario(accounts):
        big = Account("big", "big")
        for each in range(20):
            await accounts.hold(hold(f"b{each}", 10**15 - 1, 2**70, accounts=(big,)))
        assert (await balance(accounts, big)).held_nanos == 20 * (10**15 - 1)
        small = Account("small", "small", limit_nanos=10**6 * 10**9)
        for each in range(3):
            await accounts.hold(hold(f"s{each}", 333_333_333_333_333, 1, accounts=(small,)))
        with pytest.raises(HoldRefused):
            await accounts.hold(hold("s3", 2, 1, accounts=(small,)))
        await accounts.hold(hold("s4", 1, 1, accounts=(small,)))
        assert (await balance(accounts, small)).held_nanos == 10**15

    with_accounts(redis_server, scenario)


def test_names_may_be_anything(redis_server):
    async def scenario(accounts):
        odd = [
            Account(key, "odd", limit_nanos=100) for key in ("", "a b\n'\"{}", "žluťoučký 🐴", "\udc80x", "k" * 5000)
        ]
        await accounts.hold(hold("r 1\r\n\0\ud800", 60, 1, accounts=tuple(odd)))
        for each in odd:
            with pytest.raises(HoldRefused):
                await accounts.hold(hold("b", 41, 1, accounts=(each,)))
        accounts.end(Settle("r 1\r\n\0\ud800", 1, 3, 1))
        await landed(accounts)
        assert [each.settled_nanos for each in await accounts.balances(odd)] == [3] * 5

    with_accounts(redis_server, scenario)


def test_accounts_are_forgotten_long_after_their_window(redis_server):
    async def scenario(accounts):
        month = Account("month", "month", resets_at=time.time() + 86_400 * 20)
        await accounts.hold(hold(accounts=(DAY, month)))
        accounts.end(Settle("a", 1, 1, 1))
        await landed(accounts)

    with_accounts(redis_server, scenario)
    days = {key: redis_server.ask("PTTL", key) / 86_400_000 for key in redis_server.names()}
    assert 59 < days["llmkit:{v1}:account:" + DAY.key] <= 60
    assert 79 < days["llmkit:{v1}:account:month"] <= 80
    assert 0 < days["llmkit:{v1}:hold:a:1"] <= 1
    assert all(key.startswith("llmkit:{v1}:") for key in days)


# -- owners and leases -------------------------------------------------------------------------------------------------


def test_a_lease_that_has_run_out_ends_the_hold_at_its_worst_case_if_it_was_sent(redis_server):
    async def scenario(accounts):
        sent, unsent, always = hold("sent", slot=3), hold("unsent", slot=4), hold("always", 10, 1)
        for each in (sent, unsent, always):
            await accounts.hold(each)
        await accounts.sent(sent)
        redis_server.age(59)
        assert (await balance(accounts)).held_nanos == 210
        redis_server.age(2)
        assert await balance(accounts) == money(110, 0, 110, tokens=(11, 0, 11))
        accounts.end(Settle("sent", 1, 20, 2))
        assert await balance(accounts) == money(30, 0, 10, tokens=(3, 0, 1))
        accounts.end(Settle("unsent", 1, 5, 5))  # it had been sent after all, and nobody could be told
        assert await balance(accounts) == money(35, 0, 10, tokens=(8, 0, 1))

    with_accounts(redis_server, scenario)


def test_holding_makes_room_first(redis_server):
    async def scenario(accounts):
        await accounts.hold(hold("a", 1_000, slot=1))
        redis_server.age(61)
        await accounts.hold(hold("b", 1_000))

    with_accounts(redis_server, scenario)


def test_the_lease_is_the_servers_and_not_this_machines(redis_server):
    class Ahead(SystemClock):
        @staticmethod
        def time():
            return time.time() + 10_000

    async def scenario(accounts):
        accounts._clock = Ahead()
        mine = hold("a")._replace(expires=time.time() + 10_060)
        await accounts.hold(mine)
        redis_server.age(55)
        assert (await balance(accounts)).held_nanos == 100
        redis_server.age(6)
        assert (await balance(accounts)).unknown_nanos == 100

    with_accounts(redis_server, scenario)


HOLDER = """
    import asyncio, sys, time
    from llmkit.account import Account, Hold
    from llmkit.clock import SystemClock
    from llmkit.state.owner import current_owner
    from llmkit.state.redis.accounts import RedisAccounts
    from llmkit.state.redis.connection import Server

    async def main():
        accounts = RedisAccounts(Server(sys.argv[1]), SystemClock())
        for name, sent in (("sent", True), ("unsent", False)):
            each = Hold(name, 1, (Account("day 2026-11-21", "day", 1000),), 300, 30, current_owner(), time.time() + 600, 1, [])
            await accounts.hold(each)
            if sent:
                await accounts.sent(each)
        print("ready", flush=True)
        time.sleep(600)

    asyncio.run(main())
"""


def test_holds_of_a_killed_process_of_this_machine_end_at_once(redis_server):
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLDER), redis_server.url], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "ready\n"

    async def scenario(accounts):
        with pytest.raises(HoldRefused):
            await accounts.hold(hold("a", 700))
        child.kill()
        child.wait()
        await accounts.hold(hold("a", 700))  # the one that was not sent has made room
        assert await balance(accounts) == money(300, 700, 300, tokens=(30, 10, 30))

    with contextlib.closing(child.stdout):
        with_accounts(redis_server, scenario)


def test_a_process_of_another_machine_is_never_thought_to_be_gone(redis_server):
    host, pid, _ = current_owner().split(":")

    async def scenario(accounts):
        await accounts.hold(hold(owner=f"{host}:{pid}:othertime"))
        redis_server.ask("HSET", "llmkit:{v1}:hold:a:1", "machine", "elsewhere")  # whose host has the same name
        assert (await balance(accounts)).held_nanos == 100
        redis_server.age(61)
        assert (await balance(accounts)).unknown_nanos == 100

    with_accounts(redis_server, scenario)


# -- a server that goes away ---------------------------------------------------------------------------------------------


def test_a_server_that_is_not_there_is_one_clear_error_at_once(own_redis):
    server = own_redis()
    server.kill()

    async def scenario(accounts):
        with pytest.raises(StoreError) as caught:
            await accounts.hold(hold())
        assert f"redis://127.0.0.1:{server.port}/0" in caught.value.message
        assert "on_failure" in caught.value.next_step
        with pytest.raises(StoreError):
            await accounts.balances([DAY])

    with_accounts(server, scenario)


def test_a_server_that_hangs_holds_up_one_call_for_its_time_limit_and_the_rest_not_at_all(own_redis):
    server = own_redis()

    async def scenario(accounts):
        await accounts.hold(hold())
        server.freeze()
        began = time.monotonic()
        with pytest.raises(ServerAway, match="no answer"):
            await accounts.hold(hold("b"))
        first = time.monotonic() - began
        for each in range(50):
            with pytest.raises(ServerAway):
                await accounts.hold(hold(f"c{each}"))
        rest = time.monotonic() - began - first
        server.thaw()
        assert first < 5
        assert rest < 1
        # The commands that were given up arrive now; what they have taken does not stay.
        await until(lambda: held(accounts, 100))

    with_accounts(server, scenario)


async def held(accounts, nanos):
    try:
        return (await accounts.balances([DAY]))[0].held_nanos == nanos
    except ServerAway:
        return False


async def until(condition):
    for _ in range(600):
        if await condition():
            return
        await asyncio.sleep(0.05)
    raise AssertionError("never")


@pytest.mark.parametrize("persistence", [True, False])
def test_endings_arrive_when_the_server_is_back(own_redis, persistence):
    server = own_redis(persistence=persistence)

    async def scenario(accounts):
        for each in range(5):
            await accounts.hold(hold(f"a{each}"))
        accounts.end(Settle("a0", 1, 10, 1))
        await landed(accounts)
        server.kill()
        for each in range(1, 5):
            accounts.end(Settle(f"a{each}", 1, 10, 1) if each < 4 else Release("a4", 1))
        with pytest.raises(ServerAway):
            await accounts.hold(hold("b"))
        server.start()
        await until(lambda: held(accounts, 0))
        await until(lambda: delivered(accounts))
        # Without persistence the server has lost what was settled before; what comes after it is counted all the same.
        assert (await balance(accounts)).settled_nanos == (40 if persistence else 30)
        await accounts.hold(hold("c", 960))

    with_accounts(server, scenario)


async def delivered(accounts):
    return not accounts._endings


def test_a_restart_while_nothing_is_going_on_is_not_noticed(own_redis):
    server = own_redis(persistence=True)

    async def scenario(accounts):
        await accounts.hold(hold())
        server.kill()
        server.start()
        await accounts.hold(hold("b"))  # its connection was gone, and nobody is told
        assert (await balance(accounts)).held_nanos == 200

    with_accounts(server, scenario)


def test_scripts_that_the_server_has_forgotten_are_sent_again(redis_server):
    async def scenario(accounts):
        await accounts.hold(hold())
        redis_server.ask("SCRIPT", "FLUSH")
        await asyncio.gather(*(accounts.hold(hold(f"b{each}", 10)) for each in range(20)))
        assert (await balance(accounts)).held_nanos == 300

    with_accounts(redis_server, scenario)


class LosesAnswers:
    """Between llmkit and the server: lets commands through, and cuts the connection instead of answering."""

    def __init__(self, server):
        self._server = server
        self.losing = False
        self._tasks = set()

    async def __aenter__(self):
        self._listener = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._listener.sockets[0].getsockname()[1]
        self.url = f"redis://127.0.0.1:{port}/0"
        return self

    async def __aexit__(self, *_):
        self._listener.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader, writer):
        self._tasks.add(asyncio.current_task())
        up, down = await asyncio.open_connection("127.0.0.1", self._server.port)
        try:
            while data := await reader.read(65536):
                down.write(data)
                answer = await up.read(65536)
                if self.losing:
                    break
                writer.write(answer)
                await writer.drain()
        finally:
            writer.close()
            down.close()


def test_a_hold_whose_answer_was_lost_does_not_stay(redis_server):
    async def scenario():
        async with LosesAnswers(redis_server) as way, opened(way) as accounts:
            await accounts.hold(hold("a"))
            way.losing = True
            with pytest.raises(ServerAway) as caught:
                await accounts.hold(hold("b"))
            assert caught.value.reached
            assert redis_server.ask("HGET", "llmkit:{v1}:account:" + DAY.key, "held_nanos") == b"200"
            way.losing = False
            await until(lambda: held(accounts, 100))

    asyncio.run(scenario())


def test_a_hold_that_is_asked_for_again_after_its_answer_was_lost_counts_once(redis_server):
    async def scenario():
        async with LosesAnswers(redis_server) as way, opened(way) as accounts:
            way.losing = True
            with pytest.raises(ServerAway):
                await accounts.hold(hold("a"))
            way.losing = False
            await until(lambda: taken(accounts))
            await until(lambda: delivered(accounts))
            assert (await balance(accounts)).held_nanos == 100
            accounts.end(Settle("a", 1, 7, 1))
            assert await balance(accounts) == money(7, tokens=(1, 0, 0))

    async def taken(accounts):
        try:
            await accounts.hold(hold("a"))
        except ServerAway:
            return False
        return True

    asyncio.run(scenario())


def test_what_was_spent_without_a_hold_is_counted_when_the_server_is_back(own_redis):
    """As with on_failure = "continue": the hold failed, and the call went on."""
    server = own_redis()

    async def scenario(accounts):
        server.kill()
        with pytest.raises(ServerAway):
            await accounts.hold(hold("a"))
        accounts.end(Settle("a", 1, 33, 3))
        server.start()
        await until(lambda: delivered(accounts))
        assert await balance(accounts) == money(33, tokens=(3, 0, 0))

    with_accounts(server, scenario)


def test_a_cancelled_hold_does_not_stay(redis_server):
    async def scenario(accounts):
        for each in range(20):
            task = asyncio.create_task(accounts.hold(hold(f"a{each}", 10)))
            await asyncio.sleep(random.uniform(0, 0.002))
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
                accounts.end(Release(f"a{each}", 1))
        assert (await balance(accounts)).held_nanos == 0

    with_accounts(redis_server, scenario)


def test_a_hold_that_the_server_has_lost_is_not_sent(own_redis):
    server = own_redis()

    async def scenario(accounts):
        mine = hold(slot=1)
        await accounts.hold(mine)
        server.kill()
        server.start()
        with pytest.raises(StoreError, match="was not sent"):
            await accounts.sent(mine)

    with_accounts(server, scenario)


def test_closing_delivers_what_waits_and_gives_up_after_seconds(own_redis, caplog):
    server = own_redis(persistence=True)

    async def scenario():
        async with opened(server) as accounts:
            await accounts.hold(hold())
            accounts.end(Settle("a", 1, 5, 5))
        async with opened(server) as accounts:
            assert (await accounts.balances([DAY]))[0] == money(5, tokens=(5, 0, 0))
            await accounts.hold(hold("b"))
            server.kill()
            accounts.end(Settle("b", 1, 5, 5))
            began = time.monotonic()
        assert time.monotonic() - began < 8

    asyncio.run(scenario())
    assert "1 holds could not be ended" in caplog.text


# -- strangers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["-5", "1e99", "NaN", "inf", "", "12abc", "0.5", "9999999999999999999"])
def test_an_account_that_somebody_else_wrote_is_refused(redis_server, value):
    async def scenario(accounts):
        redis_server.ask("HSET", "llmkit:{v1}:account:" + DAY.key, "held_nanos", value)
        for asking in (accounts.hold(hold()), accounts.balances([DAY])):
            with pytest.raises(StoreError):
                await asking

    with_accounts(redis_server, scenario)


def test_keys_of_another_type_are_one_error_and_change_nothing(redis_server):
    async def scenario(accounts):
        redis_server.ask("SET", "llmkit:{v1}:account:" + DAY.key, "hello")
        with pytest.raises(StoreError, match="refused to hold"):
            await accounts.hold(hold(accounts=(FREE, DAY)))
        assert await balance(accounts, FREE) == money(key=FREE.key)

    with_accounts(redis_server, scenario)


# -- everything at once ---------------------------------------------------------------------------------------------------


def test_several_clients_never_pass_a_limit(redis_server):
    async def scenario():
        chance = random.Random(3)
        held = spent = calls = 0

        async def client(name):
            nonlocal held, spent, calls
            async with opened(redis_server) as accounts:
                for each in range(60):
                    amount = chance.randint(1, 300)
                    try:
                        await accounts.hold(hold(f"{name}-{each}", amount, 1))
                    except HoldRefused as refusal:
                        assert refusal.settled + refusal.held + amount > 1_000
                        await asyncio.sleep(0.001)
                        continue
                    held += amount
                    assert spent + held <= 1_000
                    await asyncio.sleep(chance.random() * 0.005)
                    cost = chance.randint(0, amount) // 20
                    held -= amount
                    spent += cost
                    calls += 1
                    accounts.end(Settle(f"{name}-{each}", 1, cost, 1))

        await asyncio.gather(*(client(name) for name in range(6)))
        async with opened(redis_server) as accounts:
            assert await accounts.balances([DAY]) == [money(spent, tokens=(calls, 0, 0))]

    asyncio.run(scenario())


SPENDER = """
    import asyncio, os, random, sys, time
    from llmkit.account import Account, Hold, HoldRefused, Settle
    from llmkit.clock import SystemClock
    from llmkit.state.owner import current_owner
    from llmkit.state.redis.accounts import RedisAccounts
    from llmkit.state.redis.connection import Server

    DAY = Account("day 2026-11-21", "day", 1000)

    async def spend(accounts, name):
        for each in range(10**9):
            amount = random.randint(1, 120)
            one = Hold(f"{os.getpid()}-{name}-{each}", 1, (DAY,), amount, 1, current_owner(), time.time() + 600, 1, [])
            try:
                await accounts.hold(one)
            except HoldRefused:
                await asyncio.sleep(0.002)
                continue
            assert one.balances[0].settled_nanos + one.balances[0].held_nanos <= 1000
            await asyncio.sleep(random.random() * 0.004)
            if random.random() < 0.5:
                await accounts.sent(one)
            await asyncio.sleep(random.random() * 0.004)
            accounts.end(Settle(one.request_id, 1, 0, 1))

    async def main():
        accounts = RedisAccounts(Server(sys.argv[1]), SystemClock())
        print("ready", flush=True)
        await asyncio.gather(*(spend(accounts, name) for name in range(4)))

    asyncio.run(main())
"""


def test_processes_that_are_killed_never_pass_a_limit_and_leave_no_hold(redis_server):
    chance = random.Random(5)

    def start():
        child = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(SPENDER), redis_server.url],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert child.stdout.readline() == "ready\n"
        return child

    async def look(accounts, seconds):
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            seen = (await accounts.balances([DAY]))[0]
            assert seen.settled_nanos + seen.held_nanos <= 1_000
            worst.append(seen.held_nanos)

    worst = []
    children = [start() for _ in range(3)]

    async def scenario(accounts):
        for _ in range(4):
            await look(accounts, chance.uniform(0.1, 0.4))
            child = children.pop(0)
            child.kill()
            _, errors = await asyncio.to_thread(child.communicate)
            assert errors == ""
            children.append(await asyncio.to_thread(start))
        for child in children:
            child.kill()
            await asyncio.to_thread(child.communicate)
        after = (await accounts.balances([DAY]))[0]
        assert after.held_nanos == 0
        assert after.settled_nanos == after.unknown_nanos <= 1_000  # nothing but what was sent, and never heard of
        await accounts.hold(hold("last", 1_000 - after.settled_nanos))  # and nothing is refused falsely

    try:
        with_accounts(redis_server, scenario)
    finally:
        for child in children:
            child.kill()
            child.communicate()
    assert max(worst) > 500  # they did come near it


class Machines(RuleBasedStateMachine):
    """Two machines and one server against a model in a few lines."""

    server = None

    def __init__(self):
        super().__init__()
        self.server.ask("FLUSHALL")
        self.loop = asyncio.new_event_loop()
        self.machines = [RedisAccounts(Server(self.server.url), SystemClock()) for _ in range(2)]
        self.open = {}  # by id: machine, nanos, tokens, sent
        self.unknown = {}  # by id: machine, worst nanos, worst tokens
        self.lapsed = {}  # released by the server: by id, machine
        self.settled = [0, 0]
        self.count = 0

    @initialize(limit=st.integers(1, 500))
    def limit(self, limit):
        self.day = Account("d", "day", limit, 100)

    def run(self, work):
        return self.loop.run_until_complete(work)

    def pick(self, chance, of):
        return chance.draw(st.sampled_from(sorted(of))) if of else None

    @rule(
        machine=st.integers(0, 1), nanos=st.integers(0, 200), tokens=st.integers(0, 40), slot=st.sampled_from([None, 1])
    )
    def hold(self, machine, nanos, tokens, slot):
        self.count += 1
        name = f"r{self.count}"
        held = [sum(one[unit] for one in self.open.values()) for unit in (1, 2)]
        fits = (nanos == 0 or self.settled[0] + held[0] + nanos <= self.day.limit_nanos) and (
            tokens == 0 or self.settled[1] + held[1] + tokens <= 100
        )
        try:
            self.run(self.machines[machine].hold(hold(name, nanos, tokens, accounts=(self.day,), slot=slot)))
            assert fits
            self.open[name] = (machine, nanos, tokens, slot is None)
        except HoldRefused as refusal:
            assert not fits
            assert (refusal.settled, refusal.held) in {(self.settled[unit], held[unit]) for unit in (0, 1)}

    @rule(chance=st.data())
    def sent(self, chance):
        if name := self.pick(chance, self.open):
            machine, nanos, tokens, _ = self.open[name]
            self.run(self.machines[machine].sent(hold(name)))
            self.open[name] = (machine, nanos, tokens, True)

    @rule(chance=st.data(), nanos=st.none() | st.integers(0, 300), tokens=st.none() | st.integers(0, 60))
    def settle(self, chance, nanos, tokens):
        name = self.pick(chance, {**self.open, **self.unknown, **self.lapsed})
        if name is None:
            return
        machine = (self.open.get(name) or self.unknown.get(name) or self.lapsed[name])[0]
        self.machines[machine].end(Settle(name, 1, nanos, tokens))
        if name in self.unknown:
            _, *booked, open_units = self.unknown.pop(name)
        else:
            of = self.open.pop(name, None) or self.lapsed.pop(name)
            booked, open_units = [0, 0], (True, True)
            worst = of[1:3]
            self.settled = [self.settled[unit] + worst[unit] for unit in (0, 1)]
            booked = list(worst)
        said = (nanos, tokens)
        for unit in (0, 1):
            if said[unit] is not None:
                self.settled[unit] += said[unit] - booked[unit]
                booked[unit] = said[unit]
        still = tuple(is_open and each is None for is_open, each in zip(open_units, said, strict=True))
        if None in said:
            self.unknown[name] = (machine, *booked, still)

    @rule(chance=st.data())
    def release(self, chance):
        name = self.pick(chance, self.open)
        if name is not None:
            machine = self.open.pop(name)[0]
            self.machines[machine].end(Release(name, 1))
            self.machines[machine].end(Settle(name, 1, 50, 5))  # too late to be true

    @rule()
    def lapse(self):
        for each in self.machines:
            self.run(each._endings.flush())
        self.server.age(61)
        self.run(self.machines[0].balances([self.day]))
        for name, (machine, nanos, tokens, sent) in self.open.items():
            if sent:
                self.settled = [self.settled[0] + nanos, self.settled[1] + tokens]
                self.unknown[name] = (machine, nanos, tokens, (True, True))
            else:
                self.lapsed[name] = (machine, nanos, tokens)
        self.open.clear()

    @invariant()
    def adds_up(self):
        for each in self.machines:
            self.run(each._endings.flush())
        (seen,) = self.run(self.machines[1].balances([self.day]))
        assert (seen.settled_nanos, seen.settled_tokens) == tuple(self.settled)
        assert seen.held_nanos == sum(one[1] for one in self.open.values())
        assert seen.held_tokens == sum(one[2] for one in self.open.values())
        known = [sum(one[1 + unit] for one in self.unknown.values() if one[3][unit]) for unit in (0, 1)]
        assert (seen.unknown_nanos, seen.unknown_tokens) == tuple(known)

    def teardown(self):
        for each in self.machines:
            self.run(each.aclose())
        self.run(self.loop.shutdown_default_executor())
        self.loop.close()


def test_whatever_machines_do_the_sums_are_right(redis_server):
    from hypothesis.stateful import run_state_machine_as_test

    Machines.server = redis_server
    run_state_machine_as_test(
        Machines,
        settings=settings(
            max_examples=25,
            stateful_step_count=25,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
