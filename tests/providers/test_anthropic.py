"""Anthropic's wire format: what is asked, and every way in which it is answered."""

from __future__ import annotations

import asyncio
import json

import pytest

from llmkit.call import Message, Params
from llmkit.errors import BadResponse, InvalidRequest, ProviderOverloaded, Refused, StreamBroken
from llmkit.providers.anthropic import AnthropicDecoder
from llmkit.providers.wire import ErrorInside, Malformed
from llmkit.reply import Head, Usage
from tests.providers.loopback import Scripted, call, endpoint, provider
from tests.providers.loopback import ask as ask_any
from tests.providers.loopback import failure as failure_any

CLAUDE = endpoint("anthropic")


def ask(*pieces, **arguments):
    return ask_any(*pieces, to=CLAUDE, **arguments)


def failure(*pieces, **arguments):
    return failure_any(*pieces, to=CLAUDE, **arguments)


def asked(prompt="hi", to=CLAUDE, **options):
    transport = Scripted(json.dumps(whole()).encode())
    asyncio.run(provider(transport)(call(to, prompt, **options)))
    return transport


def whole(*blocks, stop="end_turn", **usage):
    return {
        "type": "message",
        "id": "msg_1",
        "model": "claude-x-1",
        "content": list(blocks) or [{"type": "text", "text": "hello"}],
        "stop_reason": stop,
        "usage": {"input_tokens": 3, "output_tokens": 2, **usage},
    }


def events(*between, stop="end_turn", last=None, done=True, **usage):
    """A stream: what comes between its start and its end, as it is on the wire."""
    start = {"type": "message_start", "message": {**whole(stop=None, output_tokens=1, **usage), "content": []}}
    end = {"type": "message_delta", "delta": {"stop_reason": stop}, "usage": last or {"output_tokens": 2}}
    listed = [start, *between, end, *([{"type": "message_stop"}] if done else [])]
    return b"".join(b"event: %s\ndata: %s\n\n" % (e["type"].encode(), json.dumps(e).encode()) for e in listed)


def delta(text, kind="text_delta", name="text", index=0):
    return {"type": "content_block_delta", "index": index, "delta": {"type": kind, name: text}}


START = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
PING = {"type": "ping"}


def test_the_least_request() -> None:
    transport = asked()
    assert transport.sent == {"model": "m-1", "max_tokens": 4096, "messages": [{"role": "user", "content": "hi"}]}
    request = transport.requests[0]
    assert str(request.url) == "http://127.0.0.1:9/v1/messages"
    assert request.headers["x-api-key"] == "sk-verysecret0123456789"
    assert request.headers["anthropic-version"] == "2023-06-01"
    assert "authorization" not in request.headers


def test_the_whole_request() -> None:
    params = Params(temperature=0.0, top_p=0.5, max_tokens=7, seed=1, stop=("END",), extra={"top_k": 3})
    prompt = [
        Message("system", "be kind"),
        Message("developer", "be brief"),
        Message("user", "hi"),
        Message("assistant", "ho"),
    ]
    assert asked(prompt, params=params, stream=True).sent == {
        "model": "m-1",
        "max_tokens": 7,
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}],
        "system": "be kind\n\nbe brief",
        "stream": True,
        "temperature": 0.0,
        "top_p": 0.5,
        "stop_sequences": ["END"],
        "top_k": 3,
    }


def test_the_output_limit_that_is_sent() -> None:
    assert asked(to=endpoint("anthropic", max_output=900)).sent["max_tokens"] == 900
    assert asked(to=endpoint("anthropic", model="claude-3-5-haiku-latest")).sent["max_tokens"] == 8192


def test_images_in_openais_form_are_converted() -> None:
    def image(url):
        return {"type": "image_url", "image_url": {"url": url}}

    own = {"type": "image", "source": {"type": "file", "file_id": "f"}}
    parts = [{"type": "text", "text": "see"}, image("data:image/png;base64,QUJD"), image("https://x.test/a.png"), own]
    assert asked([Message("user", parts)]).sent["messages"][0]["content"] == [
        {"type": "text", "text": "see"},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "QUJD"}},
        {"type": "image", "source": {"type": "url", "url": "https://x.test/a.png"}},
        own,
    ]


@pytest.mark.parametrize("message", [Message("tool", "x"), Message("user", [{"type": "image_url", "image_url": 7}])])
def test_what_the_format_cannot_say_is_refused(message) -> None:
    with pytest.raises(InvalidRequest, match="Anthropic"):
        asked([message])


def test_a_stream() -> None:
    reply = ask(events(START, PING, delta("hel"), delta("lo"), {"type": "content_block_stop", "index": 0}))
    assert (reply.text, reply.finish_reason, reply.model, reply.head.provider_request_id) == (
        "hello",
        "stop",
        "claude-x-1",
        "msg_1",
    )
    assert reply.head.usage == Usage(3, 2)


def test_a_reply_in_one_piece() -> None:
    blocks = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    reply = ask(json.dumps(whole(*blocks)).encode(), stream=False)
    assert (reply.text, reply.reasoning, reply.finish_reason) == ("ab", "hm", "stop")


def test_thinking_is_reasoning() -> None:
    signature = delta("c2ln", "signature_delta", "signature")
    reply = ask(events(delta("hm", "thinking_delta", "thinking"), signature, delta("yes")))
    assert (reply.text, reply.reasoning) == ("yes", "hm")


