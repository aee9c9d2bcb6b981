"""Where hours, days, weeks and months begin and end, in a time zone."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import tzinfo

__all__ = ["CALENDAR", "window", "windows"]

CALENDAR = ("hour", "day", "week", "month")

_HOUR_S = 3600.0


def window(name: str, at: float, zone: tzinfo) -> tuple[float, float]:
    """The beginning and the end of the window (one of `CALENDAR`) that ``at`` lies in, in epoch seconds.

    A day begins at midnight or, where the clocks leave that out, at the first time that there is; it may have 23 or 25
    hours. A week begins on Monday. An hour is always 3600 seconds: where the clocks go back, two of them have one name.
    """
    local = datetime.fromtimestamp(at, zone)
    if name == "hour":
        # By the minutes on the wall, so that it fits zones half an hour away, and by the clock that does not jump.
        begin = at - (local.minute * 60 + local.second + local.microsecond / 1e6)
        return round(begin), round(begin) + _HOUR_S
    first = local.replace(hour=0, minute=0, second=0, microsecond=0, tzinfo=None)
    if name == "day":
        after = first + timedelta(days=1)
    elif name == "week":
        first -= timedelta(days=first.weekday())
        after = first + timedelta(days=7)
    elif name == "month":
        first = first.replace(day=1)
        after = first.replace(year=first.year + first.month // 12, month=first.month % 12 + 1)
    else:
        raise ValueError(f"{name} is no window of the calendar")
    return _begin(first, zone), _begin(after, zone)


def windows(name: str, since: float, until: float, zone: tzinfo) -> Iterator[float]:
    """The beginnings of all windows from that of ``since`` on, up to and with the first at or after ``until``."""
    begin, end = window(name, since, zone)
    yield begin
    while begin < until:
        begin, end = end, window(name, end, zone)[1]
        yield begin


def _begin(midnight: datetime, zone: tzinfo) -> float:
    # Where the clocks leave midnight out, this is when they jump; where they show it twice, the first time.
    return midnight.replace(tzinfo=zone).timestamp()
