"""What real engines were seen to answer (``tests/engines/record.py``), read by llmkit's own provider."""

import asyncio
import json
from email.parser import Parser
from pathlib import Path

import httpx
import pytest

from llmkit.call import Call, Params, messages_from
from llmkit.clock import SystemClock
from llmkit.endpoint import Endpoint, Link
from llmkit.errors import (
    AuthenticationError,
    ContextTooLong,
    InvalidRequest,
    ModelNotFound,
    ProviderOverloaded,
    ProviderRateLimited,
    StreamBroken,
)
from llmkit.providers.http import Provider
from llmkit.reply import Usage

FIXTURES = Path(__file__).parent / "fixtures"


class Recording(httpx.AsyncBaseTransport):
    """Answers with a recorded response, in pieces of ``size`` bytes."""

    def __init__(self, engine, case, size=None):
        head, _, self.body = (FIXTURES / engine / f"{case}.http").read_bytes().partition(b"\n\n")
        status, _, fields = head.decode().partition("\n")
        self.status = int(status.split()[1])
        self.headers = dict(Parser().parsestr(fields).items())
        self.size = size or len(self.body) or 1

    async def handle_async_request(self, request):
        return httpx.Response(self.status, headers=self.headers, stream=Pieces(self.body, self.size))


class Pieces(httpx.AsyncByteStream):
    def __init__(self, body, size):
        self.body, self.size = body, size

    async def __aiter__(self):
        for start in range(0, len(self.body), self.size):
            yield self.body[start : start + self.size]


def asked(engine, case, size=None):
    """The reply to a recorded response, read to its end."""

    async def scenario():
        wire = "anthropic" if case.startswith("messages_") else "openai"
        endpoint = Endpoint(provider=engine, model="tiny", base_url="http://127.0.0.1:1/v1", wire=wire)
        call = Call(
            request_id="r1",
            messages=messages_from("hi"),
            model="m",
            route=(),
            link=Link(endpoint=endpoint),
            started=0.0,
            started_at=0.0,
            params=Params(),
            stream="stream" in case,
        )
        async with asyncio.timeout(10):
            reply = await Provider(SystemClock(), Recording(engine, case, size))(call)
            await reply.read()
        return reply

    return asyncio.run(scenario())


def said(engine, case):
    """The text of a recording, read in the plainest way there is."""
    body = Recording(engine, case).body.decode()
    lines = [line.removeprefix("data: ") for line in body.splitlines() if line.startswith("data: {")] or [body]
    texts = []
    for event in map(json.loads, lines):
        for choice in event.get("choices", ()):
            texts.append(choice.get("delta", choice.get("message")).get("content") or "")
        texts.append(event.get("delta", {}).get("text", ""))
        texts += [block["text"] for block in event.get("content", ())]
    return "".join(texts)


ANSWERS = {
    ("vllm", "complete"): ("length", "tiny", Usage(13, 12)),
    ("vllm", "stream"): ("length", "tiny", Usage(13, 12)),
    ("vllm", "stream_without_usage"): ("length", "tiny", None),
    ("vllm", "stop"): ("stop", "tiny", Usage(13, 3)),
    ("vllm", "messages_complete"): ("length", "tiny", Usage(13, 12)),
    ("vllm", "messages_stream"): ("length", "tiny", Usage(13, 12)),
    ("transformers", "complete"): ("length", "tiny@main", Usage(13, 12)),
    ("transformers", "stream"): ("length", "tiny@main", Usage(13, 12)),
    ("transformers", "stream_without_usage"): ("length", "tiny@main", Usage(13, 12)),
    ("transformers", "stop"): ("stop", "tiny@main", Usage(13, 23)),
    ("litellm", "complete"): ("stop", "tiny", Usage(10, 20)),
    ("litellm", "stream"): ("stop", "tiny", Usage(13, 8)),
    ("litellm", "stream_without_usage"): ("stop", "tiny", None),
    ("litellm", "messages_complete"): ("stop", "tiny", Usage(2095, 503)),
    ("litellm", "messages_stream"): ("stop", "tiny", Usage(2095, 503)),  # one document, though a stream was asked for
    # It cuts no prompt, refuses no picture and no temperature below nought: there is nothing to see for a client.
    ("transformers", "overflow_tokens"): ("length", "tiny@main", Usage(6007, 12)),
    ("transformers", "image"): ("length", "tiny@main", Usage(7, 12)),
    ("transformers", "bad_value"): ("length", "tiny@main", Usage(13, 12)),
}


@pytest.mark.parametrize("size", [None, 1, 7], ids=["whole", "bytes", "sevens"])
@pytest.mark.parametrize("engine, case", ANSWERS)
def test_an_answer_is_read_as_it_was_meant(engine, case, size) -> None:
    finish_reason, model, usage = ANSWERS[engine, case]
    reply = asked(engine, case, size)
    assert reply.text == said(engine, case) != ""
    assert (reply.finish_reason, reply.model, reply.head.usage) == (finish_reason, model, usage)
    assert reply.outcome.status == "complete"
    assert reply.head.provider_request_id


