"""The way to a Redis server: one thread, a loop on it, and lanes that carry everybody's commands in their order.

Whoever asks may be on any event loop or thread, and its loop may end at once: the connections are not on it. Commands
that come while others are on their way are sent together as soon as those are answered. Every command here may run
twice without harm, so one that was lost with an idle connection is sent again on a new one.

While the server is away, commands fail at once; one of them tries again each `PAUSE_S`.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import hashlib
import importlib.util
import os
import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from llmkit.errors import ConfigError, StoreError
from llmkit.redaction import tidy

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from redis.asyncio.connection import Connection

__all__ = ["PREFIX", "Script", "Server", "ServerAway", "short"]

PREFIX = "llmkit:{v1}:"  # before every key; its number is the schema's, its braces keep all keys in one cluster slot
PASSWORD = "LLMKIT_REDIS_PASSWORD"  # noqa: S105 - the name of a variable
CONNECT_S = 2.0
COMMAND_S = 2.0
PAUSE_S = 1.0
BATCH = 100  # commands that are sent together, and
BATCH_BYTES = 4 * 2**20  # their size, so that the time limit is one for small things
LONGEST_KEY = 200
ENDING_S = 2.0  # what is on its way when the last user leaves gets this long

_TLS_OPTIONS = frozenset({"ssl_ca_certs", "ssl_certfile", "ssl_keyfile"})
# What a server says when it cannot now, and may later.
_PASSING = ("LOADING", "BUSY", "READONLY", "MASTERDOWN", "OOM", "MISCONF", "TRYAGAIN", "CLUSTERDOWN", "NOREPLICAS")
_NEXT_STEP = (
    'start it, or correct [state] url; [state] on_failure = "continue" goes on without it, '
    'and url = "sqlite" keeps the budget of this machine alone'
)


class ServerAway(StoreError):
    """The server cannot be asked now. ``reached``: whether the command may have got there all the same."""

    def __init__(self, message: str, *, reached: bool, next_step: str) -> None:
        super().__init__(message, next_step=next_step)
        self.reached = reached


class Script:
    """A Lua script. ``P`` is the prefix of all keys, ``NOW`` the server's time in milliseconds, ``int`` writes a whole
    number out: the server's Lua has doubles alone, and shortens large ones.
    """

    __slots__ = ("name", "sha", "source")

    def __init__(self, name: str, source: str) -> None:
        self.name = name
        self.source = _PRELUDE + source
        self.sha = hashlib.sha1(self.source.encode(), usedforsecurity=False).hexdigest()


_PRELUDE = """
local P = KEYS[1]
local TIME = redis.call('TIME')
local NOW = tonumber(TIME[1]) * 1000 + math.floor(tonumber(TIME[2]) / 1000)
local function int(number) return string.format('%.0f', number) end
"""


class _Address:
    """Where the server is, and how to get in. Shows itself without the password."""

    __slots__ = ("db", "host", "options", "password", "port", "tls", "username")

    def __init__(self, url: str, environ: Mapping[str, str]) -> None:
        try:
            parts = urlsplit(url)
            self.host = parts.hostname or "127.0.0.1"
            self.port = parts.port or 6379
            self.db = int(parts.path.strip("/") or "0")
            self.options = _tls_options(parts)
        except ValueError:  # not chained: it may show the URL, and that may hold a password
            self.db = -1
        if self.db < 0 or parts.scheme not in {"redis", "rediss"}:
            raise ConfigError(
                "[state] url is no address of a Redis server",
                next_step='use "redis://HOST:PORT/NUMBER", or "rediss://…" with TLS',
            ) from None
        self.tls = parts.scheme == "rediss"
        self.username = unquote(parts.username) if parts.username else None
        self.password = unquote(parts.password) if parts.password else environ.get(PASSWORD) or None

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"redis{'s' if self.tls else ''}://{host}:{self.port}/{self.db}"

    def connection(self) -> Connection:
        from redis.asyncio.connection import Connection, SSLConnection

        options: dict[str, Any] = dict(self.options)
        settings: dict[str, Any] = {
            "host": self.host,
            "port": self.port,
            "db": self.db,
            "username": self.username,
            "password": self.password,
            "protocol": 2,
            "socket_timeout": None,  # the lane has its own limits, over more than one command
            "socket_connect_timeout": CONNECT_S,
            "socket_keepalive": True,
            "client_name": "llmkit",
        }
        return SSLConnection(**settings, **options) if self.tls else Connection(**settings)


def _tls_options(parts: SplitResult) -> dict[str, str]:
    options = dict(parse_qsl(parts.query, strict_parsing=True)) if parts.query else {}
    if not options.keys() <= (_TLS_OPTIONS if parts.scheme == "rediss" else set()):
        raise ValueError
    return options


class Server:
    """A Redis server, for all that is kept there. Nothing is connected, and no thread runs, before it is first asked.

    Attributes:
        location: its address, without user and password.
    """

    def __init__(self, url: str, environ: Mapping[str, str] = os.environ) -> None:
        """A password is looked for in ``url``, then in ``environ``.

        Raises:
            ConfigError: ``url`` is no address of a Redis server, or the package is missing.
        """
        self._address = _Address(url, environ)
        if importlib.util.find_spec("redis") is None:
            raise ConfigError("[state] url names a Redis server, and the package redis is missing", next_step=_INSTALL)
        self.location = str(self._address)
        self._users: weakref.WeakSet[Any] = weakref.WeakSet()
        self._engine: _Engine | None = None
        self._starting = threading.Lock()
        _SERVERS.add(self)

    def join(self, user: Any) -> None:
        """Count ``user`` in: connections are closed when the last one has left. In a forked child, what it has a method
        ``_start_afresh`` for is called.
        """
        self._users.add(user)

    async def leave(self, user: Any) -> None:
        """Count ``user`` out. A later use connects again."""
        self._users.discard(user)
        if not self._users:
            await self.aclose()

    async def aclose(self) -> None:
        """Let go of connections and of the thread, when what is on its way has been answered."""
        with self._starting:
            engine, self._engine = self._engine, None
        if engine is not None:
            engine.stop()
            if threading.current_thread() is not engine.thread:
                await asyncio.to_thread(engine.thread.join, ENDING_S + CONNECT_S)

    async def run(self, script: Script, *arguments: str | bytes | float, lane: str = "accounts") -> Any:
        """What ``script`` returns.

        Raises:
            ServerAway: it cannot be asked now, or did not answer in time.
            StoreError: it answered with an error.
        """
        loop = asyncio.get_running_loop()
        waiting: asyncio.Future[Any] = loop.create_future()

        engine = self.engine

        def answered(reply: Any) -> None:
            if loop is engine.loop:
                _fill(waiting, reply)
                return
            with contextlib.suppress(RuntimeError):  # its loop has ended
                loop.call_soon_threadsafe(_fill, waiting, reply)

        engine.submit(lane, _Command(script, arguments, answered))
        reply = await waiting
        if isinstance(reply, Exception):
            raise reply
        return reply

    def post(self, script: Script, *arguments: str | bytes | float, lane: str) -> None:
        """Send it, whatever comes of it."""
        self.engine.submit(lane, _Command(script, arguments, _ignored))

    @property
    def engine(self) -> _Engine:
        """The thread at work, started if there is none."""
        engine = self._engine
        if engine is not None and not engine.stopping:
            return engine
        with self._starting:
            if self._engine is None or self._engine.stopping:
                self._engine = engine = _Engine(self._address)
                weakref.finalize(self, engine.stop).atexit = False
            return self._engine

    def _start_afresh(self) -> None:
        """In a forked child: connections and the thread are the parent's."""
        self._starting = threading.Lock()
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.abandon()
        for user in list(self._users):
            user._start_afresh()

    def __repr__(self) -> str:
        return f"<Server {self.location}>"


