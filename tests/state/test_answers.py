"""Where a notebook's answers are kept: bounds, damage, modes, several processes."""

from __future__ import annotations

import multiprocessing
import os
import stat

import pytest

from llmkit.errors import StoreError
from llmkit.state.answers import MemoryAnswers, SQLiteAnswers, answers_path, open_answers


@pytest.fixture(params=["memory", "sqlite"])
def opened(request, tmp_path):
    made = []

    def make(**bounds):
        path = tmp_path / "ledger.answers.sqlite3"
        made.append(MemoryAnswers(**bounds) if request.param == "memory" else SQLiteAnswers(path, **bounds))
        return made[-1]

    yield make
    for each in made:
        each.close()


def ids(records):
    return [each.request_id for each in records]


def test_what_is_kept_is_found_by_the_beginning_of_its_id(opened) -> None:
    answers = opened()
    for name in ("aa1", "aa2", "b%"):
        answers.put(name, name.encode())
    assert ids(answers.find("aa")) == ["aa2", "aa1"]  # the newest first
    assert ids(answers.find("b%")) == ["b%"]
    assert answers.find("%") == answers.find("_") == answers.find("aa3") == []
    assert answers.newest() == ("b%", b"b%")
    assert ids(answers.find("", 2)) == ["b%", "aa2"]


def test_nothing_is_there_at_first(opened) -> None:
    assert opened().newest() is None
    assert opened().clear() == 0


def test_a_record_replaces_the_one_of_the_same_id(opened) -> None:
    answers = opened()
    answers.put("a", b"1")
    answers.put("b", b"2")
    answers.put("a", b"3")
    assert answers.newest() == ("a", b"3")
    assert len(answers.find("")) == 2


def test_the_oldest_go_first_by_number_and_by_bytes(opened) -> None:
    answers = opened(most=3, max_bytes=100)
    for number in range(5):
        answers.put(f"r{number}", b"x")
    assert ids(answers.find("")) == ["r4", "r3", "r2"]
    answers.put("long", b"x" * 99)
    assert ids(answers.find("")) == ["long", "r4"]
    answers.put("longer", b"x" * 101)
    assert ids(answers.find("")) == ["long", "r4"]


def test_clearing_leaves_nothing_on_the_disk(opened, tmp_path) -> None:
    answers = opened()
    answers.put("a", b"a secret of the user's" * 100)
    assert answers.clear() == 1
    assert answers.newest() is None
    left = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"a secret" not in left


def test_the_file_is_its_owners_alone(tmp_path) -> None:
    path = tmp_path / "new" / "ledger.answers.sqlite3"
    answers = SQLiteAnswers(path)
    answers.put("a", b"x")
    modes = {stat.S_IMODE(each.stat().st_mode) for each in path.parent.iterdir()}
    answers.close()
    assert modes == {0o600}
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_damaged_file_is_moved_aside_and_a_new_one_begun(tmp_path, caplog) -> None:
    path = tmp_path / "ledger.answers.sqlite3"
    path.write_bytes(b"this is no database at all" * 100)
    path.chmod(0o600)
    answers = SQLiteAnswers(path)
    answers.put("a", b"x")
    assert answers.newest() == ("a", b"x")
    answers.close()
    assert (tmp_path / "ledger.answers.sqlite3.damaged").exists()
    assert "a new one is begun" in caplog.text


def test_rows_that_are_not_what_they_should_be_are_not_there(tmp_path) -> None:
    answers = SQLiteAnswers(tmp_path / "ledger.answers.sqlite3")
    answers.put("a", b"x")
    answers._run(lambda connection: connection.execute("UPDATE answers SET record = 'a text'"))
    assert answers.newest() is None
    answers.close()


def test_what_cannot_be_written_is_an_error(tmp_path) -> None:
    (tmp_path / "taken").write_text("a file, not a folder")
    with pytest.raises(StoreError):
        SQLiteAnswers(tmp_path / "taken" / "ledger.answers.sqlite3")


def _put_many(path, name):
    answers = SQLiteAnswers(path)
    for number in range(50):
        answers.put(f"{name}{number}", b"x")
    answers.close()


def test_two_processes_write_to_one_file(tmp_path) -> None:
    path = tmp_path / "ledger.answers.sqlite3"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_put_many, args=(path, name)) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0]
    answers = SQLiteAnswers(path)
    assert len(answers.find("", 1000)) == 100
    answers.close()


def test_it_stands_beside_the_ledger_or_in_memory(tmp_path, monkeypatch) -> None:
    assert answers_path("memory") is None
    assert answers_path(f"sqlite:///{tmp_path}/my.db") == tmp_path / "my.answers.sqlite3"
    monkeypatch.setenv("LLMKIT_DATA_DIR", os.fspath(tmp_path))
    assert answers_path("redis://localhost/0") == tmp_path / "ledger.answers.sqlite3"
    assert isinstance(open_answers("memory"), MemoryAnswers)
