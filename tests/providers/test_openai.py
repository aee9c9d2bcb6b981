"""OpenAI's wire format: what is asked, and every way in which it is answered."""

from __future__ import annotations

import asyncio
import json

import pytest

from llmkit.call import Message, Params
from llmkit.errors import EmptyReply, InvalidRequest, Refused
from llmkit.providers.openai import OpenAIDecoder
from llmkit.providers.wire import ErrorInside, Malformed
from llmkit.reply import Head, Usage
from tests.providers.loopback import HELLO, STOP, Scripted, ask, call, endpoint, failure, frames, provider, token


def asked(to=None, prompt="hi", **options):
    transport = Scripted(json.dumps(HELLO).encode())
    asyncio.run(provider(transport)(call(to, prompt, **options)))
    return transport


def test_the_least_request() -> None:
    assert asked().sent == {"model": "m-1", "messages": [{"role": "user", "content": "hi"}]}


def test_the_whole_request() -> None:
    params = Params(temperature=0.0, top_p=0.5, max_tokens=7, seed=1, stop=("END",), extra={"top_k": 3, "user": "u"})
    assert asked(prompt=[Message("user", "hi")], system="be kind", params=params, stream=True).sent == {
        "model": "m-1",
        "messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.0,
        "top_p": 0.5,
        "max_tokens": 7,
        "seed": 1,
        "stop": ["END"],
        "top_k": 3,
        "user": "u",
    }


def test_quirks_are_followed() -> None:
    quirks = frozenset({"no_stream_options", "max_completion_tokens", "random_seed"})
    sent = asked(endpoint(quirks=quirks), stream=True, params=Params(max_tokens=7, seed=1)).sent
    assert "stream_options" not in sent
    assert (sent["max_completion_tokens"], sent["random_seed"]) == (7, 1)
    assert not {"max_tokens", "seed"} & sent.keys()


def test_the_headers_of_a_request() -> None:
    request = asked(endpoint(headers=(("X-Team", "a"),))).requests[0]
    assert str(request.url) == "http://127.0.0.1:9/v1/chat/completions"
    assert request.headers["authorization"] == "Bearer sk-verysecret0123456789"
    assert request.headers["idempotency-key"] == "call-1"
    assert request.headers["x-team"] == "a"
    assert request.headers["content-type"] == "application/json"


@pytest.mark.parametrize("name", ["messages", "model", "stream", "max_tokens", "max_completion_tokens"])
def test_extra_cannot_change_what_llmkit_must_know(name) -> None:
    with pytest.raises(InvalidRequest, match=name):
        asked(params=Params(extra={name: 1}))


@pytest.mark.parametrize("name", ["n", "best_of"])
def test_extra_cannot_ask_for_answers_that_are_billed_and_never_read(name) -> None:
    with pytest.raises(InvalidRequest, match="one answer"):
        asked(params=Params(extra={name: 2}))
    asked(params=Params(extra={name: 1}))


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, object()])
def test_what_json_cannot_say_is_refused_before_sending(value) -> None:
    with pytest.raises(InvalidRequest, match="cannot be sent"):
        asked(params=Params(extra={"x": value}))


def test_a_lone_surrogate_in_a_prompt_is_sent_as_a_question_mark() -> None:
    assert asked(prompt="a\ud800b").sent["messages"][0]["content"] == "a?b"


