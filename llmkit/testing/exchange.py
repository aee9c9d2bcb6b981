"""One request being served: its head, its body, and the fault that happens to it on the way."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

from llmkit.reply import Usage
from llmkit.testing.faults import NO_FAULT
from llmkit.testing.framing import Framer, around, encoded, split
from llmkit.testing.generation import generated
from llmkit.testing.refusals import Refusal, refusal, too_long
from llmkit.testing.wires import Ask, Frame, Generation, Rejected, Wire, dumps

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from llmkit.testing.books import Received, Settings, State

__all__ = ["Broken", "Exchange", "parsed"]

_BLOCK = 65_536
_TURN = 16  # frames between two turns of the event loop, so that a fast stream does not shut out everything else
_JSON = "application/json"
_EVENTS = "text/event-stream; charset=utf-8"
_NONSENSE = {
    "html": b"<!DOCTYPE html>\n<html><head><title>Bad gateway</title></head><body><h1>Bad gateway</h1></body></html>\n",
    "garbage": b"\x00\xff\xfe<<}{ this is no JSON \xc3\x28\n\n" * 4,
    "empty": b"",
}
_MIDWAY = frozenset({"cut", "stall", "garbage_frame", "error_in_stream"})


class Broken(Exception):
    """The connection breaks here: ``how`` is ``refused``, ``reset`` or ``cut``."""

    def __init__(self, how: str) -> None:
        super().__init__(how)
        self.how = how


class Exchange:
    """Serves one call: first `head`, then `body`; `close` whatever happened."""

    def __init__(
        self, received: Received, wire: Wire, settings: Settings, closed: Callable[[Received], object]
    ) -> None:
        self.received = received
        self._wire = wire
        self._settings = settings
        self._clock = settings.clock
        self._fault = received.fault or NO_FAULT
        self._closed = closed
        self._content: bytes | None = None
        self._generation: Generation | None = None
        self._made = self._reasoned = 0  # tokens, billed or not

    def close(self, state: State) -> None:
        """End it, once; later words are not heard."""
        if self.received.state == "open":
            self.received.state = state
            self._closed(self.received)

    # -- the head ----------------------------------------------------------------------------------------------------

    async def head(self) -> tuple[int, dict[str, str]]:
        """Wait as long as the service takes, then give the status and the headers.

        Raises:
            Broken: there is no response.
        """
        try:
            status, headers = self._decided()
            await self._wait()
        except Broken:
            self.close("broken")
            raise
        except BaseException:
            self.close("left")
            raise
        self.received.status = status
        name = "request-id" if self._wire.name == "anthropic" else "x-request-id"
        return status, headers | {name: f"req_sim_{self.received.number:06d}", "server": "llmkit-simulator"}

    def _decided(self) -> tuple[int, dict[str, str]]:
        """Settle what the response is; the body has only to be written then."""
        fault, settings = self._fault, self._settings
        if fault.kind in {"refused", "reset"}:
            raise Broken(fault.kind)
        key, now = self._key(), self._clock.time()
        refused = refusal(fault, self._wire, key=key, window=settings.window, now=now)
        try:
            ask = self._wire.ask(self._document()) if refused is None else None
            if ask is not None:
                self._admit(ask)
        except Rejected as rejected:
            refused = Refusal(rejected.status, rejected.kind, str(rejected))
        if refused is not None or ask is None:
            assert refused is not None
            return refused.status, self._sized(_JSON, refused.document(self._wire)) | refused.headers
        if fault.kind in _NONSENSE:
            self._content = _NONSENSE[fault.kind]
            kind = "text/html" if fault.kind == "html" else _EVENTS if ask.stream else _JSON
            return fault.http_status or 200, {"content-type": kind, "content-length": str(len(self._content))}
        self._generation = generated(ask, self._document(), settings, fault)
        return 200, self._whole(self._generation)

    def _whole(self, generation: Generation) -> dict[str, str]:
        """The headers of an answer, and its content where that is not written step by step."""
        if generation.ask.stream:
            return {"content-type": _EVENTS, "cache-control": "no-cache"}
        if self._fault.kind in {"huge", "endless"}:
            return {"content-type": _JSON}
        if self._fault.kind == "error_in_stream":
            return self._sized(_JSON, self._wire.error("status", 500, self._fault.message or ""))
        headers = self._sized(_JSON, self._wire.whole(generation))
        if self._fault.kind == "garbage_frame" and self._content is not None:
            self._content = self._content[: len(self._content) // 2]
            headers["content-length"] = str(len(self._content))
        return headers

    def _document(self) -> dict[str, Any]:
        if not isinstance(self.received.body, dict):
            raise Rejected("We could not parse the JSON body of your request.")
        repeats = self.received.repeats
        if repeats is not None and repeats.body != self.received.body:
            raise Rejected(
                "Keys for idempotent requests can only be used with the parameters they were first used with."
            )
        return self.received.body

    def _admit(self, ask: Ask) -> None:
        models, window = self._settings.models, self._settings.window
        if models and ask.model not in models:
            message = f"The model `{ask.model[:100]}` does not exist or you do not have access to it."
            raise Rejected(message, status=404, kind="model")
        if window is not None and ask.input_tokens > window:
            raise Rejected(too_long(self._wire, ask.input_tokens, window), kind="context")

    def _sized(self, kind: str, document: dict[str, Any]) -> dict[str, str]:
        self._content = dumps(document).encode("utf-8", "replace")
        return {"content-type": kind, "content-length": str(len(self._content))}

    def _key(self) -> str:
        headers = self.received.headers
        return headers.get("x-api-key") or headers.get("authorization", "").removeprefix("Bearer ")

    async def _wait(self) -> None:
        seconds = self._settings.latency_s
        if self._fault.kind in {"hang", "slow"}:
            seconds += self._fault.seconds
        if self._generation is not None and not self._generation.ask.stream:
            seconds += self._token_delay_s() * self._generation.output_tokens
        await self._pause(seconds)

    # -- the body ----------------------------------------------------------------------------------------------------

    async def body(self) -> AsyncGenerator[bytes, None]:
        """The bytes after the head, block by block.

        Raises:
            Broken: the connection ends here, without the end that HTTP demands.
        """
        blocks = self._blocks()
        try:
            async for block in blocks:
                yield block
        except Broken:
            self.close("broken")
            raise
        else:
            self.close("complete")
        finally:
            self.close("left")
            await blocks.aclose()

    def _blocks(self) -> AsyncGenerator[bytes, None]:
        if self._content is not None:
            return self._document_blocks(self._content)
        generation = self._generation
        assert generation is not None
        if self._fault.kind == "huge":
            return self._huge_blocks(generation)
        if self._fault.kind == "endless":
            return self._endless_events(generation) if generation.ask.stream else self._endless_text(generation)
        return self._event_blocks(generation)

    async def _document_blocks(self, content: bytes) -> AsyncGenerator[bytes, None]:
        fault, generation = self._fault, self._generation
        if generation is not None and fault.kind not in {"error_in_stream", "garbage_frame"}:
            self._bill(generation.output_tokens, len(generation.reasoning))
        if generation is not None and fault.kind in {"cut", "stall"}:
            middle = len(content) * fault.after // max(generation.output_tokens, fault.after, 1)
            middle = min(middle, len(content) - 1)
            if middle:
                yield content[:middle]
            await self._midway()
            content = content[middle:]
        for block in split(content, fault.variants)[:-1]:
            yield block
        self.close("complete")  # before the last block: a client need not come back for the end
        if content:
            yield split(content, fault.variants)[-1]

    async def _event_blocks(self, generation: Generation) -> AsyncGenerator[bytes, None]:
        fault = self._fault
        framer = Framer(fault.variants if fault.kind == "framing" else ())
        due = fault.after if fault.kind in _MIDWAY else -1
        shown = 0
        for turn, frame in enumerate(self._wire.frames(generation), 1):
            if due >= 0 and (frame.role == "close" or (frame.role == "token" and shown == due)):
                due = -1
                for block in await self._midway():
                    yield block
                if fault.kind != "stall":
                    return
            if frame.role in {"token", "hidden"}:
                await self._generate(frame)
                shown += frame.role == "token"
            for block in self._written(frame, framer):
                yield block
            if not turn % _TURN:
                await asyncio.sleep(0)
        for block in framer.rest():
            yield block

    async def _generate(self, frame: Frame) -> None:
        delay_s = self._token_delay_s()
        if delay_s and self._made:
            await self._clock.sleep(delay_s)
        self._bill(1, 1 if frame.reasoning else 0)

    def _written(self, frame: Frame, framer: Framer) -> list[bytes]:
        if frame.role == "hidden" or (frame.role == "end" and self._fault.kind == "no_done"):
            return []
        blocks = framer.blocks(frame)
        if frame.role == "end" and len(blocks) == 1:
            self.close("complete")  # before the last block: a client need not come back for the end
        return blocks

    async def _midway(self) -> list[bytes]:
        """What happens in the middle; the events that come of it."""
        fault = self._fault
        if fault.kind == "cut":
            raise Broken("cut")
        if fault.kind == "stall":
            await self._clock.sleep(fault.seconds)
            return []
        if fault.kind == "error_in_stream":
            return [encoded(self._wire.error_frame(fault.message or ""))]
        event = "content_block_delta" if self._wire.name == "anthropic" else None
        return [encoded(Frame("close", '{"choices": [{"delta": {"content": "unfin', event))]

    async def _huge_blocks(self, generation: Generation) -> AsyncGenerator[bytes, None]:
        """One string of a hundred megabytes where a token was due; nothing is billed."""
        before, after = around(self._wire, generation)
        yield before
        filling, left = b"a" * _BLOCK, self._fault.size - len(before) - len(after)
        while left > 0:
            yield filling[:left]
            left -= _BLOCK
            await asyncio.sleep(0)
        self.close("complete")
        yield after

    async def _endless_text(self, generation: Generation) -> AsyncGenerator[bytes, None]:
        """A JSON string that is never closed; nothing is billed."""
        yield around(self._wire, generation)[0]
        filling = b"a" * _BLOCK
        while True:
            yield filling
            await self._pause(self._token_delay_s())

    async def _endless_events(self, generation: Generation) -> AsyncGenerator[bytes, None]:
        """Good tokens for ever, each of them billed."""
        before, after = around(self._wire, generation)
        opening, _, token = before.rpartition(b"\n\n")
        yield opening + b"\n\n"
        token += b" again" + after[: after.index(b"\n\n") + 2]
        delay_s = self._token_delay_s()
        together = 1 if delay_s else _TURN
        while True:
            self._bill(together, 0)
            yield token * together
            await self._pause(delay_s)

    # -- time and money ----------------------------------------------------------------------------------------------

    def _bill(self, output_tokens: int, reasoning_tokens: int) -> None:
        received, generation = self.received, self._generation
        self._made += output_tokens
        self._reasoned += reasoning_tokens
        paid = received.repeats.billed if received.repeats is not None else Usage()
        if generation is not None and not paid.input_tokens:
            received.input_tokens = generation.ask.input_tokens
            received.cached_input_tokens = generation.cached_tokens
        received.output_tokens = max(0, self._made - paid.output_tokens)
        received.reasoning_tokens = max(0, self._reasoned - paid.reasoning_tokens)

    def _token_delay_s(self) -> float:
        return self._settings.token_delay_s + self._fault.token_delay_s

    async def _pause(self, seconds: float) -> None:
        if seconds > 0:
            await self._clock.sleep(seconds)
        else:
            await asyncio.sleep(0)


def parsed(body: bytes) -> Any:
    """The request's JSON; None where it is none."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None
