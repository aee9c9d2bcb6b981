"""Identical calls in flight at once: one of them asks, the others follow it.

The first caller of a key *leads*: it asks the provider, pays, and what arrives is handed on as it arrives. The others
*follow*: one that streams gets it from its beginning, one that wants the whole waits for the end. They pay nothing. If
the leader dies, exactly one follower takes over and asks.

In one process that holds across tasks, threads, event loops and clients. Other processes are reached through the
`llmkit.state.shared.Flights` that is handed in: the first caller in each process asks for the claim there; where
another process has it, that caller *relays* what is published, and the others of its own process follow it as they
would follow a leader.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import weakref
from typing import TYPE_CHECKING, NamedTuple, Protocol

from llmkit import errors
from llmkit.errors import FirstTokenTimeout, LLMKitError, StreamBroken
from llmkit.events import Following, emit
from llmkit.failure import copied, is_shared, read_back, written_out
from llmkit.outlet import NO_CLAIM, NO_OUTLET, Outlet, Rounds
from llmkit.reply import Chunk, Head, Reply, settled
from llmkit.shield import shielded

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable
    from decimal import Decimal

    from llmkit.call import Call
    from llmkit.clock import Clock, TimerHandle
    from llmkit.reply import Outcome, Usage
    from llmkit.state.shared import Claim, Flights

__all__ = ["Asking", "FlightFailed", "SingleFlight"]

log = logging.getLogger("llmkit")

ALIVE_S = 1.0  # between two looks whether the leader's event loop still runs
STILL = 5  # so many of them in a row without: it has been left for good


class FlightFailed(Exception):
    """The call that was followed has failed. ``args[0]`` is what it was released with, unchecked."""


class Asking(Protocol):
    """What the caller of `SingleFlight.share` knows of its one call."""

    async def look(self) -> Reply | None:
        """A hit, as the reply to this call, if the answer has been stored meanwhile. Never fails."""

    async def ask(self) -> Reply:
        """Ask below; this is where money is spent."""

    async def store(self, outcome: Outcome) -> None:
        """Store the answer if it is worth it: the reply of `ask` has ended, and followers are told next. Never fails."""


class SingleFlight:
    """Calls that are shared while they are in flight.

    Args:
        location: what store the answers are in: callers with the same location and key share.
        flights: the calls in flight in other processes; None where there are none to share with.
    """

    def __init__(self, location: str, clock: Clock, flights: Flights | None = None) -> None:
        self._location = location
        self._clock = clock
        self._flights = flights
        self._handed_on: weakref.WeakSet[Reply] = weakref.WeakSet()
        self._rounds: dict[asyncio.AbstractEventLoop, Rounds] = {}

    async def share(self, key: str, call: Call, asking: Asking) -> Reply | None:
        """Lead or follow, after a miss; for ``call.cache`` of ``use``, ``refresh`` and ``only``.

        A follower's reply has the source ``coalesced``, no attempts and no cost; ``trail.saved`` is what the leader's
        call had cost. ``refresh`` never follows: where somebody asks already, it asks for itself. None for ``only``,
        where the answer is not stored and nobody is asking for it.

        Raises:
            LLMKitError: what `Asking.ask` raised, here or with the leader; a time limit of this call's own.
        """
        caller = _Caller(self, call, asking)
        place = (self._location, key)
        first: _Caller | None = None
        with _STATE.lock:
            flight = _STATE.flights.get(place)
            if flight is None:
                caller.flight = _STATE.flights[place] = _Flight(place, caller)
            elif call.cache != "refresh":
                caller.flight = flight
                flight.followers.append(caller)
                first = flight.leader
        if caller.flight is None:
            return await settled(asking.ask(), asking.store)
        if first is not None:
            emit(call, Following(call.request_id, elsewhere=False))
            first.followed()
            return await caller.follow()
        reply = await caller.take_off()
        return await caller.follow() if reply is None and caller.end is None else reply

    async def aclose(self) -> None:
        """End what is read on for others although its own reader has left. Before providers and ledger are closed."""
        for reply in list(self._handed_on):
            if reply.is_left:
                await reply.abort()
        if self._flights is not None:
            await self._flights.aclose()

    def _rounds_of(self, loop: asyncio.AbstractEventLoop) -> Rounds:
        rounds = self._rounds.get(loop)
        if rounds is None:
            for closed in [each for each in list(self._rounds) if each.is_closed()]:
                self._rounds.pop(closed, None)
            rounds = self._rounds[loop] = Rounds(self._clock)
        return rounds


class _State:
    """The calls in flight of this process, by the location of the answers and the key."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # held for a few lines at a time, and never while anything is waited for
        self.flights: dict[tuple[str, str], _Flight] = {}


