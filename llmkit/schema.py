"""The shape that an answer must have: how it is said, how services are asked for it, how an answer is checked.

Whatever it was said in (a Pydantic class, a JSON schema, a few words), it is a JSON schema here, and everything that
can be wrong with it is found before anything is sent. Services want an object at the root, so any other root is
wrapped in one, and unwrapped again.

The schema is the user's, the answer is a stranger's: patterns run in an engine with a bounded number of steps, no
reference is ever fetched, and both sizes and depths are bounded.
"""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from llmkit.call import Message
from llmkit.errors import ConfigError
from llmkit.jsontext import NoValue, Value, value_in
from llmkit.redaction import tidy
from llmkit.shorthand import from_short
from llmkit.strictness import ANTHROPIC, OPENAI, references, said_in, wrapped, wrapper_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["LONGEST_PROBLEM", "MAX_BYTES", "MOST_PROBLEMS", "Fit", "Misfit", "Schema"]

MAX_BYTES = 256 * 1024
"""Of a schema as JSON: all of it goes to the model with every call."""

DEEPEST = 64
MOST_PROBLEMS = 10
LONGEST_PROBLEM = 200  # characters
MOST_STEPS = 100_000  # of one pattern on one text

_KEYWORDS = frozenset(
    {"type", "properties", "required", "additionalProperties", "patternProperties", "items", "prefixItems", "enum",
     "const", "anyOf", "oneOf", "allOf", "not", "if", "$ref", "minItems", "minLength", "minimum", "pattern"}
)  # fmt: skip
_WORDS_IN_PLACE = (
    "Answer with one JSON value that fits the JSON schema below, and with nothing else: no words before or after it, "
    "no Markdown fence."
)
_NEEDS_PYDANTIC = "pip install pydantic; or give a JSON schema as a dict, or fields in short: 'name, age int'"


