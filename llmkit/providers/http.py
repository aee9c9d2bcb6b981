"""The end of the chain: a call becomes a request, and the response a `Reply` at its first token.

Whatever the wire format, the transport or the mood of the server: what leaves this file is a `Reply`, one of
llmkit's own errors, or a cancellation. Every size is bounded, and the key is taken out of everything that comes back
before it is parsed.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import httpx

from llmkit.endpoint import is_loopback
from llmkit.errors import (
    AuthenticationError,
    BadResponse,
    CallRejected,
    ConfigError,
    ConnectTimeout,
    InvalidRequest,
    LLMKitError,
    ProviderError,
    ProviderUnreachable,
    StreamBroken,
)
from llmkit.providers.anthropic import AnthropicWire
from llmkit.providers.failures import complaint_in, complaint_of, error_from
from llmkit.providers.headers import provider_request_id
from llmkit.providers.openai import OpenAIWire
from llmkit.providers.shapes import Shapes
from llmkit.providers.sse import EventReader, EventTooLarge
from llmkit.providers.wire import ErrorInside, Malformed, Signal, encoded, parsed
from llmkit.redaction import REDACTED, Screen, redact, secret_in, tidy
from llmkit.reply import Chunk, Head, Reply

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llmkit.call import Call
    from llmkit.clock import Clock
    from llmkit.endpoint import Endpoint
    from llmkit.providers.failures import Complaint
    from llmkit.providers.wire import Decoder, Wire
    from llmkit.transport import AiohttpTransport, Exchange, Prepared

__all__ = ["MAX_ERROR_BYTES", "MAX_REPLY_BYTES", "WIRES", "Provider"]

MAX_REPLY_BYTES = 32 * 1024 * 1024
"""Most bytes of one response body, streamed or whole. More is a `BadResponse` or a `StreamBroken`, and is not read."""

MAX_ERROR_BYTES = 64 * 1024
"""How much of the body of an error is read."""

WIRES: dict[str, Wire] = {"openai": OpenAIWire(), "anthropic": AnthropicWire()}

_REDACTED = REDACTED.encode()
_MOST_TARGETS = 256
_LAST_PORT = 65535
_FILTERED = frozenset({"content_filter", "refusal"})
_HEADERS = (
    ("Content-Type", "application/json"),
    ("Accept", "application/json, text/event-stream"),
    ("Accept-Encoding", "identity"),  # a stream that is packed arrives in lumps
    ("User-Agent", "llmkit"),
)
_NOT_SENT = (
    httpx.ConnectError,
    httpx.PoolTimeout,
    httpx.ProxyError,
    httpx.UnsupportedProtocol,
    httpx.LocalProtocolError,
)
_FOREIGN = (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL, OSError)
_BROKEN = (Malformed, ErrorInside, EventTooLarge, *_FOREIGN)


class _Target:
    """What all calls to one endpoint have in common, made once. Its repr shows no key, so tracebacks do not either."""

    __slots__ = ("endpoint", "headers", "key", "prepared", "secret", "url", "where", "wire")

    def __init__(self, endpoint: Endpoint, key: str | None, url: str) -> None:
        self.endpoint = endpoint
        self.key = key
        self.secret = secret_in(key and key.strip())
        self.url = url
        self.wire = WIRES[endpoint.wire]
        self.where = "simulated" if endpoint.simulated else "provider"
        self.headers = [*_HEADERS, *self.wire.headers(key and key.strip()), *endpoint.headers]
        self.prepared: Prepared | None = None  # by llmkit's own engine

    def __repr__(self) -> str:
        return f"<_Target {self.endpoint.name}>"


class Provider:
    """Sends a call to its endpoint. The terminal of the chain; one instance serves any number of event loops.

    Args:
        transport: where requests go; llmkit's own `AiohttpTransport` by default, made at the first call.
        offline: refuse every endpoint that is neither simulated nor on this machine, before anything is sent.
        environ: where keys are read, at each call.
        simulator: what answers for simulated endpoints; an `llmkit.testing.Simulator` by default.
    """

    def __init__(
        self,
        clock: Clock,
        transport: httpx.AsyncBaseTransport | None = None,
        *,
        offline: bool = False,
        environ: Mapping[str, str] = os.environ,
        simulator: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._clock = clock
        self._transport = transport
        self._offline = offline
        self._environ = environ
        self._simulator = simulator
        self._engine: AiohttpTransport | None = None
        self._targets: dict[int, _Target] = {}
        self._shapes = Shapes()

    async def __call__(self, call: Call) -> Reply:
        """A reply at its first token: its first text, reasoning or piece of a tool call.

        Raises:
            CallRejected, AuthenticationError, InvalidRequest, ConfigError: before anything was sent.
            ProviderError, ContextTooLong: what the provider, or the way to it, said before the first token. An
                `EmptyReply` or a `Refused` carries the usage that is billed all the same.
        """
        target = self._target(call.endpoint)
        exchange = await self._sent(call, target)
        head = Head()
        source = _Source(exchange, target, head, self._clock)
        try:
            first = await source.open()
        except BaseException as error:
            await source.aclose()
            self._shapes.hear(call, call.endpoint, error)
            raise
        reply = Reply(
            call,
            source,
            head=head,
            clock=self._clock,
            first=first,
            provider=call.endpoint.provider,
            where=target.where,
            close=source.aclose,
        )
        if source.ended and _is_fruitless(head, first):
            await _judged(reply)
        return reply

    async def aclose(self) -> None:
        """Close the transport and all its connections."""
        for transport in (self._transport, self._simulator, self._engine):
            if transport is not None:
                await transport.aclose()
        self._engine = None

    # -- before sending ----------------------------------------------------------------------------------------------

    # No variable of the methods that raise holds a key: a traceback may show them all.

    def _target(self, endpoint: Endpoint) -> _Target:
        target = self._targets.get(id(endpoint))
        if target is None or target.endpoint is not endpoint or target.key != self._key(endpoint):
            target = self._aimed(endpoint)
            if len(self._targets) >= _MOST_TARGETS:
                self._targets.clear()
            self._targets[id(endpoint)] = target
        return target

    def check(self, endpoint: Endpoint) -> None:
        """That a request could be sent there, as far as is known without sending one.

        Raises:
            AuthenticationError, CallRejected, ConfigError: it could not: no key, offline, no such address.
        """
        self._target(endpoint)

    def _key(self, endpoint: Endpoint) -> str | None:
        return self._environ.get(endpoint.api_key_env) if endpoint.api_key_env else None

    def _aimed(self, endpoint: Endpoint) -> _Target:
        if endpoint.wire not in WIRES:
            raise ConfigError(
                f"{endpoint.name}: there is no wire format {endpoint.wire!r}; there are {', '.join(WIRES)}"
            )
        url = _url(endpoint)
        if self._offline and not endpoint.simulated and not is_loopback(endpoint.base_url):
            raise CallRejected(
                f"{endpoint.name} is not on this machine, and llmkit is offline",
                next_step="use a local model or the simulator, or unset LLMKIT_OFFLINE",
            )
        failure = _key_failure(self._key(endpoint), endpoint)
        if failure is not None:
            raise failure
        return _Target(endpoint, self._key(endpoint), url)

    async def _sent(self, call: Call, target: _Target) -> Exchange:
        """Send the request, and wait for the head of the response."""
        endpoint = target.endpoint
        try:
            body = encoded(target.wire.body(call, self._shapes.seen(call, endpoint)))
        except (ValueError, TypeError, RecursionError) as error:
            why = tidy(str(error), target.key)
        else:
            try:
                return await self._carried(call, target, body)
            except _FOREIGN as error:
                failure = _unsent(error, target, call.timeouts.connect)
            raise failure  # out here, so that it does not hold the foreign exception, which may hold the request
        raise InvalidRequest(
            f"{endpoint.name}: the request cannot be sent: {why}", provider=endpoint.provider, model=endpoint.model
        )

    async def _carried(self, call: Call, target: _Target, body: bytes) -> Exchange:
        connect = call.timeouts.connect
        transport = self._carrier(target.endpoint)
        if transport is not None:
            return await _through(transport, target, call, body)
        engine = self._engine or self._own()
        prepared = target.prepared
        if prepared is None:
            prepared = target.prepared = engine.prepare(target.url, target.headers)
        return await engine.exchange(
            prepared,
            prepared.headers_for(_idempotency_key(call, target.url, body)),
            body,
            connect=connect,
            on_send=call.sends,
        )

    def _carrier(self, endpoint: Endpoint) -> httpx.AsyncBaseTransport | None:
        """The transport for this endpoint; None means llmkit's own engine."""
        if not endpoint.simulated:
            return self._transport
        if self._simulator is None:
            from llmkit.testing import Simulator

            self._simulator = Simulator(clock=self._clock)
        return self._simulator

    def _own(self) -> AiohttpTransport:
        if self._engine is None:
            from llmkit.transport import AiohttpTransport

            self._engine = AiohttpTransport()
        return self._engine


