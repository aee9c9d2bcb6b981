"""What the tests against a real engine share: which one it is, what it says of itself, and clients that ask it.

``LLMKIT_ENGINE_URL`` is the engine's base URL with ``/v1``, on this machine; ``LLMKIT_ENGINE_PROVIDER`` is its entry in
the catalog (``vllm`` by default), ``LLMKIT_ENGINE_MODEL`` the model (``tiny``). ``docs/engines.md`` has the commands. These tests wait for what the engine really does, so they read the real clock.
"""

import json
import os
import re
import time
from dataclasses import dataclass
from urllib.request import Request, urlopen

import pytest

import llmkit

WINDOW = 4096  # of the model that tiny_model.py makes

# Taken out at once: llmkit reads every variable that begins with LLMKIT_, and to it these are mistakes.
URL = os.environ.pop("LLMKIT_ENGINE_URL", "").rstrip("/")
PROVIDER = os.environ.pop("LLMKIT_ENGINE_PROVIDER", "vllm")
MODEL = os.environ.pop("LLMKIT_ENGINE_MODEL", "tiny")


@dataclass(frozen=True)
class Engine:
    url: str
    provider: str
    model: str

    def asked(self, prompt: str, **fields):
        """Its answer, without llmkit in between."""
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}], **fields}
        request = Request(
            f"{self.url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urlopen(request, timeout=60) as response:
            return json.load(response)

    def counted(self, name: str, **labels: str) -> float:
        """The sum of one of vLLM's metrics over the series that carry ``labels``."""
        with urlopen(f"{self.url.removesuffix('/v1')}/metrics", timeout=10) as response:
            text = response.read().decode()
        series = re.findall(rf"^vllm:{name}(?:\{{(.*)\}})? (\S+)$", text, re.MULTILINE)
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        return sum(float(value) for found, value in series if all(label in found for label in wanted))

    def settles(self, name: str, value: float, within_s: float = 5.0, **labels: str) -> float:
        """Seconds until a metric has ``value``; vLLM publishes them a moment after the fact."""
        started = time.monotonic()
        while (found := self.counted(name, **labels)) != value:
            assert time.monotonic() - started < within_s, f"{name} is {found}, not {value}"
            time.sleep(0.02)
        return time.monotonic() - started

    @property
    def settings(self) -> str:
        """``llmkit.toml`` for this engine."""
        local = f'provider = "{self.provider}"\nmodel = "{self.model}"\nbase_url = "{self.url}"'
        return f'model = "local"\n\n[models.local]\n{local}\n'


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
