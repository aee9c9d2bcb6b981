"""From a status and a body to one of llmkit's errors."""

from __future__ import annotations

import json

import httpx
import pytest

from llmkit.errors import (
    AuthenticationError,
    BadResponse,
    CallRejected,
    ContextTooLong,
    InvalidRequest,
    ModelNotFound,
    ProviderOverloaded,
    ProviderRateLimited,
    QuotaExhausted,
    Refused,
)
from llmkit.providers.failures import complaint_in, context_numbers, error_from
from tests.providers.loopback import KEY, endpoint


def error(status, body, headers=None, **fields):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return error_from(
        complaint_in(body),
        status=status,
        headers=httpx.Headers(headers or {}),
        endpoint=endpoint(**fields),
        now=0.0,
        secret=KEY,
    )


def openai(message, kind=None, code=None):
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def anthropic(kind, message):
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_1"}


CASES = {
    "openai wrong key": (401, openai("Incorrect API key provided", "invalid_request_error", "invalid_api_key"), AuthenticationError),
    "openai forbidden": (403, openai("Country not supported", "request_forbidden"), AuthenticationError),
    "litellm wrong key": (400, openai("Authentication Error, Invalid proxy server token passed", "auth_error", "400"), AuthenticationError),
    "gemini wrong key": (400, [{"error": {"code": 400, "message": "API key not valid. Please pass a valid API key.", "status": "INVALID_ARGUMENT"}}], AuthenticationError),
    "openai no quota": (429, openai("You exceeded your current quota", "insufficient_quota", "insufficient_quota"), QuotaExhausted),
    "openai hard limit": (400, openai("Billing hard limit has been reached", "invalid_request_error", "billing_hard_limit_reached"), QuotaExhausted),
    "openrouter no credit": (402, openai("Insufficient credits"), QuotaExhausted),
    "anthropic no credit": (400, anthropic("invalid_request_error", "Your credit balance is too low to access the Anthropic API."), QuotaExhausted),
    "litellm budget": (400, openai("Budget has been exceeded! Current cost: 1", "budget_exceeded", "400"), QuotaExhausted),
    "gemini per-minute quota": (429, openai("You exceeded your current quota, please retry in 3s", None, "RESOURCE_EXHAUSTED"), ProviderRateLimited),
    "openai rate limit": (429, openai("Rate limit reached for requests", "requests", "rate_limit_exceeded"), ProviderRateLimited),
    "anthropic rate limit": (429, anthropic("rate_limit_error", "This request would exceed your rate limit"), ProviderRateLimited),
    "openai unknown model": (404, openai("The model `x` does not exist or you do not have access to it.", "invalid_request_error", "model_not_found"), ModelNotFound),
    "openai no access to model": (403, openai("Project does not have access to model `x`", "invalid_request_error", "model_not_found"), ModelNotFound),
    "litellm unknown model": (400, openai("/chat/completions: Invalid model name passed in model=x. Call `/v1/models`"), ModelNotFound),
    "vllm unknown model": (404, {"object": "error", "message": "The model `x` does not exist.", "type": "NotFoundError", "param": None, "code": 404}, ModelNotFound),
    "ollama unknown model": (404, {"error": 'model "x" not found, try pulling it first'}, ModelNotFound),
    "ollama unknown model, newer": (404, {"error": {"message": 'model "x" not found', "type": "api_error"}}, ModelNotFound),
    "wrong path": (404, {"detail": "Not Found"}, ModelNotFound),
    "openai too long": (400, openai("This model's maximum context length is 8192 tokens. However, your messages resulted in 9001 tokens.", "invalid_request_error", "context_length_exceeded"), ContextTooLong),
    "vllm too long": (400, openai("This model's maximum context length is 512 tokens. However, you requested 600 tokens (500 in the messages, 100 in the completion).", "BadRequestError", 400), ContextTooLong),
    "anthropic too long": (400, anthropic("invalid_request_error", "prompt is too long: 208310 tokens > 200000 maximum"), ContextTooLong),
    "too large": (413, anthropic("request_too_large", "Prompt is too long"), ContextTooLong),
    "too large in bytes": (413, anthropic("request_too_large", "Request exceeds the maximum size"), InvalidRequest),
    "azure filter": (400, openai("The response was filtered", None, "content_filter"), Refused),
    "fastapi detail": (422, {"detail": [{"loc": ["body"], "msg": "field required", "type": "x"}]}, InvalidRequest),
    "transformers detail": (422, {"detail": "Unexpected keys in the request"}, InvalidRequest),
    "bad parameter": (400, openai("Unsupported parameter: 'temperature'", "invalid_request_error", "unsupported_parameter"), InvalidRequest),
    "wrong method": (405, b"Method Not Allowed", InvalidRequest),
    "plain 500": (500, b"Internal Server Error", ProviderOverloaded),
    "anthropic overloaded": (529, anthropic("overloaded_error", "Overloaded"), ProviderOverloaded),
    "nginx": (502, b"<html><head><title>502 Bad Gateway</title></head></html>", ProviderOverloaded),
    "cloudflare": (524, b"error code: 524", ProviderOverloaded),
    "timeout": (408, b"", ProviderOverloaded),
    "conflict": (409, b"", ProviderOverloaded),
    "too early": (425, b"", ProviderOverloaded),
    "unavailable": (503, {"error": "loading model"}, ProviderOverloaded),
    "gateway timeout": (504, b"", ProviderOverloaded),
    "redirect": (302, b"", BadResponse),
    "redirect that stays": (308, b"moved", BadResponse),
    "not ascii": (400, b"\xff\xfe\x00 no", InvalidRequest),
    "nested deep": (400, b"[" * 100_000, InvalidRequest),
    "wrong types": (400, {"error": {"message": 7, "type": [], "code": {}}}, InvalidRequest),
    "null": (400, b"null", InvalidRequest),
    "number": (500, b"1e999", ProviderOverloaded),
}  # fmt: skip


