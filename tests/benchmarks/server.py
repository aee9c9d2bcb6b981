"""A loopback server that costs next to nothing, in a process of its own: what is measured is the client.

``python server.py`` prints its port. ``/0`` and ``/50`` before the path are milliseconds to wait before the answer.
A request that asks to stream gets as many chunks as its ``max_tokens``, each written by itself.
"""

from __future__ import annotations

import asyncio
import json
import re

_HEAD = {"id": "x", "created": 1, "model": "bench"}
_WHOLE = json.dumps(
    {
        **_HEAD,
        "object": "chat.completion",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "An answer of a few words."},
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 9, "completion_tokens": 6, "total_tokens": 15},
    }
).encode()
_RESPONSE = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(_WHOLE) + _WHOLE
_STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def _event(document: dict) -> bytes:
    data = b"data: " + json.dumps({**_HEAD, "object": "chat.completion.chunk", **document}).encode() + b"\n\n"
    return b"%x\r\n%s\r\n" % (len(data), data)


_PIECE = _event({"choices": [{"index": 0, "delta": {"content": " word"}, "finish_reason": None}], "usage": None})
_LAST = _event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "usage": None})
_USAGE = _event({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 500, "total_tokens": 509}})
_DONE = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


class _Connection(asyncio.Protocol):
    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        self.data = b""
        import socket

        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        self.data += data
        while (end := self.data.find(b"\r\n\r\n")) >= 0:
            head = self.data[:end]
            length = int(re.search(rb"(?i)content-length: *(\d+)", head)[1])
            if len(self.data) < end + 4 + length:
                return
            body, self.data = self.data[end + 4 : end + 4 + length], self.data[end + 4 + length :]
            wait = int(re.match(rb"\w+ /(\d+)", head)[1]) / 1000
            asyncio.get_running_loop().call_later(wait, self._answer, body) if wait else self._answer(body)

    def _answer(self, body: bytes) -> None:
        if b'"stream":true' not in body.replace(b" ", b""):
            self.transport.write(_RESPONSE)
            return
        chunks = json.loads(body).get("max_tokens") or 500
        asyncio.get_running_loop().create_task(self._stream(chunks))

    async def _stream(self, chunks: int) -> None:
        self.transport.write(_STREAM)
        for _ in range(chunks):
            self.transport.write(_PIECE)
            await asyncio.sleep(0)
        self.transport.write(_LAST + _USAGE + _DONE)


async def main() -> None:
    server = await asyncio.get_running_loop().create_server(_Connection, "127.0.0.1", 0, backlog=1000)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
