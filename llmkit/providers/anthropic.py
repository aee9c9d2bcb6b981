"""Anthropic's Messages API, as Anthropic and vLLM's ``/v1/messages`` speak it.

``seed`` is not sent: the format has no such field. ``max_tokens`` is always sent, since the format demands it; see
`max_tokens_sent`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from llmkit.errors import InvalidRequest
from llmkit.models.windows import max_output
from llmkit.providers.wire import ErrorInside, Malformed, Signal, ToolCalls, amount, encoded, merged, name_in, parsed
from llmkit.reply import Chunk, Usage

if TYPE_CHECKING:
    from llmkit.call import Call, Message
    from llmkit.endpoint import Endpoint
    from llmkit.reply import Head

__all__ = ["DEFAULT_MAX_TOKENS", "AnthropicDecoder", "AnthropicWire", "max_tokens_sent"]

DEFAULT_MAX_TOKENS = 4096
"""What is sent where neither the call nor the model says how long an answer may be."""

_VERSION = "2023-06-01"
_RESERVED = frozenset({"messages", "model", "stream", "system"})
_FINISH_REASONS = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
}
_DATA_URL = re.compile(r"data:([\w.+/-]{1,100});base64,")


def max_tokens_sent(call: Call, endpoint: Endpoint) -> int:
    """The output limit that a request carries: the call's, else the most the model gives, else `DEFAULT_MAX_TOKENS`."""
    return call.params.max_tokens or max_output(endpoint) or DEFAULT_MAX_TOKENS


class AnthropicWire:
    """``POST {base_url}/messages``."""

    path = "/messages"

    def headers(self, key: str | None) -> list[tuple[str, str]]:
        version = ("anthropic-version", _VERSION)
        return [("x-api-key", key), version] if key else [version]

    def body(self, call: Call, endpoint: Endpoint) -> dict[str, Any]:
        params = call.params
        shape = None if call.schema is None or "no_json_schema" in endpoint.quirks else call.schema.plain
        messages = call.messages if shape is not None else call.said
        body: dict[str, Any] = {
            "model": endpoint.model,
            "max_tokens": max_tokens_sent(call, endpoint),
            "messages": [_said(message, endpoint) for message in messages if message.role not in _SYSTEM],
        }
        system = "\n\n".join([message.text for message in messages if message.role in _SYSTEM])
        if system:
            body["system"] = system
        if call.stream:
            body["stream"] = True
        if params.temperature is not None:
            body["temperature"] = params.temperature
        if params.top_p is not None:
            body["top_p"] = params.top_p
        if params.stop:
            body["stop_sequences"] = list(params.stop)
        body = merged(body, params.extra, _RESERVED) if params.extra else body
        if shape is not None:
            config = body.get("output_config")  # the user's own, such as an effort
            form = {"format": {"type": "json_schema", "schema": shape}}
            body["output_config"] = {**config, **form} if isinstance(config, dict) else form
        return body

    def decoder(self, head: Head) -> AnthropicDecoder:
        return AnthropicDecoder(head)


_SYSTEM = frozenset({"system", "developer"})


def _said(message: Message, endpoint: Endpoint) -> dict[str, Any]:
    if message.role not in {"user", "assistant"}:
        raise _unsayable(f"a message of the role {message.role!r}", endpoint)
    if isinstance(message.content, str):
        return {"role": message.role, "content": message.content}
    return {"role": message.role, "content": [_part(part, endpoint) for part in message.content]}


def _part(part: dict[str, Any], endpoint: Endpoint) -> dict[str, Any]:
    """A content part in OpenAI's form as a content block; a block in Anthropic's own form passes unchanged."""
    if part.get("type") != "image_url":
        return part
    image = part.get("image_url")
    url = image.get("url") if isinstance(image, dict) else image
    if not isinstance(url, str):
        raise _unsayable("an image without a URL", endpoint)
    inline = _DATA_URL.match(url)
    if inline:
        return {"type": "image", "source": {"type": "base64", "media_type": inline[1], "data": url[inline.end() :]}}
    return {"type": "image", "source": {"type": "url", "url": url}}


def _unsayable(what: str, endpoint: Endpoint) -> InvalidRequest:
    message = f"{endpoint.name}: {what} cannot be said in Anthropic's format"
    return InvalidRequest(message, provider=endpoint.provider, model=endpoint.model)