class Misfit(ValueError):
    """An answer does not fit. ``problems``: what is wrong, at most `MOST_PROBLEMS` short sentences."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)


class Fit(NamedTuple):
    """What an answer says in the shape of its schema, and the JSON that says it, unwrapped."""

    data: Any
    text: str


@dataclass(frozen=True, eq=False)
class Schema:
    """The shape of an answer. Made by `Schema.of`; frozen, so that many calls can share it.

    Attributes:
        name: as services are told: letters, digits, ``_`` and ``-``, at most 64.
        shape: the JSON schema; any kind of root.
        made: turns the text of a JSON value into what ``reply.data`` is; None where that is the plain value.
    """

    name: str
    shape: dict[str, Any]
    made: Callable[[str], Any] | None = field(default=None, repr=False)

    @classmethod
    def of(cls, value: Any) -> Schema:
        """The schema that ``value`` says.

        Args:
            value: a Pydantic class (v2), a dataclass, a TypedDict, ``list[…]`` of such (these need Pydantic); a JSON
                schema as a mapping, as JSON text, or as the path of a ``.json`` file; the short form
                (`llmkit.shorthand`); a `Schema`.

        Raises:
            ConfigError: what is wrong with it.
        """
        if isinstance(value, Schema):
            return value
        if isinstance(value, str):
            return _of_text(value)
        if isinstance(value, Mapping):
            return _of_mapping(value)
        return _of_type(value)

    def __post_init__(self) -> None:
        self.__dict__["_validator"] = _checked(self.shape)

    # -- how it is asked for -----------------------------------------------------------------------------------------

    @cached_property
    def is_wrapped(self) -> bool:
        """Whether it is asked for as the one field of an object, because its root is none."""
        return self.shape.get("type") != "object" or any(name in self.shape for name in ("anyOf", "oneOf", "$ref"))

    @cached_property
    def asked(self) -> dict[str, Any]:
        """The JSON schema with an object at its root."""
        return wrapped(self.shape) if self.is_wrapped else self.shape

    @cached_property
    def strict(self) -> dict[str, Any] | None:
        """`asked` as OpenAI's strict mode takes it; None where it cannot be said there."""
        return said_in(OPENAI, self.asked)

    @cached_property
    def plain(self) -> dict[str, Any] | None:
        """`asked` as Anthropic takes it; None where it cannot be said there."""
        return said_in(ANTHROPIC, self.asked)

    @cached_property
    def key(self) -> str:
        """The same for the same schema, another for another one, the order of its properties included."""
        return f"{self.name}\n{_compact(self.shape)}"

    @cached_property
    def instruction(self) -> str:
        """The schema in words, for services that cannot be told it otherwise."""
        return f"{_WORDS_IN_PLACE}\n\n{_compact(self.asked)}"

    @cached_property
    def bound(self) -> str:
        """A text that has at least the tokens that any way of asking adds to a request."""
        longest = max((self.asked, self.strict or {}, self.plain or {}), key=lambda form: len(_compact(form)))
        # Services put a schema into a frame of words of their own, about as long as ours.
        return f"{_WORDS_IN_PLACE}{self.name}{_WORDS_IN_PLACE}\n\n{_compact(longest)}"

    def instructed(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        """``messages`` with the instruction in the system message; some chat templates allow only one, and first."""
        first = messages[0] if messages else None
        if first is not None and first.role in {"system", "developer"}:
            if isinstance(first.content, str):
                return (Message(first.role, f"{first.content}\n\n{self.instruction}"), *messages[1:])
            return (Message(first.role, [*first.content, {"type": "text", "text": self.instruction}]), *messages[1:])
        return (Message("system", self.instruction), *messages)

    # -- how an answer is checked ------------------------------------------------------------------------------------

    def read(self, text: str) -> Any:
        """What ``text`` says in this shape. Raises `Misfit` where it says nothing in it."""
        return self.fit(text).data

    def fit(self, text: str) -> Fit:
        """`read`, and the JSON alone that says it.

        Raises:
            Misfit: it says nothing in this shape.
        """
        try:
            found = value_in(text, "{[" if self.is_wrapped else "{")
        except NoValue as error:
            raise Misfit([tidy(str(error), limit=LONGEST_PROBLEM)]) from None
        wrapper = wrapper_of(self.shape)
        if self.is_wrapped and isinstance(found.value, dict) and found.value.keys() == {wrapper}:
            inside = found.value[wrapper]
            found = Value(inside, _compact(inside))
        if self.made is not None:
            return Fit(self.made(found.text), found.text)
        problems = [_problem(error.instance_path, error.message) for error in self._first_errors(found.value)]
        if problems:
            raise Misfit(problems)
        return Fit(found.value, found.text)

    def _first_errors(self, value: Any) -> list[Any]:
        try:
            validator = self.__dict__["_validator"]
            if validator.is_valid(value):
                return []
            return list(itertools.islice(validator.iter_errors(value), MOST_PROBLEMS))
        except ValueError as error:  # such as a number beyond what its engine holds
            raise Misfit([tidy(str(error), limit=LONGEST_PROBLEM)]) from None


# -- what it is said in ------------------------------------------------------------------------------------------------


def _of_text(text: str) -> Schema:
    said = text.strip()
    if said.lower().endswith(".json") and "\n" not in said:
        return _of_mapping(_parsed(_file(said), f"{said:.200}"))
    if said.startswith("{"):
        return _of_mapping(_parsed(said, "the schema"))
    return Schema("answer", from_short(text))


def _file(path: str) -> str:
    from pathlib import Path

    place = Path(path).expanduser()
    try:
        if not place.exists():
            raise ConfigError(f"there is no file {path:.200}", next_step=f"paths are seen from {Path.cwd()}")
        if not place.is_file():  # of a device or a pipe nobody knows the end
            raise ConfigError(f"{path:.200} is no file")
        if place.stat().st_size > 4 * MAX_BYTES:
            raise ConfigError(f"{path:.200} is too large for a schema")
        return place.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"the schema {path:.200} cannot be read: {tidy(why, limit=200)}") from None


def _parsed(text: str, what: str) -> Mapping[str, Any]:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{what} is not JSON: {tidy(str(error), limit=200)}") from None
    if not isinstance(schema, dict):
        raise ConfigError(f"{what} is a {type(schema).__name__}; a JSON schema is an object")
    return schema


def _of_mapping(schema: Mapping[str, Any]) -> Schema:
    try:
        shape = json.loads(json.dumps(dict(schema), allow_nan=False))  # a copy that nobody changes later
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"the schema cannot be written as JSON: {tidy(str(error), limit=200)}") from None
    if "schema" in shape and "name" in shape and isinstance(shape["schema"], dict):  # as OpenAI's API takes it
        return Schema(_name(shape["name"]), shape["schema"])
    if not _KEYWORDS & shape.keys():
        near = [each for name in shape for each in difflib.get_close_matches(str(name), _KEYWORDS, 1)]
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f"this is no JSON schema: it says neither type nor properties{hint}",
            next_step="{'type': 'object', 'properties': {…}, 'required': […]}; or fields in short: 'name, age int'",
        )
    if "properties" in shape and "type" not in shape:
        shape = {"type": "object", **shape}
    return Schema(_name(shape.get("title")), shape)


