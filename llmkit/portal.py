"""The bridge for code that has no event loop: one background loop a process, and waits that can be interrupted.

Sync `Client` methods hand their coroutine to the loop's thread and wait here. A kernel's interrupt (Ctrl-C) arrives in
the waiting thread; it cancels the coroutine and waits until that has settled, so that nothing runs on unseen.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import threading
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from weakref import WeakSet

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator

    from llmkit.reply import Chunk, Reply

__all__ = ["Portal", "leave", "others", "shared"]

T = TypeVar("T")

SETTLE_S = 5.0  # how long an interrupted wait stays for the coroutine to settle


class Portal:
    """An event loop in a daemon thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._serve, name="llmkit", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    @property
    def is_here(self) -> bool:
        """Whether this is the loop's own thread."""
        return threading.current_thread() is self._thread

    def start(self, work: Coroutine[Any, Any, T]) -> Job[T]:
        """Run ``work`` on the loop; from any thread but the loop's own."""
        job = self._job(work)
        job.begin()
        return job

    def _job(self, work: Coroutine[Any, Any, T]) -> Job[T]:
        if self.is_here:
            work.close()
            raise RuntimeError("a sync llmkit.Client was used on llmkit's own event loop; use AsyncClient there")
        if self._process != os.getpid():  # its thread has not come along: waiting for it would be for ever
            work.close()
            raise RuntimeError("this reply belongs to the process that asked for it")
        if self.loop.is_closed():
            work.close()
            raise RuntimeError("llmkit's event loop has been closed")
        return Job(self.loop, work)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run ``work`` to its end and give back its result.

        An interrupt cancels it, waits until it has settled, and is raised again.
        """
        job = self._job(work)
        try:
            job.begin()  # in here: an interrupt may come at any moment
            return job.result()
        except BaseException:
            job.cancel()
            raise

    def iterate(self, reply: Reply) -> Iterator[Chunk]:
        """The chunks of ``reply``, read ahead on the loop. Leaving before the end aborts the reply."""
        queue: SimpleQueue[Chunk | None] = SimpleQueue()

        async def pump() -> None:
            try:
                async for chunk in reply:
                    queue.put(chunk)
            finally:
                queue.put(None)

        job = self._job(pump())
        try:
            job.begin()
            while (chunk := queue.get()) is not None:
                yield chunk
            job.result()
        finally:
            job.cancel()

    def settle(self) -> None:
        """Cancel what runs on the loop, and wait (bounded) until it has settled."""
        with contextlib.suppress(TimeoutError):
            self.start(_cancelled()).result(SETTLE_S)

    def close(self) -> None:
        """Stop the loop; what still runs on it is cancelled first, and its connections are closed. Takes bounded time."""
        if self.loop.is_closed():
            return
        with contextlib.suppress(TimeoutError):
            self.start(_ended()).result(SETTLE_S)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(SETTLE_S)
        if not self._thread.is_alive():
            self.loop.close()


class Job(Generic[T]):
    """A coroutine on the portal's loop, seen from another thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T]) -> None:
        self._loop = loop
        self._work = work
        self._done: SimpleQueue[None] = SimpleQueue()
        self._task: asyncio.Task[T] | None = None

    def begin(self) -> None:
        self._loop.call_soon_threadsafe(self._begin)

    def _begin(self) -> None:
        self._task = self._loop.create_task(self._work)
        self._task.add_done_callback(lambda _: self._done.put(None))

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""
        return not self._done.empty()

    def result(self, timeout: float | None = None) -> T:
        """Wait for the end (``timeout`` seconds, then TimeoutError); the result, or what the coroutine raised."""
        try:
            self._done.get(timeout=timeout)
        except Empty:
            raise TimeoutError from None
        self._done.put(None)  # whoever asks again need not wait
        assert self._task is not None
        return self._task.result()

    def cancel(self) -> None:
        """Cancel it, unless it has ended, and wait (bounded) until it has settled."""
        try:
            self._loop.call_soon_threadsafe(self._cancel)
        except RuntimeError:  # the loop has been closed, and what ran on it was cancelled before
            return
        try:
            self._done.get(timeout=SETTLE_S)
        except Empty:
            return
        self._done.put(None)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()
        elif self._done.empty():  # interrupted before it could begin
            self._work.close()
            self._done.put(None)


async def _cancelled() -> None:
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _ended() -> None:
    await _cancelled()
    loop = asyncio.get_running_loop()
    await loop.shutdown_asyncgens()  # the transport closes its connections there
    with contextlib.suppress(RuntimeError):  # Python 3.12.0 and 3.12.1 start no thread while they end
        await loop.shutdown_default_executor()


_shared: tuple[int, Portal] | None = None
_users: WeakSet[Any] = WeakSet()
_lock = threading.Lock()


def shared(user: Any = None) -> Portal:
    """The process's one portal. A forked child gets its own: threads do not survive a fork.

    It runs on while there is a ``user`` who has not said `leave`: a client, a session, a reply that still arrives.
    """
    global _shared  # noqa: PLW0603  one loop a process is the point
    with _lock:
        if _shared is None or _shared[0] != os.getpid() or _shared[1].loop.is_closed():
            _shared = (os.getpid(), Portal())
        if user is not None:
            _users.add(user)
        return _shared[1]


def others(user: Any) -> bool:
    """Whether anybody but ``user`` uses the portal. A reply does until it has ended."""
    return any(each is not user and getattr(each, "outcome", None) is None for each in list(_users))


def leave(user: Any) -> None:
    """``user`` needs the portal no longer. With the last one goes its thread; a later use starts another."""
    global _shared
    with _lock:
        _users.discard(user)
        if _shared is None or _shared[0] != os.getpid() or others(user) or _shared[1].is_here:
            return
        (_, left), _shared = _shared, None
    left.close()


@atexit.register
def _close_shared() -> None:
    # A client that nobody closed: what is still arriving is settled, and nothing complains of open connections.
    if _shared is not None and _shared[0] == os.getpid():
        _shared[1].close()


def _in_child() -> None:
    global _lock, _users  # another thread may have held it, and is not in the forked child
    _lock, _users = threading.Lock(), WeakSet()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
