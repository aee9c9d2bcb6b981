"""What one shell's magics share: the settings as they were read, and one client, made by the first cell."""

from __future__ import annotations

import atexit
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from llmkit import tape
from llmkit.config import Config, Default, NotebookSettings
from llmkit.errors import ConfigError

if TYPE_CHECKING:
    from llmkit.client import AsyncClient
    from llmkit.config import BudgetSettings
    from llmkit.layers.replay import Recordist, Replay
    from llmkit.notebook.chats import Place
    from llmkit.notebook.kept import History
    from llmkit.portal import Portal
    from llmkit.prompts import Prompts
    from llmkit.state.answers import Answers

__all__ = ["MODES", "Session", "display_mode"]

MODES = ("live", "final")
_NEWEST = 300  # calls, in which models are looked for


def display_mode(setting: str, otherwise: str | None = None) -> str:
    """``live`` or ``final``: ``setting`` (of ``%config``), else what ``LLMKIT_DISPLAY`` says, else ``otherwise``.

    Raises:
        ConfigError: the variable holds something else.
    """
    mode = setting or os.environ.get("LLMKIT_DISPLAY") or otherwise or MODES[0]
    if mode not in MODES:
        raise ConfigError(f"LLMKIT_DISPLAY is {' or '.join(MODES)}, not {mode!r:.40}")
    return mode


class Session:
    """Settings and client of one shell. ``started``: epoch seconds."""

    def __init__(self) -> None:
        self.started = time.time()
        tape.start_over()
        self.greeting = ""
        self.folder = Path.cwd()  # the notebook's; a later `%cd` is about the user's files, not about settings
        self._config: Config | None = None
        self._default: Default | None = None
        self._client: AsyncClient | None = None
        self._history: History | None = None

    @property
    def config(self) -> Config:
        """The settings; read when first asked for, and again as long as they are wrong.

        Raises:
            ConfigError: the first wrong one.
        """
        if self._config is None:
            self._config = Config.load(self.folder)
        return self._config

    @property
    def default(self) -> Default:
        """The model of a cell that names none, and why; what was said once stays true."""
        taping = self.taping
        if taping is not None and taping.replays:
            return Default(taping.default or "", f"as in {taping.path.name}")
        if self._default is None:
            self._default = self.config.default_model()
            if self._client is not None:
                self._client.default_is(self._default.model)
        return self._default

    @property
    def taping(self) -> Recordist | Replay | None:
        """What records or replays the calls of cells; None where they are only asked.

        Raises:
            ConfigError: the file that the environment names for it cannot be used.
        """
        if self._client is None and tape.told_by(self.config.environ) is None:
            return None
        return self.client.taping

    def within(self, place: Place) -> None:
        """The cell at ``place`` begins to ask."""
        taping = self._client.taping if self._client is not None else None
        if taping is not None and taping.replays is False:
            taping.recorder.within(place.cell, place.run)

    def tell_recording(self) -> None:
        """Let a recording know what was said when llmkit was loaded."""
        taping = self.taping
        if taping is not None and taping.replays is False:
            taping.recorder.tell(greeting=self.greeting)

    @property
    def client(self) -> AsyncClient:
        if self._client is None:
            from llmkit import portal  # noqa: F401  first, so that its own ending comes after this one
            from llmkit.client import AsyncClient

            self._client = AsyncClient(config=self.config)
            atexit.unregister(self.close)
            atexit.register(self.close)
            tape.lead(self._client)
            if self._default is not None:
                self._client.default_is(self._default.model)
        return self._client

    @property
    def is_untouched(self) -> bool:
        """Whether nothing has needed the client yet."""
        return self._client is None

    @property
    def prompts(self) -> Prompts:
        """The prompts that are kept in the notebook's project."""
        from llmkit.prompts import project_of

        return self.client.prompts.of(project_of(self.config, self.folder))

    @property
    def history(self) -> History:
        """What the cells asked and were answered."""
        if self._history is None:
            from llmkit.notebook.kept import History

            self._history = History(self._opened_answers)
        return self._history

    def models_asked(self) -> list[str]:
        """The models of the newest calls in the ledger, as they were asked for. Waits for files, on whatever thread.

        Raises:
            LLMKitError: it cannot be read.
        """
        from llmkit.ledger import Ledger
        from llmkit.state.store import is_redis, ledger_path

        client, url = self._client, self.config.state_url
        if client is not None:
            rows = client.ledger.calls(limit=_NEWEST)
        else:
            path = ledger_path(url)
            if path is None or not path.exists():
                return []
            ledger = Ledger.open("sqlite" if is_redis(url) else url)
            try:
                rows = ledger.calls(limit=_NEWEST)
            finally:
                ledger.close()
        return list(dict.fromkeys(name for row in reversed(rows) for name in row["model"].split(",")))

    def _opened_answers(self) -> Answers:
        from llmkit.state.answers import open_answers

        is_written = self.config.notebook.keep and self.config.cache.persist
        return open_answers(self.config.state_url if is_written else "memory")

    def forget_answers(self) -> int:
        """Remove what cells were answered, also what was written before a setting said not to; how many there were.

        Raises:
            LLMKitError: it cannot be removed.
        """
        from llmkit.state.answers import answers_path, open_answers

        removed, url = self.history.clear(), self.config.state_url
        path = answers_path(url)
        if path is not None and self.history.location != str(path) and path.exists():
            written = open_answers(url)
            try:
                removed += written.clear()
            finally:
                written.close()
        return removed

    @property
    def cells(self) -> NotebookSettings:
        """What ``[notebook]`` says of all cells; nothing, as long as the settings are wrong."""
        try:
            return self.config.notebook
        except ConfigError:
            return NotebookSettings()

    @property
    def budget(self) -> BudgetSettings:
        """The limits in force: those of the settings, or what has been set since."""
        return self.config.budget if self._client is None else self._client.config.budget

    @property
    def portal(self) -> Portal:
        """The loop that the client's calls run on."""
        from llmkit import portal

        return portal.shared(self)

    def close(self) -> None:
        """Close the client; what is still arriving is aborted and settled. The loop ends where nobody else uses it."""
        history, self._history = self._history, None
        if history is not None:
            history.close()
        client, self._client = self._client, None
        if client is None:
            return
        from llmkit import portal

        bridge = self.portal
        if not portal.others(self):
            bridge.settle()  # before the ledger is closed: a cell may run in another thread
        bridge.run(client.aclose())
        portal.leave(self)
