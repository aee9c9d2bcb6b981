"""What comes back, and how it ends.

A `Reply` exists from its first token on and may still be arriving. It owns the ending: read to the end it is
``complete``, broken it is ``failed``, closed, cancelled or left it is ``aborted``. Whichever it is, the ending
happens exactly once: the source is closed, then the hooks run, innermost layer first, out of reach of cancellation.
"""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

from llmkit.errors import EmptyReply, LLMKitError, Refused, StreamBroken
from llmkit.redaction import tidy
from llmkit.shield import begun, finished, shielded

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from decimal import Decimal

    from llmkit.call import Attempt, Call
    from llmkit.clock import Clock
    from llmkit.portal import Portal

__all__ = ["NOTHING", "Chunk", "Head", "Outcome", "Reply", "Usage", "settled"]

log = logging.getLogger("llmkit")

_HOOK_FAILED = "a hook failed at the end of a reply; the reply is settled all the same"

Status = Literal["complete", "aborted", "failed"]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one attempt, by OpenTelemetry's rule: the parts are inside the totals.

    Attributes:
        input_tokens: all input, cached input included.
        output_tokens: all output, reasoning included.
        cached_input_tokens: read from the provider's prompt cache.
        cache_write_tokens: written to it, the ones below included; ``cache_write_1h_tokens`` are kept for an hour.
        reasoning_tokens: spent on reasoning.
        estimated: counted here, because the provider did not say.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    cached_input_tokens: int = 0
    cache_write_tokens: int = 0
    cache_write_1h_tokens: int = 0
    reasoning_tokens: int = 0
    estimated: bool = False

    @property
    def total_tokens(self) -> int:
        return self.input_tokens + self.output_tokens


class Chunk:
    """A piece of the reply as it arrived: ``text`` of the answer, ``reasoning`` beside it; either may be empty."""

    # Not a dataclass: one is made per token, and this __init__ costs half as much.
    __slots__ = ("reasoning", "text")

    def __init__(self, text: str, reasoning: str = "") -> None:
        self.text = text
        self.reasoning = reasoning

    def __repr__(self) -> str:
        return f"Chunk({self.text!r})" if not self.reasoning else f"Chunk({self.text!r}, reasoning={self.reasoning!r})"


Batches = "AsyncIterator[list[Chunk]]"  # chunks come in the groups in which the wire delivered them


class _Nothing:
    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[Chunk]:
        raise StopAsyncIteration


NOTHING = _Nothing()
"""The source of a reply that is all there, and whole, from the beginning."""


class Head:
    """What the wire says about a reply, beside its text; the wire format fills it while chunks arrive."""

    __slots__ = ("finish_reason", "model", "provider_request_id", "refusal", "service_tier", "tool_calls", "usage")

    def __init__(self) -> None:
        self.model: str | None = None
        self.provider_request_id: str | None = None
        self.finish_reason: str | None = None
        self.refusal: str | None = None
        self.service_tier: str | None = None
        self.tool_calls: list[dict[str, Any]] = []
        self.usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """How it ended, as hooks are told. ``reply`` is None where it never began, and in a reply's own `Reply.outcome`."""

    status: Status
    error: BaseException | None = None
    reply: Reply | None = None


_COMPLETE = Outcome("complete")

Hook = "Callable[[Outcome], Awaitable[None]]"


