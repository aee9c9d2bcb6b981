"""The two wire formats from the server's side: what a request asks, and how an answer is written."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol

from llmkit.models.tokens import simulated_tokens
from llmkit.testing.pictures import seen

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["ANTHROPIC", "CREATED", "OPENAI", "Ask", "Frame", "Generation", "Rejected", "Wire", "dumps"]

CREATED = 1_767_225_600
"""When every simulated answer was made: the same request gets the same bytes, so not now."""

Finish = Literal["stop", "length", "stop_sequence", "content_filter", "refusal"]


class Rejected(Exception):
    """The request is not one the service would take; ``kind`` is a key of `Wire.error`."""

    def __init__(self, message: str, *, status: int = 400, kind: str = "invalid") -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A request, in the words of neither format.

    Attributes:
        prompt: the last user message. ``fingerprint``: all that the answer may depend on.
        schema: of the JSON that is asked for; None for any JSON, and False where it is not JSON that is asked for.
        pictures: what is seen of each, in words.
    """

    model: str
    prompt: str
    fingerprint: str
    input_tokens: int
    max_tokens: int | None
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    schema: Any
    pictures: tuple[str, ...] = ()


@dataclass(slots=True, kw_only=True)
class Generation:
    """An answer, in the words of neither format. Its pieces are its tokens."""

    ask: Ask
    answer: list[str]
    reasoning: list[str] = field(default_factory=list)
    show_reasoning: bool = False
    finish: Finish = "stop"
    stopped_by: str | None = None
    refused: bool = False
    cached_tokens: int = 0
    usage: str = "right"

    @property
    def output_tokens(self) -> int:
        return len(self.answer) + len(self.reasoning)

    @property
    def digest(self) -> str:
        """The same for the same request."""
        return hashlib.sha256(self.ask.fingerprint.encode("utf-8", "replace")).hexdigest()[:24]


class Frame(NamedTuple):
    """One event of a stream. ``role`` is ``open``, ``token``, ``hidden`` (a token that is not shown), ``close`` or ``end``."""

    role: str
    data: str
    event: str | None = None
    reasoning: bool = False


class Wire(Protocol):
    """One format."""

    name: str

    def ask(self, body: dict[str, Any]) -> Ask:
        """Read a request; raises `Rejected`."""

    def whole(self, generation: Generation) -> dict[str, Any]:
        """The answer as one document."""

    def frames(self, generation: Generation) -> Iterator[Frame]:
        """The answer as events."""

    def error(self, kind: str, status: int, message: str) -> dict[str, Any]:
        """An error document; ``kind`` is ``invalid``, ``auth``, ``quota``, ``context``, ``model`` or ``status``."""

    def error_frame(self, message: str) -> Frame:
        """An error inside a stream."""


def dumps(document: Any) -> str:
    """Compact JSON, characters as they are."""
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"))


def reported(usage: dict[str, Any], variant: str) -> dict[str, Any] | None:
    """Usage as this variant tells it: right, or nonsense."""
    if variant == "null":
        return None
    if variant not in {"zero", "negative", "text", "huge"}:
        return usage
    nonsense: dict[str, Any] = {}
    for name, value in usage.items():
        nonsense[name] = reported(value, variant) if isinstance(value, dict) else _misreported(value, variant)
    return nonsense


def _misreported(count: int, variant: str) -> Any:
    return {"zero": 0, "negative": -count - 1, "text": "many", "huge": 10**30}[variant]


# -- reading ---------------------------------------------------------------------------------------------------------


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    parts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
    return "\n".join([part for part in parts if isinstance(part, str)])


