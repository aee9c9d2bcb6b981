"""How values are written for a model: as something that it can read, or not at all."""

from __future__ import annotations

import collections
import dataclasses
import datetime as dt
import enum
import json
import os
import subprocess
import sys
import types
from decimal import Decimal
from pathlib import PurePosixPath

import numpy as np
import pandas as pd
import pydantic
import pytest

from llmkit.notebook import values
from llmkit.notebook.values import Unwritable, as_json, written


class Colour(enum.Enum):
    RED = 1


class Kind(str, enum.Enum):  # noqa: UP042  what older code has
    SMALL = "small"


Point = collections.namedtuple("Point", "x y")  # noqa: PYI024


@dataclasses.dataclass
class Box:
    width: float
    tags: list[str]


class Person(pydantic.BaseModel):
    name: str
    born: dt.date


class Bare:
    pass


class Told:
    def __str__(self) -> str:
        return "told <b>"


@pytest.mark.parametrize(
    "value, text",
    [
        ("as\n it is", "as\n it is"),
        (None, "None"),
        (True, "True"),
        (1.5, "1.5"),
        (Decimal("1.50"), "1.50"),
        (np.float64(0.25), "0.25"),
        (np.int8(3), "3"),
        (dt.date(2026, 1, 2), "2026-01-02"),
        (pd.Timestamp("2026-01-02 03:04"), "2026-01-02 03:04:00"),
        (PurePosixPath("a/b"), "a/b"),
        (Kind.SMALL, "small"),
        (Colour.RED, "Colour.RED"),
        (Told(), "told <b>"),
        ({"a": [1, None, "ä"]}, '{"a": [1, null, "ä"]}'),
        ({3: True, None: 1, (1, 2): 2, Kind.SMALL: 3}, '{"3": true, "null": 1, "[1, 2]": 2, "small": 3}'),
        ((1, 2), "[1, 2]"),
        ({"b", "a"}, '["a", "b"]'),
        ({"b": 1, "a": 2}.keys(), '["b", "a"]'),
        (Point(1, 2), '{"x": 1, "y": 2}'),
        (Box(2.0, ["t"]), '{"width": 2.0, "tags": ["t"]}'),
        (Person(name="Ana", born=dt.date(1990, 5, 6)), '{"name": "Ana", "born": "1990-05-06"}'),
        (np.arange(4).reshape(2, 2), "[[0, 1], [2, 3]]"),
        (np.array(7), "7"),
        (pd.Index(["a", "b"]), '["a", "b"]'),
        (pd.Series(["a", "b"], dtype="string").unique(), '["a", "b"]'),
        (range(3), "range(0, 3)"),
    ],
)
def test_values_are_written_as_a_model_reads_them(value, text) -> None:
    assert written(value) == text


@pytest.mark.parametrize(
    "value, says",
    [
        (Bare(), "Bare has no text of its own, only an address"),
        ([Bare()], "Bare has no text of its own"),
        ({"a": {"b": Bare()}}, "Bare has no text of its own"),
        (Box(Bare(), []), "Bare has no text of its own"),
        (pd.DataFrame({"a": [1]}).groupby("a"), "DataFrameGroupBy has no text of its own"),
        (len, "len is a function, not what it gives"),
        ("x".upper, "upper is a function"),
        (Bare, "Bare is a type"),
        (os, "os is a module"),
        ((x for x in [1]), "a generator shows nothing"),
        (zip([1], [2], strict=True), "a zip shows nothing"),
        (b"abc", "bytes are not text"),
        ([b"abc"], "bytes are not text"),
        (memoryview(b"abc"), "memoryview are not text"),
        (os.environ, "os.environ holds keys"),
        ([os.environ], "os.environ holds keys"),
    ],
)
def test_what_no_model_can_read_is_refused(value, says) -> None:
    with pytest.raises(Unwritable, match=says):
        written(value)


def test_an_object_of_the_notebooks_own_is_what_it_holds(monkeypatch) -> None:
    class Own:
        def __init__(self, **fields) -> None:
            self.__dict__.update(fields)

    class Named(Own):
        def __repr__(self) -> str:
            return "named"

    bare = Own(a=1)
    with pytest.raises(Unwritable):  # a library's: it may hold anything, keys included
        written(bare)
    monkeypatch.setattr(Own, "__module__", "__main__")
    monkeypatch.setattr(Named, "__module__", "__main__")
    assert written(Own(a=1, _key="secret", inner=[Own(b=2)])) == '{"a": 1, "inner": [{"b": 2}]}'
    assert (written(Named(a=1)), as_json(Named(a=1), None)) == ("named", '{"a": 1}')
    with pytest.raises(Unwritable):
        written(Own())
    assert as_json(types.SimpleNamespace(a=1), None) == '{"a": 1}'