class Reply:
    """The answer to one call, from its first token on.

    ``async for chunk in reply`` replays what has arrived and then waits for more; any number of readers may do so.
    ``await reply.read()`` drains it. A reply from `llmkit.Client` can be read without ``await`` as well:
    ``for chunk in reply``, ``with client.stream(…) as reply``.

    Attributes:
        request_id: the call's id, and its key in the ledger.
        model, provider: who really answered.
        source: ``provider``, ``simulated``, ``degraded``, ``cache`` or ``coalesced``.
        text: what has arrived of the answer. ``reasoning``: the same of the model's reasoning, where it is shown.
        usage: tokens of the attempt that answered; None until the end is seen.
        cost_usd: USD of the whole call, failed attempts included; None where the price is unknown.
        saved_usd: what the answer had cost when it was asked for; None where it was asked for now, or nobody knows.
        finish_reason: the provider's word (``stop``, ``length``, …), or ``max_cost`` or ``max_tokens`` where a cap cut it.
        latency_s, time_to_first_token_s: seconds from the start of the call, waits included.
        attempts: every attempt made, failed ones included.
        skipped: links that were not used, with the reason.
        outcome: None while it is arriving.
    """

    # What most replies never change costs nothing here.
    outcome: Outcome | None = None
    usage: Usage | None = None
    cut: str | None = None
    latency_s: float | None = None
    _arrived: list[Chunk] | None = None
    _reader: asyncio.Task[Any] | None = None
    _aborting = False
    _ending = False
    _text: str | None = None
    _portal: Portal | None = None
    _heard: Callable[[list[Chunk]], object] | None = None
    _wanted: Callable[[], bool] | None = None
    _reading_on: asyncio.Task[None] | None = None
    _left = False
    _data: Any = None
    _fitting: str | None = None

    def __init__(
        self,
        call: Call,
        source: AsyncIterator[list[Chunk]],
        *,
        head: Head,
        clock: Clock,
        first: list[Chunk] | None = None,
        provider: str = "",
        where: str = "provider",
        close: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self.call = call
        self.head = head
        self.provider = provider
        self.source = where
        self.time_to_first_token_s: float | None = clock.now() - call.started
        self._clock = clock
        self._batches = source
        self._close = close
        self._chunks: list[Chunk] = first or []
        self._hooks: list[Callable[[Outcome], Awaitable[None]]] = []
        self._waiters: list[asyncio.Future[None]] = []
        self._loop = asyncio.get_running_loop()

    # -- what it says ------------------------------------------------------------------------------------------------

    @property
    def request_id(self) -> str:
        return self.call.request_id

    @property
    def model(self) -> str:
        if self.head.model:
            return self.head.model
        return self.call.link.endpoint.model if self.call.link else self.call.model

    @property
    def finish_reason(self) -> str | None:
        return self.cut or self.head.finish_reason

    @property
    def text(self) -> str:
        if self._text is not None:
            return self._text
        text = "".join([chunk.text for chunk in self._chunks])
        if self.outcome is not None:
            self._text = text
        return text

    @property
    def reasoning(self) -> str:
        return "".join([chunk.reasoning for chunk in self._chunks])

    @property
    def cost_usd(self) -> Decimal | None:
        return self.call.trail.spent

    @property
    def saved_usd(self) -> Decimal | None:
        return self.call.trail.saved

    @property
    def attempts(self) -> tuple[Attempt, ...]:
        return tuple(self.call.trail.attempts)

    @property
    def skipped(self) -> tuple[Any, ...]:
        return tuple(self.call.trail.skipped)

    @property
    def data(self) -> Any:
        """What the answer says in the shape of its call's schema: an instance of the class, or plain JSON values.

        Raises:
            ValueError: there was no schema, or the answer does not fit it.
        """
        if self._fitting is not None:
            return self._data
        if self.call.schema is None:
            raise ValueError("no schema was asked for: schema=… or --schema; reply.json() parses any JSON")
        raise ValueError("the answer does not fit its schema; reply.text is what it says")

    def fitted(self, data: Any, text: str) -> None:
        """It fits its schema, and says ``data``; ``text`` is the JSON of that alone."""
        self._data, self._fitting = data, text

    @property
    def as_json(self) -> str:
        """The JSON that was checked, without what stood round it; the text as it is where there was no schema."""
        return self.text if self._fitting is None else self._fitting

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """What its readers have been given so far."""
        return tuple(self._chunks)

    def json(self) -> Any:
        """The answer parsed as JSON; a Markdown fence around it is taken off. Under a schema, what was checked.

        Raises:
            ValueError: when the text is not JSON.
        """
        text = self.as_json.strip()
        if text.startswith("```") and text.endswith("```"):
            text = text.removesuffix("```").split("\n", 1)[-1]
        return json.loads(text)

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        text = self.text
        shown = text if len(text) <= 60 else text[:57] + "…"
        state = self.outcome.status if self.outcome else "arriving"
        return f"<Reply {state} {self.model} {shown!r}>"

    def _repr_markdown_(self) -> str:
        from llmkit.markdown import harmless

        return harmless(self.text)

    # -- reading -----------------------------------------------------------------------------------------------------

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        index = 0
        while True:
            chunks = self._chunks
            while index < len(chunks):
                chunk = chunks[index]
                index += 1
                yield chunk
            if self.outcome is not None:
                if self.outcome.status == "failed" and self.outcome.error is not None:
                    raise self.outcome.error
                return
            await self._pull()

    async def read(self) -> str:
        """Wait for the end and return the whole text.

        Raises:
            LLMKitError: what broke it; ``error.reply`` holds what had arrived.
        """
        if self._batches is NOTHING and not self._ending:
            await self._end("complete")
        while self.outcome is None:
            await self._pull()
        if self.outcome.status == "failed" and self.outcome.error is not None:
            raise self.outcome.error
        return self.text

    def through(self, transform: Callable[[AsyncIterator[list[Chunk]]], AsyncIterator[list[Chunk]]]) -> Reply:
        """Let ``transform`` see, change, hold back or end what is still to come, batch by batch.

        What had arrived before (the first token) goes through it as well. What comes out is what readers see; what
        went in is what is paid for (`arrived`).
        """
        first, self._chunks = self._chunks, []
        if self._arrived is None:
            self._arrived = list(first)
            self._batches = self._noted(self._batches)
        self._batches = transform(_prepend(first, self._batches) if first else self._batches)
        return self

    async def _noted(self, batches: AsyncIterator[list[Chunk]]) -> AsyncIterator[list[Chunk]]:
        assert self._arrived is not None
        async for batch in batches:
            self._arrived += batch
            yield batch

    @property
    def arrived(self) -> list[Chunk]:
        """What the provider has sent so far, whatever became of it on its way up."""
        return self._chunks if self._arrived is None else self._arrived

    def watched(self, watch: Callable[[AsyncIterator[list[Chunk]]], AsyncIterator[list[Chunk]]]) -> Reply:
        """Let ``watch`` stand round every wait for more, without seeing what had arrived before."""
        self._batches = watch(self._batches)
        return self

    async def _pull(self) -> None:
        """Wait for one more batch, or for the end; failures are in the outcome, cancellation is raised."""
        reading_on = self._reading_on
        if (
            self._reader is not None
            or self._ending
            or (reading_on is not None and reading_on is not asyncio.current_task())
        ):
            await self._wait()
            return
        self._reader = asyncio.current_task()
        try:
            batch = await self._batches.__anext__()
        except StopAsyncIteration:
            await self._finish_reading()
        except asyncio.CancelledError:
            if self._aborting and self._reader is not None and self._reader.uncancel() == 0:
                await self._end("aborted")
            else:
                await self._end("aborted", asyncio.CancelledError())
                raise
        except LLMKitError as error:
            await self._end("failed", error)
        except BaseException as error:
            await self._end("failed", error)
            raise
        else:
            self._chunks += batch
            if self._heard is not None:
                self._heard(batch)
        finally:
            self._reader = None
            if self._waiters:
                self._wake()

    async def _wait(self) -> None:
        """Wait until somebody else has read a batch, or the end."""
        waiter = self._loop.create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            # Whoever reads it in the background is not cancelled with its reader.
            if self._reading_on not in {None, asyncio.current_task()} and not self._aborting and not self._leave():
                await self.abort()
            raise

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def _finish_reading(self) -> None:
        """The source is exhausted: a whole reply, unless it holds nothing to show."""
        if self.cut is not None:
            await self._end("aborted")
        elif error := self._emptiness():
            await self._end("failed", error)
        else:
            await self._end("complete")

    def _emptiness(self) -> LLMKitError | None:
        """The error that a well-ended stream without an answer is, if this one is."""
        head = self.head
        refused = head.refusal or head.finish_reason in {"content_filter", "refusal"}
        if not refused and (head.tool_calls or any(chunk.text for chunk in self.arrived)):
            return None
        fields: dict[str, Any] = {
            "provider": self.provider,
            "model": self.model,
            "provider_request_id": head.provider_request_id,
        }
        if refused:
            reason = head.refusal or "stopped by the provider's content filter"
            return Refused(f"{self.provider}:{self.model} refused: {tidy(reason)}", reason=reason, **fields)
        reasoning = head.usage.reasoning_tokens if head.usage else None
        message = f"{self.provider}:{self.model} returned no text"
        if reasoning or any(chunk.reasoning for chunk in self.arrived):
            message += f": {f'{reasoning} tokens' if reasoning else 'the tokens'} went into reasoning"
            if head.finish_reason == "length":
                message += " and the limit was reached"
        elif head.finish_reason == "length":
            message += ": the limit of output tokens was reached before there was any"
        else:
            message += f" (finish reason: {head.finish_reason or 'none'})"
            fields["next_step"] = "run it again, say more in the prompt, or use another model (-m)"  # no limit was met
        return EmptyReply(message, reasoning_tokens=reasoning, **fields)

    # -- sharing -----------------------------------------------------------------------------------------------------

    def share(self, wanted: Callable[[], bool]) -> None:
        """Let others follow: while ``wanted()``, a reader who closes it only leaves it."""
        self._wanted = wanted

    def read_on(self, heard: Callable[[list[Chunk]], object]) -> None:
        """Read it in the background from now on, so that it arrives however slow its own reader is.

        ``heard`` gets what has arrived, at once, and each batch as it arrives.
        """
        if self._heard is not None or self.outcome is not None:
            return
        self._heard = heard
        if self._chunks:
            heard(list(self._chunks))
        if not self._ending:
            self._reading_on = self._loop.create_task(self._read_to_the_end())
            _keep(self._reading_on)

    @property
    def is_read_on(self) -> bool:
        """Whether what arrives is handed on."""
        return self._heard is not None

    async def _read_to_the_end(self) -> None:
        try:
            while self.outcome is None:
                await self._pull()
        except Exception:  # it is in the outcome
            log.debug("a reply that others follow broke", exc_info=True)
        finally:
            self._reading_on = None
            self._wake()

    def _leave(self) -> bool:
        """Whether others go on with it when its own reader has left it; if so, from now on it is for them alone."""
        self._left = self._wanted is not None and self._wanted() and self._reading_on is not None
        return self._left

    @property
    def is_left(self) -> bool:
        """Whether its own reader has left it, so that it arrives for followers alone."""
        return self._left and self.outcome is None

    def unwanted(self) -> None:
        """Nobody follows it any longer: if its own reader has left it before, it ends now."""
        if self.is_left and not self._ending and self._wanted is not None and not self._wanted():
            _keep(self._loop.create_task(self.abort()))

    # -- ending ------------------------------------------------------------------------------------------------------

    async def aclose(self) -> None:
        """Stop it: the connection is closed, what was spent is booked, what had arrived stays. Harmless when ended.

        While identical calls follow it, it is only left: for them it is read on, and it ends when that does.
        """
        if self.outcome is None and not self._leave():
            await self.abort()

    async def abort(self) -> None:
        """`aclose`, whoever follows it."""
        if self.outcome is not None:
            return
        if self._reader is not None and self._reader is not asyncio.current_task() and not self._ending:
            self._aborting = True
            self._reader.cancel()
        else:
            await self._end("aborted")
        while self.outcome is None:
            await self._pull()

    async def at_end(self, hook: Callable[[Outcome], Awaitable[None]]) -> None:
        """Run ``hook`` when the reply ends, after the hooks of the layers below; at once if it has ended."""
        if self.outcome is None:
            self._hooks.append(hook)
        else:
            await _run(hook, Outcome(self.outcome.status, self.outcome.error, self))

    def fail_soon(self, error: LLMKitError) -> None:
        """End it with ``error`` although nobody reads; for a layer that finds out between two reads."""
        _keep(self._loop.create_task(self._end("failed", error)))

    async def _end(self, status: Status, error: BaseException | None = None) -> None:
        if self._ending:
            return
        self._ending = True
        if isinstance(error, LLMKitError):
            if isinstance(error, StreamBroken) and not error.text_so_far:
                error.text_so_far = self.text
            error.reply = self
            error.request_id = self.request_id
        left = begun(self._settle(Outcome(status, error, self)))
        if left is not None:
            await finished(left)

    async def _settle(self, outcome: Outcome) -> None:
        if self._close is not None:
            try:
                await self._close()
            except Exception:
                log.exception("closing a connection failed; the call is settled all the same")
        self.latency_s = self._clock.now() - self.call.started
        for hook in self._hooks:
            try:
                await hook(outcome)
            except Exception:
                log.exception(_HOOK_FAILED)
        if isinstance(outcome.error, LLMKitError):
            outcome.error.spent = self.cost_usd
        self._hooks.clear()  # a reply that is kept keeps no client alive
        if self._close is not None:
            self._close = None
        if self._wanted is not None or self._heard is not None:
            self._heard = self._wanted = None
        # Without the reply: a ring of the two would wait for the garbage collector, whose time every call would pay.
        self.outcome = _COMPLETE if outcome.status == "complete" else Outcome(outcome.status, outcome.error)
        if self._waiters:
            self._wake()

    def __del__(self) -> None:
        # A reader who left without closing: `break` in an `async for`, or a variable overwritten.
        if self.outcome is None and not self._ending and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_abandon, self)

    # -- the same, without await -------------------------------------------------------------------------------------

    def _bridge(self) -> Portal:
        if self._portal is None:
            raise TypeError("this reply belongs to an AsyncClient: use `async for`, `async with`, `await reply.read()`")
        return self._portal

    def __iter__(self) -> Iterator[Chunk]:
        bridge = self._bridge()
        return bridge.iterate(self) if self.outcome is None else self._again()

    def _again(self) -> Iterator[Chunk]:
        """What an ended reply holds, which needs no loop: that of its client may be gone."""
        yield from self._chunks
        if self.outcome is not None and self.outcome.status == "failed" and self.outcome.error is not None:
            raise self.outcome.error

    def close(self) -> None:
        """`aclose`, from a thread that has no event loop."""
        bridge = self._bridge()
        if self.outcome is None:
            bridge.run(self.aclose())

    def __enter__(self) -> Self:
        self._bridge()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


