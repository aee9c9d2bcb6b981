"""Tables for a prompt: Markdown or CSV of a DataFrame, a Series, an array or a list of records, bounded, and saying so.

Rows are the first ones and columns the first ones; a line below the table says how many of how many there are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from itertools import islice
from typing import Any

from llmkit.notebook.values import Unwritable, attributes_of, fields_of, instance_of, plain, written

__all__ = ["LONGEST_CELL", "MOST_COLUMNS", "MOST_ROWS", "csv", "distinct", "grid", "has_plain_index", "table"]

MOST_ROWS = 100
MOST_COLUMNS = 50
LONGEST_CELL = 500
"""Characters of one cell."""

_PIPE = re.compile(r"(\\*)(\||$)")


def table(value: Any, rows: int = MOST_ROWS, columns: int | Sequence[str] = MOST_COLUMNS) -> str:
    """A Markdown table of the first ``rows``.

    Args:
        value: a DataFrame, a Series, an array of two dimensions, or a list of dicts, of objects or of lists.
        columns: how many of them, or the names of those wanted.

    Raises:
        Unwritable: it is no table, or has no such column.
    """
    shown = _Shown(value, rows, columns, "table")
    if not shown.names:
        return f"({shown.left_out() or 'an empty table'})"
    lines = [_line(shown.names), _line(["---"] * len(shown.names))]
    lines += [_line(row) for row in zip(*shown.cells, strict=True)]
    return _with_note("\n".join(lines), shown)


def csv(value: Any, rows: int = MOST_ROWS, columns: int | Sequence[str] = MOST_COLUMNS) -> str:
    """The same as CSV: fewer tokens than `table`."""
    import csv as format_
    from io import StringIO

    shown = _Shown(value, rows, columns, "csv")
    if not shown.names:
        return f"({shown.left_out() or 'an empty table'})"
    out = StringIO()
    writer = format_.writer(out, lineterminator="\n")
    writer.writerow(shown.names)
    writer.writerows(zip(*shown.cells, strict=True))
    return _with_note(out.getvalue().rstrip("\n"), shown)


class _Shown:
    """The part of a table that is shown: ``names`` and the texts of ``cells``, column by column."""

    def __init__(self, value: Any, rows: int, columns: int | Sequence[str], what: str) -> None:
        _check(what, "rows", rows)
        names, cells, self._all_rows = _cut(value, rows, what)
        self._all_columns = len(names)
        chosen = _chosen(names, columns, what)
        self._chosen_by_name = not isinstance(columns, int)
        self.names = [names[index] for index in chosen]
        self._cut_cells = 0
        self.cells = [[self._cell(cell) for cell in cells[index]] for index in chosen]
        self._rows = len(cells[0]) if cells else 0

    def _cell(self, value: Any) -> str:
        if value is None or (isinstance(value, float) and value != value):  # noqa: PLR0124  NaN
            return ""
        if isinstance(value, str):
            text = written(value)
        else:
            inner = plain(value) if not isinstance(value, bool | int | float) else value
            text = "" if inner is None else inner if isinstance(inner, str) else written(inner)
        if len(text) > LONGEST_CELL:
            self._cut_cells += 1
            text = text[: LONGEST_CELL - 1] + "…"
        return text

    def left_out(self) -> str:
        """What of the table is not shown, in words; empty where all of it is."""
        said = []
        if self._all_rows > self._rows:
            said.append(f"first {self._rows:,} of {self._all_rows:,} rows")
        elif not self._all_rows and self.names:
            said.append("no rows")
        if self._all_columns > len(self.names) and not self._chosen_by_name:
            said.append(f"first {len(self.names):,} of {self._all_columns:,} columns")
        if self._cut_cells:
            cells = f"{self._cut_cells:,} cell{'s are' if self._cut_cells > 1 else ' is'}"
            said.append(f"{cells} cut at {LONGEST_CELL} characters")
        return "; ".join(said)


def _with_note(text: str, shown: _Shown) -> str:
    note = shown.left_out()
    return f"{text}\n\n({note})" if note else text


def _check(what: str, name: str, number: object) -> None:
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= 1_000_000:
        raise Unwritable(f"{what}: {name} is a whole number from 0 to 1000000, not {number!r:.40}")


def _chosen(names: Sequence[str], columns: int | Sequence[str], what: str) -> list[int]:
    """Which of the columns, by their places."""
    if isinstance(columns, int):
        _check(what, "columns", columns)
        return list(range(min(columns, len(names))))
    wanted = [columns] if isinstance(columns, str) else columns
    if not isinstance(wanted, Sequence):
        raise Unwritable(f"{what}: columns is a number, or a list of names, not {columns!r:.40}")
    for name in wanted:
        if str(name) not in names:
            near = get_close_matches(str(name), names, 1)
            hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(names[:20])}"
            raise Unwritable(f"{what}: there is no column {name!s:.60}{hint}")
    return [names.index(str(name)) for name in wanted]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(_escaped(cell) for cell in cells)} |"


def _escaped(text: str) -> str:
    """A cell's text with nothing in it that would end the cell or the row."""
    if "|" in text or text.endswith("\\"):
        text = _PIPE.sub(lambda match: match[1] * 2 + ("\\|" if match[2] else ""), text)
    return "<br>".join(text.splitlines())