@pytest.mark.parametrize(("status", "body", "kind"), CASES.values(), ids=CASES.keys())
def test_the_class_of_an_error(status, body, kind) -> None:
    found = error(status, body)
    assert type(found) is kind
    assert found.message.startswith(f"acme:m-1 answered {status}")
    if not isinstance(found, CallRejected):
        assert (found.provider, found.model, found.status) == ("acme", "m-1", status)
        assert found.retryable is (kind in {ProviderRateLimited, ProviderOverloaded})


@pytest.mark.parametrize(
    ("message", "tokens", "window"),
    [
        ("This model's maximum context length is 8192 tokens. However, your messages resulted in 9001 tokens.", 9001, 8192),
        ("This model's maximum context length is 512 tokens. However, you requested 600 tokens (500 in the messages)", 600, 512),
        ("'max_tokens' is too large: 900. This model's maximum context length is 512 tokens and your request has 20 input tokens", 20, 512),
        ("prompt is too long: 208310 tokens > 200000 maximum", 208310, 200000),
        ("input length and `max_tokens` exceed context limit: 190000 + 20000 > 200000", 210000, 200000),
        ("the request (600 tokens) exceeds the available context size (512 tokens), try increasing it", 600, 512),
        ("This model's maximum context length is 1,048,576 tokens", None, 1048576),
        ("You passed 600 input tokens, but the model's context length is only 512 tokens", 600, 512),
        ("Prompt is too long", None, None),
    ],
)  # fmt: skip
def test_the_numbers_of_a_context_that_is_too_long(message, tokens, window) -> None:
    found = error(400, openai(message, None, "context_length_exceeded"))
    assert (found.tokens, found.window) == (tokens, window)


def test_the_numbers_that_llama_cpp_sends_beside_its_text() -> None:
    body = {"error": {"code": 400, "message": "the request exceeds the available context size", "type": "exceed_context_size_error", "n_prompt_tokens": 9, "n_ctx": 8}}  # fmt: skip
    assert context_numbers(complaint_in(json.dumps(body).encode())) == (9, 8)


@pytest.mark.parametrize(
    ("code", "kind", "status"),
    [
        ("overloaded_error", ProviderOverloaded, 529),
        ("rate_limit_error", ProviderRateLimited, 429),
        ("insufficient_quota", QuotaExhausted, 429),
        ("authentication_error", AuthenticationError, 401),
        ("not_found_error", ModelNotFound, 404),
        ("server_error", ProviderOverloaded, 500),
        ("model_not_found", ModelNotFound, 400),
        ("context_length_exceeded", ContextTooLong, None),
        ("invalid_api_key", AuthenticationError, 400),
        ("content_filter", Refused, 400),
        ("whatever", ProviderOverloaded, 500),
    ],
)
def test_an_error_inside_a_stream_has_the_status_it_would_have_had(code, kind, status) -> None:
    found = error(None, {"error": {"type": code, "message": "no"}})
    assert (type(found), getattr(found, "status", None)) == (kind, status)


def test_the_code_of_an_error_inside_a_stream_is_its_status() -> None:
    assert error(None, openai("later", "X", 503)).status == 503


def test_retry_after_and_should_retry_are_fields() -> None:
    found = error(503, b"", {"retry-after": "4", "x-should-retry": "false", "x-request-id": "req-9"})
    assert (found.retry_after, found.retryable, found.provider_request_id) == (4.0, False, "req-9")
    assert error(400, b"", {"x-should-retry": "true"}).retryable is True


def test_an_empty_account_is_never_retried_whatever_the_header_says() -> None:
    found = error(429, openai("no", "insufficient_quota"), {"x-should-retry": "true", "retry-after": "1"})
    assert (type(found), found.retryable) == (QuotaExhausted, False)


def test_messages_are_short_clean_and_without_keys() -> None:
    text = f"bad key {KEY} and sk-other-key-0123456789\x1b[31m\n\tred " + "x" * 5000
    found = error(401, openai(text), {"x-request-id": f"id-{KEY}"})
    assert len(found.message) < 600
    assert KEY not in found.message + str(found.provider_request_id)
    assert "sk-other" not in found.message
    assert "\n" not in found.message
    assert "\x1b" not in found.message


def test_the_next_step_names_what_to_check() -> None:
    assert "ACME_KEY" in error(401, b"").next_step
    assert "base URL" in error(404, {"detail": "Not Found"}).next_step
    assert "base URL" not in error(404, openai("The model `x` does not exist")).next_step


def test_a_page_is_named_by_its_title() -> None:
    assert "502 Bad Gateway" in error(502, b"<html><head><title>502 Bad Gateway</title></head></html>").message
    assert "<" not in error(502, b"<html><p>secret</p>").message
