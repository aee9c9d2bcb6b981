"""What a call costs: exact, at the prices of its date, and unknown rather than wrong.

Where a price comes from, in this order: ``price`` in the settings; nothing is paid on the user's own hardware or to the
simulator; genai-prices (see `llmkit.models.table` for what is taken as known). An unknown price is None, never 0.

Prices are kept as whole yoctodollars (10⁻²⁴ USD) a token, and costs are sums of products of integers: exact whatever the
user's decimal context, and a few microseconds a call. Only tokens are priced. What else a provider bills (web searches
it ran, audio and video at rates of their own) does not show in the usage, and so not in the cost.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from decimal import MAX_EMAX, MIN_EMIN, ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from llmkit.models import table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from genai_prices.types import ModelPrice

    from llmkit.call import Message
    from llmkit.endpoint import Endpoint, Price
    from llmkit.models.table import Entry
    from llmkit.reply import Usage

__all__ = [
    "UNLIMITED",
    "Cost",
    "affordable_output",
    "asks_for_cache",
    "cost",
    "from_nanos",
    "is_free",
    "is_known",
    "to_nanos",
    "worst_case",
    "worst_nanos",
]

UNLIMITED = sys.maxsize
"""What `affordable_output` says where output costs nothing."""

_YOCTO = 24
_EXACT = Context(prec=200, Emax=MAX_EMAX, Emin=MIN_EMIN, traps=[])  # the user's own context may round
_MOST_TOKENS = 10**12  # a server may report any number; this still fits into a store's nanodollars
_STANDARD_TIERS = frozenset({None, "", "auto", "default", "standard", "on_demand"})


@dataclass(frozen=True, slots=True)
class Cost:
    """What an attempt cost.

    Attributes:
        usd: exact; `to_nanos` rounds it up for a store.
        source: ``config``, ``local``, ``simulated``, or the price table with its version. After it, where it holds,
            ``list price`` (the maker's, because the address is nobody the table knows) and ``service tier unknown``
            (the table has no price for that tier, so it is the standard one).
        price: what it was made with, USD per million tokens, as JSON; None where nothing is paid.
        price_date: the day (ISO) up to which the price table knows prices; None where they are not from a table.
    """

    usd: Decimal
    source: str
    price: str | None = None
    price_date: str | None = None


class _Rates(NamedTuple):
    """Yoctodollars a token, for requests with more than ``above`` input tokens; ``request`` is for each of them."""

    above: int
    input: int
    cached_input: int
    cache_write: int
    cache_write_1h: int
    output: int | None
    reasoning: int
    image: int
    request: int

    def of(self, usage: Usage) -> int | None:
        """Yoctodollars for ``usage``. Parts that contradict their totals are cut to them."""
        total = _counted(usage.input_tokens)
        output = _counted(usage.output_tokens)
        cost = self.request + total * self.input
        if usage.cached_input_tokens or usage.cache_write_tokens:
            write = min(_counted(usage.cache_write_tokens), total)
            write_1h = min(_counted(usage.cache_write_1h_tokens), write)
            cached = min(_counted(usage.cached_input_tokens), total - write)
            cost += cached * (self.cached_input - self.input)
            cost += (write - write_1h) * (self.cache_write - self.input) + write_1h * (self.cache_write_1h - self.input)
        if self.output is None:
            return None if output else cost
        cost += output * self.output
        if self.reasoning != self.output:
            cost += min(_counted(usage.reasoning_tokens), output) * (self.reasoning - self.output)
        return cost


class _Most(NamedTuple):
    """The dearest rates of requests of up to some size: yoctodollars a token, whatever its kind, and a request."""

    above: int
    input: int
    output: int | None
    request: int


@dataclass(frozen=True, slots=True)
class _Tariff:
    """What one model costs at one time.

    Attributes:
        rates: by size of the request, smallest first.
        most: for each of them, the dearest rates so far, without and with cache writes that must be asked for.
        texts: for each of them, by ``above``, what `Cost.price` says.
        date: of the table that they are from.
    """

    rates: tuple[_Rates, ...]
    most: tuple[tuple[_Most, ...], tuple[_Most, ...]]
    source: str
    texts: Mapping[int, str | None]
    date: str | None = None

    def at(self, input_tokens: int) -> _Rates:
        if len(self.rates) == 1:
            return self.rates[0]
        return next((rates for rates in reversed(self.rates) if input_tokens > rates.above), self.rates[0])

    def most_at(self, input_tokens: int, *, cache_writes: bool) -> _Most:
        most = self.most[cache_writes]
        if len(most) == 1:
            return most[0]
        return next((rates for rates in reversed(most) if input_tokens > rates.above), most[0])

    def worst(self, input_tokens: int, output_tokens: int, *, cache_writes: bool) -> int | None:
        """Yoctodollars that a request of up to so many tokens can cost; None where output has no price."""
        most = self.most_at(input_tokens, cache_writes=cache_writes)
        if most.output is None and output_tokens > 0:
            return None
        return _counted(input_tokens) * most.input + _counted(output_tokens) * (most.output or 0) + most.request


def cost(
    endpoint: Endpoint, usage: Usage, *, at: float, model: str | None = None, service_tier: str | None = None
) -> Cost | None:
    """What ``usage`` cost; None where the price is unknown.

    Args:
        endpoint: where the request went.
        usage: tokens; cached input and cache writes inside the input, reasoning inside the output.
        at: when the request was sent, epoch seconds.
        model: the model that the reply names. It is what is billed, if the table knows it.
        service_tier: the tier that the reply names (``flex``, ``priority``, ``batch``, …).
    """
    tariff = _tariff(endpoint, at, model, service_tier)
    if tariff is None:
        return None
    rates = tariff.at(usage.input_tokens)
    yocto = rates.of(usage)
    return None if yocto is None else Cost(_usd(yocto), tariff.source, tariff.texts[rates.above], tariff.date)


def worst_case(
    endpoint: Endpoint,
    input_tokens: int,
    output_tokens: int,
    *,
    at: float,
    service_tier: str | None = None,
    cache_writes: bool = True,
) -> Decimal | None:
    """The most a request of up to so many tokens can cost, in USD; None where the price is unknown.

    No token is taken to come from a cache, each to be of the dearest kind (an image, say), and the prices for large
    requests hold from their threshold on. Caches that a provider writes unasked (OpenAI's newer models) are always
    in; those that must be asked for (Anthropic's, at up to twice the input price) only with ``cache_writes``.

    Args:
        endpoint: where the request would go.
        input_tokens: at most, all of them.
        output_tokens: at most, reasoning included.
        at: when it would be sent, epoch seconds.
        service_tier: the tier that the request asks for.
        cache_writes: whether the request may ask for a cache to be written, see `asks_for_cache`.
    """
    tariff = _tariff(endpoint, at, None, service_tier)
    yocto = None if tariff is None else tariff.worst(input_tokens, output_tokens, cache_writes=cache_writes)
    return None if yocto is None else _usd(yocto)


def worst_nanos(
    endpoint: Endpoint,
    input_tokens: int,
    output_tokens: int,
    *,
    at: float,
    service_tier: str | None = None,
    cache_writes: bool = True,
) -> int | None:
    """`worst_case` in whole nano-dollars, rounded up, as a store holds it."""
    tariff = _tariff(endpoint, at, None, service_tier)
    yocto = None if tariff is None else tariff.worst(input_tokens, output_tokens, cache_writes=cache_writes)
    return None if yocto is None else -(-yocto // 10 ** (_YOCTO - 9))


def affordable_output(
    endpoint: Endpoint,
    input_tokens: int,
    usd: Decimal,
    *,
    at: float,
    service_tier: str | None = None,
    cache_writes: bool = True,
) -> int | None:
    """The most output tokens for which `worst_case` stays within ``usd``; None where the price is unknown.

    0 where not even the input can be paid, `UNLIMITED` where it can and output costs nothing. Arguments as there.
    """
    tariff = _tariff(endpoint, at, None, service_tier)
    if tariff is None:
        return None
    most = tariff.most_at(input_tokens, cache_writes=cache_writes)
    if most.output is None:
        return None
    if not usd.is_finite():
        return UNLIMITED if usd == Decimal("Infinity") else 0
    left = _yocto(usd) - _counted(input_tokens) * most.input - most.request
    if left < 0:
        return 0
    return min(left // most.output, UNLIMITED) if most.output else UNLIMITED


def is_known(endpoint: Endpoint, *, at: float) -> bool:
    """Whether a reply from there has a price."""
    tariff = _tariff(endpoint, at, None, None)
    return tariff is not None and tariff.rates[0].output is not None


async def ready(endpoint: Endpoint) -> None:
    """Load what pricing a call to ``endpoint`` needs, off the event loop: it takes 0.2 s, once a process."""
    if endpoint.price is None and not endpoint.local and not endpoint.simulated and not table.is_loaded():
        import asyncio

        await asyncio.to_thread(table.load)


def is_free(endpoint: Endpoint) -> bool:
    """Whether nothing from there is ever billed: the user's own hardware and the simulator, unless they have a price."""
    if endpoint.price is None:
        return endpoint.local or endpoint.simulated
    return not any(_config_tariff(endpoint.price, endpoint.wire).rates[0][1:])


def asks_for_cache(messages: Sequence[Message], extra: Mapping[str, Any]) -> bool:
    """Whether a request says ``cache_control`` anywhere, so that the provider may bill the writing of a cache."""
    if any(isinstance(message.content, list) and "cache_control" in repr(message.content) for message in messages):
        return True
    return bool(extra) and "cache_control" in repr(extra)


@lru_cache(maxsize=256)
def to_nanos(usd: Decimal) -> int:
    """Whole nanodollars, rounded up: what a store keeps."""
    return int(_EXACT.scaleb(usd, 9).to_integral_value(ROUND_CEILING, _EXACT))


@lru_cache(maxsize=256)
def from_nanos(nanos: int) -> Decimal:
    """USD out of a store."""
    return _scaled(nanos, 9)


# -- tariffs ---------------------------------------------------------------------------------------------------------


def _tariff(endpoint: Endpoint, at: float, model: str | None, service_tier: str | None) -> _Tariff | None:
    if endpoint.price is not None:
        return _config_tariff(endpoint.price, endpoint.wire)
    if endpoint.simulated:
        return _SIMULATED
    if endpoint.local:
        return _LOCAL
    from llmkit.models import table

    if (
        model is not None
        and model != endpoint.model
        and (entry := table.find(endpoint.provider, endpoint.base_url, model))
    ):
        tariff = _table_tariff(entry, _period(entry, at), service_tier, endpoint.wire)
        if tariff is not None:
            return tariff
    entry = table.find(endpoint.provider, endpoint.base_url, endpoint.model)
    return _table_tariff(entry, _period(entry, at), service_tier, endpoint.wire) if entry else None


def _period(entry: Entry, at: float) -> float:
    """The beginning of the time around ``at`` for which one price holds."""
    return at // entry.grain * entry.grain if entry.grain else 0.0


@lru_cache(maxsize=1024)
def _table_tariff(entry: Entry, at: float, service_tier: str | None, wire: str) -> _Tariff | None:
    source = [table.version()]
    if entry.listed:
        source.append("list price")
    context = {"processing": "batch"} if service_tier == "batch" else {"service_tier": service_tier or "default"}
    known = entry.knows(context)
    if not known and service_tier not in _STANDARD_TIERS:
        source.append("service tier unknown")
    prices = entry.prices(at, context if known else None)
    is_free = entry.info.id.endswith(":free") and not vars(prices)  # the table leaves the prices of these empty
    rates = _ZERO if is_free else _table_rates(prices, wire)
    newest = table.newest_price()
    return _made(rates, ", ".join(source), wire, newest.isoformat() if newest else None) if rates else None


def _made(rates: tuple[_Rates, ...], source: str, wire: str, date: str | None = None) -> _Tariff:
    unasked = wire != "anthropic"  # OpenAI's newer models write their cache by themselves, and bill it
    texts = {rate.above: _text(rate) for rate in rates}
    return _Tariff(rates, (_most(rates, unasked, unasked), _most(rates, True, True)), source, texts, date)


def _text(rate: _Rates) -> str | None:
    """The rates as a ledger keeps them; None where nothing is paid. What costs what its kind costs is left out."""
    if not any(rate[1:]):
        return None
    kinds = {
        "input": rate.input,
        "cached_input": rate.cached_input if rate.cached_input != rate.input else None,
        "cache_write": rate.cache_write if rate.cache_write != rate.input else None,
        "cache_write_1h": rate.cache_write_1h if rate.cache_write_1h != rate.cache_write else None,
        "output": rate.output,
        "reasoning": rate.reasoning if rate.reasoning != rate.output else None,
        "requests": rate.request or None,
    }
    return json.dumps({kind: f"{_scaled(yocto, _YOCTO - 6):f}" for kind, yocto in kinds.items() if yocto is not None})


def _most(rates: tuple[_Rates, ...], writes: bool, long_writes: bool) -> tuple[_Most, ...]:
    """The dearest so far, for each size."""
    found: list[_Most] = []
    for rate in rates:
        inputs = [rate.input, rate.cached_input, rate.image]
        inputs += [rate.cache_write] * writes + [rate.cache_write_1h] * long_writes
        output = None if rate.output is None else max(rate.output, rate.reasoning)
        last = found[-1] if found else _Most(-1, 0, 0, 0)
        output = None if output is None or last.output is None else max(output, last.output)
        found.append(_Most(rate.above, max(*inputs, last.input), output, max(rate.request, last.request)))
    return tuple(found)


# The prices a cost is made of; and those beside them that no usage speaks of.
_PRICED = frozenset(
    {"input_mtok", "cache_read_mtok", "cache_write_mtok", "cache_write_1h_mtok", "output_mtok", "output_reasoning_mtok"}
)
_ASIDE = ("audio", "image", "video", "citation")


def _table_rates(prices: ModelPrice, wire: str) -> tuple[_Rates, ...] | None:
    """Rates by size of the request; None where tokens are not what is paid for, or not in a way known here."""
    given = {name: price for name, price in vars(prices).items() if price is not None}
    if "input_mtok" not in given:
        return None
    strange = {name for name in given if name.endswith("_mtok")} - _PRICED
    if any(not any(word in name for word in _ASIDE) for name in strange):
        return None
    starts = {tier.start for price in given.values() for tier in getattr(price, "tiers", ())}
    return tuple(
        _rates(above, {name: _tier_price(price, above) for name, price in given.items()}, wire)
        for above in (-1, *sorted(starts))
    )


def _tier_price(price: Any, above: int) -> Decimal:
    """The price that holds for requests just larger than ``above``; crossing a threshold re-prices the whole request."""
    if isinstance(price, Decimal):
        return price
    reached: list[Decimal] = [tier.price for tier in price.tiers if tier.start <= above]
    return reached[-1] if reached else Decimal(price.base)


def _rates(above: int, prices: Mapping[str, Decimal | None], wire: str) -> _Rates:
    """Yoctodollars from USD a million tokens. What lacks a price of its own costs what its kind costs.

    Not so Anthropic's cache writes, which cost 1.25 times the input for five minutes and twice for an hour.
    """

    def yocto(name: str) -> int | None:
        price = prices.get(name)
        return None if price is None else _yocto_a_token(price)

    usual = yocto("input_mtok") or 0
    write = yocto("cache_write_mtok")
    write_1h = yocto("cache_write_1h_mtok")
    cached = yocto("cache_read_mtok")
    output = yocto("output_mtok")
    reasoning = yocto("output_reasoning_mtok")
    if write is None:
        write = -(-usual * 5 // 4) if wire == "anthropic" else usual
    if write_1h is None:
        write_1h = max(write, 2 * usual) if wire == "anthropic" else write
    return _Rates(
        above=above,
        input=usual,
        cached_input=usual if cached is None else cached,
        cache_write=write,
        cache_write_1h=write_1h,
        output=output,
        reasoning=(output or 0) if reasoning is None else reasoning,
        image=yocto("input_image_mtok") or 0,
        request=1000 * (yocto("requests_kcount") or 0),
    )


def _config_tariff(price: Price, wire: str) -> _Tariff:
    # Remembered by identity: hashing a price's decimals costs more than the rest of a call's pricing.
    held = _CONFIGURED.get((id(price), wire))
    if held is not None and held[0] is price:
        return held[1]
    prices = {
        "input_mtok": price.input,
        "cache_read_mtok": price.cached_input,
        "cache_write_mtok": price.cache_write,
        "output_mtok": price.output,
    }
    tariff = _made((_rates(-1, prices, wire),), "config", wire)
    if len(_CONFIGURED) >= 256:
        _CONFIGURED.clear()
    _CONFIGURED[id(price), wire] = (price, tariff)
    return tariff


_CONFIGURED: dict[tuple[int, str], tuple[Price, _Tariff]] = {}


# -- numbers ---------------------------------------------------------------------------------------------------------


def _counted(tokens: int) -> int:
    if 0 <= tokens <= _MOST_TOKENS:
        return tokens
    return _MOST_TOKENS if tokens > 0 else 0


def _yocto(usd: Decimal) -> int:
    return int(_EXACT.scaleb(usd, _YOCTO).to_integral_value(ROUND_FLOOR, _EXACT))


def _yocto_a_token(usd_a_million: Decimal) -> int:
    return int(_EXACT.scaleb(usd_a_million, _YOCTO - 6).to_integral_value(ROUND_CEILING, _EXACT))


def _usd(yocto: int) -> Decimal:
    return _scaled(yocto, _YOCTO)


def _scaled(number: int, places: int) -> Decimal:
    """``number`` with the point moved left, without trailing zeros, and never as 1E+1."""
    if not number:
        return Decimal(0)
    whole, rest = divmod(number, 10**places)
    return Decimal(whole) if not rest else _EXACT.normalize(_EXACT.scaleb(Decimal(number), -places))


_ZERO = (_rates(-1, {"input_mtok": Decimal(0), "output_mtok": Decimal(0)}, ""),)
_SIMULATED = _made(_ZERO, "simulated", "")
_LOCAL = _made(_ZERO, "local", "")
