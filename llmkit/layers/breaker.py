"""Stop asking an endpoint that is down, and find out gently when it is back.

One circuit an endpoint (provider, base URL, model)::

    closed ──failures──▶ open ──open_s──▶ half_open ──successes──▶ closed
                          ▲                   │
                          └─────a failure─────┘           isolated: by hand, until reset

It opens after a number of failures in a row, or when the failure rate over a sliding window is too high. Only errors
that say the endpoint is unwell count (`ProviderError.transient`: overload, timeouts, lost connections, sustained 429,
garbage); a wrong key or a refused request is a sign of life.

Failures are counted by each process for itself; what comes of them is shared, where there is a store to share it by.
Every change of state is a version, and the newest one holds for all: others look once a second, and before a probe.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import threading
from collections import deque
from typing import TYPE_CHECKING, Any, TypeVar

from llmkit.circuit import CircuitState
from llmkit.endpoint import Endpoint
from llmkit.errors import CallRejected, CircuitOpen, ContextTooLong, LLMKitError, ProviderError, StoreError
from llmkit.events import CircuitChanged, emit
from llmkit.lock import new_lock
from llmkit.redaction import redact
from llmkit.reply import Outcome, settled
from llmkit.shield import shielded

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from llmkit.call import Call
    from llmkit.clock import Clock
    from llmkit.config import BreakerSettings
    from llmkit.pipeline import CallNext
    from llmkit.reply import Reply
    from llmkit.state.shared import Circuits

__all__ = ["Breaker", "Breakers", "Circuit"]

log = logging.getLogger("llmkit")

T = TypeVar("T")

LONGEST_OPEN_S = 600.0  # a server's Retry-After may keep a circuit open longer than ``open_s``, but not for ever
LOOK_AGAIN_S = 1.0  # how old what is known of other processes may be
AWAY_S = 10.0  # a store that could not be reached is left alone for so long
WRITES = 5  # others may change a circuit at the same moment
LAST_FAILURE = 300  # characters of it that are shared


class Circuit:
    """The state of one endpoint. Thread-safe; a ticket from `admit` goes back to `report` or `drop`.

    Attributes:
        name: what it is called in a store.
        version: of the state that is in the store, as far as is known here.
        unshared: whether it has changed here since.
        looked: when the store was last looked at, on `Clock.now`'s scale.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        settings: BreakerSettings,
        clock: Clock,
        share: Callable[[Circuit], object] = lambda _: None,
    ) -> None:
        self.endpoint = endpoint
        self.name = _name(endpoint)
        self.state = "closed"
        self.version = 0
        self.unshared = False
        self.looked = -math.inf
        self._share = share
        self._by_hand = False
        self._changes = 0
        self.last_failure: str | None = None
        self.failures_in_row = 0
        self._settings = settings
        self._clock = clock
        self._lock = new_lock()
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
            if self._is_due():
                self._enter("half_open")
            if not self._has_probes():
                raise self.refusal()
            self._probes += 1
            return self._era

    def plan(self) -> CircuitOpen | None:
        """What `admit` would raise now. Nothing is changed by asking."""
        with self._lock:
            return None if self.state == "closed" or self._is_due() or self._has_probes() else self.refusal()

    def _is_due(self) -> bool:
        return self.state == "open" and self._clock.now() >= self._reopens_at

    def _has_probes(self) -> bool:
        return self.state == "half_open" and self._probes < self._settings.probes

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
        """Admit nothing until `reset`, in no process that shares this circuit."""
        with self._lock:
            self._enter("isolated")
            self._by_hand = True
        self._share(self)

    def reset(self) -> None:
        """Close it and forget what was, in all processes that share it."""
        with self._lock:
            self._enter("closed")
            self.last_failure = None
            self._by_hand = True
        self._share(self)

    # -- what others know --------------------------------------------------------------------------------------------

    def news(self) -> tuple[CircuitState, int] | None:
        """What others do not know yet, and how many changes it stands for."""
        with self._lock:
            if not self.unshared:
                return None
            state = CircuitState(
                self.name,
                self.state,
                self.version + 1,
                self._clock.time() + self._reopens_at - self._clock.now() if self._reopens_at else 0.0,
                self.failures_in_row,
                self._successes,
                self.last_failure and redact(self.last_failure)[:LAST_FAILURE],
            )
            return state, self._changes

    def known(self, news: CircuitState, changes: int) -> None:
        """``news`` is in the store; what happened here meanwhile is not."""
        with self._lock:
            self.version = news.version
            if self._changes == changes:
                self.unshared = self._by_hand = False

    def adopt(self, found: CircuitState | None, since: int) -> None:
        """Take over what is in the store; ``since`` is what `version` was when it was asked for.

        What has been done here by hand comes after whatever others did before they knew of it.
        """
        with self._lock:
            version = found.version if found is not None else 0
            if self.version != since or version == since:
                return
            self.version = version
            if found is None or version < since:  # the store was begun anew
                self.unshared = self.unshared or self.state != "closed"
            elif not self._by_hand:
                self._become(found)

    def _become(self, found: CircuitState) -> None:
        now, ahead = self._clock.now(), found.reopens_at - self._clock.time()
        state = "closed" if _is_over(found, self._clock.time()) else found.state
        if not state == self.state == "half_open":  # then only the count of successes is new, and tickets stay good
            self._enter(state)
        self.unshared = False
        self._successes = found.successes
        if state != "closed":
            # The clock that wrote it, or this one, may have been put right since: bounded, whatever they say.
            self._reopens_at = now + min(ahead, max(self._settings.open_s, LONGEST_OPEN_S))
            self.failures_in_row = found.failures_in_row
            self.last_failure = found.last_failure

    # -- what happened here ------------------------------------------------------------------------------------------

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
            self._changed()
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
        self._changed()
        self._era += 1
        self._probes = self._successes = 0
        if state == "closed":
            self.failures_in_row = self._failed_in_window = 0
            self._window.clear()

    def _changed(self) -> None:
        self._changes += 1
        self.unshared = True

    def refusal(self) -> CircuitOpen:
        """Why no attempt is admitted."""
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
    """All circuits of a client, made as endpoints are first used.

    Args:
        shared: where other processes see them; None: nobody does. While it cannot be reached, each process goes by what
            it knows itself.
        owner: this process, as `llmkit.state.owner` names it.
    """

    def __init__(
        self,
        settings: BreakerSettings,
        clock: Clock,
        shared: Circuits | None = None,
        owner: Callable[[], str] = lambda: "here",
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._shared = shared
        self._owner = owner
        self._circuits: dict[tuple[str, str, str], Circuit] = {}
        self._named: dict[str, Circuit] = {}
        self._away_until = -math.inf
        self._warned = False

    def of(self, endpoint: Endpoint) -> Circuit:
        circuit = self._circuits.get(endpoint.key)
        if circuit is None:
            circuit = self._circuits[endpoint.key] = self._called(_name(endpoint), endpoint)
            circuit.endpoint = endpoint
        return circuit

    def _called(self, name: str, endpoint: Endpoint) -> Circuit:
        circuit = self._named.get(name)
        if circuit is None:
            made = Circuit(endpoint, self._settings, self._clock, self._share_now)
            circuit = self._named.setdefault(name, made)
        return circuit

    def __iter__(self) -> Iterator[Circuit]:
        """Those of endpoints used here, and those that are not closed elsewhere."""
        self._at_once(self._look_at_all)
        return iter(list(self._named.values()))

    def reset(self) -> None:
        """Close every circuit, in all processes that share them."""
        for circuit in self:
            circuit.reset()

    # -- admitting ---------------------------------------------------------------------------------------------------

    def owes(self, circuit: Circuit) -> bool:
        """Whether others are to be told of a change there."""
        return circuit.unshared and self._is_shared(circuit)

    def knows(self, circuit: Circuit) -> bool:
        """Whether others need not be asked about an attempt there."""
        if not self._is_shared(circuit):
            return True
        return circuit.state == "closed" and self._clock.now() - circuit.looked < LOOK_AGAIN_S

    async def admit(self, circuit: Circuit, deadline: float | None) -> tuple[int, str | None]:
        """A ticket for one attempt, and the probe that was claimed for it, if it is one; both go back to `tell`.

        Args:
            deadline: of the call, on `Clock.now`'s scale.

        Raises:
            CircuitOpen: when none is admitted now, here or in all processes together.
        """
        is_shared = self._is_shared(circuit)
        if is_shared and (self._clock.now() - circuit.looked >= LOOK_AGAIN_S or circuit.retry_after == 0):
            await self._asking(self._look(circuit))
        ticket = circuit.admit()
        if not is_shared or circuit.state != "half_open":
            return ticket, None
        probe = f"{self._owner()}#{secrets.token_hex(4)}"
        try:
            claimed = await self._asking(self._claim(circuit, probe, deadline))
        except BaseException:
            circuit.drop(ticket)
            await shielded(self.tell(circuit, probe))
            raise
        if claimed is False:
            circuit.drop(ticket)
            raise circuit.refusal()
        return ticket, probe

    async def plan(self, endpoint: Endpoint) -> CircuitOpen | None:
        """What an attempt at ``endpoint`` would be refused with, as far as is known here or elsewhere. Changes nothing."""
        name = _name(endpoint)
        known = self._named.get(name)
        circuit = known or Circuit(endpoint, self._settings, self._clock)
        if self._is_shared(circuit):
            assert self._shared is not None
            found = await self._asking(self._shared.read(name))
            if found is not None and found.version > circuit.version and not circuit.unshared:
                circuit = Circuit(endpoint, self._settings, self._clock)
                circuit.adopt(found, 0)
        return circuit.plan()

    async def tell(self, circuit: Circuit, probe: str | None) -> None:
        """Share what has changed, and let another process have its probe. Never fails."""
        await self._asking(self._share(circuit))
        if probe is not None:
            await self._asking(self._give_back(circuit, probe))

    async def _asking(self, work: Coroutine[Any, Any, T | None]) -> T | None:
        """What ``work`` with the store gives; None where the store cannot be reached."""
        if self._shared is None or self._clock.now() < self._away_until:
            work.close()
            return None
        try:
            done = await work
        except StoreError as error:
            self._away_until = self._clock.now() + AWAY_S
            if not self._warned:
                self._warned = True
                log.warning("circuits cannot be shared just now, so this process goes by its own: %s", error.message)
            return None
        self._warned = False
        return done

    async def _look(self, circuit: Circuit) -> None:
        assert self._shared is not None
        circuit.looked, since = self._clock.now(), circuit.version
        circuit.adopt(await self._shared.read(circuit.name), since)
        await self._share(circuit)

    async def _look_at_all(self) -> None:
        assert self._shared is not None
        since = {name: circuit.version for name, circuit in self._named.items()}
        for found in await self._shared.read_all():
            endpoint = _endpoint(found.endpoint)
            over = found.state == "closed" or _is_over(found, self._clock.time())
            if endpoint is not None and (found.endpoint in since or not over):
                self._called(found.endpoint, endpoint).adopt(found, since.get(found.endpoint, 0))

    async def _claim(self, circuit: Circuit, probe: str, deadline: float | None) -> bool:
        assert self._shared is not None
        longest = LONGEST_OPEN_S if deadline is None else min(LONGEST_OPEN_S, deadline - self._clock.now())
        until = self._clock.time() + max(1.0, longest)
        claimed = await self._shared.claim_probe(circuit.name, probe, until, self._settings.probes)
        if claimed:
            await self._share(circuit)
        return claimed

    async def _give_back(self, circuit: Circuit, probe: str) -> None:
        assert self._shared is not None
        await self._shared.claim_probe(circuit.name, probe, 0.0, self._settings.probes)

    def _is_shared(self, circuit: Circuit) -> bool:
        # The simulator is each client's own, so its troubles are nobody else's.
        return self._shared is not None and not circuit.endpoint.simulated

    async def _share(self, circuit: Circuit) -> None:
        """Write what others do not know yet; where one of them was faster, what it wrote holds here, too."""
        assert self._shared is not None
        if not self._is_shared(circuit):
            return
        for _ in range(WRITES):
            unknown = circuit.news()
            if unknown is None:
                return
            news, changes = unknown
            if await self._shared.write(news):
                circuit.known(news, changes)
            else:
                circuit.adopt(await self._shared.read(circuit.name), news.version - 1)

    # -- by hand -----------------------------------------------------------------------------------------------------

    def _share_now(self, circuit: Circuit) -> None:
        self._at_once(lambda: self._share(circuit))

    def _at_once(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Do ``work`` and return when it is done, whatever loop runs on this thread: a person is waiting for it."""
        if self._shared is None:
            return
        thread = threading.Thread(target=lambda: asyncio.run(self._asked_by_hand(work)), name="llmkit-circuits")
        thread.start()
        thread.join()

    async def _asked_by_hand(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._away_until = -math.inf  # perhaps it is there again
        await self._asking(work())

    async def aclose(self) -> None:
        """Share what has not been shared, and let go of the store."""
        self._away_until = -math.inf  # perhaps it is there again
        for circuit in list(self._named.values()):
            if self.owes(circuit):
                await self._asking(self._share(circuit))
        if self._shared is not None:
            await self._shared.aclose()


class Breaker:
    """Lets an attempt through when its endpoint's circuit admits it, and tells the circuit how it ended."""

    def __init__(self, breakers: Breakers) -> None:
        self._breakers = breakers

    async def __call__(self, call: Call, call_next: CallNext) -> Reply:
        breakers = self._breakers
        circuit = breakers.of(call.endpoint)
        before = circuit.state
        probe: str | None = None
        try:
            if breakers.knows(circuit):
                ticket = circuit.admit()
            else:
                ticket, probe = await breakers.admit(circuit, call.deadline)
        finally:
            self._tell(call, circuit, before)

        async def ended(outcome: Outcome) -> None:
            before = circuit.state
            _report(circuit, ticket, outcome)
            if probe is not None or breakers.owes(circuit):
                await breakers.tell(circuit, probe)
            self._tell(call, circuit, before)

        return await settled(call_next(call), ended)

    @staticmethod
    def _tell(call: Call, circuit: Circuit, before: str) -> None:
        if circuit.state != before:
            emit(call, CircuitChanged(call.request_id, circuit.endpoint.name, before, circuit.state))


def _name(endpoint: Endpoint) -> str:
    """What its circuit is called in a store: no password, no key."""
    provider, base_url, model = endpoint.key
    return redact(f"{provider} {base_url.partition('?')[0]} {model}")


def _endpoint(name: str) -> Endpoint | None:
    """An endpoint that is only known by the name of its circuit."""
    parts = name.split(" ", 2)
    return Endpoint(provider=parts[0], base_url=parts[1], model=parts[2]) if len(parts) == 3 else None


def _is_over(found: CircuitState, now: float) -> bool:
    """Whether nobody has tried a circuit again for so long that what opened it says nothing any more."""
    return found.state in {"open", "half_open"} and found.reopens_at < now - LONGEST_OPEN_S


def _report(circuit: Circuit, ticket: int, outcome: Outcome) -> None:
    error = outcome.error
    if isinstance(error, ProviderError) and error.transient:
        circuit.report(ticket, error)
    elif outcome.reply is not None or isinstance(error, ProviderError | ContextTooLong):
        circuit.report(ticket, None)  # it answered, if only with a no; or the reader left while it was answering
    else:
        assert error is None or not isinstance(error, LLMKitError) or isinstance(error, CallRejected | StoreError)
        circuit.drop(ticket)
