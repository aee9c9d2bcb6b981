"""The door to genai-prices: which of its entries stands for the model at an endpoint.

The provider is told by the address first: whoever calls ``https://api.openai.com`` pays OpenAI, whatever the entry in
the settings is named. Then by the provider's name. Behind any other address stands a proxy or a stranger, and there a
price that is too low would be worse than none, so only two kinds of name are taken for what they say:

- names that say who serves (``groq/llama-3.1-8b-instant``, as LiteLLM writes them), unless the weights are open and the
  name is only that of their maker (``openai/gpt-oss-120b``): anyone may serve those at any price;
- names of models that only their maker sells (``gpt-…``, ``claude-…``, ``gemini-…``, ``grok-…``).

Both are priced at the maker's list price, and say so (`Entry.listed`). For all else ``price`` in the settings is the way.

genai-prices takes 0.15 s to import, so nothing here does it before the first question; `load` does it ahead of time,
on a thread of the caller's choice. It is never asked to fetch anything.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from datetime import UTC, date, datetime
from functools import cache, lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from genai_prices.types import ModelInfo, ModelPrice, Provider

__all__ = ["Entry", "find", "is_loaded", "load", "newest_price", "version", "window"]

# Names that people use, where genai-prices has another.
_ALIASES = {
    "bedrock": "aws",
    "azure_ai": "azure",
    "fireworks_ai": "fireworks",
    "gemini": "google",
    "vertex_ai": "google",
    "moonshot": "moonshotai",
    "together_ai": "together",
    "xai": "x-ai",
    "z-ai": "zai",
}
_MAKERS = (
    (re.compile(r"(?:ft:)?gpt-|chatgpt-|o[134](?:-|$)|text-embedding-[3a]"), "openai"),
    (re.compile(r"claude-"), "anthropic"),
    (re.compile(r"gemini-"), "google"),
    (re.compile(r"grok-"), "x-ai"),
)
_OPEN_WEIGHTS = re.compile(r"gpt-oss|gemma|llama|grok-[12](?!\d)|whisper")
_MAKERS_OF_OPEN_WEIGHTS = frozenset({"openai", "google", "meta", "x-ai"})
_LONGEST_NAME = 200  # a server can name its model as it likes; matching costs time by length

_DAY, _MINUTE = 86_400, 60


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """A model as the table knows it.

    Attributes:
        info: genai-prices' own record.
        own: it stands under the provider itself, so that the provider's service tiers apply.
        listed: found by the name alone: what its maker asks, not what the address is known to ask.
        grain: seconds for which a price is sure to hold (a day, a minute); 0 where it never changes.
    """

    info: ModelInfo
    own: bool
    listed: bool
    grain: int

    def prices(self, at: float, context: dict[str, str] | None = None) -> ModelPrice:
        """Prices for a request sent at ``at`` (epoch seconds)."""
        return self.info.get_prices(datetime.fromtimestamp(at, UTC), context)

    def knows(self, context: dict[str, str]) -> bool:
        """Whether the table has prices for exactly these circumstances."""
        return self.own and any(variant.when == context for variant in self.info.price_variants or ())


@lru_cache(maxsize=1024)
def find(provider: str, base_url: str, model: str) -> Entry | None:
    """The entry for ``model`` at that address; None where it is unknown or not sure."""
    name = model.lower().strip()
    if not name or len(name) > _LONGEST_NAME:
        return None
    if seller := _at(base_url):
        return _entry(seller, name)
    if seller := _named(provider):
        return None if _is_anyones(seller, name) else _entry(seller, name)
    prefix, slash, rest = name.partition("/")
    if slash and (seller := _named(prefix)):
        return None if _is_anyones(seller, rest) else _entry(seller, rest, listed=True)
    maker = next((maker for pattern, maker in _MAKERS if pattern.match(name)), None)
    seller = _named(maker) if maker else None
    return _entry(seller, name, listed=True) if seller and not _is_anyones(seller, name) else None


def window(provider: str, base_url: str, model: str) -> int | None:
    """Context window in tokens; None where the table does not say."""
    entry = find(provider, base_url, model)
    return entry.info.context_window if entry else None


def load() -> None:
    """Import the table now (0.15 s)."""
    _sellers()
    newest_price()


def is_loaded() -> bool:
    """Whether asking would import nothing more."""
    return "genai_prices.data" in sys.modules


@cache
def version() -> str:
    """Which table it is, as a ledger should remember it: ``genai-prices 0.2.3``. Imports nothing."""
    from importlib.metadata import version as installed

    return f"genai-prices {installed('genai-prices')}"


@cache
def newest_price() -> date | None:
    """The last day by now on which the table saw a price change: it is at least that new."""
    today = datetime.now(UTC).date()
    return max((day for day in _starts() if day <= today), default=None)


def _starts() -> Iterator[date]:
    for seller in _sellers().values():
        for info in seller.models:
            for constraint in _constraints(info):
                if isinstance(day := getattr(constraint, "start_date", None), date):
                    yield day


@cache
def _sellers() -> dict[str, Provider]:
    from genai_prices.data_snapshot import get_snapshot

    return {seller.id: seller for seller in get_snapshot().providers}


def _at(base_url: str) -> Provider | None:
    return next((seller for seller in _sellers().values() if re.match(seller.api_pattern, base_url)), None)


def _named(name: str) -> Provider | None:
    return _sellers().get(_ALIASES.get(name.lower(), name.lower()))


def _is_anyones(seller: Provider, name: str) -> bool:
    return seller.id in _MAKERS_OF_OPEN_WEIGHTS and _OPEN_WEIGHTS.search(name) is not None


def _entry(seller: Provider, name: str, *, listed: bool = False) -> Entry | None:
    info = seller.find_model(name.removeprefix("models/"), all_providers=list(_sellers().values()))
    if info is None:
        return None
    own = any(info is model for model in seller.models)
    return Entry(info, own, listed, _grain(info))


def _grain(info: ModelInfo) -> int:
    constraints = list(_constraints(info))
    if not constraints:
        return 0
    return _DAY if all(hasattr(constraint, "start_date") for constraint in constraints) else _MINUTE


def _constraints(info: ModelInfo) -> Iterator[object]:
    dated = info.prices if isinstance(info.prices, list) else []
    for price in (*dated, *(info.price_variants or ())):
        if price.constraint is not None:
            yield price.constraint
