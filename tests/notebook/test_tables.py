"""Tables in a prompt: complete up to a bound, and saying what lies beyond it."""

from __future__ import annotations

import csv
import dataclasses
import io
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmkit.errors import TemplateError
from llmkit.notebook.template import render


def cells(line):
    """The cells of a Markdown row as GitHub's flavour reads them: a backslash hides one mark, a bare bar ends a cell."""
    found = re.findall(r"((?:\\.|[^|\\])*)\|", line.removeprefix("|"))
    return [re.sub(r"\\([\\|])", r"\1", cell[1:-1]) for cell in found]


def rows(text):
    head, line, *body = text.split("\n\n(")[0].split("\n")
    assert set(line) <= set("|- ")
    return cells(head), [cells(each) for each in body]


def test_a_frame_put_in_plainly_keeps_all_its_columns() -> None:
    frame = pd.DataFrame({f"column {n}": [n, n + 0.5] for n in range(40)})
    head, body = rows(render("{{ df }}", {"df": frame}))
    assert head == [f"column {n}" for n in range(40)]
    assert body[0] == [f"{n}.0" for n in range(40)]
    assert "..." in str(frame)  # which is why it is not written as pandas shows it


def test_a_bound_says_what_is_left_out() -> None:
    frame = pd.DataFrame(np.arange(300 * 60).reshape(300, 60))
    text = render("{{ df }}", {"df": frame})
    assert text.endswith("\n\n(first 100 of 300 rows; first 50 of 60 columns)")
    assert len(rows(text)[1]) == 100
    assert render("{{ df | table(2, 3) }}", {"df": frame}).endswith(
        "| 60 | 61 | 62 |\n\n(first 2 of 300 rows; first 3 of 60 columns)"
    )
    assert render("{{ df | table(300, columns=60) }}", {"df": frame}).count("\n") == 301
    assert render("{{ df | table(0) }}", {"df": frame[[0]]}).endswith("(first 0 of 300 rows)")


def test_columns_may_be_named() -> None:
    frame = pd.DataFrame({"a": [1], "b": [2], "c": [3]})
    assert rows(render("{{ df | table(columns=['c', 'a']) }}", {"df": frame})) == (["c", "a"], [["3", "1"]])
    assert rows(render("{{ df | table(columns='b') }}", {"df": frame})) == (["b"], [["2"]])
    with pytest.raises(TemplateError, match="there is no column clour; did you mean colour"):
        render("{{ df | table(columns=['clour']) }}", {"df": pd.DataFrame({"colour": [1]})})


@given(st.lists(st.text(alphabet="a|\\\n\r <>`\u2028"), min_size=1, max_size=4))
def test_no_cell_ends_its_cell_or_its_row(values) -> None:
    text = render("{{ rows | table }}", {"rows": [{"x": value} for value in values]})
    _, body = rows(text)
    assert [len(cells) for cells in body] == [1] * len(values)
    plain = [[cell.replace("\\", "") for cell in row] for row in body]
    assert plain == [["<br>".join(value.splitlines()).replace("\\", "")] for value in values]


def test_missing_values_are_empty() -> None:
    frame = pd.DataFrame({"n": [1.5, None], "s": ["x", None], "t": [pd.Timestamp("2026-01-02"), pd.NaT]})
    assert rows(render("{{ df }}", {"df": frame}))[1] == [["1.5", "x", "2026-01-02T00:00:00"], ["", "", ""]]


def test_an_index_that_says_something_is_kept() -> None:
    frame = pd.DataFrame({"n": [1, 2]}, index=pd.Index(["p", "q"], name="who"))
    assert rows(render("{{ df }}", {"df": frame})) == (["who", "n"], [["p", "1"], ["q", "2"]])
    assert rows(render("{{ df[1:] }}", {"df": pd.DataFrame({"n": [1, 2]})})) == (["index", "n"], [["1", "2"]])
    deep = pd.DataFrame(
        {("a", "x"): [1], ("a", "y"): [2]}, index=pd.MultiIndex.from_tuples([("p", 7)], names=["g", None])
    )
    assert rows(render("{{ df }}", {"df": deep})) == (["g", "index 1", "a / x", "a / y"], [["p", "7", "1", "2"]])
    twice = pd.DataFrame([[1, 2]], columns=["a", "a"])
    assert rows(render("{{ df }}", {"df": twice})) == (["a", "a"], [["1", "2"]])


