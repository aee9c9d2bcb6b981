"""What ``--image`` names: something of the notebook's, a URL, or a file.

The notebook comes first: a name, what is in it (``figures[0]``, ``page.photo``), or a call (``plot(df)``), which is the
user's own code and is run. Nothing else is taken for an expression, so a path such as ``data/a.png`` never divides two
variables. What is not in the notebook is a URL, or a file seen from the current folder.
"""

from __future__ import annotations

import ast
import difflib
import os
from typing import TYPE_CHECKING, Any

from llmkit.errors import ConfigError
from llmkit.images import Picture
from llmkit.redaction import tidy

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["pictures"]

_MISSING = object()


def pictures(expressions: Sequence[str], *namespaces: Mapping[str, Any]) -> tuple[Picture, ...]:
    """The pictures that ``expressions`` name; of ``namespaces`` the later ones win. Nothing is sent.

    Raises:
        ConfigError: one of them is nothing that there is, or no picture that could be sent; what was tried is said.
    """
    names = {name: value for namespace in namespaces for name, value in namespace.items()}
    return Picture.all_of([each for expression in expressions for each in _pictures(expression.strip(), names)])


def _pictures(expression: str, names: dict[str, Any]) -> Sequence[Picture]:
    """One; several where a variable holds a list of them."""
    value = _in_notebook(expression, names)
    if value is not _MISSING:
        try:
            found = Picture.all_of(value)
        except ConfigError as error:
            raise ConfigError(f"--image {_shown(expression)}: {error.message}", next_step=error.next_step) from error
        if not found:
            raise ConfigError(f"--image {_shown(expression)}: the list is empty")
        return found
    if expression[:5].lower() != "data:" and "://" not in expression and not _is_file(expression):
        raise _nowhere(expression, names)
    return (Picture.of(expression),)


def _in_notebook(expression: str, names: dict[str, Any]) -> Any:
    """The value of an expression over the notebook's variables; `_MISSING` where it is none."""
    try:
        tree = ast.parse(expression, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return _MISSING
    node = tree.body
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    if not isinstance(node, ast.Name) or node.id not in names:
        return _MISSING
    try:
        return eval(compile(tree, "<--image>", "eval"), {**names})  # noqa: S307  the user's own cell
    except Exception as error:  # the user's own code
        is_path = isinstance(error, AttributeError | LookupError | TypeError)  # plot.png, beside a variable `plot`
        if is_path and not any(isinstance(each, ast.Call) for each in ast.walk(tree)):
            return _MISSING
        what = tidy(f"{type(error).__name__}: {error}", limit=200)
        bare = isinstance(error, NameError) and "[" in expression
        step = "quotes inside need quotes around: --image \"pages['first']\"" if bare else None
        raise ConfigError(f"--image {_shown(expression)}: {what}", next_step=step) from error


def _is_file(path: str) -> bool:
    try:
        return os.path.exists(os.path.expanduser(path))
    except ValueError:
        return False


def _nowhere(expression: str, names: Mapping[str, Any]) -> ConfigError:
    folder = os.path.dirname(os.path.expanduser(expression)) or "."
    try:
        beside = os.listdir(folder)[:10_000]
    except (OSError, ValueError):
        beside = []
    files = {os.path.join(os.path.dirname(expression), name): None for name in beside}
    variables = [name for name in names if not name.startswith("_")]
    near = difflib.get_close_matches(expression, [*variables, *files], 1, 0.7)
    hint = f"; did you mean {_shown(near[0])}?" if near else ""
    return ConfigError(
        f"--image {_shown(expression)}: there is no such variable, and no such file in {_shown(os.getcwd())}{hint}",
        next_step="a picture is a variable, a URL (https://…), or a path",
    )


def _shown(text: str) -> str:
    return tidy(text, limit=120)
