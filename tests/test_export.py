"""The ledger as a file."""

from __future__ import annotations

import builtins
import csv
import json
import os
import stat
import sys
import tracemalloc
from decimal import Decimal
from types import ModuleType

import pytest

import llmkit
from llmkit.errors import ConfigError, StoreError
from llmkit.export import ATTEMPT, CALL, FORMATS, export
from tests.test_spending import NOW, Books

CALLS = {"request_id": "a", "started": NOW, "tags": {}, "cost_usd": Decimal("0.000000001")}


def call(**more):
    return {**CALLS, **more}


def attempt(**more):
    return {"number": 1, "started": NOW, "provider": "openai", "model": "gpt", "maybe_billed": False, **more}


PAGES = [
    [(call(tags={"app": "docs"}), [attempt(cost_usd=Decimal("0.5")), attempt(number=2, cost_usd=None)])],
    [(call(request_id="b", user="ana", message='café,\n"x"'), [])],
]


@pytest.mark.parametrize("form", [".csv", ".jsonl"])
def test_a_file_is_its_owners_alone_and_nothing_is_left_beside_it(tmp_path, form) -> None:
    path = tmp_path / f"calls{form}"
    assert export(PAGES, path) == 2
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_csv_has_a_line_an_attempt_and_one_for_a_call_without(tmp_path) -> None:
    export(PAGES, tmp_path / "calls.csv")
    with (tmp_path / "calls.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [*lines[0]] == [*CALL, *(f"attempt_{name}" for name in ATTEMPT)]
    assert [(line["request_id"], line["attempt_number"], line["attempt_cost_usd"]) for line in lines] == [
        ("a", "1", "0.5"),
        ("a", "2", ""),
        ("b", "", ""),
    ]
    assert lines[0]["started"] == "2026-11-21T12:00:00.000000+00:00"
    assert (lines[0]["cost_usd"], lines[0]["tags"], lines[0]["attempt_maybe_billed"]) == (
        "1e-09",
        '{"app": "docs"}',
        "false",
    )
    assert (lines[2]["user"], lines[2]["message"], lines[2]["tags"]) == ("ana", 'café,\n"x"', "")


def test_jsonl_has_a_line_a_call_with_its_attempts(tmp_path) -> None:
    export(PAGES, tmp_path / "calls.JSONL")
    first, second = map(json.loads, (tmp_path / "calls.JSONL").read_text("utf-8").splitlines())
    assert [*first] == [*CALL, "attempts"]
    assert [(each["number"], each["cost_usd"]) for each in first["attempts"]] == [(1, 0.5), (2, None)]
    assert (first["tags"], first["cost_usd"], second["attempts"]) == ({"app": "docs"}, 1e-09, [])


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x", "\t=1", "\r=1", "  =1", "＝1", "\n-1"])
def test_a_cell_is_no_formula(tmp_path, text) -> None:
    page = [(call(user=text, model=text, message=text), [attempt(error=text, provider_request_id=text)])]
    export([page], tmp_path / "calls.csv")
    with (tmp_path / "calls.csv").open(encoding="utf-8", newline="") as file:
        (line,) = csv.DictReader(file)
    for name in ("user", "model", "message", "attempt_error", "attempt_provider_request_id"):
        assert line[name] == f"'{text}"
    export([page], tmp_path / "calls.jsonl")
    assert json.loads((tmp_path / "calls.jsonl").read_text("utf-8"))["user"] == text


def test_a_lone_surrogate_is_written_all_the_same(tmp_path) -> None:
    for form in (".csv", ".jsonl"):
        export([[(call(user="\ud800"), [])]], tmp_path / f"calls{form}")
        assert "?" in (tmp_path / f"calls{form}").read_text("utf-8")


def test_a_file_that_is_there_is_kept_unless_asked(tmp_path) -> None:
    path = tmp_path / "calls.csv"
    path.write_text("mine", "utf-8")
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="is there already"):
        export(PAGES, path)
    assert path.read_text("utf-8") == "mine"
    assert export(PAGES, path, overwrite=True) == 2
    assert path.read_text("utf-8").startswith("request_id,")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_file_that_comes_meanwhile_is_kept(tmp_path) -> None:
    path = tmp_path / "calls.csv"

    def pages():
        yield PAGES[0]
        path.write_text("mine", "utf-8")

    with pytest.raises(ConfigError, match="is there already"):
        export(pages(), path)
    assert path.read_text("utf-8") == "mine"
    assert [each.name for each in tmp_path.iterdir()] == ["calls.csv"]