# -- what can be a table -----------------------------------------------------------------------------------------------


def has_plain_index(frame: Any) -> bool:
    """Whether the index of a DataFrame or a Series only numbers its rows."""
    index = frame.index
    plain_range = instance_of(index, "pandas", "RangeIndex") and index.start == 0 and index.step == 1
    return bool(plain_range and index.name is None)


def grid(frame: Any) -> tuple[list[str], list[list[Any]]]:
    """The names of a DataFrame's columns and their values; its index comes first, where it says more than a number."""
    names = [_name(column) for column in frame.columns]
    columns = [frame.iloc[:, place].tolist() for place in range(len(names))]
    if has_plain_index(frame):
        return names, columns
    index = frame.index
    levels = range(index.nlevels)
    outer = [_name(index.names[level]) if index.names[level] is not None else f"index {level}" for level in levels]
    if index.nlevels == 1 and index.name is None:
        outer = ["index"]
    return [*outer, *names], [*(index.get_level_values(level).tolist() for level in levels), *columns]


def distinct(names: Sequence[str]) -> list[str]:
    """``names``, and none of them twice: the second ``a`` is ``a (2)``; an object would keep only the last of them."""
    found: dict[str, None] = {}
    for name in names:
        number, each = 1, name
        while each in found:
            number += 1
            each = f"{name} ({number})"
        found[each] = None
    return list(found)


def _name(column: Any) -> str:
    return " / ".join(str(part) for part in column) if isinstance(column, tuple) else str(column)


def _cut(value: Any, rows: int, what: str) -> tuple[list[str], list[list[Any]], int]:
    """Names, values of the first ``rows`` by column, and how many rows there are in all."""
    if instance_of(value, "pandas", "Series"):
        value = value.to_frame("value" if value.name is None else value.name)
    if instance_of(value, "pandas", "DataFrame"):
        names, columns = grid(value.iloc[:rows])
        return names, columns, len(value)
    if instance_of(value, "polars", "Series"):
        value = value.to_frame(value.name or "value")
    if instance_of(value, "polars", "DataFrame"):
        shown = value.head(rows)
        return list(shown.columns), [column.to_list() for column in shown.get_columns()], len(value)
    if instance_of(value, "numpy", "ndarray") and value.ndim in {1, 2}:
        shown = value[:rows] if value.ndim == 2 else value[:rows, None]
        return [str(place) for place in range(shown.shape[1])], [column.tolist() for column in shown.T], len(value)
    if isinstance(value, Mapping):
        return _of_mapping(value, rows)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return _of_records(value, rows)
    raise Unwritable(f"{what}: {type(value).__name__} is no table", "a DataFrame, a Series, or a list of dicts is one")


def _of_mapping(value: Mapping[Any, Any], rows: int) -> tuple[list[str], list[list[Any]], int]:
    """A dict of lists of one length is a table by columns; any other dict one of keys and values."""
    columns = [item for item in value.values() if isinstance(item, Sequence) and not isinstance(item, str | bytes)]
    if columns and len(columns) == len(value) and len({len(column) for column in columns}) == 1:
        return [str(name) for name in value], [list(column[:rows]) for column in columns], len(columns[0])
    pairs = list(islice(value.items(), rows))
    return ["key", "value"], [[key for key, _ in pairs], [item for _, item in pairs]], len(value)


def _of_records(value: Sequence[Any], rows: int) -> tuple[list[str], list[list[Any]], int]:
    records = [_record(item) for item in value[:rows]]
    names = list(dict.fromkeys(name for record in records for name in record))
    return names, [[record.get(name) for record in records] for name in names], len(value)


def _record(item: Any) -> dict[str, Any]:
    if isinstance(item, Mapping):
        return {str(name): inner for name, inner in item.items()}
    if isinstance(item, tuple) and hasattr(item, "_asdict"):
        return dict(item._asdict())
    if fields := fields_of(item) or attributes_of(item):
        return fields
    if isinstance(item, Sequence) and not isinstance(item, str | bytes):
        return {str(place): inner for place, inner in enumerate(item)}
    return {"value": item}