_INSTALL = 'pip install "llmkit[redis]"'


def short(key: str) -> bytes:
    """``key`` as it stands on the server: bytes, and not too many."""
    encoded = key.encode("utf-8", "backslashreplace")
    return encoded if len(encoded) <= LONGEST_KEY else hashlib.sha256(encoded).hexdigest().encode()


def _fill(waiting: asyncio.Future[Any], reply: Any) -> None:
    if not waiting.done():
        waiting.set_result(reply)


def _ignored(reply: Any) -> None:
    """Nobody waits for it."""


class _Command:
    """A script with its arguments, and who is told what came of it."""

    __slots__ = ("answered", "arguments", "in_full", "script")

    def __init__(self, script: Script, arguments: tuple[Any, ...], answered: Callable[[Any], None]) -> None:
        self.script = script
        self.arguments = arguments
        self.answered = answered
        self.in_full = False

    @property
    def size(self) -> int:
        return sum(len(each) for each in self.arguments if isinstance(each, str | bytes))

    def words(self) -> tuple[Any, ...]:
        how = ("EVAL", self.script.source) if self.in_full else ("EVALSHA", self.script.sha)
        return (*how, 1, PREFIX, *self.arguments)


class _Engine:
    """The thread, its loop, and the lanes on it. Knows nothing of the `Server`, so that one can be dropped."""

    def __init__(self, address: _Address) -> None:
        self._address = address
        self._inbox: deque[tuple[str, _Command]] = deque()
        self._called = False
        self._lanes: dict[str, _Lane] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stop = asyncio.Event()
        self.stopping = False
        self.process = os.getpid()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._serve, name="llmkit-redis", daemon=True)
        self.thread.start()

    # -- from any thread ---------------------------------------------------------------------------------------------

    def submit(self, lane: str, command: _Command) -> None:
        self._inbox.append((lane, command))
        if threading.current_thread() is self.thread:
            self._sort()
        elif not self._called:
            self._called = True
            self._call(self._sort)

    def _call(self, callback: Callable[..., object], *arguments: Any) -> None:
        try:
            self.loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:  # it has just been stopped
            self._refuse_all()

    def start(self, work: Callable[[], Any]) -> None:
        """Run the coroutine that ``work`` makes, on the loop. When that ends, it has `ENDING_S` left."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self._start, work)

    def stop(self) -> None:
        """Begin to end; does not wait."""
        if self.process != os.getpid():
            return
        self.stopping = True
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self._stop.set)

    def settle(self) -> None:
        """Wait until what is on its way has been answered, for a bounded time."""
        with contextlib.suppress(RuntimeError, TimeoutError):
            asyncio.run_coroutine_threadsafe(self._settled(), self.loop).result(ENDING_S)

    def abandon(self) -> None:
        """In a forked child: close the sockets, and keep all else, whose ends would reach into the parent's loop."""
        self.stopping = True
        _CARRIED_OVER.append(self)
        for lane in self._lanes.values():
            lane.abandon()

    # -- on the loop -------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            self.loop.run_until_complete(self._main())
        finally:
            self.loop.close()
            self._called = False
            self._refuse_all()

    async def _main(self) -> None:
        await self._stop.wait()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ENDING_S):
                await self._settled()
        lanes = list(self._lanes.values())
        for task in [*self._tasks, *(lane.task for lane in lanes)]:
            task.cancel()
        await asyncio.gather(*self._tasks, *(lane.task for lane in lanes), return_exceptions=True)
        for lane in lanes:
            await lane.close()

    async def _settled(self) -> None:
        self._sort()
        while any(lane.busy for lane in self._lanes.values()) or self._tasks:  # noqa: ASYNC110 - only at the end
            await asyncio.sleep(0.005)

    def _start(self, work: Callable[[], Any]) -> None:
        task = self.loop.create_task(work())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _sort(self) -> None:
        self._called = False
        while self._inbox:
            name, command = self._inbox.popleft()
            lane = self._lanes.get(name)
            if lane is None:
                lane = self._lanes[name] = _Lane(self._address)
            lane.put(command)

    def _refuse_all(self) -> None:
        while self._inbox:
            _, command = self._inbox.popleft()
            command.answered(_away(self._address, "its connection was closed", reached=False))


