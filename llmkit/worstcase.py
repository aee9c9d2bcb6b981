"""The worst case of an attempt: what goes in, what may come out, and the hold that is taken for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmkit.account import Hold
from llmkit.models import prices, tokens, windows

if TYPE_CHECKING:
    from llmkit.account import Account
    from llmkit.allowance import Allowance
    from llmkit.call import Call

__all__ = ["MOST_OUTPUT", "WorstCase"]

MOST_OUTPUT = 131_072
"""Tokens. No model of today gives more, so a cap that affords it needs no limit on the wire."""

LEASE_S = 3_600.0  # of a hold whose call has no deadline
GRACE_S = 60.0  # of a hold beyond the deadline of its call


class WorstCase:
    """Of one attempt, in USD and tokens. ``accounts`` and ``allowance`` change when it is made to fit.

    Args:
        allowance: of output; None where nothing limits it.
        accounts: those that it counts towards. at: epoch seconds, for prices and leases.
    """

    def __init__(self, call: Call, allowance: Allowance | None, accounts: tuple[Account, ...], at: float) -> None:
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
        """What is to be set aside in all its accounts before it is sent."""
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
