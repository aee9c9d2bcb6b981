"""What calls cost, by whatever is asked: the ledger's sums as a DataFrame.

The ledger keeps its sums by quarters of an hour, so a ``since`` or ``until`` is as fine as that, and the hours and days
of every time zone can be made of them.
"""

from __future__ import annotations

import json
import math
from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from llmkit.calendar import CALENDAR, window, windows
from llmkit.errors import ConfigError
from llmkit.money import money
from llmkit.redaction import tidy
from llmkit.settings import Rule, nearest
from llmkit.state.store import QUARTER_S

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import tzinfo

    import pandas as pd

    from llmkit.ledger import Ledger

__all__ = ["KEYS", "MEASURES", "asked", "brief", "frame", "keys", "moment", "summary", "table"]

KEYS = ("model", "user", "tag", *CALENDAR)

MEASURES = {
    "calls": "int64",
    "attempts": "int64",
    "input_tokens": "int64",
    "cached_input_tokens": "int64",
    "output_tokens": "int64",
    "reasoning_tokens": "int64",
    "cost_usd": "float64",
    "saved_usd": "float64",
    "unpriced": "int64",
    "maybe_billed": "int64",
}
_NANOS = {"cost_usd": "cost_nanos", "saved_usd": "saved_nanos"}
_SUMMED = tuple(_NANOS.get(name, name) for name in MEASURES)
_COLUMNS = {"model": "model", "user": "user", "tag": "tags"}
_RARE = ("cached_input_tokens", "reasoning_tokens", "unpriced", "maybe_billed")
_TIMES = {"hour": "%Y-%m-%d %H:%M %Z", "month": "%Y-%m"}
_AT_ONCE = 10_000  # windows that are asked for together
_AGO = Rule("duration")


def keys(by: str | Sequence[str]) -> tuple[str, ...]:
    """What to sum by, checked.

    Raises:
        ConfigError: a key that is none, naming the nearest.
    """
    wanted = tuple(by) if isinstance(by, list | tuple) else (by,)
    for key in wanted:
        if key not in KEYS:
            near = nearest(key, KEYS) if isinstance(key, str) else None
            hint = f"; did you mean {near}?" if near else f"; there are {', '.join(KEYS)}"
            raise ConfigError(f"spending cannot be summed by {key!r:.60}{hint}")
    if not wanted or len(set(wanted)) < len(wanted):
        raise ConfigError(f"by is one of {', '.join(KEYS)}, or a list of some of them, each once")
    return wanted


def moment(given: Any, now: float, name: str = "since") -> float | None:
    """A point in time in epoch seconds: ``"7d"`` ago, a datetime (a naive one is local time), epoch seconds, None.

    Raises:
        ConfigError: anything else.
    """
    if given is None:
        return None
    if isinstance(given, int | float) and not isinstance(given, bool) and math.isfinite(given):
        return float(given)
    if isinstance(given, datetime):
        return given.timestamp()
    try:
        return now - float(_AGO.read(given))
    except ValueError:
        example = f'{name}="7d" (or "12h", "30m", "90s", "2w"), or a datetime'
        raise ConfigError(f"{name} is a time, not {given!r:.60}", next_step=f"write {example}") from None


def frame(
    ledger: Ledger,
    by: tuple[str, ...],
    zone: tzinfo,
    *,
    now: float,
    since: float | None = None,
    until: float | None = None,
) -> pd.DataFrame:
    """One row for each combination of ``by`` in which there was a call; the columns are ``by`` and `MEASURES`.

    Args:
        zone: where hours, days, weeks (from Monday) and months begin; a call belongs to the window of its start.
        now, since, until: in epoch seconds.

    Times are sorted from old to new, all else from dear to cheap. USD are float64, exact to the nano-dollar up to
    millions. Under ``tag`` a call counts once for each of its tags, so such a column adds up to more than was spent.
    """
    import pandas as pd

    finest, times = "", [key for key in by if key in CALENDAR]
    columns = [_COLUMNS[key] for key in by if key not in CALENDAR]
    given: dict[str, Any] = {"by": columns, "sums": _SUMMED, "since": since, "until": until}
    if times:
        begin = _first(ledger, now) if since is None else since
        end = max(now + QUARTER_S, begin) if until is None else until
        finest = _finest(times)
        edges = list(windows(finest, begin, end, zone))
        some = (edges[at : at + _AT_ONCE + 1] for at in range(0, len(edges) - 1, _AT_ONCE))
        rows = [row for each in some for row in ledger.spend(**given, windows=each)]
    else:
        rows = ledger.spend(**given)
    table = pd.DataFrame.from_records(rows, columns=[*(["window"] if times else []), *columns, *_SUMMED])
    for key in times:
        if key == finest:
            table[key] = table["window"]
        else:
            table[key] = table["window"].map({at: window(key, at, zone)[0] for at in table["window"].unique()})
    if "tag" in by:
        table = _by_tag(table)
    summed = table.groupby([*by], dropna=False, sort=False, as_index=False)[[*_SUMMED]].sum()
    return _typed(summed, by, times, zone)


