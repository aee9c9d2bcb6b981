"""The layers. One file each; `standard` is the chain, read from top to bottom."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from llmkit.budgets import Budgets
    from llmkit.cache import AnswerCache
    from llmkit.call import Call
    from llmkit.clock import Clock
    from llmkit.config import Config
    from llmkit.endpoint import Endpoint
    from llmkit.flight import SingleFlight
    from llmkit.layers.breaker import Breakers
    from llmkit.ledger import Ledger
    from llmkit.pipeline import Layer

__all__ = ["standard"]


def standard(
    config: Config,
    *,
    clock: Clock,
    ledger: Ledger,
    breakers: Breakers,
    budgets: Budgets,
    answers: AnswerCache,
    key_of: Callable[[Call, Endpoint], str | None],
    flights: SingleFlight,
) -> list[Layer]:
    """The chain of every client, outermost first."""
    # Here and not above: none of this is needed before the first call, and loading must stay instant.
    from llmkit.layers.breaker import Breaker
    from llmkit.layers.budget import Budget
    from llmkit.layers.cache import Cache
    from llmkit.layers.degraded import Degraded
    from llmkit.layers.fallback import Fallback
    from llmkit.layers.meter import Meter
    from llmkit.layers.record import Record
    from llmkit.layers.retry import Retry
    from llmkit.layers.schema import SchemaCheck
    from llmkit.layers.timeout import Timeout

    return [
        Record(ledger),
        SchemaCheck(),  # what the cache has stored is checked as well
        # guardrails: what may be asked, and what may be answered
        # trim: what does not fit the window goes, before the cache key is made
        Cache(answers, key_of, clock, flights),  # a hit costs neither money nor rate limit
        Degraded(clock),
        # cascade: a cheaper chain first, where its answer is good enough
        Fallback(clock),
        # rate limit: by endpoint, so below the choice of it
        Retry(config.retry, clock),
        Breaker(breakers),
        Budget(clock, budgets, ledger),
        Timeout(clock),
        Meter(ledger, clock),
    ]
