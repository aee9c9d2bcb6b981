"""A circuit as one process tells the others of it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

__all__ = ["STATES", "CircuitState"]

STATES = frozenset({"closed", "open", "half_open", "isolated"})
"""What a circuit can be."""


class CircuitState(NamedTuple):
    """A circuit as others should see it. Times are epoch seconds, since clocks of processes differ in all else.

    ``version`` counts the changes; a change is only taken over the version that it was made from.
    """

    endpoint: str
    state: str
    version: int
    reopens_at: float
    failures_in_row: int
    successes: int
    last_failure: str | None

    @classmethod
    def checked(cls, *fields: Any) -> CircuitState | None:
        """What a store holds; None where no llmkit can have written it."""
        try:
            found = cls(*fields)
            sound = (
                isinstance(found.endpoint, str)
                and found.state in STATES
                and all(type(each) is int and each >= 0 for each in (found.version, *found[4:6]))
                and math.isfinite(found.reopens_at)
                and isinstance(found.last_failure, str | None)
            )
        except (TypeError, ValueError, OverflowError):
            return None
        return found if sound else None
