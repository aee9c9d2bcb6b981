"""How what a variable holds is written for a model: complete as far as it goes, and saying what was left out.

Text and numbers are written as Python writes them, a DataFrame or a Series as a Markdown table, what has parts (a dict,
a list, an array, a dataclass, a Pydantic model) as JSON. What has no text of its own, so that its address in memory
would stand in the prompt, is refused: no model can read it, and the prompt would be another one in each run.

No library is loaded here: a value that is a DataFrame has its pandas loaded already.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import sys
from collections.abc import ItemsView, Iterator, KeysView, Mapping, Sequence, ValuesView
from collections.abc import Set as AbstractSet
from datetime import date, time
from enum import Enum
from types import BuiltinFunctionType, FunctionType, GeneratorType, MethodType, ModuleType, SimpleNamespace
from typing import Any

__all__ = [
    "MOST_ARRAY_VALUES",
    "MOST_VALUES",
    "Unwritable",
    "as_json",
    "attributes_of",
    "fields_of",
    "instance_of",
    "plain",
    "written",
]

MOST_ARRAY_VALUES = 2_000
"""Values of an array that is put in plainly."""

MOST_VALUES = 1_000_000
"""Values of anything that is written as JSON."""

_DEEPEST = 100
_ADDRESS = re.compile(r"<.* at 0x[0-9a-fA-F]{4,}")
_FUNCTIONS = (FunctionType, MethodType, BuiltinFunctionType)
_BYTES = (bytes, bytearray, memoryview)
_SCALARS = (str, bool, int, float, type(None))


class Unwritable(ValueError):
    """A value that cannot stand in a prompt. ``next_step``: what to do instead."""

    def __init__(self, message: str, next_step: str | None = None) -> None:
        super().__init__(message)
        self.next_step = next_step


def instance_of(value: object, module: str, *names: str) -> bool:
    """Whether ``value`` is of one of these classes of ``module``, which is not loaded for the question."""
    loaded = sys.modules.get(module)
    kinds = tuple(kind for name in names if isinstance(kind := getattr(loaded, name, None), type))
    return isinstance(value, kinds)


def written(value: Any) -> str:
    """``value`` as it stands in a prompt.

    Raises:
        Unwritable: it has no text of its own.
    """
    if isinstance(value, str):
        return str(value.value) if isinstance(value, Enum) else str(value)
    if value is None or isinstance(value, bool | int | float | Enum):
        return str(value)
    if instance_of(value, "pandas", "DataFrame", "Series") or instance_of(value, "polars", "DataFrame", "Series"):
        from llmkit.notebook.tables import table

        return table(value)
    if instance_of(value, "numpy", "ndarray"):
        return _array(value)
    if _has_parts(value) or (_is_without_text(value) and attributes_of(value)):
        return as_json(value, indent=None)
    return _text(value)


def as_json(value: Any, indent: int | None = 2) -> str:
    """``value`` as JSON, characters as they are; what is no finite number becomes null.

    Raises:
        Unwritable: something in it has no text of its own, goes round in a ring, or is more than `MOST_VALUES`.
    """
    if indent is not None and (not isinstance(indent, int) or isinstance(indent, bool) or not 0 <= indent <= 8):
        raise Unwritable(f"json: indent is a whole number from 0 to 8, not {indent!r:.40}")
    return json.dumps(plain(value), ensure_ascii=False, indent=indent)


def plain(value: Any) -> Any:
    """``value`` as dicts, lists, texts, numbers, booleans and None alone, as JSON has them.

    Raises:
        Unwritable: see `as_json`.
    """
    return _Plain().of(value, 0)


def _has_parts(value: Any) -> bool:
    if isinstance(value, Mapping | Sequence | ValuesView | AbstractSet) and not isinstance(value, (*_BYTES, range)):
        return True
    return fields_of(value) is not None or _is_of_pandas(value)


def fields_of(value: Any) -> dict[str, Any] | None:
    """The fields of a dataclass, a Pydantic or an attrs model; None where ``value`` is none of these."""
    if isinstance(value, type):
        return None
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if instance_of(value, "pydantic", "BaseModel"):
        return dict(value.model_dump())
    if hasattr(type(value), "__attrs_attrs__"):
        return {field.name: getattr(value, field.name) for field in type(value).__attrs_attrs__}
    return None


def attributes_of(value: Any) -> dict[str, Any]:
    """The public attributes of an object whose class was made in the notebook, or of a `types.SimpleNamespace`.

    Not those of a library's objects: they may hold anything, keys included.
    """
    is_own = type(value).__module__ == "__main__" and not isinstance(value, BaseException | type)
    if not is_own and not isinstance(value, SimpleNamespace):
        return {}
    return {name: inner for name, inner in getattr(value, "__dict__", {}).items() if not name.startswith("_")}


def _is_without_text(value: Any) -> bool:
    kind: Any = type(value)
    return kind.__str__ is object.__str__ and kind.__repr__ is object.__repr__


def _text(value: Any) -> str:
    """The text of something without parts."""
    kind = type(value).__name__
    if isinstance(value, _BYTES):
        raise Unwritable(f"{kind} are not text", "decode them: {{ data.decode() }}; a picture goes into --image")
    if isinstance(value, ModuleType | type):
        raise Unwritable(f"{getattr(value, '__name__', kind)} is a {kind}, which no model can read")
    if isinstance(value, _FUNCTIONS):
        name = getattr(value, "__name__", "it")
        raise Unwritable(f"{name} is a function, not what it gives", "call it, with () behind its name")
    if isinstance(value, GeneratorType | Iterator):
        raise Unwritable(f"a {kind} shows nothing of what it would give", "add a filter: | list, or | join(', ')")
    if type(value).__module__.partition(".")[0] in {"PIL", "matplotlib"}:
        raise Unwritable(f"{kind} is a picture, not text", "give it with --image")
    text = str(value)
    if _ADDRESS.search(text):
        step = "put in what the model should read, such as an attribute; or give its class a __str__"
        raise Unwritable(f"{kind} has no text of its own, only an address in memory", step)
    return text


def _array(array: Any) -> str:
    """A numpy array as nested lists; of a long one the beginning, and how long it is."""
    if array.ndim == 0:
        return written(array.item())
    if array.size <= MOST_ARRAY_VALUES:
        return as_json(array, indent=None)
    rows = MOST_ARRAY_VALUES * len(array) // array.size
    shape = " × ".join(f"{length:,}" for length in array.shape)
    if rows:
        shown, what = array[:rows], f"first {rows:,} of {len(array):,} {'rows' if array.ndim > 1 else 'values'}"
    else:
        shown, what = array.reshape(-1)[:MOST_ARRAY_VALUES], f"first {MOST_ARRAY_VALUES:,} of {array.size:,} values"
    return f"{as_json(shown, indent=None)}\n({what}; shape {shape})"


class _Plain:
    """Makes one value plain; counts what it has seen, so that no value takes for ever."""

    def __init__(self) -> None:
        self._seen = 0

    def of(self, value: Any, depth: int) -> Any:
        self._seen += 1
        if self._seen > MOST_VALUES:
            raise Unwritable(f"more than {MOST_VALUES:,} values", "put less into the prompt: {{ df.head() | json }}")
        if depth > _DEEPEST:
            raise Unwritable(f"{type(value).__name__} is nested more than {_DEEPEST} deep, or holds itself")
        if isinstance(value, Enum):
            return self.of(value.value, depth + 1)
        if isinstance(value, _SCALARS):
            return None if isinstance(value, float) and not math.isfinite(value) else value
        if value is os.environ:
            raise Unwritable("os.environ holds keys and passwords", "put in the one that the model should read")
        fields = value if isinstance(value, Mapping) else _inside(value)
        if fields is not None:
            return {self._key(key): self.of(item, depth + 1) for key, item in fields.items()}
        return self._collected(value, depth)

    def _collected(self, value: Any, depth: int) -> Any:
        is_sequence = isinstance(value, Sequence) and not isinstance(value, _BYTES)
        if is_sequence or isinstance(value, KeysView | ItemsView | ValuesView):
            return [self.of(item, depth + 1) for item in value]
        if isinstance(value, AbstractSet):  # in an order that is the same in each run
            return sorted((self.of(item, depth + 1) for item in value), key=lambda item: (str(type(item)), str(item)))
        if instance_of(value, "numpy", "ndarray", "generic"):
            return self._of_numpy(value, depth)
        if _is_of_pandas(value):
            return self._of_pandas(value, depth)
        if instance_of(value, "polars", "DataFrame", "Series"):
            return self._of_polars(value, depth)
        return _single(value)

    def _of_numpy(self, value: Any, depth: int) -> Any:
        if value.size > MOST_VALUES:
            self._seen = MOST_VALUES
        inner = value.tolist()
        if type(inner) is type(value):  # a number wider than any of Python's
            return float(value)
        return self.of(str(value) if instance_of(value, "numpy", "datetime64", "timedelta64") else inner, depth + 1)

    def _of_polars(self, value: Any, depth: int) -> Any:
        is_frame = instance_of(value, "polars", "DataFrame")
        if len(value) * (len(value.columns) if is_frame else 1) > MOST_VALUES:
            self._seen = MOST_VALUES
            return self.of(None, depth)
        return self.of(value.to_dicts() if is_frame else value.to_list(), depth + 1)

    def _of_pandas(self, value: Any, depth: int) -> Any:
        from llmkit.notebook.tables import has_plain_index

        if value.size > MOST_VALUES:
            self._seen = MOST_VALUES
        if not instance_of(value, "pandas", "DataFrame", "Series"):
            return self.of(value.tolist(), depth + 1)
        if instance_of(value, "pandas", "Series"):
            if has_plain_index(value):
                return self.of(value.tolist(), depth + 1)
            if value.index.is_unique:
                return self.of(dict(zip(value.index.tolist(), value.tolist(), strict=True)), depth + 1)
            value = value.to_frame()
        from llmkit.notebook.tables import distinct, grid

        names, columns = grid(value)
        names = distinct(names)
        rows = zip(*columns, strict=True) if columns else ()
        return [self.of(dict(zip(names, row, strict=True)), depth + 1) for row in rows]

    def _key(self, key: Any) -> str:
        if isinstance(key, str):
            return str(key.value) if isinstance(key, Enum) else key
        inner = self.of(key, _DEEPEST - 2)
        return inner if isinstance(inner, str) else json.dumps(inner, ensure_ascii=False)


def _inside(value: Any) -> dict[str, Any] | None:
    """The parts of an object that have names."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return dict(value._asdict())
    fields = fields_of(value)
    return attributes_of(value) or None if fields is None else fields


def _is_of_pandas(value: Any) -> bool:
    of_extension = instance_of(value, "pandas.api.extensions", "ExtensionArray")
    return of_extension or instance_of(value, "pandas", "DataFrame", "Series", "Index")


def _single(value: Any) -> str | None:
    pandas = sys.modules.get("pandas")
    if pandas is not None and (value is pandas.NaT or value is pandas.NA):
        return None
    return value.isoformat() if isinstance(value, date | time) else _text(value)