def _abandon(reply: Reply) -> None:
    _keep(reply._loop.create_task(reply.aclose()))


_ENDINGS: set[asyncio.Task[None]] = set()


def _keep(task: asyncio.Task[None]) -> None:
    _ENDINGS.add(task)  # a loop keeps only weak references to its tasks
    task.add_done_callback(_ENDINGS.discard)


async def _prepend(first: list[Chunk], rest: AsyncIterator[list[Chunk]]) -> AsyncIterator[list[Chunk]]:
    yield first
    async for batch in rest:
        yield batch


async def _run(hook: Callable[[Outcome], Awaitable[None]], outcome: Outcome) -> None:
    try:
        await hook(outcome)
    except Exception:
        log.exception(_HOOK_FAILED)


async def settled(waiting: Awaitable[Reply], hook: Callable[[Outcome], Awaitable[None]]) -> Reply:
    """Await a reply, and run ``hook`` exactly once: when the reply ends, or if it never begins."""
    try:
        reply = await waiting
    except asyncio.CancelledError as error:
        # A time limit above cancels with the error that it will raise: for a layer below, that is how it ended.
        cause = error.args[0] if error.args else None
        await shielded(
            _run(hook, Outcome("failed", cause) if isinstance(cause, LLMKitError) else Outcome("aborted", error))
        )
        raise
    except BaseException as error:
        await shielded(_run(hook, Outcome("failed", error)))
        raise
    if reply.outcome is None:
        reply._hooks.append(hook)
    else:
        await reply.at_end(hook)
    return reply