class _Lane:
    """One connection, and the commands that wait for it."""

    def __init__(self, address: _Address) -> None:
        self._address = address
        self._queue: deque[_Command] = deque()
        self._wanted = asyncio.Event()
        self._connection: Connection | None = None
        self._trouble: str | None = None  # why the last try failed
        self._next_step: str = _NEXT_STEP
        self._again_at = 0.0
        self._reached = False  # whether what is being sent may have got there
        self._sending: deque[_Command] = deque()
        self.task = asyncio.get_running_loop().create_task(self._serve())

    @property
    def busy(self) -> bool:
        return bool(self._queue or self._sending)

    def put(self, command: _Command) -> None:
        if self._trouble is not None and (self.busy or asyncio.get_running_loop().time() < self._again_at):
            command.answered(_away(self._address, self._trouble, reached=False, next_step=self._next_step))
            return
        self._queue.append(command)
        self._wanted.set()

    async def _serve(self) -> None:
        try:
            while True:
                await self._wanted.wait()
                self._wanted.clear()
                while self._queue:
                    self._take()
                    await self._send()
        finally:
            for command in (*self._sending, *self._queue):
                command.answered(_away(self._address, "its connection was closed", reached=True))
            self._sending.clear()
            self._queue.clear()

    def _take(self) -> None:
        size = 0
        while self._queue and len(self._sending) < BATCH and size < BATCH_BYTES:
            size += self._queue[0].size
            self._sending.append(self._queue.popleft())

    async def _send(self) -> None:
        """Send what was taken, and tell each who waits; ends with nothing left to send."""
        used = self._connection is not None
        self._reached = False
        try:
            try:
                await self._exchange()
            except Exception as error:
                if not used or isinstance(error, TimeoutError):
                    raise
                await self.close()  # while it was idle the server may have gone and come back
                await self._exchange()
        except Exception as error:  # noqa: BLE001 - whatever a server may send instead of an answer
            await self._fail(error)
        else:
            self._trouble = None

    async def _exchange(self) -> None:
        from redis.exceptions import NoScriptError, ResponseError

        connection = self._connection or await self._connected()
        while self._sending:
            async with asyncio.timeout(COMMAND_S):
                batch = list(self._sending)
                packed = connection.pack_commands([command.words() for command in batch])
                self._reached = True
                await connection.send_packed_command(packed, check_health=False)
                for command in batch:
                    try:
                        reply = await connection.read_response()
                    except NoScriptError:
                        command.in_full = True
                        self._sending.rotate(-1)  # behind those that wait for their answers
                        continue
                    except ResponseError as error:
                        reply = self._refusal(command, error)
                    self._sending.popleft()
                    command.answered(reply)

    async def _connected(self) -> Connection:
        connection = self._address.connection()
        try:
            async with asyncio.timeout(CONNECT_S):
                await connection.connect()  # type: ignore[no-untyped-call]
        except BaseException:
            await _closed(connection)
            raise
        self._connection = connection
        return connection

    async def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await _closed(connection)

    def abandon(self) -> None:
        writer = getattr(self._connection, "_writer", None)
        sock = writer.get_extra_info("socket") if writer is not None else None
        if sock is not None and sock.fileno() >= 0:
            with contextlib.suppress(OSError):
                os.close(sock.fileno())

    async def _fail(self, error: Exception) -> None:
        await self.close()
        self._trouble, self._next_step = _reason(error, self._address)
        self._again_at = asyncio.get_running_loop().time() + PAUSE_S
        failed = [(command, self._reached) for command in self._sending]
        failed += [(command, False) for command in self._queue]
        self._sending.clear()
        self._queue.clear()
        for command, reached in failed:
            command.answered(_away(self._address, self._trouble, reached=reached, next_step=self._next_step))

    def _refusal(self, command: _Command, error: Exception) -> StoreError:
        text = tidy(str(error), self._address.password, limit=200)
        if text.startswith(_PASSING) or type(error).__name__ in {"OutOfMemoryError", "ReadOnlyError"}:
            return _away(self._address, f"it says: {text}", reached=True)
        refused = StoreError(
            f"the Redis server {self._address} refused to {command.script.name}: {text}",
            next_step="look at the server: llmkit needs Redis 6 or later, scripts allowed, and its keys left alone",
        )
        refused.__cause__ = error
        return refused