def test_a_series_is_a_table() -> None:
    assert rows(render("{{ s }}", {"s": pd.Series([1, 2], name="n")})) == (["n"], [["1"], ["2"]])
    counts = pd.Series(["x", "x", "y"], name="kind").value_counts()
    assert rows(render("{{ s }}", {"s": counts})) == (["kind", "count"], [["x", "2"], ["y", "1"]])
    assert render("{{ s }}", {"s": pd.Series(range(150))}).endswith("\n\n(first 100 of 150 rows)")


def test_empty_tables_say_so() -> None:
    assert render("{{ df }}", {"df": pd.DataFrame({"a": []})}) == "| a |\n| --- |\n\n(no rows)"
    assert render("{{ df }}", {"df": pd.DataFrame()}) == "(an empty table)"
    assert render("{{ [] | table }}") == "(an empty table)"


def test_long_cells_are_cut_and_counted() -> None:
    frame = pd.DataFrame({"a": ["x" * 600, "y" * 500], "b": ["z" * 501, ""]})
    text = render("{{ df }}", {"df": frame})
    assert text.endswith("\n\n(2 cells are cut at 500 characters)")
    assert "x" * 499 + "… |" in text
    assert "y" * 500 + " |" in text


@dataclasses.dataclass
class Item:
    name: str
    size: int


@pytest.mark.parametrize(
    "value, head, body",
    [
        ([{"a": 1}, {"b": {"c": 2}}], ["a", "b"], [["1", ""], ["", '{"c": 2}']]),
        ([Item("x", 1)], ["name", "size"], [["x", "1"]]),
        ([(1, 2), (3,)], ["0", "1"], [["1", "2"], ["3", ""]]),
        (["x", "y"], ["value"], [["x"], ["y"]]),
        ({"a": [1, 2], "b": ["x", "y"]}, ["a", "b"], [["1", "x"], ["2", "y"]]),
        ({"k": 1, "l": "m"}, ["key", "value"], [["k", "1"], ["l", "m"]]),
        (np.array([[1.5, 2.0]]), ["0", "1"], [["1.5", "2.0"]]),
        (np.array([1, 2]), ["0"], [["1"], ["2"]]),
    ],
)
def test_what_else_is_a_table(value, head, body) -> None:
    assert rows(render("{{ value | table }}", {"value": value})) == (head, body)


@pytest.mark.parametrize("value", [3, "text", None, b"x", object()])
def test_what_is_none_is_named(value) -> None:
    with pytest.raises(TemplateError, match=f"table: {type(value).__name__} is no table"):
        render("{{ value | table }}", {"value": value})


def test_objects_in_cells_are_refused() -> None:
    with pytest.raises(TemplateError, match="object has no text of its own"):
        render("{{ df }}", {"df": pd.DataFrame({"a": [object()]})})


def test_csv_is_what_any_reader_of_csv_takes() -> None:
    frame = pd.DataFrame({"a,b": ['say "x"', "two\nlines"], "n": [1, None]})
    text = render("{{ df | csv }}", {"df": frame})
    assert list(csv.reader(io.StringIO(text))) == [["a,b", "n"], ['say "x"', "1.0"], ["two\nlines", ""]]
    assert render("{{ df | csv(1, columns=['n']) }}", {"df": frame}) == "n\n1.0\n\n(first 1 of 2 rows)"


def test_a_huge_frame_costs_what_is_shown() -> None:
    class Counted(pd.DataFrame):
        @property
        def _constructor(self):
            return Counted

        def to_dict(self, *_, **__):
            raise AssertionError("the whole frame")

    frame = Counted({"a": range(3_000_000)})
    assert render("{{ df }}", {"df": frame}).endswith("(first 100 of 3,000,000 rows)")
