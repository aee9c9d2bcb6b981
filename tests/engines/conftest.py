"""What the tests against a real engine share: which one it is, what it says of itself, and clients that ask it.

``LLMKIT_ENGINE_URL`` is the engine's base URL with ``/v1``, on this machine; ``LLMKIT_ENGINE_PROVIDER`` is its entry in
the catalog (``vllm`` by default), ``LLMKIT_ENGINE_MODEL`` the model (``tiny``). ``docs/engines.md`` has the commands. These tests wait for what the engine really does, so they read the real clock.
"""

import os

import pytest

import llmkit
from tests.engines.engine import Engine

# Taken out at once: llmkit reads every variable that begins with LLMKIT_, and to it these are mistakes.
URL = os.environ.pop("LLMKIT_ENGINE_URL", "").rstrip("/")
PROVIDER = os.environ.pop("LLMKIT_ENGINE_PROVIDER", "vllm")
MODEL = os.environ.pop("LLMKIT_ENGINE_MODEL", "tiny")


@pytest.fixture(scope="session")
def engine():
    if not URL:
        pytest.skip("LLMKIT_ENGINE_URL is not set (docs/engines.md)")
    return Engine(URL, PROVIDER, MODEL)


@pytest.fixture
def vllm(engine):
    if engine.provider != "vllm":
        pytest.skip(f"{engine.provider} does not say this of itself")
    return engine


@pytest.fixture
def folder(engine, tmp_path, monkeypatch):
    """A project folder whose ``llmkit.toml`` names the engine. Nothing says that llmkit must stay on this machine."""
    monkeypatch.delenv("LLMKIT_OFFLINE")
    monkeypatch.delenv("LLMKIT_DISPLAY")
    (tmp_path / "llmkit.toml").write_text(engine.settings)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def client(folder):
    with llmkit.Client() as client:
        yield client
