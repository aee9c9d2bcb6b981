"""Locks across a fork: a child finds them free, since the thread that held one is not there to release it.

Python's own locks of modules that are being imported are no exception, and llmkit imports late, on its threads. So a
fork waits a moment until nobody else imports: a child that needed such a module would wait for ever.
"""

from __future__ import annotations

import _imp
import importlib
import os
import threading
import time
from contextlib import suppress
from typing import Any
from weakref import WeakSet

__all__ = ["new_lock"]

IMPORTING_S = 1.0  # how long a fork waits for imports of other threads

_LOCKS: WeakSet[threading.Lock] = WeakSet()


def new_lock() -> threading.Lock:
    """A lock for a few lines at a time, held while nothing is waited for that a fork could cut in half."""
    lock = threading.Lock()
    _LOCKS.add(lock)
    return lock


def _import_elsewhere() -> bool:
    """Whether another thread is importing something just now."""
    known: dict[str, Any] = getattr(importlib._bootstrap, "_module_locks", {})
    locks = [lock() for lock in list(known.values())]
    return any(getattr(lock, "owner", None) not in {None, threading.get_ident()} for lock in locks)


def _before_fork() -> None:
    deadline = time.monotonic() + IMPORTING_S
    while True:
        _imp.acquire_lock()  # nobody begins to import while it is held
        if not _import_elsewhere() or time.monotonic() > deadline:
            return
        _imp.release_lock()
        time.sleep(0.001)


def _after_fork() -> None:
    with suppress(RuntimeError):  # a child may have lost it
        _imp.release_lock()


def _in_child() -> None:
    _after_fork()
    for lock in list(_LOCKS):
        if lock.locked():
            lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_in_child)
