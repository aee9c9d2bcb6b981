"""``%%llm_compare``, and ``%%llm --repeat``: several answers asked for at once, seen side by side while they arrive.

The calls run on llmkit's background loop. The cell's thread draws all of them together, at most ten times a second.
"""

from __future__ import annotations

import sys
import time
from asyncio import CancelledError
from dataclasses import replace
from decimal import Decimal
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol

from llmkit.comparison import Comparison, Version
from llmkit.errors import ConfigError, LLMKitError
from llmkit.events import Event
from llmkit.money import money
from llmkit.notebook import footer, grid
from llmkit.notebook.arguments import parse_grid
from llmkit.notebook.asking import TICK_S, Pace, Progress, draw
from llmkit.notebook.display import HANDING_OVER, Frame, publish
from llmkit.notebook.life import Life

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from llmkit.client import AsyncClient
    from llmkit.comparison import Trial
    from llmkit.notebook.arguments import CellLine, GridLine
    from llmkit.notebook.footer import Part
    from llmkit.notebook.grid import Card
    from llmkit.notebook.magics import LLMMagics
    from llmkit.notebook.question import Question
    from llmkit.notebook.session import Session

__all__ = ["ComparisonInterrupted", "compare", "grid_of", "samples", "samples_of"]


class ComparisonInterrupted(KeyboardInterrupt):
    """The kernel was interrupted during a comparison. ``trials``: what there is of it."""

    def __init__(self, trials: Sequence[Trial]) -> None:
        super().__init__("interrupted; the connections are closed")
        self.trials = trials

    def block(self) -> str:
        sent = [trial for trial in self.trials if trial.sent]
        lines = [f"Interrupted: {'the connections are closed' if sent else 'nothing was sent'}"]
        if sent:
            costs = [trial.cost_usd for trial in sent]
            cost = "unknown" if None in costs else _amount(sum((each or Decimal(0) for each in costs), Decimal(0)))
            more = " that was seen; the provider may bill more" if any(t.maybe_billed for t in sent) else ""
            lines.append(f"spent: {cost}{more}")
        whole = sum(trial.status == "complete" for trial in self.trials)
        part = sum(trial.status != "complete" and bool(trial.text) for trial in self.trials)
        if whole or part:
            lines.append(f"kept: {whole} of {len(self.trials)} answers, and {part} in part, above and in the variable")
        return "\n".join(lines)

    def _render_traceback_(self) -> list[str]:
        return self.block().split("\n")


def _amount(usd: Decimal) -> str:
    return money(usd) if usd else "nothing"


# -- the two magics ----------------------------------------------------------------------------------------------------


def compare(magics: LLMMagics, line: str, cell: str, local_ns: Mapping[str, Any]) -> None:
    """``%%llm_compare``: the variable holds a DataFrame, also of what was interrupted.

    Raises:
        ConfigError, TemplateError, StoreError: it cannot be asked; nothing was sent.
        LLMKitError: not one answer came.
        ComparisonInterrupted: what had arrived is kept.
    """
    said = parse_grid(line)
    if said.cell.help:
        print(magics.compare.__doc__)
        return
    questions = [magics.question(replace(said.cell, saved=name), cell, local_ns) for name in said.saved or [None]]
    session = magics.session
    comparison = grid_of(session.client, said, questions)
    if said.cell.plan:
        from llmkit.notebook.planning import plan_trials

        plan_trials(magics, said.cell, comparison.trials, questions[0])
        return
    try:
        _run(magics, comparison, said.cell)
    finally:
        magics.bind(comparison.frame(session.portal), said.cell.names)
    if not any(trial.reply for trial in comparison.trials):
        raise _failure(comparison.trials, "none of the {} answers came")


def samples(magics: LLMMagics, said: CellLine, question: Question) -> None:
    """``%%llm --repeat N``: the variable holds a list of the replies; those that there are, where it ends badly.

    Raises:
        LLMKitError: one of them did not come.
        ComparisonInterrupted: what had arrived is kept.
    """
    comparison = samples_of(magics.session.client, said, question)
    portal = magics.session.portal
    try:
        _run(magics, comparison, said)
    finally:
        replies = comparison.replies()
        for reply in replies:
            reply._portal = portal
        magics.bind(replies, said.names)
    if any(trial.error for trial in comparison.trials):
        raise _failure(comparison.trials, "{} of the {} samples did not come")


