"""What becomes of a SQLite file that is damaged and can be done without: it is moved aside, and a new one is begun."""

from __future__ import annotations

import logging
import sqlite3
from typing import TYPE_CHECKING

from llmkit.errors import StoreError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["aside", "files", "is_damage", "move_aside"]

log = logging.getLogger("llmkit")

_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR}  # the last: a table is not there


def is_damage(error: StoreError) -> bool:
    """Whether the file itself is what is wrong, and not that it is locked, or that the disk is full."""
    cause = error.__cause__
    return isinstance(cause, sqlite3.Error) and getattr(cause, "sqlite_errorcode", 0) & 0xFF in _DAMAGED


def aside(path: Path) -> Path:
    """Where a damaged file goes."""
    return path.with_name(f"{path.name}.damaged")


def files(path: Path) -> list[Path]:
    """A database and what SQLite keeps beside it."""
    return [path, path.with_name(f"{path.name}-wal"), path.with_name(f"{path.name}-shm")]


def move_aside(path: Path, error: StoreError, what: str) -> None:
    """Make room for a new file, and say so; ``what`` is the file's name for people.

    Raises:
        StoreError: it cannot be moved.
    """
    log.warning("%s; it is moved to %s, and a new one is begun", error.message, aside(path).name)
    try:
        for old, new in zip(files(path), files(aside(path)), strict=True):
            if old.exists():
                old.replace(new)
    except OSError as failure:
        raise StoreError(f"the damaged {what} {path} cannot be moved: {failure.strerror}") from failure
