from __future__ import annotations

from dataclasses import replace

import pytest

from llmkit.endpoint import Endpoint
from llmkit.models import windows

OPENAI = Endpoint(provider="openai", model="gpt-4o", base_url="https://api.openai.com/v1")


@pytest.mark.parametrize(
    "model",
    [
        "o1",
        "o1-mini",
        "o3",
        "o3-pro-2025-06-10",
        "o4-mini",
        "gpt-5",
        "gpt-5-mini-2025-08-07",
        "gpt-5.1-codex",
        "GPT-5-Nano",
        "gpt-6.1-sol",
        "openai/gpt-5-mini",
        "openrouter/openai/o3-mini",
        "ft:o4-mini-2025-04-16:org::id",
    ],
)
def test_reasoning_models(model):
    assert windows.is_reasoning(model)


@pytest.mark.parametrize(
    "model",
    [
        "gpt-4o",
        "gpt-4.1",
        "gpt-3.5-turbo",
        "gpt-5-chat-latest",
        "gpt-5.3-chat-latest",
        "gpt-oss-120b",
        "gpt-50",
        "claude-opus-4-5",
        "o2",
        "o1x",
        "olmo-3",
        "phi-4-o3",
        "",
        "/" * 500,
        "a/" * 500,
    ],
)
def test_the_others(model):
    assert not windows.is_reasoning(model)


@pytest.mark.parametrize(
    "model, tokens",
    [
        ("gpt-4o", 16_384),
        ("gpt-4o-2024-05-13", 4_096),
        ("gpt-4o-mini-2024-07-18", 16_384),
        ("gpt-4.1-nano", 32_768),
        ("gpt-4", 8_192),
        ("gpt-4-turbo", 4_096),
        ("gpt-3.5-turbo-0125", 4_096),
        ("o1", 100_000),
        ("o1-mini", 65_536),
        ("o4-mini", 100_000),
        ("gpt-5-mini", 128_000),
        ("gpt-5.1", 128_000),
        ("gpt-5-chat-latest", 16_384),
        ("gpt-5-pro", 272_000),
        ("anthropic/claude-3-5-sonnet-20241022", 8_192),
        ("claude-sonnet-4-20250514", 64_000),
        ("claude-opus-4-1-20250805", 32_000),
        ("claude-haiku-4-5", 64_000),
        ("gemini-2.5-flash", 65_536),
        ("gpt-9", None),
        ("claude-opus-9", None),
        ("claude-opus-4-9", None),
        ("Qwen/Qwen3-8B", None),
        ("my-gpt-4o", None),
    ],
)
def test_the_most_output_is_what_the_makers_publish(model, tokens):
    assert windows.max_output(replace(OPENAI, model=model)) == tokens


def test_windows_come_from_the_price_table():
    assert windows.window(OPENAI) == 128_000
    assert windows.window(replace(OPENAI, model="gpt-4")) == 8_192
    assert windows.window(replace(OPENAI, model="gpt-99")) is None


def test_what_the_settings_say_wins():
    endpoint = replace(OPENAI, window=1_000, max_output=100)
    assert (windows.window(endpoint), windows.max_output(endpoint)) == (1_000, 100)


@pytest.mark.parametrize("kind", ["local", "simulated"])
def test_a_server_of_ones_own_sets_its_own_limits(kind):
    endpoint = replace(OPENAI, **{kind: True})
    assert windows.window(endpoint) is None
    assert windows.max_output(endpoint) is None
    assert windows.window(replace(endpoint, window=512)) == 512
