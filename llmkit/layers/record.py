"""One row a call: opened when it starts, closed when it ends, however it ends.

Outermost, so that a call that was refused, degraded or never sent has its row too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmkit.errors import LLMKitError
from llmkit.reply import Outcome, settled

if TYPE_CHECKING:
    from llmkit.call import Call
    from llmkit.ledger import Ledger
    from llmkit.pipeline import CallNext
    from llmkit.reply import Reply

__all__ = ["Record"]


class Record:
    """Writes the call's row to the ledger, and tells an error what the call had cost."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    async def __call__(self, call: Call, call_next: CallNext) -> Reply:
        self._ledger.call_began(call)

        async def ended(outcome: Outcome) -> None:
            if isinstance(outcome.error, LLMKitError):
                outcome.error.spent = call.trail.spent
                outcome.error.unseen = sum(attempt.maybe_billed for attempt in call.trail.attempts)
                outcome.error.request_id = call.request_id
            await self._ledger.call_ended(call, outcome)

        ledger = self._ledger
        return await settled(call_next(call) if ledger.is_open else _once_open(ledger, call, call_next), ended)


async def _once_open(ledger: Ledger, call: Call, call_next: CallNext) -> Reply:
    """A disk may be slow to begin with, and that is not the provider's time."""
    await ledger.open_store()
    return await call_next(call)
