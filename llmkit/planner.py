"""From a call to its plan: the layers that would judge it are asked what they would do, and none of them does it.

The rules are not written a second time. The route is walked by the fallback layer itself, the cache makes its own keys,
a circuit says what it would refuse with, and the budget layer makes the very hold that it would take.
"""

from __future__ import annotations

import asyncio
from decimal import Decimal
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from llmkit.account import Sums
from llmkit.errors import BudgetExceeded, LLMKitError, StoreError
from llmkit.layers.budget import Budget
from llmkit.layers.cache import Cache
from llmkit.layers.degraded import is_outage
from llmkit.layers.fallback import Fallback
from llmkit.layers.schema import most_added
from llmkit.models import prices, tokens, windows
from llmkit.plan import Expectation, Plan, PlannedBudget, PlannedLink
from llmkit.reply import Usage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llmkit.account import Provision
    from llmkit.answer import Answer
    from llmkit.call import Call
    from llmkit.clock import Clock
    from llmkit.endpoint import Link
    from llmkit.layers.breaker import Breakers
    from llmkit.layers.replay import Replay
    from llmkit.ledger import Ledger
    from llmkit.pipeline import Layer
    from llmkit.providers.http import Provider

__all__ = ["NEWEST", "USUAL_OUTPUT", "Planner", "replayed"]

NEWEST = 100
"""So many answers of the past say what to expect of the next one."""

USUAL_OUTPUT = 500
"""Tokens that an answer is taken to have where nothing is known."""

_L = TypeVar("_L")


class _Looked(NamedTuple):
    """What one link would do: what it needs, and what it would refuse the attempt with."""

    provision: Provision
    refusal: LLMKitError | None


class _Stored(NamedTuple):
    """What the cache has: its keys for the call, the state of `Plan.cache`, the answer, and why there must be one."""

    keys: tuple[str, ...]
    state: str
    answer: Answer | None
    refusal: LLMKitError | None

    @property
    def is_answered(self) -> bool:
        return self.state in {"hit", "before"}

    def saved_usd(self, links: tuple[PlannedLink, ...]) -> Decimal | None:
        if self.answer is not None:
            return self.answer.cost
        return next((link.expected_usd for link in links if link.use != "skipped"), None)