USAGE = {
    "prompt_tokens": 10,
    "completion_tokens": 5,
    "total_tokens": 15,
    "prompt_tokens_details": {"cached_tokens": 4, "audio_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 2},
}
FULL = Usage(10, 5, cached_input_tokens=4, reasoning_tokens=2)
PLAIN = {"prompt_tokens": 10, "completion_tokens": 5}


@pytest.mark.parametrize(
    ("events", "usage"),
    [
        ([token("a"), STOP, {"choices": [], "usage": USAGE}], FULL),
        ([token("a"), STOP, {"choices": [{"index": 0, "delta": {}}], "usage": USAGE}], FULL),
        ([token("a"), {**STOP, "usage": USAGE}], FULL),
        ([token("a"), STOP, {"usage": USAGE}], FULL),
        ([{**token("a"), "usage": None}, {**STOP, "usage": None}, {"choices": [], "usage": USAGE}], FULL),
        ([{**token("a"), "usage": {"prompt_tokens": 10, "completion_tokens": 1}}, {**STOP, "usage": USAGE}], FULL),
        ([token("a"), {**STOP, "usage": {**PLAIN, "prompt_tokens_details": None, "completion_tokens_details": None}}], Usage(10, 5)),
        ([token("a"), {**STOP, "usage": {**PLAIN, "prompt_tokens_details": {"cached_tokens": None}}}], Usage(10, 5)),
        ([token("a"), {**STOP, "usage": {"prompt_tokens": -1, "completion_tokens": "5"}}], Usage(0, 0)),
        ([token("a"), {**STOP, "usage": {"prompt_tokens": 10.0, "completion_tokens": 10**30}}], Usage(10, 0)),
        ([token("a"), {**STOP, "usage": "ten"}], None),
        ([token("a"), STOP], None),
    ],
)  # fmt: skip
def test_usage_in_every_form(events, usage) -> None:
    reply = ask(frames(*events))
    assert reply.text == "a"
    assert reply.head.usage == usage


def test_usage_of_a_reply_in_one_piece() -> None:
    assert ask(json.dumps({**HELLO, "usage": USAGE}).encode(), stream=False).head.usage == FULL


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_is_kept_apart_from_the_text(name) -> None:
    first = {"choices": [{"delta": {"role": "assistant", "content": None, name: "hm"}}]}
    reply = ask(frames(first, token("yes"), STOP))
    assert (reply.text, reply.reasoning) == ("yes", "hm")


def test_what_is_known_of_a_reply_beside_its_text() -> None:
    events = [{"id": "c-7", "model": "m-1-2026", "service_tier": "flex", **token("a")}, token("b"), STOP]
    reply = ask(frames(*events))
    assert (reply.model, reply.head.provider_request_id, reply.head.service_tier, reply.finish_reason) == (
        "m-1-2026",
        "c-7",
        "flex",
        "stop",
    )
    assert ask(frames(*events), headers={"x-request-id": "req-1"}).head.provider_request_id == "req-1"


def test_tool_calls_are_put_together() -> None:
    def piece(index, **fields):
        return {"choices": [{"delta": {"tool_calls": [{"index": index, **fields}]}}]}

    reply = ask(
        frames(
            piece(0, id="t1", function={"name": "add", "arguments": ""}),
            piece(0, function={"arguments": '{"a":'}),
            piece(1, id="t2", function={"name": "now", "arguments": "{}"}),
            piece(0, function={"arguments": "1}"}),
            {"choices": [{"delta": {}, "finish_reason": "tool_calls"}]},
        )
    )
    assert reply.text == ""
    assert reply.head.tool_calls == [
        {"id": "t1", "type": "function", "function": {"name": "add", "arguments": '{"a":1}'}},
        {"id": "t2", "type": "function", "function": {"name": "now", "arguments": "{}"}},
    ]


def test_tool_calls_in_one_piece() -> None:
    calls = [{"id": f"t{i}", "type": "function", "function": {"name": "f", "arguments": f"[{i}]"}} for i in range(2)]
    message = {"role": "assistant", "content": None, "tool_calls": calls}
    body = {"choices": [{"message": message, "finish_reason": "tool_calls"}]}
    assert ask(json.dumps(body).encode(), stream=False).head.tool_calls == calls


def test_only_the_first_of_several_choices_is_shown() -> None:
    def other(text):
        return {"choices": [{"index": 1, "delta": {"content": text}, "finish_reason": None}]}

    assert ask(frames(other("x"), token("a"), other("y"), token("b"), STOP)).text == "ab"
    choices = [{"index": i, "message": {"content": text}, "finish_reason": "stop"} for i, text in [(1, "x"), (0, "a")]]
    assert ask(json.dumps({"choices": choices}).encode(), stream=False).text == "a"


def test_content_in_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "thinking"}, {"type": "text", "text": "b"}]
    assert ask(frames(token(parts), STOP)).text == "ab"


@pytest.mark.parametrize("stream", [True, False])
def test_a_refusal(stream) -> None:
    if stream:
        body = frames({"choices": [{"delta": {"refusal": "I "}}]}, {"choices": [{"delta": {"refusal": "won't"}}]}, STOP)
    else:
        message = {"content": None, "refusal": "I won't"}
        body = json.dumps({"choices": [{"message": message, "finish_reason": "stop"}], "usage": PLAIN}).encode()
    error = failure(body, stream=stream)
    assert (type(error), error.reason) == (Refused, "I won't")
    assert stream or error.usage == Usage(10, 5)


@pytest.mark.parametrize("stream", [True, False])
def test_a_refusal_without_end_is_cut_and_shown_on_one_line(stream) -> None:
    words = "no \x1b[2Jno\n" * 5_000
    if stream:
        body = frames(
            *[{"choices": [{"delta": {"refusal": words[at : at + 50]}}]} for at in range(0, len(words), 50)], STOP
        )
    else:
        message = {"content": None, "refusal": words}
        body = json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}).encode()
    error = failure(body, stream=stream)
    assert type(error) is Refused
    assert len(error.reason) == 10_000
    assert len(error.message) < 600
    assert error.message.isprintable()


