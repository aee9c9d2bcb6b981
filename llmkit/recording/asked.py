"""What a call asks, above all routes: the one thing that decides whether two calls are the same question.

That is the model as it was asked for, the messages, what shapes the answer, the schema and the number of the sample.
It is not for whom it is asked, how long it may take, what it may cost, whether it is streamed, or what the cache may do.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from llmkit.recording.machine import Neutral, escaped

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from llmkit.call import Call

__all__ = ["DEFAULT", "Asked"]

DEFAULT = "default"
"""Stands for the model of a call that names none: which one that is differs from machine to machine."""

_LONGEST_INLINE = (
    200  # characters of a part that is no text; what is longer is a picture, and stands there by its digest
)
_VERSION = b"llmkit-question/1\n"


@dataclass(frozen=True, slots=True)
class Asked:
    """One question.

    Attributes:
        form: as people read it: ``model``, ``messages``, and what else was said. Plain JSON.
        digest: of the question without what differs between machines; 64 hexadecimal digits.
        also: digests under which it may be known, too: with its model's name, and with each character as it was.
    """

    form: dict[str, Any]
    digest: str
    also: tuple[str, ...] = ()

    @classmethod
    def of(cls, call: Call, default: str | None) -> Asked:
        """The question of ``call``; ``default`` is the model of calls that name none, where that is known."""
        said = _said(call)
        neutral_of = Neutral()
        exact = {**said, "messages": [_with_texts(each, escaped) for each in said["messages"]]}
        neutral = {**said, "messages": [_with_texts(each, neutral_of.out_of) for each in said["messages"]]}
        models = [None, call.model] if call.model == default else [call.model]  # None is no model's name
        forms = [neutral] if neutral == exact else [neutral, exact]
        digests = [_digest(model, each) for each in forms for model in models]
        form = {"model": DEFAULT if call.model == default else call.model, **said}
        return cls(form, digests[0], tuple(digests[1:]))


def _said(call: Call) -> dict[str, Any]:
    params = call.params
    said: dict[str, Any] = {
        "messages": [{"role": each.role, "content": _content(each.content)} for each in call.messages],
        "temperature": _number(params.temperature),
        "top_p": _number(params.top_p),
        "max_tokens": params.max_tokens,
        "seed": params.seed,
        "stop": list(params.stop) or None,
        # Fields of a request come in any order; what is inside them, a schema perhaps, counts in its own.
        "extra": {str(name): _plain(params.extra[name]) for name in sorted(params.extra, key=str)} or None,
        # As it is: the order of its fields is what the model is told.
        "schema": None if call.schema is None else {"name": call.schema.name, "shape": call.schema.shape},
        "repeat": call.repeat or None,
    }
    return {name: value for name, value in said.items() if value is not None}


def _number(value: float | None) -> float | None:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _content(content: str | list[dict[str, Any]]) -> Any:
    if isinstance(content, str):
        return content
    return [_plain(part) if part.get("type") == "text" else _brief(_plain(part)) for part in content]


def _brief(value: Any) -> Any:
    """A part of a message with pictures and the like by their digest."""
    if isinstance(value, dict):
        return {name: _brief(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_brief(each) for each in value]
    if isinstance(value, str) and (value.startswith("data:") or len(value) > _LONGEST_INLINE):
        head, comma, _ = value[:100].partition(",")
        kind = f"{head}," if comma and head.startswith("data:") else ""
        return f"{kind}sha256:{sha256(value.encode('utf-8', 'surrogatepass')).hexdigest()}"
    return value


def _plain(value: Any) -> Any:
    """As JSON has it; what JSON cannot say by how Python shows it."""
    if isinstance(value, bool) or value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        return _number(value) if math.isfinite(value) else repr(value)
    if hasattr(value, "items"):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return Neutral().out_of(repr(value))


def _with_texts(message: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": change(content)}
    return {
        **message,
        "content": [
            {**part, "text": change(part["text"])} if isinstance(part.get("text"), str) else part for part in content
        ],
    }


def _digest(model: str | None, said: Mapping[str, Any]) -> str:
    text = json.dumps([model, said], ensure_ascii=False, separators=(",", ":"))
    return sha256(_VERSION + text.encode("utf-8", "surrogatepass")).hexdigest()
