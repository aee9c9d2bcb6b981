"""The end of the chain: what is refused before sending, when a reply begins, hostile servers, and keys."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
import traceback
from contextlib import suppress

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import llmkit
from llmkit.call import Params, Timeouts
from llmkit.errors import (
    AuthenticationError,
    BadResponse,
    CallRejected,
    ConfigError,
    ConnectTimeout,
    EmptyReply,
    InvalidRequest,
    LLMKitError,
    ProviderOverloaded,
    ProviderUnreachable,
    StreamBroken,
)
from llmkit.providers import http as http_module
from llmkit.providers.wire import Malformed, parsed
from llmkit.redaction import Screen
from llmkit.reply import Usage
from llmkit.testing import FakeClock, Fault, Simulator
from tests.providers.loopback import (
    CHUNKED,
    HELLO,
    KEY,
    STOP,
    Body,
    Scripted,
    ask,
    call,
    chunk,
    endpoint,
    failure,
    frames,
    http,
    provider,
    server,
    token,
)

WHOLE = json.dumps(HELLO).encode()


def refused(to, **arguments):
    """The error of a call that must not be sent."""
    transport = Scripted(WHOLE)

    async def main():
        with pytest.raises(LLMKitError) as caught:
            await provider(transport, **arguments)(call(to))
        return caught.value

    error = asyncio.run(main())
    assert not transport.requests
    return error


# -- before sending ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [None, "", "  "])
def test_a_missing_key_names_its_variable(key) -> None:
    error = refused(endpoint(key_required=True), key=key)
    assert type(error) is AuthenticationError
    assert "ACME_KEY" in error.message + error.next_step


def test_a_key_that_is_not_required_may_be_missing() -> None:
    transport = Scripted(WHOLE)
    asyncio.run(provider(transport, key=None)(call()))
    assert "authorization" not in transport.requests[0].headers


@pytest.mark.parametrize("key", ["sk-with blank-123", "sk-line\nbreak-123", "sk-ümlaut-12345"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(key) -> None:
    error = refused(endpoint(key_required=True), key=key)
    assert type(error) is AuthenticationError
    assert key not in error.block() + everything_in(error)


def test_a_key_is_read_at_each_call_and_stripped() -> None:
    transport, environ = Scripted(WHOLE), {"ACME_KEY": "first-key-1\n"}
    one, to = provider(transport), call()
    one._environ = environ
    asyncio.run(one(to))
    environ["ACME_KEY"] = "second-key-2"
    transport.body = Body(WHOLE)
    asyncio.run(one(to))
    assert [r.headers["authorization"] for r in transport.requests] == ["Bearer first-key-1", "Bearer second-key-2"]


def test_offline_lets_only_this_machine_be_called() -> None:
    for url in ("https://api.example.test/v1", "http://10.0.0.1/v1", "http://127.0.0.1.example.test/v1"):
        assert type(refused(endpoint(base_url=url), offline=True)) is CallRejected
    for url in ("http://localhost:1/v1", "http://127.0.0.1/v1", "http://[::1]:9/v1"):
        asyncio.run(provider(Scripted(WHOLE), offline=True)(call(endpoint(base_url=url))))


@pytest.mark.parametrize(
    "url", ["", "acme", "ftp://x/v1", "http://", "http://user:hunter2@x/v1", "http://[::", "http://x:99999999/v1"]
)
def test_a_base_url_that_cannot_be_used_is_an_error_of_the_settings(url) -> None:
    error = refused(endpoint(base_url=url))
    assert type(error) is ConfigError
    assert "hunter2" not in error.block()


def test_an_unknown_wire_format() -> None:
    assert "openai, anthropic" in refused(endpoint("morse")).message


# -- the first token -----------------------------------------------------------------------------------------------------


def opening(*pieces):
    """How many pieces of the response were read when the reply began, and the reply."""
    transport = Scripted(*pieces)

    async def main():
        reply = await provider(transport)(call(stream=True))
        return transport.body.read, reply, reply.text, await reply.read()

    return asyncio.run(main())


def test_a_reply_begins_at_its_first_token() -> None:
    role = frames({"choices": [{"delta": {"role": "assistant", "content": ""}}]}, done=False)
    read, reply, begun, text = opening(b": ping\n\n", role, frames(token("a"), done=False), frames(token("b"), STOP))
    assert (read, begun, text) == (3, "a", "ab")
    assert (reply.source, reply.provider) == ("provider", "acme")


def test_a_reply_may_begin_with_reasoning_or_a_tool_call() -> None:
    thought = frames({"choices": [{"delta": {"reasoning": "hm"}}]}, done=False)
    assert opening(thought, frames(token("b"), STOP))[0] == 1
    tool = frames(
        {"choices": [{"delta": {"tool_calls": [{"index": 0, "id": "t", "function": {"name": "f"}}]}}]}, done=False
    )
    assert opening(tool, frames(token("b"), STOP))[0] == 1


def test_a_simulated_endpoint_says_so() -> None:
    async def main():
        reply = await provider(simulator=Scripted(WHOLE))(call(endpoint(simulated=True)))
        return reply.source

    assert asyncio.run(main()) == "simulated"


def test_an_empty_reply_carries_what_is_billed() -> None:
    error = failure(frames(STOP, {"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 0}}))
    assert (type(error), error.usage) == (EmptyReply, Usage(4, 0))


def test_the_rest_of_a_read_is_handed_on_before_the_error_behind_it() -> None:
    error = failure(frames(token("a"), token("b"), {"error": {"message": "boom"}}))
    assert (type(error), error.text_so_far) == (StreamBroken, "ab")
    assert "boom" in error.message


def test_closing_a_reply_closes_the_response() -> None:
    transport = Scripted(frames(token("a"), done=False), frames(token("b"), done=False), frames(STOP))

    async def main():
        reply = await provider(transport)(call(stream=True))
        await reply.aclose()
        return reply

    reply = asyncio.run(main())
    assert transport.body.closed
    assert (reply.outcome.status, reply.text) == ("aborted", "a")


@pytest.mark.parametrize("pieces", [[b"<html>"], [frames({"error": "no"})], [b"{"], [httpx.ReadError("x")]])
def test_a_response_that_ends_in_an_error_is_closed(pieces) -> None:
    transport = Scripted(*pieces, b"more")
    with pytest.raises(LLMKitError):
        asyncio.run(provider(transport)(call(stream=True)))
    assert transport.body.closed


# -- hostile servers: a good reply where the content is whole, else a named error -------------------------------------------

GOOD = frames(token("héllo"), token(" 世界"), STOP)
SPLIT = [GOOD[i : i + 1] for i in range(len(GOOD))]
PRETTY = json.dumps(HELLO, indent=2).encode()

WELL = {
    "one byte at a time": SPLIT,
    "CRLF": [GOOD.replace(b"\n", b"\r\n")],
    "CR": [GOOD.replace(b"\n", b"\r")],
    "CRLF, one byte at a time": [bytes([b]) for b in GOOD.replace(b"\n", b"\r\n")],
    "no space after the colon": [GOOD.replace(b"data: ", b"data:")],
    "comments": [b": hi\n\n" + GOOD.replace(b"data", b": x\ndata")],
    "event names and ids": [GOOD.replace(b"data", b"event: m\nid: 3\ndata")],
    "a byte order mark": [b"\xef\xbb\xbf", GOOD],
    "blank lines first": [b"\r\n\n", b" \n", GOOD],
    "no [DONE]": [frames(token("héllo"), token(" 世界"), STOP, done=False)],
    "no final blank line": [GOOD[:-2]],
    "no finish reason": [frames(token("héllo"), token(" 世界"))],
    "cut after the finish reason": [GOOD[:-14], httpx.RemoteProtocolError("cut")],
    "garbage after [DONE]": [GOOD, b"data: {{{\n\n"],
    "empty pieces": [b"", GOOD[:9], b"", GOOD[9:]],
    "empty events": [b"data:\n\ndata: \n\n" + GOOD],
    "choices null": [frames({"choices": None}, done=False) + GOOD],
}


@pytest.mark.parametrize("pieces", WELL.values(), ids=WELL.keys())
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("kind", ["text/event-stream", "application/json; charset=utf-8", "text/plain", None])
def test_a_stream_whose_content_is_whole_is_a_good_reply(pieces, stream, kind) -> None:
    headers = {} if kind is None else {"content-type": kind}
    reply = ask(*pieces, stream=stream, headers=headers)
    assert (reply.text, reply.outcome.status) == ("héllo 世界", "complete")


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    "pieces", [[WHOLE], [PRETTY], [b"\xef\xbb\xbf" + WHOLE], [b"\n ", WHOLE, b"\n"], [WHOLE[:9], WHOLE[9:]]]
)
@pytest.mark.parametrize("kind", ["text/event-stream", "application/json", "text/html"])
def test_one_json_document_is_a_good_reply_whatever_was_asked_for(pieces, stream, kind) -> None:
    assert ask(*pieces, stream=stream, headers={"content-type": kind}).text == "hello"


def test_bytes_that_are_not_utf8_are_replaced() -> None:
    assert ask(GOOD.replace("é".encode(), b"\xff")).text.endswith("llo 世界")


def test_a_packed_response_is_unpacked() -> None:
    assert ask(gzip.compress(WHOLE), stream=False, headers={"content-encoding": "gzip"}).text == "hello"


DEEP = b'{"choices":' + b"[" * 200_000
HUGE_INT = b'{"choices":[{"delta":{"content":"a"}}],"created":' + b"9" * 5000 + b"}"

BAD = {
    "nothing": ([], BadResponse),
    "only blanks": ([b"\n\n", b"  "], BadResponse),
    "an HTML page": ([b"<!doctype html><title>Login</title>"], BadResponse),
    "an HTML page said to be a stream": ([b"\n<html><body>x"], BadResponse),
    "plain text": ([b"OK"], BadResponse),
    "plain text like an event": ([b"error: no such thing\n"], ProviderUnreachable),
    "half a document": ([WHOLE[:40]], BadResponse),
    "garbage": ([b"\x00\x01\x02\xff" * 20], BadResponse),
    "a number": ([b"12"], BadResponse),
    "a list": ([b"[1, 2]"], BadResponse),
    "the wrong object": ([b'{"hello": 1}'], BadResponse),
    "no message": ([b'{"choices":[{}]}'], BadResponse),
    "nested too deep": ([DEEP], BadResponse),
    "an error in a 200": ([b'{"error": {"message": "later", "type": "server_error"}}'], ProviderOverloaded),
    "the old vLLM error in a 200": ([b'{"object": "error", "message": "later", "code": 503}'], ProviderOverloaded),
    "garbage JSON in an event": ([b"data: {nope}\n\n"], BadResponse),
    "a deep event": ([b"data: " + DEEP + b"\n\n"], BadResponse),
    "an absurd number": ([b"data: " + HUGE_INT + b"\n\n"], BadResponse),
    "an error event": ([frames({"error": {"message": "busy", "code": 503}})], ProviderOverloaded),
    "a bare string": ([b'data: "hi"\n\n'], BadResponse),
    "only comments": ([b": hi\n\n" * 5], ProviderUnreachable),
    "an end before the first token": ([frames({"choices": [{"delta": {"role": "assistant"}}]}, done=False)], ProviderUnreachable),
    "cut before the first token": ([b": hi\n\n", httpx.ReadError("reset")], ProviderUnreachable),
    "cut in the middle of a document": ([WHOLE[:30], httpx.RemoteProtocolError("cut")], ProviderUnreachable),
    "[DONE] at once": ([b"data: [DONE]\n\n"], EmptyReply),
    "no end of the stream": ([frames(token("a"), done=False)], StreamBroken),
    "half an event at the end": ([frames(token("a"), token("b"), done=False)[:-20]], StreamBroken),
    "cut in the middle": ([frames(token("a"), done=False), httpx.ReadError("reset")], StreamBroken),
    "garbage in the middle": ([frames(token("a"), done=False), b"data: {nope}\n\n", GOOD], StreamBroken),
    "an error in the middle": ([frames(token("a"), {"error": {"message": "boom"}}, token("b"))], StreamBroken),
    "content of a wrong type": ([frames(token(7))], BadResponse),
    "content of a wrong type, later": ([frames(token("a"), token({"x": 1}))], StreamBroken),
    "bad packing": ([b"not gzip"], ProviderUnreachable),
}  # fmt: skip


@pytest.mark.parametrize(("pieces", "kind"), BAD.values(), ids=BAD.keys())
def test_anything_else_is_a_named_error(pieces, kind, request) -> None:
    headers = {"content-encoding": "gzip"} if "packing" in request.node.name else {}
    error = failure(*pieces, headers=headers)
    assert type(error) is kind
    assert len(error.message) < 700
    assert error.__cause__ is None
    if kind is StreamBroken:
        assert error.text_so_far.startswith("a")
        assert not error.retryable
    if kind is ProviderUnreachable:
        assert error.maybe_billed


class Endless(httpx.AsyncByteStream):
    """A body without end, and how much of it was read."""

    def __init__(self, first, piece):
        self.first, self.piece, self.read, self.closed = first, piece, 0, False

    async def __aiter__(self):
        yield self.first
        while not self.closed:
            self.read += len(self.piece)
            yield self.piece

    async def aclose(self):
        self.closed = True


@pytest.mark.parametrize(
    ("first", "piece", "kind"),
    [
        (b'{"choices":"', b"x" * 4096, BadResponse),
        (b"data: ", b"x" * 4096, BadResponse),
        (b"data: x\n", b"data: x\n" * 500, BadResponse),
        (b": ", b"x" * 4096, BadResponse),
        (b": x\n\n", b": x\n\n" * 500, BadResponse),
        (b"\n", b"\n" * 4096, BadResponse),
        (frames(token("a"), done=False), frames(token("b" * 2000), done=False), StreamBroken),
        (frames(token("a"), done=False), b"x" * 4096, StreamBroken),
    ],
)
def test_a_body_without_end_is_ended(monkeypatch, first, piece, kind) -> None:
    monkeypatch.setattr(http_module, "MAX_REPLY_BYTES", 300_000)
    monkeypatch.setattr("llmkit.providers.sse.MAX_EVENT_BYTES", 100_000)
    transport = Scripted()
    transport.body = Endless(first, piece)

    async def main():
        with pytest.raises(LLMKitError) as caught:
            await (await provider(transport)(call(stream=True))).read()
        return caught.value

    assert type(asyncio.run(main())) is kind
    assert transport.body.read < 400_000
    assert transport.body.closed


def test_the_body_of_an_error_is_read_only_in_part() -> None:
    transport = Scripted(status=500)
    transport.body = Endless(b'{"error": "', b"x" * 4096)
    with pytest.raises(ProviderOverloaded):
        asyncio.run(provider(transport)(call()))
    assert transport.body.read < 200_000


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.one_of(st.binary(max_size=40), st.sampled_from([b"data: ", b"\n\n", b"{", GOOD, WHOLE, b"[DONE]"])),
        max_size=8,
    )
)
def test_no_bytes_at_all_make_anything_but_a_reply_or_an_error(pieces) -> None:
    for wire in ("openai", "anthropic"):
        with suppress(LLMKitError):
            ask(*pieces, to=endpoint(wire))


JSONISH = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(
                ["choices", "delta", "message", "content", "usage", "error", "type", "index", "tool_calls", "text"]
            ),
            inner,
        ),
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(JSONISH, max_size=4), st.booleans())
def test_no_json_at_all_makes_anything_but_a_reply_or_an_error(documents, stream) -> None:
    body = frames(*documents) if stream else json.dumps(documents[0] if documents else None).encode()
    for wire in ("openai", "anthropic"):
        with suppress(LLMKitError):
            ask(body, to=endpoint(wire))


@given(st.binary())
def test_the_json_reader_raises_one_thing_only(data) -> None:
    with suppress(Malformed):
        parsed(data)


# -- the way there -------------------------------------------------------------------------------------------------------


class Failing(httpx.AsyncBaseTransport):
    def __init__(self, error):
        self.error = error

    async def handle_async_request(self, request):
        self.error.request = request  # as httpx's client does
        raise self.error


@pytest.mark.parametrize(
    ("error", "kind", "billed", "retryable"),
    [
        (httpx.ConnectTimeout("x"), ConnectTimeout, False, True),
        (httpx.ConnectError("refused"), ProviderUnreachable, False, True),
        (httpx.PoolTimeout("x"), ProviderUnreachable, False, True),
        (httpx.ProxyError("x"), ProviderUnreachable, False, True),
        (httpx.UnsupportedProtocol("x"), ProviderUnreachable, False, False),
        (httpx.LocalProtocolError("x"), InvalidRequest, False, False),
        (httpx.ReadError("x"), ProviderUnreachable, True, True),
        (httpx.WriteError("x"), ProviderUnreachable, True, True),
        (httpx.ReadTimeout("x"), ProviderUnreachable, True, True),
        (httpx.RemoteProtocolError("x"), ProviderUnreachable, True, True),
        (OSError(5, "x"), ProviderUnreachable, True, True),
    ],
)
def test_what_goes_wrong_on_the_way(error, kind, billed, retryable) -> None:
    async def main():
        with pytest.raises(LLMKitError) as caught:
            await provider(Failing(error))(call(timeouts=Timeouts(connect=2.0)))
        return caught.value

    found = asyncio.run(main())
    assert type(found) is kind
    assert (found.maybe_billed, found.retryable) == (billed, retryable)
    assert found.__context__ is None
    if kind is ConnectTimeout:
        assert found.limit == 2.0


# -- keys ----------------------------------------------------------------------------------------------------------------


def everything_in(error):
    """All that a traceback, a log or a debugger would show of an error, the variables of llmkit's own frames included."""
    shown = []
    while error is not None:
        shown.append(repr(error) + str(error) + repr(error.args) + repr(vars(error)))
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if "tests" not in frame.f_code.co_filename:
                shown.append(repr(frame.f_locals))
        error = error.__cause__ or error.__context__
    return "".join(shown)


