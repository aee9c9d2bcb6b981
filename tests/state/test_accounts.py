"""Money set aside: the contract that every store of accounts keeps, and the proof that no limit is passed.

The suite asks an adapter of five coroutines, so that accounts on a server can stand beside those in a store.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llmkit.account import Account, Balance, Hold, HoldRefused, Release, Sent, Settle
from llmkit.state.memory import MemoryStore
from llmkit.state.sqlite import SQLiteStore
from llmkit.state.store import AttemptBegun, AttemptEnded, CallBegun, CallEnded, DuplicateCall
from tests.state.served_accounts import ServedAccounts

if TYPE_CHECKING:
    from collections.abc import Iterator

NOW = 900_000.0
DAY = Account("day", "day", limit_nanos=1_000, limit_tokens=100, since=NOW, resets_at=NOW + 86_400)
ANA = Account("ana", "user ana, month", limit_nanos=600, since=NOW, user="ana")
ALL = Account("all", "total")


class StoredAccounts:
    """Accounts that are kept in a store."""

    def __init__(self, store) -> None:
        self.store = store

    async def commit(self, *changes) -> None:
        waiting = self.store.commit(changes)
        if waiting is not None:
            await asyncio.wrap_future(waiting)

    async def hold(self, hold) -> None:
        await self.commit(hold)

    async def sent(self, request_id, number=1) -> None:
        await self.commit(Sent(request_id, number))

    async def end(self, *endings) -> None:
        await self.commit(*endings)

    async def balances(self, accounts) -> list[Balance]:
        return self.store.balances(accounts)

    async def reap(self, now, is_gone, was_sent=lambda owner, slot: False) -> int:
        return self.store.reap(now, is_gone=is_gone, was_sent=was_sent)


@contextmanager
def in_memory() -> Iterator[StoredAccounts]:
    yield StoredAccounts(MemoryStore())


@contextmanager
def in_sqlite() -> Iterator[StoredAccounts]:
    from pathlib import Path

    with TemporaryDirectory() as folder:
        store = SQLiteStore(Path(folder, "ledger.sqlite3"))
        try:
            yield StoredAccounts(store)
        finally:
            store.close()


KINDS = {"memory": in_memory, "sqlite": in_sqlite}
STORES = ["memory", "sqlite"]  # those that keep the ledger as well


@pytest.fixture(params=[*KINDS, pytest.param("redis", marks=pytest.mark.redis)])
def accounts(request):
    if request.param == "redis":
        with ServedAccounts(request.getfixturevalue("redis_server"), NOW) as opened:
            yield opened
        return
    with KINDS[request.param]() as opened:
        yield opened


@pytest.fixture(params=STORES)
def stored(request):
    """Accounts of a store that has the ledger beside them."""
    with KINDS[request.param]() as opened:
        yield opened


def hold(request_id="a", nanos=100, tokens=10, accounts=(DAY, ANA, ALL), number=1, owner="o", expires=NOW + 60, slot=7):
    return Hold(request_id, number, tuple(accounts), nanos, tokens, owner, expires, slot, [])


def amounts(balance):
    return tuple(balance[1:])


async def seen(accounts, *which):
    return [amounts(balance) for balance in await accounts.balances(which or (DAY, ANA, ALL))]


# -- holding and ending ----------------------------------------------------------------------------------------------


def test_what_is_held_counts_in_every_account_and_the_balances_say_so(accounts):
    async def main():
        first, second = hold(), hold("b", 50, 5, (DAY,))
        await accounts.hold(first)
        await accounts.hold(second)
        assert first.balances == [Balance(key, 0, 100, 0, 0, 10, 0) for key in ("day", "ana", "all")]
        assert second.balances == [Balance("day", 0, 150, 0, 0, 15, 0)]
        assert await seen(accounts) == [(0, 150, 0, 0, 15, 0), (0, 100, 0, 0, 10, 0), (0, 100, 0, 0, 10, 0)]

    asyncio.run(main())


def test_settling_makes_of_it_what_it_really_was_less_or_more(accounts):
    async def main():
        await accounts.hold(hold())
        await accounts.hold(hold("b"))
        await accounts.end(Settle("a", 1, 30, 3))
        assert await seen(accounts, DAY) == [(30, 100, 0, 3, 10, 0)]
        await accounts.end(Settle("b", 1, 5_000, 11))
        assert await seen(accounts, DAY) == [(5_030, 0, 0, 14, 0, 0)]

    asyncio.run(main())


def test_releasing_gives_all_of_it_back(accounts):
    async def main():
        await accounts.hold(hold())
        await accounts.end(Release("a", 1))
        assert await seen(accounts) == [(0,) * 6] * 3

    asyncio.run(main())


@pytest.mark.parametrize("again", [Settle("a", 1, 99, 9), Settle("a", 1, None, None), Release("a", 1)])
@pytest.mark.parametrize("first", [Settle("a", 1, 30, 3), Release("a", 1)])
def test_only_the_first_end_counts(accounts, first, again):
    async def main():
        await accounts.hold(hold())
        await accounts.end(first)
        before = await seen(accounts)
        await accounts.end(again)
        await accounts.end(again)
        assert await seen(accounts) == before

    asyncio.run(main())


def test_an_end_of_nothing_is_nothing(accounts):
    async def main():
        await accounts.hold(hold())
        await accounts.end(Settle("other", 1, 30, 3), Release("a", 2), Settle("a", 3, None, None))
        assert await seen(accounts, DAY) == [(0, 100, 0, 0, 10, 0)]

    asyncio.run(main())


def test_each_attempt_has_a_hold_of_its_own(accounts):
    async def main():
        await accounts.hold(hold())
        await accounts.end(Settle("a", 1, 30, 3))
        await accounts.hold(hold(number=2))
        assert await seen(accounts, DAY) == [(30, 100, 0, 3, 10, 0)]

    asyncio.run(main())


def test_an_account_named_twice_counts_once(accounts):
    async def main():
        await accounts.hold(hold(accounts=(DAY, DAY)))
        assert await seen(accounts, DAY) == [(0, 100, 0, 0, 10, 0)]
        await accounts.end(Settle("a", 1, 30, 3))
        assert await seen(accounts, DAY) == [(30, 0, 0, 3, 0, 0)]

    asyncio.run(main())


# -- what does not fit -----------------------------------------------------------------------------------------------


def test_what_does_not_fit_into_one_account_is_held_in_none(accounts):
    async def main():
        await accounts.hold(hold("before", 550, 1))
        refused = hold("b", 51, 1)
        with pytest.raises(HoldRefused) as caught:
            await accounts.hold(refused)
        assert (caught.value.account, caught.value.unit) == (ANA, "usd")
        assert (caught.value.limit, caught.value.settled, caught.value.held) == (600, 0, 550)
        assert refused.balances == []
        assert await seen(accounts) == [(0, 550, 0, 0, 1, 0)] * 3
        await accounts.hold(hold("c", 50, 1))  # to the last nano-dollar
        with pytest.raises(HoldRefused):
            await accounts.hold(hold("d", 1, 1))

    asyncio.run(main())


def test_tokens_are_a_limit_of_their_own(accounts):
    async def main():
        await accounts.hold(hold(nanos=0, tokens=100))
        with pytest.raises(HoldRefused) as caught:
            await accounts.hold(hold("b", 0, 1))
        assert (caught.value.account, caught.value.unit) == (DAY, "tokens")
        assert (caught.value.limit, caught.value.settled, caught.value.held) == (100, 0, 100)
        await accounts.hold(hold("c", 1, 0))

    asyncio.run(main())


def test_what_costs_nothing_fits_where_all_is_spent(accounts):
    async def main():
        await accounts.hold(hold(accounts=(DAY,)))
        await accounts.end(Settle("a", 1, 5_000, 500))
        with pytest.raises(HoldRefused):
            await accounts.hold(hold("b", 1, 0, (DAY,)))
        with pytest.raises(HoldRefused):
            await accounts.hold(hold("b", 0, 1, (DAY,)))
        await accounts.hold(hold("b", 0, 0, (DAY,)))

    asyncio.run(main())


def test_limits_belong_to_who_holds_and_may_differ_and_change(accounts):
    async def main():
        await accounts.hold(hold(nanos=900, accounts=(DAY,)))
        with pytest.raises(HoldRefused):
            await accounts.hold(hold("b", 1, 0, (DAY._replace(limit_nanos=900),)))
        await accounts.hold(hold("c", 5_000, 0, (DAY._replace(limit_nanos=None, limit_tokens=None),)))
        assert await seen(accounts, DAY) == [(0, 5_900, 0, 0, 10, 0)]

    asyncio.run(main())


def test_amounts_that_nothing_can_cost_break_no_sum(accounts):
    async def main():
        for number in range(20):
            await accounts.hold(hold(str(number), 10**30, 10**30, (ALL,)))
            await accounts.end(Settle(str(number), 1, 10**30, -5))
        ((settled, held, _, settled_tokens, held_tokens, _),) = await seen(accounts, ALL)
        assert (settled, held, settled_tokens, held_tokens) == (20 * 10**15, 0, 0, 0)
        with pytest.raises(HoldRefused):
            await accounts.hold(hold("b", 1, 0, (ALL._replace(limit_nanos=1000),)))

    asyncio.run(main())


# -- when nobody knows the end ---------------------------------------------------------------------------------------


def test_an_end_that_nobody_knows_counts_at_its_worst_until_the_owner_knows_it(accounts):
    async def main():
        await accounts.hold(hold())
        await accounts.end(Settle("a", 1, None, None))
        assert await seen(accounts, DAY, ALL) == [(100, 0, 100, 10, 0, 10)] * 2
        await accounts.end(Settle("a", 1, None, None))
        assert await seen(accounts, DAY) == [(100, 0, 100, 10, 0, 10)]
        await accounts.end(Settle("a", 1, 30, 3))
        assert await seen(accounts, DAY, ALL) == [(30, 0, 0, 3, 0, 0)] * 2
        await accounts.end(Settle("a", 1, 99, 9))
        assert await seen(accounts, DAY) == [(30, 0, 0, 3, 0, 0)]

    asyncio.run(main())


def test_one_unit_may_be_known_before_the_other(accounts):
    async def main():
        await accounts.hold(hold())
        await accounts.end(Settle("a", 1, None, 4))
        assert await seen(accounts, DAY) == [(100, 0, 100, 4, 0, 0)]
        await accounts.end(Settle("a", 1, None, None))
        assert await seen(accounts, DAY) == [(100, 0, 100, 4, 0, 0)]
        await accounts.end(Settle("a", 1, 30, None))
        assert await seen(accounts, DAY) == [(30, 0, 0, 4, 0, 0)]
        await accounts.hold(hold("b"))
        await accounts.end(Settle("b", 1, 20, None))
        assert await seen(accounts, DAY) == [(50, 0, 0, 14, 0, 10)]

    asyncio.run(main())


def test_what_turns_out_never_to_have_been_spent_is_given_back(accounts):
    async def main():
        await accounts.hold(hold())
        await accounts.end(Settle("a", 1, None, None))
        await accounts.end(Release("a", 1))
        assert await seen(accounts) == [(0,) * 6] * 3

    asyncio.run(main())


# -- when the owner dies ---------------------------------------------------------------------------------------------


def test_holds_of_the_dead_are_unknown_if_they_were_sent_and_released_if_not(accounts):
    async def main():
        await accounts.hold(hold("told", slot=1))
        await accounts.sent("told")
        await accounts.hold(hold("from the beginning", slot=None))
        await accounts.hold(hold("noted", slot=2))
        await accounts.hold(hold("never", slot=3))
        await accounts.hold(hold("alive", owner="other"))
        ended = await accounts.reap(NOW, lambda owner: owner == "o", lambda owner, slot: (owner, slot) == ("o", 2))
        assert ended == 4
        assert await seen(accounts, DAY) == [(300, 100, 300, 30, 10, 30)]
        assert await accounts.reap(NOW, lambda owner: owner == "o") == 0

    asyncio.run(main())


def test_a_lease_is_asked_only_where_nobody_knows_whether_the_owner_lives(stored):  # a server never knows
    async def main():
        await stored.hold(hold("lives", owner="lives", expires=NOW - 100, accounts=(DAY,)))
        await stored.hold(hold("late", owner="elsewhere", expires=NOW - 1, slot=None, accounts=(DAY,)))
        await stored.hold(hold("in time", owner="elsewhere", expires=NOW + 1, accounts=(DAY,)))
        assert await stored.reap(NOW, lambda owner: False if owner == "lives" else None) == 1
        assert await seen(stored, DAY) == [(100, 200, 100, 10, 20, 10)]

    asyncio.run(main())


def test_whoever_was_thought_dead_and_is_not_has_the_last_word(accounts):
    async def main():
        await accounts.hold(hold("sent", owner="elsewhere", slot=None, accounts=(DAY,)))
        await accounts.hold(hold("unsent", owner="elsewhere", accounts=(DAY,)))
        assert await accounts.reap(NOW + 1_000, lambda owner: None) == 2
        assert await seen(accounts, DAY) == [(100, 0, 100, 10, 0, 10)]
        await accounts.end(Settle("sent", 1, 20, 2), Settle("unsent", 1, 30, 3))
        assert await seen(accounts, DAY) == [(50, 0, 0, 5, 0, 0)]
        await accounts.end(Release("sent", 1), Settle("unsent", 1, 99, 9))
        assert await seen(accounts, DAY) == [(50, 0, 0, 5, 0, 0)]

    asyncio.run(main())


# -- beside the ledger -----------------------------------------------------------------------------------------------


def begun(request_id, number=1, started=NOW, user=None, tags=None, model="m", owner="o"):
    call = [CallBegun(request_id, started, user, json.dumps(tags or {}), model, owner)] if number == 1 else []
    return [*call, AttemptBegun(request_id, number, started, "openai", model, None)]


def attempt_ended(request_id, number=1, nanos=10, counts=(2, 3), maybe_billed=0, status="complete"):
    given, answered = counts
    usage = (given, 0, 0, answered, 0, 0)
    return AttemptEnded(
        status, *usage, nanos, *[None] * 3, 0.5, *[None] * 4, maybe_billed, None, None, request_id, number
    )


def call_ended(request_id, nanos=10, saved=None, **more):
    ended = CallEnded("complete", *[None] * 9, nanos, saved, 0.5, None, 1, 0, None, None, None, request_id)
    return ended._replace(**more)


async def made(accounts, request_id, nanos=10, counts=(2, 3), **more):
    await accounts.commit(*begun(request_id, **more))
    await accounts.commit(attempt_ended(request_id, 1, nanos, counts), call_ended(request_id, nanos))


def test_a_hold_that_is_refused_leaves_nothing_of_its_commit(stored):
    async def main():
        with pytest.raises(HoldRefused):
            await stored.commit(*begun("a"), hold(nanos=1_001))
        assert stored.store.calls() == []
        assert stored.store.attempts("a") == []
        await stored.commit(*begun("a"), hold())
        with pytest.raises(DuplicateCall):
            await stored.commit(*begun("b"), hold("a", 5, 5))
        assert len(stored.store.calls()) == 1
        assert await seen(stored, DAY) == [(0, 100, 0, 0, 10, 0)]
        with pytest.raises(HoldRefused):
            await stored.commit(attempt_ended("a"), Settle("a", 1, 10, 5), *begun("a", 2), hold("a", 5_000, number=2))
        assert await seen(stored, DAY) == [(0, 100, 0, 0, 10, 0)]
        assert [row["status"] for row in stored.store.attempts("a")] == ["in_flight"]
        assert stored.store.spend() == []

    asyncio.run(main())


def account(key="new", **scope):
    return Account(key, key, limit_nanos=1_000_000, since=NOW, **scope)


def test_an_account_begins_with_what_the_ledger_has_for_its_window_and_scope(stored):
    tags = {"app": "docs", "no": ""}
    cases = {
        "all": (account("all"), 0b1111),
        "window": (account("window", resets_at=NOW + 900), 0b0011),
        "odd window": (account("odd window")._replace(since=NOW + 1), 0b1110),
        "ana": (account("ana", user="ana"), 0b0010),
        "tag": (account("tag", tag="app=docs"), 0b0100),
        "no tag": (account("no tag", tag="app="), 0b1011),
        "empty tag": (account("empty tag", tag="no="), 0b1111),
        "other tag": (account("other tag", tag="app=doc"), 0),
        "model": (account("model", model="openai:dear"), 0b1000),
        "session": (account("session", session="o2"), 0b1100),
        "both": (account("both", session="o2", tag="app=docs"), 0b0100),
    }

    async def main():
        await made(stored, "before", 10_000, started=NOW - 1)
        await made(stored, "one", 1)
        await made(stored, "two", 10, user="ana", started=NOW + 899)
        await made(stored, "three", 100, tags=tags, started=NOW + 900, owner="o2")
        await made(stored, "four", 1_000, started=NOW + 5_000, model="dear", owner="o2")
        sums = {key: sum(10**bit for bit in range(4) if bits >> bit & 1) for key, (_, bits) in cases.items()}
        which = [each for each, _ in cases.values()]
        assert {balance.key: balance.settled_nanos for balance in stored.store.balances(which)} == sums
        taken = hold("h", 7, 0, which)
        await stored.commit(taken)
        assert {balance.key: balance.settled_nanos for balance in taken.balances} == sums
        assert {balance.key: balance.settled_tokens for balance in taken.balances} == {
            key: 5 * bits.bit_count() for key, (_, bits) in cases.items()
        }
        assert {balance.held_nanos for balance in stored.store.balances(which)} == {7}

    asyncio.run(main())


def test_it_begins_with_what_is_under_way_too(stored):
    later = account("later", user="ana")

    async def main():
        await stored.commit(*begun("held", user="ana"), hold("held", 5, 1, (ALL,)))
        await stored.commit(*begun("lost", user="ana"), hold("lost", 50, 1, (ALL,)))
        await stored.commit(attempt_ended("lost", 1, None, (None, None), 1), Settle("lost", 1, None, None))
        await stored.commit(*begun("bob's", user="bob"), hold("bob's", 500, 1, (ALL,)))
        assert await seen(stored, later) == [(50, 5, 50, 1, 1, 1)]
        await stored.commit(hold("new", 1, 0, (later,)))
        assert await seen(stored, later) == [(50, 6, 50, 1, 1, 1)]
        await stored.commit(attempt_ended("held", 1, 3), Settle("held", 1, 3, 5))
        await stored.commit(Settle("lost", 1, 20, 2))
        assert await seen(stored, later, ALL) == [(23, 1, 0, 7, 0, 0), (23, 500, 0, 7, 1, 0)]

    asyncio.run(main())


def test_tags_that_are_no_tags_stop_nobody(stored):
    async def main():
        for number, tags in enumerate(("", "[1]", "nonsense", '{"app": 5}', "null")):
            await stored.commit(CallBegun(str(number), NOW, None, tags, "m", "o"), *begun(str(number))[1:])
            await stored.commit(attempt_ended(str(number), 1, 1), call_ended(str(number)))
        taken = hold("h", 0, 0, (account(tag="app=docs"), account("none", tag="app=")))
        await stored.commit(taken)
        assert [balance.settled_nanos for balance in taken.balances] == [0, 4]

    asyncio.run(main())


def test_names_are_data(stored):
    nasty = "'); DROP TABLE accounts; --\"\ud800%"

    async def main():
        which = (account(nasty, user=nasty, tag=f"{nasty}={nasty}"), account("session", session=nasty, model=nasty))
        taken = hold(nasty, 5, 5, which, owner=nasty)
        await stored.commit(taken)
        assert [balance.held_nanos for balance in taken.balances] == [5, 5]
        await stored.commit(Settle(nasty, 1, 3, 3))
        assert [balance.settled_nanos for balance in stored.store.balances(which)] == [3, 3]

    asyncio.run(main())


def test_a_call_and_its_holds_are_lost_together(stored):
    async def main():
        await stored.commit(*begun("sent"), hold("sent", slot=1))
        await stored.commit(*begun("unsent"), hold("unsent", slot=2))
        await stored.commit(*begun("no hold"))
        assert stored.store.mark_lost("o", lambda owner, slot: slot == 1) == 3
        rows = {row["request_id"]: row for row in stored.store.calls()}
        assert {key: (row["status"], row["cost_nanos"]) for key, row in rows.items()} == {
            "sent": ("lost", None),
            "unsent": ("lost", 0),
            "no hold": ("lost", None),
        }
        attempts = {key: stored.store.attempts(key)[0] for key in rows}
        assert {key: (row["status"], row["maybe_billed"]) for key, row in attempts.items()} == {
            "sent": ("lost", 1),
            "unsent": ("lost", 0),
            "no hold": ("lost", 1),
        }
        assert await seen(stored, DAY) == [(100, 0, 100, 10, 0, 10)]

    asyncio.run(main())


def test_the_calls_of_the_dead_are_lost_when_their_holds_are_reaped(stored):
    async def main():
        await stored.commit(*begun("a"), hold())
        await stored.commit(*begun("b", owner="late"), hold("b", owner="late", expires=NOW - 1))
        gone = {"o": True, "late": None}
        assert await stored.reap(NOW, gone.get) == 2
        assert {row["request_id"]: row["status"] for row in stored.store.calls()} == {"a": "lost", "b": "in_flight"}

    asyncio.run(main())


def test_accounts_of_old_windows_go_and_come_back_as_they_were():
    old = account("old", resets_at=NOW + 86_400)
    with in_sqlite() as stored:

        async def main():
            await made(stored, "before", 7)
            await stored.commit(*begun("a"), hold("a", 50, 0, (old, ALL)))
            await stored.commit(attempt_ended("a", 1, None, (None, None), 1), Settle("a", 1, None, None))
            await stored.commit(*begun("b", started=NOW - 1), hold("b", 500, 0, (DAY,)))
            before = await seen(stored, old, ALL, DAY)
            for now in (NOW + 86_400 + 50 * 86_400, NOW + 10_000 * 86_400):
                assert await stored.reap(now, lambda owner: False) == 0
            keys = [row[0] for row in stored.store.database.read("SELECT key FROM accounts")]
            assert keys == ["all", "day"]  # one has no end, and something is held in the other
            assert await seen(stored, old, ALL, DAY) == before
            await stored.commit(hold("c", 1, 0, (old, ALL)))
            await stored.commit(Settle("a", 1, 20, 2), Release("c", 1))
            assert await seen(stored, old) == [(27, 0, 0, 7, 0, 0)]

        asyncio.run(main())


# -- whatever comes, in whatever order -------------------------------------------------------------------------------


class Machine(RuleBasedStateMachine):
    """Holds, ends, deaths and clock steps in any order, beside a model that remembers each hold by itself."""

    kind = ""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.opened = KINDS[self.kind]()
        self.accounts = self.opened.__enter__()
        self.now = NOW
        self.holds = {}  # request_id → what is known of it
        self.fate = {"here": False, "there": None}  # what is known of owners
        self.limits = [(1_000, 100), (600, None), (None, None)]
        self.peak = {}  # the highest limit under which something was held
        self.excess = {}  # what was settled beyond its hold

    def teardown(self) -> None:
        self.opened.__exit__(None, None, None)
        self.loop.close()

    def run(self, coroutine):
        return self.loop.run_until_complete(coroutine)

    def which(self, picked):
        names = [("day", "day"), ("ana", "ana"), ("all", "all")]
        return tuple(Account(*names[index], *self.limits[index], since=NOW) for index in picked)

    def expected(self, key):
        """The balance that follows from what became of each hold."""
        sums = [0] * 6
        for each in self.holds.values():
            if key not in each["keys"]:
                continue
            for place, unit in ((0, "nanos"), (3, "tokens")):
                value, state = each[unit], each["states"][unit]
                sums[place] += value if state in {"real", "worst"} else 0
                sums[place + 1] += value if state == "held" else 0
                sums[place + 2] += value if state == "worst" else 0
        return tuple(sums)

    @initialize()
    def begin(self) -> None:
        assert self.run(seen(self.accounts)) == [(0,) * 6] * 3

    @rule(
        nanos=st.integers(0, 400),
        tokens=st.integers(0, 40),
        picked=st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True),
        owner=st.sampled_from(["here", "there"]),
        lease=st.integers(-10, 100),
        slot=st.sampled_from([None, 1, 2]),
    )
    def hold(self, nanos, tokens, picked, owner, lease, slot) -> None:
        name = f"r{len(self.holds)}"
        which = self.which(picked)
        fits = True
        for each in which:
            settled, held, _, settled_tokens, held_tokens, _ = self.expected(each.key)
            if each.limit_nanos is not None and nanos and settled + held + nanos > each.limit_nanos:
                fits = False
            if each.limit_tokens is not None and tokens and settled_tokens + held_tokens + tokens > each.limit_tokens:
                fits = False
        taken = hold(name, nanos, tokens, which, owner=owner, expires=self.now + lease, slot=slot)
        try:
            self.run(self.accounts.hold(taken))
        except HoldRefused as refusal:
            assert not fits
            expected = self.expected(refusal.account.key)
            assert amounts(refusal.balance) == expected
            needed = nanos if refusal.unit == "usd" else tokens
            assert refusal.settled + refusal.held + needed > refusal.limit
            self.holds[name] = {"keys": (), "states": {}, "nanos": 0, "tokens": 0, "open": False}
            return
        assert fits
        self.holds[name] = {
            "keys": [each.key for each in which],
            "states": {"nanos": "held", "tokens": "held"},
            "nanos": nanos,
            "tokens": tokens,
            "worst": {"nanos": nanos, "tokens": tokens},
            "open": True,
            "sent": slot is None,
            "slot": slot,
            "owner": owner,
            "expires": self.now + lease,
        }
        assert [amounts(b) for b in taken.balances] == [self.expected(each.key) for each in which]
        for each in which:
            for unit, limit in (("nanos", each.limit_nanos), ("tokens", each.limit_tokens)):
                before = self.peak.get((each.key, unit), 0)
                self.peak[each.key, unit] = None if limit is None or before is None else max(before, limit)

    @precondition(lambda self: self.holds)
    @rule(data=st.data(), nanos=st.none() | st.integers(0, 1_000), tokens=st.none() | st.integers(0, 100))
    def settle(self, data, nanos, tokens) -> None:
        name = data.draw(st.sampled_from(sorted(self.holds)))
        self.run(self.accounts.end(Settle(name, 1, nanos, tokens)))
        each = self.holds[name]
        if not each["open"]:
            return
        for unit, value in (("nanos", nanos), ("tokens", tokens)):
            if value is not None:
                self.count(each, unit, value)
            elif each["states"][unit] in {"held", "given back"}:
                each[unit], each["states"][unit] = each["worst"][unit], "worst"
                if each.get("given back"):
                    self.exceed(each, unit, each[unit])
        each.pop("given back", None)
        each["open"] = "worst" in each["states"].values()

    def count(self, each, unit, value):
        """A real value comes in the place of what counted until now."""
        covered = 0 if each.get("given back") else each[unit]
        self.exceed(each, unit, max(0, value - covered))
        each[unit], each["states"][unit] = value, "real"

    def exceed(self, each, unit, value):
        for key in each["keys"]:
            self.excess[key, unit] = self.excess.get((key, unit), 0) + value

    @precondition(lambda self: self.holds)
    @rule(data=st.data())
    def release(self, data) -> None:
        name = data.draw(st.sampled_from(sorted(self.holds)))
        self.run(self.accounts.end(Release(name, 1)))
        each = self.holds[name]
        if each["open"]:
            each.update(open=False, nanos=0, tokens=0, states={"nanos": "real", "tokens": "real"})

    @precondition(lambda self: self.holds)
    @rule(data=st.data())
    def send(self, data) -> None:
        name = data.draw(st.sampled_from(sorted(self.holds)))
        self.run(self.accounts.sent(name))
        self.holds[name]["sent"] = True

    @rule(seconds=st.sampled_from([1, 30, 200, -30, -10_000, 86_400 * 100, -86_400 * 100]))
    def clock_steps(self, seconds) -> None:
        self.now += seconds

    @rule(nanos=st.sampled_from([300, 600, 1_000, 2_000, None]), which=st.integers(0, 2))
    def limit_changes(self, nanos, which) -> None:
        self.limits[which] = (nanos, self.limits[which][1])

    @rule(dies=st.booleans(), noted=st.sampled_from([{1}, {2}, set(), {1, 2}]))
    def reap(self, dies, noted) -> None:
        gone = {"here": dies, "there": None}
        late = [
            each
            for each in self.holds.values()
            if "held" in each["states"].values()
            and (gone[each["owner"]] or (gone[each["owner"]] is None and each["expires"] < self.now))
        ]
        count = self.run(self.accounts.reap(self.now, gone.get, lambda owner, slot: slot in noted))
        assert count == len(late)
        for each in late:
            went_out = each["sent"] or each["slot"] in noted
            state = "worst" if went_out else "given back"
            each["states"] = dict.fromkeys(each["states"], state)
            if not went_out:
                each["given back"] = True

    @invariant()
    def books_are_right_and_no_limit_is_passed(self) -> None:
        for key, found in zip(("day", "ana", "all"), self.run(seen(self.accounts)), strict=True):
            assert found == self.expected(key)
            for place, unit in ((0, "nanos"), (3, "tokens")):
                peak = self.peak.get((key, unit), 0)
                if peak is not None:
                    assert found[place] + found[place + 1] <= peak + self.excess.get((key, unit), 0)


@pytest.mark.parametrize("kind", KINDS)
def test_no_limit_is_passed_whatever_comes(kind):
    machine = type(f"Machine_{kind}", (Machine,), {"kind": kind})
    case = machine.TestCase
    case.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
    case().runTest()


# -- real processes, really killed -----------------------------------------------------------------------------------


LIMIT = 400_000
WORST = 1_000

SPENDER = f"""
    import itertools, random, sys, time
    from pathlib import Path
    from llmkit.account import Account, Hold, HoldRefused, Sent, Settle, Release
    from llmkit.state.owner import current_owner
    from llmkit.state.sqlite import SQLiteStore
    from llmkit.state.store import AttemptBegun, AttemptEnded, CallBegun, CallEnded

    store = SQLiteStore(Path(sys.argv[1]))
    chance = random.Random(sys.argv[2])
    owner = current_owner()

    def commit(*changes):
        waiting = store.commit(changes)
        if waiting is not None:
            waiting.result(30)

    print("ready", flush=True)
    window = 0
    for number in itertools.count():
        key = f"{{owner}} {{number}}"
        start = window * 900
        accounts = (
            Account(f"window {{window}}", "window", {LIMIT}, None, start, start + 900),
            Account("all", "all"),
        )
        nanos = chance.randint(1, {WORST})
        begun = CallBegun(key, start + 1.0, None, "{{}}", "m", owner), AttemptBegun(key, 1, start + 1.0, "p", "m", None)
        try:
            commit(*begun, Hold(key, 1, accounts, nanos, 1, owner, start + 60.0, 1, []))
        except HoldRefused as refusal:
            assert refusal.settled + refusal.held + nanos > refusal.limit, refusal.balance
            if refusal.settled + nanos > refusal.limit:
                window += 1
            continue
        commit(Sent(key, 1))
        cost = chance.randint(0, nanos)
        ended = AttemptEnded("complete", 1, 0, 0, 0, 0, 0, cost, *[None] * 3, 0.5, *[None] * 4, 0, None, None, key, 1)
        call = CallEnded("complete", *[None] * 9, cost, None, 0.5, None, 1, 0, None, None, None, key)
        commit(ended, call, Settle(key, 1, cost, 1))
