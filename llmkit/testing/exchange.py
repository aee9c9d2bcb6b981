"""One request being served: what it gets, what it costs, and the fault that happens to it."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from llmkit.reply import Usage
from llmkit.testing.answers import instance, pieces, prose, thoughts
from llmkit.testing.wires import Ask, Frame, Generation, Rejected, Wire, dumps

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from llmkit.clock import Clock
    from llmkit.testing.faults import Fault

__all__ = ["Broken", "Exchange", "Received", "Settings"]

State = Literal["open", "complete", "broken", "left", "stopped"]

_BLOCK = 65_536
_TURN = 16  # frames between two turns of the event loop, so that a fast stream does not shut out everything else
_REASONING = 64  # tokens thought in vain where the request sets no limit
_JSON = "application/json"
_EVENTS = "text/event-stream; charset=utf-8"
_SECRET = frozenset({"authorization", "x-api-key", "api-key", "cookie", "proxy-authorization"})
_REFUSAL = "I'm sorry, but I can't help with that."
_HTML = b"<!DOCTYPE html>\n<html><head><title>Bad gateway</title></head><body><h1>Bad gateway</h1></body></html>\n"
_GARBAGE = b"\x00\xff\xfe<<}{ this is no JSON \xc3\x28\n\n" * 4
_MESSAGES = {
    400: "The request is not valid.",
    403: "Your account may not do this.",
    404: "There is nothing here.",
    408: "The request took too long to arrive.",
    413: "The request is too large.",
    429: "Rate limit reached for requests. Please try again later.",
    500: "The server had an error while processing your request.",
    502: "Bad gateway.",
    503: "The service is temporarily unavailable.",
    504: "The upstream did not answer in time.",
    529: "Overloaded.",
}


class Broken(Exception):
    """The connection breaks here: ``how`` is ``refused``, ``reset`` or ``cut``."""

    def __init__(self, how: str) -> None:
        super().__init__(how)
        self.how = how


class Headers(dict[str, str]):
    """Headers by their names in lower case. Tests may look at all of them; the repr shows no secret."""

    def __repr__(self) -> str:
        return repr({name: "…" if name in _SECRET else value for name, value in self.items()})


@dataclass(slots=True, eq=False)
class Received:
    """A request that reached the simulator, and what became of it.

    Attributes:
        number: 1 for the first call; 0 for what is no call (a list of models, a wrong path).
        headers: names in lower case; the repr leaves out the values that are secret.
        body: the parsed JSON; None where it was none.
        fault: what was made to go wrong.
        status: of the response; None where none was sent.
        state: ``open``; then ``complete``, ``broken`` (by a fault), ``left`` (by the client) or ``stopped`` (with the
            server).
        input_tokens, cached_input_tokens, output_tokens, reasoning_tokens: what is billed so far.
    """

    method: str
    path: str
    headers: Headers
    body: Any = field(repr=False)
    number: int = 0
    fault: Fault | None = None
    status: int | None = None
    state: State = "open"
    input_tokens: int = 0
    cached_input_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0

    @property
    def billed(self) -> Usage:
        """What this request costs so far. Billing begins with the first token; errors cost nothing."""
        return Usage(
            input_tokens=self.input_tokens,
            output_tokens=self.output_tokens,
            cached_input_tokens=self.cached_input_tokens,
            reasoning_tokens=self.reasoning_tokens,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How the service behaves towards everyone; see `llmkit.testing.Simulator`."""

    answer: str | Callable[[dict[str, Any]], str] | None
    seed: int
    clock: Clock
    latency_s: float
    token_delay_s: float
    models: tuple[str, ...]
    usage: str
    reasoning_tokens: int
    show_reasoning: bool
    cached_tokens: int
    window: int | None