class Planner:
    """Makes plans with the parts of one client. Keeps nothing of any of them."""

    def __init__(
        self,
        layers: Sequence[Layer],
        *,
        breakers: Breakers,
        ledger: Ledger,
        provider: Provider,
        clock: Clock,
        attempts: int,
    ) -> None:
        self._cache = _of(layers, Cache)
        self._fallback = _of(layers, Fallback)
        self._budget = _of(layers, Budget)
        self._breakers = breakers
        self._ledger = ledger
        self._provider = provider
        self._clock = clock
        self._attempts = attempts

    async def plan(self, call: Call, after: Sequence[Plan] = ()) -> Plan:
        """What ``call`` would come to, once the calls of ``after`` have come to what was expected of them."""
        expected, worst = _ahead(after, 0), _ahead(after, 1)
        looked = {id(link): await self._look(call.to(link=link), expected) for link in call.route}
        chosen, refusal = await self._walked(call, looked)
        stored = await self._stored(call, after)
        if stored.refusal is not None:
            chosen, refusal = None, stored.refusal
        links = await self._links(call, looked, chosen)
        source = _source(call, refusal, chosen, stored)
        of = chosen or _refusing(call, looked, refusal)
        provision = None if of is None else looked[id(of)].provision
        made = None if of is None else links[call.route.index(of)]
        asks = chosen is not None and source not in {"cache", "degraded"}
        over = None if source in {"cache", "degraded"} else refusal
        return Plan(
            model=call.model,
            source=source,
            cache=stored.state,
            links=links,
            budgets=_budgets(call, of, provision, made if asks or over else None, over) if of and provision else (),
            refusal=over,
            waits=provision.waits if asks and provision else None,
            saved_usd=stored.saved_usd(links) if source == "cache" else None,
            worst_in_all_usd=_in_all(call, links, self._clock.time()) if asks else None,
            warnings=provision.warnings if asks and provision else (),
            late_refusal=await self._late_refusal(call.to(link=chosen), expected, worst) if asks else None,
            stored_as=_stored_as(stored.keys, chosen, call) if asks else frozenset(),
            settles=_settles(provision, made) if asks and provision and made else {},
        )

    async def _walked(self, call: Call, looked: dict[int, _Looked]) -> tuple[Link | None, LLMKitError | None]:
        """The link that would be asked first, or why none would be."""
        try:
            return await self._fallback.walk(call, lambda at: _chosen(at, looked)), None
        except LLMKitError as error:
            return None, error

    async def _stored(self, call: Call, after: Sequence[Plan]) -> _Stored:
        """What the cache has for the call, or will have by then."""
        if call.cache == "off" or not self._cache.is_on:
            keys: tuple[str, ...] = ()
        else:
            keys = self._cache.keys(call) or ()
        if call.cache != "refresh" and any(plan.stored_as & set(keys) for plan in after):
            return _Stored(keys, "before", None, None)
        try:
            answer = await self._cache.plan(call)
        except LLMKitError as error:
            return _Stored(keys, "miss", None, error)
        state = "hit" if answer is not None else "off" if not keys else "refresh" if call.cache == "refresh" else "miss"
        return _Stored(keys, state, answer, None)

    async def _look(self, call: Call, ahead: dict[str, Sums]) -> _Looked:
        """What the chain below the choice of a link would say to its first attempt."""
        provision = await self._budget.plan(call, ahead)
        refusal: LLMKitError | None = await self._breakers.plan(call.endpoint)
        refusal = refusal or provision.refusal
        if refusal is None:
            try:
                self._provider.check(call.endpoint)
            except LLMKitError as error:
                refusal = error
        return _Looked(provision, refusal)

    async def _late_refusal(self, call: Call, expected: dict[str, Sums], worst: dict[str, Sums]) -> str | None:
        if worst == expected:
            return None
        refusal = (await self._budget.plan(call, worst)).refusal
        return refusal.scope if isinstance(refusal, BudgetExceeded) else None

    # -- links -------------------------------------------------------------------------------------------------------

    async def _links(self, call: Call, looked: dict[int, _Looked], chosen: Link | None) -> tuple[PlannedLink, ...]:
        passed: dict[str, list[str]] = {}  # in their order: a chain may name one endpoint twice
        for skipped in call.trail.skipped:
            passed.setdefault(skipped.endpoint, []).append(skipped.reason)
        planned, is_behind = [], False
        for link in call.route:
            at = looked[id(link)]
            use, reason = "skipped", at.refusal.message if at.refusal else None
            if not is_behind and link is not chosen and passed.get(link.endpoint.name):
                reason = passed[link.endpoint.name].pop(0)
            if link is chosen:
                use, reason, is_behind = "asked", None, True
            elif is_behind or chosen is None:
                use, reason = _behind(link, at.refusal, is_open=chosen is not None)
            planned.append(await self._planned(call.to(link=link), at.provision, use, reason))
        return tuple(planned)

    async def _planned(self, call: Call, provision: Provision, use: str, reason: str | None) -> PlannedLink:
        endpoint = call.endpoint
        counted = await tokens.count_input(endpoint, call.said)
        given = min(counted.tokens, provision.input_tokens)
        expected = await self._expected(call, provision.output_tokens)
        cost = None
        if provision.nanos is not None:
            usage = Usage(input_tokens=given, output_tokens=expected.tokens)
            tier = call.params.extra.get("service_tier") if call.params.extra else None
            cost = prices.cost(endpoint, usage, at=self._clock.time(), service_tier=tier)
        return PlannedLink(
            endpoint=endpoint.name,
            use=use,
            reason=reason,
            input_tokens=given,
            is_exact=counted.exact,
            most_input_tokens=provision.input_tokens,
            expected=expected,
            most_output_tokens=provision.output_tokens,
            expected_usd=None if cost is None else cost.usd,
            worst_usd=None if provision.nanos is None else prices.from_nanos(provision.nanos),
            attempts=self._attempts,
        )

    async def _expected(self, call: Call, most: int) -> Expectation:
        """How long the answer will be; never more than it may be."""
        for basis, template in (("template", call.template), ("model", None)):
            if basis == "template" and template is None:
                continue
            try:
                found = await asyncio.to_thread(self._ledger.outputs, call.endpoint.name, template, limit=NEWEST)
            except StoreError:
                break  # what cannot be read is not known
            if found:
                mean = -(-sum(found) // len(found))
                return Expectation(min(mean, most), basis, len(found), min(found), max(found))
        wanted = call.params.max_tokens
        if wanted is not None:
            return Expectation(min(-(-wanted // 2), most), "max_tokens")
        return Expectation(min(USUAL_OUTPUT, most, windows.max_output(call.endpoint) or most), "default")


def replayed(replay: Replay, call: Call) -> Plan | None:
    """The plan of a call while answers come from a recording; None where it would be asked for real."""
    try:
        return Plan(model=call.model, source="recording", cache="off") if replay.plan(call) else None
    except LLMKitError as error:
        return Plan(model=call.model, source=None, cache="off", refusal=error)


def _of(layers: Sequence[Any], kind: type[_L]) -> _L:
    return next(layer for layer in layers if isinstance(layer, kind))


def _source(call: Call, refusal: LLMKitError | None, chosen: Link | None, stored: _Stored) -> str | None:
    if stored.is_answered:
        return "cache"
    if refusal is not None:
        return "degraded" if call.degraded_text is not None and is_outage(refusal) else None
    return "simulated" if chosen is not None and chosen.endpoint.simulated else "provider"


async def _chosen(call: Call, looked: dict[int, _Looked]) -> Link:
    """The link of ``call``, where an attempt would be made there.

    Raises:
        LLMKitError: what it would be refused with.
    """
    assert call.link is not None
    refusal = looked[id(call.link)].refusal
    if refusal is not None:
        raise refusal
    return call.link


def _behind(link: Link, refusal: LLMKitError | None, *, is_open: bool) -> tuple[str, str | None]:
    """The use of a link that the walk did not come to."""
    if link.disabled:
        return "skipped", "disabled"
    if refusal is not None or not is_open:
        return "skipped", refusal.message if refusal is not None else "not come to"
    kinds = " or ".join(sorted(link.only_on))
    return "fallback", f"only used after {kinds}" if kinds else None


def _refusing(call: Call, looked: dict[int, _Looked], refusal: LLMKitError | None) -> Link | None:
    """The link whose refusal is the verdict; else the first one that may be used."""
    usable = [link for link in call.route if not link.disabled]
    return next((link for link in usable if looked[id(link)].refusal is refusal), usable[0] if usable else None)


# -- money -----------------------------------------------------------------------------------------------------------


def _in_all(call: Call, links: tuple[PlannedLink, ...], at: float) -> Decimal | None:
    """With every attempt there may be; None where one of them has no price."""
    total = Decimal(0)
    for link, planned in zip(call.route, links, strict=True):
        if planned.use == "skipped":
            continue
        worst = planned.worst_usd
        if worst is not None and call.schema is not None:  # an answer that does not fit is asked for again, with itself
            given, most = planned.most_input_tokens, planned.most_output_tokens
            repair = prices.worst_case(link.endpoint, given + most + most_added(call.schema), most, at=at)
            worst = None if repair is None else worst + repair
        if worst is None:
            return None
        total += planned.attempts * worst
    return total if call.max_cost_usd is None else min(total, call.max_cost_usd)


def _budgets(
    call: Call, link: Link, provision: Provision, planned: PlannedLink | None, refusal: LLMKitError | None
) -> tuple[PlannedBudget, ...]:
    """Every limit, of the request and of the accounts, before the call and after it; ``planned`` None: it costs nothing."""
    over = refusal if isinstance(refusal, BudgetExceeded) else None
    most_tokens = provision.input_tokens + provision.output_tokens

    def row(
        scope: str, unit: str, limit: Decimal | int, spent: Any, held: Any, resets_at: float | None
    ) -> PlannedBudget:
        after: list[Any] = [spent, spent]
        if planned is not None and unit == "usd":
            costs = (planned.expected_usd, planned.worst_usd)
            after = [None if cost is None else spent + cost for cost in costs]
        elif planned is not None:
            after = [spent + planned.input_tokens + planned.expected.tokens, spent + most_tokens]
        refuses = over is not None and (over.scope, over.unit) == (scope, unit)
        return PlannedBudget(scope, unit, limit, spent, held, after[0], after[1], refuses, resets_at)

    rows = [row(scope, unit, limit, *_nothing(unit), None) for scope, unit, limit in _caps(call, link, provision)]
    for account, balance in zip(provision.accounts, provision.balances, strict=True):
        if account.limit_nanos is not None:
            spent, held = prices.from_nanos(balance.settled_nanos), prices.from_nanos(balance.held_nanos)
            rows.append(
                row(account.scope, "usd", prices.from_nanos(account.limit_nanos), spent, held, account.resets_at)
            )
        if account.limit_tokens is not None:
            counts = (account.limit_tokens, balance.settled_tokens, balance.held_tokens)
            rows.append(row(account.scope, "tokens", *counts, account.resets_at))
    return tuple(rows)


def _caps(call: Call, link: Link, provision: Provision) -> list[tuple[str, str, Decimal | int]]:
    """The caps of this one request."""
    caps: list[tuple[str, str, Decimal | int]] = []
    if not prices.is_free(link.endpoint):
        is_kept = provision.nanos is not None or not call.max_cost_is_default
        if call.max_cost_usd is not None and is_kept:
            caps.append(("request", "usd", call.max_cost_usd))
        if link.max_cost_usd is not None:
            caps.append(("link", "usd", link.max_cost_usd))
    if call.max_total_tokens is not None:
        caps.append(("request", "tokens", call.max_total_tokens))
    return caps


def _nothing(unit: str) -> tuple[Decimal | int, Decimal | int]:
    return (Decimal(0), Decimal(0)) if unit == "usd" else (0, 0)


def _expected_of(link: PlannedLink) -> Sums:
    nanos = 0 if link.expected_usd is None else prices.to_nanos(link.expected_usd)
    return Sums(nanos, link.input_tokens + link.expected.tokens)


# -- one after the other ---------------------------------------------------------------------------------------------


def _settles(provision: Provision, link: PlannedLink) -> dict[str, tuple[Sums, Sums]]:
    """What is settled in each account by a call that comes to what is expected of it, and to its worst."""
    worst = Sums(provision.nanos or 0, provision.input_tokens + provision.output_tokens)
    return {account.key: (_expected_of(link), worst) for account in provision.accounts}


def _ahead(after: Sequence[Plan], course: int) -> dict[str, Sums]:
    """What ``after`` will have settled by account: as expected (0), or in the worst case (1)."""
    found: dict[str, Sums] = {}
    for plan in after:
        for key, courses in plan.settles.items():
            before = found.get(key, Sums(0, 0))
            found[key] = Sums(before.nanos + courses[course].nanos, before.tokens + courses[course].tokens)
    return found


def _stored_as(keys: Sequence[str], chosen: Link | None, call: Call) -> frozenset[str]:
    """Under what the answer will be found by those who ask the same later."""
    if chosen is None or not keys:
        return frozenset()
    first = next((link for link in call.route if not link.disabled and not link.only_on), None)
    return frozenset(keys[:1] if first is chosen or len(keys) == 1 else keys[1:])
