"""What is said where a budget has no room: the error, the event and the words for both."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

from llmkit.errors import BudgetExceeded
from llmkit.events import NoRoom, Share
from llmkit.models import prices
from llmkit.money import amount, money
from llmkit.redaction import tidy

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import tzinfo
    from decimal import Decimal

    from llmkit.account import Account, HoldRefused
    from llmkit.call import Call

__all__ = ["exactly", "exceeded", "full", "moment", "no_room", "scope_of", "words"]


def exceeded(
    refused: HoldRefused, name: str, needed: int, zone: tzinfo, *, downgrade: bool = False, waited_s: float = 0.0
) -> BudgetExceeded:
    """The error of a call that does not fit.

    Args:
        name: of the endpoint. needed: what was to be held, in nano-dollars or tokens. zone: for the time of the reset.
        downgrade: a cheaper link is to be used instead. waited_s: for room.
    """
    account, balance, unit = refused.account, refused.balance, refused.unit
    unknown = balance.unknown_nanos if unit == "usd" else balance.unknown_tokens
    resets_at = None if account.resets_at is None else datetime.fromtimestamp(account.resets_at, zone)
    say = words(unit)
    parts = [f"{say(refused.settled)} of {say(refused.limit, whole=True)} spent"]
    if unknown:
        parts.append(f"{say(unknown)} of that unknown (the worst case of requests whose end nobody saw)")
    if refused.held:
        parts.append(f"{say(refused.held)} held by calls in flight")
    worst = f"this call at {name} could take {say(needed)}"
    waited = f"no room within {waited_s:.3g} s" if waited_s else ""
    resets = "it does not reset" if resets_at is None else f"it resets {moment(resets_at)}"
    said = "; ".join(part for part in (", ".join(parts), worst, waited, resets) if part)
    message = f'the budget "{scope_of(account)}" does not allow it: {said}'
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


def words(unit: str) -> Callable[..., str]:
    """How to write an amount of that unit; ``whole``: as it was set, to its last digit."""
    if unit == "usd":
        return lambda nanos, whole=False: (amount if whole else money)(prices.from_nanos(nanos))
    return lambda count, whole=False: f"{count:,}{' tokens' if not whole else ''}" if count != 1 else "1 token"


def exactly(usd: Decimal) -> str:
    """To the nano-dollar, rounded up: of two amounts that differ by little, a person must see which is more."""
    return amount(prices.from_nanos(prices.to_nanos(usd)))


def _amount(unit: str, number: int) -> Decimal | int:
    return prices.from_nanos(number) if unit == "usd" else number


def no_room(call: Call, refused: HoldRefused, needed: int) -> NoRoom:
    """The event that a call, which needs so much, finds no room in an account."""
    unit = refused.unit
    amounts = (_amount(unit, number) for number in (refused.limit, refused.settled, refused.held))
    return NoRoom(call.request_id, Share(refused.account.scope, unit, *amounts), _amount(unit, needed))


def full(refused: HoldRefused) -> str:
    """That there is no room, because of what others hold."""
    say = words(refused.unit)
    spent = f"{say(refused.settled)} of {say(refused.limit, whole=True)} spent"
    return f"{scope_of(refused.account)}: {spent}, {say(refused.held)} held by calls in flight"


def scope_of(account: Account) -> str:
    """Its scope, fit for a person."""
    return tidy(account.scope, limit=100)


def moment(at: datetime) -> str:
    """When a window ends, in the zone that it is kept in."""
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
