"""The calls in flight of all processes on one machine, by files beside the answers.

A claim is a lock on one byte of a lock file, at an offset that the key decides. The operating system frees it when the
process dies, however it dies. Such locks belong to a process, not to a thread, and all of them are lost when any
descriptor of the file is closed: so a process has one descriptor for all who share the file, and notes beside it what
it holds.

Who follows makes a *spool*, a file of its own in a folder beside the lock file, named for the key. Who has the claim
sees it there, writes to it what has arrived and what arrives, as lines of JSON, and the follower reads it as it grows.
So nothing is written while nobody follows. A spool is for one follower, is as private as the answers, and goes with it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import stat
import sys
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any

from llmkit.flight import FlightFailed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from llmkit.clock import Clock

__all__ = ["FileFlights"]

log = logging.getLogger("llmkit")

POLL_S = 0.03  # how often a follower looks for more
BEAT_S = 1.0  # how often it says that it is still there
DEAD_S = 5.0  # a spool without a sign of life for so long has lost its follower
LOOK_AGAIN_S = 1.0  # how often a claim checks that the lock file is still the one at its path
MOST_SPOOLS = 64  # followers in other processes that are written to, of one call
MOST_NAMES = 10_000  # names in the folder that are looked at
SPOOL_BYTES = 64 * 1024 * 1024  # of one spool; what is beyond is read from the answers
READ_BYTES = 1024 * 1024  # at once
TICK_S = 0.1  # what a folder's time may lag behind

if sys.platform == "win32":
    import msvcrt

    PLACES = 2**31 - 1

    def _lock(file: int, place: int) -> None:
        os.lseek(file, place, os.SEEK_SET)
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)

    def _unlock(file: int, place: int) -> None:
        os.lseek(file, place, os.SEEK_SET)
        msvcrt.locking(file, msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    PLACES = 2**62

    def _lock(file: int, place: int) -> None:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)

    def _unlock(file: int, place: int) -> None:
        fcntl.lockf(file, fcntl.LOCK_UN, 1, place)


_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
_CLOEXEC = getattr(os, "O_CLOEXEC", 0)
_NONBLOCK = getattr(os, "O_NONBLOCK", 0)  # a pipe in the place of a file must not be waited for


class FileFlights:
    """`llmkit.state.shared.Flights` beside the file ``path``: ``path.locks``, and the folder ``path.spool``.

    Where the lock file cannot be made, or the drive keeps no locks, everybody gets a claim, and a warning says so once.
    """

    def __init__(self, path: Path, clock: Clock) -> None:
        self._clock = clock
        self._path = os.path.realpath(path.parent) + os.sep + path.name
        self._files: _Files | None = None

    async def claim(self, key: str) -> FileClaim | None:
        return self._opened().claim(key)

    async def follow(self, key: str) -> AsyncIterator[list[tuple[str, str]]]:
        files = self._opened()
        spool = _Spool.made(files.folder, key)
        try:
            while True:
                busy = files.is_claimed(key)  # first: what was written before it was released is read all the same
                if spool is not None:
                    while pieces := spool.read(self._clock.now()):
                        yield pieces
                    if spool.failure is not None:
                        raise FlightFailed(spool.failure)
                if not busy or (spool is not None and spool.ended):
                    return
                await self._clock.sleep(POLL_S)
        finally:
            if spool is not None:
                spool.remove()

    async def aclose(self) -> None:
        files, self._files = self._files, None
        if files is not None:
            files.leave(self)

    def _opened(self) -> _Files:
        files = self._files
        if files is None or files.process != os.getpid():
            self._files = files = _Files.at(self._path, self)
        return files


class _Files:
    """The lock file and the folder of spools at one path: one object for all of a process.

    Attributes:
        process: whose object it is; a forked child makes its own, since locks do not come along.
    """

    def __init__(self, path: str) -> None:
        self.folder = path + ".spool"
        self.process = os.getpid()
        self._name = path
        self._path = path + ".locks"
        self._lock = _OPEN.lock
        self._file: int | None = None
        self._identity = (0, 0)
        self._looked = float("-inf")
        self._held: dict[str, object] = {}  # by the key, a token of the claim, which may be dropped
        self._users: weakref.WeakSet[FileFlights] = weakref.WeakSet()
        self._listed: tuple[int, float] = (-1, 0.0)
        self._spools: dict[str, list[str]] = {}
        self._broken = False

    @classmethod
    def at(cls, path: str, user: FileFlights) -> _Files:
        with _OPEN.lock:
            files = _OPEN.files.get(path)
            if files is None:
                files = _OPEN.files[path] = cls(path)
                with contextlib.suppress(OSError):
                    _clean(files.folder)
            files._users.add(user)
            return files

    def leave(self, user: FileFlights) -> None:
        self._users.discard(user)
        self._close_if_idle()

    def _close_if_idle(self) -> None:
        """Let go of the lock file when the last user has left and nothing is held."""
        with self._lock:
            if not self._users and not self._held:
                self._close()
                if _OPEN.files.get(self._name) is self:
                    del _OPEN.files[self._name]

    def _close(self) -> None:
        if self._file is not None and self.process == os.getpid():
            os.close(self._file)
        self._file = None

    # -- claims ------------------------------------------------------------------------------------------------------

    def claim(self, key: str) -> FileClaim | None:
        with self._lock:
            if key in self._held:
                return None
            place = _place(key)
            if not self._locked(place):
                return None
            claim = FileClaim(self, key, place)
            self._held[key] = claim.token
            return claim

    def is_claimed(self, key: str) -> bool:
        """Whether somebody has the claim, here or in another process."""
        with self._lock:
            if key in self._held:
                return True
            place = _place(key)
            if self._broken or not self._locked(place):
                return not self._broken
            self._unlocked(place)
            return False

    def release(self, claim: FileClaim) -> None:
        if self.process != os.getpid():
            return
        with self._lock:
            if self._held.get(claim.key) is claim.token:
                del self._held[claim.key]
                self._unlocked(claim.place)
        if not self._users:
            self._close_if_idle()

    def _locked(self, place: int) -> bool:
        """Take the lock, or see that another process has it. Where there are no locks, everybody takes it."""
        if self._broken:
            return True
        try:
            _lock(self._ready(), place)
        except OSError as error:
            if error.errno in {errno.EACCES, errno.EAGAIN, errno.EDEADLK} and self._file is not None:
                return False
            self._broken = True
            log.warning(
                "%s cannot be locked (%s): identical calls in several processes at once are each asked by themselves",
                self._path,
                error.strerror or error,
            )
        return True

    def _unlocked(self, place: int) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                _unlock(self._file, place)

    def _ready(self) -> int:
        """The lock file. It is opened anew where somebody has removed it, unless a lock on it is still held."""
        file, now = self._file, time.monotonic()
        if file is not None and (self._held or now - self._looked < LOOK_AGAIN_S):
            return file
        if file is not None:
            with contextlib.suppress(OSError):
                found = os.stat(self._path, follow_symlinks=False)
                if (found.st_dev, found.st_ino) == self._identity:
                    self._looked = now
                    return file
            self._close()
        os.makedirs(os.path.dirname(self._path), 0o700, exist_ok=True)
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | _CLOEXEC | _NOFOLLOW | _NONBLOCK, 0o600)
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode):
            os.close(file)
            raise OSError(errno.EINVAL, "it is no file")
        self._file, self._identity, self._looked = file, (found.st_dev, found.st_ino), now
        return file

    # -- spools ------------------------------------------------------------------------------------------------------

    def spools(self, key: str) -> list[str]:
        """The names of the spools of who follows ``key``. One look at the folder's time, where nothing has changed."""
        with self._lock:
            try:
                changed = os.stat(self.folder, follow_symlinks=False).st_mtime_ns
                seen, settled = self._listed
                if changed != seen or not settled:
                    # A name that comes within a tick of the clock after it was listed does not change the time again.
                    self._spools = _listed(self.folder)
                    self._listed = (changed, abs(time.time() - changed / 1e9) > TICK_S)
            except OSError:
                return []
            return self._spools.get(_name(key), [])


