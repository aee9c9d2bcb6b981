"""Work that a cancellation cannot stop half-way: endings."""

from __future__ import annotations

import asyncio
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Coroutine, Generator

__all__ = ["begun", "finished", "shielded"]


def begun(work: Coroutine[Any, Any, None]) -> asyncio.Task[None] | None:
    """Drive ``work`` right here until it has to wait. Returns a task of what is left, None if that is nothing."""
    try:
        waiting_for = work.send(None)
    except StopIteration:
        return None
    return asyncio.get_running_loop().create_task(_continued(work, waiting_for))


async def shielded(work: Coroutine[Any, Any, None]) -> None:
    """Run ``work`` to its end, whatever happens to the task that awaits it.

    Endings seldom have to wait for anything, so ``work`` is first driven right here; only when it does wait is it
    moved to a task of its own (which alone costs more than the whole of an ordinary ending).
    """
    task = begun(work)
    if task is not None:
        await finished(task)


async def finished(task: asyncio.Task[None]) -> None:
    """Wait until what `begun` has left is done, whatever happens to the task that awaits it."""
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            if task.cancelled():  # the loop itself is closing down
                raise
            cancelled = error
    if cancelled is not None:
        raise cancelled
    task.result()


async def _continued(work: Coroutine[Any, Any, None], waiting_for: Any) -> None:
    await _resume(work, waiting_for)


@types.coroutine
def _resume(work: Coroutine[Any, Any, None], waiting_for: Any) -> Generator[Any, Any, None]:
    while True:
        failure: BaseException | None = None
        sent: Any = None
        try:
            sent = yield waiting_for
        except BaseException as error:  # noqa: BLE001  the loop throws here what `work` waits for failed with
            failure = error
        try:
            waiting_for = work.send(sent) if failure is None else work.throw(failure)
        except StopIteration:
            return
