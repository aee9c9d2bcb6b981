"""USD as people read them."""

from __future__ import annotations

from decimal import Decimal

__all__ = ["amount", "money"]


def money(usd: Decimal) -> str:
    """What was spent, short: cents from a cent on, else to three digits that count; ``$0.000481``, ``$1.20``."""
    if not usd:
        return "$0"
    if usd >= Decimal("0.01"):
        return f"${usd:,.2f}" if usd >= 1 else f"${usd:.4f}"
    return f"${usd:.{2 - usd.adjusted()}f}".rstrip("0")


def amount(usd: Decimal) -> str:
    """What was set, as a person writes it, to its last digit: ``$5``, ``$0.50``, ``$0.000001``."""
    whole, _, cents = f"{usd:,f}".partition(".")
    cents = cents.rstrip("0")
    return f"${whole}.{cents.ljust(2, '0')}" if cents else f"${whole}"
