"""From what a server says went wrong to the error that llmkit raises.

Status and text together decide, since no two servers agree: a wrong key is a 401 at OpenAI and a 400 at a LiteLLM
proxy; an empty account is a 429, a 402 or a 400; a prompt that is too long is a 400 whose text alone tells.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmkit.errors import (
    AuthenticationError,
    BadResponse,
    ContextTooLong,
    InvalidRequest,
    LLMKitError,
    ModelNotFound,
    ProviderError,
    ProviderOverloaded,
    ProviderRateLimited,
    QuotaExhausted,
    Refused,
)
from llmkit.providers.headers import provider_request_id, retry_after, should_retry
from llmkit.redaction import redact, tidy

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llmkit.endpoint import Endpoint

__all__ = ["Complaint", "complaint_in", "context_numbers", "error_from"]

_TRANSIENT = frozenset({408, 409, 425})
_QUOTA_CODES = frozenset({"insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "billing_error",
                          "insufficient_balance", "insufficient_credits", "budget_exceeded", "quota_exceeded"})  # fmt: skip
_QUOTA_TEXT = re.compile(
    r"credit balance is too low|insufficient (?:balance|credits?|funds)|billing hard limit|budget has been exceeded"
    r"|out of credits", re.IGNORECASE)  # fmt: skip
_KEY_CODES = frozenset({"invalid_api_key", "authentication_error", "auth_error", "invalid_authentication",
                        "no_db_connection"})  # fmt: skip  # the last: a LiteLLM proxy without a database, to any other key
_KEY_TEXT = re.compile(
    r"(?:invalid|incorrect|missing|no|unknown) (?:proxy server token|api[ _-]?key)|api[ _-]?key (?:is )?(?:not valid|invalid)"
    r"|authentication error|did not provide an api key", re.IGNORECASE)  # fmt: skip
_MODEL_CODES = frozenset({"model_not_found", "model_not_available", "unknown_model", "deployment_not_found"})
_MODEL_TEXT = re.compile(
    r"\bmodel\b[^.\n]{0,200}?(?:does not exist|not found|not exist|is not available)|invalid model name|unknown model"
    r"|no such model|server is pinned to [^\n]{0,200}; requested", re.IGNORECASE)  # fmt: skip
_CONTEXT_CODES = frozenset({"context_length_exceeded", "exceed_context_size_error", "string_above_max_length",
                            "context_window_exceeded", "model_context_window_exceeded"})  # fmt: skip
_CONTEXT_TEXT = re.compile(
    r"context[ _](?:length|window|size|limit)|maximum (?:model |context )length|prompt is too long|too many tokens"
    r"|(?:input|prompt)[^.\n]{0,60} (?:exceeds?|longer than)[^.\n]{0,60} tokens?|max_model_len", re.IGNORECASE)  # fmt: skip
_FILTER_CODES = frozenset({"content_filter", "content_policy_violation", "responsibleaipolicyviolation"})

# What an error that arrives inside a stream would have had for a status.
_STATUS_OF = {
    "invalid_request_error": 400, "badrequesterror": 400, "authentication_error": 401, "billing_error": 402,
    "permission_error": 403, "not_found_error": 404, "notfounderror": 404, "request_too_large": 413,
    "rate_limit_error": 429, "rate_limit_exceeded": 429, "insufficient_quota": 429, "requests": 429, "tokens": 429,
    "api_error": 500, "server_error": 500, "internal_server_error": 500, "internalservererror": 500,
    "service_unavailable": 503, "timeout_error": 504, "overloaded_error": 529,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Complaint:
    """An error as a server words it. ``kinds`` holds its code, type and status words, in lower case."""

    message: str
    kinds: frozenset[str] = frozenset()
    status: int | None = None
    tokens: int | None = None
    window: int | None = None


def complaint_in(body: bytes) -> Complaint:
    """Read an error body of any shape: OpenAI's, vLLM's, Ollama's, FastAPI's ``detail``, Anthropic's, HTML, plain text."""
    text = body.decode("utf-8", "replace").strip()
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return Complaint(_title(text) if text.startswith("<") else text)
    return complaint_of(document)


def complaint_of(document: Any) -> Complaint:
    """The same, from parsed JSON."""
    if isinstance(document, list) and document:
        document = document[0]
    if not isinstance(document, dict):
        return Complaint(document if isinstance(document, str) else "")
    error = document.get("error") or document
    if not isinstance(error, dict):
        return Complaint(error if isinstance(error, str) else "", _kinds(document))
    code = error.get("code")
    status = code if type(code) is int and 400 <= code <= 599 else None
    return Complaint(
        _message(error),
        _kinds(error) | _kinds(document),
        status,
        _count(error.get("n_prompt_tokens")),
        _count(error.get("n_ctx")),
    )


def _kinds(error: dict[str, Any]) -> frozenset[str]:
    found = (error.get(name) for name in ("code", "type", "status"))
    return frozenset(kind.lower() for kind in found if isinstance(kind, str))


def _message(error: dict[str, Any]) -> str:
    for name in ("message", "detail", "msg", "error_description"):
        value = error.get(name)
        if isinstance(value, str) and value:
            return value
        if isinstance(value, list):  # FastAPI's list of what is wrong
            return "; ".join(_wrong(item) for item in value[:5] if isinstance(item, dict))
        if isinstance(value, dict):
            return _message(value)
    return ""