class _Source:
    """The chunks of one response, in the groups in which they arrive; it fills ``head`` as it goes."""

    __slots__ = (
        "_clock",
        "_decoder",
        "_exchange",
        "_failure",
        "_finished",
        "_head",
        "_reader",
        "_screens",
        "_size",
        "_target",
        "ended",
    )

    def __init__(self, exchange: Exchange, target: _Target, head: Head, clock: Clock) -> None:
        self._exchange = exchange
        self._target = target
        self._head = head
        self._clock = clock
        self._decoder: Decoder = target.wire.decoder(head)
        self._reader = EventReader()
        # Keys in escapes or in pieces are found only in what was decoded: one screen for the text, one for the reasoning.
        self._screens = (Screen(target.secret.decode()), Screen(target.secret.decode())) if target.secret else None
        self._size = 0
        self._failure: LLMKitError | None = None  # found behind chunks that are handed on first
        self._finished = False  # the exchange has nothing left to say or to close
        self.ended = False  # nothing more will be handed on

    def __aiter__(self) -> _Source:
        return self

    async def open(self) -> list[Chunk]:
        """Read up to the first token. An empty list means the reply has begun with a tool call, or has ended without a token.

        Raises:
            LLMKitError: what went wrong instead.
        """
        self._head.provider_request_id = self._request_id()
        try:
            if not 200 <= self._exchange.status < 300:
                failure = await self._complaint()
            else:
                first = await self._first()
                if first or self._failure is None:
                    self._seal()
                    return first
                failure = self._failure
        except _BROKEN as error:
            failure = self._unopened(error)
        raise failure  # out here, so that it does not hold the foreign exception, which may hold the request

    async def __anext__(self) -> list[Chunk]:
        try:
            while not self.ended and self._failure is None:
                data = await self._exchange.read()
                batch = self._events(data) if data else self._last(started=True)
                if batch is not None:
                    return batch
        except _BROKEN as error:
            self._interrupted(error)
        if self._failure is not None:
            raise self._failure
        if self._screens is not None and (rest := self._screened(Chunk("", ""), last=True)):
            return [rest]
        await self._finish()
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Close the connection, unless everything has been read."""
        self._decoder.finish()
        self._seal()
        if not self._finished:
            self._finished = True
            await self._exchange.aclose()

    def _request_id(self) -> str | None:
        found = provider_request_id(self._exchange.headers)
        return None if found is None else tidy(found, self._target.key)

    # -- reading -----------------------------------------------------------------------------------------------------

    async def _first(self) -> list[Chunk]:
        data = await self._begun()
        if _is_document(data):
            return await self._whole(data)
        batch = self._events(data)
        while not batch and not self.ended and self._failure is None and not self._head.tool_calls:
            data = await self._exchange.read()
            batch = self._events(data) if data else self._last(started=False)
        return batch or []

    async def _begun(self) -> bytes:
        """What arrives first, up to the first bytes that are not blank.

        Raises:
            Malformed: there are none.
        """
        held = b""
        while not held.strip(_BLANK):
            data = await self._exchange.read()
            if not data or len(held) > MAX_ERROR_BYTES:
                raise Malformed("the response is empty")
            held += data
        return held

    async def _whole(self, data: bytes) -> list[Chunk]:
        """One JSON document, read to its end."""
        pieces = [data]
        self._measure(data)
        while data := await self._exchange.read():
            self._measure(data)
            pieces.append(data)
        self._finished = self.ended = True
        body = self._clean(b"".join(pieces).strip(_BLANK))
        try:
            chunk = self._decoder.whole(parsed(body))
        except Malformed as error:
            raise Malformed(f"{error}; it begins with {_glimpse(body)}") from None
        self._decoder.finish()
        if chunk is not None and self._screens is not None:
            chunk = self._screened(chunk, last=True)
        return [] if chunk is None else [chunk]

    def _measure(self, data: bytes) -> None:
        self._size += len(data)
        if self._size > MAX_REPLY_BYTES:
            raise Malformed(f"the response has more than {MAX_REPLY_BYTES >> 20} MiB")

    def _events(self, data: bytes) -> list[Chunk] | None:
        """What ``data`` adds: chunks; an empty list where it adds what is not shown; None where it adds nothing."""
        self._measure(data)
        return self._decoded(self._reader.feed(data))

    def _decoded(self, payloads: list[bytes]) -> list[Chunk] | None:
        chunks: list[Chunk] = []
        progress = False
        secret = self._target.secret
        screens = self._screens
        decode = self._decoder.event
        try:
            for payload in payloads:
                step = decode(self._clean(payload) if secret and secret in payload else payload)
                if type(step) is Chunk:
                    if screens is None or (step := self._screened(step)) is not None:
                        chunks.append(step)
                    else:
                        progress = True
                elif step is Signal.DONE:
                    self.ended = True
                    break
                elif step is not None:
                    progress = True
        except (Malformed, ErrorInside) as error:
            if not chunks:
                raise
            self._interrupted(error)  # behind chunks, which are handed on first
        return chunks or ([] if progress else None)

    def _last(self, *, started: bool) -> list[Chunk] | None:
        """The body is at its end. Whether the reply is, too, only the wire format can say: by its last event, or a finish reason."""
        self._finished = True
        batch = self._decoded(self._reader.end())
        if self._failure is None and not self.ended:
            if self._head.finish_reason is not None:
                self.ended = True
            elif started or batch:
                self._failure = self._stream_broken("the stream ended before the answer did")
            else:
                self._failure = self._unreachable("the stream ended before the answer began")
        return batch

    async def _complaint(self) -> LLMKitError:
        """The error that a status other than 2xx stands for."""
        body = b""
        try:
            while len(body) < MAX_ERROR_BYTES and (data := await self._exchange.read()):
                body += data[:MAX_ERROR_BYTES]
        except _FOREIGN:
            pass  # the status has said enough
        return self._refused(complaint_in(self._clean(body)), self._exchange.status)

    def _clean(self, data: bytes) -> bytes:
        secret = self._target.secret
        return data.replace(secret, _REDACTED) if secret else data

    def _screened(self, chunk: Chunk, *, last: bool = False) -> Chunk | None:
        """The chunk without the key; None where nothing of it can be shown yet."""
        assert self._screens is not None
        parts = []
        for screen, part in zip(self._screens, (chunk.text, chunk.reasoning), strict=True):
            shown = screen.feed(part) if part else ""
            parts.append(shown + screen.end() if last else shown)
        text, reasoning = parts
        if text == chunk.text and reasoning == chunk.reasoning and (text or reasoning):
            return chunk
        return Chunk(text, reasoning) if text or reasoning else None

    def _seal(self) -> None:
        """Take the key out of what is known beside the text."""
        secret = self._target.secret.decode()
        if not secret:
            return
        head = self._head
        for name in ("model", "provider_request_id", "finish_reason", "refusal", "service_tier"):
            value = getattr(head, name)
            if value and secret in value:
                setattr(head, name, value.replace(secret, REDACTED))
        for call in head.tool_calls:
            call["id"] = call["id"].replace(secret, REDACTED)
            call["function"] = {name: text.replace(secret, REDACTED) for name, text in call["function"].items()}

    async def _finish(self) -> None:
        self._decoder.finish()
        self._seal()
        if not self._finished:
            self._finished = True
            await self._exchange.finish()

    # -- what went wrong ---------------------------------------------------------------------------------------------

    def _interrupted(self, error: Exception) -> None:
        """``error`` came after the first token."""
        if isinstance(error, _FOREIGN):
            if self._head.finish_reason is not None:
                self.ended = True  # all was said before the connection was cut
            else:
                self._failure = self._stream_broken(f"the connection was lost in the middle of the answer: {error}")
        elif isinstance(error, ErrorInside):
            self._failure = self._stream_broken(complaint_of(error.document).message or "an error without a message")
        else:
            self._failure = self._stream_broken(str(error))

    def _unopened(self, error: Exception) -> LLMKitError:
        """``error`` came before the first token."""
        if isinstance(error, ErrorInside):
            return self._refused(complaint_of(error.document), None)
        if isinstance(error, _FOREIGN):
            return self._unreachable(f"the connection was lost before the answer began: {error}")
        return BadResponse(self._says(str(error)), status=self._exchange.status, maybe_billed=True, **self._fields())

    def _refused(self, complaint: Complaint, status: int | None) -> LLMKitError:
        target = self._target
        return error_from(
            complaint,
            status=status,
            headers=self._exchange.headers,
            endpoint=target.endpoint,
            now=self._clock.time(),
            secret=target.key,
        )

    def _unreachable(self, what: str) -> ProviderUnreachable:
        return ProviderUnreachable(self._says(what), maybe_billed=True, **self._fields())

    def _stream_broken(self, what: str) -> StreamBroken:
        return StreamBroken(self._says(what), maybe_billed=True, **self._fields())

    def _says(self, what: str) -> str:
        return f"{self._target.endpoint.name}: {tidy(what, self._target.key)}"

    def _fields(self) -> dict[str, Any]:
        endpoint = self._target.endpoint
        request_id = self._head.provider_request_id
        return {"provider": endpoint.provider, "model": endpoint.model, "provider_request_id": request_id}


_BLANK = b" \t\r\n\xef\xbb\xbf"


def _is_document(data: bytes) -> bool:
    """Whether a body that begins with ``data`` is one JSON document, and not a stream of events.

    The body itself tells; its Content-Type may lie.

    Raises:
        Malformed: it is an HTML page.
    """
    first = data.strip(_BLANK)[:1]
    if first == b"<":
        raise Malformed(f"{complaint_in(data).message} instead of an answer")
    return first not in {b"d", b"e", b"i", b"r", b":"}  # the fields of an event, and comments


def _glimpse(body: bytes) -> str:
    return repr(tidy(body[:400].decode("utf-8", "replace"), limit=80))


class _HttpxExchange:
    """An `Exchange` over any httpx transport."""

    __slots__ = ("_pieces", "_response", "headers", "status")

    def __init__(self, response: httpx.Response) -> None:
        self._response = response
        self._pieces = response.aiter_bytes()
        self.status = response.status_code
        self.headers: Mapping[str, str] = response.headers

    async def read(self) -> bytes:
        async for piece in self._pieces:
            if piece:
                return piece
        return b""

    async def finish(self) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        with suppress(*_FOREIGN):
            await self._response.aclose()


async def _through(transport: httpx.AsyncBaseTransport, target: _Target, call: Call, body: bytes) -> _HttpxExchange:
    """Send through a transport that is not llmkit's own. When its connection stands is not known: it counts as sent."""
    connect = call.timeouts.connect
    request = httpx.Request(
        "POST",
        target.url,
        headers=[*target.headers, ("Idempotency-Key", _idempotency_key(call, target.url, body))],
        content=body,
        extensions={"timeout": {"connect": connect, "read": None, "write": None, "pool": connect}},
    )
    await call.sends()
    return _HttpxExchange(await transport.handle_async_request(request))


