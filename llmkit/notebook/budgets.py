"""Budgets in words: what holds in one line, all of it as a table, and what ``%llm budget`` is told."""

from __future__ import annotations

import difflib
import re
from decimal import ROUND_DOWN, Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any, NamedTuple

from llmkit import caps
from llmkit.caps import of_request
from llmkit.config import WINDOWS
from llmkit.errors import ConfigError
from llmkit.money import amount, money
from llmkit.redaction import tidy

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import pandas as pd

    from llmkit.config import BudgetSettings

__all__ = ["in_brief", "in_words", "lifted", "of_request", "read", "table"]

USAGE = "%llm budget session=1usd day=5usd month=100000tokens user.ana.day=2usd tag.app=docs.day=1usd at_limit=warn"
LIFT = "%llm budget off lifts them"

_KINDS = ("user", "tag", "model")
_SCALES = {"": 1, "k": 1_000, "m": 1_000_000}
_AMOUNT = re.compile(
    r"(?P<dollar>\$)?(?P<number>\d[\d_,]*(?:\.\d+)?|\.\d+)\s*(?P<scale>[km]?)(?P<unit>usd|\$|tokens?)?", re.IGNORECASE
)
_HEAD = ("scope", "limit", "spent", "held", "unknown", "left", "used", "resets")
_NOTHING = {"$0", "0 tokens"}


# -- what holds --------------------------------------------------------------------------------------------------------


def in_words(budget: BudgetSettings, cell: object = None) -> str:
    """`llmkit.caps.in_words`, and how to be rid of them here."""
    return caps.in_words(budget, cell, lift=LIFT)


# -- how far each is used ----------------------------------------------------------------------------------------------


class _Row(NamedTuple):
    """One limit in words, in the order of `_HEAD`."""

    scope: str
    limit: str
    spent: str
    held: str
    unknown: str
    left: str
    used: str
    resets: str


