"""The provider catalog: what every entry must hold, and how an entry moves."""

from __future__ import annotations

import re

import pytest

from llmkit.endpoint import is_loopback
from llmkit.errors import ConfigError
from llmkit.providers.catalog import CATALOG, QUIRKS, base_url_from, located, moved


@pytest.mark.parametrize("entry", CATALOG.values(), ids=CATALOG)
def test_every_entry_is_whole(entry) -> None:
    assert CATALOG[entry.name] is entry
    assert base_url_from(entry.base_url) == entry.base_url
    assert entry.wire in {"openai", "anthropic"}
    assert entry.quirks <= set(QUIRKS)
    assert ":" not in entry.name
    assert "," not in entry.name
    if entry.local:
        assert is_loopback(entry.base_url)
        assert not entry.key_required
    elif not entry.simulated and not is_loopback(entry.base_url):
        assert entry.base_url.startswith("https://")  # a key must not travel in the clear
        assert entry.key_required
        assert re.fullmatch(r"[A-Z][A-Z0-9_]+", entry.api_key_env)
    if entry.default_model:
        assert entry.key_required


def test_the_simulator_is_nowhere_and_needs_no_key() -> None:
    entry = CATALOG["simulator"]
    assert (entry.base_url, entry.simulated, entry.local, entry.api_key_env) == (
        "http://simulator.invalid/v1",
        True,
        False,
        None,
    )
    assert [name for name, other in CATALOG.items() if other.simulated] == ["simulator"]


def test_a_proxy_on_this_machine_is_not_local() -> None:
    assert not CATALOG["litellm"].local  # it bills for what lies behind it


def test_servers_on_one_port_are_told_apart_by_their_mark() -> None:
    by_url: dict[str, list[str | None]] = {}
    for entry in CATALOG.values():
        if entry.local:
            by_url.setdefault(entry.base_url, []).append(entry.owned_by)
    for marks in by_url.values():
        assert len(set(marks)) == len(marks)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("http://127.0.0.1:8000/v1/", "http://127.0.0.1:8000/v1"),
        ("https://Example.com", "https://Example.com"),
        ("http://[::1]:80/v1//", "http://[::1]:80/v1"),
    ],
)
def test_a_base_url_has_one_form(text, clean) -> None:
    assert base_url_from(text) == clean


@pytest.mark.parametrize(
    "text",
    ["", "example.com/v1", "ftp://x", "http://", "http://u:secret@h/v1", "http://h/v1?key=secret", "http://h/#secret",
     "http://h/ v1", "http://h\n/secret", "http://ü/secret", "http://h:99999/", "http://[::1", "http://h/" + "a" * 3000],
)  # fmt: skip
def test_what_is_no_base_url_is_refused_without_repeating_it(text) -> None:
    with pytest.raises(ValueError, match=r"^a URL") as caught:
        base_url_from(text)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "here"),
    [
        ("http://127.0.0.1:8000/v1", True),
        ("http://127.1.2.3/v1", True),
        ("http://localhost:1/v1", True),
        ("http://LOCALHOST:1/v1", True),
        ("http://[::1]:1/v1", True),
        ("http://127.0.0.1.example.com/v1", False),
        ("http://localhost.example.com/v1", False),
        ("http://10.0.0.1/v1", False),
        ("http://simulator.invalid/v1", False),
    ],
)
def test_loopback_is_this_machine_alone(url, here) -> None:
    assert is_loopback(url) is here


@pytest.mark.parametrize(
    ("value", "base_url"),
    [
        ("", "http://127.0.0.1:11434/v1"),
        ("0.0.0.0", "http://127.0.0.1:11434/v1"),
        ("0.0.0.0:9999", "http://127.0.0.1:9999/v1"),
        (":9999", "http://127.0.0.1:9999/v1"),
        ("box", "http://box:11434/v1"),
        ("[::1]:9999", "http://[::1]:9999/v1"),
        ("::1", "http://[::1]:11434/v1"),
        ("http://box:9999", "http://box:9999/v1"),
        ("https://box.example/ollama/", "https://box.example/ollama/v1"),
        ("http://box:9999/v1", "http://box:9999/v1"),
    ],
)
def test_ollama_host_is_read_as_ollama_reads_it(value, base_url) -> None:
    assert located(CATALOG["ollama"], {"OLLAMA_HOST": value}).base_url == base_url


@pytest.mark.parametrize("value", ["http://u:secret@h", "a b", "box:port", "http://"])
def test_a_wrong_address_variable_is_a_config_error(value) -> None:
    with pytest.raises(ConfigError, match="OLLAMA_HOST must be") as caught:
        located(CATALOG["ollama"], {"OLLAMA_HOST": value})
    assert "secret" not in caught.value.block()


def test_an_entry_without_a_variable_stays() -> None:
    assert located(CATALOG["groq"], {"GROQ_BASE_URL": "http://x"}) is CATALOG["groq"]


def test_a_hosted_key_follows_only_to_its_own_host() -> None:
    openai, vllm = CATALOG["openai"], CATALOG["vllm"]
    assert moved(openai, "https://api.openai.com/v2").api_key_env == "OPENAI_API_KEY"
    here = moved(openai, "http://127.0.0.1:1/v1")
    assert (here.api_key_env, here.key_required) == (None, False)
    assert moved(vllm, "http://10.0.0.1/v1").api_key_env == "VLLM_API_KEY"
    for stranger in ("https://evil.example/v1", "http://api.openai.com/v1", "https://api.openai.com.evil.example/v1"):
        with pytest.raises(ValueError, match=r"belongs to https://api\.openai\.com"):
            moved(openai, stranger)