def _of_type(value: Any) -> Schema:
    """By Pydantic's own reading of classes and annotations."""
    name = getattr(value, "__name__", None) or re.sub(r"\w+\.", "", str(value))
    if not isinstance(value, type) and not hasattr(value, "__origin__") and not hasattr(value, "__args__"):
        kind = type(value).__name__
        hint = f"; give the class {kind} itself" if hasattr(value, "model_dump") else ""
        raise ConfigError(
            f"a schema is a class, a JSON schema or a text, not a {kind}{hint}",
            next_step="a Pydantic class, a dict with a JSON schema, or fields in short: 'name, age int'",
        )
    try:
        import pydantic
    except ImportError:
        raise ConfigError(f"Pydantic is needed to read {name:.60}", next_step=_NEEDS_PYDANTIC) from None
    if not hasattr(pydantic, "TypeAdapter"):
        raise ConfigError("Pydantic 2 is needed for schemas of classes", next_step="pip install -U pydantic")
    try:
        adapter = pydantic.TypeAdapter(value)
        shape = adapter.json_schema()
    except Exception as error:  # noqa: BLE001 - of the user's own class: whatever it is, it is no schema
        raise ConfigError(f"{name:.60} has no JSON schema: {tidy(str(error), limit=300)}") from None
    return Schema(_name(name), _untitled(shape), _maker(adapter, pydantic.ValidationError))


def _maker(adapter: Any, wrong: type[ValueError]) -> Callable[[str], Any]:
    def made(text: str) -> Any:
        try:
            return adapter.validate_json(text)
        except wrong as error:
            errors = error.errors(include_url=False, include_context=False)  # type: ignore[attr-defined]
            raise Misfit([_problem(each["loc"], each["msg"]) for each in errors[:MOST_PROBLEMS]]) from None
        except Exception as error:
            raise Misfit([_problem((), f"the class's own check failed: {type(error).__name__}: {error}")]) from error

    return made


def _untitled(node: Any, name: str = "") -> Any:
    """Without the titles that Pydantic makes of the names of fields: they say nothing and cost tokens."""
    if isinstance(node, list):
        return [_untitled(each) for each in node]
    if not isinstance(node, dict):
        return node
    return {
        key: {field: _untitled(each, field) for field, each in value.items()}
        if key == "properties" and isinstance(value, dict)
        else _untitled(value)
        for key, value in node.items()
        if key != "title" or value != _titled(name)
    }


def _titled(name: str) -> str:
    return name.replace("_", " ").title()


def _name(name: Any) -> str:
    words = re.sub(r"[^a-zA-Z0-9_-]+", "_", name).strip("_")[:64] if isinstance(name, str) else ""
    return words or "answer"


# -- what must hold ----------------------------------------------------------------------------------------------------


def _checked(shape: dict[str, Any]) -> Any:
    """What checks values against it. Raises a `ConfigError` unless it is within bounds and refers only to itself."""
    try:
        size = len(_compact(shape).encode())
    except (ValueError, RecursionError):
        raise ConfigError("the schema cannot be written as JSON") from None
    if size > MAX_BYTES:
        raise ConfigError(f"the schema has {size} bytes of JSON; at most {MAX_BYTES} are sent with every call")
    if _depth(shape) > DEEPEST:
        raise ConfigError(f"the schema is nested deeper than {DEEPEST} levels")
    for reference in sorted(references(shape)):
        if not reference.startswith("#"):
            raise ConfigError(
                f"the schema refers to {tidy(reference, limit=100)!r}, and nothing is ever fetched",
                next_step="put it into $defs and refer to '#/$defs/NAME'",
            )
    return _compiled(shape)


def _depth(value: Any) -> int:
    level, depth = [value], 0
    while level and depth < 2 * DEEPEST + 2:
        level = [
            inner
            for each in level
            if isinstance(each, dict | list)
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
        depth += 1
    return depth // 2  # a level of a schema is two of JSON: properties and the name of one


def _compiled(shape: dict[str, Any]) -> Any:
    import jsonschema_rs

    try:
        return jsonschema_rs.validator_for(
            shape,
            pattern_options=jsonschema_rs.FancyRegexOptions(backtrack_limit=MOST_STEPS, size_limit=1 << 20),
            validate_formats=True,
            retriever=_nothing,
        )
    except ValueError as error:
        where = "/".join(map(str, getattr(error, "instance_path", ())))
        said = tidy(str(getattr(error, "message", error)), limit=200)
        raise ConfigError(f"the JSON schema is wrong{f' at {where:.100}' if where else ''}: {said}") from None


def _nothing(uri: str) -> NoReturn:
    raise ValueError(f"{uri:.100} is not fetched")


def _problem(path: Sequence[Any], message: str) -> str:
    where = ".".join(map(str, path[:20]))[:80]
    if len(message) > LONGEST_PROBLEM // 2:  # the value stands first and the reason last
        message = f"{message[:40]} … {message[-60:]}"
    return tidy(f"{where}: {message}" if where else message, limit=LONGEST_PROBLEM)


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
