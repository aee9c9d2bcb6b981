"""The engine below httpx's interface.

`AiohttpTransport` is an `httpx.AsyncBaseTransport`, so it can stand wherever one is expected, and any other can stand
in its place. Its engine is aiohttp, since the pool of httpx does work that grows with the square of the calls that
wait. Beside httpx's one method it has a shorter way, `exchange`, for the one caller that makes thousands of calls to
the same few URLs: it saves building a request and a response object for each.

Time limits: only the connect limit is kept here (``request.extensions["timeout"]["connect"]``). How long to wait for
data is the business of llmkit's timeout layer, which knows a first token from a chunk.
"""

from __future__ import annotations

import asyncio
import math
import os
import ssl
from contextlib import suppress
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias
from weakref import WeakSet

import aiohttp
import httpx
from aiohttp.client_proto import ResponseHandler
from aiohttp.http_exceptions import HttpProcessingError
from multidict import CIMultiDict
from yarl import URL

from llmkit.endpoint import is_loopback

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping

    from aiohttp.connector import Connection

__all__ = ["AiohttpTransport", "Exchange", "Prepared"]

_KEEPALIVE_S = 15.0
_LINGER_S = 0.05  # how long to wait for the end of a body that has said all, so that its connection can be used again
_FOREIGN = (aiohttp.ClientError, OSError, ValueError, TypeError, RuntimeError, HttpProcessingError)


_Sessions: TypeAlias = "dict[asyncio.AbstractEventLoop, tuple[aiohttp.ClientSession, AsyncGenerator[None, None]]]"
_ON_SEND: ContextVar[Callable[[], Awaitable[None]] | None] = ContextVar("on_send", default=None)


class Exchange(Protocol):
    """A response whose body is still to be read. Only httpx's exceptions come out of it."""

    status: int
    headers: Mapping[str, str]

    async def read(self) -> bytes:
        """What arrives next, as it arrives; empty at the end."""

    async def finish(self) -> None:
        """Nothing more of the body matters: let the connection be used again if the end is near, else close it."""

    async def aclose(self) -> None:
        """Close the connection at once, unless the body has been read to its end. Harmless when closed."""


class AiohttpExchange:
    """An `Exchange` over aiohttp."""

    __slots__ = ("_content", "_response", "headers", "status")

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self._content = response.content
        self.status = response.status
        self.headers: Mapping[str, str] = response.headers

    async def read(self) -> bytes:
        try:
            return await self._content.readany()
        except (aiohttp.ClientError, OSError, ValueError) as error:
            failure = _broken(error)
        raise failure

    async def finish(self) -> None:
        if not self._content.at_eof():
            try:
                async with asyncio.timeout(_LINGER_S):
                    await self._content.readany()
            except (aiohttp.ClientError, OSError, ValueError):  # OSError: also the time-out
                pass
        self._response.close()

    async def aclose(self) -> None:
        self._response.close()


class Prepared:
    """What all requests to one URL have in common. Its repr shows no header, so tracebacks do not either."""

    __slots__ = ("context", "headers", "proxy", "url")

    def __init__(self, url: URL, headers: CIMultiDict[str], proxy: URL | None, context: ssl.SSLContext | bool) -> None:
        self.url = url
        self.headers = headers
        self.proxy = proxy
        self.context = context

    def headers_for(self, idempotency_key: str) -> CIMultiDict[str]:
        """The headers of one request."""
        headers = self.headers.copy()
        headers["Idempotency-Key"] = idempotency_key
        return headers


class _Body(httpx.AsyncByteStream):
    """The body of an `httpx.Response`."""

    def __init__(self, exchange: AiohttpExchange) -> None:
        self._exchange = exchange

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while data := await self._exchange.read():
            yield data

    async def aclose(self) -> None:
        await self._exchange.aclose()


class _Handler(ResponseHandler):
    """aiohttp's protocol, mended: on a malformed chunk it forgets to tell the reader of the body, who waits for ever."""

    def set_exception(self, exc: BaseException, *cause: BaseException) -> None:
        payload = self._payload
        super().set_exception(exc, *cause)
        if payload is not None and not payload.is_eof() and payload.exception() is None:
            payload.set_exception(aiohttp.ClientPayloadError("the body is malformed"))


class _Connector(aiohttp.TCPConnector):
    """Says when a connection stands and the request is about to go out; what dies before that has sent nothing."""

    async def connect(self, *args: Any, **kwargs: Any) -> Connection:
        connection = await super().connect(*args, **kwargs)
        on_send = _ON_SEND.get()
        if on_send is not None:
            try:
                await on_send()
            except BaseException:
                connection.release()
                raise
        return connection


