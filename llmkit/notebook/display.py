"""Where an answer appears: live in a notebook, as text in a terminal, once at the end, or nowhere.

A view only draws, and only in the cell's own thread; when to draw is decided by `llmkit.notebook.asking`.
"""

from __future__ import annotations

import sys
import uuid
from typing import TYPE_CHECKING, Any, Protocol

from llmkit.notebook.footer import as_html, as_text, metadata, status_html
from llmkit.notebook.formats import bundle, plain

if TYPE_CHECKING:
    from collections.abc import Sequence

    from IPython.core.interactiveshell import InteractiveShell

    from llmkit.notebook.footer import Part
    from llmkit.reply import Reply

__all__ = ["View", "view_for"]


class View(Protocol):
    """What a cell shows of one call. ``timings``: whether its footer may say what differs from run to run."""

    timings: bool

    def waiting(self, status: str) -> None:
        """No text yet; ``status`` says what goes on."""

    def growing(self, text: str, status: str) -> None:
        """This much of the answer has arrived."""

    def done(self, reply: Reply | None, footer: Sequence[Part]) -> None:
        """It has ended; ``reply`` is None where there is no text."""


def view_for(shell: InteractiveShell, mode: str, form: str, *, quiet: bool) -> View:
    """The view that suits where the cell runs."""
    if quiet:
        return Quiet()
    if mode == "final":
        return Final(form)
    return Live(form) if hasattr(shell, "kernel") else Terminal(form)


class Quiet:
    """Shows nothing."""

    timings = True

    def waiting(self, status: str) -> None:
        pass

    def growing(self, text: str, status: str) -> None:
        pass

    def done(self, reply: Reply | None, footer: Sequence[Part]) -> None:
        pass


class Final:
    """Answer and footer, each displayed once at the end: what nbval and other comparisons need."""

    timings = False

    def __init__(self, form: str) -> None:
        self._form = form

    def waiting(self, status: str) -> None:
        pass

    def growing(self, text: str, status: str) -> None:
        pass

    def done(self, reply: Reply | None, footer: Sequence[Part]) -> None:
        if reply is not None:
            _publish(bundle(reply.text, self._form), metadata(reply))
        if footer:
            _publish(_footer(footer))


class Live:
    """Two outputs of a notebook cell that are drawn anew: the answer, and below it the status that becomes the footer.

    Until text arrives the upper one holds the status.
    """

    timings = True

    def __init__(self, form: str) -> None:
        self._form = form
        self._answer = _Output()
        self._below = _Output()

    def waiting(self, status: str) -> None:
        self._answer.show({"text/html": status_html(status), "text/plain": status})

    def growing(self, text: str, status: str) -> None:
        self._answer.show(bundle(text, self._form))
        self._below.show({"text/html": status_html(status), "text/plain": status})

    def done(self, reply: Reply | None, footer: Sequence[Part]) -> None:
        if reply is None:
            if footer or self._answer.shown:
                self._answer.show(_footer(footer))
            return
        self._answer.show(bundle(reply.text, self._form), metadata(reply))
        self._below.show(_footer(footer))


class _Output:
    """One output of a cell that can be drawn anew."""

    def __init__(self) -> None:
        self.shown: dict[str, str] | None = None
        self._id = uuid.uuid4().hex

    def show(self, data: dict[str, str], about: dict[str, Any] | None = None) -> None:
        if data == self.shown and about is None:
            return
        _publish(data, about, transient={"display_id": self._id}, update=self.shown is not None)
        self.shown = data


class Terminal:
    """Text as it arrives, for IPython in a terminal. What must be seen whole to be shown right is printed at the end."""

    timings = True

    def __init__(self, form: str) -> None:
        self._form = form
        self._streams = form in {"markdown", "text"}
        self._printed = 0
        self._status = ""
        self._ends_line = True

    def waiting(self, status: str) -> None:
        if status != self._status and sys.stdout.isatty():
            self._write(f"\r\x1b[2K\x1b[2m{plain(status)[:100]}\x1b[0m")
            self._status = status

    def growing(self, text: str, status: str) -> None:
        if not self._streams:
            self.waiting(status)
            return
        self._clear_status()
        more = plain(text[self._printed :])
        self._printed = len(text)
        self._write(more)
        self._ends_line = more.endswith("\n") if more else self._ends_line

    def done(self, reply: Reply | None, footer: Sequence[Part]) -> None:
        self._clear_status()
        if reply is not None:
            rest = reply.text[self._printed :] if self._streams else bundle(reply.text, self._form)["text/plain"]
            self._write(plain(rest))
            self._ends_line = rest.endswith("\n") if rest else self._ends_line
        if not self._ends_line:
            self._write("\n")
        if footer:
            line = plain(as_text(footer))
            if reply is not None:
                self._write("\n")
            self._write(f"\x1b[2m{line}\x1b[0m\n" if sys.stdout.isatty() else f"{line}\n")

    def _clear_status(self) -> None:
        if self._status:
            self._write("\r\x1b[2K")
            self._status = ""

    @staticmethod
    def _write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


def _publish(data: dict[str, str], about: dict[str, Any] | None = None, **more: Any) -> None:
    from IPython.display import publish_display_data

    publish_display_data(data, about or {}, **more)  # type: ignore[no-untyped-call]


def _footer(parts: Sequence[Part]) -> dict[str, str]:
    return {"text/html": as_html(parts), "text/plain": plain(as_text(parts))}