ERRORS = {
    ("vllm", "unknown_model"): (ModelNotFound, 404, "The model `no-such-model` does not exist"),
    ("vllm", "messages_unknown_model"): (ModelNotFound, 404, "The model `no-such-model` does not exist"),
    ("vllm", "no_such_path"): (ModelNotFound, 404, "Not Found"),
    ("vllm", "bad_value"): (InvalidRequest, 400, "temperature must be non-negative"),
    ("vllm", "bad_type"): (InvalidRequest, 400, "body.max_tokens"),
    ("vllm", "no_messages"): (InvalidRequest, 400, "body.messages"),
    ("vllm", "empty_messages"): (InvalidRequest, 400, "empty conversation"),
    ("vllm", "image"): (InvalidRequest, 400, "not a multimodal model"),
    ("vllm", "not_json"): (InvalidRequest, 400, "JSON decode error"),
    ("vllm", "wrong_key_complete"): (AuthenticationError, 401, "Unauthorized"),
    ("vllm", "no_key_complete"): (AuthenticationError, 401, "Unauthorized"),
    ("transformers", "unknown_model"): (ModelNotFound, 400, "requested 'no-such-model'"),
    ("transformers", "no_such_path"): (ModelNotFound, 404, "Not Found"),
    ("transformers", "not_json"): (InvalidRequest, 422, "JSON decode error"),
    ("litellm", "unknown_model"): (ModelNotFound, 400, "Invalid model name"),
    ("litellm", "messages_unknown_model"): (ModelNotFound, 400, "Invalid model name"),
    ("litellm", "no_such_path"): (ModelNotFound, 404, "Not Found"),
    ("litellm", "no_messages"): (InvalidRequest, 400, "Missing required parameter: 'messages'"),
    ("litellm", "not_json"): (InvalidRequest, 400, "Invalid JSON payload"),
    ("litellm", "limited_complete"): (ProviderRateLimited, 429, "mock rate limit error"),
    ("litellm", "failing_complete"): (ProviderOverloaded, 500, "mock internal server error"),
    # A key that the proxy does not know is looked for in a database, which it may not have; none at all upsets it.
    ("litellm", "wrong_key_complete"): (AuthenticationError, 400, "No connected db"),
    ("litellm", "no_key_complete"): (ProviderOverloaded, 500, "Internal Server Error"),
    # Its errors of any kind are a plain-text 500.
    ("transformers", "bad_type"): (ProviderOverloaded, 500, "Internal Server Error"),
    ("transformers", "no_messages"): (ProviderOverloaded, 500, "Internal Server Error"),
    ("transformers", "empty_messages"): (ProviderOverloaded, 500, "Internal Server Error"),
}


@pytest.mark.parametrize("size", [None, 1], ids=["whole", "bytes"])
@pytest.mark.parametrize("engine, case", ERRORS)
def test_an_error_is_told_by_its_name(engine, case, size) -> None:
    kind, status, text = ERRORS[engine, case]
    with pytest.raises(kind) as caught:
        asked(engine, case, size)
    assert type(caught.value) is kind
    assert caught.value.status == status
    assert text in caught.value.message


OVERFLOWS = {
    # It counts characters before it counts tokens; then it only says that there are "at least" too many.
    ("vllm", "overflow"): (None, 4096),
    ("vllm", "overflow_tokens"): (4097, 4096),
    ("vllm", "overflow_max_tokens"): (None, 4096),
    ("vllm", "messages_overflow"): (None, 4096),
    ("litellm", "narrow_complete"): (None, None),
}


@pytest.mark.parametrize("engine, case", OVERFLOWS)
def test_a_context_too_long_has_its_numbers(engine, case) -> None:
    with pytest.raises(ContextTooLong) as caught:
        asked(engine, case)
    assert (caught.value.tokens, caught.value.window) == OVERFLOWS[engine, case]


@pytest.mark.parametrize("size", [None, 1, 7], ids=["whole", "bytes", "sevens"])
def test_an_engine_that_dies_in_the_middle_leaves_what_it_said(size) -> None:
    with pytest.raises(StreamBroken, match="EngineCore encountered an issue") as caught:
        asked("vllm", "engine_died_stream", size)
    assert caught.value.text_so_far == said("vllm", "engine_died_stream") != ""
    assert caught.value.reply.outcome.status == "failed"


def test_every_recording_is_read() -> None:
    recorded = {(path.parent.name, path.stem) for path in FIXTURES.rglob("*.http")}
    assert recorded == {*ANSWERS, *ERRORS, *OVERFLOWS, ("vllm", "engine_died_stream")}
