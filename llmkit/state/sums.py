"""The queries for sums of spending in SQLite.

There are sums by quarters of an hour, endpoint, user and tags, and others by hours alone. Where nothing but time is asked
for, whole hours are taken from the latter, and only what is left at the edges from the former.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

from llmkit.state.store import QUARTER_S, SPEND_KEYS, SPEND_SUMS

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["check_columns", "quarter_of", "summing"]

Range = tuple[int, int, int]  # when its window begins, its first quarter or hour, and the first after it

QUARTERS = 4  # of an hour
MOST_WINDOWS = 20_000
_EVER = 2**40  # quarters


def quarter_of(moment: float | None, otherwise: int) -> int:
    """The quarter of an hour that ``moment`` (epoch seconds) lies in; ``otherwise`` for None and what is no time."""
    if moment is None or not math.isfinite(moment):
        return otherwise
    return max(-_EVER, min(_EVER, int(moment // QUARTER_S)))


def check_columns(by: Sequence[str], sums: Sequence[str], windows: Sequence[float] | None) -> None:
    """That they are what can be asked for.

    Raises:
        ValueError: a column that is none, windows that do not ascend, or too many of them.
    """
    if not set(by) <= set(SPEND_KEYS) or not set(sums) <= set(SPEND_SUMS) or not sums:
        raise ValueError(f"spending has the columns {', '.join((*SPEND_KEYS, *SPEND_SUMS))}")
    if len(windows or ()) > MOST_WINDOWS or any(a > b for a, b in itertools.pairwise(windows or ())):
        raise ValueError(f"windows are at most {MOST_WINDOWS} times, each later than the one before")


def summing(
    by: Sequence[str],
    sums: Sequence[str],
    windows: Sequence[float] | None,
    since: float | None,
    until: float | None,
) -> str:
    """A query for ``sums`` by the beginnings of ``windows``, where they are not None, and ``by``.

    Raises:
        ValueError: see `check_columns`.
    """
    check_columns(by, sums, windows)
    first, last = quarter_of(since, -_EVER), quarter_of(until, _EVER)
    if windows is not None:
        return _by_time(_ranges(windows, first, last), by, sums)
    if not by:
        return f"SELECT {_list(sums)} FROM ({_by_time([(0, first, last)], by, sums)})"  # noqa: S608 - all names are our own
    columns = ", ".join(_selected(name) for name in by)
    where = f"WHERE quarter >= {first} AND quarter < {last} GROUP BY {_list(by)}"
    return f"SELECT {columns}, {_summed(sums)} FROM spend {where}"  # noqa: S608


def _ranges(windows: Sequence[float], first: int, last: int) -> list[Range]:
    edges = [quarter_of(moment, 0) for moment in windows]
    pairs = itertools.pairwise(edges)
    return [(a * QUARTER_S, max(a, first), min(b, last)) for a, b in pairs if max(a, first) < min(b, last)]


def _by_time(ranges: list[Range], by: Sequence[str], sums: Sequence[str]) -> str:
    hours, quarters = _split(ranges) if not by else ([], ranges)
    names, parts = [], []
    for table, column, each in (("spend_hours", "hour", hours), ("spend", "quarter", quarters)):
        if each:
            names.append(f"of_{table} (beginning, first, after) AS (VALUES {', '.join(map(str, each))})")
            parts.append(
                f"SELECT beginning, {_list((*by, *sums))} FROM of_{table} CROSS JOIN {table} "  # noqa: S608
                f"ON {column} >= first AND {column} < after"
            )
    if not parts:
        return f"SELECT {_list((*by, *sums))} FROM spend WHERE 0"  # noqa: S608
    columns = ", ".join(("beginning", *(_selected(name) for name in by), _summed(sums)))
    return (
        f"WITH {', '.join(names)} SELECT {columns} FROM ({' UNION ALL '.join(parts)}) "  # noqa: S608
        f"GROUP BY {_list(('beginning', *by))}"
    )


def _split(ranges: list[Range]) -> tuple[list[Range], list[Range]]:
    """The whole hours of each range, and the quarters before and after them."""
    hours, quarters = [], []
    for beginning, first, after in ranges:
        first_hour, after_hour = -(-first // QUARTERS), after // QUARTERS
        if first_hour >= after_hour:
            quarters.append((beginning, first, after))
            continue
        hours.append((beginning, first_hour, after_hour))
        edges = (first, first_hour * QUARTERS), (after_hour * QUARTERS, after)
        quarters += [(beginning, a, b) for a, b in edges if a < b]
    return hours, quarters


def _list(names: Sequence[str]) -> str:
    return ", ".join(names)


def _selected(name: str) -> str:
    return f"quarter * {QUARTER_S}" if name == "quarter" else name


def _summed(sums: Sequence[str]) -> str:
    return ", ".join(f"sum({name}) AS {name}" for name in sums)
