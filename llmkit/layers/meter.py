"""Book every attempt: what was asked of whom, how it ended, what it cost.

Innermost, so that an attempt whose reply a retry or a fallback throws away is booked like any other. The cost of a
call is the sum of its attempts, and this is the only place where tokens become money.
"""

from __future__ import annotations

import asyncio
from decimal import Decimal
from typing import TYPE_CHECKING

from llmkit.account import HoldRefused, Release
from llmkit.call import Attempt
from llmkit.errors import LLMKitError, ProviderError, StoreError
from llmkit.events import AttemptEnded, AttemptStarted, Held, Settled, Share, emit
from llmkit.models import prices, tokens
from llmkit.reply import Head, Outcome, Reply, Usage, settled

if TYPE_CHECKING:
    from llmkit.account import Hold
    from llmkit.call import Call
    from llmkit.clock import Clock
    from llmkit.ledger import Ledger
    from llmkit.pipeline import CallNext

__all__ = ["Meter"]


class Meter:
    """Writes one ledger row an attempt, before it is sent and when it ends."""

    def __init__(self, ledger: Ledger, clock: Clock) -> None:
        self._ledger = ledger
        self._clock = clock

    async def __call__(self, call: Call, call_next: CallNext) -> Reply:
        trail = call.trail
        trail.attempts_begun += 1
        number = trail.attempts_begun
        started_at, started = self._clock.time(), self._clock.now()
        trail.sent = False
        refused = False

        async def begun() -> Reply:
            nonlocal refused
            try:
                sending = await self._ledger.attempt_began(call, number, call.endpoint, started_at)
            except (HoldRefused, StoreError):
                refused = True  # it leaves no row, and its number is the next one's
                trail.attempts_begun -= 1
                raise
            if trail.listener is not None:
                if call.hold is not None:
                    emit(call, _held(call.hold))
                emit(call, AttemptStarted(call.request_id, call.endpoint.name, number))
            return await call_next(call if sending is None else call.to(on_send=sending))

        async def ended(outcome: Outcome) -> None:
            if refused:
                return
            if outcome.status != "complete":
                await asyncio.sleep(0)  # a closed socket is let go in the loop's next turn; booking must not hold it up
            attempt, cost = await self._booked(call, number, started_at, started, outcome)
            trail.sent = False
            trail.attempts.append(attempt)
            self._ledger.attempt_ended(call, attempt, cost)
            if trail.listener is not None:
                emit(call, AttemptEnded(call.request_id, attempt))
                if call.hold is not None:
                    emit(call, _settled(call.hold, attempt))

        return await settled(begun(), ended)

    async def _booked(
        self, call: Call, number: int, started_at: float, started: float, outcome: Outcome
    ) -> tuple[Attempt, prices.Cost | None]:
        endpoint, reply, error = call.endpoint, outcome.reply, outcome.error
        usage = await self._usage(call, outcome)
        head = reply.head if reply is not None else None
        await prices.ready(endpoint)
        cost = prices.cost(
            endpoint,
            usage or Usage(),
            at=started_at,
            model=head.model if head is not None else None,
            service_tier=head.service_tier if head is not None else None,
        )
        provider_error = error if isinstance(error, ProviderError) else None
        first_token = None
        if reply is not None and reply.time_to_first_token_s is not None:
            first_token = call.started + reply.time_to_first_token_s - started
        attempt = Attempt(
            number=number,
            provider=endpoint.provider,
            model=reply.model if reply is not None else endpoint.model,
            status=outcome.status,
            started=started_at,
            latency_s=self._clock.now() - started,
            time_to_first_token_s=first_token,
            usage=usage,
            cost_usd=cost.usd if cost is not None else None,
            error=type(error).__name__ if error is not None else None,
            message=error.message if isinstance(error, LLMKitError) else None,
            http_status=provider_error.status if provider_error else 200 if reply is not None else None,
            provider_request_id=(head or provider_error or Head()).provider_request_id,
            finish_reason=reply.finish_reason if reply is not None else None,
            maybe_billed=_maybe_billed(outcome, sent=call.trail.sent) and not prices.is_free(endpoint),
        )
        return attempt, cost

    async def _usage(self, call: Call, outcome: Outcome) -> Usage | None:
        """What the provider reported; where it did not, what can be counted here; None where nothing was answered."""
        # An answer without a word in it is an error before it is a reply, and billed all the same.
        reply = outcome.reply or (outcome.error.reply if isinstance(outcome.error, ProviderError) else None)
        if reply is None:
            return outcome.error.usage if isinstance(outcome.error, ProviderError) else None
        usage = reply.head.usage
        # Usage on a running stream counts what had been sent by then: of a stream that was broken off it is the floor.
        # And a count of zero, or one that is no number, comes from a server that does not count.
        broken = outcome.reply is not None and outcome.status != "complete"
        if usage is None or broken or not usage.input_tokens or not usage.output_tokens:
            text = "".join([chunk.text for chunk in reply.arrived]) + _unshown(reply.head)
            reasoning = "".join([chunk.reasoning for chunk in reply.arrived])
            counted = await tokens.counted(call.endpoint, call.said, text, reasoning, chunks=len(reply.arrived))
            usage = counted if usage is None else _larger(usage, counted)
        reply.usage = usage
        return usage


