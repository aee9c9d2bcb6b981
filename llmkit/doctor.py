"""What llmkit finds where it runs, and what is wrong with it: versions, settings, keys, servers, the store, prices.

Nothing is asked of any model and no key is sent. A key is only ever said to be set, by its variable's name. What may
have to wait is looked at side by side, and left after `PATIENCE_S`.
"""

from __future__ import annotations

import os
import platform
import socket
import time
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from llmkit import __version__, caps
from llmkit.config import Config
from llmkit.environment import Environment
from llmkit.errors import LLMKitError
from llmkit.redaction import redact, tidy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from llmkit.providers.catalog import ProviderEntry

__all__ = ["Finding", "examine", "line"]

PACKAGES = ("ipython", "ipykernel", "jupyterlab", "httpx", "aiohttp", "tenacity", "tiktoken", "genai-prices", "pandas")
CONNECT_S = 3.0
PATIENCE_S = 5.0  # for all that is looked at side by side
OLD_PRICES_DAYS = 120


@dataclass(frozen=True, slots=True)
class Finding:
    """One line. ``state`` is ``ok``, ``note`` (worth knowing) or ``wrong`` (llmkit cannot work as it is set up)."""

    subject: str
    state: str
    text: str


_MARKS = {"ok": "ok   ", "note": "note ", "wrong": "WRONG"}
_COLOURS = {"ok": "\x1b[32m", "note": "\x1b[33m", "wrong": "\x1b[31m"}


def line(finding: Finding, *, coloured: bool = False) -> str:
    """A finding as one line of text."""
    mark = _MARKS[finding.state]
    mark = f"{_COLOURS[finding.state]}{mark}\x1b[0m" if coloured else mark
    return f"{mark} {finding.subject:<9} {tidy(redact(finding.text), limit=500)}"


def examine(
    environ: Mapping[str, str] = os.environ, folder: Path | None = None, *, cell: object = None
) -> Iterator[Finding]:
    """What there is, each told as soon as it is known and its turn has come. At most some seconds in all.

    Args:
        folder: where settings are looked for from; by default the current one.
        cell: what a notebook's cell may cost, where its own settings say so.
    """
    environ = Environment.over(environ)
    yield _loaded()
    yield Finding("packages", "ok", " · ".join(f"{name} {_version(name)}" for name in PACKAGES))
    try:
        config = Config.load(folder, environ=environ)
    except LLMKitError as error:
        yield _wrong("settings", error)
        config = Config.of(environ=environ)
    else:
        yield Finding("settings", "ok", str(config.file or f"no llmkit.toml from {folder or os.getcwd()} upwards"))
        yield from (Finding("settings", "note", notice) for notice in config.notices)
    yield from _keys(config.providers.values(), environ)
    if config.offline:
        yield Finding("offline", "note", "LLMKIT_OFFLINE is on: no call leaves this machine")
    yield from _side_by_side(_probes(config, environ))
    yield Finding("caps", "ok", caps.in_words(config.budget, cell).removeprefix("caps: ").removeprefix("caps "))


def _loaded() -> Finding:
    """The version at work; another one may have been installed since it was imported."""
    text = f"{__version__} · Python {platform.python_version()} · {platform.system()}"
    installed = _version("llmkit")
    if installed in {__version__, _MISSING}:
        return Finding("llmkit", "ok", text)
    return Finding("llmkit", "note", f"{text}; {installed} is installed: restart the kernel to use it")


def _wrong(subject: str, error: LLMKitError) -> Finding:
    return Finding(subject, "wrong", f"{error.message}{'; ' + error.next_step if error.next_step else ''}")


def _probes(config: Config, environ: Mapping[str, str]) -> Iterator[tuple[str, Callable[[], Iterable[Finding]]]]:
    """What may have to wait for a server, a file or a large import."""
    entries = list(_located(config))
    yield "local", partial(_local_servers, entries)
    if not config.offline:
        yield from _hosted(entries, environ)
    yield "store", partial(_store, config)
    yield "server", partial(_shared, config)
    yield "prices", _prices
    yield "model", partial(_default, config)


