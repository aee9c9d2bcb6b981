"""The ledger: one row a call, one row an attempt, written as they happen.

A sequential call that goes well costs two transactions: call and attempt are on disk before the request is sent, and
what became of both is on disk before the reply is said to have ended. So a process that dies loses at most the calls
in flight, and those are seen as ``lost`` at the next start, their open attempts as maybe billed.

What is set aside for an attempt (`llmkit.account`) is taken in the transaction that begins the attempt, and settled in
the one that ends it. Calls that were answered from what was stored cost nothing and are written in groups.

Nothing of a prompt or an answer is kept here.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import functools
import logging
import os
import sys
import threading
import weakref
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any

from llmkit import rows
from llmkit.account import Hold, HoldRefused, Release, Settle
from llmkit.errors import StoreError
from llmkit.state.board import Board, clear_boards, was_sent
from llmkit.state.holds import NOTHING, try_on
from llmkit.state.owner import current_owner, is_gone
from llmkit.state.store import (
    AttemptBegun,
    CallServed,
    DuplicateCall,
    ledger_path,
    open_store,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
    from concurrent.futures import Future
    from pathlib import Path

    import pandas as pd

    from llmkit.account import Account, Accounts, Balance
    from llmkit.call import Attempt, Call, Trail
    from llmkit.clock import Clock
    from llmkit.endpoint import Endpoint
    from llmkit.models.prices import Cost
    from llmkit.reply import Outcome
    from llmkit.rows import Row
    from llmkit.state.database import Database
    from llmkit.state.holds import Amounts
    from llmkit.state.store import CallBegun, Change, Store

__all__ = ["Ledger"]

log = logging.getLogger("llmkit")

SIBLINGS = 8  # with more calls in flight than these, the loop turns often, and what is written waits for its next turn
A_DAY = 86_400.0  # seconds; whether an owner on another host lives cannot be asked, but no call takes this long
REAP_S = 1.0  # how often it is looked whether somebody who holds has died
SERVED = 256  # calls answered from what was stored that are written at once, …
SERVED_S = 0.05  # … or what there is after so many seconds, …
BESIDE = 16  # … or, if there are no more than these, with what is written next


class _Entry:
    """A call that has not ended: all its changes so far, and how many of them ``store`` has.

    Attributes:
        hold: what is set aside for its attempt under way. ``beginning``: the same while it is being taken.
        remote: whether it is kept on the server of the accounts.
        ended: holds that have ended, and how, of which the store does not know yet.
        pending: done when the store has said whether it takes what begins with a hold; until then it is only ``sure``
            to have so many of the changes.
    """

    __slots__ = (
        "beginning",
        "changes",
        "ended",
        "endpoint",
        "hold",
        "is_over",
        "number",
        "pending",
        "refused",
        "remote",
        "retries",
        "store",
        "sure",
        "trail",
        "written",
    )

    def __init__(self, trail: Trail, begun: CallBegun) -> None:
        self.trail = trail  # kept, so that its id stays its own
        self.changes: list[Change] = [begun]
        self.written = 0
        self.sure = 0
        self.store: Store | None = None
        self.endpoint: tuple[str, str, str] | None = None
        self.number = 0
        self.retries = 0
        self.refused = False
        self.is_over = False
        self.hold: Hold | None = None
        self.beginning: Hold | None = None
        self.remote = False
        self.ended: list[tuple[Hold, Settle | Release, bool]] = []
        self.pending: asyncio.Future[None] | None = None

    def without(self, hold: Hold) -> None:
        """Forget a hold that the store refused, and its ending; of that commit the store has nothing."""
        name = hold[:2]
        self.changes = [
            change for change in self.changes if not isinstance(change, Hold | Settle | Release) or change[:2] != name
        ]
        self.ended = [each for each in self.ended if each[0][:2] != name]
        self.hold = None


class Ledger:
    """Calls and attempts in a store. One ledger serves any number of tasks, threads and event loops.

    The store is opened at the first write or read, off the event loop. Where it cannot be opened or written, the
    ledger goes on in memory and says so in ``notice``: a call is not refused because it cannot be booked on disk, and
    one that was answered never fails for it. The caps of one request do not rest on the ledger, so they hold all the
    same. Budgets that somebody set do: see ``is_strict``.

    Attributes:
        url: what the store was asked for.
        is_strict: says of a hold whether its attempt is refused (`StoreError`) where its accounts cannot be kept as they
            should be: not on disk, or not on the server of ``accounts``. Else it goes on with accounts of this process.
        on_held, on_ended: called when a hold has been taken, and when one has ended, on any thread; must not block.
        notice: why the rows of this session will not outlast it; None where they will.
        lost: how many calls were found to be in flight when the process that made them had died.
    """

    def __init__(
        self,
        url: str = "sqlite",
        clock: Clock | None = None,
        *,
        store: Store | None = None,
        accounts: Accounts | None = None,
    ) -> None:
        """``store`` is used as it is, instead of the one that ``url`` names; ``accounts`` instead of those in the store.

        Raises:
            ConfigError: ``url`` names no store.
        """
        from llmkit.clock import SystemClock

        ledger_path(url)
        self.url = url
        self.notice: str | None = None
        self.lost = 0
        self._clock: Clock = clock or SystemClock()
        self._store: Store | None = None
        self._given = store
        self._disk: Store | None = None  # the one fallen back from; what it has can perhaps still be read
        self._disk_is_lost = False
        self._opening = threading.Lock()
        self._falling = threading.Lock()
        self._groups: dict[asyncio.AbstractEventLoop, list[tuple[_Entry, asyncio.Future[None]]]] = {}
        # By the id of the trail, which all copies of a call share. One to which nothing has happened yet is the call itself.
        self._open_calls: dict[int, _Entry | Call] = {}
        self.is_strict: Callable[[Hold], bool] = lambda _: False
        self.on_held: Callable[[Hold], object] = lambda _: None
        self.on_ended: Callable[[Hold], object] = lambda _: None
        self._accounts = accounts
        self._owner: str | None = None  # kept, since to ask for a process's number takes a microsecond or two
        self._board = Board(None)
        self._reaped = float("-inf")
        self._served: list[CallServed] = []
        self._serving = threading.Lock()
        self._serving_aside: Future[None] | None = None  # the last of them that another thread writes
        _LEDGERS.add(self)

    @classmethod
    def open(cls, url: str, clock: Clock | None = None) -> Ledger:
        """A ledger in the store that ``url`` names: ``sqlite``, ``sqlite:///path`` or ``memory``.

        Raises:
            ConfigError: there is no such store.
        """
        return cls(url, clock)

    @property
    def location(self) -> str:
        """Where the rows are, for people."""
        return self._ready().location

    @property
    def database(self) -> Database | None:
        """The SQLite file that the rows are in, for what else is kept there; None where they are in memory only."""
        return getattr(self._ready(), "database", None)

    # -- writing -----------------------------------------------------------------------------------------------------

    @property
    def owner(self) -> str:
        """Who calls and holds: this process."""
        if self._owner is None:
            self._owner = current_owner()
        return self._owner

    @property
    def is_open(self) -> bool:
        """Whether the store is there already, so that writing need not wait for it to be opened."""
        return self._store is not None

    async def open_store(self) -> None:
        """Open the store, off the event loop. A write does it too; before one, it holds up no attempt's time limit."""
        if self._store is None:
            await asyncio.to_thread(self._ready)

    def call_began(self, call: Call) -> None:
        """Remember the call. It is written with its first attempt, or when it ends."""
        self._open_calls[id(call.trail)] = call

    async def attempt_began(
        self, call: Call, number: int, endpoint: Endpoint, started_at: float
    ) -> Callable[[], Awaitable[None] | None] | None:
        """Write that attempt ``number`` is about to be sent (``started_at`` in epoch seconds). It is stored on return.

        ``call.hold`` is taken in the same transaction. Returns what must be called right before the request goes out;
        None where nobody need know of that.

        Raises:
            HoldRefused: the hold does not fit; nothing of the attempt was written.
            StoreError: another call had this ``request_id``, or the accounts cannot be kept and `is_strict` of the hold.
                Any other failure makes the ledger go on in memory.
        """
        entry = self._entry(call)
        before = entry.retries, entry.endpoint, entry.number, len(entry.changes)
        entry.retries += endpoint.key == entry.endpoint
        entry.endpoint = endpoint.key
        entry.number = number
        if call.hold is None:
            entry.changes.append(rows.attempt_began(call, number, endpoint, started_at))
            await self._write(entry)
            return None
        try:
            hold = await self._held(entry, call.hold)
            entry.changes.append(rows.attempt_began(call, number, endpoint, started_at))
            if not entry.remote:
                entry.changes.append(hold)
            await self._write(entry)
        except (HoldRefused, StoreError):
            entry.retries, entry.endpoint, entry.number, length = before
            del entry.changes[length:]
            entry.written = min(entry.written, entry.sure)
            self._let_go(entry)
            raise
        finally:
            entry.beginning = None
        entry.pending = None
        self.on_held(hold)
        return self._sending(hold) if entry.remote else functools.partial(self._board.mark, hold.slot)

    async def _held(self, entry: _Entry, asked: Hold) -> Hold:
        """The hold as it is to be taken: on the server already, or with a slot of the board."""
        await self.open_store()
        if self._disk_is_lost and self.is_strict(asked):
            raise self._refusal()
        entry.remote = False
        if self._accounts is not None:
            hold = asked._replace(slot=0)
            try:
                await self._accounts.hold(hold)
            except StoreError as error:
                if self.is_strict(asked):
                    raise
                self._go_on_alone(error)
            else:
                entry.hold, entry.remote = hold, True
                return hold
        hold = asked._replace(slot=self._board.take())
        entry.hold = entry.beginning = hold
        return hold

    def _let_go(self, entry: _Entry) -> None:
        """The attempt that the entry's hold was for does not begin."""
        hold, entry.hold, entry.pending = entry.hold, None, None
        if hold is not None and entry.remote:
            assert self._accounts is not None
            self._accounts.end(Release(hold.request_id, hold.number))
        elif hold is not None:
            self._board.free(hold.slot)

    def _sending(self, hold: Hold) -> Callable[[], Awaitable[None]]:
        accounts = self._accounts
        assert accounts is not None

        async def sending() -> None:
            try:
                await accounts.sent(hold)
            except StoreError as error:
                if self.is_strict(hold):
                    raise
                self._go_on_alone(error)

        return sending

    def attempt_ended(self, call: Call, attempt: Attempt, cost: Cost | None = None) -> None:
        """Remember how an attempt ended; ``cost`` is None where its price is unknown.

        It is written with what comes next of this call, or by itself when nothing comes within this turn of the loop.
        """
        entry = self._entry(call)
        if attempt.number > entry.number:  # it ended before it could begin
            entry.number = attempt.number
            entry.changes.append(
                AttemptBegun(call.request_id, attempt.number, attempt.started, attempt.provider, attempt.model, None)
            )
        entry.changes.append(rows.attempt_ended(call.request_id, attempt, cost))
        if entry.hold is not None and entry.hold.number == attempt.number:
            self._end_hold(entry, entry.hold, rows.hold_ended(entry.hold, attempt))
        if attempt.status == "failed":  # a pause may follow; after any other end the call's own comes in this turn
            asyncio.get_running_loop().call_soon(self._write_soon, entry, len(entry.changes))

    @staticmethod
    def _end_hold(entry: _Entry, hold: Hold, ending: Settle | Release) -> None:
        entry.hold = None
        entry.ended.append((hold, ending, entry.remote))
        if not entry.remote:
            entry.changes.append(ending)

    async def call_ended(self, call: Call, outcome: Outcome) -> None:
        """Write how the call ended, and all that was remembered of it. Never fails.

        One that was answered from what was stored, without an attempt, is written a little later, with others.
        """
        if not isinstance(self._open_calls.get(id(call.trail)), _Entry) and self._is_served(outcome):
            self._open_calls.pop(id(call.trail), None)
            assert outcome.reply is not None
            self._write_later(rows.call_served(call, outcome.reply, self._owner or self.owner))
            return
        entry = self._entry(call)
        if entry.hold is not None:  # its attempt began, and nobody said how it ended
            self._end_hold(entry, entry.hold, Settle(call.request_id, entry.hold.number, None, None))
        entry.changes.append(
            rows.call_ended(call, outcome, now=self._clock.now(), attempts=entry.number, retries=entry.retries)
        )
        entry.is_over = True
        if entry.pending is not None:
            await self._known(entry)
        if len(self._open_calls) > SIBLINGS and self._store is not None:
            with suppress(StoreError):  # said already
                await self._write_together(entry)
            return
        try:
            await self._write(entry)
        except DuplicateCall as error:
            log.warning("%s; this call is not in the ledger", error)
        finally:
            self._open_calls.pop(id(call.trail), None)

    def _is_served(self, outcome: Outcome) -> bool:
        """Whether that is the whole of an answer that nobody was asked for."""
        reply = outcome.reply
        return (
            self._store is not None
            and outcome.status == "complete"
            and reply is not None
            and reply.source in rows.FREE_SOURCES
        )

    def _entry(self, call: Call) -> _Entry:
        entry = self._open_calls.get(id(call.trail))
        if not isinstance(entry, _Entry):
            entry = self._open_calls[id(call.trail)] = self._entry_of(call)
        return entry

    def _entry_of(self, call: Call) -> _Entry:
        return _Entry(call.trail, rows.call_began(call, self._owner or self.owner))

    async def _write(self, entry: _Entry) -> None:
        """Bring the entry's changes into the store, and return when they are there."""
        await self.open_store()
        if len(self._open_calls) > SIBLINGS:
            await self._answered(entry, self._write_together(entry))
            return
        try:
            waiting = self._commit(entry)
            if waiting is not None:
                await self._answered(entry, asyncio.wrap_future(waiting))
        except StoreError as error:
            self._write_failed(entry, error)
            if entry.refused:
                raise
            self._commit(entry)

    @staticmethod
    async def _answered(entry: _Entry, landing: asyncio.Future[None]) -> None:
        """Wait for the store's answer; it comes whether or not somebody still waits for it."""
        if entry.beginning is not None:
            entry.pending = landing
        landing.add_done_callback(_heard)
        await asyncio.shield(landing)

    async def _known(self, entry: _Entry) -> None:
        """Whoever began the attempt was cancelled before the store had answered; now it has."""
        pending, entry.pending = entry.pending, None
        assert pending is not None
        await asyncio.wait([pending])
        error = None if pending.cancelled() else pending.exception()
        hold = next((change for change in reversed(entry.changes) if isinstance(change, Hold)), None)
        if isinstance(error, HoldRefused) and hold is not None:
            entry.written = min(entry.written, entry.sure)
            entry.without(hold)
            self._board.free(hold.slot)

    def _write_together(self, entry: _Entry) -> asyncio.Future[None]:
        """Write the entry at the loop's next turn, in one transaction with all others that ask for it until then.

        The future fails with what a hold was refused for, or with `StoreError` as `_write` does.
        """
        loop = asyncio.get_running_loop()
        group = self._groups.get(loop)
        if group is None:
            group = self._groups[loop] = []
            loop.call_soon(self._flush, loop)
        written: asyncio.Future[None] = loop.create_future()
        group.append((entry, written))
        return written

    def _flush(self, loop: asyncio.AbstractEventLoop) -> None:
        group = self._groups.pop(loop, None)
        if not group:
            return
        self._write_served_beside()
        entries = list(dict.fromkeys(entry for entry, _ in group))
        before = [entry.written if entry.store is self._store else 0 for entry in entries]
        changes = [change for entry in entries for change in self._take(entry)]
        ended = [each for entry in entries for each in _ended(entry)]

        def landed(waiting: Future[None] | None) -> None:
            if waiting is None or waiting.exception() is None:
                self._have_ended(ended)
                for entry, written in group:
                    self._landed(entry, written)
                return
            for entry, number in zip(entries, before, strict=True):  # one of them spoilt it: each by itself
                entry.written = number
            self._have_ended(ended)
            for entry, written in group:
                self._write_alone(entry, written)

        assert self._store is not None
        try:
            waiting = self._store.commit(changes) if changes else None
        except (HoldRefused, StoreError) as error:
            waiting = concurrent.futures.Future()
            waiting.set_exception(error)
        if waiting is None or waiting.done():
            landed(waiting)
        else:
            waiting.add_done_callback(lambda done: loop.call_soon_threadsafe(landed, done))

    def _write_alone(self, entry: _Entry, written: asyncio.Future[None]) -> None:
        try:
            waiting = self._commit(entry)
        except (HoldRefused, StoreError) as error:
            self._wrote_alone(entry, written, error)
            return
        if waiting is None:
            self._landed(entry, written)
            return
        loop = written.get_loop()

        def done(waiting: Future[None]) -> None:
            loop.call_soon_threadsafe(self._wrote_alone, entry, written, waiting.exception())

        waiting.add_done_callback(done)

    def _wrote_alone(self, entry: _Entry, written: asyncio.Future[None], error: BaseException | None) -> None:
        if isinstance(error, StoreError):
            try:
                self._write_failed(entry, error)
                if not entry.refused:
                    self._commit(entry)
            except (HoldRefused, StoreError) as second:
                error = second
            else:
                error = error if entry.refused else None
        self._landed(entry, written, error)

    def _landed(self, entry: _Entry, written: asyncio.Future[None], error: BaseException | None = None) -> None:
        if entry.is_over:
            if entry.refused:
                log.warning("another call had the request_id of this one; it is not in the ledger")
            self._open_calls.pop(id(entry.trail), None)
        if written.done():
            return
        if error is None:
            written.set_result(None)
        else:
            written.set_exception(error)
            written.exception()  # whoever waited may have been cancelled, and asyncio would complain of that

    def _have_ended(self, ended: Iterable[tuple[Hold, Settle | Release, bool]]) -> None:
        """Holds whose ending has been written: elsewhere it is delivered now, and there may be room for others."""
        for hold, ending, remote in ended:
            if remote:
                assert self._accounts is not None
                self._accounts.end(ending)
            else:
                self._board.free(hold.slot)
            self.on_ended(hold)

    def _take(self, entry: _Entry) -> list[Change]:
        """What the store has not got; from now on it counts as handed over."""
        if entry.store is not self._store:  # the first write, or the first since the ledger fell back
            if entry.store is not None:
                entry.changes = [_unlimited(c) if c is not entry.beginning else c for c in entry.changes]
            entry.store, entry.written = self._store, 0
        changes = [] if entry.refused else entry.changes[entry.written :]
        entry.sure = entry.written
        entry.written += len(changes)
        return changes

    def _commit(self, entry: _Entry) -> Future[None] | None:
        """Hand over what the store has not got, and return what its ``commit`` does."""
        self._write_served_beside()
        store = self._store
        assert store is not None
        before = entry.written if entry.store is store else 0
        changes, ended = self._take(entry), _ended(entry)
        if not changes:
            self._have_ended(ended)
            return None
        try:
            waiting = store.commit(changes)
        except BaseException:
            entry.written = before
            self._have_ended(ended)
            raise
        if waiting is None:
            self._have_ended(ended)
        else:  # whoever waits for it may be cancelled, so its failure is heard here
            waiting.add_done_callback(functools.partial(self._written_late, entry, ended))
        return waiting

    def _written_late(
        self, entry: _Entry, ended: list[tuple[Hold, Settle | Release, bool]], waiting: Future[None]
    ) -> None:
        self._have_ended(ended)
        error = waiting.exception()
        if isinstance(error, StoreError):
            with suppress(StoreError):
                self._write_failed(entry, error)

    def _write_failed(self, entry: _Entry, error: StoreError) -> None:
        """Go on in memory.

        Raises:
            StoreError: not with a hold that is being taken, and that must be kept where others see it.
        """
        if isinstance(error, DuplicateCall):
            entry.refused = True
            return
        self._fall_back(error)
        if entry.beginning is not None and self.is_strict(entry.beginning):
            raise self._refusal() from error

    def _write_soon(self, entry: _Entry, length: int) -> None:
        """Write what an attempt left, if nothing came after it that took it along."""
        if entry.written >= length or self._store is None or entry.pending is not None:
            return
        try:
            self._commit(entry)
        except StoreError as error:
            self._write_failed(entry, error)

    # -- calls that cost nothing -------------------------------------------------------------------------------------

    def _write_later(self, served: CallServed) -> None:
        """With others of its kind: `SERVED` of them, or those of `SERVED_S`, or a few with whatever is written next."""
        with self._serving:
            group = self._served
            group.append(served)
            waiting = len(group)
        if waiting == 1:
            asyncio.get_running_loop().call_later(SERVED_S, self._write_group, group)
        elif waiting >= SERVED:
            self._write_served()

    def _write_group(self, group: list[CallServed]) -> None:
        """Its time has come, if it was not written before."""
        if self._served is group:
            self._write_served()

    def _write_served_beside(self) -> None:
        """The few that there are; what is written next is not to wait for many."""
        if 0 < len(self._served) <= BESIDE:
            self._write_served()

    def _write_served(self) -> None:
        with self._serving:
            group, self._served = self._served, []
        if not group:
            return
        try:
            waiting = self._ready().commit(group)
        except StoreError:
            self._write_each(group)
            return
        if waiting is not None:
            aside: Future[None] = concurrent.futures.Future()
            self._serving_aside = aside
            waiting.add_done_callback(functools.partial(self._wrote_aside, group, aside))

    def _wrote_aside(self, group: list[CallServed], aside: Future[None], written: Future[None]) -> None:
        try:
            if written.exception() is not None:
                self._write_each(group)
        finally:
            aside.set_result(None)

    def _write_each(self, group: list[CallServed]) -> None:
        """One of them spoilt it for all."""
        for served in group:
            try:
                waiting = self._ready().commit([served])
            except StoreError as error:
                self._not_served(served, error)
                continue
            if waiting is not None:
                waiting.add_done_callback(functools.partial(self._served_late, served))

    def _served_late(self, served: CallServed, waiting: Future[None]) -> None:
        error = waiting.exception()
        if isinstance(error, StoreError):
            self._not_served(served, error)

    def _not_served(self, served: CallServed, error: StoreError) -> None:
        if not isinstance(error, DuplicateCall):
            self._fall_back(error)
            try:
                self._ready().commit([served])
            except DuplicateCall as duplicate:
                error = duplicate
            else:
                return
        log.warning("%s; this call is not in the ledger", error)

    # -- accounts ----------------------------------------------------------------------------------------------------

    async def balances(self, accounts: Sequence[Account]) -> list[Balance]:
        """What each account has counted.

        Raises:
            StoreError: they cannot be read.
        """
        if not accounts:
            return []
        if self._accounts is not None:
            return await self._accounts.balances(accounts)
        return await asyncio.to_thread(self._balances, accounts)

    def try_hold(self, hold: Hold, balances: Sequence[Balance]) -> None:
        """See whether ``hold`` fits accounts of these ``balances``; nothing is held.

        Raises:
            HoldRefused: it does not.
        """
        try_on(hold, balances)

    def _balances(self, accounts: Sequence[Account]) -> list[Balance]:
        store = self._ready()
        self._reap(store)
        return store.balances(accounts)

    async def reap(self) -> None:
        """End the holds of those who have died. Looks at most once in `REAP_S`; never fails."""
        if self._accounts is None and self._clock.now() - self._reaped >= REAP_S:
            await asyncio.to_thread(self._reap, self._ready())

    def _reap(self, store: Store) -> None:
        self._reaped = self._clock.now()
        noted = functools.partial(was_sent, self._board.folder)
        try:
            store.reap(self._clock.time(), is_gone=is_gone, was_sent=noted)
        except StoreError as error:
            log.warning("holds of processes that have died cannot be ended now: %s", error)

    def _go_on_alone(self, error: StoreError) -> None:
        """The server of the accounts cannot be asked, and that is not to stop anybody."""
        if self.notice is None:
            self.notice = f"{error.message}; budgets are those of this machine alone meanwhile"
            log.warning("%s", self.notice)

    def _refusal(self) -> StoreError:
        return StoreError(
            f"nothing was sent, since the budgets that are set could not be kept: {self.notice}",
            next_step='make the ledger usable, or go on without: on_failure = "continue" in [state]',
        )

    # -- the store ---------------------------------------------------------------------------------------------------

    def _ready(self) -> Store:
        """The store, opened if it is not yet. Waits for files, so not for an event loop's thread at first."""
        store = self._store
        if store is not None:
            return store
        with self._opening:
            if self._store is None:
                try:
                    store = self._given or open_store(self.url)
                    path: Path | None = getattr(store, "path", None)
                    folder = None if path is None else path.with_name(f"{path.name}.boards")
                    self.lost = _mark_lost(store, self._clock.time(), folder)
                    self._board = Board(folder)
                    self._reap(store)
                    if folder is not None:
                        clear_boards(folder, ())
                    self._store = store
                except StoreError as error:
                    self._fall_back(error)
        assert self._store is not None
        return self._store

    def _fall_back(self, error: StoreError) -> None:
        from llmkit.state.memory import MemoryStore

        with self._falling:
            if self._disk_is_lost:
                return
            self._disk_is_lost = True
            how = f" ({error.next_step})" if error.next_step else ""
            self.notice = f"{error.message}; the calls of this session are kept in memory only{how}"
            disk = self._store
            before = None if disk is None else functools.partial(_settled_in, disk)
            self._disk, self._store = disk, MemoryStore(before=before)
        log.warning("%s", self.notice)

    def close(self) -> None:
        """Finish what waits, and let go of files and threads. A later write opens them again."""
        for loop in list(self._groups):
            self._flush(loop)
        self._write_served()
        for each in (self._store, self._disk):
            if each is not None:
                each.close()
        self._board.close()

    def _start_afresh(self) -> None:
        """In a forked child: the calls in flight are the parent's."""
        self._opening = threading.Lock()
        self._falling = threading.Lock()
        self._serving = threading.Lock()
        self._owner = None
        self._open_calls.clear()
        self._groups.clear()
        self._served = []
        self._serving_aside = None

    # -- reading -----------------------------------------------------------------------------------------------------

    def calls(
        self, limit: int | None = None, since: datetime | float | None = None, beginning: str | None = None
    ) -> list[Row]:
        """The calls, newest last, as dictionaries of all that is known of them.

        Args:
            limit: only the newest so many.
            since: only those that started then or later: epoch seconds, or a datetime (a naive one is local time).
            beginning: only those whose request_id begins so.

        ``cost_usd`` is an exact Decimal; None, there and elsewhere, is unknown. Calls of this process that are not on
        disk yet are in it. Blocks for the time of a query.

        Raises:
            StoreError: the store cannot be read.
        """
        if limit is not None and limit < 1:
            raise ValueError(f"limit is {limit}, not 1 or more")
        after = since.timestamp() if isinstance(since, datetime) else since
        found: dict[str, Row] = {}
        for store in self._sources():
            for row in store.calls(limit=limit, since=after, beginning=beginning):
                _take(found, row["request_id"], row)
        newest_last = sorted(found.values(), key=lambda row: (row["started"], row["request_id"]))
        return [rows.call_row(row) for row in newest_last[-limit if limit else None :]]

    def attempts(self, request_id: str) -> list[Row]:
        """The attempts of one call in their order, as dictionaries; see `calls`."""
        found: dict[int, Row] = {}
        for store in self._sources():
            for row in store.attempts(request_id):
                _take(found, row["number"], row)
        return [rows.attempt_row(found[number]) for number in sorted(found)]

    def frame(self, limit: int | None = None, since: datetime | float | None = None) -> pd.DataFrame:
        """`calls` as a DataFrame of `COLUMNS`. ``model`` is the one that answered, where one did.

        ``cost_usd`` is a float64 here, so that it can be summed and plotted; it is exact to the nano-dollar up to
        millions of dollars. Unknown is NaN or NA, never 0.
        """
        return rows.frame(self.calls(limit, since))

    def spend(self, **asked: Any) -> list[tuple[Any, ...]]:
        """The sums of spending; see `llmkit.state.store.Store.spend`, whose arguments these are.

        After a fall back to memory one combination may come twice: once of what is on disk, once of what is not.
        """
        stores = (self._readable_disk(), self._written())
        return [row for store in stores if store is not None for row in store.spend(**asked)]

    def outputs(self, endpoint: str, template: str | None = None, *, limit: int = 100) -> list[int]:
        """Output tokens of the newest whole answers of ``endpoint`` (``provider:model``), newest first.

        None of them from a cache. ``template``: only of prompts that were made from it, by `llmkit.call.digest_of`.
        Blocks for the time of a query.

        Raises:
            StoreError: the store cannot be read.
        """
        stores = [store for store in (self._readable_disk(), self._written()) if store is not None]
        found = [each for store in stores for each in store.outputs(endpoint, template, limit)]
        return [tokens for _, tokens in sorted(found, reverse=True)[:limit]]

    def pages(self, size: int = 1000) -> Iterator[list[tuple[Row, list[Row]]]]:
        """Every call with its attempts, oldest first, ``size`` at a time; those that begin meanwhile are left out.

        Raises:
            StoreError: the store cannot be read.
        """
        store, disk, until = self._written(), self._readable_disk(), self._clock.time()
        again = frozenset() if disk is None else frozenset(row["request_id"] for row in store.calls())
        for each, left_out in ((disk, again), (store, frozenset())):
            after: tuple[float, str] | None = None
            while each is not None and (found := each.page(after, size)):
                last = found[-1][0]
                after = (last["started"], last["request_id"])
                page = [(c, a) for c, a in found if c["request_id"] not in left_out and c["started"] <= until]
                if page:
                    yield [(rows.call_row(call), [rows.attempt_row(a) for a in made]) for call, made in page]
                if last["started"] > until:
                    break

    def _sources(self) -> Sequence[Store]:
        """Where rows are: on disk, in memory, and not written yet."""
        from llmkit.state.memory import MemoryStore

        store = self._written()
        in_flight = MemoryStore()
        for each in list(self._open_calls.values()):
            entry = each if isinstance(each, _Entry) else self._entry_of(each)
            if not entry.refused:
                _add(in_flight, [change for change in entry.changes if not isinstance(change, Hold | Settle | Release)])
        return [each for each in (self._readable_disk(), store, in_flight) if each is not None]

    def _written(self) -> Store:
        """The store, with what was waiting for others of its kind."""
        self._write_served()
        if self._serving_aside is not None:
            concurrent.futures.wait([self._serving_aside])
        return self._ready()

    def _readable_disk(self) -> Store | None:
        """The store that the ledger fell back from, if it can be read."""
        if self._disk is None:
            return None
        try:
            self._disk.owners()
        except StoreError:
            return None
        return self._disk


