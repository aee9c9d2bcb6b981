"""Keys out of everything that people get to see."""

from __future__ import annotations

import base64
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmkit.redaction import REDACTED, redact, secret_in, tidy


@pytest.mark.parametrize(
    "secret",
    [
        "sk-proj-abcDEF0123456789_-xyz",
        "sk-ant-api03-AAAA-bbbb_1234",
        "sk-abc***********************wxyz",
        "gsk_0123456789abcdef",
        "hf_AbCdEfGhIjKlMnOp",
        "xai-0123456789abcdef",
        "AIzaSyA-1234567890abcdefghijklmnopqrstu",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl",
        "ghp_0123456789abcdefABCDEF",
    ],
)
def test_what_looks_like_a_key_is_taken_out(secret) -> None:
    for text in (
        secret,
        f"Incorrect key: {secret}.",
        f'{{"k":"{secret}"}}',
        f"Bearer {secret}",
        f"x-api-key: {secret}",
    ):
        assert secret not in redact(text)
        assert "[redacted]" in redact(text)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("Authorization: Bearer abc123def456", "Authorization: Bearer [redacted]"),
        ("x-api-key=abcdef-123456", "x-api-key=[redacted]"),
        ('"api_key": "abcdef123456"', '"api_key": "[redacted]"'),
        ("http://ana:hunter2@proxy.test:3128/x", "http://[redacted]@proxy.test:3128/x"),
    ],
)
def test_what_stands_where_a_key_stands_is_taken_out(text, left) -> None:
    assert redact(text) == left


@pytest.mark.parametrize(
    "text",
    [
        "The model `gpt-5-mini` does not exist",
        "This model's maximum context length is 8192 tokens. However, your messages resulted in 9001 tokens.",
        "You did not provide an API key. Use Bearer auth (i.e. Authorization: Bearer YOUR_KEY)"[:32],
        "the task-based scheduler risk-free sk-learn",
        "http://127.0.0.1:8000/v1",
        "Rate limit reached for requests: 3 of 3 in org-1, please wait 20s",
        "req_011CSHoEeqs5C35K2UUqR7Fy",
    ],
)
def test_ordinary_text_is_left_alone(text) -> None:
    assert redact(text) == text


def test_the_key_itself_is_taken_out_whatever_it_looks_like() -> None:
    assert redact("my key is hunter2hunter2!", "hunter2hunter2") == "my key is [redacted]!"
    assert secret_in("hunter2hunter2") == b"hunter2hunter2"


def test_placeholders_are_not_secrets() -> None:
    assert redact("EMPTY", "EMPTY") == "EMPTY"
    assert secret_in("EMPTY") == secret_in("") == secret_in(None) == b""


def test_tidy_text_is_one_clean_short_line() -> None:
    assert tidy("a\r\n\tb\x1b[31mc\x00\u2028d") == "a b c d"
    assert tidy("x" * 1000, limit=10) == "x" * 9 + "…"


@settings(suppress_health_check=[HealthCheck.too_slow])  # making text for the first time is
@given(st.text(max_size=600), st.text(min_size=8, max_size=20))
def test_no_text_can_hurt(text, secret) -> None:
    cleaned = tidy(text + secret + text, secret)
    assert len(cleaned) <= 500
    assert "\n" not in cleaned


def test_nothing_that_turns_the_direction_of_reading_is_left() -> None:
    assert tidy("to \u202eevil\u2066 ana\u2028") == "to  evil  ana"


@pytest.mark.parametrize("secret", ["a.b*c(d)[e+f]$^k", 'p"ss\\word<&>1234', "plainsecret99"])
def test_a_key_is_found_in_the_forms_that_it_travels_in(secret) -> None:
    whole = base64.b64encode(secret.encode()).decode()
    basic = base64.b64encode(f":{secret}".encode()).decode()
    text = redact(
        f"GET /?q={quote(secret, safe='')}&r={quote_plus(secret)} Basic {basic} or {whole} or {secret}.", secret
    )
    assert text.count(REDACTED) == 5
    for form in (secret, quote(secret), whole.rstrip("="), basic.rstrip("=")):
        assert form not in text