"""

WATCHER = f"""
    import sqlite3, sys

    connection = sqlite3.connect(f"file:{{sys.argv[1]}}?mode=ro", uri=True, isolation_level=None)
    print("ready", flush=True)
    looks = 0
    while True:
        over = connection.execute(
            "SELECT key, settled_nanos, held_nanos, unknown_nanos FROM accounts WHERE (key <> 'all' AND "
            "settled_nanos + held_nanos > {LIMIT}) OR settled_nanos < 0 OR held_nanos < 0 OR unknown_nanos < 0 "
            "OR unknown_nanos > settled_nanos"
        ).fetchall()
        assert not over, over
        looks += 1
        if looks % 1000 == 0:
            print(looks, flush=True)
"""


def started(code, *args):
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    return process


def killed(process):
    """Kill it as it stands; it must not have ended by itself. What it printed."""
    assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGKILL)
    printed, complaint = process.communicate(timeout=30)
    assert complaint == ""
    return printed


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL here")
def test_no_limit_is_passed_while_processes_are_killed_and_all_can_be_spent_afterwards(tmp_path):
    path = tmp_path / "ledger.sqlite3"
    store = SQLiteStore(path)
    chance = random.Random(3)
    spenders = [started(SPENDER, path, number) for number in range(4)]
    watcher = started(WATCHER, path)
    for kills in range(16):
        time.sleep(chance.uniform(0, 0.2))
        index = chance.randrange(len(spenders))
        killed(spenders[index])
        if kills % 5 == 0:  # somebody starts, and looks after what the dead have left
            store.reap(0.0, is_gone=from_here, was_sent=lambda owner, slot: False)
        spenders[index] = started(SPENDER, path, f"again {kills}")
    for process in spenders:
        killed(process)
    assert killed(watcher).count("\n") > 1

    store.reap(0.0, is_gone=from_here, was_sent=lambda owner, slot: False)
    rows = store.database.read("SELECT key, settled_nanos, held_nanos, unknown_nanos FROM accounts WHERE key <> 'all'")
    assert {held for _, _, held, _ in rows} == {0}
    assert store.database.read("SELECT count(*) FROM holds WHERE state = 'held'") == [(0,)]
    assert {row["status"] for row in store.calls()} <= {"complete", "lost"}
    booked = dict(store.spend(by=("quarter",), sums=("cost_nanos",)))
    full = max(int(key.split()[1]) for key, *_ in rows)
    assert full >= 2
    for key, settled, _, unknown in rows:
        window = int(key.split()[1])
        assert settled - unknown == booked[window * 900]  # the books and the accounts say the same
        assert window == full or settled >= 0.95 * LIMIT
        # Nothing is refused falsely: what is left can be spent to the last nano-dollar, and not one more.
        scope = Account(key, "window", LIMIT, None, window * 900, window * 900 + 900)
        with pytest.raises(HoldRefused):
            store.commit([hold(f"more {key}", LIMIT - settled + 1, 1, (scope,))])
        store.commit([hold(f"rest {key}", LIMIT - settled, 1, (scope,))])
    total = store.balances([Account("all", "all")])[0]
    assert total.settled_nanos == sum(settled for _, settled, _, _ in rows)
    store.close()
    raw = sqlite3.connect(path)
    assert raw.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    raw.close()


def from_here(owner):
    from llmkit.state.owner import is_gone

    return is_gone(owner)
