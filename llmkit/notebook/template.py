"""Prompts as templates over the notebook's variables.

Only ``{{ … }}`` and ``{% … %}`` are template syntax, and only a text that holds one of them is a template at all, so
code and JSON pass as they are. What a variable holds is put in as text and never scanned again. The templates run in
Jinja's sandbox: a prompt that was pasted from somewhere cannot reach into Python by way of a variable.
"""

from __future__ import annotations

import builtins
import difflib
from functools import cache
from typing import TYPE_CHECKING, Any

from llmkit.errors import TemplateError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from jinja2.sandbox import SandboxedEnvironment

__all__ = ["MAX_CHARACTERS", "render"]

MAX_CHARACTERS = 4_000_000
"""The longest prompt that a template may become; no model of today takes more."""

RAW = "--raw sends the cell as it is"

# What one reaches for inside {{ }} and Jinja has not; a variable of the same name wins.
_BUILTINS = [
    "abs",
    "bool",
    "dict",
    "enumerate",
    "float",
    "int",
    "len",
    "list",
    "max",
    "min",
    "range",
    "repr",
    "round",
    "set",
    "sorted",
    "str",
    "sum",
    "tuple",
    "zip",
]


def render(text: str, *namespaces: Mapping[str, Any]) -> str:
    """Fill in ``text`` from ``namespaces``; later ones win.

    Raises:
        TemplateError: a missing or unsafe name (``error.name``), wrong syntax, an error in an expression, a result of
            more than `MAX_CHARACTERS`.
    """
    if "{{" not in text and "{%" not in text:
        return text
    import jinja2

    try:
        template = _environment().from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(
            f"line {error.lineno} of the prompt: {error.message}", next_step=f"mend it, or {RAW}"
        ) from None
    names = {name: value for namespace in namespaces for name, value in namespace.items()}
    try:
        return _bounded(template, names)
    except _MissingNameError as error:
        raise _missing(error, names) from None
    except TemplateError:
        raise
    except Exception as error:  # an expression in a template may raise anything
        what = f"{type(error).__name__}: {error}"[:300]
        raise TemplateError(f"{_place(error.__traceback__)}{what}", next_step=f"mend it, or {RAW}") from error


def _bounded(template: Any, names: Mapping[str, Any]) -> str:
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


class _MissingNameError(Exception):
    """A name that is not there, or one that the sandbox refuses."""

    def __init__(self, message: str, name: str | None, *, unsafe: bool, top: bool) -> None:
        super().__init__(message)
        self.name = name
        self.unsafe = unsafe
        self.top = top


@cache
def _environment() -> SandboxedEnvironment:
    import jinja2
    from jinja2.exceptions import SecurityError
    from jinja2.sandbox import SandboxedEnvironment
    from jinja2.utils import missing

    class Missing(jinja2.StrictUndefined):
        """Says which name it was, in an exception and not only in a text."""

        def __init__(
            self, hint: Any = None, obj: Any = missing, name: Any = None, exc: Any = jinja2.UndefinedError
        ) -> None:
            def error(message: str) -> _MissingNameError:
                shown = name if isinstance(name, str) else None
                return _MissingNameError(message, shown, unsafe=exc is SecurityError, top=obj is missing)

            super().__init__(hint, obj, name, error)  # type: ignore[arg-type]

    environment = SandboxedEnvironment(
        undefined=Missing,
        keep_trailing_newline=True,
        # Jinja's own comments would swallow text and code; nobody writes these.
        comment_start_string="{\0llmkit\0#",
        comment_end_string="#\0llmkit\0}",
    )
    environment.globals = {name: getattr(builtins, name) for name in _BUILTINS} | {
        name: value for name, value in environment.globals.items() if name in {"namespace", "range"}
    }
    return environment


def _missing(error: _MissingNameError, names: Mapping[str, Any]) -> TemplateError:
    place = _place(error.__traceback__)
    if error.unsafe:
        step = "put the value into a variable of its own first"
        return TemplateError(f"{place}{error.name} is not allowed in a prompt", name=error.name, next_step=step)
    if not error.top or error.name is None:
        return TemplateError(f"{place}{error}"[:300], name=error.name, next_step=f"mend it, or {RAW}")
    near = difflib.get_close_matches(error.name, [name for name in names if not name.startswith("_")], 1)
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