def test_a_link_is_not_followed(tmp_path) -> None:
    target, link = tmp_path / "target", tmp_path / "calls.csv"
    link.symlink_to(target)
    with pytest.raises(ConfigError, match="is there already"):
        export(PAGES, link)
    export(PAGES, link, overwrite=True)
    assert not target.exists()
    assert not link.is_symlink()


@pytest.mark.parametrize("there", [False, True])
def test_a_drive_without_hard_links(tmp_path, monkeypatch, there) -> None:
    path = tmp_path / "calls.csv"

    def refuse(*_):
        if there:
            path.write_text("mine", "utf-8")
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    if there:
        with pytest.raises(ConfigError, match="is there already"):
            export(PAGES, path)
        assert path.read_text("utf-8") == "mine"
    else:
        assert export(PAGES, path) == 2
        assert path.exists()


def test_what_breaks_off_leaves_nothing(tmp_path) -> None:
    def pages():
        yield PAGES[0]
        raise StoreError("the ledger is gone")

    with pytest.raises(StoreError, match="is gone"):
        export(pages(), tmp_path / "calls.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_clear_error(tmp_path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full here")

    class Full:
        def __init__(self, file):
            self._full = open("/dev/full", "wb", buffering=0)  # noqa: SIM115

        def write(self, page):
            with self._full:
                self._full.write(b"x")

        def close(self):
            pass

    import llmkit.export as module

    before = module._WRITERS[".csv"]
    module._WRITERS[".csv"] = Full
    try:
        with pytest.raises(StoreError, match=r"cannot be written: No space left") as caught:
            export(PAGES, tmp_path / "calls.csv")
    finally:
        module._WRITERS[".csv"] = before
    assert caught.value.next_step == "choose another place"
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"exported as \.csv, \.jsonl, \.parquet"):
        export(PAGES, tmp_path / "calls.xlsx")
    with pytest.raises(ConfigError, match="there is no folder"):
        export(PAGES, tmp_path / "nowhere" / "calls.csv")
    assert set(FORMATS) == {".csv", ".jsonl", ".parquet"}


def test_parquet_without_pyarrow_says_what_to_do(tmp_path, monkeypatch) -> None:
    real = builtins.__import__

    def without(name, *rest):
        if name.partition(".")[0] == "pyarrow":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match="Parquet needs pyarrow") as caught:
        export(PAGES, tmp_path / "calls.parquet")
    assert "pip install pyarrow" in caught.value.next_step
    assert list(tmp_path.iterdir()) == []


def test_parquet_gets_exact_money_and_nested_attempts(tmp_path, monkeypatch) -> None:
    """With a stand-in for pyarrow that keeps what it is given; the real one is not needed to develop llmkit."""
    pa, parquet, written = ModuleType("pyarrow"), ModuleType("pyarrow.parquet"), []
    for name in ("string", "int64", "float64", "bool_"):
        setattr(pa, name, lambda name=name: name)
    pa.decimal128 = lambda *size: ("decimal", *size)
    pa.timestamp = lambda unit, tz: ("timestamp", unit, tz)
    pa.map_ = lambda *kinds: ("map", *kinds)
    pa.struct = pa.schema = list
    pa.list_ = lambda kind: ("list", kind)

    class Table:
        @staticmethod
        def from_pylist(lines, schema):
            return lines

    class ParquetWriter:
        def __init__(self, file, schema):
            written.append(dict(schema))

        def write_table(self, lines):
            written.extend(lines)

        def close(self):
            written.append("closed")

    pa.Table, parquet.ParquetWriter, pa.parquet = Table, ParquetWriter, parquet
    monkeypatch.setitem(sys.modules, "pyarrow", pa)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)
    assert export(PAGES, tmp_path / "calls.parquet") == 2
    schema, first, second, end = written
    assert (schema["cost_usd"], schema["started"]) == (("decimal", 38, 9), ("timestamp", "us", "UTC"))
    assert (first["cost_usd"], first["started"], first["tags"]) == (
        Decimal("0.000000001"),
        NOW * 10**6,
        [("app", "docs")],
    )
    assert [each["cost_usd"] for each in first["attempts"]] == [Decimal("0.5"), None]
    assert (second["attempts"], end) == ([], "closed")


