"""Ask again, when asking again can help.

Only before the first token, only for errors that say so (`ProviderError.retryable`), only within the call's deadline.
The wait is what the server asked for, or exponential with full jitter. tenacity runs the loop.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmkit.errors import ProviderError
from llmkit.events import Waiting, emit

if TYPE_CHECKING:
    from tenacity import RetryCallState

    from llmkit.call import Call
    from llmkit.clock import Clock
    from llmkit.config import RetrySettings
    from llmkit.pipeline import CallNext
    from llmkit.reply import Reply

__all__ = ["Retry"]

FLOOR_S = 0.1  # a jitter of nothing would be a stampede


class Retry:
    """Up to ``settings.attempts`` attempts in all, at one endpoint."""

    def __init__(self, settings: RetrySettings, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock

    async def __call__(self, call: Call, call_next: CallNext) -> Reply:
        try:
            return await call_next(call)
        except ProviderError as error:
            if not error.retryable or self._settings.attempts <= 1:
                raise
            first = error
        return await self._again(call, call_next, first)

    async def _again(self, call: Call, call_next: CallNext, first: ProviderError) -> Reply:
        """The loop, entered with the first attempt already failed: a call that succeeds never pays for it."""
        from tenacity import AsyncRetrying, stop_after_attempt

        failed: ProviderError | None = first

        async def attempt() -> Reply:
            nonlocal failed
            if failed is not None:
                error, failed = failed, None
                raise error
            return await call_next(call)

        def wait(state: RetryCallState) -> float:
            return self._wait(_error(state), state.attempt_number)

        def no_time(state: RetryCallState) -> bool:
            # tenacity asks `stop` with the wait it has just computed in `upcoming_sleep`.
            return call.deadline is not None and self._clock.now() + state.upcoming_sleep >= call.deadline

        async def sleep(seconds: float) -> None:
            call.trail.waited_s += seconds
            await self._clock.sleep(seconds)

        def tell(state: RetryCallState) -> None:
            error = _error(state)
            emit(call, Waiting(call.request_id, state.upcoming_sleep, error.message, call.endpoint.name))

        retrying = AsyncRetrying(
            retry=lambda state: isinstance(_error(state), ProviderError) and _error(state).retryable,
            stop=lambda state: stop_after_attempt(self._settings.attempts)(state) or no_time(state),
            wait=wait,
            sleep=sleep,
            before_sleep=tell,
            retry_error_callback=lambda state: self._give_up(call, state),
        )
        return await retrying(attempt)

    def _give_up(self, call: Call, state: RetryCallState) -> Reply:
        error = _error(state)
        if state.attempt_number < self._settings.attempts and call.deadline is not None:
            left = max(0.0, call.deadline - self._clock.now())
            error.next_step = (
                f"not tried again: the next attempt was due in {state.upcoming_sleep:.1f} s and the call's total "
                f"timeout leaves {left:.1f} s; raise it (--timeout), or add a fallback"
            )
        raise error

    def _wait(self, error: ProviderError, attempt: int) -> float:
        """Seconds to wait after failed attempt number ``attempt``."""
        if error.retry_after is not None:
            return max(FLOOR_S, error.retry_after)
        ceiling = min(self._settings.maximum, self._settings.initial * 2.0 ** (attempt - 1))
        return max(FLOOR_S, self._clock.random() * ceiling)


def _error(state: RetryCallState) -> ProviderError:
    assert state.outcome is not None
    return state.outcome.exception()  # type: ignore[return-value]
