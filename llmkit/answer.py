"""An answer as it is stored: what a reply said, apart from the call that it was given to.

The form is a line with a version and a checksum over the key and what follows, a line of JSON, and the text as it is:
the text is most of it, and JSON would take it apart character by character. Whoever can write where answers are kept can
write anything, so nothing is taken from there unchecked; what does not check is `Unreadable`.
"""

from __future__ import annotations

import functools
import json
from hashlib import sha256
from typing import TYPE_CHECKING, Any, NamedTuple

from llmkit.compact import encoded, scan
from llmkit.models.prices import from_nanos, to_nanos
from llmkit.reply import NOTHING, Chunk, Head, Reply, Usage

if TYPE_CHECKING:
    from decimal import Decimal

    from llmkit.call import Call
    from llmkit.clock import Clock
    from llmkit.reply import Outcome

__all__ = ["FINISHED", "MAX_BYTES", "Answer", "Unreadable"]

MAX_BYTES = 64 * 1024 * 1024
"""Of one stored answer. What a provider may send is half of it, and JSON may escape some."""

FINISHED = frozenset(
    {"stop", "tool_calls", "function_call", "end_turn", "stop_sequence", "tool_use", "eos", "eos_token"}
)
"""The finish reasons of an answer that came to its end. Any other may be one that was cut, filtered or broken off."""

_VERSION = b"llmkit-answer/1 "
_HEAD = len(_VERSION) + 64 + 1
_LONGEST_NAME = 500
_MOST_TOOL_CALLS = 128
_MOST_TOKENS = 10**12
_MOST_NANOS = 10**18
_LATEST = 1e12  # epoch seconds


class Unreadable(ValueError):
    """Not an answer that was stored under this key by this version."""


class Answer(NamedTuple):
    """A whole answer.

    Attributes:
        model, provider, finish_reason, usage: as the reply had them; usage None where it was not known.
        tool_calls: JSON, in OpenAI's shape; empty where there are none.
        cost: USD of the attempt that gave it; None where its price is unknown.
        created: epoch seconds.
    """

    text: str
    reasoning: str
    model: str
    provider: str
    finish_reason: str
    usage: Usage | None
    tool_calls: str
    cost: Decimal | None
    created: float

    @classmethod
    def of(cls, outcome: Outcome, created: float) -> Answer | None:
        """The answer of a reply that ended; None where it is not worth keeping.

        Kept is what came to its own end and says something. What was cut, refused, filtered, broken off or made up
        here is not, nor what was no provider's word in the first place.
        """
        reply = outcome.reply
        if outcome.status != "complete" or reply is None or reply.cut is not None:
            return None
        head = reply.head
        finished = head.finish_reason is not None and head.finish_reason.lower() in FINISHED
        if not finished or head.refusal or reply.source not in _GENUINE:
            return None
        text = reply.text
        if not head.tool_calls and not text.strip():
            return None
        if not (_is_name(reply.model) and _is_name(reply.provider)):  # it could not be read again
            return None
        attempts = reply.call.trail.attempts
        return cls(
            text,
            reply.reasoning,
            reply.model,
            reply.provider,
            head.finish_reason or "",
            reply.usage or head.usage,
            encoded(head.tool_calls).decode() if head.tool_calls else "",
            attempts[-1].cost_usd if attempts else None,
            created,
        )

    def reply(self, call: Call, clock: Clock, where: str = "cache") -> Reply:
        """The same answer to another call, all there at once."""
        head = Head()
        head.model = self.model
        head.finish_reason = self.finish_reason
        head.usage = self.usage
        if self.tool_calls:
            head.tool_calls = json.loads(self.tool_calls)
        first = [Chunk(self.text, self.reasoning)] if self.text or self.reasoning else []
        reply = Reply(call, NOTHING, head=head, clock=clock, first=first, provider=self.provider, where=where)
        reply.usage = self.usage
        return reply

    def stored(self, key: str) -> bytes:
        """Its stored form under ``key``."""
        usage, cost = self.usage, self.cost
        fields = {
            "reasoning": self.reasoning,
            "model": self.model,
            "provider": self.provider,
            "finish_reason": self.finish_reason,
            "usage": None if usage is None else _counts(usage),
            "tool_calls": self.tool_calls,
            "cost_nanos": None if cost is None else to_nanos(cost),
            "created": float(self.created),
        }
        body = b"%b\n%b" % (encoded(fields), self.text.encode("utf-8", "replace"))
        return b"%b%b\n%b" % (_VERSION, _checksum(key, body), body)

    @classmethod
    def read(cls, stored: bytes, key: str) -> Answer:
        """The answer in ``stored``.

        Raises:
            Unreadable: why it is none. The reason repeats nothing of it.
        """
        if len(stored) > MAX_BYTES:
            raise Unreadable(f"more than {MAX_BYTES >> 20} MiB")
        if stored[: len(_VERSION)] != _VERSION or stored[_HEAD - 1 : _HEAD] != b"\n":
            raise Unreadable("not the form of this version")
        body = stored[_HEAD:]
        if stored[len(_VERSION) : _HEAD - 1] != _checksum(key, body):
            raise Unreadable("its checksum does not fit")
        try:
            head, _, text = body.partition(b"\n")
            return _checked(scan(head.decode(), 0)[0], text.decode())
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, StopIteration) as error:
            raise Unreadable(f"a field is missing or of the wrong kind ({type(error).__name__})") from None