@pytest.mark.parametrize(
    ("sent", "read"),
    [
        (r"a\ud800b", "a\ufffdb"),
        (r"\udc00\uD83D", "\ufffd\ufffd"),
        (r"\ud83d\ude00\n", "😀\n"),
        (r"\\ud800", r"\ud800"),
        (r"\\\ud800", "\\\ufffd"),
    ],
)
def test_half_a_surrogate_pair_is_no_text(sent, read) -> None:
    body = b'data: {"choices":[{"delta":{"content":"%s"},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n' % sent.encode()
    assert ask(body).text == read


def test_names_from_a_server_are_short_and_printable() -> None:
    strange = "m\x1b[2J\n\ud800" + "x" * 1000
    document = {**HELLO, "id": strange, "model": strange}
    document["choices"] = [{**HELLO["choices"][0], "finish_reason": strange}]
    reply = ask(json.dumps(document).encode())
    for name in (reply.model, reply.finish_reason, reply.head.provider_request_id):
        assert name.isprintable()
        assert len(name) == 200


@pytest.mark.parametrize("document", [{"message": "out of memory"}, {"detail": "out of memory"}])
def test_an_error_that_only_the_name_of_its_event_tells(document) -> None:
    error = failure(b"event: error\ndata: " + json.dumps(document).encode() + b"\n\n", stream=True)
    assert "out of memory" in str(error)


@pytest.mark.parametrize("stream", [True, False])
def test_a_limit_spent_on_reasoning_is_an_error_of_its_own(stream) -> None:
    usage = {"prompt_tokens": 9, "completion_tokens": 50, "completion_tokens_details": {"reasoning_tokens": 50}}
    end = {"finish_reason": "length", "index": 0}
    whole = json.dumps({"choices": [{**end, "message": {"content": ""}}], "usage": usage}).encode()
    error = failure(frames({"choices": [{**end, "delta": {}}], "usage": usage}) if stream else whole, stream=stream)
    assert type(error) is EmptyReply
    assert error.reasoning_tokens == 50
    assert error.usage == Usage(9, 50, reasoning_tokens=50)


WRONG = [7, "x", None, [], {}, [7], [[]], {"0": 1}, True, 1e400]


@pytest.mark.parametrize("name", ["choices", "usage", "model", "id", "object", "error", "service_tier"])
@pytest.mark.parametrize("value", WRONG, ids=repr)
def test_no_field_of_a_wrong_type_can_hurt(name, value) -> None:
    for document in ({**HELLO, name: value}, {**token("a"), name: value}):
        only_our_own(document)


@pytest.mark.parametrize("name", ["content", "tool_calls", "refusal", "reasoning", "role"])
@pytest.mark.parametrize(
    "value", [*WRONG, [{"index": {}, "function": 7, "id": []}], [{"function": {"name": 1, "arguments": []}}]], ids=repr
)
def test_no_part_of_a_message_of_a_wrong_type_can_hurt(name, value) -> None:
    for inner in ("message", "delta"):
        only_our_own({"choices": [{"index": 0, inner: {name: value}, "finish_reason": value}]})
        only_our_own({"choices": [{"index": value, inner: value}]})


def only_our_own(document):
    payload = json.dumps(document).encode()
    for read in (lambda d: d.event(payload), lambda d: d.whole(json.loads(payload))):
        decoder = OpenAIDecoder(Head())
        try:
            read(decoder)
            decoder.finish()
        except (Malformed, ErrorInside):
            pass


def test_more_tool_calls_than_anyone_makes_are_refused() -> None:
    decoder = OpenAIDecoder(Head())
    pieces = [{"index": index} for index in range(1000)]
    with pytest.raises(Malformed, match="tool calls"):
        decoder.event(json.dumps({"choices": [{"delta": {"tool_calls": pieces}}]}).encode())


def test_images_in_anthropics_form_are_converted() -> None:
    inline = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "QUJD"}}
    there = {"type": "image", "source": {"type": "url", "url": "https://x.test/a.png"}}
    file = {"type": "image", "source": {"type": "file", "file_id": "f"}}
    own = {"type": "image_url", "image_url": {"url": "https://x.test/b.png", "detail": "low"}}
    assert asked(prompt=[Message("user", [inline, there, file, own])]).sent["messages"][0]["content"] == [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,QUJD"}},
        {"type": "image_url", "image_url": {"url": "https://x.test/a.png"}},
        file,
        own,
    ]
