"""Prompts as templates over the notebook's variables.

Only ``{{ … }}`` and ``{% … %}`` are template syntax, and only a text that holds one of them is a template at all, so
code and JSON pass as they are. What a variable holds is put in as `llmkit.notebook.values.written` writes it and never
scanned again. The templates run in Jinja's sandbox: a prompt that was pasted from somewhere reaches neither into
Python's own works nor into the machine (`llmkit.notebook.sandbox`). It may call what the notebook's variables offer.
"""

from __future__ import annotations

import difflib
import re
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

from llmkit.errors import TemplateError
from llmkit.notebook.sandbox import MissingName, environment
from llmkit.notebook.values import Unwritable, written

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import TracebackType

    import jinja2
    from jinja2 import Template, nodes
    from jinja2.sandbox import SandboxedEnvironment

__all__ = ["MAX_CHARACTERS", "render", "render_parts"]

MAX_CHARACTERS = 4_000_000
"""The longest prompt that a template may become; no model of today takes more."""

RAW = "--raw sends the cell as it is"
_MOST_KEPT = 64
_OF_THE_SHELL = frozenset({"In", "Out", "exit", "get_ipython", "open", "quit"})  # which nobody means
_LONGEST_KEPT = 100_000  # characters; a longer template is compiled each time


def render(text: str, *namespaces: Mapping[str, Any]) -> str:
    """Fill in ``text`` from ``namespaces``; later ones win.

    Raises:
        TemplateError: a missing or unsafe name (``error.name``), wrong syntax, an error in an expression, a value that
            no model can read, a result of more than `MAX_CHARACTERS`.
    """
    return render_parts(text, *namespaces)[0]


def render_parts(text: str, *namespaces: Mapping[str, Any]) -> tuple[str, list[tuple[str, str]]]:
    """`render`, and what each ``{{ … }}`` has put in: ``(prompt, [(expression, its text), …])``.

    The expressions are as they stand in ``text``, without their braces, in the order of ``text``; what one in a loop
    put in is joined, and one that was never reached has put in nothing. What a macro writes counts for the expression
    inside it and for the one that calls it. A text that is no template has no parts. It costs what `render` costs.
    """
    if "{{" not in text and "{%" not in text:
        return text, []
    import jinja2

    try:
        template, sources = _kept(text) if len(text) <= _LONGEST_KEPT else _compiled(text)
    except jinja2.TemplateSyntaxError as error:
        raise _wrong_syntax(error) from None
    pieces: list[list[str]] = [[] for _ in sources]
    names = {name: value for namespace in namespaces for name, value in namespace.items()}
    try:
        prompt = _bounded(template, {**names, _PIECES: pieces})
    except MissingName as error:
        raise _missing(error, names) from None
    except Unwritable as error:
        step = error.next_step or f"mend it, or {RAW}"
        raise TemplateError(f"{_place(error.__traceback__)}{error}"[:300], next_step=step) from None
    except TemplateError:
        raise
    except Exception as error:  # an expression in a template may raise anything
        what = f"{type(error).__name__}: {error}"[:300]
        raise TemplateError(f"{_place(error.__traceback__)}{what}", next_step=f"mend it, or {RAW}") from error
    return prompt, [(source, "".join(piece)) for source, piece in zip(sources, pieces, strict=True)]


def _bounded(template: Template, names: Mapping[str, Any]) -> str:
    parts, length = [], 0
    for part in template.generate(names):
        parts.append(part)
        length += len(part)
        if length > MAX_CHARACTERS:
            raise TemplateError(
                f"the prompt becomes longer than {MAX_CHARACTERS:,} characters",
                next_step="put less into it: {{ df.head() }}",
            )
    return "".join(parts)


# -- compiling ---------------------------------------------------------------------------------------------------------

_PIECES = "\0pieces"  # no name that a template could say
_WRITTEN = "\0written"


