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
    return SimpleNamespace(text=text)


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
        self.outputs = {}
        self.messages = 0

    def publish(self, data, about=None, *, transient, update):
        ident = transient["display_id"]
        assert update == (ident in self.outputs)
        self.outputs[ident] = data["text/plain"]
        self.messages += 1

    @property
    def shown(self):
        return list(self.outputs.values())


@pytest.fixture
def frontend(monkeypatch):
    frontend = Frontend()
    monkeypatch.setattr(display, "_publish", frontend.publish)
    monkeypatch.setattr(display, "metadata", lambda reply: {})
    return frontend


def test_a_notebook_shows_the_status_where_the_answer_will_be(frontend) -> None:
    view = Live("markdown")
    view.waiting("waiting …")
    view.waiting("waiting …")
    assert (frontend.shown, frontend.messages) == (["waiting …"], 1)
    view.growing("Hello", "answering …")
    assert frontend.shown == ["Hello", "answering …"]
    view.growing("Hello there", "answering …")
    view.done(answer("Hello there."), FOOTER)
    assert frontend.shown == ["Hello there.", "tiny · $0"]


def test_a_notebook_shows_a_quick_answer_without_status(frontend) -> None:
    Live("markdown").done(answer("Hello."), FOOTER)
    assert (frontend.shown, frontend.messages) == (["Hello.", "tiny · $0"], 2)


def test_a_status_without_an_answer_becomes_what_was_tried(frontend) -> None:
    view = Live("markdown")
    view.done(None, [])
    assert frontend.shown == []
    view.waiting("waiting …")
    view.done(None, FOOTER)
    assert frontend.shown == ["tiny · $0"]
