"""llmkit.budgets: which accounts a call counts towards, and what all of it promises end to end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
from datetime import datetime
from decimal import Decimal
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llmkit
from llmkit import errors
from llmkit.budgets import COLUMNS, Budgets, session
from llmkit.config import BudgetSettings, Config, Limit
from llmkit.endpoint import Price
from llmkit.state.owner import current_owner
from llmkit.testing import FakeClock
from tests.layers.script import call_for, endpoint
from tests.providers.loopback import http, server

BERLIN = ZoneInfo("Europe/Berlin")
NANOS = 10**9


def budgets(*limits, **more):
    return Budgets(BudgetSettings(limits=limits, **more))


def call(started_at=1_767_225_600.0, **fields):
    clock = FakeClock(started_at)
    return call_for(clock, **fields)


def keys(made, asked, to=None):
    return [account.key for account in made.of(asked, to or endpoint()).accounts]


# -- which accounts --------------------------------------------------------------------------------------------------


def test_where_nothing_limits_there_is_nothing_to_count() -> None:
    assert budgets().of(call(), endpoint()).accounts == ()


def test_the_defaults_hold_for_what_is_paid_and_only_for_that() -> None:
    made = Budgets(BudgetSettings())
    scopes = made.of(call(), endpoint())
    assert [(a.scope, a.limit_nanos) for a in scopes.accounts] == [("session", 5 * NANOS), ("day", 20 * NANOS)]
    assert (scopes.usd, scopes.tokens, scopes.usd_set, scopes.is_set) == (True, False, False, False)
    for free in (endpoint(price=None, local=True), endpoint(price=None, simulated=True)):
        assert made.of(call(), free).accounts == ()
    assert made.of(call(), endpoint(simulated=True, price=Price(input=Decimal(1), output=Decimal(1)))).accounts


def test_what_is_free_counts_where_tokens_are_limited() -> None:
    made = budgets(Limit("day", Decimal(1), 1000), Limit("hour", Decimal(1)))
    scopes = made.of(call(), endpoint(price=None, local=True))
    assert [(a.scope, a.limit_nanos, a.limit_tokens) for a in scopes.accounts] == [("day", None, 1000)]
    assert (scopes.usd, scopes.tokens, scopes.is_set) == (False, True, True)


def test_each_scope_has_an_account_of_its_own() -> None:
    made = budgets(
        Limit("day", Decimal(1)),
        Limit("month", Decimal(1), kind="user", name="ana"),
        Limit("total", Decimal(1), kind="tag", name="app=docs"),
        Limit("hour", Decimal(1), kind="model", name="test:m"),
    )
    asked = call(user="ana", tags={"app": "docs", "other": "x"})
    found = made.of(asked, endpoint()).accounts
    assert [a.scope for a in found] == ["day", "user ana, month", "tag app=docs, total", "model test:m, hour"]
    assert [(a.user, a.tag, a.model) for a in found[1:]] == [
        ("ana", None, None),
        (None, "app=docs", None),
        (None, None, "test:m"),
    ]
    assert found[2].resets_at is None
    assert [a.scope for a in made.of(call(user="bob"), endpoint("m2")).accounts] == ["day"]


def test_a_star_is_each_one_its_own_and_ones_own_limit_replaces_it() -> None:
    made = budgets(
        Limit("day", Decimal(1), kind="user", name="*"),
        Limit("month", Decimal(9), kind="user", name="*"),
        Limit("day", Decimal(2), kind="user", name="ana"),
        Limit("day", Decimal(3), kind="tag", name="app=*"),
        Limit("day", Decimal(4), kind="tag", name="app=docs"),
    )

    def limits(**fields):
        return {a.scope: a.limit_nanos / NANOS for a in made.of(call(**fields), endpoint()).accounts}

    assert limits(user="ana") == {"user ana, day": 2, "user ana, month": 9}
    assert limits(user="bob") == {"user bob, day": 1, "user bob, month": 9}
    assert limits(tags={"app": "docs"}) == {"tag app=docs, day": 4}
    assert limits(tags={"app": "x"}) == {"tag app=x, day": 3}
    assert limits() == {}
    star = call(user="*")  # a user who is named so has no more than the others
    assert [a.limit_nanos / NANOS for a in made.of(star, endpoint()).accounts] == [1, 9]


def test_ones_own_off_lifts_what_holds_for_everybody() -> None:
    everybody = {"*": {"day": {"usd": 1}, "month": {"usd": 9}}, "ana": {"day": {"usd": "off"}}}
    made = Budgets(
        Config.of(
            budget={
                "session": {"usd": "off"},
                "day": {"usd": "off"},
                "user": everybody,
                "tag": {
                    "app=*": {"day": {"usd": 1}},
                    "app=docs": {"day": {"usd": "off"}},
                    "x=y": {"day": {"usd": "off"}},
                },
            }
        ).budget
    )
    scopes = {
        name: [account.scope for account in made.of(call(user=name, tags={"app": app}), endpoint()).accounts]
        for name, app in (("ana", "docs"), ("bob", "x"))
    }
    assert scopes == {"ana": ["user ana, month"], "bob": ["user bob, day", "user bob, month", "tag app=x, day"]}


@given(st.lists(st.tuples(st.sampled_from(["user", "tag", "model"]), st.text(min_size=1, max_size=12)), max_size=12))
@settings(max_examples=200, deadline=None)
def test_no_two_accounts_have_one_key(names) -> None:
    limits = [
        Limit(window, Decimal(1), kind=kind, name=f"k={name}" if kind == "tag" else name)
        for kind, name in set(names)
        for window in ("session", "hour", "day", "total")
    ]
    found = budgets(*limits).accounts(1e9, {"user": [n for k, n in names if k == "user" and n != "*"]})
    assert len({account.key for *_, account in found}) == len({account.scope for *_, account in found})


def test_a_name_that_looks_like_a_key_is_no_other_ones_account() -> None:
    made = budgets(Limit("day", Decimal(1), kind="user", name="*"), Limit("hour", Decimal(1), kind="user", name="*"))
    first = keys(made, call(user="a"))
    second = keys(made, call(user=f"a/day/{first[0].rpartition('/')[2]}"))
    assert not set(first) & set(second)


@pytest.mark.parametrize(
    ("started", "begins", "ends"),
    [
        ("2026-03-29T00:30", "2026-03-29T00:00+01:00", "2026-03-30T00:00+02:00"),  # the day has 23 hours
        ("2026-03-29T23:59", "2026-03-29T00:00+01:00", "2026-03-30T00:00+02:00"),
        ("2026-10-25T12:00", "2026-10-25T00:00+02:00", "2026-10-26T00:00+01:00"),  # and this one 25
        ("2026-11-21T23:59:59", "2026-11-21T00:00+01:00", "2026-11-22T00:00+01:00"),
    ],
)
def test_a_day_is_as_long_as_the_clocks_there_make_it(started, begins, ends) -> None:
    made = budgets(Limit("day", Decimal(1)), timezone="Europe/Berlin")
    at = datetime.fromisoformat(started).replace(tzinfo=BERLIN).timestamp()
    (account,) = made.of(call(at), endpoint()).accounts
    assert account.since == datetime.fromisoformat(begins).timestamp()
    assert account.resets_at == datetime.fromisoformat(ends).timestamp()


@given(st.lists(st.floats(1.7e9, 1.9e9), min_size=2, max_size=10), st.sampled_from(["hour", "day", "week", "month"]))
@settings(max_examples=200, deadline=None)
def test_a_call_is_in_the_window_of_its_start_whatever_came_before(starts, window) -> None:
    """A clock that steps back and forth is only another order of starts."""
    made = budgets(Limit(window, Decimal(1)), timezone="America/Sao_Paulo")
    seen = {}
    for at in starts:
        (account,) = made.of(call(at), endpoint()).accounts
        assert account.since <= at < account.resets_at
        assert seen.setdefault(account.key, account) == account
    assert len(seen) == len({account.since for account in seen.values()})


def test_a_session_is_the_process_and_what_it_forks() -> None:
    made = budgets(Limit("session", Decimal(1)))
    (account,) = made.of(call(), endpoint()).accounts
    assert account.session == session()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            (mine,) = Budgets(made.settings).of(call(), endpoint()).accounts
            os.write(writer, json.dumps([mine.key, current_owner()]).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    key, owner = json.loads(os.read(reader, 10_000))
    os.close(reader)
    os.close(writer)
    assert key == account.key
    assert owner != current_owner()


def test_limits_can_be_replaced_and_what_is_lifted_stays_lifted() -> None:
    config = Config.of()
    made = Budgets(config.budget)
    assert len(made.of(call(), endpoint()).accounts) == 2
    config = config.with_(budget={"session": {"usd": "off"}, "day": {"usd": 3}})
    made.use(config.budget)
    assert [(a.scope, a.limit_nanos) for a in made.of(call(), endpoint()).accounts] == [("day", 3 * NANOS)]
    config = config.with_(budget={"month": {"usd": 9}})
    made.use(config.budget)
    assert [a.scope for a in made.of(call(), endpoint()).accounts] == ["day", "month"]


def test_another_endpoint_at_the_same_address_is_told_apart() -> None:
    made = budgets(Limit("day", Decimal(1)))
    for _ in range(2000):  # made and thrown away, so ids come back
        paid, free = endpoint(), endpoint(price=None, local=True)
        assert made.of(call(), paid).accounts
        assert not made.of(call(), free).accounts


# -- end to end ------------------------------------------------------------------------------------------------------

ANSWER = 100  # tokens out; at 10 USD a million a tenth of a cent, and 10 tokens in for a thousandth
COST = Decimal("0.00101")


def answer(tokens_out=ANSWER) -> bytes:
    return http(
        json.dumps(
            {
                "id": "c",
                "model": "m",
                "choices": [
                    {"index": 0, "message": {"role": "assistant", "content": "word " * 20}, "finish_reason": "stop"}
                ],
                "usage": {"prompt_tokens": 10, "completion_tokens": tokens_out},
            }
        ).encode()
    )


def config(tmp_path, base_url, **more):
    paid = {"provider": "openai", "base_url": base_url, "model": "m", "api_key_env": "off"}
    return Config.of(
        model="paid",
        models={"paid": {**paid, "price": {"input": 1, "output": 10}}, "unpriced": {**paid, "model": "who-knows"}},
        state={"url": f"sqlite:///{tmp_path}/ledger.sqlite3"},
        cache={"enabled": False},
        **{"retry_attempts": 1, "budget": {"request": {"usd": "off"}}, **more},
    )


@contextlib.asynccontextmanager
async def answering(pause=0.01):
    async def respond(_, writer):
        await asyncio.sleep(pause)
        writer.write(answer())
        await writer.drain()

    async with server(respond) as seen:
        yield seen


class Watch:
    """Another connection to the file that looks at the accounts, all the while."""

    def __init__(self, path, key_prefix="all//day/"):
        self.path, self.prefix = path, key_prefix
        self.most = 0
        self.looks = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self):
        connection = sqlite3.connect(self.path)
        while not self._done.is_set():
            with contextlib.suppress(sqlite3.OperationalError):  # not made yet
                sql = "SELECT settled_nanos + held_nanos FROM accounts WHERE key LIKE ?"
                for (used,) in connection.execute(sql, [f"{self.prefix}%"]).fetchall():
                    self.most = max(self.most, used)
                    self.looks += 1
        connection.close()

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()


@pytest.mark.parametrize("clients", [1, 2])
def test_many_at_once_never_pass_a_budget_and_use_it_up(tmp_path, clients) -> None:
    limit = Decimal("0.1")

    async def main() -> None:
        async with answering() as seen, contextlib.AsyncExitStack() as stack:
            settings_ = config(tmp_path, seen.base_url, budget={"day": {"usd": limit}, "request": {"usd": "off"}})
            made = [await stack.enter_async_context(llmkit.AsyncClient(config=settings_)) for _ in range(clients)]
            await made[0].ledger.open_store()
            with Watch(tmp_path / "ledger.sqlite3") as watch:
                results = await asyncio.gather(
                    *[made[n % clients].complete(f"hi {n}", max_tokens=200) for n in range(160)], return_exceptions=True
                )
            refused = [each for each in results if isinstance(each, BaseException)]
            answered = [each for each in results if not isinstance(each, BaseException)]
            assert {type(each) for each in refused} == {errors.BudgetExceeded}
            spent = sum((reply.cost_usd for reply in answered), Decimal(0))
            assert spent == COST * len(answered) == COST * len(seen.requests)
            assert limit * Decimal("0.95") <= spent <= limit
            assert watch.looks > 10
            assert watch.most <= limit * NANOS
            # nothing was refused that had room: what was left was less than a worst case
            for each in refused:
                assert each.scope == "day"
                assert each.spent_before + each.needed > each.limit
            frame = await made[0].budgets()
            (day,) = frame[frame["scope"] == "day"].to_dict("records")
            assert (day["held"], day["unknown"]) == (0, 0)
            assert day["spent"] == pytest.approx(float(spent))

    asyncio.run(main())


def test_several_scopes_at_once_and_the_smallest_rules(tmp_path) -> None:
    async def main() -> None:
        async with answering() as seen:
            made = config(
                tmp_path,
                seen.base_url,
                budget={
                    "request": {"usd": "off"},
                    "day": {"usd": 1},
                    "user": {"*": {"day": {"usd": Decimal("0.01")}}},
                    "tag": {"app=*": {"total": {"tokens": 2000}}},
                },
            )
            async with llmkit.AsyncClient(config=made) as client:
                jobs = [
                    client.complete(f"hi {n}", max_tokens=100, user=user, tags={"app": app})
                    for n in range(30)
                    for user, app in (("ana", "a"), ("bob", "b"), ("eve", "c"))
                ]
                results = await asyncio.gather(*jobs, return_exceptions=True)
                assert {type(r) for r in results} == {llmkit.Reply, errors.BudgetExceeded}
                frame = await client.budgets()
        assert list(frame.columns) == list(COLUMNS)
        users = frame[frame["kind"] == "user"]
        assert set(users["name"]) == {"ana", "bob", "eve"}
        assert (users["spent"] <= 0.01).all()
        assert (users["spent"] >= 0.008).all()
        tags = frame[frame["kind"] == "tag"]
        assert set(tags["name"]) == {"app=a", "app=b", "app=c"}
        assert (tags["unit"] == "tokens").all()
        assert (tags["spent"] <= 2000).all()
        assert (frame["held"] == 0).all()
        assert tags["resets_at"].isna().all()
        assert users["resets_at"].notna().all()

    asyncio.run(main())


def test_what_is_left_without_a_word_of_max_tokens_is_used_up_as_well(tmp_path) -> None:
    """Each call could take more than is left, so they go one after the other; none is refused for what others hold."""

    async def main() -> None:
        async with answering(0.001) as seen:
            made = config(tmp_path, seen.base_url, budget={"day": {"usd": Decimal("0.02")}, "request": {"usd": "off"}})
            async with llmkit.AsyncClient(config=made) as client:
                results = await asyncio.gather(*[client.complete(f"hi {n}") for n in range(40)], return_exceptions=True)
                answered = [each for each in results if not isinstance(each, BaseException)]
                assert len(answered) >= 19
                assert {type(each) for each in results} == {llmkit.Reply, errors.BudgetExceeded}

    asyncio.run(main())


def test_a_budget_that_is_asked_for_needs_a_price_and_the_defaults_do_not(tmp_path) -> None:
    async def main() -> None:
        async with answering() as seen:
            async with llmkit.AsyncClient(config=config(tmp_path, seen.base_url)) as client:
                reply = await client.complete("hi", model="unpriced")
                assert reply.cost_usd is None
                client.set_budgets(month={"usd": 3})
                with pytest.raises(errors.PriceUnknown, match="budget"):
                    await client.complete("ho", model="unpriced")
            assert len(seen.requests) == 1

    asyncio.run(main())


def test_set_budgets_is_checked_like_the_file_and_holds_at_once(tmp_path) -> None:
    async def main() -> None:
        async with answering() as seen, llmkit.AsyncClient(config=config(tmp_path, seen.base_url)) as client:
            await client.complete("hi")
            client.set_budgets(day={"usd": Decimal("0.001")})
            with pytest.raises(errors.BudgetExceeded) as caught:
                await client.complete("ho")
            assert caught.value.scope == "day"
            assert "0.00101" in caught.value.message
            assert "%llm budget day=off" in caught.value.next_step
            with pytest.raises(errors.ConfigError, match="fortnight"):
                client.set_budgets(fortnight={"usd": 1})
            client.set_budgets(day={"usd": "off"}, session={"usd": "off"})
            await client.complete("ho")
            assert (await client.budgets()).empty
            client.set_budgets(request={"usd": Decimal("0.000001")})
            with pytest.raises(errors.BudgetExceeded) as caught:
                await client.complete("ho")
            assert caught.value.scope == "request"

    asyncio.run(main())


@pytest.mark.parametrize("url", ["memory", "sqlite"])
def test_a_client_without_await_shows_its_budgets(tmp_path, url) -> None:
    state = {"url": "memory" if url == "memory" else f"sqlite:///{tmp_path}/l.sqlite3"}
    made = config(tmp_path, "http://127.0.0.1:9/v1", budget={"timezone": "Europe/Berlin"}).with_(state=state)
    with llmkit.Client(config=made) as client:
        frame = client.budgets()
        assert list(frame["scope"]) == ["session", "day"]
        assert (frame["left"] == frame["limit"]).all()
        assert str(frame["resets_at"].dt.tz) == "Europe/Berlin"
        client.set_budgets(day={"usd": 7})
        assert list(client.budgets()["limit"]) == [5, 7]
        assert client.config.budget.limits[1].usd == 7


# -- processes that are killed ---------------------------------------------------------------------------------------

WORKER = """
    import asyncio, json, sys
    from decimal import Decimal
    import llmkit
    from tests.test_budgets import config

    async def main():
        folder, url, limit, number, calls = sys.argv[1:6]
        made = config(folder, url, budget={"day": {"usd": Decimal(limit)}, "request": {"usd": "off"}})
        async with llmkit.AsyncClient(config=made) as client:
            print("ready", flush=True)
            async def one(n):
                try:
                    return (await client.complete(f"hi {number} {n}", max_tokens=200)).cost_usd
                except llmkit.BudgetExceeded:
                    return None
            spent = [cost for cost in await asyncio.gather(*[one(n) for n in range(int(calls))]) if cost is not None]
            print(json.dumps([len(spent), str(sum(spent, Decimal(0)))]), flush=True)

    asyncio.run(main())
