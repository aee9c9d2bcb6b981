"""The magics: a cell line is parsed, its prompt rendered, the call made and shown, the reply bound."""

from __future__ import annotations

import atexit
import logging
import sys
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from IPython.core.magic import Magics, cell_magic, line_magic, magics_class, needs_local_scope, no_var_expand
from traitlets import Bool, Enum, Float, Int, TraitError, Unicode, Union, observe, validate

from llmkit.call import CACHE_MODES, TIERS
from llmkit.errors import ConfigError, LLMKitError
from llmkit.notebook.arguments import FORMATS, parse
from llmkit.notebook.bodies import allow_empty
from llmkit.notebook.budgets import in_words
from llmkit.notebook.chats import Chats, here, with_next_step
from llmkit.notebook.manual import documented
from llmkit.notebook.registration import Kept, changed_settings, complete, handle_errors, register, take_back
from llmkit.notebook.session import MODES, Session, display_mode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from types import TracebackType

    from llmkit.notebook.arguments import CellLine
    from llmkit.notebook.chats import Place
    from llmkit.notebook.question import Question

__all__ = ["LLMMagics"]

log = logging.getLogger("llmkit")


class WrongSetting(ConfigError, TraitError):
    """A value that is refused by ``%config``. Traitlets goes back to the value before only for errors of its own."""


