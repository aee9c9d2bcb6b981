"""The reply of last resort: a text of the user's own when every link is out, marked, at no cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmkit.errors import AllModelsFailed, CircuitOpen, LLMKitError, ProviderError, QuotaExhausted
from llmkit.events import Degraded as DegradedNow
from llmkit.events import emit
from llmkit.reply import NOTHING, Chunk, Head, Reply

if TYPE_CHECKING:
    from llmkit.call import Call
    from llmkit.clock import Clock
    from llmkit.pipeline import CallNext

__all__ = ["Degraded"]


class Degraded:
    """Answers with ``call.degraded_text`` when no link can answer for now.

    Only outages are covered. A wrong key, a wrong model name or a refused request stays an error: a template would
    hide for ever what only the user can mend.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    async def __call__(self, call: Call, call_next: CallNext) -> Reply:
        if call.degraded_text is None:
            return await call_next(call)
        try:
            return await call_next(call)
        except LLMKitError as error:
            if not is_outage(error):
                raise
            emit(call, DegradedNow(call.request_id, f"{type(error).__name__}: {error.message}"))
        head = Head()
        head.model = "degraded"
        head.finish_reason = "stop"
        return Reply(call, NOTHING, head=head, clock=self._clock, first=[Chunk(call.degraded_text)], where="degraded")


def is_outage(error: LLMKitError) -> bool:
    if isinstance(error, AllModelsFailed):
        return any(is_outage(each) for each in error.errors)
    return isinstance(error, CircuitOpen | QuotaExhausted) or (isinstance(error, ProviderError) and error.transient)