class AnthropicDecoder:
    """Reads one reply."""

    __slots__ = ("_tools", "_usage", "head")

    def __init__(self, head: Head) -> None:
        self.head = head
        self._tools = ToolCalls(head)
        self._usage: dict[str, Any] = {}

    def event(self, payload: bytes) -> Chunk | Signal | None:
        if not payload:
            return None
        event = parsed(payload)
        if type(event) is not dict:
            raise Malformed("an event is not an object")
        kind = event.get("type")
        if kind == "content_block_delta":
            return self._delta(_part_of(event, "delta"), event.get("index"))
        if kind == "content_block_start":
            return self._block(_part_of(event, "content_block"), event.get("index"))
        if kind == "message_start":
            self._describe(_part_of(event, "message"))
        elif kind == "message_delta":
            self._stopped(_part_of(event, "delta"))
            self._count(event.get("usage"))
        elif kind == "message_stop":
            return Signal.DONE
        elif kind == "error" or "error" in event:
            raise ErrorInside(event)
        return None

    def whole(self, document: Any) -> Chunk | None:
        if type(document) is not dict:
            raise Malformed("the response is not an object")
        if document.get("type") == "error" or document.get("error"):
            raise ErrorInside(document)
        blocks = document.get("content")
        if type(blocks) is not list:
            raise Malformed("the response has no content")
        self._describe(document)
        self._stopped(document)
        texts, thoughts = [], []
        for index, block in enumerate(blocks):
            if type(block) is not dict:
                raise Malformed("a content block is not an object")
            step = self._block(block, index)
            if type(step) is Chunk:
                texts.append(step.text)
                thoughts.append(step.reasoning)
        text, reasoning = "".join(texts), "".join(thoughts)
        return Chunk(text, reasoning) if text or reasoning else None

    def finish(self) -> None:
        self._tools.finish()

    def _delta(self, delta: dict[str, Any], index: Any) -> Chunk | Signal | None:
        kind = delta.get("type")
        if kind == "text_delta":
            return _chunk(delta.get("text"))
        if kind == "thinking_delta":
            return _chunk(delta.get("thinking"), reasoning=True)
        if kind == "input_json_delta":
            self._tools.add(_position(index), {"function": {"arguments": delta.get("partial_json")}})
            return Signal.PROGRESS
        return None

    def _block(self, block: dict[str, Any], index: Any) -> Chunk | Signal | None:
        kind = block.get("type")
        if kind == "text":
            return _chunk(block.get("text"))
        if kind == "thinking":
            return _chunk(block.get("thinking"), reasoning=True)
        if kind == "tool_use":
            given = block.get("input")
            arguments = _encoded(given) if given else ""
            function = {"name": block.get("name"), "arguments": arguments}
            self._tools.add(_position(index), {"id": block.get("id"), "function": function})
            return Signal.PROGRESS
        return None

    def _describe(self, message: dict[str, Any]) -> None:
        model = message.get("model")
        if type(model) is str and model:
            self.head.model = name_in(model)
        identity = message.get("id")
        if self.head.provider_request_id is None and type(identity) is str and identity:
            self.head.provider_request_id = name_in(identity)
        self._count(message.get("usage"))

    def _stopped(self, message: dict[str, Any]) -> None:
        reason = message.get("stop_reason")
        if type(reason) is str:
            self.head.finish_reason = _FINISH_REASONS.get(reason) or name_in(reason)

    def _count(self, usage: Any) -> None:
        """What ``message_delta`` counts is cumulative, but leaves out what ``message_start`` has said."""
        if type(usage) is not dict:
            return
        self._usage.update({name: value for name, value in usage.items() if value is not None})
        self.head.usage = usage_from(self._usage)
        tier = usage.get("service_tier")
        if type(tier) is str:
            self.head.service_tier = name_in(tier)


def usage_from(usage: dict[str, Any]) -> Usage:
    """Anthropic's usage, whose ``input_tokens`` leave out what its cache read or wrote."""
    cached = amount(usage, "cache_read_input_tokens")
    written, written_1h, reasoning = amount(usage, "cache_creation_input_tokens"), 0, 0
    split = usage.get("cache_creation")
    if type(split) is dict:
        written_1h = amount(split, "ephemeral_1h_input_tokens")
        written = max(written, written_1h + amount(split, "ephemeral_5m_input_tokens"))
    details = usage.get("output_tokens_details")
    if type(details) is dict:
        reasoning = amount(details, "thinking_tokens")
    input_tokens = amount(usage, "input_tokens") + cached + written
    return Usage(input_tokens, amount(usage, "output_tokens"), cached, written, written_1h, reasoning)


def _part_of(event: dict[str, Any], name: str) -> dict[str, Any]:
    part = event.get(name)
    if type(part) is not dict:
        raise Malformed(f"{name} is {type(part).__name__}, not an object")
    return part


def _chunk(text: Any, *, reasoning: bool = False) -> Chunk | None:
    if text is None or text == "":
        return None
    if type(text) is not str:
        raise Malformed(f"a text is {type(text).__name__}")
    return Chunk("", text) if reasoning else Chunk(text)


def _position(index: Any) -> int:
    return index if type(index) is int else 0


def _encoded(given: Any) -> str:
    try:
        return encoded(given).decode()
    except (ValueError, RecursionError) as error:
        raise Malformed("the input of a tool call is not JSON") from error
