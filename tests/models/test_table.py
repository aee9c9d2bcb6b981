from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, date, datetime

import genai_prices
import pytest

from llmkit.models import table

PROXY = "http://127.0.0.1:4000/v1"


@pytest.mark.parametrize(
    "provider, base_url, model, found",
    [
        ("openai", "https://api.openai.com/v1", "gpt-4o", "gpt-4o"),
        ("corporate", "https://api.openai.com/v1", "GPT-4o-2024-08-06", "gpt-4o"),  # the address tells who is paid
        ("groq", "https://api.groq.com/openai/v1", "llama-3.3-70b-versatile", "llama-3.3-70b-versatile"),
        ("gemini", "https://generativelanguage.googleapis.com/v1beta/openai", "gemini-2.5-flash", "gemini-2.5-flash"),
        ("gemini", PROXY, "models/gemini-2.5-flash", "gemini-2.5-flash"),
        ("xai", PROXY, "grok-4", "grok-4-0709"),
        ("openrouter", "https://openrouter.ai/api/v1", "openai/gpt-5-mini", "openai/gpt-5-mini"),
        ("anthropic", PROXY, "claude-haiku-4-5-20251001", "claude-haiku-4-5"),
    ],
)
def test_who_serves_is_told_by_the_address_and_then_by_the_name(provider, base_url, model, found):
    entry = table.find(provider, base_url, model)
    assert (entry.info.id, entry.listed) == (found, False)


@pytest.mark.parametrize(
    "model, found",
    [
        ("gpt-4o", "gpt-4o"),
        ("openai/gpt-4o", "gpt-4o"),
        ("azure/gpt-4o", "gpt-4o"),
        ("claude-haiku-4-5", "claude-haiku-4-5"),
        ("gemini/gemini-2.5-flash", "gemini-2.5-flash"),
        ("groq/llama-3.1-8b-instant", "llama-3.1-8b-instant"),
        ("openrouter/openai/gpt-5-mini", "openai/gpt-5-mini"),
    ],
)
def test_behind_a_proxy_an_unmistakable_name_has_its_list_price(model, found):
    entry = table.find("litellm", PROXY, model)
    assert (entry.info.id, entry.listed) == (found, True)


@pytest.mark.parametrize(
    "provider, model",
    [
        ("litellm", "openai/gpt-oss-120b"),
        ("litellm", "gpt-oss-120b"),
        ("openai", "gpt-oss-120b"),  # at an address that is not OpenAI's
        ("corporate", "google/gemma-3-27b-it"),
        ("corporate", "meta-llama/Llama-3.1-8B-Instruct"),
        ("corporate", "llama-3.3-70b-versatile"),
        ("corporate", "deepseek-chat"),
        ("corporate", "Qwen/Qwen3-8B"),
        ("corporate", "my-gpt-4o"),
        ("my-openai", "smart"),
        ("openai", "gpt-99"),
        ("openai", ""),
        ("openai", "gpt-4o" + "x" * 300),
        ("", "/"),
    ],
)
def test_what_anyone_may_serve_at_any_price_is_unknown(provider, model):
    assert table.find(provider, PROXY, model) is None


def test_service_tiers_belong_to_the_provider_that_sells_them():
    own = table.find("openai", "https://api.openai.com/v1", "gpt-5-mini")
    assert own.knows({"service_tier": "priority"})
    assert own.knows({"processing": "batch"})
    assert not own.knows({"service_tier": "nonsense"})
    lent = table.find("azure", "https://corp.openai.azure.com/openai", "gpt-5.4-mini")
    assert not lent.own
    assert not lent.knows({"service_tier": "priority"})


def test_the_table_is_named_by_its_version_and_dated_by_its_newest_price():
    assert table.version() == f"genai-prices {genai_prices.__version__}"
    assert date(2026, 1, 1) < table.newest_price() <= datetime.now(UTC).date()


def test_nothing_is_imported_before_the_first_question():
    program = """
import json, sys
from llmkit.models import prices, table, tokens, windows
from llmkit.endpoint import Endpoint
from llmkit.reply import Usage
local = Endpoint(provider="vllm", model="m", base_url="http://127.0.0.1:8000/v1", local=True)
prices.cost(local, Usage(input_tokens=1), at=0.0); windows.window(local); windows.max_output(local)
windows.is_reasoning("gpt-5"); tokens.upper_bound([]); tokens.is_loaded(local); table.version()
before = [m for m in ("genai_prices", "tiktoken", "httpx") if m in sys.modules]
loaded = table.is_loaded(); table.load()
print(json.dumps([before, loaded, table.is_loaded()]))
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout) == [[], False, True]