ECHO = {
    "in an error body": {"status": 401, "pieces": [json.dumps({"error": {"message": f"wrong key {KEY}", "code": KEY}}).encode()]},
    "in a plain error": {"status": 500, "pieces": [f"denied: Bearer {KEY}".encode()]},
    "in a cut-up error": {"status": 400, "pieces": [f"denied: {KEY[:9]}".encode(), KEY[9:].encode()]},
    "in an HTML title": {"pieces": [f"<html><title>{KEY}</title>".encode()]},
    "in a header": {"status": 429, "headers": {"x-request-id": KEY, "retry-after": KEY}, "pieces": [b""]},
    "in garbage": {"pieces": [f"no: {KEY}".encode()]},
    "in garbage JSON": {"pieces": [b'{"x": "%s", ' % KEY.encode()]},
    "in a stream": {"pieces": [frames({"error": {"message": KEY, "type": KEY}})]},
    "later in a stream": {"pieces": [frames(token("a"), {"error": {"message": KEY}})]},
    "escaped": {"status": 400, "pieces": [json.dumps({"error": KEY}).replace("k", "\\u006b").encode()]},
    "in a refusal": {"pieces": [frames({"choices": [{"delta": {"refusal": KEY}, "finish_reason": "stop"}]})]},
    "in the reason of a refusal": {"status": 400, "pieces": [json.dumps({"error": {"message": KEY, "code": "content_filter"}}).encode()]},
}  # fmt: skip


