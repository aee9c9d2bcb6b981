"""Spending by model, user, tag and time."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pandas as pd
import pytest

import llmkit
from llmkit import spending
from llmkit.client import AsyncClient
from llmkit.errors import ConfigError
from llmkit.spending import KEYS, MEASURES, asked, keys, moment, summary
from llmkit.state.store import AttemptBegun, AttemptEnded, CallBegun, CallEnded
from llmkit.testing import FakeClock

NOW = datetime(2026, 11, 21, 12, 0, tzinfo=UTC).timestamp()
DAY = 86_400


class Books:
    """A client whose ledger holds made-up calls."""

    def __init__(self, url: str, **settings) -> None:
        self.client = AsyncClient(model="simulator", state={"url": url}, clock=FakeClock(NOW), **settings)
        self._ids = iter(range(10**6))

    def call(self, at, *attempts, user=None, saved=None, **tags) -> None:
        """A call; of each attempt (model, nano-dollars) are given, and further fields."""
        store, key = self.client.ledger._ready(), f"{next(self._ids):06d}"
        changes = [CallBegun(key, at, user, json.dumps(tags, sort_keys=True), "smart", "o:1:a")]
        for number, (model, nanos, *more) in enumerate(attempts, 1):
            changes.append(AttemptBegun(key, number, at, "openai", model, None))
            changes.append(ended(key, number, nanos, **dict(*more)))
        changes.append(finished(key, len(attempts), saved, "cache" if saved else "provider"))
        waiting = store.commit(changes)
        if waiting is not None:
            waiting.result(10)

    def spend(self, *by, **more):
        return self.client.spend(*by, **more)


def ended(key, number, nanos, **more):
    empty = dict.fromkeys(AttemptEnded._fields)
    given = {"input_tokens": 10, "cached_input_tokens": 4, "output_tokens": 3, "reasoning_tokens": 1}
    fields = {"status": "complete", **given, "cost_nanos": nanos, "latency_s": 1.0, "maybe_billed": 0, **more}
    return AttemptEnded(**{**empty, **fields, "request_id": key, "number": number})


def finished(key, attempts, saved, source):
    empty = dict.fromkeys(CallEnded._fields)
    fields = {"status": "complete", "attempts": attempts, "retries": 0, "saved_nanos": saved, "source": source}
    return CallEnded(**{**empty, **fields, "response_model": "mini", "provider": "openai", "request_id": key})


@pytest.fixture(params=["sqlite", "memory"])
def books(request, tmp_path):
    return Books("memory" if request.param == "memory" else f"sqlite://{tmp_path}/ledger.sqlite3")


def rows(frame, *columns):
    return [
        tuple(None if pd.isna(value) else value for value in row) for row in frame[[*columns]].itertuples(index=False)
    ]


def test_by_model(books) -> None:
    books.call(NOW, ("gpt", 2_000_000_000))
    books.call(NOW, ("mini", 5), ("gpt", 500_000_001))
    books.call(NOW - 40 * DAY, ("mini", 7, {"maybe_billed": 1}))
    books.call(NOW, ("other", None))
    frame = books.spend()
    assert list(frame.columns) == ["model", *MEASURES]
    assert rows(frame, "model", "calls", "attempts", "cost_usd", "unpriced", "maybe_billed") == [
        ("openai:gpt", 2, 2, 2.500000001, 0, 0),
        ("openai:mini", 1, 2, 12e-9, 0, 1),
        ("openai:other", 1, 1, 0.0, 1, 0),
    ]
    assert rows(frame, "input_tokens", "cached_input_tokens", "output_tokens", "reasoning_tokens")[0] == (20, 8, 6, 2)


def test_the_dtypes_are_right_even_of_an_empty_ledger(books) -> None:
    for key in KEYS:
        frame = books.spend(key)
        kinds = {name: str(kind) for name, kind in frame.dtypes.items()}
        assert len(frame) == 0
        assert kinds == {key: "string" if key in {"model", "user", "tag"} else "datetime64[s, UTC]", **MEASURES}
    books.call(NOW, ("gpt", 1))
    for key in KEYS:
        assert {name: str(kind) for name, kind in books.spend(key).dtypes.items()} == {
            name: str(kind) for name, kind in books.spend(key, since=NOW + DAY).dtypes.items()
        }


def test_by_user_nobody_is_a_user_as_well(books) -> None:
    books.call(NOW, ("gpt", 3), user="ana")
    books.call(NOW, ("gpt", 5))
    assert rows(books.spend("user"), "user", "cost_usd") == [(None, 5e-9), ("ana", 3e-9)]


def test_by_tag_a_call_counts_for_each_of_its_tags(books) -> None:
    books.call(NOW, ("gpt", 3), app="docs", team="a=b")
    books.call(NOW, ("gpt", 5), app="docs")
    books.call(NOW, ("gpt", 7))
    assert rows(books.spend("tag"), "tag", "calls", "cost_usd") == [
        ("app=docs", 2, 8e-9),
        (None, 1, 7e-9),
        ("team=a=b", 1, 3e-9),
    ]


def test_savings_of_the_cache_are_counted(books) -> None:
    books.call(NOW, ("mini", 100))
    books.call(NOW, saved=100)
    assert rows(books.spend(), "model", "calls", "attempts", "cost_usd", "saved_usd") == [
        ("openai:mini", 2, 1, 100e-9, 100e-9)
    ]


def local(frame, key):
    return [each.isoformat() for each in frame[key]]


def test_by_day_from_old_to_new_in_the_stated_zone(tmp_path) -> None:
    books = Books(f"sqlite://{tmp_path}/ledger.sqlite3", budget={"timezone": "Europe/Berlin"})
    for day in (24, 25, 26):  # the clocks go back on the 25th
        for hour in range(24):
            books.call(datetime(2026, 10, day, hour, 30, tzinfo=UTC).timestamp(), ("gpt", 1))
    frame = books.spend("day")
    assert local(frame, "day") == [
        "2026-10-24T00:00:00+02:00",
        "2026-10-25T00:00:00+02:00",
        "2026-10-26T00:00:00+01:00",
        "2026-10-27T00:00:00+01:00",
    ]
    assert list(frame["calls"]) == [22, 25, 24, 1]
    hours = books.spend("hour")
    assert (len(hours), set(hours["calls"])) == (72, {1})
    assert [text for text in local(hours, "hour") if text.startswith("2026-10-25T02")] == [
        "2026-10-25T02:00:00+02:00",
        "2026-10-25T02:00:00+01:00",
    ]


def test_weeks_begin_on_monday_and_months_on_the_first(books) -> None:
    for day in (1, 2, 30):
        books.call(datetime(2026, 11, day, 5, tzinfo=UTC).timestamp() - 9 * DAY, ("gpt", 1))
    assert local(books.spend("week"), "week") == ["2026-10-19T00:00:00+00:00", "2026-11-16T00:00:00+00:00"]
    assert local(books.spend("month"), "month") == ["2026-10-01T00:00:00+00:00", "2026-11-01T00:00:00+00:00"]
    both = books.spend(["month", "week"])
    assert rows(both, "calls") == [(2,), (1,)]
    assert local(both, "week") == ["2026-10-19T00:00:00+00:00", "2026-11-16T00:00:00+00:00"]


def test_half_hours_of_zones_are_kept_apart(tmp_path) -> None:
    books = Books(f"sqlite://{tmp_path}/ledger.sqlite3", budget={"timezone": "Asia/Kolkata"})
    books.call(NOW + 29 * 60, ("gpt", 1))
    books.call(NOW + 31 * 60, ("gpt", 1))
    assert local(books.spend("hour", until=NOW + DAY), "hour") == [
        "2026-11-21T17:00:00+05:30",
        "2026-11-21T18:00:00+05:30",
    ]


def test_by_several(books) -> None:
    books.call(NOW, ("gpt", 1), user="ana", app="docs")
    books.call(NOW, ("gpt", 2), user="bo", app="docs")
    books.call(NOW - DAY, ("mini", 9), user="bo", app="docs", team="x")
    frame = books.spend(["day", "user", "tag", "model"])
    assert list(frame.columns) == ["day", "user", "tag", "model", *MEASURES]
    assert rows(frame, "user", "tag", "model", "cost_usd") == [
        ("bo", "app=docs", "openai:mini", 9e-9),
        ("bo", "team=x", "openai:mini", 9e-9),
        ("bo", "app=docs", "openai:gpt", 2e-9),
        ("ana", "app=docs", "openai:gpt", 1e-9),
    ]


def test_since_and_until(books) -> None:
    for days in range(10):
        books.call(NOW - days * DAY - 1, ("gpt", 1))
    calls = {since: int(books.spend(since=since)["calls"].sum()) for since in ("90s", "1h", "1d", "7d", "1w", None)}
    assert calls == {"90s": 1, "1h": 1, "1d": 1, "7d": 7, "1w": 7, None: 10}
    at = datetime.fromtimestamp(NOW - 3 * DAY, ZoneInfo("Asia/Tokyo"))
    assert int(books.spend(since=at)["calls"].sum()) == 3
    assert int(books.spend(until=at)["calls"].sum()) == 7
    assert int(books.spend("day", since=NOW - 3 * DAY, until="1d")["calls"].sum()) == 2
    assert len(books.spend("day", since="3d", until="5d")) == 0


def test_a_long_time_by_the_hour(books) -> None:
    books.call(NOW - 3 * 365 * DAY, ("gpt", 1))
    books.call(NOW, ("gpt", 1))
    assert len(books.spend("hour")) == 2


@pytest.mark.parametrize(
    "by, words",
    [
        ("modle", "did you mean model"),
        ([], "by is one of"),
        (["day", "day"], "each once"),
        (3, "summed by 3; there are model"),
    ],
)
def test_a_key_that_is_none(books, by, words) -> None:
    with pytest.raises(ConfigError, match=words):
        books.spend(by)


@pytest.mark.parametrize("since", ["yesterday", "7", "d", "", True, float("nan"), object(), "-1d", "off"])
def test_a_time_that_is_none(books, since) -> None:
    with pytest.raises(ConfigError, match="since is a time"):
        books.spend(since=since)
    with pytest.raises(ConfigError, match="until is a time"):
        books.spend(until=since)


def test_moments() -> None:
    assert moment("2h", 10_000.0) == 2800.0
    assert moment(5, 0.0) == 5.0
    assert moment(datetime(1970, 1, 2, tzinfo=UTC), 0.0) == DAY
    assert moment(datetime(2026, 1, 1, 12), 0.0) == datetime(2026, 1, 1, 12).astimezone().timestamp()


def test_the_sync_client_has_it_as_well() -> None:
    with llmkit.Client(model="simulator", state={"url": "memory"}) as client:
        client.complete("hi", user="ana")
        assert rows(client.spend(["user", "model"], since="1h"), "user", "model", "calls", "cost_usd") == [
            ("ana", "simulator:simulator", 1, 0.0)
        ]


@pytest.mark.parametrize(
    "words, meant",
    [
        ([], ("day", "30d")),
        (["model"], ("model", "30d")),
        (["hour"], ("hour", "1d")),
        (["2w"], ("day", "2w")),
        (["tag", "12h"], ("tag", "12h")),
    ],
)
def test_a_report_in_words(words, meant) -> None:
    assert asked(words) == meant


@pytest.mark.parametrize("words", [["day", "week"], ["7d", "8d"], ["modle"], ["7x"]])
def test_a_report_of_something_else(words) -> None:
    with pytest.raises(ConfigError):
        asked(words)


def test_a_summary(books) -> None:
    assert summary(books.spend("day"), "day", "30d") == "no call in the last 30d"
    books.call(NOW, ("gpt", 1_230_000_000), app="docs")
    assert summary(books.spend("day"), "day", "30d") == "$1.23 for 1 call, by day, last 30d"
    books.call(NOW, saved=10_000_000)
    books.call(NOW, ("other", None))
    assert summary(books.spend("day"), "day", "30d") == (
        "$1.23 for 3 calls, by day, last 30d; $0.0100 saved by cached and shared answers; "
        "the price of 1 attempt is unknown"
    )
    assert summary(books.spend("tag"), "tag", "30d") == "by tag, last 30d; a call counts for each of its tags"


def test_a_report_is_brief(books) -> None:
    books.call(NOW, ("gpt", 5_000_000), user="ana")
    books.call(NOW - DAY, ("other", None, {"cached_input_tokens": 0, "reasoning_tokens": 0}))
    shown = spending.brief(books.spend(["day", "user"]))
    assert list(shown["day"]) == ["2026-11-20", "2026-11-21"]
    assert list(shown.columns)[2:] == [name for name in MEASURES if name != "maybe_billed"]
    assert spending.table(shown).splitlines()[1].split()[:4] == ["2026-11-20", "-", "1", "1"]
    assert list(spending.brief(books.spend("hour"))["hour"]) == ["2026-11-20 12:00 UTC", "2026-11-21 12:00 UTC"]
    assert list(spending.brief(books.spend("month"))["month"]) == ["2026-11"]
    assert len(spending.brief(books.spend("day", since=NOW + DAY))) == 0


def test_every_key_can_be_asked_for() -> None:
    assert [keys(key) for key in KEYS] == [(key,) for key in KEYS]
    assert set(spending.__all__) <= set(dir(spending))
