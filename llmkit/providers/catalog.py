"""The providers llmkit knows, as data: where each is, which variable holds its key, how its server deviates.

An OpenAI-compatible service is an entry here, or a table ``[providers.NAME]`` in ``llmkit.toml``; never a class.

Three rules hold for every entry:

* **Where it is.** ``base_url`` includes the version path. Where users expect a variable to move it
  (``OPENAI_BASE_URL``, ``ANTHROPIC_BASE_URL``, ``OLLAMA_HOST``), the entry names it; what ``llmkit.toml`` says is
  more specific and wins over that variable.
* **Where its key goes.** A key goes only to the host it belongs to. A file that moves a hosted provider to another
  host must say which key goes there (``api_key_env``); moved to this machine it gets none. A variable such as
  ``OPENAI_BASE_URL`` stands beside the key in the user's own environment, so there the key goes along.
* **What is local.** ``local`` means the user's own hardware: nothing is billed. A proxy on this machine (LiteLLM)
  bills for what lies behind it, so it is not local.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from llmkit.endpoint import is_loopback
from llmkit.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["CATALOG", "QUIRKS", "ProviderEntry", "base_url_from", "located", "moved"]

QUIRKS = {
    "any_json_schema": "enforces all of JSON schema, so that a schema is sent as it was given and not in the strict form",
    "max_completion_tokens": "the output limit is sent under this name; reasoning models there refuse max_tokens",
    "no_done": "streams end without the [DONE] frame; every stream is read so that this does no harm",
    "no_json_object": "takes no response_format json_object; asked in words alone where it takes no schema either",
    "no_json_schema": "takes no schema of the answer; it is asked for in words, and with response_format json_object",
    "no_stream_options": "refuses stream_options; usage comes unasked, or not at all",
    "random_seed": "the seed is called random_seed",
}
"""Every quirk by name, with what it means."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderEntry:
    """What is known of a provider before any setting is read.

    Attributes:
        name: the part before the colon in ``provider:model``.
        base_url: without a trailing slash, version included.
        wire: ``openai`` or ``anthropic``.
        api_key_env: the name of the variable that holds the key; None where none is used.
        key_required: whether a missing key is an error before anything is sent.
        local: on the user's own hardware; probed for when nothing else is configured.
        simulated: served by the simulator.
        quirks: names out of `QUIRKS`.
        default_model: what to use when only its key is found; None where no model is sure to be there.
        base_url_env: a variable that moves ``base_url``; ``base_url_path`` is added where its value lacks it.
        owned_by: what the server's model list says in ``owned_by``; tells servers on one port apart.
        bare_models: pattern of model names that mean this provider without saying so (``gpt-…``).
    """

    name: str
    base_url: str
    wire: str = "openai"
    api_key_env: str | None = None
    key_required: bool = False
    local: bool = False
    simulated: bool = False
    quirks: frozenset[str] = frozenset()
    default_model: str | None = None
    base_url_env: str | None = None
    base_url_path: str = ""
    owned_by: str | None = None
    bare_models: str | None = None


def _hosted(name: str, base_url: str, key: str, model: str | None = None, *quirks: str) -> ProviderEntry:
    return ProviderEntry(
        name=name,
        base_url=base_url,
        api_key_env=key,
        key_required=True,
        default_model=model,
        quirks=frozenset(quirks),
    )


def _local(name: str, port: int, owned_by: str | None = None, *quirks: str, key: str | None = None) -> ProviderEntry:
    return ProviderEntry(
        name=name,
        base_url=f"http://127.0.0.1:{port}/v1",
        api_key_env=key,
        local=True,
        owned_by=owned_by,
        quirks=frozenset(quirks),
    )