_GENUINE = frozenset({"provider", "simulated"})


def _checksum(key: str, body: bytes) -> bytes:
    """Over the key, too: an answer that was moved to another key is not the answer to that."""
    checksum = sha256(b"%b\n" % key.encode("utf-8", "replace"))
    checksum.update(body)
    return checksum.hexdigest().encode()


def _checked(fields: Any, text: str) -> Answer:
    """An `Answer` of fields, each of its kind and within its bounds; raises whatever comes handy."""
    reasoning, tool_calls = fields["reasoning"], fields["tool_calls"]
    if type(reasoning) is not str or type(tool_calls) is not str:
        raise TypeError
    if reasoning:
        reasoning.encode()  # half a surrogate pair is no text: printing it would fail
    if tool_calls:
        _check_tool_calls(json.loads(tool_calls))
    elif not text:
        raise ValueError
    model, provider, finish_reason = fields["model"], fields["provider"], fields["finish_reason"]
    if not (
        _is_name(model) and _is_name(provider) and type(finish_reason) is str and finish_reason.lower() in FINISHED
    ):
        raise ValueError
    nanos, created = fields["cost_nanos"], fields["created"]
    if type(created) is not float or not 0 <= created < _LATEST:
        raise ValueError
    if nanos is None:
        cost = None
    elif type(nanos) is int and 0 <= nanos <= _MOST_NANOS:
        cost = from_nanos(nanos)
    else:
        raise ValueError
    counts = fields["usage"]
    usage = None if counts is None else _usage(*counts)
    return Answer(text, reasoning, model, provider, finish_reason, usage, tool_calls, cost, created)


def _is_name(value: Any) -> bool:
    return type(value) is str and len(value) <= _LONGEST_NAME and value.isprintable()


def _counts(usage: Usage) -> list[Any]:
    return [
        usage.input_tokens,
        usage.output_tokens,
        usage.cached_input_tokens,
        usage.cache_write_tokens,
        usage.cache_write_1h_tokens,
        usage.reasoning_tokens,
        usage.estimated,
    ]


@functools.lru_cache(maxsize=1024, typed=True)  # typed: 1, 1.0 and True are not the same here
def _usage(told: Any, given: Any, cached: Any, written: Any, written_1h: Any, reasoning: Any, estimated: Any) -> Usage:
    """What `_counts` made of it."""
    for number in (told, given, cached, written, written_1h, reasoning):
        if type(number) is not int or not 0 <= number <= _MOST_TOKENS:
            raise ValueError
    if type(estimated) is not bool:
        raise TypeError
    return Usage(told, given, cached, written, written_1h, reasoning, estimated)


def _check_tool_calls(calls: Any) -> None:
    if type(calls) is not list or not 0 < len(calls) <= _MOST_TOOL_CALLS:
        raise ValueError
    for call in calls:
        if call.keys() != {"id", "type", "function"} or call["type"] != "function":
            raise ValueError
        function = call["function"]
        if function.keys() != {"name", "arguments"} or type(function["arguments"]) is not str:
            raise ValueError
        if not _is_name(call["id"]) or not _is_name(function["name"]):
            raise ValueError
