"""What is written down of one call, and what is read back of it."""

from __future__ import annotations

import json

import pytest

from llmkit.call import Message
from llmkit.errors import StoreError
from llmkit.events import AttemptStarted, CacheLooked
from llmkit.notebook.footer import Part
from llmkit.notebook.kept import LONGEST_QUESTION, History, Kept
from llmkit.notebook.life import Life, Moment
from llmkit.state.answers import MemoryAnswers

KEPT = Kept(
    request_id="r1",
    started=1.5,
    model="tiny",
    question="What?",
    answer="*This* \ud800.",
    ending="interrupted",
    footer=(Part("tiny"), Part("interrupted", warns=True), Part("a note", warns=True, below=True)),
    about={"llmkit": {"request_id": "r1"}},
    life=(Moment(0.0, "cache: a miss (use)"), Moment(1.25, "attempt 1: sent to a:b")),
)


def lived(*said):
    life = Life()
    for each in said or (CacheLooked("r1", "use", "miss"), AttemptStarted("r1", "a:b", 1)):
        life.hear(each)
    return life


def test_what_is_written_is_read_back() -> None:
    again = Kept.read(KEPT.written())
    assert again is not None
    assert again.answer == "*This* ?."  # no text that a file could hold
    assert (again.footer, again.life, again.about) == (KEPT.footer, KEPT.life, KEPT.about)
    assert not again.is_whole


@pytest.mark.parametrize(
    "change",
    [
        {"started": "now"},
        {"started": None},
        {"answer": 7},
        {"footer": [["a"]]},
        {"footer": "text"},
        {"footer": [7]},
        {"life": [["soon", "text"]]},
        {"life": [[0.0]]},
        {"about": []},
        {"extra": 1},
    ],
)
def test_what_is_not_as_it_should_be_is_not_there(change) -> None:
    record = json.loads(KEPT.written()) | change
    assert Kept.read(json.dumps(record).encode()) is None


@pytest.mark.parametrize("record", [b"", b"\xff", b"null", b"[1]", b"{}", b"[" * 50_000, b"1e999"])
def test_what_is_no_record_is_not_there(record) -> None:
    assert Kept.read(record) is None


def test_what_a_file_says_is_tidied() -> None:
    record = json.loads(KEPT.written()) | {"footer": [["a\x1b[2J" + "x" * 9_000, 1, 0]], "life": [[0, "b\x07\nc"]]}
    again = Kept.read(json.dumps(record).encode())
    assert again is not None
    assert "\x1b" not in again.footer[0].text
    assert len(again.footer[0].text) <= 2_000
    assert again.life == (Moment(0.0, "b c"),)


def test_a_call_that_never_came_to_an_answer_is_kept_with_its_life() -> None:
    history = History(MemoryAnswers)
    history.keep([Message("user", "first"), Message("user", "last " * 10_000)], lived(), None, KeyboardInterrupt())
    kept = history.of("r1")
    assert kept is not None
    assert (kept.ending, kept.answer) == ("interrupted", "")
    assert kept.question.startswith("last last")
    assert kept.question.endswith(f" … and {50_000 - LONGEST_QUESTION:,} characters more")
    assert [moment.text for moment in kept.life] == ["cache: a miss (use)", "attempt 1: sent to a:b"]
    assert history.last == "r1"


def test_a_cell_that_made_no_call_leaves_nothing() -> None:
    history = History(MemoryAnswers)
    history.keep("hi", Life(), None, ValueError())
    assert history.newest() is history.last is None


def test_keeping_never_fails(caplog) -> None:
    def opening():
        raise StoreError("no room")

    history = History(opening)
    history.keep("hi", lived(), None, KeyboardInterrupt())
    assert history.of("r1") is not None  # in memory
    assert "no room" in caplog.text
    history.keep(7, lived(), None, KeyboardInterrupt())
    assert "is not kept" in caplog.text
