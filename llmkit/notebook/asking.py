"""One call, watched from the cell: what happens is drawn while it happens, and an interrupt ends it.

The call runs on llmkit's background loop. The cell's thread waits here for what it reports, and draws at most ten
times a second, however fast text arrives.
"""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from asyncio import CancelledError
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from llmkit.errors import LLMKitError
from llmkit.events import (
    AlertRaised,
    AttemptEnded,
    AttemptStarted,
    BudgetWarning,
    Checking,
    FellBack,
    Repairing,
    Waiting,
)
from llmkit.money import money
from llmkit.notebook import footer
from llmkit.redaction import redact, tidy
from llmkit.reply import Reply

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from decimal import Decimal
    from types import FrameType

    from llmkit.call import Attempt, Message
    from llmkit.client import AsyncClient
    from llmkit.events import Event
    from llmkit.notebook.display import View
    from llmkit.notebook.footer import Part
    from llmkit.notebook.life import Life
    from llmkit.portal import Portal

__all__ = ["Interrupted", "NotShown", "Pace", "Progress", "ask", "draw"]

log = logging.getLogger("llmkit")

TICK_S = 0.1
"""Seconds between two looks at what has arrived; also the shortest time between two drawings."""
CHARACTERS_PER_TICK = 20_000
"""Each drawing sends the whole text, so longer texts are drawn less often."""
LONGEST_PAUSE_S = 2.0
SHOWN_WAIT_S = 1.0
"""Waits from here on are counted down."""
QUIET_S = 2.0
"""Nobody needs to be told the seconds of a shorter wait."""
AT_ONCE_S = 0.005
"""What has ended so soon after its beginning, as an answer from the cache has, is drawn once, when it is whole."""


class Interrupted(KeyboardInterrupt):
    """The kernel was interrupted during a cell.

    Attributes:
        reply: what had arrived; None where no text had.
        spent: USD, as far as it was seen; None where it is unknown.
        sent: whether a request had been sent. billed: whether one may be billed for more than was seen.
    """

    def __init__(self, reply: Reply | None, spent: Decimal | None, *, sent: bool, billed: bool) -> None:
        super().__init__("interrupted; the connection is closed")
        self.reply = reply
        self.spent = spent
        self.sent = sent
        self.billed = billed

    def block(self) -> str:
        lines = [f"Interrupted: {'the connection is closed' if self.sent else 'nothing was sent'}"]
        if self.sent:
            cost = "unknown" if self.spent is None else money(self.spent) if self.spent else "nothing"
            lines.append(
                f"spent: {cost} that was seen; the provider may bill more" if self.billed else f"spent: {cost}"
            )
        if self.reply is not None and self.reply.text:
            lines.append(f"kept: {len(self.reply.text)} characters of the answer, above and in the variable")
        return "\n".join(lines)

    def _render_traceback_(self) -> list[str]:
        return self.block().split("\n")


class NotShown(LLMKitError):
    """The answer, or what had arrived of it, could not be shown. It is paid for, so it is kept: ``reply``."""

    default_next_step = "mend what draws the outputs; the answer is in the variable and in error.reply.text"

    def __init__(self, error: Exception, reply: Reply | None) -> None:
        why = f"{type(error).__name__}: {tidy(redact(str(error)), limit=200)}".removesuffix(": ")
        super().__init__(f"the answer could not be shown: {why}", next_step=None if reply is not None else "")
        self.reply = reply
        if reply is not None:
            self.spent, self.request_id = reply.cost_usd, reply.request_id