def _side_by_side(probes: Iterable[tuple[str, Callable[[], Iterable[Finding]]]]) -> Iterator[Finding]:
    """What each finds, in their order; one that takes too long is left to itself."""
    deadline = time.monotonic() + PATIENCE_S
    begun = [(subject, _begun(subject, probe)) for subject, probe in probes]
    for subject, answers in begun:
        try:
            yield from answers.get(timeout=max(0.0, deadline - time.monotonic()))
        except Empty:
            yield Finding(subject, "wrong", f"nothing was heard within {PATIENCE_S:g} s")


def _begun(subject: str, probe: Callable[[], Iterable[Finding]]) -> SimpleQueue[list[Finding]]:
    answers: SimpleQueue[list[Finding]] = SimpleQueue()

    def work() -> None:
        try:
            answers.put(list(probe()))
        except Exception as error:  # noqa: BLE001 - one that fails is a finding, and hides no other
            answers.put([Finding(subject, "wrong", f"it could not be looked at: {type(error).__name__}: {error}")])

    Thread(target=work, name=f"llmkit-doctor-{subject}", daemon=True).start()
    return answers


_MISSING = "not installed"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return _MISSING


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


def _hosted(
    entries: Iterable[ProviderEntry], environ: Mapping[str, str]
) -> Iterator[tuple[str, Callable[[], Iterable[Finding]]]]:
    """Whether the servers of providers whose key is set can be connected to."""
    for entry in entries:
        if not entry.local and not entry.simulated and environ.get(entry.api_key_env or "", "").strip():
            yield entry.name, partial(_reached, entry, environ)


def _reached(entry: ProviderEntry, environ: Mapping[str, str]) -> Iterator[Finding]:
    parts = urlsplit(entry.base_url)
    host, port = str(parts.hostname), parts.port or (443 if parts.scheme == "https" else 80)
    if any(environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        yield Finding(entry.name, "note", f"{host} is behind a proxy, so it was not tried")
        return
    began = time.monotonic()
    try:
        socket.create_connection((host, port), timeout=CONNECT_S).close()
    except OSError as error:
        why = error.strerror or type(error).__name__
        yield Finding(entry.name, "wrong", f"{host}:{port} cannot be reached: {why}")
        return
    yield Finding(entry.name, "ok", f"{host}:{port} accepts connections ({(time.monotonic() - began) * 1000:.0f} ms)")


def _store(config: Config) -> Iterator[Finding]:
    from llmkit.state.store import open_store

    try:
        store = open_store(config.state_url)
        try:
            store.commit([])
            rows = len(store.calls(limit=1))
        finally:
            store.close()
    except LLMKitError as error:
        yield _wrong("store", error)
        return
    yield Finding("store", "ok", f"{store.location}{'' if rows else ' (no call yet)'}")


def _shared(config: Config) -> Iterator[Finding]:
    """Whether the server that machines share through answers, where one is set."""
    import asyncio

    from llmkit.clock import SystemClock
    from llmkit.state.sharing import open_shared

    async def look() -> Finding | None:
        shared = open_shared(config.state_url, SystemClock(), config.environ)
        if shared is None:
            return None
        try:
            await shared.accounts.balances([])
        finally:
            await shared.aclose()
        return Finding("server", "ok", f"{shared.location} answers; budgets, cache and breakers are shared")

    try:
        found = asyncio.run(look())
    except LLMKitError as error:
        found = _wrong("server", error)
    if found is not None:
        yield found


def _prices() -> Iterator[Finding]:
    from datetime import UTC, datetime

    from llmkit.models import table

    newest = table.newest_price()
    if newest is None:
        yield Finding("prices", "note", f"{table.version()}, of unknown age")
        return
    days = (datetime.now(UTC).date() - newest).days
    old = days > OLD_PRICES_DAYS
    text = f"{table.version()}, newest price of {newest}"
    yield Finding(
        "prices", "note" if old else "ok", text + (f": {days} days old; pip install -U genai-prices" if old else "")
    )


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