async def _closed(connection: Connection) -> None:
    with contextlib.suppress(Exception):
        await connection.disconnect(nowait=True)
        await asyncio.sleep(0)  # the socket is closed at the loop's next turn


def _away(address: _Address, why: str, *, reached: bool, next_step: str = _NEXT_STEP) -> ServerAway:
    return ServerAway(f"the Redis server {address} cannot be used: {why}", reached=reached, next_step=next_step)


def _reason(error: Exception, address: _Address) -> tuple[str, str]:
    """What went wrong, and what to do; no text that could hold the password."""
    from redis.exceptions import AuthenticationError, RedisError
    from redis.exceptions import TimeoutError as NoAnswerError

    if isinstance(error, AuthenticationError):
        return (
            "it refuses the user or the password",
            f"set {PASSWORD}, or LLMKIT_STATE_URL with user and password in it",
        )
    if isinstance(error, TimeoutError | NoAnswerError):
        return f"no answer within {COMMAND_S:.0f} s", _NEXT_STEP
    cause = error if isinstance(error, OSError) else error.__cause__ or error.__context__
    if isinstance(cause, OSError) and cause.errno is not None and cause.errno > 0:
        return os.strerror(cause.errno), _NEXT_STEP
    if isinstance(error, RedisError | OSError):
        return tidy(str(error) or type(error).__name__, address.password, limit=200), _NEXT_STEP
    return "it answers with something else than Redis does", _NEXT_STEP


_SERVERS: weakref.WeakSet[Server] = weakref.WeakSet()
_CARRIED_OVER: list[_Engine] = []


def _in_child() -> None:
    for server in list(_SERVERS):
        server._start_afresh()


@atexit.register
def _settle_all() -> None:
    # Nothing is stopped: a client may be closed after this, and no thread can be started any more.
    for engine in [server._engine for server in list(_SERVERS)]:
        if engine is not None and not engine.stopping:
            engine.settle()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
