"""Refuse what could break a cap or a budget, set aside what an attempt may cost, and cut what reaches its share.

Caps and budgets are kept per attempt, which is where money is spent: an attempt may cost what the cap leaves after the
attempts before it, and its worst case is held in every account that it counts towards (`llmkit.account`) from before it
is sent until it is settled. That is why the layer stands below retry and breaker and not at the top of the chain.

A hold is taken with the row of the attempt, so below this layer; a hold that does not fit comes back up as
`HoldRefused`, before anything was sent.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from llmkit.account import NONE_AHEAD, HoldRefused, Provision
from llmkit.allowance import Allowance, Cutter
from llmkit.errors import BudgetExceeded, CallRejected, PriceUnknown
from llmkit.events import BudgetWarning, emit
from llmkit.line import Place
from llmkit.models import prices, tokens, windows
from llmkit.money import amount
from llmkit.refusal import exactly, exceeded, full, moment, no_room, scope_of, words
from llmkit.worstcase import MOST_OUTPUT, WorstCase

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from llmkit.account import Account, Balance, Hold, Sums
    from llmkit.budgets import Budgets
    from llmkit.call import Call
    from llmkit.clock import Clock
    from llmkit.endpoint import Endpoint
    from llmkit.pipeline import CallNext
    from llmkit.reply import Outcome, Reply

__all__ = ["Budget"]

ROOMY = 4_096  # tokens; a longer prompt is looked at each time
MOST_WARNINGS = 10_000


class _Harmless(NamedTuple):
    """A prompt of up to ``tokens`` was found unable to reach ``cap`` at this endpoint, at prices of this minute."""

    endpoint: Endpoint
    cap: Decimal
    wanted: int | None
    minute: float
    tokens: int


class Accounting(Protocol):
    """What this layer asks of the ledger."""

    @property
    def owner(self) -> str:
        """Who holds."""

    async def reap(self) -> None:
        """End the holds of those who have died."""

    async def balances(self, accounts: Sequence[Account]) -> list[Balance]:
        """What each has counted."""

    def try_hold(self, hold: Hold, balances: Sequence[Balance]) -> None:
        """Raise `HoldRefused` where ``hold`` does not fit accounts of these ``balances``; nothing is held."""


class Budget:
    """Keeps ``call.max_cost_usd``, ``call.max_total_tokens``, a link's ``max_cost_usd`` and ``params.max_tokens``.

    And ``budgets``, where there are some; ``ledger`` keeps their accounts.
    """

    def __init__(self, clock: Clock, budgets: Budgets | None = None, ledger: Accounting | None = None) -> None:
        self._clock = clock
        self._budgets = budgets
        self._ledger = ledger
        self._harmless: dict[int, _Harmless] = {}
        self._warned: dict[tuple[str, str], float] = {}  # of which account and unit, at which share of the limit

    async def __call__(self, call: Call, call_next: CallNext) -> Reply:
        allowance = await self._allowance(call)
        case = await self._case(call, allowance)
        if case is None:
            return await self._sent(call, call_next, allowance)
        return await self._within(call, call_next, case)

    async def plan(self, call: Call, ahead: Mapping[str, Sums] | None = None) -> Provision:
        """What would be held for the first attempt of ``call``, and whether that fits. Nothing is held, sent or waited for.

        Args:
            ahead: what will have been settled by then in each account, by its key, beside what has been.
        """
        warnings = len(call.trail.warnings)
        case, refusal = await self._case_or_refusal(call)
        accounts = case.accounts
        before = await self._balances(accounts, ahead or {})
        held: HoldRefused | None = None
        while refusal is None and held is None and (refused := self._refused(case, before)) is not None:
            try:
                held = None if await self._fits_otherwise(call, case, refused) else refused
            except CallRejected as error:
                refusal = error
        waits = None if held is None else full(held)
        said = tuple(call.trail.warnings[warnings:])
        return Provision(*case.size(), accounts, tuple(before), refusal, waits, said)

    async def _case_or_refusal(self, call: Call) -> tuple[WorstCase, CallRejected | None]:
        """What is to be held, and the refusal that comes before anything could be."""
        allowance: Allowance | None = None
        accounts: tuple[Account, ...] = ()
        refusal: CallRejected | None = None
        try:
            allowance = await self._allowance(call)
            case = await self._case(call, allowance)
            if case is not None:
                return case, None
        except CallRejected as error:
            refusal = error
            if self._budgets is not None:
                accounts = self._budgets.of(call, call.endpoint).accounts
        await prices.ready(call.endpoint)
        return WorstCase(call, allowance, accounts, self._clock.time()), refusal

    def _refused(self, case: WorstCase, before: Sequence[Balance]) -> HoldRefused | None:
        """What the accounts would say to the hold."""
        if not case.accounts or self._ledger is None:
            return None
        try:
            self._ledger.try_hold(case.hold(self._ledger.owner), before)
        except HoldRefused as refused:
            return refused
        return None

    async def _balances(self, accounts: tuple[Account, ...], ahead: Mapping[str, Sums]) -> list[Balance]:
        if self._ledger is None or not accounts:
            return []
        return [
            balance._replace(
                settled_nanos=balance.settled_nanos + ahead.get(account.key, NONE_AHEAD).nanos,
                settled_tokens=balance.settled_tokens + ahead.get(account.key, NONE_AHEAD).tokens,
            )
            for account, balance in zip(accounts, await self._ledger.balances(accounts), strict=True)
        ]

    async def _sent(self, call: Call, call_next: CallNext, allowance: Allowance | None) -> Reply:
        if allowance is None:
            return await call_next(call)
        wanted = call.params.max_tokens
        if wanted is None:
            call = self._limited(call, allowance)
        reply = await call_next(call)
        if not reply.call.stream:
            return reply
        return reply.watched(Cutter(reply, call, allowance).cut)

    # -- budgets -----------------------------------------------------------------------------------------------------

    async def _case(self, call: Call, allowance: Allowance | None) -> WorstCase | None:
        """What is to be held for an attempt; None where no account is concerned.

        Raises:
            PriceUnknown: somebody has set a limit in USD, and what it costs is not known.
        """
        if self._budgets is None:
            return None
        scopes = self._budgets.of(call, call.endpoint)
        if not scopes.accounts:
            return None
        await prices.ready(call.endpoint)
        case = WorstCase(call, allowance, scopes.accounts, self._clock.time())
        if scopes.usd and not prices.is_free(call.endpoint) and case.nanos() is None:
            if scopes.usd_set:
                name = call.endpoint.name
                raise PriceUnknown(f"the price of {name} is unknown, so a budget in USD could not be kept", model=name)
            if not scopes.tokens:
                return None  # nobody asked for these limits
        return case

    async def _within(self, call: Call, call_next: CallNext, case: WorstCase) -> Reply:
        """Send it with its worst case held; wait, shrink, or refuse where that does not fit."""
        budgets, ledger = self._budgets, self._ledger
        assert budgets is not None
        assert ledger is not None
        place = Place(self._clock, budgets.line, ledger.reap, call)
        try:
            await place.stand_behind_others(case.accounts)
            while True:
                hold = case.hold(ledger.owner)
                try:
                    reply = await self._sent(call.to(hold=hold), call_next, case.allowance)
                except HoldRefused as refused:
                    await self._make_room(call, case, place, refused)
                else:
                    await self._watch(reply, hold)
                    return reply
                finally:
                    if hold.balances:
                        self._warn(call, hold, 0, 0)
        finally:
            budgets.line.leave(call.request_id)

    async def _make_room(self, call: Call, case: WorstCase, place: Place, refused: HoldRefused) -> None:
        """Find out how it may fit, and return when it is worth another try.

        Raises:
            BudgetExceeded: it will not.
        """
        assert self._budgets is not None
        if call.trail.listener is not None and not place.waited_s:
            emit(call, no_room(call, refused, case.needed(refused.unit)))
        if await self._fits_otherwise(call, case, refused):
            return
        if not await place.wait(refused.account.key, full(refused)):
            name, needed = call.endpoint.name, case.needed(refused.unit)
            raise exceeded(refused, name, needed, self._budgets.zone, waited_s=place.waited_s)

    async def _fits_otherwise(self, call: Call, case: WorstCase, refused: HoldRefused) -> bool:
        """Make the case smaller, or lift the limit, as far as that may be; False: it would fit but for what others hold.

        Raises:
            BudgetExceeded: it will not fit.
        """
        assert self._budgets is not None
        if self._budgets.settings.at_limit == "warn":
            self._go_on_without(call, case, refused)
        elif await case.count():
            pass  # the count is below the bound that was held first
        elif refused.settled + case.needed(refused.unit) > refused.limit:
            self._shrink(call, case, refused)
        else:
            return False
        return True

    def _shrink(self, call: Call, case: WorstCase, refused: HoldRefused) -> None:
        """Let the answer be as long as the account allows, or refuse the call.

        Raises:
            BudgetExceeded: not even the shortest answer fits; or there is a cheaper link to be used instead.
        """
        assert self._budgets is not None
        left = refused.limit - refused.settled
        downgrade = self._budgets.settings.at_limit == "downgrade" and _is_followed(call)
        affordable = 0 if downgrade else case.affordable(refused.unit, left)
        if affordable < case.least:
            shortest = None if downgrade else case.least  # with another link to take, it is the whole that does not fit
            name, needed = call.endpoint.name, case.needed(refused.unit, shortest)
            raise exceeded(refused, name, needed, self._budgets.zone, downgrade=downgrade)
        # An answer may pass its allowance by what is on its way while it is cut, so that much is not told.
        margin = 0 if call.params.max_tokens is not None else min(16, affordable // 16)
        cap = "max_cost" if refused.unit == "usd" else "max_tokens"
        case.allowance = Allowance(affordable - margin, cap, held=affordable)

    def _go_on_without(self, call: Call, case: WorstCase, refused: HoldRefused) -> None:
        """``at_limit = "warn"``: the limit is no limit for this attempt, and somebody hears of it."""
        account, unit = refused.account, refused.unit
        case.lift(account, unit)
        if refused.settled + case.needed(unit) > refused.limit:
            say = words(unit)
            spent = f"{say(refused.settled)} of {say(refused.limit, whole=True)} spent"
            self._tell(
                call, account, f"{scope_of(account)}: {spent}; this call went on all the same (at_limit is warn)"
            )

    async def _watch(self, reply: Reply, hold: Hold) -> None:
        """See whether the real cost brings an account to where there is a warning; most calls cannot."""
        assert self._budgets is not None
        warn_at = self._budgets.settings.warn_at
        for account, balance in zip(hold.accounts, hold.balances, strict=False):
            usd, limit = account.limit_nanos, account.limit_tokens
            if (usd is not None and balance.settled_nanos + hold.nanos >= warn_at * usd) or (
                limit is not None and balance.settled_tokens + hold.tokens >= warn_at * limit
            ):
                break
        else:
            return

        async def ended(_: Outcome) -> None:
            attempt = next((each for each in reply.call.trail.attempts if each.number == hold.number), None)
            if attempt is None or attempt.usage is None:
                return
            nanos = 0 if attempt.cost_usd is None else prices.to_nanos(attempt.cost_usd)
            self._warn(reply.call, hold, nanos, attempt.usage.total_tokens)

        await reply.at_end(ended)

    def _warn(self, call: Call, hold: Hold, nanos: int, spent_tokens: int) -> None:
        """Once for each account, window and share of it: what was spent before, and by this attempt."""
        assert self._budgets is not None
        warn_at = self._budgets.settings.warn_at
        for account, balance in zip(hold.accounts, hold.balances, strict=False):
            for unit, limit, spent in (
                ("usd", account.limit_nanos, balance.settled_nanos + nanos),
                ("tokens", account.limit_tokens, balance.settled_tokens + spent_tokens),
            ):
                if limit is None or spent < warn_at * limit:
                    continue
                share = max(each for each in (warn_at, 1.0) if each == warn_at or spent >= limit)
                if share <= self._warned.get((account.key, unit), 0.0):
                    continue
                if len(self._warned) >= MOST_WARNINGS:
                    self._warned.clear()
                self._warned[account.key, unit] = share
                say = words(unit)
                ends = "" if account.resets_at is None else f"; resets {self._ending(account.resets_at)}"
                text = (
                    f"{scope_of(account)}: {say(spent)} of {say(limit, whole=True)} spent ({spent / limit:.0%}){ends}"
                )
                self._tell(call, account, text)

    def _ending(self, at: float) -> str:
        assert self._budgets is not None
        return moment(datetime.fromtimestamp(at, self._budgets.zone))

    @staticmethod
    def _tell(call: Call, account: Account, message: str) -> None:
        call.trail.warnings.append(message)
        emit(call, BudgetWarning(call.request_id, account.scope, message))

    # -- the cap of one request --------------------------------------------------------------------------------------

    async def _allowance(self, call: Call) -> Allowance | None:
        """How much output this attempt may produce; None where nothing limits it.

        Raises:
            BudgetExceeded, PriceUnknown: before anything is sent.
        """
        by_cost, by_tokens, wanted = await self._by_cost(call), await self._by_tokens(call), call.params.max_tokens
        caps = [cap for cap in (by_cost, by_tokens, wanted and Allowance(wanted, "max_tokens")) if cap]
        return min(caps, key=lambda allowance: allowance.tokens) if caps else None

    async def _by_cost(self, call: Call) -> Allowance | None:
        endpoint, link = call.endpoint, call.link
        cap, scope = call.max_cost_usd, "request"
        if link is not None and link.max_cost_usd is not None and (cap is None or link.max_cost_usd < cap):
            cap, scope = link.max_cost_usd, "link"
        if cap is None or prices.is_free(endpoint):
            return None
        at, extra, wanted = self._clock.time(), call.beside, call.params.max_tokens
        bound = tokens.upper_bound(call.messages, model=endpoint.model, extra=extra)
        plain = not extra and not call.trail.attempts and all(isinstance(m.content, str) for m in call.messages)
        if plain and self._is_harmless(endpoint, cap, wanted, at, bound):
            return None
        await prices.ready(endpoint)
        if not prices.is_known(endpoint, at=at):
            if call.max_cost_is_default and scope == "request":
                return None  # nobody asked for this cap; the reply says that its cost is unknown
            message = f"the price of {endpoint.name} is unknown, so a cap of {amount(cap)} could not be kept"
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
                f"{endpoint.name} could cost {exactly(needed)} for {counted} tokens in and {least} out; "
                f"the {scope}'s cap leaves {exactly(max(left, Decimal(0)))} of {amount(cap)}",
                scope=scope,
                limit=cap,
                needed=needed,
                spent_before=cap - left,
            )
        return Allowance(affordable, "max_cost")

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

    async def _by_tokens(self, call: Call) -> Allowance | None:
        cap = call.max_total_tokens
        if cap is None:
            return None
        extra = call.beside
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
        return Allowance(left - counted, "max_tokens")

    @staticmethod
    def _limited(call: Call, allowance: Allowance) -> Call:
        """Tell the provider its limit; or, where it might refuse that number as too high, stream and cut."""
        if allowance.held:  # the last of a budget: cut here as well, since a server may not keep what it is told
            call = call.to(stream=True)
        most = windows.max_output(call.endpoint)
        if most is not None:
            if allowance.tokens >= most:
                return call
        elif allowance.tokens > 4096:  # more than every server takes without being asked for its limit
            return call.to(stream=True)
        return call.to(params=replace(call.params, max_tokens=allowance.tokens))


def _fits(worst: Decimal | None, left: Decimal) -> bool:
    return worst is not None and worst <= left


def _is_followed(call: Call) -> bool:
    """Whether the chain has another link for this call, after the one chosen."""
    behind = False
    for link in call.route:
        if behind and not link.disabled and not link.only_on:
            return True
        behind = behind or link is call.link
    return False