@pytest.mark.parametrize("echo", ECHO.values(), ids=ECHO.keys())
def test_a_key_that_the_server_echoes_is_never_shown(echo) -> None:
    echo = dict(echo)
    error = failure(*echo.pop("pieces"), **echo)
    assert isinstance(error, LLMKitError)
    assert KEY not in error.block() + everything_in(error)


@pytest.mark.parametrize(
    "error",
    [httpx.ReadError(f"at {KEY}"), httpx.ConnectError(KEY), httpx.LocalProtocolError(KEY), httpx.InvalidURL(KEY)],
)
def test_a_key_in_a_foreign_exception_is_never_shown(error) -> None:
    async def main():
        with pytest.raises(LLMKitError) as caught:
            await provider(Failing(error))(call())
        return caught.value

    assert KEY not in everything_in(asyncio.run(main()))


def test_a_key_is_not_shown_by_an_error_of_llmkits_own_engine() -> None:
    async def main():
        with pytest.raises(ProviderUnreachable) as caught:
            await provider()(call(endpoint(base_url="http://127.0.0.1:1/v1")))
        return caught.value

    assert KEY not in everything_in(asyncio.run(main()))


@pytest.mark.parametrize("stream", [True, False])
def test_a_key_in_an_answer_is_taken_out(stream) -> None:
    document = {**HELLO, "model": KEY, "choices": [{"message": {"content": f"it is {KEY}!"}, "finish_reason": KEY}]}
    events = [{"model": KEY, "id": KEY, **token(f"it is {KEY}!")}, {"choices": [{"delta": {}, "finish_reason": KEY}]}]
    reply = ask(
        frames(*events) if stream else json.dumps(document).encode(), stream=stream, headers={"x-request-id": KEY}
    )
    assert reply.text == "it is [redacted]!"
    assert KEY not in f"{reply.model} {reply.finish_reason} {reply.head.provider_request_id}"


