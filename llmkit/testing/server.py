"""The simulator behind a real socket."""

from __future__ import annotations

import asyncio
import socket
import struct
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from aiohttp import web

from llmkit.testing.exchange import Broken, Exchange
from llmkit.testing.simulator import Plain

if TYPE_CHECKING:
    from llmkit.testing.simulator import Simulator

__all__ = ["Server"]

_MOST_BODY = 64 * 1024 * 1024
_NO_LINGER = struct.pack("ii", 1, 0)  # closing then sends a reset


class Server:
    """One listening port. Requests that hang end when their client goes, or with `stop`."""

    def __init__(self, simulator: Simulator) -> None:
        self._simulator = simulator
        self._runner: web.ServerRunner | None = None
        self._handling: dict[asyncio.Task[Any], Exchange] = {}

    async def start(self, host: str, port: int) -> str:
        """Listen; gives the base URL."""
        server = web.Server(
            self._handle,
            request_factory=_request,
            handler_cancellation=True,  # a client that goes ends what is done for it
            access_log=None,
        )
        self._runner = web.ServerRunner(server, shutdown_timeout=1.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port, backlog=1024)
        try:
            await site.start()
        except OSError:
            await self._runner.cleanup()
            raise
        shown = f"[{host}]" if ":" in host else host
        return f"http://{shown}:{self._runner.addresses[0][1]}/v1"

    async def stop(self) -> None:
        """Stop listening, and break off what is still being served."""
        for task, exchange in list(self._handling.items()):
            exchange.close("stopped")
            task.cancel()
        if self._runner is not None:
            await self._runner.cleanup()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            body = await request.read()
        except web.HTTPRequestEntityTooLarge:
            return web.json_response({"error": {"message": "The request is too large."}}, status=413)
        serving = self._simulator.receive(request.method, request.path, request.headers, body)
        if isinstance(serving, Plain):
            return web.Response(status=serving.status, body=serving.content, content_type="application/json")
        task = asyncio.current_task()
        assert task is not None
        self._handling[task] = serving
        try:
            return await self._answer(request, serving)
        finally:
            del self._handling[task]
            serving.close("left")

    async def _answer(self, request: web.BaseRequest, serving: Exchange) -> web.StreamResponse:
        response = web.StreamResponse()
        try:
            status, headers = await serving.head()
            response = web.StreamResponse(status=status, headers=headers)
            if "content-length" not in headers:
                response.enable_chunked_encoding()
            await response.prepare(request)
            async with aclosing(serving.body()) as blocks:
                async for block in blocks:
                    await response.write(block)
            await response.write_eof()
        except Broken as broken:
            _hang_up(request.transport, reset=broken.how != "cut")
            if not response.prepared:
                raise asyncio.CancelledError from None  # aiohttp's word for: there is nobody left to answer
        return response


def _request(message: Any, payload: Any, protocol: Any, writer: Any, task: Any) -> web.BaseRequest:
    return web.BaseRequest(
        message, payload, protocol, writer, task, asyncio.get_running_loop(), client_max_size=_MOST_BODY
    )


def _hang_up(transport: asyncio.Transport | None, *, reset: bool) -> None:
    """Close the connection: at once and with a reset, or after what was written has gone out."""
    if transport is None:
        return
    if not reset:
        transport.close()
        return
    raw = transport.get_extra_info("socket")
    if raw is not None:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
    transport.abort()
