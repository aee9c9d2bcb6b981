"""A real redis-server for tests: on a free loopback port, killed and frozen and started again as a test wants.

A shell stands between: it kills the server when its own input ends, which it does however this process dies. So none
is ever left over.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import closing, suppress
from pathlib import Path

import pytest

PROGRAM = shutil.which("redis-server")
needs_redis = pytest.mark.skipif(PROGRAM is None, reason="no redis-server is installed")

_GUARD = 'trap "" INT HUP TERM; "$@" <&- & echo $!; read _; kill -9 $! 2>/dev/null'


class RedisServer:
    """One server in ``folder``. Without ``persistence`` its data is gone when it is killed."""

    def __init__(self, folder: Path, *, persistence: bool = False, password: str | None = None) -> None:
        self.folder = folder
        self.port = _free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.password = password
        self._persistence = persistence
        self._guard: subprocess.Popen[str] | None = None
        self.pid = 0

    def start(self) -> RedisServer:
        options = {
            "--bind": "127.0.0.1",
            "--port": str(self.port),
            "--dir": str(self.folder),
            "--save": "",
            "--appendonly": "yes" if self._persistence else "no",
            "--appendfsync": "always",
            "--loglevel": "warning",
            **({"--requirepass": self.password} if self.password else {}),
        }
        words = [word for pair in options.items() for word in pair]
        assert PROGRAM is not None
        with (self.folder / "redis.log").open("a") as log:
            self._guard = subprocess.Popen(
                ["/bin/sh", "-c", _GUARD, "guard", PROGRAM, *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self._guard.stdout is not None
        self.pid = int(self._guard.stdout.readline())
        self._wait_until_it_answers()
        return self

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=2) as sock:
                sock.sendall(b"PING\r\n")
                if sock.recv(100).startswith((b"+PONG", b"-NOAUTH")):
                    return
            time.sleep(0.01)
        raise AssertionError((self.folder / "redis.log").read_text())

    def kill(self) -> None:
        """As when the machine loses its power."""
        guard, self._guard = self._guard, None
        if guard is None:
            return
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        guard.communicate("\n", timeout=20)
        guard.wait(20)

    def freeze(self) -> None:
        """It keeps its connections, and says nothing any more."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def ask(self, *words: object) -> object:
        """One command, past llmkit."""
        import redis

        with closing(redis.Redis(port=self.port, password=self.password, socket_timeout=10)) as client:
            return client.execute_command(*words)

    def age(self, seconds: float) -> None:
        """Make every lease ``seconds`` older, as if the server's clock had run on."""
        for member in self.ask("ZRANGE", "llmkit:{v1}:leases", 0, -1):
            self.ask("ZINCRBY", "llmkit:{v1}:leases", -seconds * 1000, member)

    def names(self) -> list[str]:
        return sorted(key.decode() for key in self.ask("KEYS", "*"))


def _free_port() -> int:
    with closing(socket.socket()) as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]
