"""Where an answer appears, apart from the notebook itself (test_kernel.py)."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import pytest

from llmkit.notebook import display
from llmkit.notebook.display import Final, Live, Quiet, Terminal, view_for
from llmkit.notebook.footer import Part


class Screen(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def show(monkeypatch):
    """Draw on a screen; what was written to it."""

    def show(draw):
        screen = Screen()
        with monkeypatch.context() as patch:  # not in the fixture itself: pytest changes stdout between setup and test
            patch.setattr(sys, "stdout", screen)
            draw()
        return screen.getvalue()

    return show


FOOTER = [Part("tiny"), Part("$0")]


def answer(text):
    return SimpleNamespace(text=text, as_json=text)


def test_the_view_suits_the_place() -> None:
    terminal, kernel = SimpleNamespace(), SimpleNamespace(kernel=object())
    assert isinstance(view_for(kernel, "live", "markdown", quiet=False), Live)
    assert isinstance(view_for(terminal, "live", "markdown", quiet=False), Terminal)
    assert isinstance(view_for(kernel, "final", "markdown", quiet=False), Final)
    assert isinstance(view_for(kernel, "final", "markdown", quiet=True), Quiet)


def test_a_terminal_has_one_line_of_status_which_goes_when_text_comes(show) -> None:
    view = Terminal("markdown")
    assert show(lambda: view.waiting("waiting …")) == "\r\x1b[2K\x1b[2mwaiting …\x1b[0m"
    assert show(lambda: view.waiting("waiting …")) == ""
    assert show(lambda: view.growing("Hello", "answering")) == "\r\x1b[2KHello"
    assert show(lambda: view.growing("Hello the", "answering")) == " the"
    assert show(lambda: view.done(answer("Hello there"), FOOTER)) == "re\n\n\x1b[2mtiny · $0\x1b[0m\n"


def test_a_status_is_no_longer_than_a_line_of_the_terminal(show, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    shown = show(lambda: Terminal("markdown").waiting("busy " * 20))
    assert len(shown) == len("\r\x1b[2K\x1b[2m" + "\x1b[0m") + 39


def test_a_terminal_without_an_answer_is_left_clean(show) -> None:
    view = Terminal("markdown")
    show(lambda: view.waiting("waiting …"))
    assert show(lambda: view.done(None, [])) == "\r\x1b[2K"


def test_what_must_be_whole_has_a_status_until_then(show) -> None:
    view = Terminal("json")
    assert "answering" in show(lambda: view.growing('{"a":', "answering"))
    assert show(lambda: view.done(answer('{"a":1}'), [])) == '\r\x1b[2K{\n  "a": 1\n}\n'


def test_an_escape_in_two_halves_commands_nothing(show) -> None:
    view = Terminal("text")
    assert show(lambda: view.growing("a\x1b", "")) == "a"
    assert show(lambda: view.growing("a\x1b[2Jb", "")) == "[2Jb"


class Frontend:
    """What a notebook shows: its outputs, in their places."""

    def __init__(self):
        self.outputs = []
        self.idents = {}
        self.messages = 0

    def publish(self, data, about=None, *, transient=None, update=False):
        self.messages += 1
        if update:
            self.outputs[self.idents[transient["display_id"]]] = data
            return
        if transient:
            assert transient["display_id"] not in self.idents
            self.idents[transient["display_id"]] = len(self.outputs)
        self.outputs.append(data)

    @property
    def shown(self):
        return [data["text/plain"] for data in self.outputs if data]

    @property
    def drawn(self):
        return self.outputs[0]["text/markdown"]


@pytest.fixture
def frontend(monkeypatch):
    frontend = Frontend()
    monkeypatch.setattr(display, "publish", frontend.publish)
    monkeypatch.setattr(display, "metadata", lambda reply: {})
    return frontend


def test_an_answer_grows_in_a_frame_and_ends_below_it(frontend) -> None:
    view = Live("markdown")
    view.waiting("waiting …")
    view.waiting("waiting …")
    assert (frontend.shown, frontend.messages) == (["waiting …"], 2)
    view.growing("Hello **the", "answering …")
    assert frontend.shown == ["Hello **the\n\nanswering …"]
    assert frontend.drawn.startswith("Hello **the**\n\n<div ")
    view.growing("Hello **the", "answering …")
    assert frontend.messages == 3
    view.done(answer("Hello **there**."), FOOTER)
    assert frontend.shown == ["Hello **there**.", "tiny · $0"]


def test_the_frame_begins_and_ends_as_nothing(frontend) -> None:
    """What compares notebooks without following updates sees what was put out first."""
    first = []
    frontend.outputs, kept = first, frontend.outputs
    view = Live("markdown")
    view.waiting("waiting …")
    view.growing("Hello", "answering …")
    view.done(answer("Hello."), FOOTER)
    assert kept == []
    assert [sorted(data) for data in first] == [[], ["text/markdown", "text/plain"], ["text/html", "text/plain"]]


def test_the_answer_is_there_before_the_frame_goes(frontend, monkeypatch) -> None:
    """A kernel that dies in between leaves it twice rather than not at all."""
    view = Live("markdown")
    view.growing("Hello", "answering …")
    seen = []
    monkeypatch.setattr(
        display, "publish", lambda data, about=None, **more: seen.append((data.get("text/plain"), more))
    )
    view.done(answer("Hello."), FOOTER)
    assert [text for text, _ in seen] == ["Hello.", "tiny · $0", None]
    assert seen[-1][1]["update"] is True


def test_a_quick_answer_has_the_outputs_of_a_slow_one(frontend) -> None:
    """What a cell is saved with does not depend on how quick the answer was: a replay is quicker than the call."""
    Live("markdown").done(answer("Hello."), FOOTER)
    assert (frontend.shown, frontend.messages, len(frontend.outputs)) == (["Hello.", "tiny · $0"], 3, 3)


def test_a_status_without_an_answer_becomes_what_was_tried(frontend) -> None:
    view = Live("markdown")
    view.done(None, [])
    assert frontend.shown == []
    view.waiting("waiting …")
    view.done(None, FOOTER)
    assert frontend.shown == ["tiny · $0"]


def test_a_very_long_answer_is_drawn_up_to_a_length(frontend) -> None:
    view = Live("markdown")
    view.growing("word " * 100_000, "answering …")
    assert len(frontend.drawn) < display.LONGEST_DRAWN + 2_000
    assert "500,000 characters so far" in frontend.drawn
    view.done(answer("word " * 100_000), FOOTER)
    assert frontend.shown[0] == "word " * 100_000


@pytest.mark.parametrize("form", ["markdown", "text", "json", "code", "html"])
def test_a_hostile_text_is_harmless_while_it_grows_and_when_it_is_whole(frontend, form) -> None:
    hostile = "a <img src=x onerror=alert(1)>\n\n```\n</style><script>alert(1)</script>"
    status = "<script>alert(1)</script>"
    view = Live(form)
    for at in range(1, len(hostile)):
        view.growing(hostile[:at], status)
        shown = frontend.drawn.partition("```")[0]  # what is in a fence is text
        assert "<img" not in shown
        assert "<script" not in frontend.drawn.rpartition("```")[2]
    view.done(answer(hostile), [Part(status)])
    assert all("text/html" not in data or "<script" not in data["text/html"] for data in frontend.outputs)
