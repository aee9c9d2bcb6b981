"""The engine below httpx's interface."""

from __future__ import annotations

import asyncio
import gzip
import socket
import ssl
import warnings

import httpx
import pytest
from multidict import CIMultiDict

from llmkit.errors import LLMKitError
from llmkit.transport import AiohttpTransport
from tests.providers.loopback import CHUNKED, chunk, http, server

URL = "/chat/completions"


def answering(*pieces):
    async def respond(_, writer):
        for piece in pieces:
            writer.write(piece)
        await writer.drain()

    return respond


def run(respond, main):
    """``await main(client, seen)`` with an httpx client over the transport, and a server on loopback."""

    async def whole():
        async with (
            server(respond) as seen,
            httpx.AsyncClient(transport=AiohttpTransport(), base_url=seen.base_url) as client,
        ):
            return await asyncio.wait_for(main(client, seen), 10)

    return asyncio.run(whole())


def test_an_httpx_client_can_use_it() -> None:
    async def main(client, seen):
        response = await client.post(URL, json={"a": 1}, headers={"X-A": "b"})
        return response, seen.requests[0]

    response, request = run(answering(http(b'{"b": 2}', status=b"201 Made")), main)
    assert (response.status_code, response.reason_phrase, response.json()) == (201, "Made", {"b": 2})
    assert response.headers["content-type"] == "application/json"
    head, _, body = request.partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/chat/completions HTTP/1.1\r\n")
    assert body == b'{"a":1}'
    lines = [line.split(b":")[0].lower() for line in head.split(b"\r\n")[1:]]
    assert sorted(lines) == sorted(set(lines))
    assert b"X-A: b".lower() in head.lower()


def test_get_and_a_body_that_is_streamed() -> None:
    async def pieces():
        yield b"ab"
        yield b"c"

    async def main(client, seen):
        await client.get("/models")
        await client.post(URL, content=pieces(), headers={"content-length": "3"})
        return seen.requests

    get, post = run(answering(http(b"{}")), main)
    assert get.startswith(b"GET /v1/models HTTP/1.1")
    assert post.endswith(b"\r\n\r\nabc")


def test_redirects_and_cookies_are_left_to_the_caller() -> None:
    answer = b"HTTP/1.1 302 Found\r\nLocation: /other\r\nSet-Cookie: a=b\r\nContent-Length: 0\r\n\r\n"

    async def main(client, seen):
        client.cookies.clear()
        first = await client.get("/x")
        client.cookies.clear()
        await client.get("/x")
        return first.status_code, seen.requests

    status, requests = run(answering(answer), main)
    assert status == 302
    assert len(requests) == 2
    assert b"cookie" not in requests[1].lower()


def test_a_packed_body_is_unpacked_once() -> None:
    packed = gzip.compress(b"hello")
    answer = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(packed) + packed

    async def main(client, _):
        return (await client.get("/x")).text

    assert run(answering(answer), main) == "hello"


def test_chunks_come_as_they_arrive() -> None:
    release = asyncio.Event()

    async def respond(_, writer):
        writer.write(CHUNKED + chunk(b"first"))
        await release.wait()
        writer.write(chunk(b"second") + b"0\r\n\r\n")

    async def main(client, _):
        async with client.stream("GET", "/x") as response:
            pieces = response.aiter_raw()
            first = await anext(pieces)
            release.set()
            return first, await anext(pieces)

    assert run(respond, main) == (b"first", b"second")


def test_a_body_read_to_its_end_leaves_its_connection_to_the_next() -> None:
    async def main(client, seen):
        for _ in range(5):
            await client.get("/x")
        return seen.connections

    assert run(answering(http(b"{}")), main) == 1


def test_many_calls_at_once_have_a_connection_each() -> None:
    waiting = []

    async def respond(_, writer):
        waiting.append(writer)
        if len(waiting) == 150:
            for each in waiting:
                each.write(http(b"{}"))

    async def main(client, seen):
        await asyncio.gather(*[client.get("/x") for _ in range(150)])
        return seen.connections

    assert run(respond, main) == 150


def test_leaving_a_response_closes_its_connection_at_once() -> None:
    async def main(client, seen):
        async with client.stream("GET", "/x") as response:
            await anext(response.aiter_raw())
        await asyncio.wait_for(seen.gone.wait(), 2)

    run(endless, main)


async def endless(_, writer):
    writer.write(CHUNKED)
    while True:
        writer.write(chunk(b"x"))
        await writer.drain()
        await asyncio.sleep(0)