"""


def worker(tmp_path, url, limit, number, calls):
    code = textwrap.dedent(WORKER)
    command = [sys.executable, "-c", code, str(tmp_path), url, str(limit), str(number), str(calls)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_share_a_budget_and_one_that_is_killed_holds_nothing_for_ever(tmp_path) -> None:
    limit = Decimal("0.1")

    async def main() -> None:
        hanging = asyncio.Event()
        killed_sent = 0

        async def respond(request, writer):
            nonlocal killed_sent
            if b"hi 0 " in request:  # the one that will be killed never gets an answer
                killed_sent += 1
                if killed_sent == 5:
                    hanging.set()
                return
            await asyncio.sleep(0.01)
            writer.write(answer())
            await writer.drain()

        async with server(respond) as seen:
            with Watch(tmp_path / "ledger.sqlite3") as watch:
                victim = worker(tmp_path, seen.base_url, limit, 0, 5)
                await asyncio.wait_for(hanging.wait(), 30)
                others = [worker(tmp_path, seen.base_url, limit, number, 50) for number in (1, 2, 3)]
                await asyncio.sleep(0.5)
                victim.send_signal(signal.SIGKILL)
                victim.wait()
                said = await asyncio.gather(*[asyncio.to_thread(each.communicate, None, 60) for each in others])
            victim.communicate()
            assert [each.returncode for each in others] == [0, 0, 0], said
            spent = sum((Decimal(json.loads(out.splitlines()[-1])[1]) for out, _ in said), Decimal(0))
            made = config(tmp_path, seen.base_url, budget={"day": {"usd": limit}, "request": {"usd": "off"}})
            async with llmkit.AsyncClient(config=made) as client:
                frame = await client.budgets()
                (day,) = frame[frame["scope"] == "day"].to_dict("records")
        unknown = Decimal(str(round(day["unknown"], 9)))
        assert unknown > COST * 5  # their worst case, which is more than an answer
        assert day["held"] == 0
        assert Decimal(str(round(day["spent"], 9))) == spent + unknown
        assert watch.most <= limit * NANOS
        assert limit * Decimal("0.95") <= spent + unknown <= limit

    asyncio.run(main())


def test_a_call_that_was_killed_before_it_was_sent_costs_nothing(tmp_path) -> None:
    """The connection is never made: a listener with a full backlog lets nobody in."""

    async def main() -> None:
        import socket

        with socket.socket() as listener, contextlib.ExitStack() as stack:
            listener.bind(("127.0.0.1", 0))
            listener.listen(0)
            address = listener.getsockname()
            for _ in range(3):
                blocker = stack.enter_context(socket.socket())
                blocker.setblocking(False)
                blocker.connect_ex(address)
            url = f"http://127.0.0.1:{address[1]}/v1"
            victim = worker(tmp_path, url, 1, 0, 3)
            assert await asyncio.to_thread(victim.stdout.readline) == "ready\n"
            made = config(tmp_path, url, budget={"day": {"usd": 1}, "request": {"usd": "off"}})
            async with llmkit.AsyncClient(config=made) as client:

                async def day():
                    frame = await client.budgets()
                    return frame[frame["scope"] == "day"].to_dict("records")[0]

                for _ in range(500):
                    if (await day())["held"] > 3 * 0.002:  # 200 tokens out, and the prompt
                        break
                    await asyncio.sleep(0.01)
                assert (await day())["held"] == pytest.approx(3 * 0.00215, rel=0.01)
                victim.send_signal(signal.SIGKILL)
                victim.communicate()
                after = await day()
                assert (after["held"], after["spent"], after["unknown"]) == (0, 0, 0)

    asyncio.run(main())
