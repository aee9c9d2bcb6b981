"""Where an answer appears: live in a notebook, as text in a terminal, once at the end, or nowhere.

A view only draws, and only in the cell's own thread; when to draw is decided by `llmkit.notebook.asking`.
"""

from __future__ import annotations

import sys
import uuid
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Any, Protocol

from llmkit.notebook.footer import as_html, as_text, metadata, status_html
from llmkit.notebook.formats import bundle, growing_markdown, plain

if TYPE_CHECKING:
    from collections.abc import Sequence

    from IPython.core.interactiveshell import InteractiveShell

    from llmkit.notebook.footer import Part
    from llmkit.reply import Reply

__all__ = ["HANDING_OVER", "Frame", "View", "publish", "view_for"]

LONGEST_DRAWN = 200_000
"""Characters of an answer up to which it is seen to grow: each drawing sends and renders all of them."""

# What is put out below the frame stays hidden until the frame is empty, so that the page changes in one step: neither
# is the answer ever there twice, nor not at all. Where the page is no JupyterLab it does nothing.
_CHILD = ".jp-OutputArea-child"
HANDING_OVER = (
    f'<style class="llmkit-live">{_CHILD}:has(.llmkit-live) ~ {_CHILD}:not(:has(.llmkit-live))'
    "{height:0!important;min-height:0!important;margin:0!important;padding:0!important;overflow:hidden!important}</style>"
)


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
            publish(_bundle(reply, self._form), metadata(reply))
        if footer:
            publish(_footer(footer))


class Live:
    """A notebook cell in which the answer grows in a frame; in the end the frame is empty and the answer an output.

    What a saved notebook holds is then what was put out first, and no output that was updated: tools that compare
    notebooks, nbval among them, do not follow updates. An empty frame takes no space, and they do not see it.
    """

    timings = True

    def __init__(self, form: str) -> None:
        self._form = form
        self._frame = Frame()

    def waiting(self, status: str) -> None:
        self._frame.show("", status)

    def growing(self, text: str, status: str) -> None:
        if len(text) > LONGEST_DRAWN:
            status = f"{status} {len(text):,} characters so far; what follows is shown at the end"
            text = text[:LONGEST_DRAWN]
        self._frame.show(growing_markdown(text, self._form), status, text)

    def done(self, reply: Reply | None, footer: Sequence[Part]) -> None:
        self._frame.begin()  # also where nothing grew: which outputs a cell has must not depend on how quick it was
        if reply is not None:
            publish(_bundle(reply, self._form), metadata(reply))
        if footer:
            publish(_footer(footer))
        self._frame.empty()


class Frame:
    """One output of a cell that is drawn anew; it begins and ends without any content."""

    def __init__(self) -> None:
        self._is_there = False
        self._shown: tuple[str, str] | None = None
        self._id = uuid.uuid4().hex

    def begin(self) -> None:
        if not self._is_there:
            self._is_there = True
            publish({}, transient={"display_id": self._id})

    def show(self, markdown: str, status: str, text: str = "") -> None:
        self.begin()
        if (markdown, status) != self._shown:
            below = f"{status_html(status)}{HANDING_OVER}"
            lines = f"{plain(text)}\n\n{status}" if text else status
            self._update({"text/markdown": f"{markdown}\n\n{below}" if markdown else below, "text/plain": lines})
            self._shown = (markdown, status)

    def empty(self) -> None:
        if self._shown is not None:
            self._update({})

    def _update(self, data: dict[str, str]) -> None:
        publish(data, transient={"display_id": self._id}, update=True)


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
            room = max(20, get_terminal_size().columns - 1)  # of a line that is broken only the end could be taken back
            self._write(f"\r\x1b[2K\x1b[2m{plain(status)[:room]}\x1b[0m")
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
            rest = reply.text[self._printed :] if self._streams else _bundle(reply, self._form)["text/plain"]
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


def publish(data: dict[str, str], about: dict[str, Any] | None = None, **more: Any) -> None:
    """Put out a MIME bundle, with ``about`` as its metadata."""
    from IPython.display import publish_display_data

    publish_display_data(data, about or {}, **more)  # type: ignore[no-untyped-call]


def _bundle(reply: Reply, form: str) -> dict[str, str]:
    """What is put out of the answer: as JSON, what was checked alone."""
    return bundle(reply.as_json if form == "json" else reply.text, form)


def _footer(parts: Sequence[Part]) -> dict[str, str]:
    return {"text/html": as_html(parts), "text/plain": plain(as_text(parts))}
