"""Which model to use when no setting says so: a key in the environment, else a server on this machine, else the simulator.

Looking for local servers costs nothing where there are none: all usual ports are tried at once, and a refused
connection is known in microseconds. What answers is asked for its model list, within narrow limits: it may be any
program at all. No key is ever sent, since nobody knows yet who listens.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

from llmkit.endpoint import is_loopback
from llmkit.errors import ConfigError
from llmkit.providers.catalog import located

if TYPE_CHECKING:
    import selectors
    import socket
    from collections.abc import Mapping, Sequence

    from llmkit.providers.catalog import ProviderEntry

__all__ = ["CONNECT_S", "MAX_BYTES", "TOTAL_S", "Default", "find"]

CONNECT_S = 0.05
"""Seconds within which a port must accept."""
TOTAL_S = 0.35
"""Seconds for everything, the model list included."""
MAX_BYTES = 256 * 1024
"""The longest answer that is read."""

# What a server calls its model ends up in a notebook: only what cannot be mistaken for anything else gets there.
_MODEL_ID = r"[A-Za-z0-9~./][A-Za-z0-9~._/:@+-]{0,199}"
_NOT_FOR_CHAT = r"(?i)embed|rerank|whisper|bge-|minilm"
_CHUNK = rb"([0-9A-Fa-f]{1,8})(?:;[^\r\n]*)?\r\n"


class Default(NamedTuple):
    """The model that is used when a call names none, and where that comes from, in words."""

    model: str
    why: str

    def __str__(self) -> str:
        provider, colon, name = self.model.partition(":")
        if provider == "simulator":
            return f"the simulator ({self.why})"
        if colon and "," not in self.model:
            return f"{name} at {provider} ({self.why})"
        return f"{self.model} ({self.why})"


def find(entries: Mapping[str, ProviderEntry], environ: Mapping[str, str]) -> Default:
    """Look for a model: keys first, then local servers, then the simulator. At most `TOTAL_S` seconds."""
    placed = [entry for entry in (_located(e, environ) for e in entries.values()) if entry is not None]
    return (
        _by_key(placed, entries, environ)
        or _by_server(placed)
        or Default("simulator", "no config, key or local server found")
    )


def _located(entry: ProviderEntry, environ: Mapping[str, str]) -> ProviderEntry | None:
    try:
        return located(entry, environ)
    except ConfigError:  # said when that provider is asked for; here it is only not a candidate
        return None


def _by_key(
    placed: Sequence[ProviderEntry], entries: Mapping[str, ProviderEntry], environ: Mapping[str, str]
) -> Default | None:
    for entry in placed:
        if not entry.default_model or not entry.api_key_env or not environ.get(entry.api_key_env, "").strip():
            continue
        # OPENAI_BASE_URL on this machine: a local server with a made-up key, where OpenAI's own models are not.
        if entry.base_url != entries[entry.name].base_url and is_loopback(entry.base_url):
            continue
        return Default(f"{entry.name}:{entry.default_model}", f"{entry.api_key_env} is set")
    return None


def _by_server(placed: Sequence[ProviderEntry]) -> Default | None:
    by_url: dict[str, list[ProviderEntry]] = {}
    for entry in placed:
        if entry.local and entry.base_url.startswith("http://") and is_loopback(entry.base_url):
            by_url.setdefault(entry.base_url, []).append(entry)
    if not by_url:
        return None
    probe = _first_found([_Probe(url, candidates) for url, candidates in by_url.items()])
    if probe is None or probe.model is None:
        return None
    return Default(f"{probe.entry.name}:{probe.model}", f"found at {probe.host}:{probe.port}")


def _first_found(probes: list[_Probe]) -> _Probe | None:
    """The first probe, in their order, that found a model; it waits only for those that stand before it."""
    import selectors
    import time

    began = time.monotonic()
    with selectors.DefaultSelector() as selector:
        try:
            for probe in probes:
                probe.start(selector)
            while undecided := _undecided(probes):
                elapsed = time.monotonic() - began
                late = [p for p in undecided if elapsed >= (TOTAL_S if p.connected else CONNECT_S)]
                if late:
                    _give_up(late)
                    continue
                for key, _ in selector.select((CONNECT_S if elapsed < CONNECT_S else TOTAL_S) - elapsed):
                    key.data.advance(selector)
        finally:
            _give_up(probes)
    return next((probe for probe in probes if probe.model is not None), None)


def _undecided(probes: list[_Probe]) -> list[_Probe]:
    waiting = []
    for probe in probes:
        if probe.model is not None:
            break
        if probe.socket is not None:
            waiting.append(probe)
    return waiting


def _give_up(probes: list[_Probe]) -> None:
    for probe in probes:
        probe.close()


class _Probe:
    """One request for one model list. ``model`` is its first usable id; ``entry`` the provider it sounds like."""

    def __init__(self, base_url: str, candidates: list[ProviderEntry]) -> None:
        from urllib.parse import urlsplit

        parts = urlsplit(base_url)
        self.host = "127.0.0.1" if parts.hostname in {None, "localhost"} else str(parts.hostname)
        self.port = parts.port or 80
        self.path = f"{parts.path}/models"
        self.candidates = candidates
        self.entry = candidates[0]
        self.model: str | None = None
        self.connected = False
        self.socket: socket.socket | None = None
        self._selector: selectors.BaseSelector | None = None
        self._received = bytearray()

    def start(self, selector: selectors.BaseSelector) -> None:
        import errno
        import socket
        from selectors import EVENT_WRITE

        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        try:
            self.socket = socket.socket(family, socket.SOCK_STREAM)
            self.socket.setblocking(False)
            code = self.socket.connect_ex((self.host, self.port))
        except (OSError, OverflowError):
            self.close()
            return
        if code not in {0, errno.EINPROGRESS, errno.EWOULDBLOCK, errno.EALREADY}:
            self.close()
            return
        self._selector = selector
        selector.register(self.socket, EVENT_WRITE, self)

    def close(self) -> None:
        sock, self.socket = self.socket, None
        if sock is None:
            return
        if self._selector is not None:
            self._selector.unregister(sock)
        sock.close()

    def advance(self, selector: selectors.BaseSelector) -> None:
        """The socket is ready: send, or read what is there."""
        if self.socket is None:
            return
        try:
            if self.connected:
                self._read(self.socket)
            else:
                self._ask(self.socket, selector)
        except OSError:
            self.close()

    def _ask(self, sock: socket.socket, selector: selectors.BaseSelector) -> None:
        from selectors import EVENT_READ
        from socket import SO_ERROR, SOL_SOCKET

        if sock.getsockopt(SOL_SOCKET, SO_ERROR):
            self.close()
            return
        self.connected = True
        host = f"[{self.host}]" if ":" in self.host else self.host
        request = (
            f"GET {self.path} HTTP/1.1\r\nHost: {host}:{self.port}\r\nAccept: application/json\r\n"
            "User-Agent: llmkit\r\nConnection: close\r\n\r\n"
        )
        sock.send(request.encode("ascii"))  # far below any socket's buffer: never sent in part
        selector.modify(sock, EVENT_READ, self)

    def _read(self, sock: socket.socket) -> None:
        try:
            data = sock.recv(64 * 1024)
        except BlockingIOError:
            return
        self._received += data
        if len(self._received) > MAX_BYTES or not b"HTTP/1.".startswith(self._received[:7]):
            self.close()
            return
        body, whole = _body(bytes(self._received))
        if data and not whole:
            return
        self.close()
        if body is not None:
            self._choose(_models(body))

    def _choose(self, models: list[tuple[str, str]]) -> None:
        if not models:
            return
        self.model, owner = models[0]
        known = [entry for entry in self.candidates if entry.owned_by == owner]
        unmarked = [entry for entry in self.candidates if entry.owned_by is None]
        self.entry = (known or unmarked or self.candidates)[0]


def _body(received: bytes) -> tuple[bytes | None, bool]:
    """The body of a 200 answer as far as it has come (None: not one), and whether that is all of it."""
    head, blank, body = received.partition(b"\r\n\r\n")
    if not blank:
        return None, False
    status, *lines = head.split(b"\r\n")
    if not re.match(rb"HTTP/1\.[01] 200\b", status):
        return None, True
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)}
    if headers.get(b"transfer-encoding", b"").lower() == b"chunked":
        return _unchunked(body)
    length = headers.get(b"content-length", b"")
    if not re.fullmatch(rb"\d{1,9}", length):
        return body, False
    return body[: int(length)], len(body) >= int(length)


def _unchunked(body: bytes) -> tuple[bytes | None, bool]:
    parts: list[bytes] = []
    at = 0
    chunk = re.compile(_CHUNK)
    while match := chunk.match(body, at):
        size = int(match[1], 16)
        if size == 0:
            return b"".join(parts), True
        parts.append(body[match.end() : match.end() + size])
        at = match.end() + size + 2
    return b"".join(parts), False


def _models(body: bytes) -> list[tuple[str, str]]:
    """The usable ``(id, owned_by)`` of a model list; empty where it is none."""
    import json

    try:
        answer: Any = json.loads(body)
    except (ValueError, RecursionError):
        return []
    data = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(data, list):
        return []
    found = []
    for item in data:
        name = item.get("id") if isinstance(item, dict) else None
        if isinstance(name, str) and re.fullmatch(_MODEL_ID, name) and not re.search(_NOT_FOR_CHAT, name):
            found.append((name, str(item.get("owned_by", ""))[:64]))
    return found
