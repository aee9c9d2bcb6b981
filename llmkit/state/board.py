"""Which requests have been sent, noted where a killed process leaves it behind.

The hold of a process that died is settled at its worst case if its request had gone out, and released if not. One more
transaction for each call would be too dear for that, so each process has a *board*: a small file, mapped into memory,
with one byte for each attempt in flight. Writing it is a store into memory, and the operating system keeps the page
when the process is killed.

When in doubt, a request counts as sent: no board, no slot, another boot, anything that does not look as it should. A
byte says that a request has *not* been sent only between `Board.take` and `Board.mark`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import mmap
import os
import stat
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from llmkit.state.owner import current_owner, is_gone

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = ["SHEETS", "SLOTS", "Board", "clear_boards", "was_sent"]

log = logging.getLogger("llmkit")

SLOTS = 8192
"""Attempts in flight at once that a board has a place for."""

SHEETS = 64
"""Boards that one process can have in one folder at a time; one more notes nothing."""

FREE, TAKEN, SENT = 0, 1, 2

_MAGIC = b"llmkit board 1\n"
_HEADER = 512
_SIZE = _HEADER + SLOTS
_ANY_AGE_S = 30 * 86_400.0  # a board whose owner cannot be asked after is of no use any more
_STEP_S = 2.0  # by how much the moment of the boot may seem to have moved


class _Sheet(NamedTuple):
    """The file of one board."""

    path: Path
    number: int
    process: int
    bytes: mmap.mmap
    free: list[int]


class Board:
    """The slots of one ledger in this process. Safe from any thread; a forked child begins an empty one of its own.

    The file is made when the first slot is taken (folder 0700, file 0600, 8.5 KiB), and removed when the process ends
    with no slot taken. What is left of killed processes is removed by `clear_boards`.

    Args:
        folder: where the files of all processes are; None: nothing is noted, and every request counts as sent.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._start_afresh()
        _BOARDS.add(self)

    def _start_afresh(self) -> None:
        self._making = threading.Lock()
        self._sheet: _Sheet | None = None
        self._broken = self.folder is None

    def take(self) -> int | None:
        """A slot for a request that has not been sent yet; None where there is none, so the request counts as sent."""
        sheet = self._sheet or self._made()
        if sheet is None:
            return None
        try:
            place = sheet.free.pop()
        except IndexError:
            return None
        try:
            sheet.bytes[_HEADER + place] = TAKEN
        except ValueError:  # closed meanwhile
            return None
        return sheet.number * SLOTS + place

    def mark(self, slot: int | None) -> None:
        """The request is about to be sent. Costs a store into memory; never fails."""
        sheet = self._sheet
        if sheet is None or slot is None or slot // SLOTS != sheet.number:
            return
        try:
            sheet.bytes[_HEADER + slot % SLOTS] = SENT
        except ValueError:  # closed meanwhile
            return

    def free(self, slot: int | None) -> None:
        """The hold has ended *in the store*, and the slot may be another's. Freed before, a kill would count as sent."""
        sheet = self._sheet
        if sheet is None or slot is None or slot // SLOTS != sheet.number:
            return
        place = slot % SLOTS
        try:
            if sheet.bytes[_HEADER + place] == FREE:
                return
            sheet.bytes[_HEADER + place] = FREE
        except ValueError:
            return
        sheet.free.append(place)

    def close(self) -> None:
        """Remove the file, unless a slot of it is taken. Using the board again makes another one."""
        with self._making:
            sheet = self._sheet
            if sheet is not None and len(sheet.free) == SLOTS:
                self._sheet = None
                _put_away(sheet)

    def _made(self) -> _Sheet | None:
        """The sheet, made if there is none yet; None where it cannot be made."""
        with self._making:
            if self._sheet is None and not self._broken and self.folder is not None:
                try:
                    self._sheet = _new_sheet(self.folder)
                except (OSError, ValueError) as error:
                    self._broken = True
                    log.warning(
                        "what has been sent cannot be noted in %s (%s): after a kill, requests count as sent",
                        self.folder,
                        getattr(error, "strerror", None) or error,
                    )
                else:
                    weakref.finalize(self, _put_away, self._sheet)
            return self._sheet