def _read(body: dict[str, Any], *, system: str, limit: Any, stop: Any, schema: Any, include_usage: bool) -> Ask:
    """What both formats have in common."""
    _check(body, limit)
    model, messages = body["model"], body["messages"]
    texts = [_text(message.get("content")) for message in messages]
    asked = [text for text, message in zip(texts, messages, strict=True) if message["role"] == "user"]
    chosen = {name: body.get(name) for name in ("model", "temperature", "top_p", "seed", "random_seed")}
    said = [(message["role"], message.get("content")) for message in messages]
    try:
        pictures = seen(content for _, content in said)
    except ValueError as error:
        raise Rejected(str(error)) from None
    return Ask(
        model=model,
        prompt=(asked or texts)[-1],
        fingerprint=dumps([chosen, system, said, schema]),
        input_tokens=simulated_tokens(system) + sum(map(simulated_tokens, texts)),
        max_tokens=limit,
        stop=_stops(stop),
        stream=body.get("stream") is True,
        include_usage=include_usage,
        schema=schema,
        pictures=pictures,
    )


def _check(body: dict[str, Any], limit: Any) -> None:
    model, messages, temperature = body.get("model"), body.get("messages"), body.get("temperature")
    if not isinstance(model, str) or not model:
        raise Rejected("model: you must provide one")
    if not isinstance(messages, list) or not messages:
        raise Rejected("messages: at least one message is required")
    if not all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages):
        raise Rejected("messages: each must be an object with a role and content")
    if limit is not None and (type(limit) is not int or limit < 1):
        raise Rejected(f"max_tokens: must be a whole number of at least 1, not {json.dumps(limit)[:40]}")
    if temperature is not None and (type(temperature) not in {int, float} or not 0 <= temperature <= 2):
        raise Rejected(f"temperature: must be between 0 and 2, not {json.dumps(temperature)[:40]}")


def _stops(stop: Any) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(stops, list) or not all(isinstance(each, str) for each in stops):
        raise Rejected("stop: must be a string or a list of strings")
    return tuple(each for each in stops if each)


# -- OpenAI ----------------------------------------------------------------------------------------------------------