_STATE = _State()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_STATE.__init__)  # type: ignore[misc]  # those in flight are the parent's


# -- how a flight ends -------------------------------------------------------------------------------------------------


class _Landed(NamedTuple):
    """The answer is there. ``cut`` as in `Reply`: the leader's own cap has ended it early."""

    head: Head
    provider: str
    usage: Usage | None
    saved: Decimal | None
    cut: str | None

    @classmethod
    def of(cls, reply: Reply, saved: Decimal | None) -> _Landed:
        return cls(reply.head, reply.provider, reply.usage, saved, reply.cut)


class _Failed(NamedTuple):
    """It would be no use to ask again."""

    error: LLMKitError


class _Stranded(NamedTuple):
    """Nobody asks any longer, and nobody who is left may ask."""


_End = _Landed | _Failed | _Stranded


class _Flight:
    """One key in flight: who leads, what has arrived, who follows. Changed with `_State.lock` held.

    Attributes:
        leader: who asks, or relays what another process asks; None in the end. One that relays is among the followers.
        batches: what has arrived since this leader began. ``generation``: how many leaders there were before.
        end: how it ended; None while it is in flight.
    """

    __slots__ = ("batches", "end", "followers", "generation", "leader", "place", "source")

    def __init__(self, place: tuple[str, str], leader: _Caller) -> None:
        self.place = place
        self.leader: _Caller | None = leader
        self.followers: list[_Caller] = []
        self.batches: list[list[Chunk]] = []
        self.generation = 0
        self.source = "coalesced"
        self.end: _End | None = None

    def publish(self, leader: _Caller, batch: list[Chunk]) -> None:
        """Hand on what has arrived at ``leader``; nothing, if it leads no longer."""
        with _STATE.lock:
            if self.leader is not leader or self.end is not None:
                return
            self.batches.append(batch)
            _wake(self.followers)

    def restart(self, leader: _Caller) -> None:
        """What has been published was not all, or not the same: the whole follows now."""
        with _STATE.lock:
            if self.leader is leader and self.batches:
                self._anew()

    def finish(self, leader: _Caller, end: _End, unpublished: Reply | None = None) -> None:
        """It has ended, unless ``leader`` leads no longer; ``unpublished`` is the answer where it is still to be handed on."""
        with _STATE.lock:
            if self.leader is not leader:
                return
            if unpublished is not None and self.followers:
                self.batches.append([Chunk(unpublished.text, unpublished.reasoning)])
            self._close(end)

    def abandon(self, leader: _Caller, *, may_ask: bool = False) -> None:
        """``leader`` leads no longer: one of the followers takes over, if there is one (and it ``may_ask``)."""
        with _STATE.lock:
            if self.leader is not leader or self.end is not None:
                return
            able = [each for each in self.followers if not each.gone and (each.may_ask or not may_ask)]
            if not able:
                self._close(_Stranded())
                return
            # One that has shown nothing yet can show any answer; of those, one that may ask.
            self.leader = successor = min(able, key=lambda each: (not each.may_ask, each.reply is not _none))
            successor.promoted = True
            self._anew()

    def _anew(self) -> None:
        self.generation += 1
        self.batches = []
        self.source = "coalesced"
        _wake(self.followers)

    def _close(self, end: _End) -> None:
        if self.end is None:
            self.end = end
            self.leader = None  # no ring for the garbage collector
            _STATE.flights.pop(self.place, None)
            _wake(self.followers)


