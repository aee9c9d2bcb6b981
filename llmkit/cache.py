"""Answers that need not be paid for twice: the tiers they are kept in, and what they have saved.

Two tiers: copies in this process, and below them the entries that outlast it and that other processes see. What is
found below is copied up. A copy is used for at most a second before it is asked whether somebody has cleared or
refreshed (`llmkit.state.shared.Entries.generation`), and is looked up below once a minute, so that the entries know
what is in use.

Whatever happens to a store, no call fails for it: what cannot be read is not there, and is said once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import weakref
from collections import OrderedDict
from typing import TYPE_CHECKING

from llmkit.answer import MAX_BYTES, Answer, Unreadable
from llmkit.models.prices import from_nanos, to_nanos
from llmkit.money import money

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from decimal import Decimal

    from llmkit.clock import Clock
    from llmkit.config import CacheSettings
    from llmkit.state.shared import Contents, Entries

__all__ = ["AnswerCache"]

log = logging.getLogger("llmkit")

CHECK_S = 1.0  # how long a clear or a refresh in another process may go unseen
LOOK_S = 60.0  # how long a copy is used before it is looked up again
REST_S = 10.0  # how long a store that failed is left alone
COPY_BYTES = 1_000  # what a copy takes beside its text


class AnswerCache:
    """What stands behind `Client.cache`.

    Args:
        settings: ``[cache]``.
        opening: opens the entries, at the first use and in a thread.

    Attributes:
        enabled: while it is False, nothing is read and nothing is stored.
        hits, misses: of this client's calls. A call that must ask anew, or may not be answered from here, is neither.
    """

    def __init__(self, settings: CacheSettings, clock: Clock, opening: Callable[[], Entries]) -> None:
        self.enabled = settings.enabled
        self.hits = 0
        self.misses = 0
        self._saved_nanos = 0
        self._ttl = settings.ttl_s
        self._room = settings.memory_bytes
        self._clock = clock
        self._opening = opening
        self._entries: Entries | None = None
        self._rests_until = float("-inf")
        self._copies: OrderedDict[str, tuple[Answer, float | None, float, int]] = OrderedDict()
        self._size = 0
        self._checked = float("-inf")
        self._generation: int | None = None
        self._start_afresh()
        _CACHES.add(self)

    def _start_afresh(self) -> None:
        self._lock = threading.Lock()  # held while copies change
        self._openers = threading.Lock()

    @property
    def saved_usd(self) -> Decimal:
        """What the hits of this client had cost when they were asked for, as far as that is known."""
        return from_nanos(self._saved_nanos)

    @property
    def location(self) -> str:
        """Where the answers are, for people: a path, ``memory``, a server."""
        return self._ready().location

    # -- one answer --------------------------------------------------------------------------------------------------

    def copy_of(self, key: str) -> Answer | None:
        """The copy in this process, if it may be used without asking anybody."""
        now = self._clock.now()
        return self._copy_of(key, now) if now - self._checked < CHECK_S else None

    def _copy_of(self, key: str, now: float) -> Answer | None:
        with self._lock:
            copy = self._copies.get(key)
            if copy is None:
                return None
            answer, expires, looked_up, _ = copy
            if now - looked_up >= LOOK_S or (expires is not None and expires <= self._clock.time()):
                return None
            self._copies.move_to_end(key)
            return answer

    async def find(self, key: str) -> Answer | None:
        """The answer under ``key``; None where there is none that may be used. Never fails."""
        now = self._clock.now()
        if now < self._rests_until:
            return self._copy_of(key, now)
        try:
            entries = self._entries or await self._first_opened()
            if now - self._checked >= CHECK_S:
                await self._check(entries, now)
            if (answer := self._copy_of(key, now)) is not None:
                return answer
            found = await entries.get(key)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with a store, the call goes on
            self._rest(error)
            return self._copy_of(key, now)
        if found is None:
            self._forget(key)
            return None
        value, expires = found
        try:
            answer = Answer.read(value, key)
        except Unreadable as error:
            log.warning("an answer in the cache cannot be used: %s; it is removed", error)
            await self.drop(key)
            return None
        self._copy(key, answer, expires, len(value))
        return answer

    async def peek(self, key: str) -> Answer | None:
        """What `find` would give, and nothing is changed by it: no use is counted, nothing is copied or removed."""
        copy = self._copies.get(key)
        try:
            found = await (self._entries or await self._first_opened()).peek(key)
        except Exception:  # noqa: BLE001 - as for `find`: then there is what this process has
            fresh = copy is not None and (copy[1] is None or copy[1] > self._clock.time())
            return copy[0] if copy is not None and fresh else None
        try:
            return None if found is None else Answer.read(found[0], key)
        except Unreadable:
            return None

    async def keep(self, key: str, answer: Answer, *, namespace: str, renew: bool = False) -> None:
        """Store it, in place of what was there; ``renew`` tells other processes that something was replaced. Never fails."""
        stored = answer.stored(key)
        if len(stored) > MAX_BYTES:
            return
        expires = None if self._ttl is None else self._clock.time() + self._ttl
        self._copy(key, answer, expires, len(stored))

        async def put(entries: Entries) -> None:
            await entries.put(key, stored, namespace=namespace, expires=expires)
            if renew:
                await entries.renew()

        await self._below(put)

    async def drop(self, key: str) -> None:
        """Forget what is stored under ``key``. Never fails."""
        self._forget(key)
        await self._below(lambda entries: entries.delete(key))

    def served(self, answer: Answer) -> None:
        """Count a call that was answered from here."""
        self.hits += 1
        if answer.cost:
            self._saved_nanos += to_nanos(answer.cost)

    # -- copies ------------------------------------------------------------------------------------------------------

    def _copy(self, key: str, answer: Answer, expires: float | None, size: int) -> None:
        size += COPY_BYTES
        if size > self._room:
            self._forget(key)
            return
        with self._lock:
            if (old := self._copies.pop(key, None)) is not None:
                self._size -= old[3]
            self._copies[key] = (answer, expires, self._clock.now(), size)
            self._size += size
            while self._size > self._room:
                self._size -= self._copies.popitem(last=False)[1][3]

    def _forget(self, key: str | None = None) -> None:
        with self._lock:
            if key is None:
                self._copies.clear()
                self._size = 0
            elif (old := self._copies.pop(key, None)) is not None:
                self._size -= old[3]

    async def _check(self, entries: Entries, now: float) -> None:
        """Drop all copies if somebody has cleared or refreshed since the last time."""
        generation = await entries.generation()
        if generation != self._generation:
            if self._generation is not None:
                self._forget()
            self._generation = generation
        self._checked = now

    # -- below -------------------------------------------------------------------------------------------------------

    def _ready(self) -> Entries:
        """The entries, opened if they are not yet. Waits for files, so not for an event loop's thread at first."""
        with self._openers:
            if self._entries is None:
                self._entries = self._opened()
                if self._entries.location == "memory":
                    self._room = 0  # a second copy of everything would help nobody
            return self._entries

    async def _first_opened(self) -> Entries:
        entries: Entries = await asyncio.to_thread(self._ready)
        return entries

    def _opened(self) -> Entries:
        from llmkit.errors import StoreError

        try:
            return self._opening()
        except StoreError as error:
            from llmkit.state.entries import MemoryEntries

            how = f" ({error.next_step})" if error.next_step else ""
            log.warning("%s; answers are kept in memory only%s", error.message, how)
            return MemoryEntries(max_bytes=self._room, clock=self._clock)

    async def _below(self, work: Callable[[Entries], Awaitable[None]]) -> None:
        if self._clock.now() < self._rests_until:
            return
        try:
            await work(self._entries or await self._first_opened())
        except Exception as error:  # noqa: BLE001
            self._rest(error)

    def _rest(self, error: Exception) -> None:
        """Leave the entries alone for a while, and say so the first time."""
        first = self._rests_until == float("-inf")
        self._rests_until = self._clock.now() + REST_S
        log.log(
            logging.WARNING if first else logging.DEBUG,
            "the cache cannot be used for now: %s; calls are asked anew unless this process has the answer",
            error,
        )

    # -- all answers -------------------------------------------------------------------------------------------------

    async def clear(self, namespace: str | None = None) -> int:
        """Remove every answer, or those of one namespace (``user:ana``, ``tag:app=docs``, "" for the shared one).

        Nothing of them is left on disk. Returns how many there were.

        Raises:
            StoreError: they could not be removed, or not from everywhere.
        """
        entries = self._entries or await self._first_opened()
        self._forget()
        try:
            return await entries.clear(namespace)
        finally:
            self._forget()  # what was copied meanwhile

    async def contents(self, namespace: str | None = None) -> Contents:
        """How many answers are stored, and their bytes: of all namespaces, or of one.

        Raises:
            StoreError: the store cannot be read.
        """
        entries = self._entries or await self._first_opened()
        return await entries.contents(namespace)

    async def aclose(self) -> None:
        """Let go of files and connections. A later use opens them again."""
        self._forget()
        if self._entries is not None:
            await self._entries.aclose()

    def __repr__(self) -> str:
        return f"<AnswerCache {self.hits} hits, {self.misses} misses, saved {money(self.saved_usd)}>"


_CACHES: weakref.WeakSet[AnswerCache] = weakref.WeakSet()


def _in_child() -> None:
    for cache in list(_CACHES):
        cache._start_afresh()  # another thread may have held a lock, and is not here


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