def table(frame: pd.DataFrame, budget: BudgetSettings, cell: object = None) -> str:
    """`AsyncClient.budgets` as a block of text, with what holds for all limits above it."""
    rows = _rows(frame, budget)
    then = {
        "error": "an error",
        "downgrade": "a cheaper model of the chain, else an error",
        "warn": "a warning, and the call goes on",
    }
    lines = [
        f"a request:    {of_request(budget, cell)}",
        f"at a limit:   {then[budget.at_limit]}; there is a warning from {budget.warn_at:.0%} on",
        f"time zone:    {budget.timezone}",
    ]
    if not rows:
        return "\n".join([*lines, "", "no other limit is set; for example: %llm budget session=1usd day=5usd"])
    lines += ["", *_aligned([_HEAD, *rows])]
    if any(limit.is_default for limit in budget.limits):
        lines += [
            "",
            f"what is set by default holds for paid models only; day=off lifts one, {LIFT.replace('them', 'all')}",
        ]
    return "\n".join(lines)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table; without the column of what is unknown where that is nothing, as it nearly always is."""
    unknown = _HEAD.index("unknown")
    if all(row[unknown] in _NOTHING for row in rows[1:]):
        rows = [[*row[:unknown], *row[unknown + 1 :]] for row in rows]
    first, *between, last = zip(*rows, strict=True)
    columns = [_justified(first, str.ljust), *(_justified(each, str.rjust) for each in between), last]
    return ["  ".join(line).rstrip() for line in zip(*columns, strict=True)]


def _justified(column: Sequence[str], justify: Callable[[str, int], str]) -> list[str]:
    width = max(map(len, column))
    return [justify(cell, width) for cell in column]


def _rows(frame: pd.DataFrame, budget: BudgetSettings) -> list[_Row]:
    default = {limit.window for limit in budget.limits if limit.is_default}
    return [_row(each, default) for each in frame.to_dict("records")]


def _row(given: Mapping[Any, Any], default: set[str]) -> _Row:
    usd, scope = given["unit"] == "usd", tidy(str(given["scope"]), limit=60)
    if usd and given["kind"] == "all" and given["window"] in default:
        scope += " (by default)"
    spent: Callable[[Decimal], str] = money if usd else _tokens
    return _Row(
        scope,
        _shown(given["limit"], amount if usd else _tokens),
        _shown(given["spent"], spent),
        _shown(given["held"], spent),
        _shown(given["unknown"], spent),
        _shown(given["left"], _left if usd else _tokens),
        f"{float(given['share']):.0%}",
        "with the kernel" if given["window"] == "session" else resets(given["resets_at"]),
    )


def _shown(value: Any, words: Callable[[Decimal], str]) -> str:
    if value is None or value != value:  # noqa: PLR0124 - not a number: nobody knows
        return "?"
    return words(round(Decimal(str(value)), 9))


def _tokens(number: Decimal) -> str:
    return f"{number:,.0f} tokens"


def _left(usd: Decimal) -> str:
    """Rounded down: no more than there is."""
    places = Decimal("0.01") if usd >= 1 else Decimal("0.0001") if usd >= Decimal("0.01") else None
    return money(usd) if places is None else amount(usd.quantize(places, ROUND_DOWN))


def resets(at: Any) -> str:
    """When a window ends, in its own time zone; ``at`` is None, or no time at all, where it never does."""
    if at is None or at != at:  # noqa: PLR0124
        return "never"
    return f"{at:%Y-%m-%d %H:%M}"


def in_brief(frame: pd.DataFrame, budget: BudgetSettings) -> list[str]:
    """One line a limit: how much of it is used."""
    lines = []
    for row in _rows(frame, budget):
        held = "" if row.held in _NOTHING else f", {row.held} held"
        lines.append(f"{row.scope}: {row.spent} of {row.limit} ({row.used}){held}")
    return lines


# -- what is told ------------------------------------------------------------------------------------------------------


def read(words: Sequence[str]) -> dict[str, Any]:
    """``session=1usd user.ana.day=off …`` as tables of ``[budget]``.

    Raises:
        ConfigError: a word that is none, with the nearest that is, or an example.
    """
    tables: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.rpartition("=")
        if not equals or not name or not value:
            raise _wrong(word, "it is written NAME=AMOUNT")
        if name in {"at_limit", "timezone"}:
            tables[name] = value
        elif name == "warn_at":
            tables[name] = _share(word, value)
        else:
            node = tables
            for part in _path(word, name):
                node = node.setdefault(part, {})
            node |= _amounts(word, value)
    return tables


def _path(word: str, name: str) -> tuple[str, ...]:
    kind, dot, rest = name.partition(".")
    if not dot:
        if name in {"request", *WINDOWS}:
            return (name,)
        if name in _KINDS:
            raise _wrong(word, f"it is written {name}.{'KEY=VALUE' if name == 'tag' else 'NAME'}.day={word[-4:]}")
        raise _wrong(word, _nearest(name, ("request", *WINDOWS, *_KINDS, "at_limit", "warn_at", "timezone")))
    whose, dot, window = rest.rpartition(".")
    if kind not in _KINDS:
        raise _wrong(word, _nearest(kind, _KINDS))
    if not dot or not whose:
        raise _wrong(word, f"it is written {kind}.{'KEY=VALUE' if kind == 'tag' else 'NAME'}.WINDOW=AMOUNT")
    if window not in WINDOWS:
        raise _wrong(word, _nearest(window, WINDOWS))
    return (kind, whose, window)


def _amounts(word: str, value: str) -> dict[str, Any]:
    """``1usd``, ``$1``, ``100000tokens``, ``10Mtokens``, ``off``, or two of them with a comma between."""
    if value.lower() == "off":
        return {"usd": "off", "tokens": "off"}
    found: dict[str, Any] = {}
    for each in re.split(r",(?!\d{3}(?!\d))", value):
        match = _AMOUNT.fullmatch(each.strip())
        if match is None:
            raise _wrong(word, "an amount is 5usd, $5, 100000tokens, 10Mtokens or off")
        unit = "tokens" if (match["unit"] or "").lower().startswith("token") else "usd"
        if unit == "tokens" and match["dollar"]:
            raise _wrong(word, "an amount is 5usd, $5, 100000tokens, 10Mtokens or off")
        number = Decimal(re.sub("[_,]", "", match["number"])) * _SCALES[match["scale"].lower()]
        if unit == "tokens" and number != number.to_integral_value():
            raise _wrong(word, "tokens are whole")
        found[unit] = int(number) if unit == "tokens" else number
    return found


def _share(word: str, value: str) -> Decimal:
    """``0.8`` or ``80%``."""
    try:
        return Decimal(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
    except InvalidOperation:
        raise _wrong(word, "a share is 0.8 or 80%") from None


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"


def _wrong(word: str, why: str) -> ConfigError:
    return ConfigError(f"%llm budget: {word!r:.80}: {why}", next_step=f"for example: {USAGE}")


def lifted(budget: BudgetSettings) -> dict[str, Any]:
    """The tables of ``[budget]`` that lift every limit there is."""
    off = {"usd": "off", "tokens": "off"}
    tables: dict[str, Any] = {"request": dict(off)}
    for limit in budget.limits:
        node = tables if limit.kind == "all" else tables.setdefault(limit.kind, {}).setdefault(limit.name, {})
        node[limit.window] = dict(off)
    return tables