def escaped(text):
    return "".join(f"\\u{ord(char):04x}" for char in text)


PIECES = {
    "escaped": [escaped(KEY)],
    "in two": [KEY[:9], KEY[9:]],
    "in two at its second character": [KEY[:1], KEY[1:] + " and on"],
    "one character at a time": list(KEY),
    "escaped in two": [escaped(KEY[:9]), escaped(KEY[9:])],
    "twice": [f"{KEY} and {KEY[:5]}", KEY[5:]],
}


@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES.keys())
@pytest.mark.parametrize("field", ["content", "reasoning"])
def test_a_key_in_pieces_or_escapes_is_taken_out_of_an_answer(pieces, field) -> None:
    body = b"".join(b'data: {"choices":[{"delta":{"%s":"%s"}}]}\n\n' % (field.encode(), p.encode()) for p in pieces)
    reply = ask(frames(token("so: "), done=False) + body + frames(token(" ok"), STOP))
    shown = reply.text + reply.reasoning
    assert "[redacted]" in shown
    assert KEY[3:] not in shown
    assert reply.text.startswith("so: ")
    assert reply.text.endswith(" ok")


def test_a_key_in_escapes_is_taken_out_of_all_that_stands_beside_the_text() -> None:
    secret = escaped(KEY)
    tool = f'{{"id":"{secret}","function":{{"name":"{secret}","arguments":"{secret}"}}}}'
    body = f'{{"id":"{secret}","model":"{secret}","service_tier":"{secret}","choices":[{{"finish_reason":"{secret}","message":{{"content":"so","tool_calls":[{tool}]}}}}]}}'
    reply = ask(body.encode())
    head = reply.head
    shown = [reply.model, reply.finish_reason, head.provider_request_id, head.service_tier, repr(head.tool_calls)]
    assert all("[redacted]" in each and KEY not in each for each in shown)


