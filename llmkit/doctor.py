"""What llmkit finds where it runs, and what is wrong with it: versions, settings, keys, servers, the store, prices.

Nothing is asked of any model and no key is sent. A key is only ever said to be set, by its variable's name.
"""

from __future__ import annotations

import os
import platform
import socket
import time
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from llmkit import __version__
from llmkit.config import Config
from llmkit.environment import Environment
from llmkit.errors import LLMKitError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from llmkit.providers.catalog import ProviderEntry

__all__ = ["Finding", "examine"]

PACKAGES = ("ipython", "ipykernel", "jupyterlab", "httpx", "aiohttp", "tenacity", "tiktoken", "genai-prices", "pandas")
CONNECT_S = 3.0
OLD_PRICES_DAYS = 120


@dataclass(frozen=True, slots=True)
class Finding:
    """One line. ``state`` is ``ok``, ``note`` (worth knowing) or ``wrong`` (llmkit cannot work as it is set up)."""

    subject: str
    state: str
    text: str


def examine(environ: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Look at one thing after the other; each is told as soon as it is known. At most some seconds in all."""
    environ = Environment.over(environ)
    yield Finding("llmkit", "ok", f"{__version__} · Python {platform.python_version()} · {platform.system()}")
    yield Finding("packages", "ok", " · ".join(f"{name} {_version(name)}" for name in PACKAGES))
    try:
        config = Config.load(environ=environ)
    except LLMKitError as error:
        yield Finding("settings", "wrong", f"{error.message}{'; ' + error.next_step if error.next_step else ''}")
        config = Config.of(environ=environ)
    else:
        yield Finding("settings", "ok", str(config.file or f"no llmkit.toml from {os.getcwd()} upwards"))
        yield from (Finding("settings", "note", notice) for notice in config.notices)
    yield from _keys(config.providers.values(), environ)
    entries = list(_located(config))
    if config.offline:
        yield Finding("offline", "note", "LLMKIT_OFFLINE is on: no call leaves this machine")
    yield from _local_servers(entries)
    if not config.offline:
        yield from _hosted(entries, environ)
    yield _store(config)
    yield from _shared(config)
    yield _prices()
    yield from _default(config)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _keys(entries: Iterable[ProviderEntry], environ: Mapping[str, str]) -> Iterator[Finding]:
    names = list(dict.fromkeys(entry.api_key_env for entry in entries if entry.api_key_env))
    found = [name for name in names if environ.get(name, "").strip()]
    yield Finding(
        "keys", "ok", f"{', '.join(found)} {'is' if len(found) == 1 else 'are'} set" if found else "none is set"
    )


def _located(config: Config) -> Iterator[ProviderEntry]:
    """Every provider where its variable puts it; one whose variable is wrong is said when it is asked for."""
    from llmkit.providers.catalog import located

    for entry in config.providers.values():
        try:
            yield located(entry, config.environ)
        except LLMKitError:
            continue


def _local_servers(entries: Iterable[ProviderEntry]) -> Iterator[Finding]:
    from llmkit.providers.discovery import find

    by_url: dict[str, dict[str, ProviderEntry]] = {}
    for entry in entries:
        if entry.local:
            by_url.setdefault(entry.base_url, {})[entry.name] = entry
    found = [find(entries, {}) for entries in by_url.values()]
    answering = [str(each) for each in found if each.model != "simulator"]
    text = "; ".join(answering) if answering else f"none answers ({', '.join(_address(url) for url in by_url)})"
    yield Finding("local", "ok" if answering else "note", text)


def _address(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.hostname}:{parts.port}"


def _hosted(entries: Iterable[ProviderEntry], environ: Mapping[str, str]) -> Iterator[Finding]:
    """Whether the servers of providers whose key is set can be connected to."""
    for entry in entries:
        parts = urlsplit(entry.base_url)
        if entry.local or entry.simulated or not environ.get(entry.api_key_env or "", "").strip():
            continue
        if any(environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
            yield Finding(entry.name, "note", f"{parts.hostname} is behind a proxy, so it was not tried")
            continue
        yield _reached(entry.name, str(parts.hostname), parts.port or (443 if parts.scheme == "https" else 80))


def _reached(name: str, host: str, port: int) -> Finding:
    began = time.monotonic()
    try:
        socket.create_connection((host, port), timeout=CONNECT_S).close()
    except OSError as error:
        return Finding(name, "wrong", f"{host}:{port} cannot be reached: {error.strerror or type(error).__name__}")
    return Finding(name, "ok", f"{host}:{port} accepts connections ({(time.monotonic() - began) * 1000:.0f} ms)")


def _store(config: Config) -> Finding:
    from llmkit.state.store import open_store

    try:
        store = open_store(config.state_url)
        try:
            store.commit([])
            rows = len(store.calls(limit=1))
        finally:
            store.close()
    except LLMKitError as error:
        return Finding("store", "wrong", f"{error.message}{'; ' + error.next_step if error.next_step else ''}")
    return Finding("store", "ok", f"{store.location}{'' if rows else ' (no call yet)'}")


def _shared(config: Config) -> Iterator[Finding]:
    """Whether the server that machines share through answers, where one is set."""
    import asyncio
    from threading import Thread

    from llmkit.clock import SystemClock
    from llmkit.state.sharing import open_shared

    async def look() -> None:
        shared = open_shared(config.state_url, SystemClock(), config.environ)
        if shared is None:
            return
        try:
            await shared.accounts.balances([])
            found.append(Finding("server", "ok", f"{shared.location} answers; budgets, cache and breakers are shared"))
        finally:
            await shared.aclose()

    def work() -> None:
        try:
            asyncio.run(look())
        except LLMKitError as error:
            found.append(
                Finding("server", "wrong", f"{error.message}{'; ' + error.next_step if error.next_step else ''}")
            )

    found: list[Finding] = []
    thread = Thread(target=work)  # a notebook has a loop of its own on this one
    thread.start()
    thread.join()
    yield from found


def _prices() -> Finding:
    from datetime import UTC, datetime

    from llmkit.models import table

    newest = table.newest_price()
    if newest is None:
        return Finding("prices", "note", f"{table.version()}, of unknown age")
    days = (datetime.now(UTC).date() - newest).days
    text = f"{table.version()}, newest price of {newest}"
    if days <= OLD_PRICES_DAYS:
        return Finding("prices", "ok", text)
    return Finding("prices", "note", f"{text}: {days} days old; pip install -U genai-prices")


def _default(config: Config) -> Iterator[Finding]:
    try:
        default = config.default_model()
        links = config.route(default.model)
    except LLMKitError as error:
        yield Finding("model", "wrong", error.message)
        return
    yield Finding("model", "ok", str(default))
    for endpoint in (link.endpoint for link in links):
        key = endpoint.api_key_env
        if endpoint.key_required and key and not config.environ.get(key, "").strip():
            yield Finding("model", "wrong", f"{endpoint.name} needs a key: {key} is not set")
    caps = config.budget
    cap = "no cap in USD" if caps.request_usd is None else f"at most ${caps.request_usd} a request"
    yield Finding("caps", "ok", cap + (f", {caps.request_tokens:,} tokens" if caps.request_tokens is not None else ""))