class AiohttpTransport(httpx.AsyncBaseTransport):
    """httpx's transport interface over aiohttp: one session for each event loop, connections kept alive in it.

    Proxies are taken from the environment (``HTTP_PROXY``, ``HTTPS_PROXY``, ``ALL_PROXY``, ``NO_PROXY``), read once
    for each endpoint, and never used for loopback addresses. Cookies and redirects are not followed.

    Args:
        verify: an SSL context to use instead of the system's certificates together with certifi's.
    """

    def __init__(self, verify: ssl.SSLContext | None = None) -> None:
        self._ssl = verify
        self._sessions: _Sessions = {}
        _TRANSPORTS.add(self)
        self._timeouts: dict[float | None, aiohttp.ClientTimeout] = {}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """httpx's one method. Raises `httpx.TransportError` and its kind, nothing else."""
        timeout = request.extensions.get("timeout") or {}
        lines = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in request.headers.raw]
        prepared = self.prepare(str(request.url), lines)
        prepared.headers.popall("Transfer-Encoding", None)  # aiohttp says it itself
        exchange = await self.exchange(
            prepared,
            prepared.headers,
            await request.aread(),
            connect=timeout.get("connect"),
            method=request.method,
            decode=False,  # httpx.Response does it
        )
        response = exchange._response
        return httpx.Response(
            response.status,
            headers=response.raw_headers,
            stream=_Body(exchange),
            extensions={
                "http_version": b"HTTP/1.1",
                "reason_phrase": (response.reason or "").encode("latin-1", "replace"),
            },
        )

    def prepare(self, url: str, headers: list[tuple[str, str]]) -> Prepared:
        """What all requests to one URL have in common.

        Raises:
            httpx.UnsupportedProtocol: not an http or https URL, or a proxy that is neither.
        """
        try:
            target = URL(url, encoded=True)
            port = target.port
        except ValueError:
            port = None
        if port is None or target.scheme not in {"http", "https"} or not target.raw_host:
            raise httpx.UnsupportedProtocol("not an http or https URL")
        context = self._context() if target.scheme == "https" else True
        return Prepared(target, CIMultiDict(headers), _proxy_from_environment(target), context)

    async def exchange(
        self,
        prepared: Prepared,
        headers: CIMultiDict[str],
        body: bytes,
        *,
        connect: float | None = None,
        method: str = "POST",
        decode: bool = True,
        on_send: Callable[[], Awaitable[None]] | None = None,
    ) -> AiohttpExchange:
        """Send one request and wait for the head of its response.

        A request that is not idempotent, as POST is, is never sent twice, not even when a connection that was kept alive
        turns out to be closed.

        Args:
            headers: instead of those of ``prepared``.
            connect: seconds until the connection stands, name look-up and TLS included; None means no limit.
            decode: whether to unpack a body that the server has compressed unasked.
            on_send: awaited when the connection stands, TLS and proxy included, before the first byte of the request is
                written. If it raises an `llmkit.LLMKitError`, nothing is written and that error comes out.

        Raises:
            httpx.ConnectTimeout, httpx.ConnectError, httpx.ProxyError, httpx.LocalProtocolError: nothing was sent.
            httpx.ReadError, httpx.RemoteProtocolError: it was sent, or part of it.
        """
        loop = asyncio.get_running_loop()
        held = self._sessions.get(loop)
        session = held[0] if held is not None else await self._session(loop)
        noted = None if on_send is None else _ON_SEND.set(on_send)
        try:
            response = await session._request(  # what session.post wraps in a context manager
                method,
                prepared.url,
                data=body or None,
                headers=headers,
                allow_redirects=False,
                timeout=self._timeouts.get(connect) or self._timeout(connect),
                proxy=prepared.proxy,
                ssl=prepared.context,
                auto_decompress=decode,
            )
            return AiohttpExchange(response)
        except _FOREIGN as error:
            failure = _not_sent(error) or _broken(error)
        except BaseException as error:  # noqa: BLE001  it is raised again
            del headers  # a cancellation shows its frames to whoever asks; the key is in this one and in aiohttp's
            raise error.with_traceback(None)  # noqa: B904  it is the same one
        finally:
            if noted is not None:
                _ON_SEND.reset(noted)
        # Raised out here, so that it does not hold aiohttp's exception, which holds the headers and the key in them.
        raise failure

    async def aclose(self) -> None:
        """Close all connections; those of other loops, too, where these still run."""
        here = asyncio.get_running_loop()
        sessions, self._sessions = self._sessions, {}
        for loop, (session, keeper) in list(sessions.items()):
            if loop is here:
                await keeper.aclose()
                await session.close()
            elif loop.is_running():
                asyncio.run_coroutine_threadsafe(session.close(), loop)
            else:
                _forget(session)

    def _start_afresh(self) -> None:
        """In a forked child: the connections are the parent's."""
        sessions, self._sessions = self._sessions, {}
        for each in sessions.values():
            _CARRIED_OVER.append(each)
            _disown(each[0])

    def __del__(self) -> None:
        # A client that nobody closed is an ordinary thing in a notebook, and no reason to complain there.
        for loop, (session, _) in getattr(self, "_sessions", {}).items():
            if loop.is_running():
                asyncio.run_coroutine_threadsafe(session.close(), loop)
            else:
                _forget(session)

    async def _session(self, loop: asyncio.AbstractEventLoop) -> aiohttp.ClientSession:
        for old in [other for other in self._sessions if other.is_closed()]:
            _forget(self._sessions.pop(old)[0])
        connector = _Connector(limit=0, keepalive_timeout=_KEEPALIVE_S, ttl_dns_cache=60)
        connector._factory = partial(_Handler, loop=loop)  # type: ignore[assignment]  # partial is invariant
        session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None),
            trust_env=False,  # it costs two thread hops a request; see _proxy
        )
        keeper = _closing(self._sessions, loop, session)
        self._sessions[loop] = (session, keeper)
        await keeper.__anext__()
        return session

    def _timeout(self, connect: float | None) -> aiohttp.ClientTimeout:
        timeout = aiohttp.ClientTimeout(total=None, connect=connect, ceil_threshold=math.inf)
        if len(self._timeouts) < 100:
            self._timeouts[connect] = timeout
        return timeout

    def _context(self) -> ssl.SSLContext:
        if self._ssl is None:
            import certifi

            self._ssl = ssl.create_default_context()
            self._ssl.load_verify_locations(certifi.where())
        return self._ssl