class _Open:
    """The lock files of this process, by path."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # a claim may be collected, and so released, on a thread that holds it
        self.files: dict[str, _Files] = {}


_OPEN = _Open()


def _in_child() -> None:
    for files in _OPEN.files.values():
        if files._file is not None:
            os.close(files._file)  # its locks are the parent's: closing it here frees none of them
            files._file = None
    _OPEN.__init__()  # type: ignore[misc]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


class FileClaim:
    """`llmkit.state.shared.Claim` by a lock on a file."""

    __slots__ = ("_files", "_nonce", "_pieces", "_released", "_written", "key", "place", "token")

    def __init__(self, files: _Files, key: str, place: int) -> None:
        self.key = key
        self.place = place
        self.token = object()
        self._files = files
        self._nonce = ""  # tells followers this claim from the next one
        self._pieces: list[tuple[str, str]] = []
        self._written: dict[str, tuple[int | None, int]] = {}  # spool -> its descriptor, how many pieces it has
        self._released = False

    async def publish(self, pieces: list[tuple[str, str]]) -> None:
        self._pieces += pieces
        if self._files.process == os.getpid() and not self._released:
            self._write()

    def _write(self, **ending: Any) -> None:
        """Bring every spool up to date."""
        folder, names = self._files.folder, self._files.spools(self.key)
        for name in [*self._written.keys() - set(names)]:
            _close(self._written.pop(name)[0])
        for name in names[:MOST_SPOOLS]:
            file, had = self._written.get(name) or (_opened(os.path.join(folder, name)), -1)
            if file is not None and (had < len(self._pieces) or ending):
                self._nonce = self._nonce or os.urandom(8).hex()
                line = json.dumps({"by": self._nonce, "pieces": self._pieces[max(had, 0) :], **ending}) + "\n"
                file = _appended(file, line.encode())
            self._written[name] = (file, len(self._pieces))

    @property
    def followed(self) -> bool:
        return any(_is_alive(os.path.join(self._files.folder, name)) for name in self._written)

    async def release(self, failure: str | None = None) -> None:
        if self._released or self._files.process != os.getpid():
            return
        try:
            if failure is not None:
                self._write(end=True, failure=failure)
            elif self._written:
                self._write(end=True)
        finally:
            self._let_go()

    def _let_go(self) -> None:
        self._released = True
        for file, _ in self._written.values():
            _close(file)
        self._written.clear()
        self._files.release(self)

    def __del__(self) -> None:
        if not self._released:  # whoever had it is gone without a word, and its loop with it
            self._let_go()


class _Spool:
    """What a follower reads."""

    def __init__(self, path: str, file: int) -> None:
        self._path = path
        self._file = file
        self._rest = b""
        self._size = 0
        self._by: str | None = None
        self._beaten = float("-inf")
        self.failure: str | None = None
        self.ended = False

    @classmethod
    def made(cls, folder: str, key: str) -> _Spool | None:
        """A new one; None where it cannot be made: then the end is waited for, and nothing is seen before it."""
        try:
            _make_private(folder)
            _clean(folder)
            path = os.path.join(folder, f"{_name(key)}.{os.urandom(8).hex()}")
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | _CLOEXEC | _NOFOLLOW | getattr(os, "O_BINARY", 0)
            return cls(path, os.open(path, flags, 0o600))
        except OSError:
            log.debug("no spool can be made in %s", folder, exc_info=True)
            return None

    def read(self, now: float) -> list[tuple[str, str]]:
        """What has been written since the last time. Whatever another process wrote is checked before it is used."""
        if now - self._beaten >= BEAT_S:
            self._beaten = now
            with contextlib.suppress(OSError):
                os.utime(self._path)
        if self.ended or self._size > SPOOL_BYTES:
            return []
        try:
            data = os.read(self._file, READ_BYTES)
        except OSError:
            return []
        self._size += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        pieces: list[tuple[str, str]] = []
        for line in lines:
            if not self.ended:
                pieces += self._taken(line)
        return pieces

    def _taken(self, line: bytes) -> list[tuple[str, str]]:
        try:
            said = json.loads(line)
            by, pieces = said["by"], [(_text(text), _text(reasoning)) for text, reasoning in said["pieces"]]
            if by != (self._by or by):  # another one has the claim now, and begins from the beginning
                self.ended = True
                return []
            self._by = _text(by)
            self.failure = None if said.get("failure") is None else _text(said["failure"])
            self.ended = said.get("end") is True
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            self.ended = True  # the answer is in the entries, if there is one
            return []
        return pieces

    def remove(self) -> None:
        _close(self._file)
        with contextlib.suppress(OSError):
            os.unlink(self._path)


def _place(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "replace")).digest()[:8], "big") % PLACES


def _name(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()[:32]


def _text(value: Any) -> str:
    """Text that another process wrote; half a surrogate pair is no text, and printing it would fail."""
    if type(value) is not str:
        raise TypeError
    return value.encode("utf-8", "replace").decode("utf-8")


def _make_private(folder: str) -> None:
    """Make the folder, or see that it is nobody else's."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    found = os.stat(folder, follow_symlinks=False)
    if not stat.S_ISDIR(found.st_mode) or (hasattr(os, "getuid") and found.st_uid != os.getuid()):
        raise OSError(errno.EPERM, "it is not this user's folder")
    if found.st_mode & 0o077:
        os.chmod(folder, 0o700)