@magics_class
class LLMMagics(Magics):
    """``%%llm`` and ``%llm``. Settings by ``%config LLMMagics.NAME = …``; what a cell says wins over them."""

    shell: Any  # IPython's types differ from version to version, and most are missing

    model = Unicode("", help="Model of cells that name none; empty: as llmkit.toml or the environment say.").tag(
        config=True
    )
    tier = Enum(
        ("", *TIERS), "", help="'simple', 'medium' or 'hard': the model of cells by [tiers], instead of `model`."
    ).tag(config=True)
    system = Unicode("", help="System prompt of cells that have none.").tag(config=True)
    temperature = Float(None, allow_none=True, help="0 to 2; None: the provider's own default.").tag(config=True)
    max_tokens = Int(None, allow_none=True, help="Most output tokens of a cell.").tag(config=True)
    max_cost = Union(
        [Float(), Unicode()],
        default_value=None,
        allow_none=True,
        help="USD that a cell may cost, all attempts together.",
    ).tag(config=True)
    timeout = Union(
        [Float(), Unicode()],
        default_value=None,
        allow_none=True,
        help="Seconds for a whole call, or 'chat', or 'code'.",
    ).tag(config=True)
    user = Unicode("", help="Whom the cost of cells is booked for.").tag(config=True)
    cache = Enum(
        ("", *CACHE_MODES), "", help="'use', 'refresh', 'off' or 'only', for cells that do not say; empty: 'use'."
    ).tag(config=True)
    format = Enum(("", *FORMATS), "", help="How answers are shown; empty: as [notebook] says, else 'markdown'.").tag(
        config=True
    )
    display = Enum(
        ("", *MODES), "", help="'final' shows an answer once, at its end; empty: as LLMKIT_DISPLAY says, else live."
    ).tag(config=True)
    traceback = Bool(
        None, allow_none=True, help="Show the whole traceback of llmkit's errors; None: as [notebook] says, else not."
    ).tag(config=True)

    _AS_OPTIONS = ("model", "tier", "system", "temperature", "max_tokens", "max_cost", "timeout", "user", "cache")

    @classmethod
    def of(cls, shell: Any) -> LLMMagics | None:
        """The magics that are loaded in ``shell``."""
        return next((each for each in shell.configurables if isinstance(each, cls)), None)

    # -- loading and unloading ---------------------------------------------------------------------------------------

    def begin(self, kept: Kept | None = None) -> None:
        """Register all, and say in one line what will be used. ``kept``: from before a reload.

        Wrong settings are said, too; then the first cell fails with them.
        """
        self.session = Session()
        self.chats = Chats()
        self.undo: list[Callable[[], object]] = [self.session.close]
        """What unloading does, the last first. Whatever registers something with the shell adds here how to take it back."""
        self.carried: dict[str, Any] = {} if kept is None else kept.carried
        """What outlives ``%reload_ext``; each concept has a key of its own."""
        self.undo.append(register(self.shell, self))
        self._handler, give_back = handle_errors(self.shell, LLMKitError, self._show_error)
        self.undo.append(give_back)
        atexit.register(self.session.close)
        self.undo.append(partial(atexit.unregister, self.session.close))
        self.undo.append(allow_empty(self.shell))
        self.undo.append(complete(self))
        self.set_again({} if kept is None else kept.settings)
        try:
            self._greet()
        except ConfigError as error:
            print(f"llmkit is loaded, but cannot be used yet:\n{error.block()}", file=sys.stderr)

    def set_again(self, settings: Mapping[str, Any]) -> None:
        """Set what was set before; what does not fit any more is said, and left out."""
        for name, value in settings.items():
            try:
                setattr(self, name, value)
            except (TraitError, LLMKitError) as error:
                print(f"llmkit: LLMMagics.{name} is not set, since its value is wrong: {error}", file=sys.stderr)

    def end(self, edition: object = None) -> Kept:
        """Leave the shell as it was. Returns what a reload goes on with."""
        kept = Kept(edition, changed_settings(self), self.carried)
        take_back(self.undo)
        return kept

    def _greet(self) -> None:
        _ = self.display_mode
        default = f"{self.model} (as %config says)" if self.model else self.of_tier or str(self.session.default)
        caps = in_words(self.session.budget, self.max_cost)
        said = f"llmkit: {'' if default.startswith('the ') else 'model '}{default} · {caps}"
        taping = self.session.taping
        if taping is not None:
            from llmkit.notebook.recording import greeting

            said = greeting(taping, said)
        self.session.greeting = said
        self.session.tell_recording()
        print(said)
        for notice in self.session.config.notices:
            print(f"llmkit: {notice}")

    @property
    def of_tier(self) -> str:
        """The model of the tier that is set for cells, in words; empty where none is."""
        return f"{self.session.config.tier(self.tier)} (tier {self.tier})" if self.tier else ""

    @validate(*_AS_OPTIONS)
    def _checked(self, proposal: Mapping[str, Any]) -> Any:
        from llmkit.options import Options

        value = proposal["value"]
        if value not in {None, ""}:
            try:
                Options.of({proposal["trait"].name: value})
                if proposal["trait"].name == "tier" and hasattr(self, "session"):
                    self.session.config.tier(value)
            except ConfigError as error:
                raise WrongSetting(error.message, next_step=error.next_step) from None
        return value

    @observe("model", "tier")
    def _chosen(self, change: Mapping[str, Any]) -> None:
        """A model and a tier exclude each other: the one that was set last holds."""
        if change["new"]:
            setattr(self, {"model": "tier", "tier": "model"}[change["name"]], "")

    # -- the magics --------------------------------------------------------------------------------------------------

    @no_var_expand
    @needs_local_scope
    @cell_magic("llm")  # type: ignore[arg-type]
    @documented
    def ask(self, line: str, cell: str, local_ns: Mapping[str, Any] | None = None) -> None:
        with self._unfolding():
            self.session.within(here(self.shell))
            self._ask(line, cell, local_ns or {})

    @no_var_expand
    @needs_local_scope
    @cell_magic("llm_compare")  # type: ignore[arg-type]
    @documented
    def compare(self, line: str, cell: str, local_ns: Mapping[str, Any] | None = None) -> None:
        from llmkit.notebook.comparing import compare

        with self._unfolding():
            self.session.within(here(self.shell))
            compare(self, line, cell, local_ns or {})

    @no_var_expand
    @cell_magic("llm_map")  # type: ignore[arg-type]
    def map(self, line: str, cell: str) -> None:  # noqa: ARG002 - what every cell magic takes
        """A prompt for each row of a DataFrame; not in this version yet."""
        step = "today: [client.complete(…) for row in frame.itertuples()], with client = llmkit.Client()"
        raise ConfigError("%%llm_map is not in this version yet; nothing was sent", next_step=step)

    @no_var_expand
    @cell_magic("llm_eval")  # type: ignore[arg-type]
    def eval(self, line: str, cell: str) -> None:  # noqa: ARG002 - what every cell magic takes
        """Cases, judged; not in this version yet."""
        step = "today: %%llm_compare -m a,b, and judge its DataFrame yourself"
        raise ConfigError("%%llm_eval is not in this version yet; nothing was sent", next_step=step)

    @no_var_expand
    @line_magic("llm")  # type: ignore[arg-type]
    def command(self, line: str) -> Any:
        """Everything beside asking: %llm help lists it, and %llm help TOPIC says more, with examples."""
        from llmkit.notebook.commands import run

        with self._unfolding():
            return run(self, line)

    @contextmanager
    def _unfolding(self) -> Iterator[None]:
        """Errors of llmkit's own show their whole traceback, where that is wanted."""
        try:
            yield
        except LLMKitError as error:
            if self.shows_traceback:
                _unfold(error)
            raise

    def _ask(self, line: str, cell: str, local_ns: Mapping[str, Any]) -> None:
        from llmkit.notebook.prompts import keep

        said = parse(line)
        if said.help:
            print(self.ask.__doc__)
            return
        question = self.question(said, cell, local_ns)
        if said.plan:
            from llmkit.notebook.planning import plan_of

            plan_of(self, said, question)
            return
        if said.save:
            keep(self.session.prompts, said, question)
        if said.repeat:
            from llmkit.notebook.comparing import samples

            samples(self, said, question)
            return
        self._ask_once(said, question)

    def question(
        self,
        said: CellLine,
        cell: str,
        local_ns: Mapping[str, Any],
        *,
        settings: Mapping[str, Any] | None = None,
        place: Place | None = None,
    ) -> Question:
        """What a cell with this line and text asks.

        Args:
            settings: in the place of what ``%config`` says. place: of the cell; by default the one that runs.

        Raises:
            ConfigError, TemplateError: it cannot be asked.
        """
        from llmkit.notebook.question import Question

        kept = self.session.prompts.get(said.saved) if said.saved else None
        names = (self.shell.user_ns, local_ns)
        settings = self._settings() if settings is None else settings
        cell = cell.replace("\r\n", "\n")  # of a file made elsewhere: the question is the same one
        question = Question.of(said, cell, settings=settings, names=names, kept=kept)
        if "tier" not in question.options:
            question.options.setdefault("model", self.session.default.model)
        return question.within(said.chat, self.chats, place or here(self.shell), said) if said.chat else question

    def _ask_once(self, said: CellLine, question: Question) -> None:
        from llmkit.notebook.asking import Interrupted, ask
        from llmkit.notebook.display import view_for
        from llmkit.notebook.life import Life

        session, life, form = self.session, Life(), self.format_of(said)
        view = view_for(self.shell, self.display_mode, form, quiet=said.quiet)
        prompt, options = question.prompt, question.options
        keep = partial(session.history.keep, prompt, life, form=form, timings=view.timings, model=question.model)
        place = here(self.shell)
        notes = self.chats.notes(said.chat, place)
        portal, client = session.portal, session.client
        try:
            reply = ask(portal, client, prompt, options, view, stream=said.stream, life=life, notes=notes)
        except (LLMKitError, Interrupted) as error:
            with_next_step(error, said.chat)
            keep(error.reply, error)
            if error.reply is not None and error.reply.text:
                self.bind(error.reply, said.names)
            raise
        if said.chat:
            self.chats.add(said.chat, prompt, reply, place, options.get("system"))
        keep(reply)
        self.bind(reply, said.names)

    def format_of(self, said: CellLine) -> str:
        """How the answer of a cell is shown; what has a schema is JSON, unless the cell says otherwise."""
        return said.format or ("json" if said.schema else self.format or self.session.cells.format)

    @property
    def display_mode(self) -> str:
        """``live`` or ``final``. Raises `ConfigError` where ``LLMKIT_DISPLAY`` is neither."""
        return display_mode(self.display, self.session.cells.display)

    @property
    def shows_traceback(self) -> bool:
        """Whether an error of llmkit's own is shown with its whole traceback."""
        return self.session.cells.traceback if self.traceback is None else self.traceback

    def _settings(self) -> dict[str, Any]:
        """What ``%config``, and below it ``[notebook]``, says for cells that say nothing else."""
        settings = {name: getattr(self, name) for name in self._AS_OPTIONS}
        here = {name: value for name, value in settings.items() if value not in {None, ""}}
        return self.session.config.notebook.options() | here

    def bind(self, value: Any, names: Sequence[str]) -> None:
        """Put ``value``, a reply or what several come to, into the variables ``names``, and into ``_`` and ``Out``."""
        self.shell.push(dict.fromkeys(names, value))
        # As for any other cell; returned as the cell's value, it would be shown a second time.
        self.shell.displayhook.update_user_ns(value)

    # -- errors ------------------------------------------------------------------------------------------------------

    def _show_error(
        self,
        shell: Any,
        kind: type[BaseException],
        error: BaseException,
        traceback: TracebackType | None,
        tb_offset: int | None = None,
    ) -> None:
        """Show one block also for `AllModelsFailed`: IPython prints groups its own way, past ``_render_traceback_``."""
        if not isinstance(error, LLMKitError):
            self._handler(kind, error, traceback, tb_offset)
            return
        sys.last_type, sys.last_value, sys.last_traceback = kind, error, traceback  # what %tb and %debug read
        try:
            lines = error._render_traceback_()
            lines = lines if self.shows_traceback else _wrapped(lines)
        except Exception:  # IPython would give up this handler for good
            from llmkit.redaction import redact, tidy

            log.debug("the block of an error could not be made", exc_info=True)
            lines = [f"{kind.__name__}: {tidy(redact(str(error)))}"]
        shell._showtraceback(kind, error, lines)
        if shell.call_pdb:
            shell.debugger(force=True)


def _wrapped(lines: Sequence[str]) -> list[str]:
    """Broken between words: left to itself, JupyterLab breaks a traceback's lines within them."""
    from textwrap import wrap

    pieces = (
        wrap(line, 100, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False, drop_whitespace=True)
        for line in lines
    )
    return [piece for broken in pieces for piece in broken or [""]]


def _unfold(error: LLMKitError) -> None:
    """Let ``error`` show its whole traceback, its block last."""
    import traceback

    from llmkit.redaction import redact

    def render() -> list[str]:
        frames = "".join(traceback.format_exception(error))
        return [*redact(frames).rstrip().split("\n"), "", *error.block().split("\n")]

    error._render_traceback_ = render  # type: ignore[method-assign]
