r"""A model's Markdown, made harmless: what a notebook may render of a text that nobody vouches for.

JupyterLab takes what a cell has just put out as trusted, Markdown included: a tag in it is put into the page as it is,
with its scripts. So none leaves here. Nor does anything that would load by itself (a picture tells its server that the
notebook was opened, and its address can carry away what the model had read), nor a link other than to the web, a mail
address or a heading, nor a command of TeX that makes links or changes other formulas.

Renderers do not agree on where code begins and ends, so nothing rests on that: what is code here and has anything
dangerous in it is rewritten so that none can take it for text. Whatever is changed is still shown as it was written.

Jupyter takes whatever stands between two dollars for a formula, so that "$5 or $10", and every table of prices, comes
out as "5or10". Dollars that begin or end no formula are therefore written as HTML entities.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["DOLLAR", "FENCE", "FENCE_END", "MAX_MARKDOWN", "harmless", "plain", "spelled"]

MAX_MARKDOWN = 1_000_000
"""Characters up to which a text is worth rendering; beyond, a browser would stand still."""
DOLLAR = "<span>&#36;</span>"
"""In an element of its own: else MathJax would still pair it with the next one."""

_CONTROL = re.compile(
    r"\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f]"
    r"|[\u202a-\u202e\u2066-\u2069]"  # what turns the direction of a text can make it read as another
)
_LINES = str.maketrans({"\u2028": "\n", "\u2029": "\n"})  # JavaScript's patterns take them for ends of a line

_PLAIN_TAG = r"</?(?:br|sub|sup|kbd|mark)\s?/?>"
_TAG = r"<(?=[A-Za-z/!?])"
_URL = r"""(?:[^\s<>"'`$\\{}()\x00\x01]|\([^\s<>"'`$\\{}()\x00\x01]*\))"""
_LINK = rf"""\]\((?!(?:https?://|mailto:|\#){_URL}+(?:[ ]+"[^"<>$\\`]*")?\))"""
_IMAGE = r"(?<!!)!+\["
_DEFINITION = r"\]:"
_MACRO = (
    r"\\(?=(?:href|url|style|class|cssId|data|require|mmlToken|bbox|html\w*|unicode|includegraphics|g?def|x?let"
    r"|newcommand|renewcommand|newenvironment|renewenvironment|DeclareMathOperator)(?![A-Za-z]))"
)
_IN_TEXT = re.compile(
    rf"(?P<plain>{_PLAIN_TAG})|<(?P<address>https?://[^\s<>`()$\\]+)>|(?P<tag>{_TAG})|(?P<image>{_IMAGE})"
    rf"|(?P<link>{_LINK})|(?P<definition>{_DEFINITION})|(?P<macro>{_MACRO}|\\(?=begin\{{))|(?P<start>\\\\(?=[(\[]))",
    re.IGNORECASE,
)
_WRITTEN_OUT = {"tag": "&lt;", "link": "]&#40;", "definition": "]&#58;", "macro": "&#92;", "start": "&#92;&#92;"}
_BEGINS_DEFINITION = r"^[ \t>*+\-\d.)]*\[(?:[^\[\]\\]|\\.){1,999}\]:"
_IN_CODE = re.compile(rf"{_TAG}|{_IMAGE}|{_LINK}|{_BEGINS_DEFINITION}|{_MACRO}", re.IGNORECASE | re.MULTILINE)
_NOTABLE = re.compile(rf"\$|\\|mermaid|{_TAG}|{_IMAGE}|{_LINK}|{_DEFINITION}", re.IGNORECASE)
# JupyterLab puts a formula back as it was wherever it stood, also into the address of a link.
_ADDRESS = re.compile(r"(?:https?://|ftp://|www\.|(?<![\w.+-])[\w.+-]+@[\w-])[^\s<]*", re.IGNORECASE)

FENCE = re.compile(r"(?P<lead>[ \t]*(?:(?:>|[-*+]|\d{1,9}[.)])[ \t]*)*)(?P<mark>`{3,}(?=[^`]*$)|~{3,})(?P<info>.*)$")
"""A line that begins code, also in a list or a quotation."""
FENCE_END = re.compile(r"[\s>]*(?P<mark>`{3,}|~{3,})\s*$")
_LANGUAGE = re.compile(r"[\w+#.{}=,: /-]*")  # it becomes a part of an attribute
_FENCE_LIKE = re.compile(r"`{3}|~{3}")
_INLINE_CODE = re.compile(r"((?<![`\\])(`+)(?!`).+?(?<!`)\2(?!`))")
_IN_PARENTHESES = re.compile(r"(?<!\\)\\\((?!\s*\\\))(.{1,2000}?)(?<!\\)\\\)")
_IN_BRACKETS = re.compile(r"(\s*)\\\[(.+)\\\]\s*$")
_DISPLAY = re.compile(r"(?<![\\$])\$\$(?!\$)(.+?)(?<!\\)\$\$")
_A_DOLLAR, _A_BACKSLASH, _BACKSLASH = "\x00", "\x01", "<span>&#92;</span>"  # no text has such characters any more
_SPANS = (("$$", "$$"), ("\\begin{", "\\end{"), ("\\\\[", "\\\\]"), ("\\\\(", "\\\\)"))
"""What begins a formula that may have several lines, and what ends it."""
_BRACES = re.compile(r"\\.|[{}]")
_FORMULA = re.compile(r"[\\^_{}=+*<>]")
_LONGEST_LINE = 10_000
_LONGEST_FORMULA = 5_000
# A diagram may hold addresses of pictures, which its drawing would fetch, and settings of the drawing.
_RISKY_DIAGRAM = re.compile(
    r"//|#\d|url|img|image|href|link|script|%%\{|@\{|^[ \t]*---|\bclick\b|<(?!br\s?/?>)[a-z/!]",
    re.IGNORECASE | re.MULTILINE,
)
_PUNCTUATION = re.compile(r"[!-/:-@\[-`{-~\n\t]")


def plain(text: str) -> str:
    """``text`` without anything that a terminal would take as a command, or that turns the direction of reading."""
    return _CONTROL.sub("", text)


def harmless(text: str) -> str:
    """``text`` as Markdown that shows what it says, and does nothing."""
    text = plain(text.translate(_LINES))
    if not _NOTABLE.search(text) or (text.count("$") == 1 and not _NOTABLE.search(text.replace("$", ""))):
        return text
    return "\n".join(_Walk(text.split("\n")).lines())


class _Walk:
    """One pass over the lines of a text, fenced code apart from the rest."""

    def __init__(self, lines: list[str]) -> None:
        self._lines = lines
        self._until = -1  # the last line of a formula of several lines
        self._ended = True  # no line before this one belongs to the same paragraph

    def lines(self) -> Iterator[str]:
        at = 0
        lines = self._lines
        while at < len(lines):
            fence = FENCE.match(lines[at])
            if fence is None:
                yield self._text(at)
                at += 1
                continue
            end = _end_of_fence(lines, at, fence["mark"])
            yield from self._fenced(fence, lines[at : end + 1], closed=end < len(lines))
            at = end + 1

    def _fenced(self, fence: re.Match[str], lines: list[str], *, closed: bool) -> Iterator[str]:
        body = lines[1:-1] if closed else lines[1:]
        code = "\n".join(body)
        info = fence["info"].strip()
        drawn = "mermaid" in info.lower()
        if not (drawn or _IN_CODE.search(code)) and _LANGUAGE.fullmatch(info):
            yield from lines
            self._ended = False
            return
        if fence["lead"] or _FENCE_LIKE.search(code):
            yield f"{fence['lead']}<pre><code>{spelled(_without_lead(body, fence['lead']))}</code></pre>"
            self._ended = False
            return
        language = re.match(r"[\w+#.-]{0,40}", info)
        risky = drawn and _RISKY_DIAGRAM.search(code) is not None
        if not self._ended:
            yield ""
        # Never without a word behind it: a fence alone would end one that a renderer thinks is open.
        yield f"```{language[0] if language and language[0] and not risky else 'text'}"
        yield from body
        yield "```"
        yield ""
        self._ended = True

    def _text(self, at: int) -> str:
        line = self._lines[at]
        self._ended = not line.strip()
        if at <= self._until:
            return "$$" if line.strip() == "\\]" else _formula(line)
        if len(line) > _LONGEST_LINE:
            return _words(line.replace("$", DOLLAR))
        if (end := self._formula_from(at)) is not None:
            self._until = end
            return "$$" if line.strip() == "\\[" else _formula(line)
        if (brackets := _IN_BRACKETS.match(line)) and _balanced(brackets[2]):
            return f"{brackets[1]}$${_formula(brackets[2])}$$"
        pieces = _INLINE_CODE.split(line)
        # Of each match the code and its backticks come back: text, code, backticks, text …
        return "".join(_code(piece) if at % 3 else _prose(piece) for at, piece in enumerate(pieces) if at % 3 != 2)

    def _formula_from(self, at: int) -> int | None:
        """Where the formula ends that begins in the line ``at`` and is alone in its lines; None where none does."""
        line = self._lines[at].strip()
        if line == "\\[":
            return self._end_of_formula(at, "\\[", "\\]")
        for begin, finish in _SPANS:
            if line.startswith(begin):
                return self._end_of_formula(at, begin, finish)
        return None

    def _end_of_formula(self, start: int, begin: str, finish: str) -> int | None:
        seen = ""
        for at in range(start, len(self._lines)):
            line = self._lines[at].strip()
            if not line or len(seen) > _LONGEST_FORMULA or FENCE.match(line):
                return None
            seen += line[len(begin) :] if at == start else line
            if finish in seen:
                inside, _, behind = seen.partition(finish)
                rest = behind.partition("}")[2] if finish == "\\end{" else behind
                return at if not rest.strip(" .,;") and _balanced(inside) else None
        return None


def _end_of_fence(lines: list[str], start: int, mark: str) -> int:
    for at in range(start + 1, len(lines)):
        end = FENCE_END.match(lines[at])
        if end and end["mark"].startswith(mark):
            return at
    return len(lines)


def _without_lead(lines: list[str], lead: str) -> str:
    """The code of a fence in a list or a quotation, without what puts it there."""
    if ">" in lead:
        lines = [re.sub(r"^[\s>]*?>\s?", "", line) for line in lines]
    width = len(lead) if ">" not in lead else 0
    return "\n".join(line[min(width, len(line) - len(line.lstrip())) :] for line in lines)


def _code(code: str) -> str:
    """Code within a line."""
    if not _IN_CODE.search(code) and not ('"' in code and ("$" in code or "\\" in code)):
        return code
    inside = code.strip("`")
    return f"<code>{spelled(inside.strip() or inside)}</code>"


def spelled(text: str) -> str:
    """``text`` with every character written out that means anything to anybody."""
    return _PUNCTUATION.sub(lambda found: f"&#{ord(found[0])};", text)


def _words(text: str) -> str:
    """``text`` without what is more than words."""
    return _IN_TEXT.sub(_disarmed, text)


def _disarmed(found: re.Match[str]) -> str:
    if found["plain"]:
        return found[0]
    if found["address"]:
        return found["address"]  # found as an address without the brackets, too
    if found["image"]:
        return "&#33;" * (found[0].count("!") - 1) + "[image: "
    return _WRITTEN_OUT[found.lastgroup or ""]


def _formula(text: str) -> str:
    """A formula in which no tag, link or picture can begin, and no attribute end: TeX does not mind the spaces."""
    text = re.sub(_TAG, "< ", text).replace('"', "''")
    text = re.sub(r"([\]!])(?=[(\[:])", r"\1 ", text)
    return re.sub(_MACRO + r"(\w+)", r"\\mathrm{\1}", text, flags=re.IGNORECASE)


def _prose(text: str) -> str:
    """Text in which formulas are formulas, and prices are prices."""
    text = _IN_PARENTHESES.sub(lambda found: f"${found[1].strip()}$" if _balanced(found[1]) else found[0], text)
    if "$" not in text and "\\" not in text:
        return _words(text)
    # Of each match what stands between comes back: text, formula, text …
    pieces = _DISPLAY.split(_ADDRESS.sub(_without_formulas, text))
    shown = "".join(_display(piece) if at % 2 else _with_dollars(piece) for at, piece in enumerate(pieces))
    return shown.replace(_A_DOLLAR, DOLLAR).replace(_A_BACKSLASH, _BACKSLASH)


def _without_formulas(address: re.Match[str]) -> str:
    return address[0].replace("$", _A_DOLLAR).replace("\\", _A_BACKSLASH)


def _display(text: str) -> str:
    return f"$${_formula(text)}$$" if _balanced(text) else f"{DOLLAR * 2}{_words(text)}{DOLLAR * 2}"


def _with_dollars(text: str) -> str:
    before, *after = re.split(r"(?<!\\)\$", text)
    shown = [_words(before)]
    at = 0
    while at < len(after):
        inside = after[at]
        if at + 1 < len(after) and _is_formula(inside, after[at + 1]):
            shown.append(f"${_formula(inside)}${_words(after[at + 1])}")
            at += 2
        else:
            shown.append(DOLLAR + _words(inside))
            at += 1
    return "".join(shown)


def _balanced(formula: str) -> bool:
    """Whether JupyterLab, which counts braces, sees the formula end where it ends here."""
    open_ones = 0
    for brace in _BRACES.findall(formula):
        open_ones += {"{": 1, "}": -1 if open_ones else 0}.get(brace, 0)
    return open_ones == 0


def _is_formula(inside: str, behind: str) -> bool:
    """Pandoc's rule, and two more: what begins as an amount and goes on in words is no formula; braces have partners."""
    if not inside or inside[0].isspace() or inside[-1].isspace() or behind[:1].isdigit() or not _balanced(inside):
        return False
    return not inside[0].isdigit() or not re.search(r"\s", inside) or _FORMULA.search(inside) is not None
