"""Stop asking an endpoint that is down, and find out gently when it is back.

One circuit an endpoint (provider, base URL, model)::

    closed ──failures──▶ open ──open_s──▶ half_open ──successes──▶ closed
                          ▲                   │
                          └─────a failure─────┘           isolated: by hand, until reset

It opens after a number of failures in a row, or when the failure rate over a sliding window is too high. Only errors
that say the endpoint is unwell count (`ProviderError.transient`: overload, timeouts, lost connections, sustained 429,
garbage); a wrong key or a refused request is a sign of life.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING

from llmkit.errors import CallRejected, CircuitOpen, ContextTooLong, LLMKitError, ProviderError
from llmkit.events import CircuitChanged, emit
from llmkit.reply import Outcome, settled

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llmkit.call import Call
    from llmkit.clock import Clock
    from llmkit.config import BreakerSettings
    from llmkit.endpoint import Endpoint
    from llmkit.pipeline import CallNext
    from llmkit.reply import Reply

__all__ = ["Breaker", "Breakers", "Circuit"]

LONGEST_OPEN_S = 600.0  # a server's Retry-After may keep a circuit open longer than ``open_s``, but not for ever


class Circuit:
    """The state of one endpoint. Thread-safe; a ticket from `admit` goes back to `report` or `drop`."""

    def __init__(self, endpoint: Endpoint, settings: BreakerSettings, clock: Clock) -> None:
        self.endpoint = endpoint
        self.state = "closed"
        self.last_failure: str | None = None
        self.failures_in_row = 0
        self._settings = settings
        self._clock = clock
        self._lock = threading.Lock()
        self._window: deque[tuple[float, bool]] = deque(maxlen=1000)
        self._failed_in_window = 0
        self._reopens_at = 0.0
        self._probes = 0
        self._successes = 0
        self._era = 0  # a ticket of an earlier era says nothing about this one

    @property
    def retry_after(self) -> float | None:
        """Seconds until a probe is admitted; None when closed or isolated by hand."""
        return max(0.0, self._reopens_at - self._clock.now()) if self.state in {"open", "half_open"} else None

    def admit(self) -> int:
        """A ticket for one attempt.

        Raises:
            CircuitOpen: when none is admitted now.
        """
        with self._lock:
            if self.state == "closed":
                return self._era
            if self.state == "open" and self._clock.now() >= self._reopens_at:
                self._enter("half_open")
            if self.state != "half_open" or self._probes >= self._settings.probes:
                raise self._refusal()
            self._probes += 1
            return self._era

    def report(self, ticket: int, failure: ProviderError | None) -> None:
        """The attempt ended: ``failure`` if it says that the endpoint is unwell, else None."""
        with self._lock:
            if ticket != self._era:
                return
            if failure is not None:
                self._failed(failure)
            else:
                self._succeeded()

    def drop(self, ticket: int) -> None:
        """The attempt says nothing about the endpoint."""
        with self._lock:
            if ticket == self._era and self.state == "half_open":
                self._probes -= 1

    def isolate(self) -> None:
        """Admit nothing until `reset`."""
        with self._lock:
            self._enter("isolated")

    def reset(self) -> None:
        """Close it and forget what was."""
        with self._lock:
            self._enter("closed")
            self.last_failure = None

    def _failed(self, failure: ProviderError) -> None:
        self.last_failure = f"{type(failure).__name__}: {failure.message}"
        self.failures_in_row += 1
        self._note(ok=False)
        if self.state == "half_open" or self.failures_in_row >= self._settings.failures or self._rate_too_high():
            pause = max(self._settings.open_s, min(failure.retry_after or 0.0, LONGEST_OPEN_S))
            self._reopens_at = self._clock.now() + pause
            self._enter("open")

    def _succeeded(self) -> None:
        self.failures_in_row = 0
        if self.state == "half_open":
            self._probes -= 1
            self._successes += 1
            if self._successes >= self._settings.successes:
                self._enter("closed")
            return
        self._note(ok=True)

    def _note(self, *, ok: bool) -> None:
        window = self._window
        if len(window) == window.maxlen:
            self._forget_oldest()
        now = self._clock.now()
        window.append((now, ok))
        self._failed_in_window += not ok
        while window[0][0] <= now - self._settings.window_s:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        _, ok = self._window.popleft()
        self._failed_in_window -= not ok

    def _rate_too_high(self) -> bool:
        calls = len(self._window)
        return calls >= self._settings.minimum_calls and self._failed_in_window >= self._settings.rate * calls

    def _enter(self, state: str) -> None:
        self.state = state
        self._era += 1
        self._probes = self._successes = 0
        if state == "closed":
            self.failures_in_row = self._failed_in_window = 0
            self._window.clear()

    def _refusal(self) -> CircuitOpen:
        name, state = self.endpoint.name, self.state
        if state == "isolated":
            return CircuitOpen(f"{name} was isolated by hand", endpoint=name, state=state, retry_after=None)
        wait = self.retry_after or 0.0
        why = f"; last: {self.last_failure}" if self.last_failure else ""
        message = (
            f"the circuit of {name} is open after repeated failures, next probe in {wait:.0f} s{why}"
            if state == "open"
            else f"the circuit of {name} is half open and its probes are out{why}"
        )
        return CircuitOpen(message, endpoint=name, state=state, retry_after=wait)


class Breakers:
    """All circuits of a client, made as endpoints are first used."""

    def __init__(self, settings: BreakerSettings, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._circuits: dict[tuple[str, str, str], Circuit] = {}

    def of(self, endpoint: Endpoint) -> Circuit:
        circuit = self._circuits.get(endpoint.key)
        if circuit is None:
            circuit = self._circuits.setdefault(endpoint.key, Circuit(endpoint, self._settings, self._clock))
        return circuit

    def __iter__(self) -> Iterator[Circuit]:
        return iter(list(self._circuits.values()))

    def reset(self) -> None:
        """Close every circuit."""
        for circuit in self:
            circuit.reset()


class Breaker:
    """Lets an attempt through when its endpoint's circuit admits it, and tells the circuit how it ended."""

    def __init__(self, breakers: Breakers) -> None:
        self._breakers = breakers

    async def __call__(self, call: Call, call_next: CallNext) -> Reply:
        circuit = self._breakers.of(call.endpoint)
        before = circuit.state
        ticket = circuit.admit()
        self._tell(call, circuit, before)

        async def ended(outcome: Outcome) -> None:
            before = circuit.state
            _report(circuit, ticket, outcome)
            self._tell(call, circuit, before)

        return await settled(call_next(call), ended)

    @staticmethod
    def _tell(call: Call, circuit: Circuit, before: str) -> None:
        if circuit.state != before:
            emit(call, CircuitChanged(call.request_id, circuit.endpoint.name, before, circuit.state))


def _report(circuit: Circuit, ticket: int, outcome: Outcome) -> None:
    error = outcome.error
    if isinstance(error, ProviderError) and error.transient:
        circuit.report(ticket, error)
    elif outcome.reply is not None or isinstance(error, ProviderError | ContextTooLong):
        circuit.report(ticket, None)  # it answered, if only with a no; or the reader left while it was answering
    else:
        assert error is None or not isinstance(error, LLMKitError) or isinstance(error, CallRejected)
        circuit.drop(ticket)