def _wake(callers: Iterable[_Caller]) -> None:
    running = asyncio._get_running_loop()
    for caller in callers:
        waker = caller.waker
        if waker is None:
            continue
        if caller.loop is running:
            caller.wake()
        else:
            with contextlib.suppress(RuntimeError):  # its loop is closed
                caller.loop.call_soon_threadsafe(caller.wake)


def _none() -> None:
    """What is not there, as a weak reference."""


# -- who calls ---------------------------------------------------------------------------------------------------------


class _Caller:
    """One call of `SingleFlight.share`: it leads, relays or follows, and may become another of these.

    Attributes:
        end: how the flight has ended for it; or the reply of its own, where it has taken over.
        gone: it does not follow any longer.
        promoted: it has been made the leader and has to take off.
        reply: as a follower: what it gave to its reader. led: as a leader: what it asked for. Both as weak references:
            a reply that nobody holds any longer is to end.
    """

    __slots__ = (
        "__weakref__",
        "_asking",
        "_call",
        "_chunks",
        "_expired",
        "_generation",
        "_index",
        "_outlet",
        "_reasoned",
        "_relaying",
        "_single",
        "_still",
        "_timers",
        "_unseen",
        "end",
        "flight",
        "gone",
        "led",
        "loop",
        "may_ask",
        "promoted",
        "reply",
        "waker",
    )

    def __init__(self, single: SingleFlight, call: Call, asking: Asking) -> None:
        self._single = single
        self._call = call
        self._asking = asking
        self.loop = asyncio.get_running_loop()
        self.flight: _Flight | None = None
        self.may_ask = call.cache != "only"
        self.end: _End | Reply | None = None
        self.gone = False
        self.promoted = False
        self.reply: Callable[[], Reply | None] = _none
        self.led: Callable[[], Reply | None] = _none
        self.waker: asyncio.Future[None] | None = None
        self._outlet: Outlet | None = None
        self._relaying: asyncio.Task[None] | None = None
        self._timers: dict[str, TimerHandle] = {}

    # -- leading -----------------------------------------------------------------------------------------------------

    async def take_off(self) -> Reply | None:
        """As the leader of the flight: the reply of its own. None where another process leads, or it may not ask.

        In the first case it relays from then on, and is a follower; in the second ``end`` is set.
        """
        flight = self.flight
        assert flight is not None
        try:
            claim = await self._claim(flight.place[1])
            if claim is None:
                if self._call.cache == "refresh":
                    flight.abandon(self)
                    return await settled(self._asking.ask(), self._asking.store)
                self._relay(flight)
                return None
            self._outlet = NO_OUTLET if claim is NO_CLAIM else Outlet(claim, self._single._rounds_of(self.loop))
            if self._timers:
                self._stop_following()
            found = None if self._call.cache == "refresh" else await self._asking.look()
            if found is not None:
                await self._outlet.close()
                self._land(flight, found, self._call.trail.saved)
                return found
            if not self.may_ask:
                await self._outlet.close()
                flight.abandon(self, may_ask=True)
                self.end = _Stranded()
                return None
            return await self._lead()
        except BaseException:
            await shielded(self._abandon())
            raise

    async def _claim(self, key: str) -> Claim | None:
        flights = self._single._flights
        return NO_CLAIM if flights is None else await flights.claim(key)

    async def _lead(self) -> Reply:
        reply = await settled(self._asking.ask(), self._ended)
        self.led = weakref.ref(reply)
        reply.share(self._kept)
        if reply.outcome is None:
            assert self._outlet is not None
            assert self.flight is not None
            self._outlet.open(self._looked)
            if self.flight.followers:
                self._hand_on()
        return reply

    def _hand_on(self) -> None:
        """From now on the reply arrives however slow its own reader is, and what arrives is handed on."""
        reply, flight = self.led(), self.flight
        if reply is not None and flight is not None and reply.outcome is None:
            if reply.source == "degraded":
                flight.source = "degraded"
            self._single._handed_on.add(reply)
            reply.read_on(self._heard)

    def _heard(self, batch: list[Chunk]) -> None:
        assert self.flight is not None
        assert self._outlet is not None
        self.flight.publish(self, batch)
        self._outlet.heard(batch)

    def _wanted(self) -> bool:
        flight = self.flight
        assert flight is not None
        if flight.leader is not self:
            return False
        return bool(flight.followers) or (self._outlet is not None and self._outlet.claim.followed)

    def _kept(self) -> bool:
        """Whether others go on with the reply when its own reader has left it."""
        wanted = self._wanted()
        if wanted:
            self._hand_on()
        return wanted

    def followed(self) -> None:
        """Somebody follows now. From any thread."""
        with contextlib.suppress(RuntimeError):  # its loop is closed
            self.loop.call_soon_threadsafe(self._hand_on)

    def _looked(self) -> int:
        """The outlet has looked whether another process follows, or a follower has left. Returns what has arrived."""
        reply = self.led()
        if reply is None:
            return 0
        if not self._kept():
            reply.unwanted()
        return len(reply.arrived)

    async def _ended(self, outcome: Outcome) -> None:
        """What it asked for has ended, or never began."""
        flight, outlet, reply = self.flight, self._outlet, outcome.reply
        assert flight is not None
        assert outlet is not None
        if reply is not None and (outcome.status == "complete" or reply.cut is not None):
            await self._asking.store(outcome)
            await outlet.close()
            saved = None if reply.source == "degraded" else self._call.trail.spent
            flight.finish(self, _Landed.of(reply, saved), None if reply.is_read_on else reply)
        elif isinstance(outcome.error, LLMKitError) and is_shared(outcome.error):
            await outlet.close(written_out(outcome.error))
            flight.finish(self, _Failed(outcome.error))
        else:
            await self._abandon()

    def _land(self, flight: _Flight, found: Reply, saved: Decimal | None) -> None:
        """The answer was stored by somebody else."""
        flight.restart(self)
        flight.publish(self, [Chunk(found.text, found.reasoning)])
        flight.finish(self, _Landed.of(found, saved))

    async def _abandon(self) -> None:
        assert self.flight is not None
        if self._outlet is not None:
            await self._outlet.close()
        self.flight.abandon(self)

    # -- relaying ----------------------------------------------------------------------------------------------------

    def _relay(self, flight: _Flight) -> None:
        """Be a follower, too, and hand on to the others of this process what another one publishes."""
        with _STATE.lock:
            if self not in flight.followers:
                flight.followers.append(self)
        emit(self._call, Following(self._call.request_id, elsewhere=True))
        self._relaying = self.loop.create_task(self._relayed(flight))

    async def _relayed(self, flight: _Flight) -> None:
        flights = self._single._flights
        assert flights is not None
        try:
            async with contextlib.aclosing(flights.follow(flight.place[1])) as published:  # type: ignore[type-var]
                async for pieces in published:
                    flight.publish(self, [Chunk(text, reasoning) for text, reasoning in pieces])
        except FlightFailed as failure:
            if (error := read_back(failure.args[0])) is not None:
                flight.finish(self, _Failed(error))
                return
        except Exception:
            log.warning("a call in another process cannot be followed any longer", exc_info=True)
        found = await self._asking.look()
        if found is None:
            flight.abandon(self)
        else:
            self._land(flight, found, self._call.trail.saved)
            await found.read()

    # -- following ---------------------------------------------------------------------------------------------------

    async def follow(self) -> Reply | None:
        """The reply of a follower; that of its own where it has taken over before it showed anything."""
        self._start_following()
        try:
            while (batch := await self._next()) is not None:
                self._chunks += batch
                if self._call.stream:
                    break
        except BaseException:
            self.leave()
            raise
        end = self.end
        if isinstance(end, Reply):
            self.end = None  # it is its reader's alone
            return end
        if isinstance(end, _Failed):
            raise copied(end.error)
        return None if isinstance(end, _Stranded) else self._given()

    def _start_following(self) -> None:
        self._chunks: list[Chunk] = []
        self._generation = 0
        self._index = 0
        self._unseen = ""
        self._reasoned = False
        self._still = 0
        self._expired: LLMKitError | None = None
        clock, call = self._single._clock, self._call
        if call.deadline is not None:
            self._timers["total"] = clock.call_later(call.deadline - clock.now(), self._too_late)
        first_token = call.timeouts.first_token
        if first_token is not None and (call.stream or call.timeouts.first_token_set):
            self._await_first_token(first_token)
        self._watch()

    def _given(self) -> Reply:
        """The reply that begins with what has arrived by now."""
        assert self.flight is not None
        head, leader = Head(), self.flight.leader
        led = leader.led() if leader is not None else None
        if led is not None:
            head.model = led.model
        reply = Reply(
            self._call,
            self._rest(),
            head=head,
            clock=self._single._clock,
            first=self._chunks,
            provider=led.provider if led is not None else "",
            where=self.flight.source,
            close=self._left,
        )
        self._chunks = []
        self.reply = weakref.ref(reply)
        return reply

    async def _rest(self) -> AsyncIterator[list[Chunk]]:
        """What arrives from now on."""
        while self.end is None and (batch := await self._next()) is not None:
            yield batch
        if isinstance(self.end, Reply):
            async for batch in self._own(self.end):
                yield batch
        if self._unseen:
            raise self._broken()
        self._conclude()

    async def _own(self, own: Reply) -> AsyncIterator[list[Chunk]]:
        """The answer that it asked for itself, having shown the beginning of another one."""
        reply = self.reply()
        assert reply is not None
        self._begin_anew()
        if own.source != "cache":
            reply.source = own.source
        reply.provider, reply.head = own.provider, own.head
        async for chunk in own:
            if batch := self._continued([chunk]):
                yield batch

    def _conclude(self) -> None:
        """Say what the answer was that has come to its end."""
        reply, end = self.reply(), self.end
        assert reply is not None
        if isinstance(end, Reply):
            reply.usage, reply.cut = end.usage, end.cut
        elif isinstance(end, _Landed):
            for name in Head.__slots__:
                setattr(reply.head, name, getattr(end.head, name))
            reply.provider, reply.usage, reply.cut = end.provider, end.usage, end.cut
            self._call.trail.saved = end.saved
        elif isinstance(end, _Failed):
            raise copied(end.error)
        else:
            raise StreamBroken(
                f"{self._call.model}: the identical call that this one followed was broken off",
                next_step="what had arrived is kept; ask for the answer: --cache use",
            )

    async def _next(self) -> list[Chunk] | None:
        """What arrives next; None when ``end`` says how it ended."""
        while self.end is None:
            if self._expired is not None:
                raise self._expired
            if batch := self._arrived():
                return batch
            if self.promoted:
                self.promoted = False
                self.end = await self.take_off() or self.end
            elif self.waker is not None:
                await self.waker
        return None

    def _arrived(self) -> list[Chunk]:
        """What has arrived and was not seen yet; else ``end``, ``promoted`` or ``waker`` are set."""
        flight, end = self.flight, None
        assert flight is not None
        with _STATE.lock:
            self.waker = None
            anew = self._generation != flight.generation
            if anew:
                self._generation, self._index = flight.generation, 0
            batches = flight.batches[self._index :]
            self._index += len(batches)
            if not batches and not self.promoted:
                end = flight.end
                self.waker = self.loop.create_future() if end is None else None
        if anew:
            self._begin_anew()
        if end is not None:
            self.end = end
            self._stop_following()
        return self._continued([chunk for batch in batches for chunk in batch])

    def _begin_anew(self) -> None:
        """Another answer comes now. What its beginning must be is what has been shown of the last one."""
        reply = self.reply()
        if reply is None:
            self._chunks.clear()
            return
        self._unseen = reply.text
        self._reasoned = bool(reply.reasoning)

    def _continued(self, chunks: list[Chunk]) -> list[Chunk]:
        """What is new in ``chunks``, after what had been shown of an answer before."""
        if not self._unseen and not self._reasoned:
            return chunks
        new = []
        for chunk in chunks:
            length = min(len(self._unseen), len(chunk.text))
            if self._unseen[:length] != chunk.text[:length]:
                raise self._broken()
            self._unseen, text = self._unseen[length:], chunk.text[length:]
            if text or (chunk.reasoning and not self._reasoned):
                new.append(Chunk(text, "" if self._reasoned else chunk.reasoning))
        return new

    def _broken(self) -> StreamBroken:
        return StreamBroken(
            f"{self._call.model}: the identical call that this one followed was broken off, and the new answer "
            "begins differently from what had been shown"
        )

    def wake(self) -> None:
        """Look again. On its own loop."""
        if self.waker is not None and not self.waker.done():
            self.waker.set_result(None)

    # -- time limits -------------------------------------------------------------------------------------------------

    def _too_late(self) -> None:
        limit = self._call.timeouts.total or 0.0
        self._expire(
            errors.TotalTimeout(self._limit_message("not finished within the call's total of", limit), limit=limit)
        )

    def _await_first_token(self, limit: float) -> None:
        """Give the attempt that is being made so long from now on; it is the leader's, and so are waits between two."""
        made = self._attempts()

        def look() -> None:
            if self._index or self.reply() is not None:
                return
            now = self._attempts()
            if now != made or now is None or now[0] == now[1]:
                self._await_first_token(limit)
            else:
                self._expire(FirstTokenTimeout(self._limit_message("no first token within", limit), limit=limit))

        self._timers["first token"] = self._single._clock.call_later(limit, look)

    def _attempts(self) -> tuple[int, int] | None:
        """How many attempts the leader has begun, and how many of them have ended; None where it is another process."""
        assert self.flight is not None
        leader = self.flight.leader
        if leader is None or leader._outlet is None:
            return None
        return leader._call.trail.attempts_begun, len(leader._call.trail.attempts)

    def _limit_message(self, what: str, limit: float) -> str:
        return f"{self._call.model}: {what} {limit:g} s; an identical call, which this one followed, goes on"

    def _expire(self, error: LLMKitError) -> None:
        self._expired = error
        if self.waker is not None:
            self.wake()
        elif (reply := self.reply()) is not None and reply.outcome is None:
            reply.fail_soon(error)  # its reader is busy elsewhere

    def _watch(self) -> None:
        """Take over from a leader whose event loop is gone without a word."""
        self._timers["alive"] = self._single._clock.call_later(ALIVE_S, self._check)

    def _check(self) -> None:
        flight = self.flight
        assert flight is not None
        leader = flight.leader
        if leader is None:
            return
        self._still = 0 if leader.loop.is_running() else self._still + 1
        if leader.loop.is_closed() or self._still >= STILL:
            if leader._outlet is not None:
                leader._outlet.drop()
            flight.abandon(leader)
        self._watch()

    # -- leaving -----------------------------------------------------------------------------------------------------

    def _stop_following(self) -> None:
        """It leads, or has seen the end."""
        for timer in self._timers.values():
            timer.cancel()
        flight = self.flight
        assert flight is not None
        with _STATE.lock:
            if self in flight.followers:
                flight.followers.remove(self)

    def leave(self) -> None:
        """Follow no longer. Touches nobody else; what nobody wants any longer ends."""
        if self.gone:
            return
        self.gone = True
        self._stop_following()
        if self._relaying is not None:
            self._relaying.cancel()
        flight = self.flight
        assert flight is not None
        flight.abandon(self)  # if it relays, or was about to take over
        leader = flight.leader
        if leader is not None and leader is not self and not flight.followers:
            with contextlib.suppress(RuntimeError):  # its loop is closed
                leader.loop.call_soon_threadsafe(leader._looked)

    async def _left(self) -> None:
        """The follower's reply has ended, for whatever reason."""
        if isinstance(self.end, Reply):
            await self.end.aclose()
        else:
            self.leave()