def ask(
    portal: Portal,
    client: AsyncClient,
    prompt: str | list[Message],
    options: dict[str, Any],
    view: View,
    *,
    stream: bool,
    life: Life | None = None,
    notes: Sequence[str] = (),
) -> Reply:
    """Ask, draw, and give back the whole reply.

    Args:
        life: hears all that the call reports, for later. notes: sentences for below the footer's line.

    Raises:
        LLMKitError: as `AsyncClient.complete`; what had arrived stays on the screen and in ``error.reply``.
        Interrupted: the same, when the kernel was interrupted.
    """
    inbox = _Inbox()
    progress = Progress(options.get("model") or options["tier"], time.monotonic, notes)

    def told(event: Event) -> None:
        if life is not None:
            life.hear(event)
        inbox.put(event)

    async def work() -> None:
        try:
            if stream:
                reply = await client.stream(prompt, on_event=told, **options)
            else:
                reply = await client.complete(prompt, on_event=told, **options)
            reply._portal = portal
            inbox.put(reply)
            await reply.read()
        finally:
            inbox.put(None)

    job = portal._job(work())
    try:
        job.begin()  # in here: an interrupt may come at any moment
        _watch(inbox, progress, view)
        job.result()
    except (KeyboardInterrupt, CancelledError):  # cancelled by others: llmkit was unloaded in another thread
        with _deaf():
            job.cancel()
            interrupted = _interrupted(inbox, progress, view)
        raise interrupted from None
    except LLMKitError as error:
        _show_failure(error, progress, view)
        raise
    except Exception as error:  # a drawing failed
        job.cancel()
        progress.hear_again(inbox.news)
        raise NotShown(error, progress.reply) from error
    finally:
        if not job.is_over:  # an interrupt in the midst of one of these
            job.cancel()
    reply = progress.reply
    assert reply is not None
    try:
        draw(view.done, reply, progress.with_answer(reply, view))
    except Exception as error:
        raise NotShown(error, reply) from error
    return reply


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold an interrupt back until a drawing is done: one cut in half would leave an output twice, or none."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    held: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: held.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if held:
            before(*held[0])


@contextmanager
def _deaf() -> Iterator[None]:
    """Hear no interrupt: the cell is ending already, in bounded time, and one cut short would lose what is kept."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def draw(drawing: Callable[..., None], *what: Any) -> None:
    """Call ``drawing``; an interrupt waits until it is done."""
    with _uninterrupted():
        drawing(*what)


class _Inbox:
    """What the loop reports to the cell's thread, None last.

    All of it is kept: an interrupt may come when a report has been taken out and nobody has heard it yet.
    """

    def __init__(self) -> None:
        self.news: list[Any] = []
        self._unheard: SimpleQueue[Any] = SimpleQueue()

    def put(self, news: Any) -> None:
        self.news.append(news)
        self._unheard.put(news)

    def get(self, timeout: float) -> Any:
        """The next report. Raises `queue.Empty` when there is none for ``timeout`` seconds."""
        return self._unheard.get(timeout=timeout)


def _watch(inbox: _Inbox, progress: Progress, view: View) -> None:
    """Draw until the call has ended."""
    pace = Pace(time.monotonic)
    patience = TICK_S
    while True:
        try:
            news = inbox.get(timeout=patience)
        except Empty:
            news = False
        if news is None:
            return
        if news is not False:
            progress.hear(news)
        began = isinstance(news, Reply)
        patience = AT_ONCE_S if began else TICK_S
        if began or not pace.due():
            continue
        text = progress.text()
        if text:
            draw(view.growing, text, progress.status())
        elif news is False:  # a quick answer needs no status before it
            draw(view.waiting, progress.status())
        pace.drawn(len(text))


class Pace:
    """When the next drawing is due."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._next = now()

    def due(self) -> bool:
        return self._now() >= self._next

    def drawn(self, characters: int) -> None:
        self._next = self._now() + min(LONGEST_PAUSE_S, TICK_S * max(1.0, characters / CHARACTERS_PER_TICK))


