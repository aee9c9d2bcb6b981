"""What the tests of the providers stand on: a call, a transport that plays a script, and a raw server on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import json

import httpx

from llmkit.call import Call, Params, Timeouts, messages_from
from llmkit.clock import SystemClock
from llmkit.endpoint import Endpoint, Link
from llmkit.providers.http import Provider

KEY = "sk-verysecret0123456789"
SSE = {"content-type": "text/event-stream"}


def endpoint(wire="openai", **fields):
    return Endpoint(
        **{
            "provider": "acme",
            "model": "m-1",
            "base_url": "http://127.0.0.1:9/v1",
            "wire": wire,
            "api_key_env": "ACME_KEY",
            **fields,
        }
    )


def call(to=None, prompt="hi", *, stream=False, params=None, timeouts=None, system=None):
    link = Link(endpoint=to or endpoint())
    return Call(
        request_id="call-1",
        messages=messages_from(prompt, system),
        model="acme:m-1",
        route=(link,),
        link=link,
        started=0.0,
        started_at=0.0,
        stream=stream,
        params=params or Params(),
        timeouts=timeouts or Timeouts(),
    )


def frames(*events, done=True):
    """An SSE body in OpenAI's manner."""
    body = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)
    return body + (b"data: [DONE]\n\n" if done else b"")


def token(text, **fields):
    return {"choices": [{"index": 0, "delta": {"content": text, **fields}}]}


STOP = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
HELLO = {
    "id": "c1",
    "model": "m-1-2026",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "hello"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 1},
}


class Body(httpx.AsyncByteStream):
    """Pieces of a body; an exception among them is raised in its turn. It remembers whether it was closed."""

    def __init__(self, *pieces):
        self.pieces = pieces
        self.read = 0
        self.closed = False

    async def __aiter__(self):
        for piece in self.pieces:
            if isinstance(piece, Exception):
                raise piece
            self.read += 1
            yield piece

    async def aclose(self):
        self.closed = True


class Scripted(httpx.AsyncBaseTransport):
    """Answers every request in the same way, and keeps them."""

    def __init__(self, *pieces, status=200, headers=None):
        self.body = Body(*pieces)
        self.status = status
        self.headers = headers or {}
        self.requests = []

    async def handle_async_request(self, request):
        self.requests.append(request)
        return httpx.Response(self.status, headers=self.headers, stream=self.body)

    @property
    def sent(self):
        return json.loads(self.requests[-1].content)


def provider(transport=None, *, key=KEY, **arguments):
    environ = {"ACME_KEY": key} if key is not None else {}
    return Provider(SystemClock(), transport, environ=environ, **arguments)


def ask(*pieces, status=200, headers=None, to=None, stream=True, key=KEY):
    """Play the pieces as a response, and read the reply to its end. Returns it, or raises what it raised."""
    transport = Scripted(*pieces, status=status, headers=headers)

    async def main():
        reply = await provider(transport, key=key)(call(to, stream=stream))
        await reply.read()
        return reply

    return asyncio.run(main())


def failure(*pieces, **arguments):
    """The error that `ask` ends in."""
    try:
        reply = ask(*pieces, **arguments)
    except Exception as error:
        return error
    raise AssertionError(f"no error, but {reply!r}")


@contextlib.asynccontextmanager
async def server(respond):
    """A raw server: ``await respond(request: bytes, writer)`` for each request; yields it, with what it has seen."""
    seen = Seen()
    tasks = set()

    async def serve(reader, writer):
        seen.connections += 1
        seen.reader = reader
        seen.came.set()
        tasks.add(asyncio.current_task())
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    (
                        int(line.split(b":")[1])
                        for line in head.lower().split(b"\r\n")
                        if line.startswith(b"content-length")
                    ),
                    0,
                )
                seen.requests.append(head + await reader.readexactly(length))
                await respond(seen.requests[-1], writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            seen.gone.set()
        except asyncio.CancelledError:
            pass  # the test is over; asyncio's streams would log it
        finally:
            writer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    seen.base_url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/v1"
    try:
        yield seen
    finally:
        listener.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Seen:
    """What a server has seen."""

    def __init__(self):
        self.base_url = ""
        self.requests = []
        self.connections = 0
        self.reader = None  # of the latest connection
        self.came = asyncio.Event()  # a client has connected
        self.gone = asyncio.Event()  # a client has left


def http(body, *, status=b"200 OK", content_type=b"application/json"):
    """A whole response as bytes."""
    return b"HTTP/1.1 %s\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n%s" % (status, content_type, len(body), body)


CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data):
    """One chunk of a chunked body."""
    return b"%x\r\n%s\r\n" % (len(data), data)
