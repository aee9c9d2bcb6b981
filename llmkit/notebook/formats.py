"""How an answer goes out: what MIME types hold it, in each of the formats of ``--format``.

A model's text is nobody's friend. It goes out as Markdown, which Jupyter sanitises, or as plain text, never as HTML:
under ``--format html`` its source is shown. Plain text loses its control characters, since a terminal would obey them.

Jupyter takes whatever stands between two dollars for a formula, so that "$5 or $10", and every table of prices, comes
out as "5or10". Dollars that begin or end no formula are therefore written as HTML entities; the plain text keeps them.
"""

from __future__ import annotations

import json
import re

__all__ = ["DOLLAR", "MAX_JSON", "bundle", "plain"]

MAX_JSON = 2_000_000
"""Characters up to which JSON is parsed to be shown indented."""

_CONTROL = re.compile(r"\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_BACKTICKS = re.compile(r"`{3,}")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_INLINE_CODE = re.compile(r"((?<!`)(`+)(?!`).+?(?<!`)\2(?!`))")
_FORMULA = re.compile(r"[\\^_{}=+*<>]")
_LONGEST_LINE = 10_000
DOLLAR = "<span>&#36;</span>"
"""In an element of its own: else MathJax would still pair it with the next one."""


def plain(text: str) -> str:
    """``text`` without anything that a terminal would take as a command."""
    return _CONTROL.sub("", text)


def bundle(text: str, form: str) -> dict[str, str]:
    """``text`` as a MIME bundle."""
    if form == "json":
        text = _indented(text)
    if form == "text":
        return {"text/plain": plain(text)}
    markdown = _with_dollars(text) if form == "markdown" else _as_code(text, form)
    return {"text/markdown": markdown, "text/plain": plain(text)}


def _indented(text: str) -> str:
    body = _inside_fence(text)
    if len(body) > MAX_JSON:
        return body
    try:
        return json.dumps(json.loads(body), indent=2, ensure_ascii=False)
    except (ValueError, RecursionError):
        return body


def _inside_fence(text: str) -> str:
    """What stands inside the one fence that is the whole text, or the text."""
    body = text.strip()
    if body.startswith("```") and body.endswith("```") and body.count("```") == 2 and "\n" in body:
        return body.removesuffix("```").split("\n", 1)[1].strip()
    return text


def _as_code(text: str, form: str) -> str:
    if form == "code" and "```" in text:
        return _with_dollars(text)  # the model fenced its code itself, and knows its language
    longest = max((len(run) for run in _BACKTICKS.findall(text)), default=2)
    fence = "`" * (longest + 1)
    language = "" if form == "code" else form
    return f"{fence}{language}\n{text.strip(chr(10))}\n{fence}"


def _with_dollars(text: str) -> str:
    """``text`` as Markdown in which dollars that are no formula's stay dollars."""
    if text.count("$") < 2:
        return text
    lines, fence, display = [], "", False
    for line in text.split("\n"):
        shown = line
        mark = _FENCE.match(line)
        if mark and not fence:
            fence = mark[1]
        elif mark and mark[1].startswith(fence) and not line[mark.end() :].strip():
            fence = ""
        elif not fence and "$$" in line:
            display ^= line.count("$$") % 2 == 1
        elif not fence and not display and "$" in line and len(line) <= _LONGEST_LINE:
            shown = _line_with_dollars(line)
        lines.append(shown)
    return "\n".join(lines)


def _line_with_dollars(line: str) -> str:
    pieces = _INLINE_CODE.split(line)
    # Of each match the code and its backticks come back: text, code, backticks, text …
    return "".join(piece if at % 3 else _text_with_dollars(piece) for at, piece in enumerate(pieces) if at % 3 != 2)


def _text_with_dollars(text: str) -> str:
    before, *after = re.split(r"(?<!\\)\$", text)
    shown = [before]
    at = 0
    while at < len(after):
        inside = after[at]
        if at + 1 < len(after) and _is_formula(inside, after[at + 1]):
            shown.append(f"${inside}${after[at + 1]}")
            at += 2
        else:
            shown.append(DOLLAR + inside)
            at += 1
    return "".join(shown)


def _is_formula(inside: str, behind: str) -> bool:
    """Pandoc's rule, and one more: what begins as an amount and goes on in words is no formula."""
    if not inside or inside[0].isspace() or inside[-1].isspace() or behind[:1].isdigit():
        return False
    return not inside[0].isdigit() or not re.search(r"\s", inside) or _FORMULA.search(inside) is not None