def test_frames_of_polars() -> None:
    polars = pytest.importorskip("polars")
    frame = polars.DataFrame({"a": [1, None], "b": ["x|y", "z"]})
    assert written(frame) == "| a | b |\n| --- | --- |\n| 1 | x\\|y |\n|  | z |"
    assert json.loads(as_json(frame)) == [{"a": 1, "b": "x|y"}, {"a": None, "b": "z"}]
    assert written(polars.Series("s", range(150))).endswith("| 99 |\n\n(first 100 of 150 rows)")
    assert json.loads(as_json({"s": frame["a"]})) == {"s": [1, None]}


def test_what_is_no_finite_number_is_null_in_json() -> None:
    value = {"a": float("nan"), "b": [float("inf")], "c": np.float32("nan"), "d": pd.NaT, "e": pd.NA, "f": np.nan}
    assert json.loads(as_json(value)) == {"a": None, "b": [None], "c": None, "d": None, "e": None, "f": None}


def test_pandas_and_numpy_inside_json() -> None:
    frame = pd.DataFrame(
        {"n": [1, 2], "when": pd.to_datetime(["2026-01-02", None]), "kind": pd.Categorical(["x", "y"])}
    )
    value = {
        "frame": frame,
        "series": frame["n"],
        "named": pd.Series([1, 2], index=["p", "q"]),
        "twice": pd.Series([1, 2], index=["p", "p"]),
        "array": np.array([[1.5]]),
        "number": np.int64(9),
        "time": np.datetime64("2026-01-02"),
        "of_day": dt.time(3, 4),
    }
    assert json.loads(as_json(value)) == {
        "frame": [
            {"n": 1, "when": "2026-01-02T00:00:00", "kind": "x"},
            {"n": 2, "when": None, "kind": "y"},
        ],
        "series": [1, 2],
        "named": {"p": 1, "q": 2},
        "twice": [{"index": "p", "0": 1}, {"index": "p", "0": 2}],
        "array": [[1.5]],
        "number": 9,
        "time": "2026-01-02",
        "of_day": "03:04:00",
    }


def test_a_ring_is_an_error() -> None:
    ring: dict = {}
    ring["self"] = ring
    with pytest.raises(Unwritable, match="100 deep, or holds itself"):
        written(ring)


def test_there_is_an_end_to_the_number_of_values(monkeypatch) -> None:
    monkeypatch.setattr(values, "MOST_VALUES", 100)
    assert written(list(range(99)))
    for value in (
        list(range(101)),
        [[0] * 60, [0] * 60],
        np.zeros(2000),
        pd.DataFrame({"a": range(101)}),
        {"a": np.zeros(101)},
    ):
        with pytest.raises(Unwritable, match="more than 100 values"):
            as_json(value)


def test_a_long_array_says_what_is_left_out() -> None:
    text = written(np.zeros((5_000, 64)))
    rows, note = text.split("\n")
    assert np.array(json.loads(rows)).shape == (31, 64)
    assert note == "(first 31 of 5,000 rows; shape 5,000 × 64)"
    assert written(np.arange(3_000)).endswith("1999]\n(first 2,000 of 3,000 values; shape 3,000)")
    assert written(np.zeros((2, 5_000))).endswith("\n(first 2,000 of 10,000 values; shape 2 × 5,000)")


def test_sets_are_written_the_same_in_each_run() -> None:
    code = "from llmkit.notebook.values import written; print(written({'a', 'b', 'c', 1, None}))"
    said = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(said) == 1


def test_nothing_heavy_is_loaded_to_write_plain_values() -> None:
    code = (
        "import sys; from llmkit.notebook.template import render\n"
        "render('{{ [1, {2: 3}] }} {{ 1 }} {{ [{1: 2}] | table }} {{ 1 | tokens }}')\n"
        "print(sorted({'pandas', 'numpy', 'pydantic', 'PIL', 'tiktoken'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_columns_of_one_name_are_all_there_in_json() -> None:
    frame = pd.DataFrame([[1, 2, 3, 4]], columns=["a", "a", 1, "1"], index=pd.Index(["x"], name="a"))
    assert json.loads(as_json(frame)) == [{"a": "x", "a (2)": 1, "a (3)": 2, "1": 3, "1 (2)": 4}]
