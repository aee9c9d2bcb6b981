"""What one shell's magics share: the settings as they were read, and one client, made by the first cell."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from llmkit.config import Config
from llmkit.errors import ConfigError

if TYPE_CHECKING:
    from llmkit.client import AsyncClient
    from llmkit.config import BudgetSettings, Default
    from llmkit.portal import Portal
    from llmkit.prompts import Prompts

__all__ = ["MODES", "Session", "display_mode"]

MODES = ("live", "final")


def display_mode(setting: str) -> str:
    """``live`` or ``final``: from ``%config LLMMagics.display``, else from ``LLMKIT_DISPLAY``.

    Raises:
        ConfigError: the variable holds something else.
    """
    mode = setting or os.environ.get("LLMKIT_DISPLAY") or MODES[0]
    if mode not in MODES:
        raise ConfigError(f"LLMKIT_DISPLAY is {' or '.join(MODES)}, not {mode!r:.40}")
    return mode


class Session:
    """Settings and client of one shell. ``started``: epoch seconds."""

    def __init__(self) -> None:
        self.started = time.time()
        self._folder = Path.cwd()  # the notebook's; a later `%cd` is about the user's files, not about settings
        self._config: Config | None = None
        self._default: Default | None = None
        self._client: AsyncClient | None = None

    @property
    def config(self) -> Config:
        """The settings; read when first asked for, and again as long as they are wrong.

        Raises:
            ConfigError: the first wrong one.
        """
        if self._config is None:
            self._config = Config.load(self._folder)
        return self._config

    @property
    def default(self) -> Default:
        """The model of a cell that names none, and why; what was said once stays true."""
        if self._default is None:
            self._default = self.config.default_model()
        return self._default

    @property
    def client(self) -> AsyncClient:
        if self._client is None:
            from llmkit.client import AsyncClient

            self._client = AsyncClient(config=self.config)
        return self._client

    @property
    def prompts(self) -> Prompts:
        """The prompts that are kept in the notebook's project."""
        from llmkit.prompts import project_of

        return self.client.prompts.of(project_of(self.config, self._folder))

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
        client, self._client = self._client, None
        if client is None:
            return
        from llmkit import portal

        bridge = self.portal
        if not portal.others(self):
            bridge.settle()  # before the ledger is closed: a cell may run in another thread
        bridge.run(client.aclose())
        portal.leave(self)
