"""What holds do to accounts: the arithmetic that the stores share."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

from llmkit.account import HoldRefused, Settle
from llmkit.state.migrations import MOST
from llmkit.state.store import QUARTER_S

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llmkit.account import Account, Balance, Hold, Release

__all__ = [
    "HELD",
    "NOTHING",
    "RELEASED",
    "Amounts",
    "Held",
    "abandoned",
    "added",
    "amount",
    "check",
    "counted",
    "difference",
    "ended",
    "has_tag",
    "is_whole",
    "tag_of",
    "try_on",
]

HELD, RELEASED = "held", "released"
_UNKNOWN = {(True, True): "unknown", (True, False): "unknown usd", (False, True): "unknown tokens"}
_UNITS = {state: units for units, state in _UNKNOWN.items()}

Amounts = tuple[int, int, int, int, int, int]
"""Settled, held and unknown nano-dollars, and the same of tokens, as in `llmkit.account.Balance`."""

NOTHING: Amounts = (0, 0, 0, 0, 0, 0)


class Held(NamedTuple):
    """A hold as it is kept.

    ``state`` is `HELD`; or it was ended while nobody knew its end, and is kept so that the owner can correct that:
    ``unknown`` (or ``unknown usd``, ``unknown tokens``: of the other unit the end is known) with ``nanos`` and ``tokens``
    settled, or `RELEASED`.
    """

    request_id: str
    number: int
    accounts: tuple[str, ...]
    nanos: int
    tokens: int
    owner: str
    expires: float
    slot: int | None
    state: str


def amount(given: int) -> int:
    """What an attempt can have cost: not less than nothing, nor so much that sums would overflow."""
    return given if 0 <= given <= MOST else max(0, min(given, MOST))  # what is right is so without a call


def counted(held: Held) -> Amounts:
    """What a hold makes of the balance of each of its accounts."""
    if held.state == HELD:
        return (0, held.nanos, 0, 0, held.tokens, 0)
    if held.state not in _UNITS:
        return NOTHING
    usd, tokens = _UNITS[held.state]
    return (held.nanos, 0, held.nanos if usd else 0, held.tokens, 0, held.tokens if tokens else 0)


def ended(held: Held, ending: Settle | Release) -> tuple[Amounts, Held | None]:
    """How the balances change when ``ending`` comes, and what is still to be kept of the hold."""
    if not isinstance(ending, Settle):
        return difference(NOTHING, counted(held)), None
    usd_open, tokens_open = _UNITS.get(held.state, (True, True))
    usd, tokens = ending.nanos is None and usd_open, ending.tokens is None and tokens_open
    now = held._replace(
        nanos=held.nanos if ending.nanos is None else amount(ending.nanos),
        tokens=held.tokens if ending.tokens is None else amount(ending.tokens),
        state=_UNKNOWN.get((usd, tokens), ""),
    )
    if now.state:
        return difference(counted(now), counted(held)), now
    return difference((now.nanos, 0, 0, now.tokens, 0, 0), counted(held)), None


def abandoned(held: Held, *, sent: bool) -> tuple[Amounts, Held]:
    """The same when nobody will end it: at its worst case if it was ``sent``, as if nothing had been if not."""
    now = held._replace(state=_UNKNOWN[True, True] if sent else RELEASED)
    return difference(counted(now), counted(held)), now


def added(first: Amounts, second: Amounts) -> Amounts:
    """Both together."""
    return tuple(a + b for a, b in zip(first, second, strict=True))  # type: ignore[return-value]


def difference(new: Amounts, old: Amounts) -> Amounts:
    """What has to be added to ``old`` to get ``new``."""
    return tuple(a - b for a, b in zip(new, old, strict=True))  # type: ignore[return-value]


def check(hold: Hold, balances: Sequence[Balance]) -> None:
    """That the hold fits, ``balances`` being those of its accounts with the hold in them.

    A hold of no USD always fits a limit in USD, however full that is; the same of tokens.

    Raises:
        HoldRefused: it does not.
    """
    for account, balance in zip(hold.accounts, balances, strict=True):
        usd, tokens = account.limit_nanos, account.limit_tokens
        if usd is not None and balance.settled_nanos + balance.held_nanos > usd and hold.nanos > 0:
            unit = "usd"
        elif tokens is not None and balance.settled_tokens + balance.held_tokens > tokens and hold.tokens > 0:
            unit = "tokens"
        else:
            continue
        without = balance._replace(
            held_nanos=balance.held_nanos - amount(hold.nanos), held_tokens=balance.held_tokens - amount(hold.tokens)
        )
        raise HoldRefused(account, without, unit)


def try_on(hold: Hold, before: Sequence[Balance]) -> None:
    """That the hold would fit, ``before`` being the balances of its accounts without it.

    Raises:
        HoldRefused: it would not.
    """
    nanos, tokens = amount(hold.nanos), amount(hold.tokens)
    check(
        hold,
        [each._replace(held_nanos=each.held_nanos + nanos, held_tokens=each.held_tokens + tokens) for each in before],
    )


def is_whole(account: Account) -> bool:
    """Whether the sums of spending tell all that an account begins with: they know quarters of an hour, and no owners."""
    return account.session is None and account.since % QUARTER_S == 0 and (account.resets_at or 0) % QUARTER_S == 0


def tag_of(account: Account) -> tuple[str, str]:
    """The name and the value of an account's tag; no value stands for calls that have no such tag."""
    name, _, value = (account.tag or "").partition("=")
    return name, value


def has_tag(account: Account, tags: str) -> bool:
    """Whether a call with these tags (as JSON) counts towards the account. ``tags`` may be anything."""
    if account.tag is None:
        return True
    try:
        known: Any = json.loads(tags)
    except ValueError:
        known = {}
    name, value = tag_of(account)
    return str((known.get(name) if isinstance(known, dict) else None) or "") == value