def _wrong(item: dict[str, Any]) -> str:
    """One entry of FastAPI's: the field, and what is wrong with it."""
    place = item.get("loc")
    names = [name for name in place[:10] if isinstance(name, str) and name != "body"] if isinstance(place, list) else []
    said = str(item.get("msg", ""))
    return f"{'.'.join(names)}: {said}" if names else said


def _title(page: str) -> str:
    match = re.search(r"<title[^>]{0,100}>([^<]{1,200})", page[:20_000], re.IGNORECASE)
    return f"an HTML page ({match[1].strip()})" if match else "an HTML page"


def error_from(
    complaint: Complaint,
    *,
    status: int | None,
    headers: Mapping[str, str],
    endpoint: Endpoint,
    now: float,
    secret: str | None = None,
) -> LLMKitError:
    """The error to raise. ``status`` None means that it came inside a stream; ``now`` is in epoch seconds."""
    if status is None:
        status = complaint.status or _status_of(complaint.kinds)
        said = f"{endpoint.name} broke off"
    else:
        said = f"{endpoint.name} answered {status}"
    text = tidy(complaint.message, secret)
    message = f"{said}: {text}" if text else said
    kind = _kind_of(complaint, status)
    if kind is ContextTooLong:
        tokens, window = context_numbers(complaint)
        return ContextTooLong(message, tokens=tokens, window=window)
    request_id = provider_request_id(headers)
    fields: dict[str, Any] = {
        "provider": endpoint.provider,
        "model": endpoint.model,
        "status": status,
        "provider_request_id": redact(request_id, secret) if request_id else None,
    }
    if kind is Refused:
        return Refused(message, reason=text or "content filter", **fields)
    fields["retry_after"] = retry_after(headers, now, status=status)
    if kind is not QuotaExhausted:
        fields["retryable"] = should_retry(headers)
    error: ProviderError = kind(message, next_step=_next_step(kind, complaint, status, endpoint), **fields)
    return error


def _status_of(kinds: frozenset[str]) -> int:
    told = next((_STATUS_OF[kind] for kind in kinds if kind in _STATUS_OF), None)
    if told is not None:
        return told
    return 400 if kinds & (_QUOTA_CODES | _KEY_CODES | _MODEL_CODES | _CONTEXT_CODES | _FILTER_CODES) else 500


def _next_step(kind: type[LLMKitError], complaint: Complaint, status: int, endpoint: Endpoint) -> str | None:
    if kind is AuthenticationError and endpoint.api_key_env:
        return f"check the environment variable {endpoint.api_key_env} (its value is never shown)"
    if kind is ModelNotFound and status == 404 and "model" not in complaint.message.lower():
        return f"check the base URL ({redact(endpoint.base_url)}) and the model's name"
    return None


def _kind_of(complaint: Complaint, status: int) -> Any:
    """A `ProviderError` class, or `ContextTooLong`."""
    if 400 <= status < 500:
        special = _special_kind(complaint, status)
        if special is not None:
            return special
        if status == 429:
            return ProviderRateLimited
        return ProviderOverloaded if status in _TRANSIENT else InvalidRequest
    return ProviderOverloaded if status >= 500 else BadResponse


def _special_kind(complaint: Complaint, status: int) -> type[LLMKitError] | None:
    """What the words of a complaint tell beyond its status; the first that fits, the surest first."""
    kinds, text = complaint.kinds, complaint.message
    malformed = status in {400, 422}
    told: tuple[tuple[object, type[LLMKitError]], ...] = (
        (status == 402 or kinds & _QUOTA_CODES or _QUOTA_TEXT.search(text), QuotaExhausted),
        (kinds & _MODEL_CODES, ModelNotFound),
        (status in {401, 403} or kinds & _KEY_CODES, AuthenticationError),
        ((malformed or status == 413) and (kinds & _CONTEXT_CODES or _CONTEXT_TEXT.search(text)), ContextTooLong),
        (kinds & _FILTER_CODES, Refused),
        (status == 404 or (malformed and _MODEL_TEXT.search(text)), ModelNotFound),
        (malformed and _KEY_TEXT.search(text), AuthenticationError),
    )
    return next((kind for fits, kind in told if fits), None)


_NUMBER = r"(\d[\d,_]{0,14})"
_WINDOW = re.compile(
    rf"(?:context|model|maximum|max)[ _](?:length|window|size|limit|model_len)[^\d\n]{{0,40}}?{_NUMBER}"
    rf"|> {_NUMBER}(?: maximum)?|maximum (?:of|is|allowed)[^\d\n]{{0,20}}?{_NUMBER}", re.IGNORECASE)  # fmt: skip
_TOKENS = re.compile(
    rf"(?:resulted in|requested|passed|contains(?: at least)?|request has|request \(|has|got|length) {{0,1}}{_NUMBER} ?(?:input |prompt )?tokens"
    rf"|{_NUMBER} tokens >", re.IGNORECASE)  # fmt: skip
_SUM = re.compile(rf"{_NUMBER} \+ {_NUMBER} > {_NUMBER}")


def context_numbers(complaint: Complaint) -> tuple[int | None, int | None]:
    """``(tokens, window)`` as far as the complaint names them."""
    text = complaint.message[:2000]
    total = _SUM.search(text)
    if total:
        return _int(total[1]) + _int(total[2]), _int(total[3])
    window = complaint.window or _first(_WINDOW.search(text))
    return complaint.tokens or _first(_TOKENS.search(text)), window


def _first(match: re.Match[str] | None) -> int | None:
    return next((_int(group) for group in match.groups() if group), None) if match else None


def _int(digits: str) -> int:
    return int(digits.replace(",", "").replace("_", ""))


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 < value < 10**12 else None