def _finest(times: Sequence[str]) -> str:
    """The window that all of them can be made of."""
    return "day" if {"week", "month"} <= set(times) else min(times, key=CALENDAR.index)


def _first(ledger: Ledger, now: float) -> float:
    """When the first call of the ledger began."""
    page = next(iter(ledger.pages(1)), None)
    return now if page is None else float(page[0][0]["started"])


def _by_tag(table: pd.DataFrame) -> pd.DataFrame:
    import pandas as pd

    pairs = [(tags, tag) for tags in table["tags"].unique() for tag in _tags(tags)]
    return table.merge(pd.DataFrame(pairs, columns=["tags", "tag"], dtype="object"), on="tags")


def _tags(text: str) -> list[str | None]:
    return [f"{name}={value}" for name, value in json.loads(text).items()] or [None]


def _typed(summed: pd.DataFrame, by: tuple[str, ...], times: Sequence[str], zone: tzinfo) -> pd.DataFrame:
    import pandas as pd

    kinds: dict[str, Any] = {**{key: "int64" if key in times else "string" for key in by}, **MEASURES}
    shown = summed.rename(columns={nanos: usd for usd, nanos in _NANOS.items()}).astype(kinds)
    for name in _NANOS:
        shown[name] = shown[name] / 1e9
    for key in times:
        shown[key] = pd.to_datetime(shown[key], unit="s", utc=True).astype("datetime64[s, UTC]").dt.tz_convert(zone)
    if "user" in by:
        shown["user"] = shown["user"].replace("", pd.NA)
    order = [*times, "cost_usd", "calls"]
    ascending = [True] * len(times) + [False, False]
    return shown[[*by, *MEASURES]].sort_values(order, ascending=ascending, ignore_index=True)


def brief(frame: pd.DataFrame) -> pd.DataFrame:
    """Such a frame to be looked at: times as text, and without the columns that say nothing."""
    shown = frame.drop(columns=[name for name in _RARE if not frame[name].any()])
    for name in shown.columns.intersection(list(CALENDAR)):
        shown[name] = shown[name].dt.strftime(_TIMES.get(name, "%Y-%m-%d")).astype("string")
    return shown


def table(frame: pd.DataFrame) -> str:
    """A brief frame as text, for a terminal."""
    columns: dict[str, list[str]] = {}
    for name in map(str, frame.columns):
        if name in _NANOS:
            cells = [money(round(Decimal(str(each)), 9)) for each in frame[name]]
        elif name in MEASURES:
            cells = [f"{each:,}" for each in frame[name]]
        else:
            cells = [tidy(each, limit=60) for each in frame[name].fillna("-")]
        width = max(map(len, (name, *cells)))
        aligned = str.rjust if name in MEASURES else str.ljust
        columns[name] = [aligned(each, width) for each in (name.replace("_", " "), *cells)]
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns.values(), strict=True))


def asked(words: Sequence[str]) -> tuple[str, str]:
    """What a report is asked for in words, ``[KEY] [SINCE]``: by day, and since 30 days, where they do not say.

    Raises:
        ConfigError: words that say something else.
    """
    by = [word for word in words if not word[:1].isdigit()]
    since = [word for word in words if word[:1].isdigit()]
    if len(by) > 1 or len(since) > 1:
        raise ConfigError(
            f"a report of {' '.join(words)!r:.60}?", next_step=f"write {'|'.join(KEYS)}, and how far back: day 7d"
        )
    if since:
        moment(since[0], 0.0)
    key = keys(by[0])[0] if by else "day"
    return key, since[0] if since else "1d" if key == "hour" else "30d"


def summary(frame: pd.DataFrame, by: str, since: str) -> str:
    """What stands above such a report."""
    if frame.empty:
        return f"no call in the last {since}"
    if by == "tag":
        return f"by tag, last {since}; a call counts for each of its tags"
    calls, unpriced = int(frame["calls"].sum()), int(frame["unpriced"].sum())
    spent, saved = (round(Decimal(str(frame[name].sum())), 9) for name in ("cost_usd", "saved_usd"))
    parts = [f"{money(spent)} for {calls:,} call{'' if calls == 1 else 's'}, by {by}, last {since}"]
    if saved:
        parts.append(f"{money(saved)} saved by cached and shared answers")
    if unpriced:
        parts.append(f"the price of {unpriced:,} attempt{'' if unpriced == 1 else 's'} is unknown")
    return "; ".join(parts)