def test_cancelling_closes_the_connection_at_once() -> None:
    arrived = asyncio.Event()

    async def main(client, seen):
        task = asyncio.create_task(client.get("/x"))
        await arrived.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.wait_for(seen.reader.read(), 2) == b""

    async def silent(_, __):
        arrived.set()
        await asyncio.Event().wait()

    run(silent, main)


def raised(respond, path="/x"):
    async def main(client, _):
        with pytest.raises(httpx.HTTPError) as caught:
            await client.get(path)
        return caught.value

    return run(respond, main)


def test_what_breaks_after_sending_is_no_connect_error() -> None:
    async def hang_up(_, writer):
        writer.close()

    async def reset(_, writer):
        writer.transport.abort()

    assert type(raised(hang_up)) is httpx.RemoteProtocolError
    assert type(raised(reset)) in {httpx.ReadError, httpx.RemoteProtocolError}
    assert type(raised(answering(b"SSH-2.0\r\n\r\n"))) is httpx.RemoteProtocolError
    assert type(raised(answering(CHUNKED, chunk(b"a"), b"zz\r\n"))) is httpx.RemoteProtocolError


def test_a_malformed_chunk_that_comes_later_does_not_hang() -> None:
    release = asyncio.Event()

    async def respond(_, writer):
        writer.write(CHUNKED + chunk(b"a"))
        await release.wait()
        writer.write(b"zz\r\n")

    async def main(client, _):
        async with client.stream("GET", "/x") as response:
            pieces = response.aiter_raw()
            assert await anext(pieces) == b"a"
            release.set()
            with pytest.raises(httpx.RemoteProtocolError):
                await anext(pieces)

    run(respond, main)


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("http://127.0.0.1:1/", httpx.ConnectError),
        ("ftp://127.0.0.1/", httpx.UnsupportedProtocol),
        ("http:///x", httpx.UnsupportedProtocol),
    ],
)
def test_what_breaks_before_sending(url, kind) -> None:
    async def main():
        transport = AiohttpTransport()
        with pytest.raises(kind) as caught:
            await transport.handle_async_request(
                httpx.Request("GET", url, headers={"authorization": "Bearer secret-key"})
            )
        await transport.aclose()
        return caught.value

    error = asyncio.run(main())
    assert error.__cause__ is None
    assert error.__context__ is None


def test_a_header_that_cannot_be_sent() -> None:
    async def main():
        transport = AiohttpTransport()
        prepared = transport.prepare("http://127.0.0.1:1/", [("X-A", "a\r\nX-B: b")])
        async with server(answering(http(b"{}"))) as seen:
            prepared = transport.prepare(seen.base_url, [("X-A", "a\r\nX-B: b")])
            with pytest.raises(httpx.LocalProtocolError):
                await transport.exchange(prepared, prepared.headers, b"{}")
            await transport.aclose()
            assert not seen.requests

    asyncio.run(main())


def test_a_connection_that_does_not_come_is_a_connect_timeout(monkeypatch) -> None:
    async def never(*_, **__):
        await asyncio.Event().wait()

    async def main():
        monkeypatch.setattr(asyncio.get_running_loop(), "sock_connect", never)
        monkeypatch.setattr(asyncio.get_running_loop(), "create_connection", never)
        transport = AiohttpTransport()
        with pytest.raises(httpx.ConnectTimeout):
            prepared = transport.prepare("http://127.0.0.1:1/", [])
            await transport.exchange(prepared, prepared.headers, b"{}", connect=0.01)
        await transport.aclose()

    asyncio.run(main())


def test_a_server_that_speaks_no_tls() -> None:
    async def greet(_, writer):
        writer.write(b"220 ready\r\n")
        writer.close()

    async def main():
        listener = await asyncio.start_server(greet, "127.0.0.1", 0)
        transport = AiohttpTransport()
        url = f"https://127.0.0.1:{listener.sockets[0].getsockname()[1]}/"
        with pytest.raises(httpx.ConnectError, match="TLS"):
            await transport.handle_async_request(httpx.Request("GET", url))
        await transport.aclose()
        listener.close()

    asyncio.run(main())


def test_certificates_are_checked() -> None:
    transport = AiohttpTransport()
    context = transport.prepare("https://api.example.test/v1", []).context
    assert isinstance(context, ssl.SSLContext)
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname
    assert transport.prepare("https://other.example.test/v1", []).context is context


PROXY = {
    "HTTP_PROXY": "http://proxy.test:3128",
    "HTTPS_PROXY": "http://proxy.test:3129",
    "NO_PROXY": "direct.test,.inner.test",
}