def grid_of(client: AsyncClient, said: GridLine, questions: Sequence[Question]) -> Comparison:
    """What ``%%llm_compare`` asks, of a question for each version of the prompt.

    Raises:
        ConfigError: an impossible grid, or a model that cannot be asked.
    """
    versions = [_version(question) for question in questions]
    sides = {"models": said.models or [None], "temperatures": said.temperatures or [None]}
    return _comparison(client, versions, said.cell, **sides)


def samples_of(client: AsyncClient, said: CellLine, question: Question) -> Comparison:
    """What ``%%llm --repeat N`` asks.

    Raises:
        ConfigError: within a conversation, or of a model that cannot be asked.
    """
    if said.chat:
        step = "ask for samples without --chat, and go on with the one you like"
        raise ConfigError(
            "a conversation goes on with one answer, so --repeat and --chat exclude each other", next_step=step
        )
    version = Version("", question.prompt, options=question.options)
    return _comparison(client, [version], said, models=[None], temperatures=[None])


def _version(question: Question) -> Version:
    name = "" if question.kept is None else question.kept.reference
    return Version(name, question.prompt, options=question.options)


def _comparison(client: AsyncClient, versions: Sequence[Version], said: CellLine, **sides: Any) -> Comparison:
    from llmkit.client import new_request_id

    comparison = Comparison(
        versions,
        repeat=said.repeat or 1,
        options={},
        new_id=partial(new_request_id, client.clock),
        stream=said.stream,
        **sides,
    )
    comparison.check(client)
    return comparison


def _failure(trials: Sequence[Trial], message: str) -> LLMKitError:
    """One error for several; it says what the first was."""
    failed = [trial for trial in trials if trial.error is not None]
    first = failed[0]
    counts = (len(failed), len(trials)) if message.count("{}") == 2 else (len(trials),)
    step = first.error.next_step if isinstance(first.error, LLMKitError) else ""
    error = LLMKitError(f"{message.format(*counts)}: {first.reason}", next_step=step)
    costs = [trial.cost_usd for trial in trials]
    error.spent = None if None in costs else sum((cost or Decimal(0) for cost in costs), Decimal(0))
    error.unseen = sum(trial.maybe_billed for trial in trials)
    return error


# -- running -----------------------------------------------------------------------------------------------------------


def _run(magics: LLMMagics, comparison: Comparison, said: CellLine) -> None:
    """Ask and draw until all have ended."""
    session, inbox = magics.session, SimpleQueue[Any]()
    view = _view_for(magics, quiet=said.quiet)
    client, trials = session.client, comparison.trials
    lives = [Life() for _ in trials]

    def told(trial: Trial, news: object) -> None:
        if isinstance(news, Event):
            lives[trial.number].hear(news)
        inbox.put((trial, news))

    async def work() -> None:
        try:
            await comparison.run(client, told)
        finally:
            inbox.put(None)

    job = session.portal._job(work())
    interrupted = None
    try:
        job.begin()  # in here: an interrupt may come at any moment
        _watch(inbox, trials, view)
        job.result()
    except (KeyboardInterrupt, CancelledError):
        interrupted = ComparisonInterrupted(trials)
        job.cancel()
        raise interrupted from None
    except BaseException:
        job.cancel()
        raise
    finally:
        _show(view, trials, lives)
        _remember(session, trials, lives, interrupted, timings=view.timings)


def _remember(
    session: Session,
    trials: Sequence[Trial],
    lives: Sequence[Life],
    interrupted: BaseException | None,
    *,
    timings: bool,
) -> None:
    """Keep each call for ``%llm why`` and ``%llm show``; without an id, they tell of the last one of the grid."""
    for trial, life in zip(trials, lives, strict=True):
        error = trial.error or (interrupted if trial.status == "aborted" else None)
        if trial.reply is not None or life.request_id is not None:
            prompt: Any = trial.version.prompt
            session.history.keep(prompt, life, trial.reply, error, model=trial.model, form="text", timings=timings)


def _watch(inbox: SimpleQueue[Any], trials: Sequence[Trial], view: GridView) -> None:
    """Draw until all have ended."""
    pace = Pace(time.monotonic)
    progress = {trial.number: Progress(trial.model, time.monotonic) for trial in trials}

    def status(trial: Trial) -> str:
        return progress[trial.number].status() if trial.status == "answering" else "waits for its turn …"

    while True:
        try:
            heard = inbox.get(timeout=TICK_S)
        except Empty:
            heard = ()
        if heard is None:
            return
        if heard:
            trial, news = heard
            progress[trial.number].hear(news)
        if pace.due():
            draw(view.growing, trials, status)
            pace.drawn(sum(len(trial.text) for trial in trials))


