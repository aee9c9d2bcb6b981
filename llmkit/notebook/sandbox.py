"""The sandbox that prompts are filled in: Jinja's, strict about names, and closed to the machine and to Python's own works.

It is against accidents and against prompts that were pasted from somewhere, and no jail: what the notebook's own
variables offer may be called.
"""

from __future__ import annotations

import builtins
from functools import cache
from io import BytesIO, StringIO
from types import ModuleType
from typing import TYPE_CHECKING, Any

from llmkit.notebook.filters import FILTERS, checked
from llmkit.notebook.values import Unwritable

if TYPE_CHECKING:
    from jinja2.sandbox import SandboxedEnvironment

__all__ = ["LARGEST", "OUT_OF_REACH", "MissingName", "environment"]

LARGEST = 4_000_000
"""The longest text or list that an expression may make by repeating one."""

# fmt: off
OUT_OF_REACH = frozenset({
    "IPython", "_io", "builtins", "code", "codeop", "ctypes", "gc", "importlib", "io", "llmkit.client", "llmkit.config",
    "marshal", "multiprocessing", "nt", "os", "pathlib", "pickle", "posix", "pty", "runpy", "shutil", "signal", "site",
    "socket", "sqlite3", "subprocess", "sys", "tempfile",
})
"""Modules that no template gets at, whatever the notebook has imported: files, processes, sockets, Python's own works."""

# What one reaches for inside {{ }} and Jinja has not; a variable of the same name wins.
_BUILTINS = (
    "abs", "bool", "dict", "enumerate", "float", "int", "len", "list", "max", "min", "repr", "round", "set", "sorted",
    "str", "sum", "tuple", "zip",
)
# fmt: on


class MissingName(Exception):
    """A name that is not there, or one that the sandbox refuses."""

    def __init__(self, message: str, name: str | None, *, unsafe: bool, top: bool) -> None:
        super().__init__(message)
        self.name = name
        self.unsafe = unsafe
        self.top = top


@cache
def environment() -> SandboxedEnvironment:
    """What prompts are compiled in: the notebook's names alone, `llmkit.notebook.filters` and Jinja's own, no loader."""
    import jinja2
    from jinja2.exceptions import SecurityError
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import missing

    class Missing(jinja2.StrictUndefined):
        """Says which name it was, in an exception and not only in a text."""

        def __init__(
            self, hint: Any = None, obj: Any = missing, name: Any = None, exc: Any = jinja2.UndefinedError
        ) -> None:
            def error(message: str) -> MissingName:
                shown = name if isinstance(name, str) else None
                return MissingName(message, shown, unsafe=exc is SecurityError, top=obj is missing)

            super().__init__(hint, obj, name, error)  # type: ignore[arg-type]

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**"})

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            return not _is_sealed(obj) and super().is_safe_attribute(obj, attr, value)

        def is_safe_callable(self, obj: Any) -> bool:
            _check_callable(obj)
            return super().is_safe_callable(obj)

        def getitem(self, obj: Any, argument: Any) -> Any:
            return self.unsafe_undefined(obj, str(argument)) if _is_sealed(obj) else super().getitem(obj, argument)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _check_size(operator, left, right)
            return super().call_binop(context, operator, left, right)

    made = Sandbox(
        undefined=Missing,
        keep_trailing_newline=True,
        # Jinja's own comments would swallow text and code; nobody writes these.
        comment_start_string="{\0llmkit\0#",
        comment_end_string="#\0llmkit\0}",
    )
    made.globals = {name: getattr(builtins, name) for name in _BUILTINS} | {
        name: value for name, value in made.globals.items() if name in {"namespace", "range"}
    }
    made.filters |= {name: checked(name, function) for name, function in FILTERS.items()}
    return made


_SEALED = frozenset(("IPython", "_io", "llmkit.client", "llmkit.config", "llmkit.environment", "os", "subprocess"))
_DANGEROUS = (
    eval,
    exec,
    compile,
    open,
    input,
    __import__,
    getattr,
    setattr,
    delattr,
    globals,
    locals,
    vars,
    breakpoint,
)


def _is_sealed(value: Any) -> bool:
    """Whether it is a module of `OUT_OF_REACH`, or an object of one that leads further: a file, the environment, a shell."""
    if isinstance(value, ModuleType):
        return _is_of(value.__name__, OUT_OF_REACH)
    return _is_of(type(value).__module__, _SEALED) and not isinstance(value, StringIO | BytesIO)


def _check_callable(value: Any) -> None:
    """Refuse to call what comes from a module of `OUT_OF_REACH`, or a method of what is sealed."""
    holder = getattr(value, "__self__", None)  # of a function in C, the module it is from
    if isinstance(holder, ModuleType):
        holder = None
    home = getattr(value, "__module__", None)
    is_builtin = home == "builtins"
    if (
        (not is_builtin and _is_of(home, OUT_OF_REACH))
        or any(value is each for each in _DANGEROUS)
        or _is_sealed(holder)
    ):
        name = getattr(value, "__qualname__", None) or type(value).__name__
        raise Unwritable(f"{name} may not be called in a prompt", "put what it gives into a variable of its own first")


def _is_of(home: object, modules: frozenset[str]) -> bool:
    return isinstance(home, str) and (home in modules or home.partition(".")[0] in modules)


def _check_size(operator: str, left: Any, right: Any) -> None:
    """Refuse what would take all memory, or for ever, before anything is written."""
    if operator == "*":
        for many, count in ((left, right), (right, left)):
            is_long = isinstance(many, str | bytes | list | tuple) and isinstance(count, int)
            if is_long and len(many) * count > LARGEST:
                raise Unwritable(f"a text or a list of more than {LARGEST:,}")
    elif isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > 100_000:
        raise Unwritable("a number of more than 30,000 digits")