def _idempotency_key(call: Call, url: str, body: bytes) -> str:
    """What tells a service that a request is a repeat, so that it answers again without billing again.

    Where a stored answer would do, the same request of the same user has the same key, so an answer that was lost on its
    way can be had once more. Where a new one is wanted, only attempts of one call share it: their ``request_id``.
    No two different requests share a key.
    """
    if call.request_key is not None and call.cache == "use":
        asked = hashlib.sha256(repr((call.user, call.request_key, url)).encode())
        asked.update(body)
        return asked.hexdigest()[:32]
    trail, asking = call.trail, hash((url, body))
    if trail.asked is None:
        trail.asked = asking
    if asking == trail.asked:
        return call.request_id
    return f"{call.request_id}.{hashlib.sha256(url.encode() + body).hexdigest()[:16]}"


def _is_fruitless(head: Head, chunks: list[Chunk]) -> bool:
    if head.refusal or head.finish_reason in _FILTERED:
        return True
    return not head.tool_calls and not any(chunk.text for chunk in chunks)


async def _judged(reply: Reply) -> None:
    """Raise the error that a reply without an answer is, with the tokens that are billed for it."""
    try:
        await reply.read()
    except ProviderError as error:
        error.usage = reply.head.usage
        raise


def _unsent(error: Exception, target: _Target, connect: float | None) -> LLMKitError:
    """What a failure before the response is."""
    endpoint = target.endpoint
    fields: dict[str, Any] = {"provider": endpoint.provider, "model": endpoint.model}
    if isinstance(error, httpx.ConnectTimeout):
        limit = connect or 0.0
        return ConnectTimeout(f"{endpoint.name}: no connection within {limit:g} s", limit=limit, **fields)
    reason = tidy(str(error), target.key) or type(error).__name__
    if isinstance(error, httpx.LocalProtocolError):
        return InvalidRequest(f"{endpoint.name}: the request cannot be sent: {reason}", **fields)
    if isinstance(error, httpx.UnsupportedProtocol | httpx.InvalidURL):
        return ProviderUnreachable(f"{endpoint.name}: {reason}", retryable=False, **fields)
    if isinstance(error, _NOT_SENT):
        return ProviderUnreachable(
            f"{endpoint.name} cannot be reached at {redact(endpoint.base_url)}: {reason}", **fields
        )
    message = f"{endpoint.name}: the connection was lost before the answer began: {reason}"
    return ProviderUnreachable(message, maybe_billed=True, **fields)