# -- of a real ledger --------------------------------------------------------------------------------------------------


@pytest.fixture(params=["sqlite", "memory"])
def books(request, tmp_path):
    return Books("memory" if request.param == "memory" else f"sqlite://{tmp_path}/ledger.sqlite3")


def test_every_call_of_the_ledger_is_in_it_once(books, tmp_path) -> None:
    for number in range(25):
        books.call(NOW - number, ("gpt", number), ("mini", 1), user="ana", app="docs")
    books.call(NOW - 100, saved=17)
    for size in (1, 7, 1000):
        pages = list(books.client.ledger.pages(size))
        assert [len(page) for page in pages[:-1]] == [size] * (len(pages) - 1)
        assert export(pages, tmp_path / f"{size}.jsonl") == 26
    assert books.client.export(tmp_path / "all.jsonl") == 26
    contents = {(tmp_path / name).read_bytes() for name in ("1.jsonl", "7.jsonl", "1000.jsonl", "all.jsonl")}
    assert len(contents) == 1
    lines = [json.loads(line) for line in contents.pop().splitlines()]
    assert lines[0]["saved_usd"] == 17e-9
    assert [line["started"] for line in lines] == sorted(line["started"] for line in lines)
    assert [each["cost_usd"] for each in lines[-1]["attempts"]] == [0.0, 1e-9]
    assert set(lines[-1]) == {*CALL, "attempts"}


def test_calls_that_begin_meanwhile_do_not_make_it_endless(books, tmp_path) -> None:
    for number in range(4):
        books.call(NOW - number, ("gpt", 1))
    seen = 0
    for page in books.client.ledger.pages(1):
        seen += len(page)
        books.call(NOW + 1, ("gpt", 1))
        assert seen < 10
    assert seen == 4


def test_memory_stays_small_however_long_the_ledger_is(tmp_path) -> None:
    books = Books(f"sqlite://{tmp_path}/ledger.sqlite3")
    for number in range(3000):
        books.call(NOW - number, ("gpt", 1), user="x" * 100)
    tracemalloc.start()
    try:
        for page in books.client.ledger.pages(100):
            assert len(page) == 100
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        books.client.ledger.calls()
        _, everything = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak * 5 < everything


def test_the_sync_client_has_it_as_well(tmp_path) -> None:
    with llmkit.Client(model="simulator", state={"url": "memory"}) as client:
        client.complete("hi", user="ana")
        assert client.export(str(tmp_path / "calls.csv")) == 1
        with pytest.raises(ConfigError, match="is there already"):
            client.export(tmp_path / "calls.csv")
        assert client.export(tmp_path / "calls.csv", overwrite=True) == 1


def test_rows_from_before_and_after_a_fall_back_are_in_it(tmp_path) -> None:
    books = Books(f"sqlite://{tmp_path}/ledger.sqlite3")
    books.call(NOW, ("gpt", 1))
    books.client.ledger._fall_back(StoreError("the disk is gone"))
    books.call(NOW, ("mini", 2))
    assert books.client.export(tmp_path / "calls.jsonl") == 2
    assert sorted(books.spend()["model"]) == ["openai:gpt", "openai:mini"]
