"""The limits in force, in words: in one line, and what a single request may cost."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING

from llmkit.money import amount
from llmkit.redaction import tidy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llmkit.config import BudgetSettings, Limit

__all__ = ["in_words", "of_request"]

MANY = 6
"""More limits than these are counted, not named, where there is one line for all."""


def in_words(budget: BudgetSettings, cell: object = None, *, lift: str = "") -> str:
    """Every cap in one line; ``cell`` is what a cell may cost where ``%config`` says so. ``lift``: how to be rid of them.

    Those that hold by default are told from those that somebody set, since they hold for paid models only.
    """
    own: list[str] = []
    default: list[str] = []
    if cell is not None:
        own.append(f"{amount(Decimal(str(cell)))} a cell (as %config says)")
    elif budget.request_usd is not None:
        (own if budget.request_usd_set else default).append(f"{amount(budget.request_usd)} a request")
    if budget.request_tokens is not None:
        own.append(f"{budget.request_tokens:,} tokens a request")
    for limit in budget.limits:
        each = f"{'in all' if limit.window == 'total' else f'a {limit.window}'}{_whose(limit)}"
        if limit.usd is not None:
            (default if limit.is_default else own).append(f"{amount(limit.usd)} {each}")
        if limit.tokens is not None:
            own.append(f"{limit.tokens:,} tokens {each}")
    if not own and not default:
        return "no caps"
    parts = [f"caps: {_listed(own)}"] if own else []
    if default:
        parts.append(f"{'by default, ' if own else 'caps '}for paid models: {_listed(default)}")
    return "; ".join(parts) + (f" ({lift})" if lift else "")


def of_request(budget: BudgetSettings, cell: object = None) -> str:
    """What a single request may cost."""
    caps = []
    if cell is not None:
        caps.append(f"{amount(Decimal(str(cell)))} (as %config says)")
    elif budget.request_usd is not None:
        caps.append(amount(budget.request_usd) + ("" if budget.request_usd_set else " (by default)"))
    if budget.request_tokens is not None:
        caps.append(f"{budget.request_tokens:,} tokens")
    return f"at most {' and '.join(caps)}" if caps else "no cap"


def _listed(words: Sequence[str]) -> str:
    shown = list(words[:MANY])
    return ", ".join(shown if len(shown) == len(words) else [*shown, f"and {len(words) - MANY} more"])


def _whose(limit: Limit) -> str:
    if limit.kind == "all":
        return ""
    if limit.name == "*":
        return f" for each {limit.kind}"
    return f" for {limit.kind} {tidy(limit.name, limit=60)}"