CACHE = {"cache_read_input_tokens": 100, "cache_creation_input_tokens": 30}
SPLIT = {"ephemeral_5m_input_tokens": 10, "ephemeral_1h_input_tokens": 20}


@pytest.mark.parametrize(
    ("first", "last", "usage"),
    [
        ({}, {"output_tokens": 9}, Usage(3, 9)),
        (CACHE, {"output_tokens": 9}, Usage(133, 9, 100, 30)),
        ({**CACHE, "cache_creation": SPLIT}, {"output_tokens": 9}, Usage(133, 9, 100, 30, 20)),
        ({"cache_creation": SPLIT}, {"output_tokens": 9}, Usage(33, 9, 0, 30, 20)),
        ({}, {"input_tokens": 7, "output_tokens": 9, **CACHE}, Usage(137, 9, 100, 30)),
        ({"cache_read_input_tokens": None}, {"input_tokens": None, "output_tokens": 9}, Usage(3, 9)),
        ({}, {"output_tokens": 9, "output_tokens_details": {"thinking_tokens": 4}}, Usage(3, 9, reasoning_tokens=4)),
        ({"cache_creation": "x"}, {"output_tokens": 9, "output_tokens_details": None}, Usage(3, 9)),
    ],
)
def test_usage_counts_cached_input_as_input(first, last, usage) -> None:
    assert ask(events(delta("a"), last=last, **first)).head.usage == usage


@pytest.mark.parametrize(
    ("stop", "reason"),
    [
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("max_tokens", "length"),
        ("model_context_window_exceeded", "length"),
        ("tool_use", "tool_calls"),
        ("pause_turn", "pause_turn"),
    ],
)
def test_why_it_stopped(stop, reason) -> None:
    assert ask(events(delta("a"), stop=stop)).finish_reason == reason


@pytest.mark.parametrize("stream", [True, False])
def test_a_refusal(stream) -> None:
    body = (
        events(stop="refusal") if stream else json.dumps({**whole(), "content": [], "stop_reason": "refusal"}).encode()
    )
    error = failure(body, stream=stream)
    assert type(error) is Refused
    assert error.usage.input_tokens == 3


def test_tool_use() -> None:
    start = {
        "type": "content_block_start",
        "index": 1,
        "content_block": {"type": "tool_use", "id": "t", "name": "add", "input": {}},
    }
    pieces = [delta(text, "input_json_delta", "partial_json", 1) for text in ['{"a"', ":1}"]]
    expected = [{"id": "t", "type": "function", "function": {"name": "add", "arguments": '{"a":1}'}}]
    reply = ask(events(start, *pieces, stop="tool_use"))
    assert (reply.head.tool_calls, reply.finish_reason) == (expected, "tool_calls")
    block = {"type": "tool_use", "id": "t", "name": "add", "input": {"a": 1}}
    assert ask(json.dumps(whole(block, stop="tool_use")).encode(), stream=False).head.tool_calls == expected


OVERLOADED = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}


def test_an_error_before_the_first_token_is_the_error_it_would_have_been() -> None:
    error = failure(events(OVERLOADED))
    assert (type(error), error.status, error.retryable) == (ProviderOverloaded, 529, True)


def test_an_error_after_the_first_token_breaks_the_stream() -> None:
    error = failure(events(delta("a"), OVERLOADED, delta("b")))
    assert (type(error), error.text_so_far) == (StreamBroken, "a")
    assert "Overloaded" in error.message


def test_a_stream_without_message_stop() -> None:
    assert ask(events(delta("a"), done=False)).text == "a"
    error = failure(events(delta("a"), stop=None, done=False))
    assert (type(error), error.text_so_far) == (StreamBroken, "a")


def test_the_other_format_is_a_bad_response() -> None:
    assert type(failure(b'{"choices": []}', stream=False)) is BadResponse


WRONG = [7, "x", None, [], {}, [7], {"type": 7}, True]


@pytest.mark.parametrize("value", WRONG, ids=repr)
def test_no_field_of_a_wrong_type_can_hurt(value) -> None:
    documents = [value, {"type": value}]
    for sample in (
        START,
        delta("a"),
        delta("a", "thinking_delta", "thinking"),
        delta("a", "input_json_delta", "partial_json"),
    ):
        documents += [{**sample, name: value} for name in ("delta", "content_block", "index")]
    documents += [{**sample, "delta": {"type": "text_delta", "text": value}} for sample in (delta("a"),)]
    documents += [
        {"type": "message_start", "message": value},
        {"type": "message_delta", "delta": value, "usage": value},
    ]
    documents += [
        {
            "type": "content_block_start",
            "content_block": {"type": "tool_use", "id": value, "name": value, "input": value},
        }
    ]
    documents += [
        {**whole(), name: value} for name in ("content", "usage", "model", "id", "stop_reason", "type", "error")
    ]
    for document in documents:
        payload = json.dumps(document).encode()
        for read in (lambda d, p=payload: d.event(p), lambda d, p=payload: d.whole(json.loads(p))):
            decoder = AnthropicDecoder(Head())
            try:
                read(decoder)
                decoder.finish()
            except (Malformed, ErrorInside):
                pass