def _listed(folder: str) -> dict[str, list[str]]:
    spools: dict[str, list[str]] = {}
    with os.scandir(folder) as names:
        for _, entry in zip(range(MOST_NAMES), names, strict=False):
            spools.setdefault(entry.name.partition(".")[0], []).append(entry.name)
    return spools


def _is_alive(path: str) -> bool:
    """Whether a spool's follower has given a sign of life of late."""
    try:
        return abs(time.time() - os.stat(path, follow_symlinks=False).st_atime) < DEAD_S
    except OSError:
        return False


def _clean(folder: str) -> None:
    """Remove the spools of followers that died."""
    for names in _listed(folder).values():
        for name in names:
            path = os.path.join(folder, name)
            if not _is_alive(path):
                with contextlib.suppress(OSError):
                    os.unlink(path)


def _opened(path: str) -> int | None:
    """A spool to write to; None where it is not a private file of the same user."""
    try:
        file = os.open(path, os.O_WRONLY | os.O_APPEND | _CLOEXEC | _NOFOLLOW | _NONBLOCK | getattr(os, "O_BINARY", 0))
    except OSError:
        return None
    found = os.fstat(file)
    if not stat.S_ISREG(found.st_mode) or (hasattr(os, "getuid") and found.st_uid != os.getuid()):
        os.close(file)
        return None
    return file


def _appended(file: int, data: bytes) -> int | None:
    """Write it all; None where that is not possible (the disk is full): its follower reads the answers in the end."""
    try:
        while data:
            data = data[os.write(file, data) :]
    except OSError:
        _close(file)
        return None
    return file


def _close(file: int | None) -> None:
    if file is not None:
        with contextlib.suppress(OSError):
            os.close(file)