class Exchange:
    """Serves one call: first `head`, then `body`; `close` whatever happened."""

    def __init__(
        self, received: Received, wire: Wire, settings: Settings, closed: Callable[[Received], object]
    ) -> None:
        self.received = received
        self._wire = wire
        self._settings = settings
        self._clock = settings.clock
        self._fault = received.fault
        self._kind = received.fault.kind if received.fault else ""
        self._closed = closed
        self._content: bytes | None = None
        self._generation: Generation | None = None

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
            status, headers = self._decide()
            await self._wait_for_head()
        except Broken:
            self.close("broken")
            raise
        except BaseException:
            self.close("left")
            raise
        self.received.status = status
        return status, {name.lower(): value for name, value in headers.items()} | self._identity()

    def _decide(self) -> tuple[int, dict[str, str]]:
        fault = self._fault
        if self._kind in {"refused", "reset"}:
            raise Broken(self._kind)
        if fault is not None and (refusal := self._refusal(fault)) is not None:
            return refusal
        try:
            ask = self._wire.ask(self._document())
            self._admit(ask)
        except Rejected as rejected:
            return self._error(rejected.kind, rejected.status, str(rejected))
        if self._kind in {"html", "garbage", "empty"}:
            return self._nonsense(ask.stream)
        generation = self._generation = self._generated(ask)
        if ask.stream:
            return 200, {"Content-Type": _EVENTS, "Cache-Control": "no-cache"}
        if self._kind in {"huge", "endless"}:
            return 200, {"Content-Type": _JSON}
        if self._kind == "error_in_stream":
            return self._plain(self._wire.error("status", 500, fault.message or "" if fault else ""))
        return self._plain(self._wire.whole(generation))

    def _document(self) -> dict[str, Any]:
        if not isinstance(self.received.body, dict):
            raise Rejected("We could not parse the JSON body of your request.")
        return self.received.body

    def _admit(self, ask: Ask) -> None:
        models, window = self._settings.models, self._settings.window
        if models and ask.model not in models:
            raise Rejected(f"The model `{ask.model[:100]}` does not exist or you do not have access to it.",
                           status=404, kind="model")  # fmt: skip
        if window is not None and ask.input_tokens > window:
            raise Rejected(self._too_long(ask.input_tokens, window), kind="context")

    def _too_long(self, tokens: int, window: int) -> str:
        if self._wire.name == "anthropic":
            return f"prompt is too long: {tokens} tokens > {window} maximum"
        return (
            f"This model's maximum context length is {window} tokens. However, your messages resulted in {tokens} "
            "tokens. Please reduce the length of the messages."
        )

    def _refusal(self, fault: Fault) -> tuple[int, dict[str, str]] | None:
        """The error that the fault asks for; None where it asks for none."""
        anthropic = self._wire.name == "anthropic"
        if fault.kind == "status":
            status = fault.http_status or 500
            code, headers = self._error("status", status, fault.message or _MESSAGES.get(status, "It failed."))
            return code, headers | self._retry_headers(fault)
        if fault.kind == "quota" and anthropic:
            return self._error("quota", 400, "Your credit balance is too low to access the Anthropic API.")
        if fault.kind == "quota":
            return self._error("quota", 429, "You exceeded your current quota, please check your plan and billing.")
        if fault.kind == "auth":
            return self._error("auth", fault.http_status or 401, f"Incorrect API key provided: {self._key()}.")
        if fault.kind == "context_too_long":
            window = self._settings.window or 4096
            return self._error("context", 400, self._too_long(window * 2, window))
        if fault.kind == "model_not_found":
            return self._error("model", 404, "The model does not exist or you do not have access to it.")
        return None

    def _retry_headers(self, fault: Fault) -> dict[str, str]:
        headers: dict[str, str] = {}
        if fault.should_retry is not None:
            headers["X-Should-Retry"] = "true" if fault.should_retry else "false"
        if fault.retry_after is None:
            return headers
        if fault.retry_form == "ms":
            headers["Retry-After-Ms"] = f"{fault.retry_after * 1000:g}"
        elif fault.retry_form == "date":
            from email.utils import formatdate

            now = self._clock.time()
            headers["Date"] = formatdate(now, usegmt=True)
            headers["Retry-After"] = formatdate(now + fault.retry_after, usegmt=True)
        else:
            headers["Retry-After"] = f"{fault.retry_after:g}"
        return headers

    def _nonsense(self, stream: bool) -> tuple[int, dict[str, str]]:
        self._content = {"html": _HTML, "garbage": _GARBAGE, "empty": b""}[self._kind]
        kind = "text/html" if self._kind == "html" else _EVENTS if stream else _JSON
        status = self._fault.http_status if self._fault else None
        return status or 200, self._sized(kind)

    def _error(self, kind: str, status: int, message: str) -> tuple[int, dict[str, str]]:
        return status, self._plain(self._wire.error(kind, status, message))[1]

    def _plain(self, document: dict[str, Any]) -> tuple[int, dict[str, str]]:
        self._content = dumps(document).encode("utf-8", "replace")
        if self._kind == "garbage_frame" and self._generation is not None:
            self._content = self._content[: len(self._content) // 2]
        return 200, self._sized(_JSON)

    def _sized(self, kind: str) -> dict[str, str]:
        return {"Content-Type": kind, "Content-Length": str(len(self._content or b""))}

    def _identity(self) -> dict[str, str]:
        name = "request-id" if self._wire.name == "anthropic" else "x-request-id"
        return {name: f"req_sim_{self.received.number:06d}", "server": "llmkit-simulator"}

    def _key(self) -> str:
        headers = self.received.headers
        return headers.get("x-api-key") or headers.get("authorization", "").removeprefix("Bearer ")

    async def _wait_for_head(self) -> None:
        seconds = self._settings.latency_s
        if self._fault is not None and self._kind in {"hang", "slow"}:
            seconds += self._fault.seconds
        generation = self._generation
        if generation is not None and not generation.ask.stream:
            seconds += self._token_delay_s() * generation.output_tokens
        if seconds > 0:
            await self._clock.sleep(seconds)
        else:
            await asyncio.sleep(0)

    # -- the answer --------------------------------------------------------------------------------------------------

    def _generated(self, ask: Ask) -> Generation:
        settings, limit = self._settings, ask.max_tokens
        generation = Generation(
            ask=ask,
            answer=[],
            reasoning=thoughts(settings.reasoning_tokens),
            show_reasoning=settings.show_reasoning,
            cached_tokens=min(settings.cached_tokens, ask.input_tokens),
            usage=self._fault.variants[0] if self._fault and self._kind == "usage" else settings.usage,
        )
        if self._kind == "refusal":
            generation.answer, generation.finish, generation.refused = pieces(_REFUSAL), "refusal", True
            return generation
        if self._kind == "reasoning_only":
            generation.reasoning, generation.finish = thoughts(limit or _REASONING), "length"
            return generation
        text, generation.stopped_by = _until(self._text(ask), ask.stop)
        generation.answer = pieces(text)
        if generation.stopped_by is not None:
            generation.finish = "stop_sequence"
        if limit is not None and generation.output_tokens > limit:
            generation.reasoning = generation.reasoning[:limit]
            generation.answer = generation.answer[: limit - len(generation.reasoning)]
            generation.finish, generation.stopped_by = "length", None
        if self._fault is not None and self._kind == "content_filter":
            generation.answer = generation.answer[: self._fault.after]
            generation.finish, generation.stopped_by = "content_filter", None
        return generation

    def _text(self, ask: Ask) -> str:
        answer = self._settings.answer
        if callable(answer):
            answer = answer(self._document())
            if not isinstance(answer, str):
                raise TypeError(f"the simulator's answer function returned {type(answer).__name__}, not text")
        if answer is not None:
            return answer
        if ask.schema is not False:
            return instance(ask.schema)
        return prose(ask.prompt, f"{self._settings.seed} {ask.fingerprint}")

    def _bill(self, output_tokens: int, reasoning_tokens: int) -> None:
        received, generation = self.received, self._generation
        if not received.input_tokens and generation is not None:
            received.input_tokens = generation.ask.input_tokens
            received.cached_input_tokens = generation.cached_tokens
        received.output_tokens += output_tokens
        received.reasoning_tokens += reasoning_tokens

    def _token_delay_s(self) -> float:
        extra = self._fault.token_delay_s if self._fault is not None else 0.0
        return self._settings.token_delay_s + extra

    # -- the body ----------------------------------------------------------------------------------------------------

    async def body(self) -> AsyncIterator[bytes]:
        """The bytes after the head, block by block.

        Raises:
            Broken: the connection ends here, without the end that HTTP demands.
        """
        try:
            async for block in self._blocks():
                yield block
        except Broken:
            self.close("broken")
            raise
        else:
            self.close("complete")
        finally:
            self.close("left")

    def _blocks(self) -> AsyncIterator[bytes]:
        if self._content is not None:
            return self._document_blocks(self._content)
        generation = self._generation
        assert generation is not None
        if self._fault is not None and self._kind == "huge":
            return self._huge_blocks(generation, self._fault.size)
        if self._kind == "endless":
            return self._endless_blocks(generation)
        return self._event_blocks(generation)

    async def _document_blocks(self, content: bytes) -> AsyncIterator[bytes]:
        answered = self._generation is not None and self.received.status == 200
        fault = self._fault
        if self._generation is not None and answered and self._kind not in {"error_in_stream", "garbage_frame"}:
            self._bill(self._generation.output_tokens, len(self._generation.reasoning))
        if fault is not None and self._generation is not None and self._kind in {"cut", "stall"}:
            middle = len(content) * fault.after // max(self._generation.output_tokens, fault.after, 1)
            middle = min(middle, len(content) - 1)
            if middle:
                yield content[:middle]
            if self._kind == "cut":
                raise Broken("cut")
            await self._clock.sleep(fault.seconds)
            content = content[middle:]
        if fault is not None and self._kind == "framing":
            for block in _split(content, fault.variants):
                yield block
            return
        self.close("complete")  # before the last block: a client need not come back for the end
        if content:
            yield content

    async def _event_blocks(self, generation: Generation) -> AsyncIterator[bytes]:
        fault, delay_s = self._fault, self._token_delay_s()
        framer = Framer(fault.variants if fault is not None and self._kind == "framing" else ())
        due = fault.after if fault is not None and self._kind in _MIDWAY else None
        sent = turns = 0
        for frame in self._wire.frames(generation):
            if due is not None and (frame.role == "close" or (frame.role == "token" and sent == due)):
                due = None
                for block in await self._midway():
                    yield block
                if self._kind != "stall":
                    return
            if frame.role in {"token", "hidden"}:
                if delay_s and self.received.output_tokens:
                    await self._clock.sleep(delay_s)
                self._bill(1, 1 if frame.reasoning else 0)
                sent += frame.role == "token"
            if frame.role == "hidden" or (frame.role == "end" and self._kind == "no_done"):
                continue
            if frame.role == "end" and not framer.variants:
                self.close("complete")
            for block in framer.blocks(frame):
                yield block
            turns += 1
            if not turns % _TURN:
                await asyncio.sleep(0)
        for block in framer.rest():
            yield block

    async def _midway(self) -> list[bytes]:
        """What happens in the middle of a stream; the events that come of it."""
        fault = self._fault
        assert fault is not None
        if fault.kind == "cut":
            raise Broken("cut")
        if fault.kind == "stall":
            await self._clock.sleep(fault.seconds)
            return []
        if fault.kind == "error_in_stream":
            return [encoded(self._wire.error_frame(fault.message or ""))]
        event = "content_block_delta" if self._wire.name == "anthropic" else None
        return [encoded(Frame("close", '{"choices": [{"delta": {"content": "unfin', event))]

    async def _huge_blocks(self, generation: Generation, size: int) -> AsyncIterator[bytes]:
        """One string of ``size`` bytes where a token was due; nothing is billed."""
        before, after = _around(self._wire, generation)
        yield before
        filling, left = b"a" * _BLOCK, size - len(before) - len(after)
        while left > 0:
            yield filling if left >= _BLOCK else filling[:left]
            left -= _BLOCK
            await asyncio.sleep(0)
        self.close("complete")
        yield after

    async def _endless_blocks(self, generation: Generation) -> AsyncIterator[bytes]:
        """Good tokens for ever, or a JSON string that is never closed; only the tokens are billed."""
        if not generation.ask.stream:
            yield _around(self._wire, generation)[0]
        frames = list(self._wire.frames(generation))
        opening = [encoded(frame) for frame in frames if frame.role == "open"]
        tokens = [encoded(frame) for frame in frames if frame.role == "token"] or [b"data: {}\n\n"]
        if generation.ask.stream:
            yield b"".join(opening)
        delay_s = self._token_delay_s()
        while True:
            if not generation.ask.stream:
                yield b"a" * _BLOCK
                await self._pause(delay_s)
                continue
            for block in tokens:
                self._bill(1, 0)
                yield block
                await self._pause(delay_s)

    async def _pause(self, seconds: float) -> None:
        if seconds:
            await self._clock.sleep(seconds)
        else:
            await asyncio.sleep(0)


_MIDWAY = frozenset({"cut", "stall", "garbage_frame", "error_in_stream"})


def _until(text: str, stops: tuple[str, ...]) -> tuple[str, str | None]:
    """The text before the first stop sequence, and which one that was."""
    found = [(text.index(stop), stop) for stop in stops if stop in text]
    if not found:
        return text, None
    at, stop = min(found)
    return text[:at], stop


def _around(wire: Wire, generation: Generation) -> tuple[bytes, bytes]:
    """A good answer of one token, cut where its text is."""
    mark = "@@"
    generation.answer, generation.reasoning = [mark], []
    if generation.ask.stream:
        content = b"".join([encoded(frame) for frame in wire.frames(generation)])
    else:
        content = dumps(wire.whole(generation)).encode("utf-8", "replace")
    before, _, after = content.partition(mark.encode())
    return before, after


# -- framing ---------------------------------------------------------------------------------------------------------


def encoded(frame: Frame) -> bytes:
    """A server-sent event, written as most servers write it."""
    event = f"event: {frame.event}\n" if frame.event else ""
    return f"{event}data: {frame.data}\n\n".encode("utf-8", "replace")


class Framer:
    """Writes events in unusual but lawful ways (see `llmkit.testing.faults.FRAMINGS`)."""

    def __init__(self, variants: tuple[str, ...]) -> None:
        self.variants = frozenset(variants)
        self._held = bytearray()

    def blocks(self, frame: Frame) -> list[bytes]:
        if not self.variants:
            return [encoded(frame)]
        content = self._dressed(frame)
        if "glued" in self.variants:
            self._held += content
            return []
        return _split(content, tuple(self.variants))

    def rest(self) -> list[bytes]:
        return _split(bytes(self._held), tuple(self.variants)) if self._held else []

    def _dressed(self, frame: Frame) -> bytes:
        space = "" if "no_space" in self.variants else " "
        end = "\r\n" if "crlf" in self.variants else "\n"
        lines = [f"event:{space}{frame.event}"] if frame.event else []
        if "extra_fields" in self.variants:
            lines = ["id: 7", "retry: 3000", "unknown: field", *lines]
        if "comments" in self.variants:
            lines = [": keep-alive", "", ":", *lines]
        lines += [f"data:{space}{frame.data}", "", ""]
        return end.join(lines).encode("utf-8", "replace")


def _split(content: bytes, variants: tuple[str, ...]) -> list[bytes]:
    if "bytes" in variants:
        return [content[index : index + 1] for index in range(len(content))]
    if "halves" in variants:
        # Inside a character, where there is one of several bytes: that is where readers trip.
        inside = next((index for index, byte in enumerate(content) if byte >= 0xC0), len(content) // 2)
        return [block for block in (content[: inside + 1], content[inside + 1 :]) if block]
    return [content]


def parsed(body: bytes) -> Any:
    """The request's JSON; None where it is none."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None