async def _closing(
    sessions: _Sessions, loop: asyncio.AbstractEventLoop, session: aiohttp.ClientSession
) -> AsyncGenerator[None, None]:
    # asyncio.run() ends the generators of its loop before it closes it: the last chance to close connections well.
    try:
        yield
    finally:
        sessions.pop(loop, None)
        await session.close()


def _proxy_from_environment(url: URL) -> URL | None:
    from urllib.request import getproxies, proxy_bypass

    if is_loopback(str(url)):
        return None
    proxies = getproxies()
    found = proxies.get(url.scheme) or proxies.get("all")
    if not found or proxy_bypass(f"{url.host}:{url.port}"):
        return None
    proxy = URL(found if "://" in found else f"http://{found}")
    if proxy.scheme not in {"http", "https"}:
        raise httpx.UnsupportedProtocol(
            f"a {proxy.scheme} proxy is set in the environment; only http and https proxies work"
        )
    return proxy


def _forget(session: aiohttp.ClientSession) -> None:
    """Let go of the session of a loop that does not run any more: its sockets went with the loop."""
    connector = session.connector
    session.detach()
    if connector is not None:
        # On a closed loop there is nothing to wait for: the first step of the closing is the whole of it.
        with suppress(StopIteration):
            next(connector.close().__await__())


def _not_sent(error: Exception) -> httpx.TransportError | None:
    """httpx's word for a failure before anything was sent; None if it was sent."""
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return httpx.ConnectTimeout("no connection in time")
    if isinstance(error, aiohttp.ClientHttpProxyError | aiohttp.ClientProxyConnectionError):
        return httpx.ProxyError(f"the proxy failed: {_reason(error)}")
    if isinstance(error, aiohttp.ClientConnectorError):
        return httpx.ConnectError(_reason(error))
    if isinstance(error, aiohttp.InvalidURL):
        return httpx.UnsupportedProtocol("not an http or https URL")
    if isinstance(error, ValueError | TypeError):
        return httpx.LocalProtocolError(f"cannot be sent: {type(error).__name__}")
    return None


def _broken(error: Exception) -> httpx.TransportError:
    """httpx's word for a failure after the connection stood."""
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return httpx.RemoteProtocolError("the server closed the connection without an answer")
    if isinstance(error, aiohttp.ClientPayloadError | aiohttp.ClientResponseError | HttpProcessingError | ValueError):
        return httpx.RemoteProtocolError("the connection was cut in the middle, or what came is not HTTP")
    return httpx.ReadError(f"the connection was lost: {_reason(error)}")


def _reason(error: Exception) -> str:
    """Why, in the words of the operating system: no URL, header or body is in them."""
    for found in (getattr(error, "os_error", None), getattr(error, "certificate_error", None), error):
        if isinstance(found, ssl.SSLError | ssl.CertificateError):
            return f"TLS: {getattr(found, 'verify_message', '') or found.reason or type(found).__name__}"
        if isinstance(found, OSError) and found.strerror:
            return os.strerror(found.errno) if found.errno and found.errno > 0 else found.strerror
    return type(error).__name__


_TRANSPORTS: WeakSet[AiohttpTransport] = WeakSet()
_CARRIED_OVER: list[Any] = []
"""Kept for good: their ends would reach into the parent's event loop, whose selector a forked child shares."""


def _disown(session: aiohttp.ClientSession) -> None:
    """Put nothing in the place of each socket, so that the parent's closing is seen by the server at once.

    Closed in the ordinary way they would be taken out of the parent's selector, and the parent would wait for ever.
    """
    connector = session.connector
    if connector is None:
        return
    idle = [handler for waiting in connector._conns.values() for handler, _ in waiting]
    nothing = os.open(os.devnull, os.O_RDWR | getattr(os, "O_CLOEXEC", 0))
    try:
        for handler in [*idle, *connector._acquired]:
            sock = None if handler.transport is None else handler.transport.get_extra_info("socket")
            if sock is not None and sock.fileno() >= 0:
                os.dup2(nothing, sock.fileno(), inheritable=False)
    finally:
        os.close(nothing)


def _in_child() -> None:
    for transport in list(_TRANSPORTS):
        with suppress(OSError):
            transport._start_afresh()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
