"""Alerts: what is unusual is said once, exactly, and costs a call next to nothing."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from datetime import UTC, datetime
from decimal import Decimal
from zoneinfo import ZoneInfo

import httpx
import pytest

import llmkit
from llmkit.alerts import Alerts
from llmkit.call import Attempt
from llmkit.config import AlertSettings
from llmkit.errors import StoreError
from llmkit.events import AlertRaised
from llmkit.models.prices import to_nanos
from llmkit.reply import Outcome
from llmkit.testing import FakeClock
from tests.layers.script import call_for

NOON = datetime(2026, 11, 21, 12, 0, tzinfo=UTC).timestamp()
DONE = Outcome("complete")
QUIET = {"call_usd": None, "hour_usd": None, "day_usd": None, "jump": None}


class Books:
    """A ledger's sums, which any process may add to."""

    def __init__(self) -> None:
        self.quarters: Counter[int] = Counter()
        self.looks = 0
        self.broken: Exception | None = None
        self.meanwhile = None  # what happens while a look is on its way

    def spent(self, at: float, usd: str) -> None:
        self.quarters[int(at // 900 * 900)] += to_nanos(Decimal(usd))

    def since(self, since: float) -> dict[int, int]:
        self.looks += 1
        if self.broken is not None:
            raise self.broken
        found = {quarter: nanos for quarter, nanos in self.quarters.items() if quarter >= since}
        if self.meanwhile is not None:
            self.meanwhile()
        return found


class Setting:
    """Alerts over made-up books, and what was heard of them."""

    def __init__(self, zone=UTC, **settings) -> None:
        self.clock = FakeClock(start=NOON, auto=False)
        self.books = Books()
        self.heard: list[AlertRaised] = []
        self.alerts = Alerts(
            AlertSettings(**{**QUIET, **settings}), lambda: zone, self.books.since, self.clock, self.heard.append
        )

    def call(self, *costs: str | None, events=None, request_id="r1"):
        call = call_for(self.clock, events=events, request_id=request_id)
        for number, cost in enumerate(costs, 1):
            usd = None if cost is None else Decimal(cost)
            attempt = {"provider": "p", "model": "m", "status": "complete", "started": NOON, "latency_s": 1.0}
            call.trail.attempts.append(Attempt(number=number, cost_usd=usd, **attempt))
        return call

    async def spend(self, *costs: str | None, **more) -> None:
        """A call as it comes from the ledger: booked, then looked at."""
        call = self.call(*costs, **more)
        self.books.spent(call.started_at, str(sum(Decimal(cost) for cost in costs if cost)))
        if self.alerts.are_heard(call):
            await self.alerts.settled(call, DONE)

    @property
    def kinds(self) -> list[str]:
        return [alert.kind for alert in self.heard]


def test_a_dear_call_is_said_each_time() -> None:
    async def main() -> None:
        setting = Setting(call_usd=Decimal(1))
        await setting.spend("1")
        assert setting.heard == []  # not above
        await setting.spend("0.6", "0.400000001")
        await setting.spend("1.5", request_id="r2")
        assert [(a.request_id, a.spent, a.threshold) for a in setting.heard] == [
            ("r1", Decimal("1.000000001"), Decimal(1)),
            ("r2", Decimal("1.5"), Decimal(1)),
        ]
        assert setting.heard[1].message == "this call cost $1.50, more than $1"
        assert setting.books.looks == 0

    asyncio.run(main())


def test_what_of_a_call_has_a_price_counts() -> None:
    async def main() -> None:
        setting = Setting(call_usd=Decimal(1))
        await setting.spend("1.5", None)
        assert setting.kinds == ["call"]

    asyncio.run(main())


def test_an_hour_and_a_day_are_said_once_each_and_anew_in_the_next() -> None:
    async def main() -> None:
        setting = Setting(hour_usd=Decimal(5), day_usd=Decimal(15))
        for minute in range(12 * 60):  # 0.25 USD every two minutes: 7.50 an hour
            await setting.clock.advance(60)
            if minute % 2:
                await setting.spend("0.25")
        found = Counter(setting.kinds)
        assert found == {"hour": 12, "day": 1}
        assert setting.heard[0].spent == Decimal("5.25")
        assert setting.heard[0].message == "$5.25 spent in the hour since 12:00 UTC, more than $5"
        day = next(alert for alert in setting.heard if alert.kind == "day")
        assert (day.spent, day.threshold) == (Decimal("15.25"), Decimal(15))

    asyncio.run(main())


def test_days_begin_in_the_stated_zone() -> None:
    async def main() -> None:
        setting = Setting(zone=ZoneInfo("Asia/Tokyo"), day_usd=Decimal(1))
        setting.books.spent(NOON - 21.5 * 3600, "0.9")  # 14:30 UTC of the day before, 23:30 in Tokyo
        setting.books.spent(NOON - 20.5 * 3600, "0.5")  # 15:30 UTC, half past midnight there
        await setting.spend("0.5")
        assert setting.heard == []
        await setting.spend("0.01")
        assert [alert.message for alert in setting.heard] == [
            "$1.01 spent in the day since 00:00 JST, more than $1",
        ]

    asyncio.run(main())


def test_what_other_kernels_spend_counts() -> None:
    async def main() -> None:
        setting = Setting(hour_usd=Decimal(5))
        await setting.spend("0.01")
        setting.books.spent(NOON, "10")
        await setting.spend("0.01")
        assert setting.heard == []  # looked at less than a second ago
        await setting.clock.advance(1.1)
        await setting.spend("0.01")
        assert [(a.kind, a.spent) for a in setting.heard] == [("hour", Decimal("10.03"))]

    asyncio.run(main())


def test_the_ledger_is_asked_at_most_once_a_second_where_nothing_is_near() -> None:
    async def main() -> None:
        setting = Setting(hour_usd=Decimal(1000), day_usd=Decimal(1000), jump=5.0)
        for _ in range(100):
            await setting.spend("0.001")
            await setting.clock.advance(0.05)
        assert setting.books.looks <= 6
        for _ in range(100):
            await setting.spend("0")
            await setting.spend(None)
        assert setting.books.looks <= 6

    asyncio.run(main())


def test_between_two_looks_this_processes_own_calls_are_seen() -> None:
    async def main() -> None:
        setting = Setting(hour_usd=Decimal(5))
        for _ in range(11):
            await setting.spend("0.5")  # all within one moment
        assert [(a.kind, a.spent) for a in setting.heard] == [("hour", Decimal("5.5"))]
        assert setting.books.looks == 2

    asyncio.run(main())


def test_a_call_counted_twice_raises_no_false_alarm() -> None:
    async def main() -> None:
        setting = Setting(hour_usd=Decimal(5))
        first, second = setting.call("2"), setting.call("2.5")
        for cost in ("2", "2.5"):
            setting.books.spent(NOON, cost)
        await setting.alerts.settled(first, DONE)  # sees both
        await setting.alerts.settled(second, DONE)  # adds its own once more: 7 are suspected, 4.50 were spent
        assert setting.heard == []
        assert setting.books.looks == 2

    asyncio.run(main())


def test_a_call_that_ends_during_a_look_is_not_missed() -> None:
    async def main() -> None:
        setting = Setting(hour_usd=Decimal(5))
        late = setting.call("5.01", request_id="late")
        loop = asyncio.get_running_loop()

        def meanwhile() -> None:
            setting.books.meanwhile = None
            setting.books.spent(NOON, "5.01")
            asyncio.run_coroutine_threadsafe(setting.alerts.settled(late, DONE), loop).result(10)

        setting.books.meanwhile = meanwhile
        await setting.spend("0.01")
        assert [(a.kind, a.spent) for a in setting.heard] == [("hour", Decimal("5.02"))]

    asyncio.run(main())


def test_a_crowd_is_told_once() -> None:
    async def main() -> None:
        setting = Setting(hour_usd=Decimal(5), day_usd=Decimal(5))
        await asyncio.gather(*(setting.spend("0.1") for _ in range(200)))
        assert sorted(setting.kinds) == ["day", "hour"]
        assert setting.books.looks < 10

    asyncio.run(main())


# -- jumps -------------------------------------------------------------------------------------------------------------


def with_usual(setting: Setting, *amounts: str) -> None:
    for hours, usd in enumerate(amounts, 2):
        setting.books.spent(NOON - hours * 3600 + 1200, usd)


def test_an_hour_unlike_those_before_is_a_jump() -> None:
    async def main() -> None:
        setting = Setting(jump=5.0)
        with_usual(setting, "0.2", "0.1", "0.3")  # 0.20 in the mean
        await setting.spend("1")
        assert setting.heard == []  # five times is not more than five times
        await setting.spend("0.000000001")
        (alert,) = setting.heard
        assert (alert.kind, alert.spent, alert.threshold) == ("jump", Decimal("1.000000001"), Decimal(1))
        assert "5.0 times the usual $0.2000 (the mean of 3 hours with spending in the last 7 days)" in alert.message
        await setting.spend("5")
        assert len(setting.heard) == 1

    asyncio.run(main())


@pytest.mark.parametrize("usual", [(), ("0.001",), ("0.001", "0.001")])
def test_without_three_hours_nothing_is_usual(usual) -> None:
    async def main() -> None:
        setting = Setting(jump=2.0)
        with_usual(setting, *usual)
        await setting.spend("20")
        assert setting.heard == []

    asyncio.run(main())


def test_small_sums_do_not_jump() -> None:
    async def main() -> None:
        setting = Setting(jump=2.0)
        with_usual(setting, "0.001", "0.001", "0.001")
        await setting.spend("0.499999999")
        assert setting.heard == []
        await setting.spend("0.000000001")
        assert setting.kinds == ["jump"]

    asyncio.run(main())


def test_only_seven_days_are_usual() -> None:
    async def main() -> None:
        setting = Setting(jump=2.0)
        for day in (8, 9, 10):
            setting.books.spent(NOON - day * 86_400, "0.01")
        setting.books.spent(NOON - 7 * 86_400, "0.01")  # the first hour that counts
        setting.books.spent(NOON - 86_400, "0.01")
        await setting.spend("2")
        assert setting.heard == []
        setting.books.spent(NOON - 60, "0.01")
        await setting.clock.advance(2)
        await setting.spend("2")
        assert setting.kinds == ["jump"]

    asyncio.run(main())


# -- who hears ---------------------------------------------------------------------------------------------------------


def test_the_calls_own_listener_hears_it() -> None:
    async def main() -> None:
        setting = Setting(call_usd=Decimal(1))
        events: list[object] = []
        await setting.spend("2", events=events)
        assert events == setting.heard
        assert isinstance(events[0], AlertRaised)

    asyncio.run(main())


def test_where_nobody_listens_nothing_is_looked_at() -> None:
    setting = Setting(hour_usd=Decimal(1))
    setting.alerts._on_alert = None
    assert not setting.alerts.are_heard(setting.call("2"))
    assert setting.alerts.are_heard(setting.call("2", events=[]))


def test_a_callback_that_fails_is_logged(caplog) -> None:
    async def main() -> None:
        setting = Setting(call_usd=Decimal(1), hour_usd=Decimal(1))

        def fail(alert: AlertRaised) -> None:
            raise ZeroDivisionError

        setting.alerts._on_alert = fail
        events: list[object] = []
        await setting.spend("2", events=events)
        assert [event.kind for event in events] == ["call", "hour"]

    with caplog.at_level(logging.ERROR, "llmkit"):
        asyncio.run(main())
    assert [record.message for record in caplog.records] == ["on_alert failed; the call goes on"] * 2


def test_a_ledger_that_cannot_be_read_is_said_and_left_alone_for_a_while(caplog) -> None:
    async def main() -> None:
        setting = Setting(hour_usd=Decimal(1))
        setting.books.broken = StoreError("the ledger is gone")
        await setting.spend("2")
        await setting.spend("2")
        assert (setting.heard, setting.books.looks) == ([], 1)
        setting.books.broken = None
        await setting.clock.advance(61)
        await setting.spend("0.5")
        assert [(a.kind, a.spent) for a in setting.heard] == [("hour", Decimal("4.5"))]

    asyncio.run(main())
    assert [record.message for record in caplog.records] == ["alerts cannot see what was spent: the ledger is gone"]


def test_any_other_failure_leaves_it_able_to_look_again() -> None:
    async def main() -> None:
        setting = Setting(hour_usd=Decimal(1))
        setting.books.broken = ZeroDivisionError()
        with pytest.raises(ZeroDivisionError):
            await setting.spend("2")
        setting.books.broken = None
        await setting.clock.advance(61)
        await setting.spend("2")
        assert setting.kinds == ["hour"]

    asyncio.run(main())


# -- with a client -----------------------------------------------------------------------------------------------------


def answering(*contents):
    """A transport that answers with these texts in turn, 1000 tokens each way, or breaks off where one is None."""
    said = iter(contents)

    def answer(request):
        content = next(said)
        if content is None:
            return httpx.Response(400, json={"error": {"message": "no"}})
        usage = {"prompt_tokens": 1000, "completion_tokens": 1000}
        choice = {"index": 0, "message": {"content": content}, "finish_reason": "stop"}
        return httpx.Response(200, json={"model": "tiny-1", "choices": [choice], "usage": usage})

    return httpx.MockTransport(answer)


def client_of(path, transport, **settings):
    price = {"input": 100, "output": 100}  # 0.20 USD a call
    tiny = {"provider": "vllm", "model": "tiny", "base_url": "http://127.0.0.1:9/v1", "price": price}
    budget = {"request": {"usd": "off"}, "session": {"usd": "off"}, "day": {"usd": "off"}}
    return llmkit.AsyncClient(
        model="tiny",
        models={"tiny": tiny},
        budget=budget,
        state={"url": f"sqlite://{path}"},
        transport=transport,
        **settings,
    )


def test_a_client_tells_what_it_and_others_spend(tmp_path) -> None:
    async def main() -> None:
        heard: list[AlertRaised] = []
        alerts = {"call_usd": 0.1, "hour_usd": 0.5}
        path = tmp_path / "ledger.sqlite3"
        async with client_of(path, answering("a", "b"), on_alert=heard.append, alerts=alerts) as client:
            await client.complete("one")
            async with client_of(path, answering("c", "d")) as other:
                await other.complete("two")
                await other.complete("three")
            client._alerts._sums = None  # a second later
            await client.complete("four", user="ana")
        assert [(alert.kind, alert.spent) for alert in heard] == [
            ("call", Decimal("0.2")),
            ("call", Decimal("0.2")),
            ("hour", Decimal("0.8")),
        ]

    asyncio.run(main())


def test_alerts_follow_the_time_zone_of_the_budgets(tmp_path) -> None:
    async def main() -> None:
        heard: list[AlertRaised] = []
        alerts, clock = {"call_usd": "off", "day_usd": 0.1}, FakeClock(start=NOON)
        path = tmp_path / "l.sqlite3"
        async with client_of(path, answering("a", "b"), on_alert=heard.append, alerts=alerts, clock=clock) as client:
            client.set_budgets(timezone="Asia/Kolkata")
            await client.complete("one")
        assert "IST" in heard[0].message

    asyncio.run(main())


def test_a_hit_and_a_refused_call_are_no_spending(tmp_path) -> None:
    async def main() -> None:
        heard: list[AlertRaised] = []
        transport = answering("a", None)
        async with client_of(
            tmp_path / "l.sqlite3", transport, on_alert=heard.append, alerts={"call_usd": 0.1}
        ) as client:
            await client.complete("one")
            reply = await client.complete("one")
            assert reply.source == "cache"
            with pytest.raises(llmkit.InvalidRequest):
                await client.complete("two")
        assert [alert.kind for alert in heard] == ["call"]

    asyncio.run(main())


def test_the_sync_client_takes_a_callback_as_well(tmp_path) -> None:
    heard: list[AlertRaised] = []
    with llmkit.Client(model="simulator", state={"url": "memory"}, on_alert=heard.append) as client:
        client.complete("hi")
    assert heard == []