class OpenAI:
    """``POST /v1/chat/completions``."""

    name = "openai"
    finishes: ClassVar[dict[str, str]] = {"stop_sequence": "stop", "refusal": "stop"}
    errors: ClassVar[dict[str, tuple[str, str | None]]] = {
        "invalid": ("invalid_request_error", None),
        "auth": ("invalid_request_error", "invalid_api_key"),
        "quota": ("insufficient_quota", "insufficient_quota"),
        "context": ("invalid_request_error", "context_length_exceeded"),
        "model": ("invalid_request_error", "model_not_found"),
    }

    def ask(self, body: dict[str, Any]) -> Ask:
        if body.get("n") not in {None, 1}:
            raise Rejected("n: the simulator gives one choice")
        options = body.get("stream_options")
        limit = body.get("max_completion_tokens")
        return _read(
            body,
            system="",
            limit=body.get("max_tokens") if limit is None else limit,
            stop=body.get("stop"),
            schema=_openai_schema(body),
            include_usage=isinstance(options, dict) and options.get("include_usage") is True,
        )

    def whole(self, generation: Generation) -> dict[str, Any]:
        text = "".join(generation.answer)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if generation.refused:
            message |= {"content": None, "refusal": text}
        elif not generation.answer and generation.reasoning:
            message["content"] = None
        if generation.show_reasoning:
            message["reasoning"] = "".join(generation.reasoning)
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": self._finish(generation)}
        document = self._frame(generation, "chat.completion") | {"choices": [choice]}
        if generation.usage != "none":
            document["usage"] = reported(self._usage(generation, generation.output_tokens), generation.usage)
        return document

    def frames(self, generation: Generation) -> Iterator[Frame]:
        before, after = self._halves(generation)
        every = generation.usage == "each_chunk" and generation.ask.include_usage
        field = "refusal" if generation.refused else "content"

        def chunk(delta: dict[str, Any], finish: str | None = None, sent: int = 0) -> str:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
            tail = f',"usage":{dumps(self._usage(generation, sent))}}}' if every else after
            return f"{before}[{dumps(choice)}]{tail}"

        yield Frame("open", chunk({"role": "assistant", "content": "", "refusal": None}))
        for sent, piece in enumerate(generation.reasoning, 1):
            if generation.show_reasoning:
                yield Frame("token", chunk({"reasoning": piece}, sent=sent), reasoning=True)
            else:
                yield Frame("hidden", "", reasoning=True)
        for sent, piece in enumerate(generation.answer, 1 + len(generation.reasoning)):
            yield Frame("token", chunk({field: piece}, sent=sent))
        yield Frame("close", chunk({}, self._finish(generation), generation.output_tokens))
        if generation.ask.include_usage and generation.usage != "none":
            yield Frame("close", self._usage_chunk(generation))
        yield Frame("end", "[DONE]")

    def error(self, kind: str, status: int, message: str) -> dict[str, Any]:
        if kind in self.errors:
            name, code = self.errors[kind]
        elif status == 429:
            name, code = "requests", "rate_limit_exceeded"
        elif status >= 500:
            name, code = "server_error", None
        else:
            name, code = "invalid_request_error", None
        return {"error": {"message": message, "type": name, "param": None, "code": code}}

    def error_frame(self, message: str) -> Frame:
        return Frame("close", dumps(self.error("status", 500, message)))

    def _finish(self, generation: Generation) -> str:
        return self.finishes.get(generation.finish, generation.finish)

    def _frame(self, generation: Generation, kind: str) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-sim{generation.digest}",
            "object": kind,
            "created": CREATED,
            "model": generation.ask.model,
            "service_tier": "default",
            "system_fingerprint": "fp_simulated",
        }

    def _halves(self, generation: Generation) -> tuple[str, str]:
        """What stands before and after the choices, the same in every chunk of a stream."""
        before = dumps(self._frame(generation, "chat.completion.chunk"))[:-1] + ',"choices":'
        return before, ',"usage":null}' if generation.ask.include_usage else "}"

    def _usage_chunk(self, generation: Generation) -> str:
        choice = {"index": 0, "delta": {}, "finish_reason": None}
        document = self._frame(generation, "chat.completion.chunk")
        document["choices"] = [choice] if generation.usage == "with_choices" else []
        document["usage"] = reported(self._usage(generation, generation.output_tokens), generation.usage)
        return dumps(document)

    def _usage(self, generation: Generation, output_tokens: int) -> dict[str, Any]:
        input_tokens = generation.ask.input_tokens
        return {
            "prompt_tokens": input_tokens,
            "completion_tokens": output_tokens,
            "total_tokens": input_tokens + output_tokens,
            "prompt_tokens_details": {"cached_tokens": generation.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": min(len(generation.reasoning), output_tokens)},
        }


def _openai_schema(body: dict[str, Any]) -> Any:
    wanted = body.get("response_format")
    structured = body.get("structured_outputs")  # vLLM's own
    if isinstance(structured, dict) and isinstance(structured.get("json"), dict):
        return structured["json"]
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    if kind == "json_object":
        return None
    if kind != "json_schema":
        return False
    described = wanted.get("json_schema") if isinstance(wanted, dict) else None
    schema = described.get("schema") if isinstance(described, dict) else None
    if not isinstance(schema, dict):
        raise Rejected("response_format.json_schema.schema: an object is required")
    return schema


# -- Anthropic -------------------------------------------------------------------------------------------------------


class Anthropic:
    """``POST /v1/messages``."""

    name = "anthropic"
    finishes: ClassVar[dict[str, str]] = {"stop": "end_turn", "length": "max_tokens", "content_filter": "refusal"}
    errors: ClassVar[dict[int, str]] = {
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        413: "request_too_large",
        429: "rate_limit_error",
        504: "timeout_error",
        529: "overloaded_error",
    }

    def ask(self, body: dict[str, Any]) -> Ask:
        if body.get("max_tokens") is None:
            raise Rejected("max_tokens: Field required")
        config = body.get("output_config")
        wanted = config.get("format") if isinstance(config, dict) else None
        structured = isinstance(wanted, dict) and wanted.get("type") == "json_schema"
        return _read(
            body,
            system=_text(body.get("system")),
            limit=body["max_tokens"],
            stop=body.get("stop_sequences"),
            schema=wanted.get("schema") if structured and isinstance(wanted, dict) else False,
            include_usage=True,
        )

    def whole(self, generation: Generation) -> dict[str, Any]:
        blocks: list[dict[str, Any]] = []
        if generation.reasoning:
            blocks.append({"type": "thinking", "thinking": "".join(generation.reasoning), "signature": "c2ltdWxhdGVk"})
        if generation.answer:
            blocks.append({"type": "text", "text": "".join(generation.answer)})
        stopped = {"stop_reason": self._finish(generation), "stop_sequence": generation.stopped_by}
        return self._message(generation, blocks, generation.output_tokens) | stopped

    def frames(self, generation: Generation) -> Iterator[Frame]:
        begun = self._message(generation, [], min(1, generation.output_tokens))
        yield _event("open", {"type": "message_start", "message": begun})
        index = 0
        if generation.reasoning:
            yield from _block(index, "thinking", "thinking", generation.reasoning)
            index += 1
        yield _event("open", {"type": "ping"})
        if generation.answer:
            yield from _block(index, "text", "text", generation.answer)
        yield _event("close", self._ending(generation))
        yield _event("end", {"type": "message_stop"})

    def error(self, kind: str, status: int, message: str) -> dict[str, Any]:
        name = self.errors.get(status) or ("api_error" if status >= 500 else "invalid_request_error")
        return {"type": "error", "error": {"type": name, "message": message}, "request_id": f"req_sim_{kind}"}

    def error_frame(self, message: str) -> Frame:
        return _event("close", {"type": "error", "error": {"type": "overloaded_error", "message": message}})

    def _finish(self, generation: Generation) -> str:
        return self.finishes.get(generation.finish, generation.finish)

    def _message(self, generation: Generation, blocks: list[dict[str, Any]], output_tokens: int) -> dict[str, Any]:
        message: dict[str, Any] = {
            "id": f"msg_sim{generation.digest}",
            "type": "message",
            "role": "assistant",
            "model": generation.ask.model,
            "content": blocks,
            "stop_reason": None,
            "stop_sequence": None,
        }
        if generation.usage != "none":
            message["usage"] = reported(self._usage(generation, output_tokens), generation.usage)
        return message

    def _usage(self, generation: Generation, output_tokens: int) -> dict[str, Any]:
        return {
            "input_tokens": generation.ask.input_tokens - generation.cached_tokens,  # the cache's are told apart
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": generation.cached_tokens,
            "output_tokens": output_tokens,
            "output_tokens_details": {"thinking_tokens": min(len(generation.reasoning), output_tokens)},
        }

    def _ending(self, generation: Generation) -> dict[str, Any]:
        delta = {"stop_reason": self._finish(generation), "stop_sequence": generation.stopped_by}
        ending: dict[str, Any] = {"type": "message_delta", "delta": delta}
        if generation.usage != "none":
            output = self._usage(generation, generation.output_tokens)
            counted = {name: output[name] for name in ("output_tokens", "output_tokens_details")}
            ending["usage"] = reported(counted, generation.usage)
        return ending


def _event(role: str, data: dict[str, Any], *, reasoning: bool = False) -> Frame:
    return Frame(role, dumps(data), data["type"], reasoning)


def _block(index: int, kind: str, name: str, pieces: list[str]) -> Iterator[Frame]:
    yield _event("open", {"type": "content_block_start", "index": index, "content_block": {"type": kind, name: ""}})
    for piece in pieces:
        delta = {"type": f"{kind}_delta", name: piece}
        data = {"type": "content_block_delta", "index": index, "delta": delta}
        yield _event("token", data, reasoning=kind == "thinking")
    yield _event("close", {"type": "content_block_stop", "index": index})


OPENAI: Wire = OpenAI()
ANTHROPIC: Wire = Anthropic()
