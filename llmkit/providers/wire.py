"""What a wire format has to know: how to ask, and how to read what comes back.

A format is one class in one file of this package. It knows nothing of sockets, retries or money.
"""

from __future__ import annotations

import json
import re
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

from llmkit.compact import encoded, scan

if TYPE_CHECKING:
    from llmkit.call import Call
    from llmkit.endpoint import Endpoint
    from llmkit.reply import Chunk, Head

__all__ = [
    "MAX_TOOL_CALLS",
    "Decoder",
    "ErrorInside",
    "Malformed",
    "Signal",
    "ToolCalls",
    "Wire",
    "amount",
    "encoded",
    "merged",
    "name_in",
    "parsed",
    "text_in",
]


MAX_TOOL_CALLS = 128


class Malformed(ValueError):
    """What arrived is not the wire format. Never leaves the package of providers."""


class ErrorInside(Exception):
    """An error object where an answer was due. Never leaves the package of providers."""

    def __init__(self, document: Any) -> None:
        super().__init__("an error inside a response")
        self.document = document


class Signal(Enum):
    """What an event without text may mean."""

    PROGRESS = "a piece of the reply that is not shown, such as of a tool call"
    DONE = "the end of the stream, as the format says it"


class Decoder(Protocol):
    """Reads one reply. ``whole`` or ``event`` fill ``head``; both raise only `Malformed` and `ErrorInside`."""

    head: Head

    def event(self, payload: bytes) -> Chunk | Signal | None:
        """One payload of a stream; None where it says nothing new."""

    def whole(self, document: Any) -> Chunk | None:
        """A reply that came as one JSON document."""

    def finish(self) -> None:
        """Nothing more will come: put what is still held back into ``head``."""


class ToolCalls:
    """Tool calls put together from their fragments, in OpenAI's shape, in ``head.tool_calls``."""

    __slots__ = ("_calls", "_head", "_pieces")

    def __init__(self, head: Head) -> None:
        self._head = head
        self._calls: dict[int, dict[str, Any]] = {}
        self._pieces: dict[int, list[str]] = {}

    def add(self, index: int, piece: dict[str, Any]) -> None:
        """One fragment: ``{"id", "function": {"name", "arguments"}}``, each part of it optional."""
        call = self._calls.get(index)
        if call is None:
            if len(self._calls) >= MAX_TOOL_CALLS:
                raise Malformed(f"more than {MAX_TOOL_CALLS} tool calls")
            call = {"id": "", "type": "function", "function": {"name": "", "arguments": ""}}
            self._calls[index] = call
            self._pieces[index] = []
            self._head.tool_calls.append(call)
        function = piece.get("function")
        if type(piece.get("id")) is str:
            call["id"] = name_in(piece["id"])
        if type(function) is not dict:
            return
        if type(function.get("name")) is str and function["name"]:
            call["function"]["name"] = name_in(function["name"])
        arguments = function.get("arguments")
        if type(arguments) is str and arguments:
            self._pieces[index].append(arguments)

    def finish(self) -> None:
        """Join the arguments; done once, since joining at each fragment costs the square of their number."""
        for index, pieces in self._pieces.items():
            self._calls[index]["function"]["arguments"] += "".join(pieces)
            pieces.clear()


class Wire(Protocol):
    """One wire format."""

    path: str

    def headers(self, key: str | None) -> list[tuple[str, str]]:
        """What identifies the caller and the format."""

    def body(self, call: Call, endpoint: Endpoint) -> dict[str, Any]:
        """The request. Raises `InvalidRequest` where ``call`` cannot be said in this format."""

    def decoder(self, head: Head) -> Decoder:
        """A reader for one reply."""


# Every escape, so that none is taken for a part of another; the group is half of a surrogate pair, which no text can
# hold that is to be printed or stored.
_ESCAPE = re.compile(
    r"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|u([dD][89a-fA-F][0-9a-fA-F]{2})|.)", re.DOTALL
)


def _whole(escape: re.Match[str]) -> str:
    return "\\ufffd" if escape[1] else escape[0]


def parsed(payload: bytes) -> Any:
    """Parse JSON from a server; bytes that are not UTF-8 become U+FFFD."""
    text = payload.decode("utf-8", "replace")
    if "\\ud" in text or "\\uD" in text:
        text = _ESCAPE.sub(_whole, text)
    try:
        document, end = scan(text, 0)
        if end == len(text):
            return document
    except StopIteration:
        pass
    except (ValueError, RecursionError) as error:
        raise Malformed("not JSON") from error
    try:
        return json.loads(text)  # with white space round it
    except (ValueError, RecursionError) as error:
        raise Malformed("not JSON") from error


# A cap on cost rests on these.
_LIMITS = frozenset({"max_tokens", "max_completion_tokens", "max_output_tokens", "max_new_tokens"})
_ANSWERS = frozenset({"n", "best_of"})


def merged(body: dict[str, Any], extra: Any, reserved: frozenset[str]) -> dict[str, Any]:
    """``body`` with the user's own fields; those that llmkit itself must know of are refused.

    Raises:
        ValueError: naming the field.
    """
    for name, value in extra.items():
        if name in reserved or name in _LIMITS:
            raise ValueError(f"{name!r} cannot be set through extra: it has a parameter of its own")
        if name in _ANSWERS and value not in (1, None):
            raise ValueError(f"{name!r} must be 1: a reply is one answer, and each further one is billed")
        body[name] = value
    return body


def name_in(value: str) -> str:
    """A name from a server, fit for a person and a store: at most 200 characters, none of them a control."""
    value = value[:200]
    return value if value.isprintable() else "".join([char if char.isprintable() else "\ufffd" for char in value])


def text_in(content: Any) -> str:
    """The text of a ``content`` field: a string, null, or a list of parts.

    Raises:
        Malformed: for anything else.
    """
    if content is None:
        return ""
    if type(content) is str:
        return content
    if type(content) is not list:
        raise Malformed(f"content is {type(content).__name__}, not text")
    texts = [part.get("text") for part in content if isinstance(part, dict)]
    return "".join([text for text in texts if isinstance(text, str)])


def amount(usage: dict[str, Any], name: str) -> int:
    """A token count; 0 for null, negative, absurd or anything that is not a number."""
    value = usage.get(name)
    if type(value) is float and value.is_integer():
        value = int(value)
    return value if type(value) is int and 0 <= value < 10**12 else 0
