"""Try the next link, when this one cannot.

An ordinary ``try`` round each link: ``call_next`` returns at the first token, so nothing is ever left after one.
What a link cannot do for reasons of its own (overload, no key, no credit, too dear, too small a window) another may;
what is wrong with the request (`InvalidRequest`) stays wrong everywhere and is raised at once.
"""

from __future__ import annotations

from collections import defaultdict, deque
from typing import TYPE_CHECKING, TypeVar

from llmkit.call import Skipped
from llmkit.clock import within
from llmkit.errors import (
    AllModelsFailed,
    BudgetExceeded,
    CallRejected,
    CircuitOpen,
    ContextTooLong,
    FirstTokenTimeout,
    InvalidRequest,
    LLMKitError,
    PriceUnknown,
    ProviderError,
    Refused,
    TotalTimeout,
)
from llmkit.events import FellBack, LinkSkipped, emit
from llmkit.models import table, tokens, windows

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from llmkit.call import Call
    from llmkit.clock import Clock
    from llmkit.endpoint import Endpoint, Link
    from llmkit.pipeline import CallNext
    from llmkit.reply import Reply

__all__ = ["Fallback"]

T = TypeVar("T")

SICK_AFTER = 3  # failures …
SICK_WITHIN_S = 5.0  # … within so many seconds: the link is skipped while another is left


class Fallback:
    """Goes down ``call.route`` until a link answers."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._failures: defaultdict[tuple[str, str, str], deque[float]] = defaultdict(lambda: deque(maxlen=SICK_AFTER))

    async def __call__(self, call: Call, call_next: CallNext) -> Reply:
        return await self.walk(call, call_next)

    async def walk(self, call: Call, call_next: Callable[[Call], Awaitable[T]]) -> T:
        """What ``call_next`` gives for the first link that it can be had of: a reply, or a plan of one.

        Raises:
            LLMKitError: of no link.
        """
        errors: list[LLMKitError] = []
        links = self._healthy_first(call)
        while links:
            link = links.pop(0)
            if reason := self.unusable(link, errors):
                _skip(call, link, reason)
                continue
            try:
                await self._check_window(call, link, links)
                return await self._through(call.to(link=link), call_next)
            except LLMKitError as error:
                if len(call.route) == 1 or not _leaves(error):
                    raise
                self._left(call, link, error, links)
                errors.append(error)
        raise _verdict(call, errors)

    def _healthy_first(self, call: Call) -> list[Link]:
        """The route, with links that have just failed repeatedly behind the others: skipped while another is left."""
        sick = [link for link in call.route if self._sick(link.endpoint)]
        if not sick or len(sick) == len(call.route):
            return list(call.route)
        for link in sick:
            _skip(call, link, f"failed {SICK_AFTER} times within {SICK_WITHIN_S:g} s")
        return [link for link in call.route if link not in sick] + sick

    async def _through(self, call: Call, call_next: Callable[[Call], Awaitable[T]]) -> T:
        link = call.link
        assert link is not None
        limit = link.max_latency_s
        if limit is None:
            return await call_next(call)

        def too_slow() -> FirstTokenTimeout:
            endpoint = link.endpoint
            return FirstTokenTimeout(
                f"{endpoint.name}: no first token within this link's max_latency_s of {limit:g} s",
                limit=limit,
                provider=endpoint.provider,
                model=endpoint.model,
                maybe_billed=call.trail.sent is not False,
            )

        return await within(self._clock, limit, call_next(call), too_slow)

    async def _check_window(self, call: Call, link: Link, others: list[Link]) -> None:
        """Raise `ContextTooLong` before anything is sent, where the prompt is known not to fit.

        An exact count is believed; an estimate only while another link is left, since then nothing is refused by it.
        """
        endpoint = link.endpoint
        window = windows.window(endpoint) if endpoint.window is not None or table.is_loaded() else None
        if window is None or tokens.upper_bound(call.said, model=endpoint.model) <= window:
            return
        count = await tokens.count_input(endpoint, call.said)
        known = count.tokens if count.exact else count.tokens - tokens.unmeasured(endpoint, call.said)
        if known > window and (count.exact or others):
            raise ContextTooLong(
                f"{endpoint.name}: {known} tokens{'' if count.exact else ' (estimated)'} do not fit its window of {window}",
                tokens=known,
                window=window,
            )

    def unusable(self, link: Link, errors: list[LLMKitError]) -> str | None:
        """Why this link cannot serve this call, if so."""
        if link.disabled:
            return "disabled"
        kinds = {_kind(error) for error in errors}
        if link.only_on and not link.only_on & kinds:
            return "only used after " + " or ".join(sorted(link.only_on))
        too_long = [error for error in errors if isinstance(error, ContextTooLong)]
        if too_long:
            window = windows.window(link.endpoint)
            needed = max((e.tokens or (e.window or 0) + 1 for e in too_long), default=0)
            if window is not None and window < needed:
                return f"its window of {window} tokens is too small"
        return None

    def _sick(self, endpoint: Endpoint) -> bool:
        failures = self._failures.get(endpoint.key)
        return failures is not None and len(failures) == SICK_AFTER and self._clock.now() - failures[0] <= SICK_WITHIN_S

    def _left(self, call: Call, link: Link, error: LLMKitError, others: list[Link]) -> None:
        if isinstance(error, ProviderError) and error.transient:
            self._failures[link.endpoint.key].append(self._clock.now())
        reason = f"{type(error).__name__}: {error.message}"
        if others:
            call.trail.skipped.append(Skipped(link.endpoint.name, reason))
            emit(call, FellBack(call.request_id, link.endpoint.name, others[0].endpoint.name, reason))
        else:
            _skip(call, link, reason)


def _skip(call: Call, link: Link, reason: str) -> None:
    call.trail.skipped.append(Skipped(link.endpoint.name, reason))
    if call.trail.listener is not None:
        emit(call, LinkSkipped(call.request_id, link.endpoint.name, reason))


def _leaves(error: LLMKitError) -> bool:
    """Whether another link may do better."""
    if isinstance(error, CallRejected):
        if isinstance(error, BudgetExceeded):
            return error.downgrade or error.scope in {"request", "link"}
        return isinstance(error, CircuitOpen | ContextTooLong | PriceUnknown)
    return isinstance(error, ProviderError) and not isinstance(error, TotalTimeout | InvalidRequest)


def _kind(error: LLMKitError) -> str:
    if isinstance(error, ContextTooLong):
        return "context_too_long"
    return "refused" if isinstance(error, Refused) else "failed"


def _verdict(call: Call, errors: list[LLMKitError]) -> LLMKitError:
    """The one error for a route of which no link answered."""
    if not errors:
        reasons = "; ".join(f"{each.endpoint}: {each.reason}" for each in call.trail.skipped)
        return CallRejected(f"no link of {call.model} may be used ({reasons})")
    if all(isinstance(error, BudgetExceeded) for error in errors):
        return min((e for e in errors if isinstance(e, BudgetExceeded)), key=lambda e: e.needed)
    if len(errors) == 1:
        return errors[0]
    return AllModelsFailed(f"none of the {len(errors)} usable links of {call.model} answered", errors)
