"""What one cell asked and was answered, written down so that it can be shown again: here, or in another kernel.

It is written when the call has ended, by the cell and not by the call; so what a client is asked from Python costs
nothing more for it. What is read back is nobody's friend: each value is checked, and drawn as carefully as an answer is.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from llmkit.errors import LLMKitError
from llmkit.notebook import footer
from llmkit.notebook.footer import Part
from llmkit.notebook.life import Moment
from llmkit.redaction import redact, tidy
from llmkit.state.answers import MemoryAnswers

if TYPE_CHECKING:
    from collections.abc import Callable

    from llmkit.call import Message
    from llmkit.notebook.life import Life
    from llmkit.reply import Reply
    from llmkit.state.answers import Answers

__all__ = ["History", "Kept"]

log = logging.getLogger("llmkit")

LONGEST_QUESTION = 20_000
"""Characters that are kept of a question; of a longer one its beginning."""
_LONGEST_PART = 2_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """One call of a cell.

    Attributes:
        started: epoch seconds. model: as it was asked for.
        question: its text, without what looks like a key, at most `LONGEST_QUESTION` long.
        answer: what had arrived; empty where nothing had. form: how it was shown (``--format``).
        ending: ``complete``, ``cut``, ``interrupted``, ``broken off`` or ``failed``. error: the error's block of text.
        footer: the line below the answer, as it was shown. about: the output's metadata.
        life: what happened, in order.
    """

    request_id: str
    started: float
    model: str
    question: str
    answer: str = ""
    form: str = "markdown"
    ending: str = "complete"
    error: str = ""
    footer: tuple[Part, ...] = ()
    about: dict[str, Any]
    life: tuple[Moment, ...] = ()

    @property
    def is_whole(self) -> bool:
        return self.ending in {"complete", "cut"}

    def written(self) -> bytes:
        """As it is stored."""
        return json.dumps(asdict(self), ensure_ascii=False).encode("utf-8", "replace")

    @classmethod
    def read(cls, record: bytes) -> Kept | None:
        """What `written` made; None where it is anything else."""
        try:
            given = json.loads(record)
            kinds: dict[str, Any] = {"started": (int, float), "footer": list, "about": dict, "life": list}
            if given.keys() != {field.name for field in fields(cls)}:
                return None
            if not all(isinstance(value, kinds.get(name, str)) for name, value in given.items()):
                return None
            given["footer"] = tuple(_part(*each) for each in given["footer"])
            given["life"] = tuple(_moment(*each) for each in given["life"])
            return cls(**given)
        except (ValueError, TypeError, AttributeError, RecursionError):
            return None


def _part(text: object, warns: object, below: object) -> Part:
    return Part(tidy(str(text), limit=_LONGEST_PART), bool(warns), bool(below))


def _moment(at: object, text: object) -> Moment:
    if not isinstance(at, int | float):
        raise TypeError
    return Moment(float(at), tidy(str(text), limit=_LONGEST_PART))


class History:
    """What the cells of one shell asked and were answered.

    Args:
        opening: opens where that is kept; at the first use.
    """

    def __init__(self, opening: Callable[[], Answers]) -> None:
        self._opening = opening
        self._lock = threading.Lock()
        self._answers: Answers | None = None
        self._said = False
        self.last: str | None = None
        """The id of the last call of this shell's cells."""

    @property
    def answers(self) -> Answers:
        """Where they are kept.

        Raises:
            LLMKitError: it cannot be opened.
        """
        with self._lock:  # Tab looks in here from a thread of its own
            if self._answers is None:
                self._answers = self._opening()
            return self._answers

    @property
    def location(self) -> str:
        """Where that is, for people."""
        return self.answers.location

    def keep(
        self,
        prompt: str | list[Message],
        life: Life,
        reply: Reply | None,
        error: BaseException | None = None,
        *,
        model: str = "",
        form: str = "markdown",
        timings: bool = True,
    ) -> None:
        """Write one call down, now that it has ended; ``error`` is what it ended with. Never fails.

        A cell that was refused before there was a call leaves nothing. ``timings``: see `llmkit.notebook.display.View`.
        """
        try:
            kept = _kept(prompt, life, reply, error, model=model, form=form, timings=timings)
            if kept is not None:
                self.last = kept.request_id
                self._put(kept.request_id, kept.written())
        except Exception:  # the answer is on the screen and in the ledger: this must not take it back
            log.warning("what this cell was answered is not kept", exc_info=True)

    def _put(self, request_id: str, record: bytes) -> None:
        try:
            self.answers.put(request_id, record)
        except LLMKitError as error:
            if not self._said:
                self._said = True
                log.warning("%s; what cells are answered is kept in memory only", error.message)
            self._answers = MemoryAnswers()
            self._answers.put(request_id, record)

    def find(self, beginning: str, limit: int = 10) -> list[str]:
        """The ids that begin so, the newest first.

        Raises:
            LLMKitError: they cannot be read.
        """
        return [each.request_id for each in self.answers.find(beginning, limit)]

    def of(self, request_id: str) -> Kept | None:
        """What is kept of one call; None where nothing is, or nothing that can be read. Raises as `find`."""
        record = next((each for each in self.answers.find(request_id, 50) if each.request_id == request_id), None)
        return None if record is None else Kept.read(record.record)

    def newest(self) -> str | None:
        """The id of the last call. Raises as `find`."""
        record = self.answers.newest()
        return None if record is None else record.request_id

    def clear(self) -> int:
        """Forget everything, on the disk too; how many calls that were. Raises as `find`."""
        self.last = None
        return self.answers.clear()

    def close(self) -> None:
        """Let go of files."""
        if self._answers is not None:
            self._answers.close()


def _kept(
    prompt: str | list[Message],
    life: Life,
    reply: Reply | None,
    error: BaseException | None,
    *,
    model: str,
    form: str,
    timings: bool,
) -> Kept | None:
    request_id = reply.request_id if reply is not None else life.request_id or getattr(error, "request_id", None)
    if not request_id:
        return None
    interrupted = isinstance(error, KeyboardInterrupt)
    if reply is None:
        parts = footer.of_attempts(life.attempts, life.elapsed_s, timings=timings)
        parts += [Part("interrupted", warns=True)] if interrupted else []
    else:
        parts = footer.of_reply(reply, interrupted=interrupted, timings=timings)
    warnings = [] if reply is None else reply.call.trail.warnings
    return Kept(
        request_id=request_id,
        started=time.time() - life.elapsed_s,
        model=model,
        question=_question(prompt),
        answer="" if reply is None else reply.text,
        form=form,
        ending=_ending(reply, error, interrupted=interrupted),
        error=redact(error.block()) if isinstance(error, LLMKitError) else "",
        footer=(*parts, *footer.notes([*warnings, *life.notes])),
        about={} if reply is None else footer.metadata(reply),
        life=tuple(life.told()),
    )


def _ending(reply: Reply | None, error: BaseException | None, *, interrupted: bool) -> str:
    if interrupted:
        return "interrupted"
    if error is not None:
        is_whole = reply is not None and reply.outcome is not None and reply.outcome.status == "complete"
        return "broken off" if reply is not None and reply.text and not is_whole else "failed"
    return "cut" if reply is not None and reply.cut is not None else "complete"


def _question(prompt: str | list[Message]) -> str:
    """What was asked last."""
    text = prompt if isinstance(prompt, str) else prompt[-1].text if prompt else ""
    more = len(text) - LONGEST_QUESTION
    return redact(text[:LONGEST_QUESTION]) + (f" … and {more:,} characters more" if more > 0 else "")
