"""What ``{{ value | filter }}`` can do beside what Jinja's own filters do."""

from __future__ import annotations

import inspect
from functools import wraps
from typing import TYPE_CHECKING, Any

from llmkit.notebook.values import Unwritable, as_json, written

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["FILTERS", "checked"]


def _table(value: Any, rows: int = 100, columns: Any = 50) -> str:
    from llmkit.notebook.tables import table

    return table(value, rows, columns)


def _csv(value: Any, rows: int = 100, columns: Any = 50) -> str:
    from llmkit.notebook.tables import csv

    return csv(value, rows, columns)


def _tojson(value: Any, indent: int | None = None) -> str:
    return as_json(value, indent)


def _tokens(value: Any) -> int:
    """About how many tokens the value takes; models differ by a third."""
    from llmkit.models.tokens import estimate

    return estimate(written(value))


def _truncate_tokens(value: Any, limit: int) -> str:
    """The beginning of a text, of about ``limit`` tokens, and a note of how much is left out."""
    from llmkit.models.tokens import estimate

    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise Unwritable(f"truncate_tokens: the limit is a whole number from 1, not {limit!r:.40}")
    text = written(value)
    whole = estimate(text)
    if whole <= limit:
        return text
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if estimate(text[:middle]) <= limit else (low, middle - 1)
    kept = text[:low]
    word = max(kept.rfind(" "), kept.rfind("\n"))
    if word > 0.8 * low and not text[low].isspace():
        kept = kept[:word]
    return f"{kept.rstrip()}\n(the first {limit:,} of about {whole:,} tokens)"


FILTERS: dict[str, Callable[..., Any]] = {
    "table": _table,
    "json": as_json,
    "csv": _csv,
    "tojson": _tojson,  # Jinja's own writes < > & ' as \u003c and so on, which is for web pages
    "tokens": _tokens,
    "truncate_tokens": _truncate_tokens,
}
"""llmkit's own filters, beside Jinja's."""


def checked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, with an error of its own where it is given what it does not take."""
    import jinja2

    signature = inspect.signature(function)
    others = [str(each.replace(annotation=inspect.Parameter.empty)) for each in signature.parameters.values()][1:]

    @wraps(function)
    def checked(value: Any, *arguments: Any, **named: Any) -> Any:
        try:
            signature.bind(value, *arguments, **named)
        except TypeError as error:
            form = f"{name}({', '.join(others)})" if others else name
            raise Unwritable(f"the filter {name}: {error}", f"write it as {{{{ value | {form} }}}}") from None
        if isinstance(value, jinja2.Undefined):
            str(value)  # raises, and names it
        return function(value, *arguments, **named)

    return checked