@pytest.mark.parametrize(
    ("url", "proxy"),
    [
        ("http://api.example.test/v1", "http://proxy.test:3128"),
        ("https://api.example.test/v1", "http://proxy.test:3129"),
        ("https://direct.test/v1", None),
        ("https://a.inner.test/v1", None),
        ("http://localhost:8000/v1", None),
        ("http://127.0.0.1:8000/v1", None),
        ("http://[::1]:8000/v1", None),
    ],
)
def test_proxies_of_the_environment(monkeypatch, url, proxy) -> None:
    forget_proxies(monkeypatch)
    for name, value in PROXY.items():
        monkeypatch.setenv(name, value)
    found = AiohttpTransport().prepare(url, []).proxy
    assert (None if found is None else str(found)) == proxy


def test_a_socks_proxy_is_an_error_that_says_so(monkeypatch) -> None:
    forget_proxies(monkeypatch)
    monkeypatch.setenv("ALL_PROXY", "socks5://u:hunter2@proxy.test:1080")
    with pytest.raises(httpx.UnsupportedProtocol, match="socks5") as caught:
        AiohttpTransport().prepare("https://api.example.test/v1", [])
    assert "hunter2" not in str(caught.value)


def test_requests_go_through_the_proxy(monkeypatch) -> None:
    forget_proxies(monkeypatch)

    async def main():
        async with server(answering(http(b'{"by": "proxy"}'))) as seen:
            monkeypatch.setenv("HTTP_PROXY", seen.base_url.removesuffix("/v1"))
            async with httpx.AsyncClient(transport=AiohttpTransport(), trust_env=False) as client:
                response = await client.get("http://api.example.test/v1/models")
            return response.json(), seen.requests[0]

    answer, request = asyncio.run(main())
    assert answer == {"by": "proxy"}
    assert request.startswith(b"GET http://api.example.test/v1/models HTTP/1.1")