def _show(view: GridView, trials: Sequence[Trial], lives: Sequence[Life]) -> None:
    cards = grid.ended(trials, timings=view.timings)
    line = grid.summary(trials, _took(trials, lives[0].elapsed_s) if view.timings else None)
    line += footer.notes(note for life in lives for note in life.notes)
    about = {"llmkit": {"comparison": [footer.metadata(trial.reply)["llmkit"] for trial in trials if trial.reply]}}
    draw(view.done, cards, line, about)


# -- views -------------------------------------------------------------------------------------------------------------


class GridView(Protocol):
    """What a cell shows of several calls. ``timings``: whether it may say what differs from run to run."""

    timings: bool

    def growing(self, trials: Sequence[Trial], status: Any) -> None:
        """They go on; ``status`` says of a trial what it does."""

    def done(self, cards: Sequence[Card], line: Sequence[Part], about: dict[str, Any]) -> None:
        """All have ended."""


def _view_for(magics: LLMMagics, *, quiet: bool) -> GridView:
    if quiet:
        return QuietGrid()
    if magics.display_mode == "final":
        return FinalGrid()
    return LiveGrid() if hasattr(magics.shell, "kernel") else TerminalGrid()


class QuietGrid:
    """Shows nothing."""

    timings = True

    def growing(self, trials: Sequence[Trial], status: Any) -> None:
        pass

    def done(self, cards: Sequence[Card], line: Sequence[Part], about: dict[str, Any]) -> None:
        pass


class FinalGrid(QuietGrid):
    """The whole grid, once at the end."""

    timings = False

    def done(self, cards: Sequence[Card], line: Sequence[Part], about: dict[str, Any]) -> None:
        publish({"text/html": grid.as_html(cards, line), "text/plain": grid.as_text(cards, line)}, about)


def _took(trials: Sequence[Trial], otherwise: float) -> float:
    """Seconds from the first to the last, as the calls have it: those of a replay are the recorded ones."""
    spans = [span for span in map(_span, trials) if span is not None]
    return max(end for _, end in spans) - min(begin for begin, _ in spans) if spans else otherwise


def _span(trial: Trial) -> tuple[float, float] | None:
    """When it began and ended, in epoch seconds; None where nobody knows."""
    reply = trial.reply
    if reply is not None and reply.latency_s is not None:
        return reply.call.started_at, reply.call.started_at + reply.latency_s
    if trial.attempts:
        return trial.attempts[0].started, trial.attempts[-1].started + trial.attempts[-1].latency_s
    return None


class LiveGrid(FinalGrid):
    """The grid in a frame while it grows; in the end the frame is empty, and the whole grid an output."""

    timings = True

    def __init__(self) -> None:
        self._frame = _GridFrame()

    def growing(self, trials: Sequence[Trial], status: Any) -> None:
        self._frame.draw(grid.growing(trials, status))

    def done(self, cards: Sequence[Card], line: Sequence[Part], about: dict[str, Any]) -> None:
        self._frame.begin()  # as for a single answer
        super().done(cards, line, about)
        self._frame.empty()


class _GridFrame(Frame):
    """The frame that a single answer grows in, with a grid in it."""

    def draw(self, cards: Sequence[Card]) -> None:
        shown = grid.as_html(cards, (), live=True)
        self.begin()
        if (shown, "") != self._shown:
            plain = "\n".join(f"{card.number + 1}. {card.title}: {card.status}" for card in cards)
            self._update({"text/html": shown + HANDING_OVER, "text/plain": plain})
            self._shown = (shown, "")


class TerminalGrid(QuietGrid):
    """How many are done, on one line; then the table and the texts."""

    def __init__(self) -> None:
        self._status = ""

    def growing(self, trials: Sequence[Trial], status: Any) -> None:  # noqa: ARG002 - one line says it all
        over = sum(trial.status not in {"waiting", "answering"} for trial in trials)
        said = f"{over} of {len(trials)} answers …"
        if said != self._status and sys.stdout.isatty():
            sys.stdout.write(f"\r\x1b[2K\x1b[2m{said}\x1b[0m")
            sys.stdout.flush()
            self._status = said

    def done(self, cards: Sequence[Card], line: Sequence[Part], about: dict[str, Any]) -> None:  # noqa: ARG002
        if self._status:
            sys.stdout.write("\r\x1b[2K")
        print(grid.as_text(cards, line), flush=True)