@given(st.text(alphabet="abcSecr3t-K", max_size=40), st.lists(st.integers(0, 40), max_size=6))
def test_what_only_looks_like_the_beginning_of_a_key_is_not_lost(text, cuts) -> None:
    screen, secret = Screen("Secr3t-K"), "Secr3t-K"
    edges = [0, *sorted(cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(edges)]
    shown = "".join([screen.feed(piece) for piece in pieces]) + screen.end()
    assert shown == text.replace(secret, "Sec[redacted]")


def test_a_key_is_not_shown_by_a_cancelled_call() -> None:
    async def main():
        gone = asyncio.Event()

        async def hang(reader, writer):
            await reader.read()  # until the other side closes
            writer.close()
            gone.set()

        async with await asyncio.start_server(hang, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            own = provider()
            with pytest.raises(TimeoutError) as caught:
                await asyncio.wait_for(own(call(endpoint(base_url=f"http://127.0.0.1:{port}/v1"))), 0.1)
            await own.aclose()
            await gone.wait()
        return caught.value

    assert KEY not in everything_in(asyncio.run(main()))


def test_a_placeholder_for_a_key_is_no_secret() -> None:
    assert ask(frames(token("EMPTY is a word"), STOP), key="EMPTY").text == "EMPTY is a word"


def test_a_repr_shows_no_key() -> None:
    one = provider(Scripted(WHOLE))
    asyncio.run(one(call()))
    assert KEY not in repr(one) + repr(one._targets)


# -- on a real socket ------------------------------------------------------------------------------------------------------


def over_a_socket(*pieces, stream=True, timeouts=None, close=True):
    """Send raw bytes over loopback through llmkit's own engine; returns the reply or the error."""

    async def respond(_, writer):
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        if close:
            writer.close()

    async def main():
        async with server(respond) as seen:
            one = provider()
            try:
                reply = await one(call(endpoint(base_url=seen.base_url), stream=stream, timeouts=timeouts))
                await reply.read()
            except LLMKitError as error:
                return error
            finally:
                await one.aclose()
            return reply

    return asyncio.run(main())


def test_a_good_reply_over_a_socket() -> None:
    assert over_a_socket(http(WHOLE), stream=False).text == "hello"
    assert over_a_socket(CHUNKED, *[chunk(piece) for piece in SPLIT], b"0\r\n\r\n").text == "héllo 世界"
    assert over_a_socket(b"HTTP/1.1 200 OK\r\n\r\n", GOOD).text == "héllo 世界"
    assert over_a_socket(b"HTTP/1.0 200 OK\r\n\r\n" + GOOD).text == "héllo 世界"


@pytest.mark.parametrize(
    ("pieces", "kind"),
    [
        ([], ProviderUnreachable),
        ([b"HTTP/1.1 200"], ProviderUnreachable),
        ([b"SSH-2.0-OpenSSH\r\n\r\n"], ProviderUnreachable),
        ([b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n"], ProviderUnreachable),
        ([b"HTTP/1.1 200 OK\r\n" + b"X: x\r\n" * 10_000 + b"\r\n"], ProviderUnreachable),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n" + WHOLE], ProviderUnreachable),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n" + WHOLE], ProviderUnreachable),
        ([b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n" + WHOLE], ProviderUnreachable),
        ([CHUNKED], ProviderUnreachable),
        ([CHUNKED, b"zz\r\n"], ProviderUnreachable),
        ([CHUNKED, chunk(frames(token("a"), done=False))], StreamBroken),
        ([CHUNKED, chunk(frames(token("a"), done=False)), b"zz\r\n"], StreamBroken),
        ([CHUNKED, chunk(frames(token("a"), done=False)), b"0\r\n\r\n"], StreamBroken),
        ([http(b"<html>", content_type=b"text/html")], BadResponse),
        ([http(b"no", status=b"500 Oh")], ProviderOverloaded),
        ([b"HTTP/1.1 307 Moved\r\nLocation: http://192.0.2.1/\r\nContent-Length: 0\r\n\r\n"], BadResponse),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"], BadResponse),
        ([b"HTTP/1.1 204 No Content\r\n\r\n"], BadResponse),
    ],
)
def test_a_hostile_server_on_a_socket(pieces, kind) -> None:
    error = over_a_socket(*pieces)
    assert type(error) is kind
    assert error.__context__ is None


def test_a_hundred_megabytes_where_a_kilobyte_was_due(monkeypatch) -> None:
    monkeypatch.setattr(http_module, "MAX_REPLY_BYTES", 1_000_000)
    written = 0

    async def respond(_, writer):
        nonlocal written
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 104857600\r\n\r\n{")
        while written < 100 * 1024 * 1024:
            writer.write(b" " * 65536)
            written += 65536
            await writer.drain()

    async def main():
        async with server(respond) as seen:
            one = provider()
            with pytest.raises(BadResponse, match="more than 0 MiB"):
                await one(call(endpoint(base_url=seen.base_url)))
            await asyncio.wait_for(seen.gone.wait(), 5)
            await one.aclose()

    asyncio.run(main())
    assert written < 20 * 1024 * 1024  # what the buffers of two sockets hold, and no more


def test_the_parameters_of_the_call_arrive() -> None:
    async def respond(_, writer):
        writer.write(http(WHOLE))

    async def main():
        async with server(respond) as seen:
            one = provider()
            await one(call(endpoint(base_url=seen.base_url), params=Params(max_tokens=5)))
            await one.aclose()
            return seen.requests[0]

    head, _, body = asyncio.run(main()).partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/chat/completions HTTP/1.1\r\n")
    assert b"Accept-Encoding: identity" in head
    assert head.lower().count(b"content-type:") == head.lower().count(b"user-agent:") == 1
    assert json.loads(body)["max_tokens"] == 5


def streamed_twice(respond):
    """Two streamed calls, one after the other: their texts, and how many connections they took."""

    async def main():
        async with server(respond) as seen:
            one = provider()
            texts = []
            for _ in range(2):
                reply = await one(call(endpoint(base_url=seen.base_url), stream=True))
                texts.append(await asyncio.wait_for(reply.read(), 5))
            await one.aclose()
            return texts, seen.connections

    return asyncio.run(main())


def test_a_stream_that_has_said_all_leaves_its_connection_to_the_next() -> None:
    async def respond(_, writer):
        writer.write(CHUNKED + chunk(GOOD))
        await asyncio.sleep(0.002)
        writer.write(b"0\r\n\r\n")

    assert streamed_twice(respond) == (["héllo 世界"] * 2, 1)


def test_a_server_that_never_ends_its_stream_holds_nobody_up() -> None:
    async def respond(_, writer):
        writer.write(CHUNKED + chunk(GOOD))

    assert streamed_twice(respond) == (["héllo 世界"] * 2, 2)


@pytest.mark.parametrize("wire", ["openai", "anthropic"])
@pytest.mark.parametrize("stream", [True, False])
def test_the_embedded_simulator_answers_in_both_formats(wire, stream) -> None:
    async def main():
        one = provider(key=None, offline=True)
        reply = await one(call(endpoint(wire, simulated=True, base_url="http://simulator.test/v1"), stream=stream))
        await reply.read()
        await one.aclose()
        return reply

    reply = asyncio.run(main())
    assert reply.text
    assert reply.source == "simulated"
    assert reply.head.usage.output_tokens > 0
    assert reply.finish_reason == "stop"


# -- the moment of sending -----------------------------------------------------------------------------------------------


def sending(transport, respond, on_send):
    """A call with this hook, through an httpx transport or llmkit's own engine. Its end, its trail, and what arrived."""

    async def main():
        async with server(respond) as seen:
            own = provider(transport)
            asked = call(endpoint(base_url=seen.base_url)).to(on_send=on_send)
            try:
                end = await (await own(asked)).read()
            except LLMKitError as error:
                end = error
            await own.aclose()
            return end, asked.trail, seen.requests or getattr(transport, "requests", [])

    return asyncio.run(main())


async def whole(_, writer):
    writer.write(http(WHOLE))


async def hang_up(_, writer):
    writer.close()


@pytest.mark.parametrize("own", [True, False], ids=["own engine", "httpx transport"])
@pytest.mark.parametrize("awaited", [True, False])
def test_who_must_know_hears_of_the_sending_before_it(own, awaited) -> None:
    transport = None if own else Scripted(WHOLE)
    heard = []

    async def later():
        heard.append("later")

    def on_send():
        assert transport is None or not transport.requests
        heard.append("now")
        return later() if awaited else None

    end, trail, requests = sending(transport, whole, on_send)
    assert end == "hello"
    assert heard == (["now", "later"] if awaited else ["now"])
    assert (trail.sent, len(requests)) == (True, 1)


@pytest.mark.parametrize("own", [True, False], ids=["own engine", "httpx transport"])
def test_who_must_know_can_forbid_it(own) -> None:
    error = llmkit.StoreError("the server that keeps the budget is away")

    def on_send():
        raise error

    end, trail, requests = sending(None if own else Scripted(WHOLE), whole, on_send)
    assert end is error
    assert (trail.sent, requests) == (None, [])


def test_what_was_lost_after_the_sending_may_be_billed() -> None:
    end, trail, requests = sending(None, hang_up, None)
    assert type(end) is ProviderUnreachable
    assert (end.maybe_billed, trail.sent, len(requests)) == (True, True, 1)


@pytest.mark.parametrize("end", ["TotalTimeout", "FirstTokenTimeout", "CancelledError"])
@pytest.mark.parametrize("connected", [True, False])
def test_an_attempt_that_never_had_a_connection_is_not_maybe_billed(tmp_path, end, connected) -> None:
    async def main():
        arrived = asyncio.Event()

        async def silent(_, __):
            arrived.set()
            await asyncio.Event().wait()

        clock = FakeClock(auto=False)
        async with server(silent) as seen:
            # Where TLS is spoken to a server that does not answer it, the connection never stands.
            base_url = seen.base_url if connected else seen.base_url.replace("http:", "https:")
            client = llmkit.AsyncClient(
                model="m",
                models={
                    "m": {"provider": "acme", "model": "m", "base_url": base_url, "price": {"input": 1, "output": 1}}
                },
                providers={"acme": {"base_url": base_url}},
                state={"url": f"sqlite:///{tmp_path}/ledger.sqlite3"},
                timeout={"connect": "off", "total": 100, "first_token": 10 if end == "FirstTokenTimeout" else "off"},
                retry={"attempts": 1},
                clock=clock,
            )
            asking = asyncio.create_task(opened(client))
            await asyncio.wait_for((arrived if connected else seen.came).wait(), 10)
            if end == "CancelledError":
                asking.cancel()
            else:
                await clock.advance(101)
            with pytest.raises((LLMKitError, asyncio.CancelledError)) as caught:
                await asking
            (row,) = client.ledger.calls()
            (attempt,) = client.attempts(row["request_id"])
            await client.aclose()
            return caught.value, attempt

    error, attempt = asyncio.run(main())
    assert type(error).__name__ == end
    assert attempt["maybe_billed"] is connected
    if isinstance(error, LLMKitError):
        assert error.maybe_billed is connected
        assert ("had been sent" in error.message) is not connected


async def opened(client):
    await (await client.stream("Hi")).read()


# -- what is asked again -------------------------------------------------------------------------------------------------


def keys(*calls):
    """The ``Idempotency-Key`` of each call."""
    transport = Scripted(WHOLE)

    async def main():
        own = provider(transport)
        for each in calls:
            transport.body = Body(WHOLE)
            await (await own(each)).read()

    asyncio.run(main())
    return [request.headers["idempotency-key"] for request in transport.requests]


def fresh(asked, **changes):
    """The same call once more, asked by itself."""
    return asked.to(trail=llmkit.call.Trail(), request_id="call-2", **changes)


def test_the_same_request_of_the_same_user_has_the_same_key() -> None:
    asked = call(prompt="A secret plan").to(user="ana", request_key="k1")
    first, again = keys(asked, fresh(asked))
    assert first == again
    assert len(first) == 32
    assert set(first) <= set("0123456789abcdef")


DIFFERENT = {
    "another user": {"user": "ben"},
    "no user": {"user": None},
    "another sample": {"request_key": "k2"},
    "another prompt": {"messages": call(prompt="else").messages},
    "another parameter": {"params": Params(max_tokens=5)},
    "streamed": {"stream": True},
    "another model": {"link": call(endpoint(model="m-2")).link},
    "another place": {"link": call(endpoint(base_url="http://127.0.0.1:10/v1")).link},
    "refresh": {"cache": "refresh"},
    "off": {"cache": "off"},
    "without a key": {"request_key": None},
}


@pytest.mark.parametrize("changes", DIFFERENT.values(), ids=DIFFERENT)
def test_another_request_never_has_the_same_key(changes) -> None:
    asked = call().to(user="ana", request_key="k1")
    first, other = keys(asked, fresh(asked, **changes))
    assert first != other


def test_where_a_new_answer_is_wanted_only_attempts_of_one_call_share_a_key() -> None:
    asked = call().to(request_key="k1", cache="refresh")
    another = call(endpoint(model="m-2")).link
    first, retried, fell_back, retried_there, smaller, anew = keys(
        asked,
        asked.to(),
        asked.to(link=another),
        asked.to(link=another),
        asked.to(params=Params(max_tokens=5)),
        fresh(asked),
    )
    assert first == retried == "call-1"
    assert fell_back == retried_there
    assert len({first, fell_back, smaller, anew}) == 4
    assert anew == "call-2"


@pytest.mark.parametrize("own", [True, False], ids=["own engine", "httpx transport"])
def test_an_answer_that_was_lost_on_its_way_is_not_billed_twice(own) -> None:
    simulator = Simulator("one two three four")
    simulator.idempotent = True
    simulator.fail(Fault.cut(2))
    asked = call().to(user="ana", request_key="k1")

    async def ask(base_url):
        asking = provider(None if own else simulator)
        to = call(endpoint(base_url=base_url)).link
        with pytest.raises(LLMKitError) as caught:
            await asking(asked.to(link=to))
        assert caught.value.maybe_billed
        once = simulator.billed
        reply = await asking(fresh(asked, link=to))
        assert await reply.read() == "one two three four"
        assert simulator.billed == once
        refreshed = await asking(fresh(asked, link=to, cache="refresh"))
        await refreshed.read()
        assert simulator.billed.output_tokens == 2 * once.output_tokens
        await asking.aclose()

    with simulator.server() as url:
        asyncio.run(ask(url))