_ENTRIES = (
    ProviderEntry(
        name="openai",
        base_url="https://api.openai.com/v1",
        api_key_env="OPENAI_API_KEY",
        key_required=True,
        default_model="gpt-5-mini",
        base_url_env="OPENAI_BASE_URL",
        quirks=frozenset({"max_completion_tokens"}),
        bare_models=r"gpt-(?!oss)|chatgpt-|o[134](-|$)",  # gpt-oss is open: others serve it, OpenAI does not
    ),
    ProviderEntry(
        name="anthropic",
        base_url="https://api.anthropic.com/v1",
        wire="anthropic",
        api_key_env="ANTHROPIC_API_KEY",
        key_required=True,
        default_model="claude-haiku-4-5",
        base_url_env="ANTHROPIC_BASE_URL",  # by the convention of its SDK without /v1
        base_url_path="/v1",
        bare_models=r"claude-",
    ),
    _hosted("gemini", "https://generativelanguage.googleapis.com/v1beta/openai", "GEMINI_API_KEY", "gemini-2.5-flash"),
    _hosted(
        "mistral",
        "https://api.mistral.ai/v1",
        "MISTRAL_API_KEY",
        "mistral-small-latest",
        "no_stream_options",
        "random_seed",
    ),
    _hosted("deepseek", "https://api.deepseek.com/v1", "DEEPSEEK_API_KEY", "deepseek-chat", "no_json_schema"),
    _hosted("groq", "https://api.groq.com/openai/v1", "GROQ_API_KEY", "llama-3.3-70b-versatile"),
    _hosted("openrouter", "https://openrouter.ai/api/v1", "OPENROUTER_API_KEY", "openai/gpt-5-mini"),
    _hosted("xai", "https://api.x.ai/v1", "XAI_API_KEY"),
    _hosted("together", "https://api.together.xyz/v1", "TOGETHER_API_KEY"),
    _hosted("fireworks", "https://api.fireworks.ai/inference/v1", "FIREWORKS_API_KEY"),
    _hosted("cerebras", "https://api.cerebras.ai/v1", "CEREBRAS_API_KEY"),
    _hosted("huggingface", "https://router.huggingface.co/v1", "HF_TOKEN"),
    ProviderEntry(name="litellm", base_url="http://127.0.0.1:4000/v1", api_key_env="LITELLM_API_KEY"),
    ProviderEntry(
        name="ollama",
        base_url="http://127.0.0.1:11434/v1",
        local=True,
        owned_by="library",
        base_url_env="OLLAMA_HOST",  # host[:port], as its own command line reads it
        base_url_path="/v1",
    ),
    _local("vllm", 8000, "vllm", key="VLLM_API_KEY"),
    _local("lmstudio", 1234, "organization_owner"),
    _local("llamacpp", 8080, "llamacpp", key="LLAMA_API_KEY"),
    _local("sglang", 30000, "sglang"),
    # Entries without a mark of their own come after those with one on the same port: they take what is left.
    _local("transformers", 8000, None, "no_done", "no_json_schema", "no_json_object"),
    _local("tgi", 8080),
    ProviderEntry(
        name="simulator", base_url="http://simulator.invalid/v1", simulated=True, quirks=frozenset({"any_json_schema"})
    ),
)

CATALOG: Mapping[str, ProviderEntry] = {entry.name: entry for entry in _ENTRIES}
"""Every entry by its name, in the order in which they are looked for."""


def base_url_from(text: str) -> str:
    """A base URL in its one clean form: http or https, a host, no trailing slash.

    Raises:
        ValueError: why it is none, in words that do not repeat it (it may hold a password).
    """
    from urllib.parse import urlsplit

    if not text.isascii() or not text.isprintable() or " " in text or len(text) > 2000:
        raise ValueError("a URL in plain ASCII without spaces")
    try:
        parts = urlsplit(text)
        _ = parts.port
    except ValueError:
        raise ValueError("a URL such as http://127.0.0.1:8000/v1") from None
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError("a URL that begins with http:// or https:// and names a host")
    if "@" in parts.netloc:
        raise ValueError("a URL without user name and password; a key goes into the variable that api_key_env names")
    if parts.query or parts.fragment:
        raise ValueError("a URL without ? and #")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"


def located(entry: ProviderEntry, environ: Mapping[str, str]) -> ProviderEntry:
    """The entry where its variable (``base_url_env``) puts it; as it is where that is not set.

    Raises:
        ConfigError: the variable does not hold an address.
    """
    value = environ.get(entry.base_url_env, "").strip() if entry.base_url_env else ""
    if not value:
        return entry
    try:
        base_url = base_url_from(_completed(value, entry.base_url))
    except ValueError as error:
        raise ConfigError(f"{entry.base_url_env} must be {error}") from None
    if not base_url.endswith(entry.base_url_path):
        base_url += entry.base_url_path
    return replace(entry, base_url=base_url)


def _completed(value: str, base_url: str) -> str:
    """``host[:port]`` made a URL by what it lacks of ``base_url``; a URL stays as it is."""
    from urllib.parse import urlsplit

    if "://" in value:
        return _reachable(value)
    usual = urlsplit(base_url)
    address, slash, path = value.partition("/")
    host, _, port = address.rpartition(":") if re.search(r":\d*$", address) and address != "::1" else (address, "", "")
    host = f"[{host}]" if ":" in host and not host.startswith("[") else host
    return _reachable(f"{usual.scheme}://{host or usual.hostname}:{port or usual.port}{slash}{path}")


def _reachable(url: str) -> str:
    """A server's "listen everywhere" is no address to call; it listens on this machine as well."""
    return url.replace("://0.0.0.0", "://127.0.0.1", 1).replace("://[::]", "://[::1]", 1)


def moved(entry: ProviderEntry, base_url: str) -> ProviderEntry:
    """The entry at ``base_url``, with its key only where that goes to the same host or to the user's own server.

    Raises:
        ValueError: a hosted provider's key would go to a stranger; the caller must say which key goes there.
    """
    there = replace(entry, base_url=base_url, base_url_env=None)
    if is_loopback(entry.base_url) or not entry.api_key_env or _origin(base_url) == _origin(entry.base_url):
        return there
    if is_loopback(base_url):
        return replace(there, api_key_env=None, key_required=False)
    raise ValueError(f"{entry.api_key_env} belongs to {_origin(entry.base_url)}")


def _origin(base_url: str) -> str:
    scheme, _, rest = base_url.partition("://")
    return f"{scheme}://{rest.partition('/')[0].lower()}"
