"""OpenAI's chat completions, as OpenAI and everything compatible with it speaks them.

Deviations are quirks of an endpoint, listed in `llmkit.providers.catalog.QUIRKS`. This file follows:

``no_stream_options``
    the server refuses ``stream_options``; usage is then counted by llmkit.
``random_seed``
    the seed goes by this name.
``max_completion_tokens``
    the output limit is sent under this name (OpenAI itself; reasoning models there refuse ``max_tokens``).
``any_json_schema``
    a schema is sent as it was given, since the server enforces all of it.
``no_json_schema``, ``no_json_object``
    the server does not take ``response_format`` of that type; a schema is then an instruction in the system message.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmkit.providers.wire import ErrorInside, Malformed, Signal, ToolCalls, amount, merged, name_in, parsed, text_in
from llmkit.reply import Chunk, Usage

if TYPE_CHECKING:
    from llmkit.call import Call, Message
    from llmkit.endpoint import Endpoint
    from llmkit.reply import Head
    from llmkit.schema import Schema

__all__ = ["OpenAIDecoder", "OpenAIWire"]

_MOST_REFUSAL = 10_000  # characters; it goes into an error
_RESERVED = frozenset({"messages", "model", "stream"})


class OpenAIWire:
    """``POST {base_url}/chat/completions``."""

    path = "/chat/completions"

    def headers(self, key: str | None) -> list[tuple[str, str]]:
        return [("Authorization", f"Bearer {key}")] if key else []

    def body(self, call: Call, endpoint: Endpoint) -> dict[str, Any]:
        params = call.params
        messages, form = (call.messages, None) if call.schema is None else _shaped(call, call.schema, endpoint)
        body: dict[str, Any] = {
            "model": endpoint.model,
            "messages": [{"role": message.role, "content": _content(message)} for message in messages],
        }
        if form is not None:
            body["response_format"] = form
        if call.stream:
            body["stream"] = True
            if "no_stream_options" not in endpoint.quirks:
                body["stream_options"] = {"include_usage": True}
        if params.temperature is not None:
            body["temperature"] = params.temperature
        if params.top_p is not None:
            body["top_p"] = params.top_p
        if params.max_tokens is not None:
            name = "max_completion_tokens" if "max_completion_tokens" in endpoint.quirks else "max_tokens"
            body[name] = params.max_tokens
        if params.seed is not None:
            body["random_seed" if "random_seed" in endpoint.quirks else "seed"] = params.seed
        if params.stop:
            body["stop"] = list(params.stop)
        return merged(body, params.extra, _RESERVED) if params.extra else body

    def decoder(self, head: Head) -> OpenAIDecoder:
        return OpenAIDecoder(head)


def _shaped(call: Call, schema: Schema, endpoint: Endpoint) -> tuple[tuple[Message, ...], dict[str, Any] | None]:
    """The messages and the ``response_format`` that ask for the shape: enforced by the service, or in words."""
    if "no_json_schema" not in endpoint.quirks:
        strict = None if "any_json_schema" in endpoint.quirks else schema.strict
        described = {"name": schema.name, "schema": strict or schema.asked, "strict": strict is not None}
        return call.messages, {"type": "json_schema", "json_schema": described}
    return call.said, None if "no_json_object" in endpoint.quirks else {"type": "json_object"}


def _content(message: Message) -> str | list[dict[str, Any]]:
    content = message.content
    return content if isinstance(content, str) else [_part(part) for part in content]


def _part(part: dict[str, Any]) -> dict[str, Any]:
    """A picture in Anthropic's form as a part in OpenAI's; any other part passes unchanged."""
    source = part.get("source") if part.get("type") == "image" else None
    if not isinstance(source, dict):
        return part
    url = source.get("url")
    if source.get("type") == "base64":
        url = f"data:{source.get('media_type')};base64,{source.get('data')}"
    return part if url is None else {"type": "image_url", "image_url": {"url": url}}


class OpenAIDecoder:
    """Reads one reply."""

    __slots__ = ("_described", "_tools", "head")

    def __init__(self, head: Head) -> None:
        self.head = head
        self._described = False
        self._tools = ToolCalls(head)

    def event(self, payload: bytes) -> Chunk | Signal | None:
        if payload[:1] != b"{":
            payload = payload.strip()
            if payload == b"[DONE]":
                return Signal.DONE
            if not payload:
                return None
        event = parsed(payload)
        if type(event) is not dict:
            raise Malformed("an event is not an object")
        choice = self._choice(event)
        if choice is None:
            return None
        delta = choice.get("delta")
        if type(delta) is not dict:
            delta = choice.get("message")  # a server that streams whole messages
        finish_reason = choice.get("finish_reason")
        if type(finish_reason) is str:
            self.head.finish_reason = name_in(finish_reason)
        if type(delta) is dict:
            return self._delta(delta)
        if delta is not None:
            raise Malformed(f"delta is {type(delta).__name__}, not an object")
        return None

    def whole(self, document: Any) -> Chunk | None:
        if type(document) is not dict:
            raise Malformed("the response is not an object")
        choice = self._choice(document)
        if choice is None:
            if "choices" not in document:
                raise Malformed("the response has no choices")
            return None
        finish_reason = choice.get("finish_reason")
        if type(finish_reason) is str:
            self.head.finish_reason = name_in(finish_reason)
        message = choice.get("message")
        if type(message) is not dict:
            raise Malformed("the choice has no message")
        step = self._delta(message)
        return step if type(step) is Chunk else None

    def _choice(self, document: dict[str, Any]) -> dict[str, Any] | None:
        """The one choice that is shown; what else the document says goes into the head."""
        if document.get("error"):
            raise ErrorInside(document)
        if not self._described:
            self._describe(document)
        usage = document.get("usage")
        if type(usage) is dict:
            self.head.usage = usage_from(usage)
        choices = document.get("choices")
        if not choices:
            return None
        if type(choices) is not list:
            raise Malformed(f"choices is {type(choices).__name__}, not a list")
        for choice in choices:
            if type(choice) is not dict:
                raise Malformed("a choice is not an object")
            if not choice.get("index"):  # 0, null or left out
                return choice
        return None

    def _describe(self, document: dict[str, Any]) -> None:
        if document.get("object") == "error" or ("choices" not in document and _complains(document)):
            raise ErrorInside(document)
        head = self.head
        for name in ("model", "service_tier"):
            value = document.get(name)
            if type(value) is str and value:
                setattr(head, name, name_in(value))
        identity = document.get("id")
        if head.provider_request_id is None and type(identity) is str and identity:
            head.provider_request_id = name_in(identity)
        self._described = head.model is not None

    def _delta(self, delta: dict[str, Any]) -> Chunk | Signal | None:
        step: Signal | None = None
        refusal = delta.get("refusal")
        if refusal and type(refusal) is str:
            told = self.head.refusal or ""
            if len(told) < _MOST_REFUSAL:
                self.head.refusal = (told + refusal)[:_MOST_REFUSAL]
            step = Signal.PROGRESS
        tool_calls = delta.get("tool_calls")
        if tool_calls:
            self._gather(tool_calls)
            step = Signal.PROGRESS
        content = delta.get("content")
        text = content if type(content) is str else text_in(content)
        reasoning = delta.get("reasoning") or delta.get("reasoning_content")
        if text or reasoning:
            return Chunk(text, reasoning if type(reasoning) is str else "")
        return step

    def _gather(self, pieces: Any) -> None:
        """Tool calls come whole or in fragments that name the call by ``index``."""
        if type(pieces) is not list:
            raise Malformed(f"tool_calls is {type(pieces).__name__}, not a list")
        for position, piece in enumerate(pieces):
            if type(piece) is not dict:
                raise Malformed("a tool call is not an object")
            index = piece.get("index")
            self._tools.add(index if type(index) is int else position, piece)

    def finish(self) -> None:
        self._tools.finish()


def _complains(document: dict[str, Any]) -> bool:
    """Whether it is an error although it has no ``error``: some servers tell that by the event's name alone."""
    return any(type(document.get(name)) is str for name in ("message", "detail"))


def usage_from(usage: dict[str, Any]) -> Usage:
    """OpenAI's usage; cached and reasoning tokens are inside its totals already."""
    output_tokens = amount(usage, "completion_tokens")
    prompt = usage.get("prompt_tokens_details")
    completion = usage.get("completion_tokens_details")
    cached = written = reasoning = 0
    if type(prompt) is dict:
        cached = amount(prompt, "cached_tokens")
        written = amount(prompt, "cache_write_tokens")
    if type(completion) is dict:
        reasoning = amount(completion, "reasoning_tokens")
    return Usage(amount(usage, "prompt_tokens"), output_tokens, cached, written, 0, reasoning)
