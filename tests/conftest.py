"""For every test: a ledger of its own, and no way out of this machine."""

from __future__ import annotations

import ipaddress
import socket

import pytest

LOCAL_NAMES = {"localhost", "", None}


def _stays_here(host):
    """Whether ``host`` is this machine. Names other than ``localhost`` would have to be asked for outside."""
    if isinstance(host, bytes):
        host = host.decode("ascii", "replace")
    if host in LOCAL_NAMES:
        return True
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


@pytest.fixture(autouse=True)
def own_data_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("LLMKIT_DATA_DIR", str(tmp_path / "llmkit-data"))


@pytest.fixture(autouse=True)
def outbound(monkeypatch):
    """Every attempt to leave this machine; one is enough to fail the test, even where the error was swallowed.

    All of asyncio's ways (``sock_connect``, ``create_connection``) end in these three as well.
    """
    attempts = []

    def guarded(original, host_of):
        def guard(first, *rest, **options):
            host = host_of(first, *rest)
            if not _stays_here(host):
                attempts.append(host)
                raise OSError(f"tests stay on this machine: {host}")
            return original(first, *rest, **options)

        return guard

    def host_of_socket(sock, address):
        return address[0] if sock.family in {socket.AF_INET, socket.AF_INET6} else None

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, guarded(getattr(socket.socket, name), host_of_socket))
    monkeypatch.setattr(socket, "getaddrinfo", guarded(socket.getaddrinfo, lambda host, *_: host))
    yield attempts
    assert not attempts, f"the test tried to reach {', '.join(map(str, attempts))}"
