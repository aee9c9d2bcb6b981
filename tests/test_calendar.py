"""Windows of the calendar, where clocks are changed."""

from __future__ import annotations

from datetime import datetime
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest

from llmkit.calendar import CALENDAR, window, windows

UTC = ZoneInfo("UTC")
BERLIN = ZoneInfo("Europe/Berlin")


def shown(name, text, zone):
    """The window that a local time lies in, as local times."""
    at = datetime.fromisoformat(text)
    at = (at if at.tzinfo else at.replace(tzinfo=zone)).timestamp()
    return tuple(datetime.fromtimestamp(each, zone).isoformat(timespec="minutes") for each in window(name, at, zone))


@pytest.mark.parametrize(
    "name, begin, end",
    [
        ("hour", "2026-11-21T14:00+00:00", "2026-11-21T15:00+00:00"),
        ("day", "2026-11-21T00:00+00:00", "2026-11-22T00:00+00:00"),
        ("week", "2026-11-16T00:00+00:00", "2026-11-23T00:00+00:00"),
        ("month", "2026-11-01T00:00+00:00", "2026-12-01T00:00+00:00"),
    ],
)
def test_windows_of_an_ordinary_day(name, begin, end) -> None:
    assert shown(name, "2026-11-21T14:06:37.5", UTC) == (begin, end)


def test_the_last_month_of_a_year() -> None:
    assert shown("month", "2026-12-31T23:59", UTC) == ("2026-12-01T00:00+00:00", "2027-01-01T00:00+00:00")


def test_days_are_those_of_the_zone() -> None:
    assert shown("day", "2026-11-20T23:30+00:00", BERLIN)[0] == "2026-11-21T00:00+01:00"


def test_days_on_which_clocks_change_have_23_and_25_hours() -> None:
    for text, hours in (("2026-03-29T12:00", 23), ("2026-10-25T12:00", 25)):
        begin, end = window("day", datetime.fromisoformat(text).replace(tzinfo=BERLIN).timestamp(), BERLIN)
        assert end - begin == hours * 3600


def test_two_hours_of_one_name_are_two() -> None:
    first, second = shown("hour", "2026-10-25T02:10+02:00", BERLIN), shown("hour", "2026-10-25T02:10+01:00", BERLIN)
    assert first == ("2026-10-25T02:00+02:00", "2026-10-25T02:00+01:00")
    assert second == ("2026-10-25T02:00+01:00", "2026-10-25T03:00+01:00")


def test_a_day_without_a_midnight_begins_where_the_clocks_land() -> None:
    zone = ZoneInfo("America/Sao_Paulo")
    assert shown("day", "2018-11-04T12:00", zone) == ("2018-11-04T01:00-02:00", "2018-11-05T00:00-02:00")


def test_a_day_that_was_left_out_is_no_window() -> None:
    zone = ZoneInfo("Pacific/Apia")
    assert shown("day", "2011-12-29T12:00", zone) == ("2011-12-29T00:00-10:00", "2011-12-31T00:00+14:00")


def test_an_hour_in_a_zone_half_an_hour_away() -> None:
    assert shown("hour", "2026-11-21T10:45+05:30", ZoneInfo("Asia/Kolkata"))[0] == "2026-11-21T10:00+05:30"


@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin", "America/Sao_Paulo", "Pacific/Apia", "Asia/Kathmandu"])
@pytest.mark.parametrize("name", CALENDAR[1:])
def test_windows_follow_each_other_without_a_gap(zone, name) -> None:
    zone = ZoneInfo(zone)
    since = datetime(2010, 1, 1, tzinfo=UTC).timestamp()
    found = list(windows(name, since, since + 9 * 366 * 86_400, zone))
    assert found[0] <= since
    assert len(found) > 100
    for begin, end in pairwise(found):
        assert window(name, begin, zone) == window(name, end - 1, zone) == (begin, end)
        assert begin % 900 == 0


def test_windows_end_behind_the_last_moment() -> None:
    assert list(windows("hour", 3600.0, 3600.0, UTC)) == [3600.0]
    assert list(windows("hour", 3601.0, 7201.0, UTC)) == [3600.0, 7200.0, 10_800.0]


def test_other_names_are_no_windows() -> None:
    with pytest.raises(ValueError, match="session is no window"):
        window("session", 0.0, UTC)
