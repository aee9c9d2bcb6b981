"""Refuse what could break a cap or a budget, set aside what an attempt may cost, and cut what reaches its share.

Caps and budgets are kept per attempt, which is where money is spent: an attempt may cost what the cap leaves after the
attempts before it, and its worst case is held in every account that it counts towards (`llmkit.account`) from before it
is sent until it is settled. That is why the layer stands below retry and breaker and not at the top of the chain.

A hold is taken with the row of the attempt, so below this layer; a hold that does not fit comes back up as
`HoldRefused`, before anything was sent.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from llmkit.account import NONE_AHEAD, Hold, HoldRefused, Provision
from llmkit.errors import BudgetExceeded, CallRejected, PriceUnknown
from llmkit.events import BudgetWarning, NoRoom, Share, Waiting, emit
from llmkit.models import prices, tokens, windows
from llmkit.money import amount, money
from llmkit.redaction import tidy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence

    from llmkit.account import Account, Balance, Sums
    from llmkit.budgets import Budgets
    from llmkit.call import Call
    from llmkit.clock import Clock
    from llmkit.endpoint import Endpoint
    from llmkit.pipeline import CallNext
    from llmkit.reply import Chunk, Outcome, Reply

__all__ = ["Budget"]

# No model of today gives more output than this, so a cap that affords it needs no limit on the wire.
MOST_OUTPUT = 131_072
ROOMY = 4_096  # tokens; a longer prompt is looked at each time
LEASE_S = 3_600.0  # of a hold whose call has no deadline
GRACE_S = 60.0  # of a hold beyond the deadline of its call
LONGEST_WAIT_S = 60.0  # for room in an account, where the call has no deadline
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.005, 0.25  # between two tries: other processes give back without a word
SAID_AFTER_S = 1.0
MOST_WARNINGS = 10_000


@dataclass(frozen=True, slots=True)
class _Allowance:
    """Output tokens an attempt may produce, and which cap says so (``max_cost`` or ``max_tokens``).

    ``held``: for how many there is room, where that is more.
    """

    tokens: int
    cap: str
    held: int = 0


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
        full: HoldRefused | None = None
        while refusal is None and full is None and (refused := self._refused(case, before)) is not None:
            try:
                full = None if await self._fits_otherwise(call, case, refused) else refused
            except CallRejected as error:
                refusal = error
        waits = None if full is None else _full(full)
        said = tuple(call.trail.warnings[warnings:])
        return Provision(*case.size(), accounts, tuple(before), refusal, waits, said)

    async def _case_or_refusal(self, call: Call) -> tuple[_Case, CallRejected | None]:
        """What is to be held, and the refusal that comes before anything could be."""
        allowance: _Allowance | None = None
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
        return _Case(call, allowance, accounts, self._clock.time()), refusal

    def _refused(self, case: _Case, before: Sequence[Balance]) -> HoldRefused | None:
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

    async def _sent(self, call: Call, call_next: CallNext, allowance: _Allowance | None) -> Reply:
        if allowance is None:
            return await call_next(call)
        wanted = call.params.max_tokens
        if wanted is None:
            call = self._limited(call, allowance)
        reply = await call_next(call)
        if not reply.call.stream:
            return reply
        return reply.watched(_Cutter(reply, call, allowance).cut)

    # -- budgets -----------------------------------------------------------------------------------------------------

    async def _case(self, call: Call, allowance: _Allowance | None) -> _Case | None:
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
        case = _Case(call, allowance, scopes.accounts, self._clock.time())
        if scopes.usd and not prices.is_free(call.endpoint) and case.nanos() is None:
            if scopes.usd_set:
                name = call.endpoint.name
                raise PriceUnknown(f"the price of {name} is unknown, so a budget in USD could not be kept", model=name)
            if not scopes.tokens:
                return None  # nobody asked for these limits
        return case

    async def _within(self, call: Call, call_next: CallNext, case: _Case) -> Reply:
        """Send it with its worst case held; wait, shrink, or refuse where that does not fit."""
        budgets, ledger = self._budgets, self._ledger
        assert budgets is not None
        assert ledger is not None
        place = _Place(self._clock, budgets, ledger, call)
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

    async def _make_room(self, call: Call, case: _Case, place: _Place, refused: HoldRefused) -> None:
        """Find out how it may fit, and return when it is worth another try.

        Raises:
            BudgetExceeded: it will not.
        """
        if call.trail.listener is not None and not place.waited_s:
            emit(call, _no_room(call, refused, case.needed(refused.unit)))
        if not await self._fits_otherwise(call, case, refused) and not await place.wait(refused):
            raise self._exceeded(call, refused, case.needed(refused.unit), waited_s=place.waited_s)

    async def _fits_otherwise(self, call: Call, case: _Case, refused: HoldRefused) -> bool:
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

    def _shrink(self, call: Call, case: _Case, refused: HoldRefused) -> None:
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
            raise self._exceeded(call, refused, case.needed(refused.unit, shortest), downgrade=downgrade)
        # An answer may pass its allowance by what is on its way while it is cut, so that much is not told.
        margin = 0 if call.params.max_tokens is not None else min(16, affordable // 16)
        cap = "max_cost" if refused.unit == "usd" else "max_tokens"
        case.allowance = _Allowance(affordable - margin, cap, held=affordable)

    def _exceeded(
        self, call: Call, refused: HoldRefused, needed: int, *, downgrade: bool = False, waited_s: float = 0.0
    ) -> BudgetExceeded:
        assert self._budgets is not None
        account, balance, unit = refused.account, refused.balance, refused.unit
        unknown = balance.unknown_nanos if unit == "usd" else balance.unknown_tokens
        resets_at = None if account.resets_at is None else datetime.fromtimestamp(account.resets_at, self._budgets.zone)
        say = _words(unit)
        parts = [f"{say(refused.settled)} of {say(refused.limit, whole=True)} spent"]
        if unknown:
            parts.append(f"{say(unknown)} of that unknown (the worst case of requests whose end nobody saw)")
        if refused.held:
            parts.append(f"{say(refused.held)} held by calls in flight")
        worst = f"this call at {call.endpoint.name} could take {say(needed)}"
        waited = f"no room within {waited_s:.3g} s" if waited_s else ""
        resets = "it does not reset" if resets_at is None else f"it resets {_moment(resets_at)}"
        said = "; ".join(part for part in (", ".join(parts), worst, waited, resets) if part)
        message = f'the budget "{_scope(account)}" does not allow it: {said}'
        return BudgetExceeded(
            message,
            scope=account.scope,
            limit=_amount(unit, refused.limit),
            needed=_amount(unit, needed),
            unit=unit,
            spent_before=_amount(unit, refused.settled),
            held=_amount(unit, refused.held),
            unknown=_amount(unit, unknown),
            resets_at=resets_at,
            downgrade=downgrade,
            next_step=_how_to_raise(account, unit),
        )

    def _go_on_without(self, call: Call, case: _Case, refused: HoldRefused) -> None:
        """``at_limit = "warn"``: the limit is no limit for this attempt, and somebody hears of it."""
        account, unit = refused.account, refused.unit
        case.lift(account, unit)
        if refused.settled + case.needed(unit) > refused.limit:
            say = _words(unit)
            spent = f"{say(refused.settled)} of {say(refused.limit, whole=True)} spent"
            self._tell(call, account, f"{_scope(account)}: {spent}; this call went on all the same (at_limit is warn)")

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
                say = _words(unit)
                ends = "" if account.resets_at is None else f"; resets {self._ending(account.resets_at)}"
                text = f"{_scope(account)}: {say(spent)} of {say(limit, whole=True)} spent ({spent / limit:.0%}){ends}"
                self._tell(call, account, text)

    def _ending(self, at: float) -> str:
        assert self._budgets is not None
        return _moment(datetime.fromtimestamp(at, self._budgets.zone))

    @staticmethod
    def _tell(call: Call, account: Account, message: str) -> None:
        call.trail.warnings.append(message)
        emit(call, BudgetWarning(call.request_id, account.scope, message))

    # -- the cap of one request --------------------------------------------------------------------------------------

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
                f"{endpoint.name} could cost {_exactly(needed)} for {counted} tokens in and {least} out; "
                f"the {scope}'s cap leaves {_exactly(max(left, Decimal(0)))} of {amount(cap)}",
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
        return _Allowance(left - counted, "max_tokens")

    @staticmethod
    def _limited(call: Call, allowance: _Allowance) -> Call:
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


# -- in words --------------------------------------------------------------------------------------------------------


def _words(unit: str) -> Callable[..., str]:
    """How to write an amount of that unit; ``whole``: as it was set, to its last digit."""
    if unit == "usd":
        return lambda nanos, whole=False: (amount if whole else money)(prices.from_nanos(nanos))
    return lambda count, whole=False: f"{count:,}{' tokens' if not whole else ''}" if count != 1 else "1 token"


def _exactly(usd: Decimal) -> str:
    """To the nano-dollar, rounded up: of two amounts that differ by little, a person must see which is more."""
    return amount(prices.from_nanos(prices.to_nanos(usd)))


def _amount(unit: str, number: int) -> Decimal | int:
    return prices.from_nanos(number) if unit == "usd" else number


def _no_room(call: Call, refused: HoldRefused, needed: int) -> NoRoom:
    unit = refused.unit
    amounts = (_amount(unit, number) for number in (refused.limit, refused.settled, refused.held))
    return NoRoom(call.request_id, Share(refused.account.scope, unit, *amounts), _amount(unit, needed))


def _full(refused: HoldRefused) -> str:
    """That there is no room, because of what others hold."""
    say = _words(refused.unit)
    spent = f"{say(refused.settled)} of {say(refused.limit, whole=True)} spent"
    return f"{_scope(refused.account)}: {spent}, {say(refused.held)} held by calls in flight"


def _scope(account: Account) -> str:
    return tidy(account.scope, limit=100)


def _moment(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M} {at.tzname()}"


def _how_to_raise(account: Account, unit: str) -> str:
    window = account.scope.rpartition(", ")[2]
    kinds = (("user", account.user), ("tag", account.tag), ("model", account.model))
    whose = next((f"{kind}.{tidy(name, limit=60)}." for kind, name in kinds if name is not None), "")
    name = f"{whose}{window}"
    return (
        f"raise it (%llm budget {name}=AMOUNT{unit}) or lift it (%llm budget {name}=off), for good in [budget] of "
        "llmkit.toml; or lower --max-tokens, or use a cheaper model"
    )


class _Case:
    """The worst case of one attempt: what goes in, what may come out, and what is held for it."""

    def __init__(self, call: Call, allowance: _Allowance | None, accounts: tuple[Account, ...], at: float) -> None:
        endpoint, extra, wanted = call.endpoint, call.beside, call.params.max_tokens
        self.accounts = accounts
        self.allowance = allowance
        self.least = wanted or 1
        self._call = call
        self._at = at
        self._input = tokens.upper_bound(call.messages, model=endpoint.model, extra=extra)
        self._is_counted = False
        self._size = (-1, -1)  # of the last worst case, which is asked for several times
        self._nanos: int | None = None
        self._most = wanted or windows.max_output(endpoint) or MOST_OUTPUT
        self._terms: dict[str, Any] = {
            "at": at,
            "service_tier": extra.get("service_tier") if extra else None,
            "cache_writes": prices.asks_for_cache(call.messages, extra),
        }

    @property
    def _output(self) -> int:
        allowance = self.allowance
        return self._most if allowance is None else min(self._most, allowance.held or allowance.tokens)

    def size(self) -> tuple[int | None, int, int]:
        """Nano-dollars (None: the price is unknown), tokens in, tokens out."""
        return self.nanos(), self._input, self._output

    def nanos(self, output: int | None = None) -> int | None:
        """None where the price is unknown."""
        size = (self._input, self._output if output is None else output)
        if size != self._size:
            self._size, self._nanos = size, prices.worst_nanos(self._call.endpoint, *size, **self._terms)
        return self._nanos

    def needed(self, unit: str, output: int | None = None) -> int:
        """What is to be held, with at most ``output`` tokens out."""
        if unit == "usd":
            return self.nanos(output) or 0
        return self._input + (self._output if output is None else output)

    def affordable(self, unit: str, left: int) -> int:
        """The most output tokens that ``left`` allows."""
        if unit == "tokens":
            return left - self._input
        usd = prices.from_nanos(max(0, left))
        return prices.affordable_output(self._call.endpoint, self._input, usd, **self._terms) or 0

    async def count(self) -> bool:
        """Count the input, which was only bounded at first. Returns whether that made it less."""
        if self._is_counted:
            return False
        self._is_counted = True
        bound, call = self._input, self._call
        counted = await tokens.safe_count(call.endpoint, call.messages, extra=call.beside)
        self._input = min(bound, counted)
        return self._input < bound

    def lift(self, account: Account, unit: str) -> None:
        """Let this limit be none for this attempt; it is counted all the same."""
        lifted = account._replace(limit_nanos=None) if unit == "usd" else account._replace(limit_tokens=None)
        self.accounts = tuple(lifted if each.key == account.key else each for each in self.accounts)

    def hold(self, owner: str) -> Hold:
        call = self._call
        lease = LEASE_S if call.deadline is None else max(0.0, call.deadline - call.started) + GRACE_S
        return Hold(
            call.request_id,
            call.trail.attempts_begun + 1,
            self.accounts,
            self.needed("usd"),
            self.needed("tokens"),
            owner,
            self._at + lease,
            None,
            [],
        )


class _Place:
    """The place of a call among those who wait for room in an account."""

    def __init__(self, clock: Clock, budgets: Budgets, ledger: Accounting, call: Call) -> None:
        self.waited_s = 0.0
        self._clock = clock
        self._line = budgets.line
        self._ledger = ledger
        self._call = call
        self._began: float | None = None
        self._pause = FIRST_PAUSE_S
        self._said = False

    async def stand_behind_others(self, accounts: tuple[Account, ...]) -> None:
        """Whoever waits already tries first, even where this call would fit."""
        key = self._line.before(accounts)
        if key is None:
            return
        ticket = self._line.join(self._call.request_id, key)
        scope = next(account.scope for account in accounts if account.key == key)
        while not self._line.is_first(ticket) and await self._woken(ticket, f"{scope}: others wait for room before it"):
            pass

    async def wait(self, refused: HoldRefused) -> bool:
        """Until there may be room for what was refused because of what others hold. False: the time is up."""
        ticket = self._line.join(self._call.request_id, refused.account.key)
        reason = _full(refused)
        await self._ledger.reap()
        while await self._woken(ticket, reason):
            if self._line.is_first(ticket):
                return True
        return False

    async def _woken(self, ticket: Any, reason: str) -> bool:
        """Wait until somebody gives back, or for a while. False: the time is up."""
        call, now = self._call, self._clock.now()
        if self._began is None:
            self._began = now
            call.trail.sent = False
        until = call.deadline if call.deadline is not None else self._began + LONGEST_WAIT_S
        if now >= until:
            return False
        longest = until - now
        if self._line.is_first(ticket):  # the others are woken when it is their turn
            longest = min(longest, self._pause)
            self._pause = min(2 * self._pause, LONGEST_PAUSE_S)
        if not self._said:
            longest = min(longest, max(0.0, self._began + SAID_AFTER_S - now))
        await _either(ticket.woken.wait(), self._clock.sleep(longest))
        ticket.woken.clear()
        waited = self._clock.now() - now
        self.waited_s += waited
        call.trail.waited_s += waited
        if not self._said and self._clock.now() - self._began >= SAID_AFTER_S:
            self._said = True
            emit(call, Waiting(call.request_id, max(0.0, until - self._clock.now()), reason, call.endpoint.name))
        return True


async def _either(first: Awaitable[object], second: Awaitable[object]) -> None:
    """Wait for one of the two; the other is given up."""
    tasks = [asyncio.ensure_future(first), asyncio.ensure_future(second)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


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
        if count.exact:
            return self._counted > self._allowance.tokens
        # A chunk is at least a token, so that is certain. Our estimate may be above the server's own count, and below it.
        self._counted = max(self._counted, self._chunks)
        return (self._chunks if self._allowance.cap == "max_tokens" else self._counted) > self._allowance.tokens
