"""A real engine, as the tests see it beside llmkit: asked without it, and by the engine's own counters."""

import json
import re
import time
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.request import Request, urlopen

WINDOW = 4096  # of the model that tiny_model.py makes
LONGEST = WINDOW - 96  # tokens of an answer that leave room for a prompt; the tiny model never ends by itself


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
        """``llmkit.toml`` for this engine. Without the cache: it is the engine that is asked here, each time."""
        local = f'provider = "{self.provider}"\nmodel = "{self.model}"\nbase_url = "{self.url}"'
        return f'model = "local"\n\n[cache]\nenabled = false\n\n[models.local]\n{local}\n'


@contextmanager
def cut_short(engine):
    """Within this, the engine begins one answer, and gives it up before its end."""
    before = engine.counted("generation_tokens_total")
    yield
    assert engine.settles("num_requests_running", 0) < 0.3
    made = engine.counted("generation_tokens_total") - before
    assert 0 < made < LONGEST
    time.sleep(0.2)
    assert engine.counted("generation_tokens_total") - before == made