_LEDGERS: weakref.WeakSet[Ledger] = weakref.WeakSet()


def _in_child() -> None:
    for ledger in list(_LEDGERS):
        ledger._start_afresh()
    multiprocessing = sys.modules.get("multiprocessing.util")
    if multiprocessing is not None:  # its children end without what `atexit` was told
        multiprocessing.register_after_fork(_at_exit, _finish_with_the_worker)


def _finish_with_the_worker(at_exit: Callable[[], None]) -> None:
    from multiprocessing.util import Finalize

    Finalize(None, at_exit, exitpriority=10)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


def _at_exit() -> None:
    for ledger in list(_LEDGERS):
        if ledger._served:
            with suppress(Exception):
                ledger._write_served()


atexit.register(_at_exit)


def _heard(landing: asyncio.Future[None]) -> None:
    """Whoever waited for it may have been cancelled; what it failed with is dealt with where that is seen."""
    if not landing.cancelled():
        landing.exception()


def _ended(entry: _Entry) -> list[tuple[Hold, Settle | Release, bool]]:
    """The holds whose ending is handed over now."""
    ended, entry.ended = entry.ended, []
    return ended


def _unlimited(change: Change) -> Change:
    """What has been held and spent is counted in another store, too, whether it fits there or not."""
    if not isinstance(change, Hold):
        return change
    accounts = tuple(each._replace(limit_nanos=None, limit_tokens=None) for each in change.accounts)
    return change._replace(accounts=accounts, balances=[])


def _settled_in(store: Store, account: Account) -> Amounts:
    """What an account has counted in the store that was fallen back from, as far as that can still be read.

    What is held there is left out: holds of this process are taken anew, and those of others end there.
    """
    try:
        (balance,) = store.balances([account])
    except StoreError:
        return NOTHING
    return balance._replace(held_nanos=0, held_tokens=0)[1:]


def _mark_lost(store: Store, now: float, boards: Path | None) -> int:
    """Calls in flight whose process is gone will not end any more. Returns how many were found."""
    lost = 0
    for owner, newest in store.owners().items():
        gone = is_gone(owner)
        if gone or (gone is None and newest < now - A_DAY):
            lost += store.mark_lost(owner, functools.partial(was_sent, boards))
    return lost


def _add(store: Store, changes: list[Change]) -> None:
    try:
        store.commit(changes)
    except DuplicateCall:  # two calls in flight with one request_id: the first is shown
        return


def _take(found: dict[Any, Row], key: Any, row: Row) -> None:
    """Of two rows of one thing, the one that has ended knows more."""
    if key not in found or found[key]["status"] == "in_flight":
        found[key] = row
