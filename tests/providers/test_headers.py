"""What response headers say about trying again."""

from __future__ import annotations

import math

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmkit.providers.headers import LONGEST_WAIT_S, provider_request_id, retry_after, should_retry

NOW = 1_790_000_000.0  # Mon, 21 Sep 2026 14:13:20 GMT


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.25"}, 0.25),
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
        ({"retry-after-ms": "soon", "retry-after": "9"}, 9.0),
        ({"retry-after": "Mon, 21 Sep 2026 14:13:50 GMT"}, 30.0),
        ({"retry-after": "Mon, 21 Sep 2026 14:13:50 GMT", "date": "Mon, 21 Sep 2026 14:13:40 GMT"}, 10.0),
        ({"retry-after": "Mon, 21 Sep 2026 14:00:00 GMT"}, 0.0),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, LONGEST_WAIT_S),
        ({"retry-after": "1e300"}, LONGEST_WAIT_S),
        ({"retry-after": "next week"}, None),
        ({"retry-after": ""}, None),
        ({"retry-after": "9" * 5000}, None),
        ({"x-ratelimit-reset-requests": "6m0s"}, 360.0),
        ({"x-ratelimit-reset-requests": "12ms", "x-ratelimit-reset-tokens": "1h2m3.5s"}, 0.012),
        (
            {
                "x-ratelimit-reset-requests": "12ms",
                "x-ratelimit-reset-tokens": "2s",
                "x-ratelimit-remaining-requests": "9",
                "x-ratelimit-remaining-tokens": "0",
            },
            2.0,
        ),
        ({"x-ratelimit-reset-requests": "5"}, 5.0),
        ({"x-ratelimit-reset-requests": "5 parsecs"}, None),
        ({"anthropic-ratelimit-requests-reset": "2026-09-21T14:13:32Z"}, 12.0),
        ({"anthropic-ratelimit-tokens-reset": "2026-09-21T16:13:32+02:00"}, 12.0),
        ({"anthropic-ratelimit-requests-reset": "2026-09-21T14:13:32Z", "retry-after": "3"}, 3.0),
        ({"anthropic-ratelimit-requests-reset": "tomorrow"}, None),
    ],
)
def test_how_long_to_wait(headers, seconds) -> None:
    found = retry_after(httpx.Headers(headers), NOW, status=429)
    assert found == (None if seconds is None else pytest.approx(seconds))


def test_reset_times_count_on_a_429_alone() -> None:
    headers = httpx.Headers({"x-ratelimit-reset-requests": "6m0s"})
    assert retry_after(headers, NOW, status=503) is None


NAMES = [
    "retry-after",
    "retry-after-ms",
    "date",
    "anthropic-ratelimit-tokens-reset",
    "anthropic-ratelimit-tokens-remaining",
    "x-ratelimit-reset-tokens",
    "x-ratelimit-remaining-tokens",
]
VALUES = st.one_of(
    st.text(max_size=80),
    st.floats().map(str),
    st.integers().map(str),
    st.datetimes().map(str),
    st.from_regex(r"\A[0-9]{1,4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(Z|[+-][0-9]{2}:[0-9]{2})\Z"),
    st.from_regex(
        r"\A[A-Z][a-z]{2}, [0-9]{2} (Jan|Dec|Xyz) [0-9]{1,6} [0-9]{2}:[0-9]{2}:[0-9]{2} (GMT|[+-][0-9]{4})\Z"
    ),
    st.from_regex(r"\A([0-9]{1,20}(h|m|s|ms)){1,4}\Z"),
)


@settings(suppress_health_check=[HealthCheck.too_slow])  # making text for the first time is
@given(st.dictionaries(st.sampled_from(NAMES), VALUES), st.sampled_from([429, 503, None]))
def test_no_header_can_hurt(headers, status) -> None:
    seconds = retry_after(headers, NOW, status=status)
    assert seconds is None or (0.0 <= seconds <= LONGEST_WAIT_S and not math.isnan(seconds))


def test_should_retry_is_obeyed_only_where_it_is_clear() -> None:
    assert should_retry({"x-should-retry": "true"}) is True
    assert should_retry({"x-should-retry": " False"}) is False
    assert should_retry({"x-should-retry": "maybe"}) is None
    assert should_retry({}) is None


def test_the_providers_request_id() -> None:
    assert provider_request_id({"x-request-id": "a", "request-id": "b"}) == "a"
    assert provider_request_id({"request-id": "b" * 999}) == "b" * 200
    assert provider_request_id({}) is None
