r"""An answer that is still arriving, as Markdown that can be drawn: what is half written does not make the page jump.

The closing lines of a text change their meaning with what follows: ``--`` under a line makes it a heading, a row is a
table only once the second line is there, half a link is long and a whole one short. What could still become something
else waits for the next drawing; what is open is closed, for the drawing only.
"""

from __future__ import annotations

import re

from llmkit.markdown import FENCE, FENCE_END

__all__ = ["drawable"]

LONGEST_WAIT = 2_000
"""Characters that may be kept waiting: what goes on longer is shown as it is."""

_UNDECIDED = re.compile(r"[\s>]*(?:[-*+_=#`~|:$>\\\[\]().!<]|\d{1,9}[.)]?)*\s*$")
_ROW = re.compile(r"[\s>]*\|")
_RULE = re.compile(r"[\s>]*\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*$")
_HALF_LINK = re.compile(r"!?\[[^\[\]]*(?:\](?:\([^()\s]*(?:\([^()\s]*\))?[^()\s]*)?)?$")
_HALF_TAG = re.compile(r"<[A-Za-z/!][^<>]*$|&#?\w{0,8}$")
_HALF_MATH = re.compile(r"(?<!\\)\\[(\[](?:(?!\\[)\]]).)*$", re.DOTALL)


def drawable(text: str) -> str:
    """As much of ``text`` as can be drawn now, with what is open closed."""
    lines = text.split("\n")
    open_fence = ""
    started = 0
    for at, line in enumerate(lines):
        if not open_fence:
            if mark := FENCE.match(line):
                open_fence, started = mark["mark"], at
        elif (end := FENCE_END.match(line)) and end["mark"].startswith(open_fence):
            open_fence = ""
    if open_fence:
        return _within_code(lines, started, open_fence)
    return _within_text(lines)


def _within_code(lines: list[str], started: int, mark: str) -> str:
    last = lines[-1]
    if len(lines) - 1 == started:  # its language may be half written
        return "\n".join(lines[:-1]).rstrip("\n")
    if last.strip() and not last.strip().strip(mark[0]):  # the half of its end
        lines = lines[:-1]
    if "mermaid" in lines[started].lower():  # half a diagram is an error
        lines = [*lines]
        lines[started] = re.sub(r"(?i)mermaid", "text", lines[started])
    lead = re.match(r"[\s>]*", lines[started])
    return "\n".join([*lines, f"{lead[0] if lead else ''}{mark}"])


def _within_text(lines: list[str]) -> str:
    lines = _without_half_table(lines)
    if not lines:
        return ""
    start = len(lines)
    while start and lines[start - 1].strip():
        start -= 1
    before, paragraph = lines[:start], "\n".join(lines[start:])
    shown = _without_half_formula(paragraph)
    head, newline, last = shown.rpartition("\n")
    last = "" if _UNDECIDED.match(last) else _closed(last)
    return "\n".join([*before, f"{head}{newline}{last}" if last else head]).rstrip("\n")


def _without_half_table(lines: list[str]) -> list[str]:
    """A table row by row, from its second line on."""
    rows = 0
    while rows < len(lines) and _ROW.match(lines[len(lines) - 1 - rows]):
        rows += 1
    ended = lines[-1] == "" and len(lines) > 1
    if ended:  # whole lines only
        rows = 0
        while rows + 1 < len(lines) and _ROW.match(lines[len(lines) - 2 - rows]):
            rows += 1
        return lines[: len(lines) - 1 - rows] if rows == 1 else lines
    if not rows:
        return lines
    if rows <= 2 and not (rows == 2 and len(lines) > 2 and _RULE.match(lines[-3])):
        return lines[: len(lines) - rows]
    return lines[:-1]


def _without_half_formula(paragraph: str) -> str:
    if paragraph.count("$$") % 2:
        at = paragraph.rfind("$$")
    elif half := _HALF_MATH.search(paragraph):
        at = half.start()
    else:
        return paragraph
    return paragraph[:at] if len(paragraph) - at <= LONGEST_WAIT else paragraph


def _closed(line: str) -> str:
    """The last line, without the half of a link or a tag, emphasis and code ended."""
    for half in (_HALF_LINK, _HALF_TAG):
        found = half.search(line)
        if found and len(line) - found.start() <= LONGEST_WAIT:
            line = line[: found.start()]
    line = line.rstrip("*_~`") if line.endswith(("*", "_", "~", "`")) and _opens(line) else line
    if line.count("`") % 2:
        return line + "`"
    for mark in ("**", "~~"):
        if line.count(mark) % 2:
            line = line.rstrip() + mark
    return line


def _opens(line: str) -> bool:
    """Whether the marks at the end begin something, rather than end it."""
    marks = line[len(line.rstrip("*_~`")) :]
    return line.count(marks) % 2 == 1
