"""The guard of a single request: refuse what could break its cap, and cut what reaches it while it runs.

Caps are kept per attempt, which is where money is spent: an attempt may cost what the cap leaves after the attempts
before it. That is why the layer stands below retry and breaker and not at the top of the chain.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from decimal import Decimal
from typing import TYPE_CHECKING, Any, NamedTuple

from llmkit.errors import BudgetExceeded, PriceUnknown
from llmkit.models import prices, tokens, windows

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from llmkit.call import Call
    from llmkit.clock import Clock
    from llmkit.endpoint import Endpoint
    from llmkit.pipeline import CallNext
    from llmkit.reply import Chunk, Reply

__all__ = ["Budget"]

# No model of today gives more output than this, so a cap that affords it needs no limit on the wire.
MOST_OUTPUT = 131_072
ROOMY = 4_096  # tokens; a longer prompt is looked at each time


@dataclass(frozen=True, slots=True)
class _Allowance:
    """Output tokens an attempt may produce, and which cap says so (``max_cost`` or ``max_tokens``)."""

    tokens: int
    cap: str


class _Harmless(NamedTuple):
    """A prompt of up to ``tokens`` was found unable to reach ``cap`` at this endpoint, at prices of this minute."""

    endpoint: Endpoint
    cap: Decimal
    wanted: int | None
    minute: float
    tokens: int


class Budget:
    """Keeps ``call.max_cost_usd``, ``call.max_total_tokens``, a link's ``max_cost_usd`` and ``params.max_tokens``."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._harmless: dict[int, _Harmless] = {}

    async def __call__(self, call: Call, call_next: CallNext) -> Reply:
        allowance = await self._allowance(call)
        if allowance is None:
            return await call_next(call)
        wanted = call.params.max_tokens
        if wanted is None:
            call = self._limited(call, allowance)
        reply = await call_next(call)
        if not reply.call.stream:
            return reply
        return reply.watched(_Cutter(reply, call, allowance).cut)

    async def _allowance(self, call: Call) -> _Allowance | None:
        """How much output this attempt may produce; None where nothing limits it.

        Raises:
            BudgetExceeded, PriceUnknown: before anything is sent.
        """
        by_cost, by_tokens, wanted = await self._by_cost(call), await self._by_tokens(call), call.params.max_tokens
        caps = [cap for cap in (by_cost, by_tokens, wanted and _Allowance(wanted, "max_tokens")) if cap]
        return min(caps, key=lambda allowance: allowance.tokens) if caps else None

    async def _by_cost(self, call: Call) -> _Allowance | None:
        endpoint, link = call.endpoint, call.link
        cap, scope = call.max_cost_usd, "request"
        if link is not None and link.max_cost_usd is not None and (cap is None or link.max_cost_usd < cap):
            cap, scope = link.max_cost_usd, "link"
        if cap is None or prices.is_free(endpoint):
            return None
        at, extra, wanted = self._clock.time(), call.params.extra, call.params.max_tokens
        bound = tokens.upper_bound(call.messages, model=endpoint.model, extra=extra)
        plain = not extra and not call.trail.attempts and all(isinstance(m.content, str) for m in call.messages)
        if plain and self._is_harmless(endpoint, cap, wanted, at, bound):
            return None
        await prices.ready(endpoint)
        if not prices.is_known(endpoint, at=at):
            if call.max_cost_is_default and scope == "request":
                return None  # nobody asked for this cap; the reply says that its cost is unknown
            message = f"the price of {endpoint.name} is unknown, so a cap of ${cap} could not be kept"
            raise PriceUnknown(message, model=endpoint.name)
        left = cap - (call.trail.spent or Decimal(0))
        terms: dict[str, Any] = {
            "at": at,
            "service_tier": extra.get("service_tier") if extra else None,
            "cache_writes": prices.asks_for_cache(call.messages, extra),
        }
        # The cheap bound first: most calls are far below their cap, and then nothing need be counted.
        output = wanted or windows.max_output(endpoint) or MOST_OUTPUT
        roomy = max(bound, ROOMY)
        if plain and _fits(prices.worst_case(endpoint, roomy, output, **terms), left):
            self._harmless[id(endpoint)] = _Harmless(endpoint, cap, wanted, at // 60, roomy)
            return None
        if _fits(prices.worst_case(endpoint, bound, output, **terms), left):
            return None
        counted = await tokens.safe_count(endpoint, call.messages, extra=extra)
        affordable = prices.affordable_output(endpoint, counted, left, **terms)
        least = wanted or 1
        if affordable is None or affordable < least:
            needed = prices.worst_case(endpoint, counted, least, **terms) or Decimal(0)
            raise BudgetExceeded(
                f"{endpoint.name} could cost ${needed:.6f} for {counted} tokens in and {least} out; "
                f"the {'link' if scope == 'link' else 'request'}'s cap leaves ${max(left, Decimal(0)):.6f} of ${cap}",
                scope=scope,
                limit=cap,
                needed=needed,
                spent_before=cap - left,
            )
        return _Allowance(affordable, "max_cost")

    def _is_harmless(self, endpoint: Endpoint, cap: Decimal, wanted: int | None, at: float, bound: int) -> bool:
        known = self._harmless.get(id(endpoint))
        return (
            known is not None
            and known.endpoint is endpoint
            and known.cap == cap
            and known.wanted == wanted
            and known.minute == at // 60
            and bound <= known.tokens
        )

    async def _by_tokens(self, call: Call) -> _Allowance | None:
        cap = call.max_total_tokens
        if cap is None:
            return None
        extra = call.params.extra
        counted = tokens.upper_bound(call.messages, model=call.endpoint.model, extra=extra)
        least = call.params.max_tokens or 1
        left = cap - call.trail.tokens
        if counted + least > left:
            counted = await tokens.safe_count(call.endpoint, call.messages, extra=extra)
        if counted + least > left:
            raise BudgetExceeded(
                f"{counted} tokens in and {least} out do not fit into the {left} tokens that the request's cap of {cap} leaves",
                scope="request",
                unit="tokens",
                limit=cap,
                needed=counted + least,
                spent_before=call.trail.tokens,
            )
        return _Allowance(left - counted, "max_tokens")

    @staticmethod
    def _limited(call: Call, allowance: _Allowance) -> Call:
        """Tell the provider its limit; or, where it might refuse that number as too high, stream and cut."""
        most = windows.max_output(call.endpoint)
        if most is not None:
            if allowance.tokens >= most:
                return call
        elif allowance.tokens > 4096:  # more than every server takes without being asked for its limit
            return call.to(stream=True)
        return call.to(params=replace(call.params, max_tokens=allowance.tokens))


def _fits(worst: Decimal | None, left: Decimal) -> bool:
    return worst is not None and worst <= left


class _Cutter:
    """Ends a stream that reaches its allowance, for servers that do not keep the limit they were sent.

    Exact counting is dear, so it is done only when the cheap upper bound of what has arrived since the last exact
    count (its UTF-8 bytes) could reach what is left.
    """

    def __init__(self, reply: Reply, call: Call, allowance: _Allowance) -> None:
        self._reply = reply
        self._endpoint = call.endpoint
        self._allowance = allowance
        self._pending: list[str] = []
        self._pending_bytes = 0
        self._counted = 0
        self._chunks = 0

    async def cut(self, batches: AsyncIterator[list[Chunk]]) -> AsyncIterator[list[Chunk]]:
        self._note(self._reply.arrived)
        async for batch in batches:
            yield batch
            self._note(batch)
            if self._counted + self._pending_bytes > self._allowance.tokens and await self._reached():
                self._reply.cut = self._allowance.cap
                return

    def _note(self, batch: list[Chunk]) -> None:
        for chunk in batch:
            self._pending.append(chunk.reasoning)
            self._pending.append(chunk.text)
            self._pending_bytes += len(chunk.text.encode("utf-8", "replace"))
            self._pending_bytes += len(chunk.reasoning.encode("utf-8", "replace"))
        self._chunks += len(batch)

    async def _reached(self) -> bool:
        count = await tokens.count(self._endpoint, "".join(self._pending))
        self._counted += count.tokens
        self._pending.clear()
        self._pending_bytes = 0
        if count.exact or self._allowance.cap == "max_cost":
            return self._counted > self._allowance.tokens
        # Our estimate may be above the server's own count; a chunk is at least a token, so that is certain.
        return self._chunks > self._allowance.tokens
