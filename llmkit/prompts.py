"""Prompts that are kept under a name, version by version, for one project.

A project is a folder: the one that holds ``llmkit.toml`` (or the ``pyproject.toml`` with ``[tool.llmkit]``), else the one
that one works in.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import TYPE_CHECKING

from llmkit.errors import ConfigError
from llmkit.state.prompts import KeptPrompt, open_prompts

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    import pandas as pd

    from llmkit.clock import Clock
    from llmkit.config import Config
    from llmkit.state.prompts import PromptStore

__all__ = ["MAX_CHARACTERS", "TAG", "KeptPrompt", "Prompts", "check_name", "project_of"]

MAX_CHARACTERS = 4_000_000
"""Of one text; no model of today takes more."""
TAG = "prompt"
"""The tag under which the calls of a kept prompt are booked, as ``name@version``."""

_NAME = re.compile(r"[^\W_][\w.-]{0,79}")
_SHORTEST_KEY = 8


def project_of(config: Config, folder: str | os.PathLike[str] | None = None) -> Path:
    """The folder of the settings' file; where there is none, ``folder``, by default the current one."""
    if config.file is not None:
        return config.file.parent.resolve()
    return Path.cwd() if folder is None else Path(folder).resolve()


class Prompts:
    """The prompts of one project. All methods wait for a file, as a rule under a millisecond.

    Attributes:
        project: its folder.
    """

    def __init__(self, config: Config, clock: Clock, project: Path) -> None:
        self.project = project
        self._config = config
        self._clock = clock
        self._opened: list[PromptStore] = []

    def of(self, project: str | os.PathLike[str]) -> Prompts:
        """Those of another project: of this one's folder under its former name, for instance."""
        other = Prompts(self._config, self._clock, Path(project).expanduser().resolve())
        other._opened = self._opened  # one file, one connection
        return other

    @property
    def _store(self) -> PromptStore:
        if not self._opened:
            self._opened.append(open_prompts(self._config.state_url))
        return self._opened[0]

    @property
    def location(self) -> str:
        """The file, or ``memory``."""
        return self._store.location

    def save(self, name: str, text: str, system: str | None = None, *, raw: bool = False) -> KeptPrompt:
        """Keep ``text`` as the next version of ``name``; the same text again is the version that it was.

        Args:
            text: the template, before anything is filled in.
            system: the system prompt that belongs to it; also a template.
            raw: it is no template: ``{{`` is sent as it is.

        Raises:
            ConfigError: a name that cannot be one, no text, too long a text, or one with a provider's key in it.
            StoreError: it cannot be kept.
        """
        check_name(name)
        self._check(text, "the prompt")
        if not text.strip():
            raise ConfigError(f"there is no text to keep as {name}")
        if system is not None:
            self._check(system, "the system prompt")
        return self._store.save(str(self.project), name, text, system=system or None, raw=raw, now=self._clock.time())

    def get(self, reference: str) -> KeptPrompt:
        """``"name"`` is its newest version, ``"name@2"`` the second.

        Raises:
            ConfigError: there is none, naming the nearest.
            StoreError: it cannot be read.
        """
        name, version = _parts(reference)
        found = self.versions(name)
        if version is None:
            return found[-1]
        for prompt in found:
            if prompt.version == version:
                return prompt
        raise ConfigError(
            f"there is no version {version} of the prompt {name}: there {_listed([each.version for each in found])}",
            next_step=f"%llm prompts {name} shows them",
        )

    def versions(self, name: str) -> list[KeptPrompt]:
        """All versions of ``name``, the oldest first; at least one.

        Raises:
            ConfigError: there is none of that name, naming the nearest.
            StoreError: they cannot be read.
        """
        check_name(name)
        found = self._store.versions(str(self.project), name)
        if found:
            return found
        known = list(dict.fromkeys(prompt.name for prompt in self))
        near = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        step = "%llm prompts lists them" if known else f"%%llm --save {name} keeps one"
        raise ConfigError(f"no prompt is kept as {name}{hint}", next_step=step)

    def __iter__(self) -> Iterator[KeptPrompt]:
        """Every version of every name, by name and version."""
        return iter(self._store.all(str(self.project)))

    def list(self) -> pd.DataFrame:
        """Every version of every name: columns name, version, saved (UTC), text, system, raw."""
        import pandas as pd

        kept = list(self)
        return pd.DataFrame(
            {
                "name": pd.Series([prompt.name for prompt in kept], dtype="object"),
                "version": pd.Series([prompt.version for prompt in kept], dtype="int64"),
                "saved": pd.to_datetime(
                    pd.Series([prompt.saved for prompt in kept], dtype="float64"), unit="s", utc=True
                ),
                "text": pd.Series([prompt.text for prompt in kept], dtype="object"),
                "system": pd.Series([prompt.system for prompt in kept], dtype="object"),
                "raw": pd.Series([prompt.raw for prompt in kept], dtype="bool"),
            }
        )

    def remove(self, reference: str) -> int:
        """Forget ``"name@2"``, or all versions of ``"name"``; how many. Their numbers are not used again.

        Raises:
            ConfigError: there is none, naming the nearest.
            StoreError: it cannot be written.
        """
        name, version = _parts(reference)
        self.get(reference)
        return self._store.remove(str(self.project), name, version)

    def close(self) -> None:
        """Let go of the file."""
        for store in self._opened:
            store.close()

    def _check(self, text: str, what: str) -> None:
        if not isinstance(text, str):
            raise ConfigError(f"{what} is text, not a {type(text).__name__}")
        if len(text) > MAX_CHARACTERS:
            raise ConfigError(f"{what} is longer than {MAX_CHARACTERS:,} characters")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ConfigError(f"{what} is no valid text: it holds half of a character") from None
        named = [entry.api_key_env for entry in self._config.providers.values()]
        named += [link.endpoint.api_key_env for links in self._config.aliases().values() for link in links]
        for name in filter(None, named):
            key = self._config.environ.get(name, "").strip()
            if len(key) >= _SHORTEST_KEY and key in text:
                step = "take it out; keys belong into the environment"
                raise ConfigError(f"{what} holds the key in {name}, so it is not kept", next_step=step)

    def __repr__(self) -> str:
        return f"<Prompts of {self.project}>"


def check_name(name: str) -> None:
    """Raises `ConfigError` unless ``name`` can be the name of a prompt."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        rule = "letters, digits, '.', '_' and '-', at most 80, a letter or digit first"
        raise ConfigError(f"{name!r:.60} cannot be the name of a prompt", next_step=f"a name has {rule}")


def _parts(reference: str) -> tuple[str, int | None]:
    if not isinstance(reference, str):
        raise ConfigError(f"a prompt is named by text such as 'summary' or 'summary@2', not by {reference!r:.60}")
    name, at, version = reference.partition("@")
    if at and not (version.isascii() and version.isdigit() and 0 < len(version) < 10 and int(version)):
        raise ConfigError(f"{reference!r:.80} names no version", next_step="write NAME@2, or NAME for the newest")
    return name, int(version) if at else None


def _listed(versions: list[int]) -> str:
    shown = ", ".join(str(version) for version in versions[-20:])
    return f"{'is' if len(versions) == 1 else 'are'} {'… ' if len(versions) > 20 else ''}{shown}"
