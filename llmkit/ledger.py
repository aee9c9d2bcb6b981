"""The ledger: one row a call, one row an attempt, written as they happen.

A sequential call that goes well costs two transactions: call and attempt are on disk before the request is sent, and
what became of both is on disk before the reply is said to have ended. So a process that dies loses at most the calls
in flight, and those are seen as ``lost`` at the next start, their open attempts as maybe billed.

Nothing of a prompt or an answer is kept here.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import logging
import os
import threading
import weakref
from datetime import datetime
from typing import TYPE_CHECKING, Any

from llmkit import rows
from llmkit.errors import StoreError
from llmkit.state.owner import current_owner, is_gone
from llmkit.state.store import AttemptBegun, DuplicateCall, ledger_path, open_store

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from concurrent.futures import Future

    import pandas as pd

    from llmkit.call import Attempt, Call, Trail
    from llmkit.clock import Clock
    from llmkit.endpoint import Endpoint
    from llmkit.models.prices import Cost
    from llmkit.reply import Outcome
    from llmkit.rows import Row
    from llmkit.state.database import Database
    from llmkit.state.store import CallBegun, Change, Store

__all__ = ["Ledger"]

log = logging.getLogger("llmkit")

SIBLINGS = 8  # with more calls in flight than these, the loop turns often, and what is written waits for its next turn
A_DAY = 86_400.0  # seconds; whether an owner on another host lives cannot be asked, but no call takes this long


class _Entry:
    """A call that has not ended: all its changes so far, and how many of them ``store`` has."""

    __slots__ = ("changes", "ended", "endpoint", "number", "refused", "retries", "store", "trail", "written")

    def __init__(self, trail: Trail, begun: CallBegun) -> None:
        self.trail = trail  # kept, so that its id stays its own
        self.changes: list[Change] = [begun]
        self.written = 0
        self.store: Store | None = None
        self.endpoint: tuple[str, str, str] | None = None
        self.number = 0
        self.retries = 0
        self.refused = False
        self.ended = False


class Ledger:
    """Calls and attempts in a store. One ledger serves any number of tasks, threads and event loops.

    The store is opened at the first write or read, off the event loop. Where it cannot be opened or written, the
    ledger goes on in memory and says so in ``notice``: a call is not refused because it cannot be booked on disk, and
    one that was answered never fails for it. The caps of one request do not rest on the ledger, so they hold all the
    same.

    Attributes:
        url: what the store was asked for.
        notice: why the rows of this session will not outlast it; None where they will.
        lost: how many calls were found to be in flight when the process that made them had died.
    """

    def __init__(self, url: str = "sqlite", clock: Clock | None = None, *, store: Store | None = None) -> None:
        """``store`` is used as it is, instead of the one that ``url`` names.

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
        self._opening = threading.Lock()
        self._falling = threading.Lock()
        self._groups: dict[asyncio.AbstractEventLoop, list[tuple[_Entry, asyncio.Future[None]]]] = {}
        self._open_calls: dict[int, _Entry] = {}  # by the id of the trail, which all copies of a call share
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

    @property
    def database(self) -> Database | None:
        """The SQLite file that the rows are in, for what else is kept there; None where they are in memory only."""
        return getattr(self._ready(), "database", None)

    # -- writing -----------------------------------------------------------------------------------------------------

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
        self._open_calls[id(call.trail)] = _Entry(call.trail, rows.call_began(call, current_owner()))

    async def attempt_began(self, call: Call, number: int, endpoint: Endpoint, started_at: float) -> None:
        """Write that attempt ``number`` is about to be sent (``started_at`` in epoch seconds). It is stored on return.

        Raises:
            StoreError: another call had this ``request_id``. Any other failure makes the ledger go on in memory.
        """
        entry = self._entry(call)
        entry.retries += endpoint.key == entry.endpoint
        entry.endpoint = endpoint.key
        entry.number = number
        entry.changes.append(rows.attempt_began(call, number, endpoint, started_at))
        await self._write(entry)

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
        if attempt.status == "failed":  # a pause may follow; after any other end the call's own comes in this turn
            asyncio.get_running_loop().call_soon(self._write_soon, entry, len(entry.changes))

    async def call_ended(self, call: Call, outcome: Outcome) -> None:
        """Write how the call ended, and all that was remembered of it. Never fails."""
        entry = self._entry(call)
        entry.changes.append(
            rows.call_ended(call, outcome, now=self._clock.now(), attempts=entry.number, retries=entry.retries)
        )
        entry.ended = True
        if len(self._open_calls) > SIBLINGS and self._store is not None:
            await self._write_together(entry)
            return
        try:
            await self._write(entry)
        except DuplicateCall as error:
            log.warning("%s; this call is not in the ledger", error)
        finally:
            self._open_calls.pop(id(call.trail), None)

    def _entry(self, call: Call) -> _Entry:
        entry = self._open_calls.get(id(call.trail))
        if entry is None:
            self.call_began(call)
            entry = self._open_calls[id(call.trail)]
        return entry

    async def _write(self, entry: _Entry) -> None:
        """Bring the entry's changes into the store, and return when they are there."""
        await self.open_store()
        if len(self._open_calls) > SIBLINGS:
            await self._write_together(entry)
            if entry.refused:
                raise DuplicateCall("another call had this request_id")
            return
        try:
            waiting = self._commit(entry)
            if waiting is not None:
                await asyncio.shield(asyncio.wrap_future(waiting))
        except StoreError as error:
            self._write_failed(entry, error)
            if entry.refused:
                raise
            self._commit(entry)

    def _write_together(self, entry: _Entry) -> asyncio.Future[None]:
        """Write the entry at the loop's next turn, in one transaction with all others that ask for it until then."""
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
        entries = list(dict.fromkeys(entry for entry, _ in group))
        before = [entry.written if entry.store is self._store else 0 for entry in entries]
        changes = [change for entry in entries for change in self._take(entry)]

        def landed(waiting: Future[None] | None) -> None:
            if waiting is None or waiting.exception() is None:
                self._landed(group)
                return
            for entry, written in zip(entries, before, strict=True):  # one of them spoilt it: each by itself
                entry.written = written
                self._write_alone(entry)
            self._landed(group)

        assert self._store is not None
        try:
            waiting = self._store.commit(changes) if changes else None
        except StoreError as error:
            waiting = concurrent.futures.Future()
            waiting.set_exception(error)
        if waiting is None or waiting.done():
            landed(waiting)
        else:
            waiting.add_done_callback(lambda done: loop.call_soon_threadsafe(landed, done))

    def _write_alone(self, entry: _Entry) -> None:
        try:
            self._commit(entry)
        except StoreError as error:
            self._write_failed(entry, error)
            self._commit(entry)

    def _landed(self, group: list[tuple[_Entry, asyncio.Future[None]]]) -> None:
        for entry, written in group:
            if entry.ended:
                if entry.refused:
                    log.warning("another call had the request_id of this one; it is not in the ledger")
                self._open_calls.pop(id(entry.trail), None)
            if not written.done():
                written.set_result(None)

    def _take(self, entry: _Entry) -> list[Change]:
        """What the store has not got; from now on it counts as handed over."""
        if entry.store is not self._store:  # the first write, or the first since the ledger fell back
            entry.store, entry.written = self._store, 0
        changes = [] if entry.refused else entry.changes[entry.written :]
        entry.written += len(changes)
        return changes

    def _commit(self, entry: _Entry) -> Future[None] | None:
        """Hand over what the store has not got, and return what its ``commit`` does."""
        store = self._store
        assert store is not None
        changes = self._take(entry)
        if not changes:
            return None
        waiting = store.commit(changes)
        if waiting is not None:  # whoever waits for it may be cancelled, so its failure is heard here
            waiting.add_done_callback(functools.partial(self._written_late, entry))
        return waiting

    def _written_late(self, entry: _Entry, waiting: Future[None]) -> None:
        error = waiting.exception()
        if isinstance(error, StoreError):
            self._write_failed(entry, error)

    def _write_failed(self, entry: _Entry, error: StoreError) -> None:
        if isinstance(error, DuplicateCall):
            entry.refused = True
        else:
            self._fall_back(error)

    def _write_soon(self, entry: _Entry, length: int) -> None:
        """Write what an attempt left, if nothing came after it that took it along."""
        if entry.written >= length or self._store is None:
            return
        try:
            self._commit(entry)
        except StoreError as error:
            self._write_failed(entry, error)

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
                    self.lost = _mark_lost(store, self._clock.time())
                    self._store = store
                except StoreError as error:
                    self._fall_back(error)
        assert self._store is not None
        return self._store

    def _fall_back(self, error: StoreError) -> None:
        from llmkit.state.memory import MemoryStore

        with self._falling:
            if self.notice is not None:
                return
            how = f" ({error.next_step})" if error.next_step else ""
            self.notice = f"{error.message}; the calls of this session are kept in memory only{how}"
            self._disk, self._store = self._store, MemoryStore()
        log.warning("%s", self.notice)

    def close(self) -> None:
        """Finish what waits, and let go of files and threads. A later write opens them again."""
        for loop in list(self._groups):
            self._flush(loop)
        for each in (self._store, self._disk):
            if each is not None:
                each.close()

    def _start_afresh(self) -> None:
        """In a forked child: the calls in flight are the parent's."""
        self._opening = threading.Lock()
        self._falling = threading.Lock()
        self._open_calls.clear()
        self._groups.clear()

    # -- reading -----------------------------------------------------------------------------------------------------

    def calls(self, limit: int | None = None, since: datetime | float | None = None) -> list[Row]:
        """The calls, newest last, as dictionaries of all that is known of them.

        Args:
            limit: only the newest so many.
            since: only those that started then or later: epoch seconds, or a datetime (a naive one is local time).

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
            for row in store.calls(limit=limit, since=after):
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
        stores = (self._readable_disk(), self._ready())
        return [row for store in stores if store is not None for row in store.spend(**asked)]

    def pages(self, size: int = 1000) -> Iterator[list[tuple[Row, list[Row]]]]:
        """Every call with its attempts, oldest first, ``size`` at a time; those that begin meanwhile are left out.

        Raises:
            StoreError: the store cannot be read.
        """
        store, disk, until = self._ready(), self._readable_disk(), self._clock.time()
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

        store = self._ready()
        in_flight = MemoryStore()
        for entry in list(self._open_calls.values()):
            if not entry.refused:
                _add(in_flight, list(entry.changes))
        return [each for each in (self._readable_disk(), store, in_flight) if each is not None]

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


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


def _mark_lost(store: Store, now: float) -> int:
    """Calls in flight whose process is gone will not end any more. Returns how many were found."""
    lost = 0
    for owner, newest in store.owners().items():
        gone = is_gone(owner)
        if gone or (gone is None and newest < now - A_DAY):
            lost += store.mark_lost(owner)
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