class Progress:
    """What is known so far of the call, in words."""

    def __init__(self, model: str, now: Callable[[], float], notes: Sequence[str] = ()) -> None:
        self._known = notes
        self._forget()
        self._now = now
        self._began = now()
        self._since = self._began
        self._what = f"waiting for {tidy(model, limit=100)} …"
        self._until: float | None = None
        self._then = ""
        self._before = ""

    def _forget(self) -> None:
        self.reply: Reply | None = None
        self.unchecked: Reply | None = None
        self.attempts: list[Attempt] = []
        self.notes: list[str] = list(self._known)
        self.sent = False

    @property
    def elapsed_s(self) -> float:
        return self._now() - self._began

    def hear_again(self, news: Sequence[object]) -> None:
        """Take in all that there was from the beginning, whatever had been heard."""
        self._forget()
        for each in news:
            self.hear(each)

    def hear(self, news: object) -> None:
        """Take in an event, or the reply at its first token."""
        if isinstance(news, Reply):
            self.reply = news
            self._tell(f"{tidy(news.model, limit=100)} is {'answering' if news.text else 'reasoning'} …")
        elif isinstance(news, AttemptStarted):
            self.sent = True
            again = f", attempt {news.number}" if news.number > 1 else ""
            self._tell(f"{self._before}waiting for {news.endpoint}{again} …")
        elif isinstance(news, AttemptEnded):
            self.attempts.append(news.attempt)
        elif isinstance(news, Waiting):
            self._tell(tidy(news.reason, limit=160))
            self._until = self._now() + news.seconds if news.seconds >= SHOWN_WAIT_S else None
            self._then = "waiting for room, at most" if news.for_room else "retrying in"
        elif isinstance(news, FellBack):
            self._before = f"fell back from {news.endpoint} ({news.reason.partition(':')[0]}); "
            self._tell(f"{self._before}waiting for {news.to} …")
        elif isinstance(news, Checking):
            self.unchecked = news.reply
            self._tell(f"{self._before}{tidy(news.reply.model, limit=100)} is answering; checked when it is whole …")
        elif isinstance(news, Repairing):
            self._before = f"asking again ({tidy(news.problems[0], limit=100)}); "
        elif isinstance(news, BudgetWarning | AlertRaised):
            self.notes.append(news.message)

    def with_answer(self, reply: Reply, view: View, *, interrupted: bool = False) -> list[Part]:
        """The footer of an answer, whole or not."""
        parts = footer.of_reply(reply, interrupted=interrupted, timings=view.timings)
        return [*parts, *footer.notes([*reply.call.trail.warnings, *self.notes])]

    def without_answer(self, view: View, took_s: float | None = None) -> list[Part]:
        """The footer of a call that never came to one."""
        parts = footer.of_attempts(self.attempts, self.elapsed_s if took_s is None else took_s, timings=view.timings)
        return [*parts, *footer.notes(self.notes)]

    def _tell(self, what: str) -> None:
        self._what = what
        self._since = self._now()
        self._until = None

    def text(self) -> str:
        return self.reply.text if self.reply is not None else ""

    def status(self) -> str:
        if self._until is not None:
            left = max(0, math.ceil(self._until - self._now()))
            return f"{self._what}; {self._then} {left} s"
        elapsed = self._now() - self._since
        return f"{self._what} {elapsed:.0f} s" if elapsed >= QUIET_S else self._what


def _show_failure(error: LLMKitError, progress: Progress, view: View) -> None:
    reply = error.reply if error.reply is not None and error.reply.text else None
    with _at_best():
        if reply is None:
            whole = error.reply if error.latency_s is None else error
            draw(view.done, None, progress.without_answer(view, None if whole is None else whole.latency_s))
        else:
            draw(view.done, reply, progress.with_answer(reply, view))


@contextmanager
def _at_best() -> Iterator[None]:
    """Draw the end of a call that has failed: if that fails, too, it is the call's own failure that must be told."""
    try:
        yield
    except Exception:
        log.debug("the end of a cell could not be drawn", exc_info=True)


def _interrupted(inbox: _Inbox, progress: Progress, view: View) -> Interrupted:
    progress.hear_again(inbox.news)
    reply = progress.reply or progress.unchecked
    billed = any(attempt.maybe_billed for attempt in progress.attempts)
    if reply is None or not reply.text:
        with _at_best():
            parts = [part for part in progress.without_answer(view) if part.below or not part.warns]
            draw(view.done, None, [*parts, footer.Part("interrupted", warns=True)])
        costs = [attempt.cost_usd for attempt in progress.attempts]
        known = [cost for cost in costs if cost is not None]
        spent = sum(known[1:], known[0]) if costs and len(known) == len(costs) else None
        return Interrupted(None, spent, sent=progress.sent, billed=billed)
    with _at_best():
        draw(view.done, reply, progress.with_answer(reply, view, interrupted=True))
    return Interrupted(reply, reply.cost_usd, sent=True, billed=billed)