def _held(hold: Hold) -> Held:
    """What was set aside, as people read it."""
    usd, shares = prices.from_nanos, []
    for account, balance in zip(hold.accounts, hold.balances, strict=False):
        if account.limit_nanos is not None:
            limit, spent, held = map(usd, (account.limit_nanos, balance.settled_nanos, balance.held_nanos))
            shares.append(Share(account.scope, "usd", limit, spent, held))
        if account.limit_tokens is not None:
            counts = (account.limit_tokens, balance.settled_tokens, balance.held_tokens)
            shares.append(Share(account.scope, "tokens", *counts))
    return Held(hold.request_id, hold.number, usd(hold.nanos), hold.tokens, tuple(shares))


def _settled(hold: Hold, attempt: Attempt) -> Settled:
    """What became of it."""
    from llmkit.rows import hold_ended

    ending = hold_ended(hold, attempt)
    if isinstance(ending, Release):
        return Settled(hold.request_id, hold.number, Decimal(0), 0)
    usd = None if ending.nanos is None else prices.from_nanos(ending.nanos)
    return Settled(hold.request_id, hold.number, usd, ending.tokens)


def _unshown(head: Head) -> str:
    """Output that is billed and is not in the text."""
    functions = [call.get("function") or {} for call in head.tool_calls]
    named = "".join([f"{each.get('name', '')}{each.get('arguments', '')}" for each in functions])
    return named + (head.refusal or "")


def _larger(reported: Usage, counted: Usage) -> Usage:
    """The report, unless more than it knows of was sent or has arrived."""
    if reported.input_tokens and reported.output_tokens >= counted.output_tokens:
        return reported
    return Usage(
        input_tokens=reported.input_tokens or counted.input_tokens,
        output_tokens=max(reported.output_tokens, counted.output_tokens),
        cached_input_tokens=reported.cached_input_tokens,
        cache_write_tokens=reported.cache_write_tokens,
        cache_write_1h_tokens=reported.cache_write_1h_tokens,
        reasoning_tokens=reported.reasoning_tokens,
        estimated=True,
    )


def _maybe_billed(outcome: Outcome, *, sent: bool | None) -> bool:
    """Whether the provider may bill more than was seen. ``sent``: see `llmkit.call.Trail`."""
    if outcome.reply is not None:
        return outcome.status != "complete"
    if isinstance(outcome.error, ProviderError):
        return outcome.error.maybe_billed
    return sent is not False and not isinstance(outcome.error, LLMKitError)  # cancelled, or a foreign error