def _url(endpoint: Endpoint) -> str:
    """Where requests go.

    Raises:
        ConfigError: ``base_url`` is not an http or https URL, or holds a password.
    """
    try:
        url = httpx.URL(endpoint.base_url)
    except (httpx.InvalidURL, TypeError):
        url = httpx.URL()
    if url.scheme not in {"http", "https"} or not url.host or (url.port or 1) > _LAST_PORT:
        raise ConfigError(f"{endpoint.name}: base_url {redact(endpoint.base_url)!r} is not an http or https URL")
    if url.userinfo:
        raise ConfigError(f"{endpoint.name}: base_url must hold no password; name a variable in api_key_env instead")
    return endpoint.base_url.rstrip("/") + WIRES[endpoint.wire].path


def _key_failure(key: str | None, endpoint: Endpoint) -> AuthenticationError | None:
    """What is wrong with the key, if anything."""
    key = key.strip() if key else ""
    if not key and endpoint.key_required and not endpoint.simulated:
        what = f"no key: the environment variable {endpoint.api_key_env} is not set"
    elif key and (not key.isascii() or not key.isprintable() or " " in key):
        what = f"what {endpoint.api_key_env} holds cannot be a key: it has blanks or special characters in it"
    else:
        return None
    return AuthenticationError(
        f"{endpoint.name}: {what}",
        provider=endpoint.provider,
        model=endpoint.model,
        next_step=f"set {endpoint.api_key_env}, or use another model (-m)",
    )
