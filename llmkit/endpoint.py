"""Where a call can go: an endpoint, and an endpoint as one chain uses it.

Both are plain data. What is known of a provider (base URL, key variable, quirks) is an entry in
`llmkit.providers.catalog`; what a user says in ``llmkit.toml`` overrides it; together they make an `Endpoint`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from decimal import Decimal

__all__ = ["Endpoint", "Link", "Price", "is_loopback"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """USD per million tokens. ``cached_input`` None means cached input costs what input costs."""

    input: Decimal
    output: Decimal
    cached_input: Decimal | None = None
    cache_write: Decimal | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One model behind one URL.

    Attributes:
        provider: an entry of the provider catalog, or one of the user's own.
        model: the name the provider knows.
        base_url: without a trailing slash, version included (``https://api.openai.com/v1``).
        wire: the wire format spoken there, ``openai`` or ``anthropic``.
        api_key_env: the *name* of the variable that holds the key; None where none is needed.
        key_required: whether a missing key is an error before anything is sent.
        local: on the user's own hardware: nothing is billed unless ``price`` says so.
        simulated: served by the simulator.
        price: overrides the price table.
        window: context window in tokens; None where unknown (then the model table is asked).
        max_output: most output tokens the model gives; None where unknown.
        headers: sent with each request, after llmkit's own.
        quirks: names of deviations that the wire format knows how to follow.
    """

    provider: str
    model: str
    base_url: str
    wire: str = "openai"
    api_key_env: str | None = None
    key_required: bool = False
    local: bool = False
    simulated: bool = False
    price: Price | None = None
    window: int | None = None
    max_output: int | None = None
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)  # a value may be a secret
    quirks: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """``provider:model``, as people write it."""
        return f"{self.provider}:{self.model}"

    @property
    def key(self) -> tuple[str, str, str]:
        """What breakers and rate limits are kept by."""
        return (self.provider, self.base_url, self.model)


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """An endpoint as one chain uses it.

    Attributes:
        endpoint: where it goes.
        max_cost_usd: skipped when the worst case of one attempt costs more.
        max_latency_s: seconds until its first token, its retries and waits included; then the next link is tried.
        disabled: never used, but still named among those that were not.
        only_on: empty for an ordinary link; else the link is used only after an error of that kind
            (``context_too_long``, ``refused``) on an earlier one.
    """

    endpoint: Endpoint
    max_cost_usd: Decimal | None = None
    max_latency_s: float | None = None
    disabled: bool = False
    only_on: frozenset[str] = frozenset()


def is_loopback(base_url: str) -> bool:
    """Whether the URL stays on this machine. Names are not looked up: only ``localhost`` and numbers count."""
    from urllib.parse import urlsplit

    host = urlsplit(base_url).hostname or ""
    return host in {"localhost", "::1"} or re.fullmatch(r"127(\.\d{1,3}){3}", host) is not None
