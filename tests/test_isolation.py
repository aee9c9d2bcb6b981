"""What keeps tests and notebooks from spending: a clean environment, and no way out."""

from __future__ import annotations

import asyncio
import os
import socket

import pytest

from llmkit.providers.catalog import CATALOG


def test_no_variable_of_a_provider_is_left() -> None:
    names = {name for entry in CATALOG.values() for name in (entry.api_key_env, entry.base_url_env) if name}
    assert names
    assert not names & set(os.environ)


def test_the_pattern_of_unwanted_variables_knows_every_provider(pytestconfig) -> None:
    unwanted = next(p for p in pytestconfig.pluginmanager.get_plugins() if hasattr(p, "UNWANTED")).UNWANTED
    for entry in CATALOG.values():
        for name in (entry.api_key_env, entry.base_url_env):
            assert name is None or unwanted.fullmatch(name), name


def test_offline_is_on() -> None:
    assert os.environ["LLMKIT_OFFLINE"] == "1"
    assert os.environ["LLMKIT_DISPLAY"] == "final"


def test_a_connection_to_another_machine_is_refused_and_noticed(outbound) -> None:
    with socket.socket() as sock, pytest.raises(OSError, match="stay on this machine"):
        sock.connect(("192.0.2.1", 80))

    async def through_asyncio() -> None:
        await asyncio.open_connection("192.0.2.2", 80)

    with pytest.raises(OSError, match="stay on this machine"):
        asyncio.run(through_asyncio())
    with pytest.raises(OSError, match="stay on this machine"):
        socket.getaddrinfo("api.openai.com", 443)
    assert outbound == ["192.0.2.1", "192.0.2.2", "api.openai.com"]
    outbound.clear()


def test_loopback_stays_open() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        assert client.getpeername() == server.getsockname()
