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

_UNDECIDED = re.compile(r"[-*+_=#`~|:$>\\\[\]().!<\d\s]*$")
_ROW = re.compile(r"[\s>]*\|")
_RULE = re.compile(r"[\s>]*+\|?\s*+:?-++:?\s*+(?:\|\s*+:?-++:?\s*+)*+\|?\s*+$")
_HALF_LINK = re.compile(r"!?\[[^\[\]]*(?:\](?:\([^()\s]*+(?:\([^()\s]*+\))?[^()\s]*+)?)?$")
_HALF_TAG = re.compile(r"<[A-Za-z/!][^<>]*$|&#?\w{0,8}$")
_EMPHASIS, _EMPHASIS_END = re.compile(r"(?<![*\w\\])\*(?![*\s])"), re.compile(r"(?<![*\s\\])\*(?![*\w])")
_HALF_MATH = re.compile(r"(?<!\\)\\[(\[](?:(?!\\[)\]]).)*$", re.DOTALL)


def drawable(text: str) -> str:
    """As much of ``text`` as can be drawn now, with what is open closed."""
    lines = text.split("\n")
    mark, at = "", 0  # of the last fence: what it is made of while it is open, and where it began or ended
    for number, line in enumerate(lines):
        if not mark:
            if fence := FENCE.match(line):
                mark, at = fence["mark"], number
        elif (end := FENCE_END.match(line)) and end["mark"].startswith(mark):
            mark, at = "", number + 1
    if mark:
        return _within_code(lines, at, mark)
    return "\n".join([*lines[:at], *_within_text(lines[at:])])


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


def _within_text(lines: list[str]) -> list[str]:
    kept = _without_half_table(lines)
    if len(kept) < len(lines):  # what is left are whole lines
        return _without_blank_end(kept)
    start = max(0, len(lines) - 1)
    while start and lines[start - 1].strip():
        start -= 1
    shown = _without_half_formula("\n".join(lines[start:]))
    head, newline, last = shown.rpartition("\n")
    if _UNDECIDED.match(last) and not last.endswith(("$$", "\\]")):
        head, last = head.rstrip("\n"), ""
    paragraph = f"{head}{newline}{_closed(last)}" if last else head
    return [*lines[:start], paragraph] if paragraph else _without_blank_end(lines[:start])


def _without_blank_end(lines: list[str]) -> list[str]:
    while lines and not lines[-1].strip():
        lines = lines[:-1]
    return lines


def _without_half_table(lines: list[str]) -> list[str]:
    """A table row by row, from its second line on."""
    if not lines:
        return lines
    whole = lines[:-1]
    first = len(whole)
    while first and _ROW.match(whole[first - 1]):
        first -= 1
    rows = len(whole) - first
    if rows == 1 and (not lines[-1] or _ROW.match(lines[-1])):
        return lines[:first]
    if not _ROW.match(lines[-1]):
        return lines
    return whole if not rows or _RULE.match(whole[first + 1]) else lines


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
        if found and len(line) - found.start() <= LONGEST_WAIT and line.count("`", 0, found.start()) % 2 == 0:
            line = line[: found.start()]
    line = line.rstrip("*_~`") if line.endswith(("*", "_", "~", "`")) and _opens(line) else line
    if line.count("`") % 2:
        return line + "`"
    if len(_EMPHASIS.findall(line)) > len(_EMPHASIS_END.findall(line)):
        line = line.rstrip() + "*"
    for mark in ("**", "~~"):
        if line.count(mark) % 2:
            line = line.rstrip() + mark
    return line


def _opens(line: str) -> bool:
    """Whether the marks at the end begin something, rather than end it."""
    marks = line[len(line.rstrip("*_~`")) :]
    return line.count(marks) % 2 == 1
