"""Where prompts are kept under their names: in a SQLite file beside the ledger's, or in memory.

A file of its own, for what people wrote themselves: nothing in it expires, is moved aside or makes room for anything, and
what has been kept is on the disk before the call that saved it goes on.
"""

from __future__ import annotations

import sqlite3
import threading
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from llmkit.errors import StoreError
from llmkit.state.database import Database
from llmkit.state.store import is_in_own_folder, path_beside

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

__all__ = ["APPLICATION_ID", "MIGRATIONS", "KeptPrompt", "PromptStore", "open_prompts", "prompts_path"]

T = TypeVar("T")

APPLICATION_ID = 0x6C6C6D70  # "llmp"

# Numbers are never used twice, so a version that was removed leaves its number behind.
_PROMPTS = (
    """
    CREATE TABLE prompts (
        project TEXT NOT NULL,
        name TEXT NOT NULL,
        version INTEGER NOT NULL,
        text TEXT,
        system TEXT,
        raw INTEGER NOT NULL DEFAULT 0,
        saved REAL NOT NULL,
        PRIMARY KEY (project, name, version)
    ) WITHOUT ROWID
    """,
)
MIGRATIONS: tuple[tuple[str, ...], ...] = (_PROMPTS,)

_SETTINGS = ("PRAGMA synchronous = FULL", "PRAGMA secure_delete = ON")  # a power cut takes nothing that was kept
_COLUMNS = "name, version, text, system, raw, saved"
_SAME = f"""
    SELECT {_COLUMNS} FROM prompts
    WHERE project = ? AND name = ? AND text = ? AND system IS ? AND raw = ? ORDER BY version DESC LIMIT 1
"""  # noqa: S608 - a constant
_NEXT = "SELECT coalesce(max(version), 0) + 1 FROM prompts WHERE project = ? AND name = ?"
_KEEP = "INSERT INTO prompts (project, name, version, text, system, raw, saved) VALUES (?, ?, ?, ?, ?, ?, ?)"
_ALL = f"SELECT {_COLUMNS} FROM prompts WHERE project = ? AND text IS NOT NULL ORDER BY name, version"  # noqa: S608
_OF_NAME = f"""
    SELECT {_COLUMNS} FROM prompts WHERE project = ? AND name = ? AND text IS NOT NULL ORDER BY version
"""  # noqa: S608 - a constant
_EMPTY = """
    UPDATE prompts SET text = NULL, system = NULL
    WHERE project = ? AND name = ? AND (? IS NULL OR version = ?) AND text IS NOT NULL
"""


class KeptPrompt(NamedTuple):
    """One version of a prompt.

    Attributes:
        name, version: what it is called; versions count from 1.
        text: the template, before it is filled in. system: the system prompt, where one was given.
        raw: it is no template: it is sent as it is.
        saved: epoch seconds.
    """

    name: str
    version: int
    text: str
    system: str | None
    raw: bool
    saved: float

    @property
    def reference(self) -> str:
        """``name@version``."""
        return f"{self.name}@{self.version}"


class PromptStore:
    """Prompts by project, name and version. Safe from any thread and for any number of processes. Waits for files.

    ``location``: the file, or ``memory``.
    """

    def __init__(self, database: Database | _Memory) -> None:
        self._database = database
        self.location = str(database.path) if isinstance(database, Database) else "memory"

    def save(self, project: str, name: str, text: str, *, system: str | None, raw: bool, now: float) -> KeptPrompt:
        """Keep it as the next version of ``name``; what is kept already stays the version that it is.

        Raises:
            StoreError: it cannot be kept.
        """

        def work(connection: sqlite3.Connection) -> KeptPrompt:
            same = connection.execute(_SAME, (project, name, text, system, raw)).fetchone()
            if same is not None:
                return _prompt(same)
            version = connection.execute(_NEXT, (project, name)).fetchone()[0]
            connection.execute(_KEEP, (project, name, version, text, system, raw, now))
            return KeptPrompt(name, version, text, system, raw, now)

        return self._database.run_patiently(work)

    def versions(self, project: str, name: str) -> list[KeptPrompt]:
        """All versions of ``name``, the oldest first. Raises `StoreError`: they cannot be read."""
        return [_prompt(row) for row in self._database.read(_OF_NAME, (project, name))]

    def all(self, project: str) -> list[KeptPrompt]:
        """All versions of all names, by name and version. Raises `StoreError`: they cannot be read."""
        return [_prompt(row) for row in self._database.read(_ALL, (project,))]

    def remove(self, project: str, name: str, version: int | None = None) -> int:
        """Forget the text of a version, or of all of them; how many those were. Raises `StoreError`: it cannot."""
        given = (project, name, version, version)
        return self._database.run_patiently(lambda connection: connection.execute(_EMPTY, given).rowcount)

    def close(self) -> None:
        """Let go of the file. A later use opens it again."""
        self._database.close()


class _Memory:
    """What `Database` does, for tables that end with the process."""

    def __init__(self) -> None:
        self._connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        self._lock = threading.Lock()
        for step in MIGRATIONS:
            for statement in step:
                self._connection.execute(statement)

    def run_patiently(self, work: Callable[[sqlite3.Connection], T]) -> T:
        with self._lock:
            try:
                return work(self._connection)
            except sqlite3.Error as error:
                raise StoreError(f"prompts cannot be kept in memory: {error}") from error

    def read(self, sql: str, given: Sequence[Any] = ()) -> list[Any]:
        return self.run_patiently(lambda connection: connection.execute(sql, given).fetchall())

    def close(self) -> None:
        """What is kept here lasts as long as its owner, closed or not."""

    def __del__(self) -> None:
        self._connection.close()


def prompts_path(url: str) -> Path | None:
    """The file of prompts that belongs to the ledger at ``url``; None where nothing is kept in files."""
    return path_beside(url, "prompts")


def open_prompts(url: str) -> PromptStore:
    """The prompts that belong to the ledger at ``url``; waits for files.

    Raises:
        ConfigError: there is no such store.
        StoreError: it cannot be opened.
    """
    path = prompts_path(url)
    if path is None:
        return PromptStore(_Memory())
    return PromptStore(
        Database(
            path,
            migrations=MIGRATIONS,
            application_id=APPLICATION_ID,
            what="store of prompts",
            private_folder=is_in_own_folder(url),
            settings=_SETTINGS,
        )
    )


def _prompt(row: Sequence[Any]) -> KeptPrompt:
    name, version, text, system, raw, saved = row
    return KeptPrompt(name, version, text, system, bool(raw), saved)
