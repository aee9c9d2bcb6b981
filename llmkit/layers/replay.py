"""Calls are recorded to a file, or answered from it, outermost: what is replayed reaches nothing below.

Both ask the same thing of a call, its question (`llmkit.recording.asked`), and tell questions that are asked several
times apart by how often they have been asked. Above the choice of a route, so that what is replayed needs no
setting, no key and no model that is known here.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

from llmkit.errors import LLMKitError, ReplayMismatch
from llmkit.events import AlertRaised, AttemptEnded, AttemptStarted, BudgetWarning, emit
from llmkit.lock import new_lock
from llmkit.recording.asked import DEFAULT, Asked
from llmkit.recording.differences import nearest
from llmkit.recording.recorder import leave
from llmkit.recording.told import is_kept, written
from llmkit.reply import settled

if TYPE_CHECKING:
    from pathlib import Path

    from llmkit.call import Call
    from llmkit.clock import Clock
    from llmkit.events import Event
    from llmkit.pipeline import CallNext
    from llmkit.recording.file import Recording
    from llmkit.recording.recorder import Recorder
    from llmkit.recording.scrubbing import Scrub
    from llmkit.recording.told import Told
    from llmkit.reply import Outcome, Reply

__all__ = ["Recordist", "Replay"]

log = logging.getLogger("llmkit")


class Replay:
    """Answers calls from a recording.

    Args:
        recording: what was recorded at ``path``.
        scrub: as the recording was scrubbed, so that a question can be compared with those in it.
        live: ask for real what was not recorded.

    Attributes:
        default: the model of calls that name none, as it was when they were recorded.
    """

    def __init__(
        self,
        path: Path,
        recording: Recording,
        scrub: Scrub,
        clock: Clock,
        *,
        live: bool = False,
    ) -> None:
        self.path = path
        self.recording = recording
        self.live = live
        self.default: str | None = recording.head.get("default", DEFAULT)
        self._scrub = scrub
        self._clock = clock
        self._asked: dict[str, int] = {}
        self._guard = new_lock()

    async def __call__(self, call: Call, call_next: CallNext) -> Reply:
        asked = Asked.of(call, self.default)
        digest = self.recording.known_as(asked)
        if digest is not None:
            return await self._replayed(call, digest)
        if self.live:
            return await call_next(call)
        raise self._mismatch(asked)

    replays: Literal[True] = True

    def plan(self, call: Call) -> bool:
        """Whether ``call`` would be answered from the recording; else it would be asked for real. Counts nothing.

        Raises:
            ReplayMismatch: it would be neither.
        """
        asked = Asked.of(call, self.default)
        if self.recording.known_as(asked) is not None:
            return True
        if not self.live:
            raise self._mismatch(asked)
        return False

    def finish(self) -> None:
        """Nothing is open."""

    async def _replayed(self, call: Call, digest: str) -> Reply:
        with self._guard:
            number = self._asked[digest] = self._asked.get(digest, 0) + 1
        told = self.recording.take(digest, number).checked()
        return await replayed(told, call, self._clock)

    def _mismatch(self, asked: Asked) -> ReplayMismatch:
        name = self.path.name
        missing = f"this question is not in {name}" + (", whose last line is cut off" if self.recording.torn else "")
        near = nearest(self._scrub.tree(asked.form), self.recording.takes.values())
        step = f"record it: %llm record {name} --new; or ask for real what was not recorded: %llm replay {name} --live"
        if not self.recording.takes:
            return ReplayMismatch(f"nothing is recorded in {name}", next_step=step)
        if near is None:
            return ReplayMismatch(f"{missing}, nor is one that is like it", next_step=step)
        was, now = near.lines
        where = f"nearest is call {near.place} of {near.of}, {near.alike:.0%} alike; first difference: {near.where}"
        difference = f"{where}\n- recorded: {was}\n+ asked:    {now}"
        return ReplayMismatch(missing, difference=difference, next_step=step)


async def replayed(told: Told, call: Call, clock: Clock) -> Reply:
    """What a call was told, once more: its answer from the first chunk on, or its error."""
    call = told.call(call)
    for attempt in told.attempts:
        emit(call, AttemptStarted(call.request_id, f"{attempt.provider}:{attempt.model}", attempt.number))
        emit(call, AttemptEnded(call.request_id, attempt))
    for note in told.notes:
        emit(call, note)
    if told.answer is None:
        error = told.error()
        assert error is not None  # a call was told one or the other
        raise error
    reply = told.reply(call, clock)
    await reply.at_end(told.ended)
    if told.answer.beside or call.schema is not None:  # it was there as a whole
        with suppress(LLMKitError):  # which its reader is told
            await reply.read()
    error = told.error() if told.answer.beside else None
    if error is not None:
        error.reply = reply
        raise error
    return reply


class Recordist:
    """Records calls, on their way back.

    Args:
        new: only what was not in the recording at the beginning; the rest is answered from it.

    Attributes:
        default: the model of calls that name none, as far as it is known.
    """

    def __init__(self, recorder: Recorder, clock: Clock, *, new: bool = False) -> None:
        self.recorder = recorder
        self.default: str | None = None
        known = recorder.recording.copy() if new else None
        self._known = None if known is None else Replay(recorder.path, known, recorder.scrub, clock, live=True)
        self._open = 0
        self._left = False

    replays: Literal[False] = False
    live = True

    @property
    def recording(self) -> Recording:
        return self.recorder.recording

    @property
    def path(self) -> Path:
        return self.recorder.path

    @property
    def new(self) -> bool:
        """Whether what is recorded already is answered from the recording."""
        return self._known is not None

    async def __call__(self, call: Call, call_next: CallNext) -> Reply:
        if self._known is None:
            return await self._recorded(call, call_next)
        self._known.default = self.default
        return await self._known(call, lambda each: self._recorded(each, call_next))

    async def _recorded(self, call: Call, call_next: CallNext) -> Reply:
        asked = Asked.of(call, self.default)
        number = self.recorder.begin(asked)
        notes = _listened_to(call)
        self._open += 1

        async def ended(outcome: Outcome) -> None:
            try:
                if is_kept(outcome):
                    self.recorder.scrub.look()
                    self._write(call, asked, number, written(call, outcome, notes, self.recorder.scrub))
                else:
                    self.recorder.skip(asked, number)
            finally:
                self._open -= 1
                if self._left and not self._open:
                    leave(self.recorder)

        return await settled(call_next(call), ended)

    def _write(self, call: Call, asked: Asked, number: int, told: dict[str, Any]) -> None:
        try:
            self.recorder.tell(default=self.default)
            self.recorder.write(asked, number, told)
        except (OSError, ValueError) as error:
            log.warning("a call could not be recorded to %s: %s", self.path, error)
            why = error.strerror if isinstance(error, OSError) else error
            call.trail.warnings.append(f"this call could not be recorded to {self.path.name}: {why}")

    def finish(self) -> None:
        """No more calls; those in flight are still recorded."""
        if not self._left:
            self._left = True
            if not self._open:
                leave(self.recorder)


def _listened_to(call: Call) -> list[Event]:
    """The events from now on that a cell shows below its answer."""
    heard: list[Event] = []
    listener = call.trail.listener
    if listener is not None:

        def both(event: Event) -> None:
            if isinstance(event, BudgetWarning | AlertRaised):
                heard.append(event)
            listener(event)

        call.trail.listener = both
    return heard