def forget_proxies(monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def test_one_transport_serves_several_loops_and_leaves_nothing_behind() -> None:
    transport = AiohttpTransport()

    async def once():
        async with server(answering(http(b"{}"))) as seen:
            response = await transport.handle_async_request(httpx.Request("GET", seen.base_url))
            await response.aread()
            return response.status_code

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert asyncio.run(once()) == 200
    assert not transport._sessions
    assert not [str(warning.message) for warning in caught if "nclosed" in str(warning.message)]


def test_a_loop_that_was_closed_by_hand_is_forgotten() -> None:
    transport = AiohttpTransport()

    async def once():
        async with server(answering(http(b"{}", content_type=b"x"))) as seen:
            response = await transport.handle_async_request(
                httpx.Request("GET", seen.base_url, headers={"connection": "close"})
            )
            return await response.aread()

    loop = asyncio.new_event_loop()
    loop.run_until_complete(once())
    loop.close()
    assert asyncio.run(once()) == b"{}"
    assert loop not in transport._sessions


def test_closing_twice_is_harmless_and_it_can_be_used_again() -> None:
    async def main(client, seen):
        transport = client._transport
        await client.get("/x")
        await transport.aclose()
        await transport.aclose()
        response = await transport.handle_async_request(httpx.Request("GET", seen.base_url))
        return await response.aread()

    assert run(answering(http(b"{}")), main) == b"{}"


# -- the moment of sending -----------------------------------------------------------------------------------------------


async def sent(transport, url, on_send, *, connect=None):
    exchange = await transport.exchange(
        transport.prepare(url, []), CIMultiDict(), b"{}", connect=connect, on_send=on_send
    )
    body = b""
    while data := await exchange.read():
        body += data
    return body


class Notes:
    """A hook that counts, and does what it is told."""

    def __init__(self, error=None):
        self.count = 0
        self.error = error
        self.wait = None
        self.begun = asyncio.Event()

    async def __call__(self):
        self.count += 1
        self.begun.set()
        if self.wait is not None:
            await self.wait.wait()
        if self.error is not None:
            raise self.error


def with_server(respond, main):
    async def whole():
        transport = AiohttpTransport()
        async with server(respond) as seen:
            try:
                return await asyncio.wait_for(main(transport, seen), 10)
            finally:
                await transport.aclose()

    return asyncio.run(whole())


def test_it_is_said_when_the_connection_stands_and_before_a_byte_is_written() -> None:
    async def main(transport, seen):
        notes = Notes()
        notes.wait = asyncio.Event()
        sending = asyncio.create_task(sent(transport, seen.base_url, notes))
        await notes.begun.wait()
        for _ in range(100):
            await asyncio.sleep(0)
        assert (seen.connections, seen.reader._buffer, seen.requests) == (1, b"", [])
        notes.wait.set()
        assert await sending == b"{}"
        await sent(transport, seen.base_url, notes)
        assert (seen.connections, notes.count) == (1, 2), "and so on a connection that was kept alive"
        await transport.handle_async_request(httpx.Request("GET", seen.base_url))
        assert notes.count == 2, "a request without a hook is nobody's business"

    with_server(answering(http(b"{}")), main)


def test_where_the_hook_refuses_nothing_is_sent_and_the_connection_is_good_for_the_next() -> None:
    error = LLMKitError("the budget is used up")

    async def main(transport, seen):
        for _ in range(2):
            with pytest.raises(LLMKitError) as caught:
                await sent(transport, seen.base_url, Notes(error))
            assert caught.value is error
        assert seen.requests == []
        assert await sent(transport, seen.base_url, Notes()) == b"{}"
        assert (seen.connections, len(seen.requests)) == (1, 1)

    with_server(answering(http(b"{}")), main)


def test_who_is_cancelled_while_the_hook_waits_has_sent_nothing() -> None:
    async def main(transport, seen):
        notes = Notes()
        notes.wait = asyncio.Event()
        sending = asyncio.create_task(sent(transport, seen.base_url, notes))
        await notes.begun.wait()
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        assert await sent(transport, seen.base_url, None) == b"{}"
        assert len(seen.requests) == 1

    with_server(answering(http(b"{}")), main)


def test_calls_at_once_have_hooks_of_their_own() -> None:
    async def main(transport, seen):
        hooks = [Notes(LLMKitError("no") if n % 3 == 0 else None) for n in range(30)]
        ends = await asyncio.gather(*[sent(transport, seen.base_url, hook) for hook in hooks], return_exceptions=True)
        assert [hook.count for hook in hooks] == [1] * 30
        assert [isinstance(end, LLMKitError) for end in ends] == [hook.error is not None for hook in hooks]
        assert len(seen.requests) == 20

    with_server(answering(http(b"{}")), main)


def unconnected(kind, monkeypatch):
    """An address to which no connection comes to stand, and what holds it open."""
    if kind == "refused":
        return "http://127.0.0.1:1/", None
    listener = socket.create_server(("127.0.0.1", 0), backlog=1)
    at = f"127.0.0.1:{listener.getsockname()[1]}/"
    if kind == "TLS is not answered":  # the kernel takes the connection, and nobody speaks on it
        return f"https://{at}", listener
    if kind == "a proxy that is not answered":
        monkeypatch.setenv("HTTPS_PROXY", f"http://{at}")
        return "https://api.example.test/v1", listener
    for _ in range(4):  # fills the backlog, so that the kernel drops what comes
        filler = socket.socket()
        filler.setblocking(False)
        filler.connect_ex(listener.getsockname())
        FILLERS.append(filler)
    return f"http://{at}", listener


FILLERS = []


@pytest.mark.parametrize("kind", ["refused", "a full backlog", "TLS is not answered", "a proxy that is not answered"])
def test_while_no_connection_stands_nothing_is_said(kind, monkeypatch) -> None:
    forget_proxies(monkeypatch)
    url, listener = unconnected(kind, monkeypatch)

    async def main():
        transport = AiohttpTransport()
        notes = Notes()
        with pytest.raises((httpx.ConnectError, httpx.ConnectTimeout)):
            await sent(transport, url, notes, connect=0.1)
        await transport.aclose()
        return notes.count

    try:
        assert asyncio.run(main()) == 0
    finally:
        for each in (listener, *FILLERS):
            if each is not None:
                each.close()
        FILLERS.clear()


def test_a_kept_connection_that_turns_out_to_be_dead_is_not_tried_again_unseen() -> None:
    async def once(request, writer):
        if request.endswith(b"first"):
            writer.write(http(b"{}"))
            return
        writer.close()

    async def main(transport, seen):
        notes = Notes()
        prepared = transport.prepare(seen.base_url, [])
        for body in (b"first", b"second"):
            exchange = transport.exchange(prepared, CIMultiDict(), body, on_send=notes)
            if body == b"second":
                with pytest.raises(httpx.RemoteProtocolError):
                    await exchange
            else:
                await (await exchange).finish()
        assert (notes.count, len(seen.requests), seen.connections) == (2, 2, 1)

    with_server(once, main)
