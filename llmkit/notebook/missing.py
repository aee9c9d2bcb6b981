"""What of a template is there, where some of its names are not: for a count that is too low, and known to be."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from llmkit.errors import TemplateError
from llmkit.notebook.sandbox import environment
from llmkit.notebook.template import render

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from jinja2.sandbox import SandboxedEnvironment

__all__ = ["missing", "present"]

_OPENING = {"for", "if", "macro", "call", "filter", "block", "with", "autoescape"}


def missing(text: str, names: Mapping[str, object]) -> list[str]:
    """The names that ``text`` asks for and nobody has; none where it is no template, or a wrong one."""
    if "{{" not in text and "{%" not in text:
        return []
    import jinja2
    from jinja2 import meta

    try:
        asked = meta.find_undeclared_variables(_sandbox().parse(text))
    except jinja2.TemplateSyntaxError:
        return []
    return sorted(asked - set(names) - set(_sandbox().globals))


def present(text: str, names: Mapping[str, object]) -> str:
    """The text of the template itself, and of those expressions that can be filled in.

    Whatever stands inside of ``{% … %}`` may not come to be said, so it is left out.
    """
    return "".join(_present(text, names))


def _present(text: str, names: Mapping[str, object]) -> Iterator[str]:
    depth, said = 0, ""
    block: list[str] | None = None
    for _, kind, token in _sandbox().lex(text):
        if kind == "block_begin":
            block = []
        elif kind == "block_end":
            depth += _deeper(block or [])
            block = None
        elif block is not None:
            block += [token] if kind != "whitespace" else []
        elif kind == "variable_begin":
            said = ""
        elif kind == "variable_end":
            if depth == 0:
                yield _filled(said, names)
        elif kind == "data":
            if depth == 0:
                yield token
        else:
            said += token


def _deeper(block: list[str]) -> int:
    """By how much a tag changes how deep what follows stands."""
    name = block[0] if block else ""
    if name == "set":
        return 0 if "=" in block else 1
    return -1 if name.startswith("end") else int(name in _OPENING)


def _filled(expression: str, names: Mapping[str, object]) -> str:
    text = f"{{{{ {expression} }}}}"
    if missing(text, names):
        return ""
    try:
        return render(text, names)
    except TemplateError:
        return ""


@cache
def _sandbox() -> SandboxedEnvironment:
    return environment()
