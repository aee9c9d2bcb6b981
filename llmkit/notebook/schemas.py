"""``--schema``: a variable of the notebook first, then the short form."""

from __future__ import annotations

import difflib
import re
from types import GenericAlias
from typing import TYPE_CHECKING, Any

from llmkit.errors import ConfigError
from llmkit.schema import Schema

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["schema_of"]

_NAMED = re.compile(r"(?:list\[(?P<inside>[^\[\]]+)\]|(?P<name>.+))", re.DOTALL)
_ANNOTATIONS = frozenset({"Annotated", "Literal", "Optional", "Union", "dict", "set", "tuple"})
_NAME = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*")


def schema_of(text: str, names: Sequence[Mapping[str, Any]]) -> Schema:
    """What ``--schema TEXT`` means.

    Args:
        text: a variable (``Person``, ``models.Person``, ``list[Person]``) that holds a class, a JSON schema or a text; the
            short form; JSON; or the path of a ``.json`` file.
        names: the notebook's variables; those of later mappings win.

    Raises:
        ConfigError: it means nothing. One word alone that is no variable is the one field only where it does not look
            like a wrong name: with a capital, with a dot, or nearly the name of a class or of a schema.
    """
    said = text.strip()
    match = _NAMED.fullmatch(said)
    name = (match["inside"] or match["name"]).strip() if match else ""
    if not _NAME.fullmatch(name) or said.lower().endswith(".json"):
        return _of_text(text, names)
    first, *rest = name.split(".")
    holder = next((each for each in reversed(names) if first in each), None)
    if holder is not None:
        value = _attribute(holder[first], rest, name)
        return Schema.of(GenericAlias(list, (value,)) if match and match["inside"] else value)
    if match and match["inside"]:
        return Schema.of(text)  # list[int], or an error that names the type
    known = {each for mapping in names for each, value in mapping.items() if isinstance(value, type | dict | Schema)}
    near = difflib.get_close_matches(first, known, 1)
    if not (near or rest or first[:1].isupper()):
        return Schema.of(text)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(
        f"--schema {name:.60}: there is no such variable{hint}",
        next_step=f"define it in a cell before; if it is to be the one field: --schema '{name:.40} str'",
    )


def _of_text(text: str, names: Sequence[Mapping[str, Any]]) -> Schema:
    """What is no name; an annotation such as ``Cat | Dog`` is not run, but how to say it is said."""
    words = set(re.findall(r"[^\W\d]\w*", text)) if "[" in text or "|" in text else set()
    classes = {each for mapping in names for each, value in mapping.items() if isinstance(value, type)}
    step = f"a variable can hold it: Answer = {' '.join(text.split()):.60}; then --schema Answer"
    match = _NAMED.fullmatch(text.strip())
    if match and match["inside"] and words & classes:  # in short, it would be a list of the words themselves
        raise ConfigError(f"--schema {text:.60}: only one class can stand in the brackets", next_step=step)
    try:
        return Schema.of(text)
    except ConfigError as error:
        if words & (classes | _ANNOTATIONS):
            error.next_step = step
        raise


def _attribute(value: Any, path: Sequence[str], name: str) -> Any:
    for part in path:
        try:
            value = getattr(value, part)
        except AttributeError:
            raise ConfigError(f"--schema {name:.60}: it has no {part:.60}") from None
    return value