def was_sent(folder: Path | None, owner: str, slot: int | None) -> bool:
    """Whether the request of ``slot`` of ``owner``, a process of this machine that has died, had been sent.

    True when in doubt; never fails.
    """
    if folder is None or type(slot) is not int or not 0 <= slot < SLOTS * SHEETS:
        return True
    number, place = divmod(slot, SLOTS)
    content = _content(_path(folder, owner, number))
    if content is None or _owner_in(content) != owner or not _is_of_this_boot(content):
        return True
    return content[_HEADER + place] != TAKEN


def clear_boards(folder: Path, holding: Collection[str]) -> int:
    """Remove the boards of processes that have died. Returns how many were removed; never fails.

    Args:
        holding: owners that still have holds in the store: their boards are kept.
    """
    removed = 0
    with contextlib.suppress(OSError), os.scandir(folder) as found:
        for each in found:
            if _is_done_with(Path(each.path), holding):
                with contextlib.suppress(OSError):
                    Path(each.path).unlink()
                    removed += 1
    return removed


def _is_done_with(path: Path, holding: Collection[str]) -> bool:
    if path.suffix != ".board":
        return False
    content = _content(path)
    owner = None if content is None else _owner_in(content)
    if owner in holding:
        return False
    gone = None if owner is None else is_gone(owner)
    if gone is not None:
        return gone
    try:
        return time.time() - path.lstat().st_mtime > _ANY_AGE_S
    except OSError:
        return False


# -- the file --------------------------------------------------------------------------------------------------------


def _path(folder: Path, owner: str, number: int) -> Path:
    name = hashlib.sha256(owner.encode("utf-8", "replace")).hexdigest()[:32]
    return folder / f"{name}.{number}.board"


def _new_sheet(folder: Path) -> _Sheet:
    owner = current_owner()
    header = _MAGIC + f"{_boot()}\n{owner}\n".encode()
    if len(header) > _HEADER:
        raise ValueError("the name of this host is too long")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_mode & 0o077:
        folder.chmod(0o700)
    for number in range(SHEETS):
        path = _path(folder, owner, number)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
        except FileExistsError:  # another ledger of this process has it
            continue
        try:
            # Written, not only made long: a page that the disk has no room for would kill the process when it is stored to.
            os.write(descriptor, header.ljust(_SIZE, b"\0"))
            mapped = mmap.mmap(descriptor, _SIZE)  # fails where not all could be written
        except BaseException:
            with contextlib.suppress(OSError):
                path.unlink()
            raise
        finally:
            os.close(descriptor)
        return _Sheet(path, number, os.getpid(), mapped, list(range(SLOTS - 1, -1, -1)))
    raise ValueError(f"this process has {SHEETS} of them already")


def _put_away(sheet: _Sheet) -> None:
    """Remove the file if nothing is noted in it; in a forked child it is the parent's."""
    if sheet.process == os.getpid() and len(sheet.free) == SLOTS:
        sheet.bytes.close()
        with contextlib.suppress(OSError):
            sheet.path.unlink()


def _content(path: Path) -> bytes | None:
    """The whole file; None where it is missing, another user's, or not a board."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError):
        return None
    try:
        found = os.fstat(descriptor)
        ours = not hasattr(os, "geteuid") or found.st_uid == os.geteuid()
        if not stat.S_ISREG(found.st_mode) or found.st_size != _SIZE or not ours:
            return None
        content = os.read(descriptor, _SIZE)
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return content if len(content) == _SIZE and content.startswith(_MAGIC) else None


def _owner_in(content: bytes) -> str | None:
    lines = content[len(_MAGIC) : _HEADER].split(b"\n")
    return lines[1].decode("utf-8", "replace") if len(lines) > 1 else None


def _is_of_this_boot(content: bytes) -> bool:
    """A power cut, unlike a kill, loses what was noted last: a board of an earlier boot proves nothing."""
    noted = content[len(_MAGIC) : _HEADER].split(b"\n")[0].decode("ascii", "replace")
    if sys.platform == "linux":
        return noted == _boot()
    try:
        return abs(float(noted) - float(_boot())) < _STEP_S
    except ValueError:
        return False


if sys.platform == "linux":

    @functools.cache
    def _boot() -> str:
        """Which boot this is."""
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()

else:

    def _boot() -> str:
        """When the machine was booted, in epoch seconds; roughly, since either clock may be off."""
        return f"{time.time() - time.monotonic():.3f}"


_BOARDS: weakref.WeakSet[Board] = weakref.WeakSet()


def _in_child() -> None:
    for board in list(_BOARDS):
        board._start_afresh()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