def _compiled(text: str) -> tuple[Template, list[str]]:
    """The template, and the source of each of its expressions."""
    import jinja2
    from jinja2 import nodes

    sandbox = _sandbox()
    tree = sandbox.parse(text)
    others = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)
    if other := next((node for node in _in_order(tree) if isinstance(node, others)), None):
        tag = type(other).__name__.lower().removeprefix("from")
        raise jinja2.TemplateSyntaxError(f"{tag}: a prompt takes in no other file", other.lineno)
    outputs = [output for output in _in_order(tree) if isinstance(output, nodes.Output)]
    lines: list[int] = []
    for output in outputs:
        for place, node in enumerate(output.nodes):
            if not isinstance(node, nodes.TemplateData):
                index = nodes.Const(len(lines), lineno=node.lineno)
                output.nodes[place] = nodes.Filter(node, _WRITTEN, [index], [], None, None, lineno=node.lineno)
                lines.append(node.lineno)
    tree.set_environment(sandbox)
    sources = list(_sources(sandbox, text))
    if len(sources) != len(lines):  # {% print %} says several things in one
        sources = [f"line {line}" for line in lines]
    return sandbox.from_string(tree), sources


def _written(context: Any, value: Any, index: int) -> str:
    """Every ``{{ … }}`` ends here."""
    import jinja2

    text = str(value) if isinstance(value, jinja2.Undefined) else written(value)  # the former raises
    context[_PIECES][index].append(text)
    return text


@cache
def _sandbox() -> SandboxedEnvironment:
    import jinja2

    sandbox = environment()
    sandbox.filters[_WRITTEN] = jinja2.pass_context(_written)
    return sandbox


_kept = lru_cache(maxsize=_MOST_KEPT)(_compiled)


def _in_order(node: nodes.Node) -> Iterator[nodes.Node]:
    """All nodes in the order in which they stand in the text."""
    yield node
    for child in node.iter_child_nodes():
        yield from _in_order(child)


def _sources(environment: SandboxedEnvironment, text: str) -> Iterator[str]:
    said: list[str] | None = None
    for _, kind, token in environment.lex(text):
        if kind == "variable_begin":
            said = []
        elif kind == "variable_end":
            yield "".join(said or ()).strip()
            said = None
        elif said is not None:
            said.append(token)


# -- errors ------------------------------------------------------------------------------------------------------------


def _wrong_syntax(error: jinja2.TemplateSyntaxError) -> TemplateError:
    message, step = str(error.message), f"mend it, or {RAW}"
    unknown = re.match(r"No (filter|test) named '(\w+)'", message)
    if unknown:
        sandbox = _sandbox()
        known = sandbox.filters if unknown[1] == "filter" else sandbox.tests
        near = difflib.get_close_matches(unknown[2], [name for name in known if name.isidentifier()], 1)
        message = f"there is no {unknown[1]} {unknown[2]}" + (f"; did you mean {near[0]}?" if near else "")
    return TemplateError(f"line {error.lineno} of the prompt: {message}"[:300], next_step=step)


def _missing(error: MissingName, names: Mapping[str, Any]) -> TemplateError:
    place = _place(error.__traceback__)
    if error.unsafe:
        step = "put the value into a variable of its own first"
        return TemplateError(f"{place}{error.name} is not allowed in a prompt", name=error.name, next_step=step)
    if not error.top or error.name is None:
        return TemplateError(f"{place}{error}"[:300], name=error.name, next_step=f"mend it, or {RAW}")
    others = [name for name in names if not name.startswith(("_", "\0")) and name not in _OF_THE_SHELL]
    near = difflib.get_close_matches(error.name, others, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    message = f"{place}{error.name} is not defined in this notebook{hint}"
    return TemplateError(message, name=error.name, next_step=f"run the cell that makes it; or {RAW}")


def _place(traceback: TracebackType | None) -> str:
    line = None
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == "<template>":
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return f"line {line} of the prompt: " if line is not None else ""
